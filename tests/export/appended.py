# SPDX-License-Identifier: Apache-2.0
"""A decoder's attention on a cache that other nodes put rows into, with rotary embedding and norms in front of it in
the spellings of exporters, as small ONNX models. Inputs: x [B, S, E], positions [B, S], past_key, past_value, unless
they are causal mask [B, 1, S, T], and where the cache has a fixed size, start. Used by test_sites_appended.py."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.export.site_graphs import Builder

PAST, ROWS = "past", "sequence"


@dataclasses.dataclass(frozen=True)
class Form:
    """One spelling. Defaults are the plainest."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 8
    rotary: str = "slices"  # see _Model._rotate; none
    turned: int = 8  # columns of a head that are
    table: str = "cat"  # cat: cos of (f, f); gather: rows of a stored table; pairs: each angle twice; half: once
    norm: str = "none"  # rsqrt, div, operator
    layout: str = "BHSD"  # in which heads are turned; BSHD ones are transposed then
    half: bool = False  # float16, angles too
    causal: bool = False  # by the positions of rows and keys instead of the mask
    # Concat; TensorScatter: each entry from its own start on; lengths: that, and ONNX's Attention with the lengths
    # behind the step; ScatterND: all entries from one start on, as PyTorch writes it; none: keys are the new rows alone
    cache: str = "Concat"
    flaw: str = "none"  # see _Model

    @property
    def is_fixed(self) -> bool:
        return self.cache not in ("Concat", "none")


class _Model(Builder):
    def __init__(self, form: Form):
        super().__init__()
        self.form = form
        self.dtype = np.float16 if form.half else np.float32
        self.rows_axis = form.layout.index("S")

    def number(self, x: float) -> str:
        return self.const(np.array(x, self.dtype))

    def place(self, x: int) -> str:
        return self.const(np.array(x, np.int64))

    def _rows(self) -> str:
        return self.op("Squeeze", self.op("Shape", "x", start=1, end=2))

    def cut(self, x: str, start: int, end: int, step: int = 1, axis: int = -1) -> str:
        return self.op("Slice", x, *(self.ints(k) for k in (start, end, axis, step)))

    def build(self) -> onnx.ModelProto:
        form, kind = self.form, TensorProto.FLOAT16 if self.form.half else TensorProto.FLOAT
        width = form.heads * form.dim
        x = self.add_input("x", kind, ["batch", ROWS, width])
        self.add_input("positions", TensorProto.INT64, ["batch", ROWS])
        pasts = () if form.cache == "none" else ("past_key", "past_value")
        caches = [self.add_input(name, kind, ["batch", form.kv_heads, PAST, form.dim]) for name in pasts]
        if form.is_fixed:
            self.add_input("start", TensorProto.INT64, [] if form.cache == "ScatterND" else ["batch"])
        if not form.causal and form.cache != "lengths":
            self.add_input("mask", TensorProto.BOOL, ["batch", 1, ROWS, ROWS if form.cache == "none" else "total"])
        q, k, v = (self._heads(x, n) for n in (form.heads, form.kv_heads, form.kv_heads))
        q, k = self._norm(q), self._norm(k)
        tables = self._tables()
        other = self._tables(shift=1) if form.flaw == "other angles" else tables
        q, k = self._rotate(q, tables, form.heads), self._rotate(k, other, form.kv_heads)
        q, k, v = (self._to_bhsd(t) for t in (q, k, v))
        if form.flaw == "key read elsewhere":
            self._export(self.op("ReduceSum", k, self.ints(2)), "elsewhere", kind)
        presents = [self._append(past, new) for past, new in zip(caches, (k, v), strict=False)]
        self._export(self._attend(q, *(presents or (k, v))), "y", kind)
        for value, name in zip(presents, ("present_key", "present_value"), strict=False):
            self._export(value, name, kind)
        return self.model()

    def _export(self, value: str, name: str, kind: int) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self.outputs.append(helper.make_tensor_value_info(name, kind, None))

    def _heads(self, x: str, count: int) -> str:
        """Projected, [B, H, S, D] or [B, S, H, D]."""
        form, width = self.form, self.form.heads * self.form.dim
        rng = np.random.default_rng(len(self.nodes))
        weight = (rng.standard_normal((width, count * form.dim)) / np.sqrt(width)).astype(self.dtype)
        flat = self.op("MatMul", x, self.const(weight))
        heads = self.op("Reshape", flat, self.ints(0, 0, count, form.dim))
        return heads if form.layout == "BSHD" else self.op("Transpose", heads, perm=[0, 2, 1, 3])

    def _to_bhsd(self, x: str) -> str:
        return x if self.form.layout == "BHSD" or self.form.rotary == "" else self.op("Transpose", x, perm=[0, 2, 1, 3])

    def _append(self, past: str, new: str) -> str:
        """Behind the past, or at the start."""
        if self.form.cache in ("TensorScatter", "lengths"):
            return self.op("TensorScatter", past, new, "start", axis=2)
        if self.form.cache == "ScatterND":
            front, back = [2, 0, 1, 3], [1, 2, 0, 3]
            moved = [self.op("Transpose", t, perm=front) for t in (past, new)]
            step = 2 if self.form.flaw == "every other row" else 1
            places = self.op("Range", *(self.place(0), self._rows(), self.place(1)))
            places = self.op("Add", self.op("Mul", places, self.place(step)) if step > 1 else places, "start")
            scattered = self.op("ScatterND", moved[0], self.op("Unsqueeze", places, self.ints(-1)), moved[1])
            return self.op("Transpose", scattered, perm=back)
        if self.form.flaw == "new rows first":
            return self.op("Concat", new, past, axis=2)
        return self.op("Concat", past, new, axis=-2)

    # Norms.

    def _norm(self, x: str) -> str:
        form = self.form
        if form.norm == "none":
            return x
        weight = np.random.default_rng(len(self.nodes)).uniform(0.5, 1.5, form.dim).astype(self.dtype)
        if form.norm == "operator":
            return self.op("SimplifiedLayerNormalization", x, self.const(weight), axis=-1, epsilon=1e-3)
        wide = self.op("Cast", x, to=TensorProto.FLOAT) if form.half and form.flaw != "norm in half" else x
        kind = self.dtype if form.flaw == "norm in half" else np.float32
        squares = self.op("Pow", wide, self.const(np.array(2, kind)))
        axes = 2 if form.flaw == "norm over rows" else -1
        mean = self.op("ReduceMean", squares, self.ints(axes), keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean, self.const(np.array(1e-3, kind))))
        if form.norm == "div":
            x = self.op("Div", wide, root)
        else:
            x = self.op("Mul", wide, self.op("Reciprocal", root))
        if wide.startswith("v") and form.half and form.flaw != "norm in half":
            x = self.op("Cast", x, to=TensorProto.FLOAT16)
        return self.op("Mul", self.const(weight), x)

    # Rotary embedding.

    def _tables(self, shift: int = 0) -> tuple[str, str]:
        """Cosines and sines, as they are multiplied by heads; of RotaryEmbedding operators, as these have them."""
        form = self.form
        pairs, frequencies = form.turned // 2, (0.5 ** np.arange(form.turned // 2)).astype(np.float32)
        if form.table == "gather" or "operator" in form.rotary:
            angles = (np.arange(64)[:, None] + shift) * frequencies
            angles = angles if "operator" in form.rotary else np.concatenate([angles, angles], -1)
            stored = [self.const(f(angles).astype(self.dtype)) for f in (np.cos, np.sin)]
            if "operator" in form.rotary:
                return stored[0], stored[1]
            cos, sin = (self.op("Gather", t, "positions", axis=0) for t in stored)
            return self._broadcast(cos), self._broadcast(sin)
        place = self.op("Cast", "positions", to=TensorProto.FLOAT)
        if shift:
            place = self.op("Add", place, self.const(np.float32(shift)))
        angles = self.op("Mul", self.op("Unsqueeze", place, self.ints(-1)), self.const(frequencies))
        if form.table == "cat":
            second = self.op("Neg", angles) if form.flaw == "other half" else angles
            angles = self.op("Concat", angles, second, axis=-1)
        elif form.table == "pairs":
            twice = self.op("Unsqueeze", angles, self.ints(3))
            twice = self.op("Expand", twice, self.ints(1, 1, 1, 2))
            angles = self.op("Reshape", twice, self.ints(0, 0, 2 * pairs))
        cos, sin = self.op("Cos", angles), self.op("Sin", angles)
        if form.half:
            cos, sin = (self.op("Cast", t, to=TensorProto.FLOAT16) for t in (cos, sin))
        if form.flaw == "one position":
            cos, sin = (self.cut(t, 0, 1, axis=1) for t in (cos, sin))
        return self._broadcast(cos), self._broadcast(sin)

    def _broadcast(self, table: str) -> str:
        return self.op("Unsqueeze", table, self.ints(self.form.layout.index("H")))

    def _rotate(self, x: str, tables: tuple[str, str], heads: int) -> str:
        form, n = self.form, self.form.turned
        if form.rotary == "none":
            return x
        if form.rotary == "operator":
            return self.op("RotaryEmbedding", x, *tables, "positions", **self._partial(heads, "rotary_embedding_dim"))
        if form.rotary == "onnxruntime's operator":
            self.contrib = True
            return self.op(
                "RotaryEmbedding", x, "positions", *tables, domain="com.microsoft",
                **self._partial(heads, "rotary_embedding_dim"),
            )  # fmt: skip
        rest = None if n == form.dim else self.cut(x, n, form.dim)
        x = x if rest is None else self.cut(x, 0, n)
        x = self._sum(x, *tables) if form.rotary != "halves" else self._halves(x, *tables)
        return x if rest is None else self.op("Concat", x, rest, axis=-1)

    def _partial(self, heads: int, name: str) -> dict:
        return {} if self.form.turned == self.form.dim else {name: self.form.turned, "num_heads": heads}

    def _sum(self, x: str, cos: str, sin: str) -> str:
        """x * cos + rotate_half(x) * sin."""
        return self.op("Add", self.op("Mul", x, cos), self.op("Mul", self._rotated_half(x), sin))

    def _rotated_half(self, x: str) -> str:
        form, n = self.form, self.form.turned
        if form.rotary == "pairs":
            parts = [self.op("Neg", self.cut(x, 1, n, 2)), self.cut(x, 0, n, 2)]
            stacked = self.op("Concat", *(self.op("Unsqueeze", p, self.ints(-1)) for p in parts), axis=-1)
            heads = {"H": 0, "S": 0}
            shape = [0, *(heads[letter] for letter in form.layout[1:3]), n]
            return self.op("Reshape", stacked, self.ints(*shape))
        if form.rotary == "split":
            first, second = self.op("Split", x, self.ints(n // 2, n // 2), num_outputs=2, axis=-1)
            return self.op("Concat", self.op("Mul", second, self.number(-1)), first, axis=-1)
        first, second = self.cut(x, 0, n // 2), self.cut(x, n // 2, n)
        if form.flaw == "wrong sign":
            return self.op("Concat", second, self.op("Neg", first), axis=-1)
        return self.op("Concat", self.op("Neg", second), first, axis=-1)

    def _halves(self, x: str, cos: str, sin: str) -> str:
        """Both halves by themselves, as gpt-oss has them."""
        first, second = self.op("Split", x, self.ints(*[self.form.turned // 2] * 2), num_outputs=2, axis=-1)
        return self.op(
            "Concat",
            self.op("Sub", self.op("Mul", first, cos), self.op("Mul", second, sin)),
            self.op("Add", self.op("Mul", second, cos), self.op("Mul", first, sin)),
            axis=-1,
        )

    # The core.

    def _attend(self, q: str, k: str, v: str) -> str:
        form = self.form
        if form.cache == "lengths":
            rows = self.op("Add", "start", self._rows() if form.flaw == "none" else self.place(1))
            self.nodes.append(
                helper.make_node("Attention", [q, k, v, "", "", "", rows], ["attended"], name="attend", is_causal=1)
            )
            y = self.op("Transpose", "attended", perm=[0, 2, 1, 3])
            return self.op("Reshape", y, self.ints(0, 0, form.heads * form.dim))
        k, v = self._repeat(k), self._repeat(v)
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = self.op("Mul", scores, self.number(form.dim**-0.5))
        if form.flaw == "scale of the length":
            length = self.op("Cast", self.op("Shape", k, start=2, end=3), to=TensorProto.FLOAT)
            scores = self.op("Div", scores, length)
        mask = self._causal(q, k) if form.causal else "mask"
        scores = self.op("Where", mask, scores, self.number(-1e4))
        y = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        y = self.op("Transpose", y, perm=[0, 2, 1, 3])
        return self.op("Reshape", y, self.ints(0, 0, form.heads * form.dim))

    def _repeat(self, x: str) -> str:
        form = self.form
        group = form.heads // form.kv_heads
        if group == 1:
            return x
        wide = self.op("Unsqueeze", x, self.ints(2))
        wide = self.op("Expand", wide, self.ints(1, 1, group, 1, 1))
        shape = self.op("Concat", self.ints(0, form.heads), self.op("Shape", x, start=2), axis=0)
        return self.op("Reshape", wide, shape)

    def _causal(self, q: str, k: str) -> str:
        """Row i is the key at i + past, or, with a flaw, at i."""
        rows, keys = (self.op("Squeeze", self.op("Shape", t, start=2, end=3)) for t in (q, k))
        past = "start" if self.form.is_fixed else self.op("Sub", keys, rows)
        zero, one = self.place(0), self.place(1)
        row = self.op("Unsqueeze", self.op("Range", zero, rows, one), self.ints(1))
        row = row if self.form.flaw == "aligned at the top" else self.op("Add", row, past)
        return self.op("LessOrEqual", self.op("Range", zero, keys, one), row)

    def model(self) -> onnx.ModelProto:
        opset = 23 if self.form.rotary == "operator" else 18
        opset = 24 if self.form.cache in ("TensorScatter", "lengths") else opset
        imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.weights)
        return helper.make_model(graph, opset_imports=imports, ir_version=10)


def model_of(form: Form) -> onnx.ModelProto:
    return _Model(form).build()


def feeds(
    form: Form, batch: int, rows: int, past: int, seed: int = 0, positions: str = "behind"
) -> dict[str, np.ndarray]:
    """positions: behind (those behind the past), repeated (few numbers, in no order), or of each entry alone."""
    rng = np.random.default_rng(seed)
    kind = np.float16 if form.half else np.float32
    place = np.broadcast_to(past + np.arange(rows), (batch, rows)).copy()
    if positions == "repeated":
        place = rng.integers(0, 5, (batch, rows))
    elif positions == "apart":
        place += rng.integers(0, 9, (batch, 1))
    size = past + rows + 2 if form.is_fixed else past  # of the cache
    cache, keys = (batch, form.kv_heads, size, form.dim), size if form.is_fixed else past + rows
    keys = rows if form.cache == "none" else keys
    start = rng.integers(0, past + 1, () if form.cache == "ScatterND" else batch)
    return {
        "x": rng.standard_normal((batch, rows, form.heads * form.dim)).astype(kind),
        "positions": place.astype(np.int64),
        "past_key": rng.standard_normal(cache).astype(kind),
        "past_value": rng.standard_normal(cache).astype(kind),
        "mask": rng.random((batch, 1, rows, keys)) < 0.8,
        "start": np.asarray(start, np.int64),
    }
