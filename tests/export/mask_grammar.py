# SPDX-License-Identifier: Apache-2.0
"""A grammar of attention graphs: masks in the spellings of exporters, and near misses. Used by test_random_graphs.py.

A Recipe says what is drawn; `build` writes it as an ONNX model with inputs q, k, v [B, H, S, D] of dynamic sizes (or
one packed input) and whatever its masks read; mask_feeds.py draws inputs.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.export.mask_conditions import (  # noqa: F401 (parts of the grammar)
    CAUSAL,
    GIVEN,
    HEAD_DIM,
    HEADS,
    MAX_LENGTH,
    OTHERS,
    PADDING,
    SQUARES,
    WINDOWS,
    Conditions,
    Graph,
)  # fmt: skip

OPSET = 20
PAST = ("past_k", "past_v")
WIDE = " (wide)"  # ends the name of a Cast that stays one in float16
MINIMUM = float(np.finfo(np.float32).min)

FILLS = (-np.inf, MINIMUM, -np.inf, MINIMUM, -1e9, -1e4, -5.0, -1.0)
FIRST_FILLS = (None, None, None, MINIMUM, -np.inf, -65504.0, -1e4)
FORMS = ("where add", "where scores", "where not scores", "float add", "max clamp")
BIASES = (
    "none", "input", "alibi j", "alibi distance", "alibi counted", "padding", "lower of two", "table", "row", "query",
)  # fmt: skip
ROW_GUARDS = ("none", "none", "none", "whole", "first", "off by one", "table > -2", "table > -0.5")
NEAR_MISSES = (
    *["none"] * 24, "other axis", "second consumer", "second consumer of scores", "data scale", "post scale",
    "late cap", "sink scaled", "mixed heads",
)  # fmt: skip
# Written out: "sum" divides by it, "sum + 1" has a sink of 0, in "hidden" the last mask hides exponentials; "column" is
# a Softmax with a column of 0 by Pad.
SOFTMAXES = ("node", "node", "node", "node", "sum", "sum + 1", "hidden", "hidden late", "column")
STRUCTURES = ("heads", "heads", "heads", "packed split", "packed slice", "bmm", "bmm with 4-D masks")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One drawn graph. `parts` are and-ed; with `apart` each is applied by itself."""

    parts: tuple[str, ...]
    window: int = 3
    fill: float = MINIMUM
    form: str = "where add"
    first_form: str = ""  # how the first part is applied, and by which number, if not like the others
    first_fill: float | None = None
    apart: bool = False
    negate_first: bool = False
    bias: str = "none"
    bias_first: bool = True
    scale_after_mask: bool = False
    cache: bool = False
    flat_cache: bool = False  # of rank 3: [batch, past, heads * head_dim]
    own_sizes: bool = False  # the mask's inputs have sizes of their own, which may be 1 when the model runs
    guard: bool = False
    row_guard: str = "none"  # 0 where a row sees no key in the whole mask, or its first part; or off by one
    near_miss: str = "none"
    structure: str = "heads"
    kv_heads: int = HEADS
    softcap: bool = False
    sinks: bool = False
    softmax: str = "node"
    dtype: str = "float32"
    wide_softmax: bool = False  # float16 alone: the softmax in float32, between Casts
    layers: int = 1  # that share masks and bias
    one_row: bool = False  # the query has one row, as the file says
    fixed: tuple[int, int] | None = None  # numbers of queries and of keys in a cache, where the file fixes all sizes


class _Builder(Conditions):
    def __init__(self, recipe: Recipe):
        self.r, self.g = recipe, Graph()

    def build(self) -> onnx.ModelProto:
        g, r = self.g, self.r
        query, key, value = self._operands()
        self.query = query
        self.past = g.const(0)
        if r.cache:
            past = [self._past(name) for name in PAST]
            key, value = (g("Concat", old, new, axis=2) for old, new in zip(past, (key, value), strict=True))
            self.past = g.size("past_k", 1 if r.flat_cache else 2)
        self.length = g.size(query, 2)
        self.total = g("Add", self.past, self.length) if r.cache else self.length
        i = g.arange(self.length)
        self.i = g.unsqueeze(g("Add", i, self.past) if r.cache else i, 0, 1, 3)  # [1, 1, S, 1]
        self.j = g.unsqueeze(g.arange(self.total), 0, 1, 2)  # [1, 1, 1, T]
        self.parts: list[str] | None = None
        self.bias = ""
        key, value = self._repeated(key), self._repeated(value)
        self.more: list[str] = []
        for _ in range(r.layers):
            query = self._attention(query, key, value)
        outputs = [query, *self.more]
        shapes = (["batch", HEADS, "sequence", HEAD_DIM], *[["batch", HEADS, 1, 1]] * len(self.more))
        infos = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in zip(outputs, shapes, strict=True)
        ]
        graph = helper.make_graph(g.nodes, "random", list(g.inputs.values()), infos, g.initializers)
        if r.fixed:
            _fix(graph, *r.fixed, r.cache)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)

    def _past(self, name: str) -> str:
        g, heads = self.g, self.r.kv_heads
        if not self.r.flat_cache:
            return g.input(name, TensorProto.FLOAT, ["batch", heads, "past_sequence", HEAD_DIM])
        flat = g.input(name, TensorProto.FLOAT, ["batch", "past_sequence", heads * HEAD_DIM])
        return g("Transpose", g("Reshape", flat, g.const([0, 0, heads, HEAD_DIM])), perm=[0, 2, 1, 3])

    def _operands(self) -> list[str]:
        """Query [B, H, S, D], key and value [B, H_kv, S, D]."""
        g, r = self.g, self.r
        counts = (HEADS, r.kv_heads, r.kv_heads)
        if not r.structure.startswith("packed"):
            shapes = [["batch", count, "sequence", HEAD_DIM] for count in counts]
            return [g.input(name, TensorProto.FLOAT, shape) for name, shape in zip("qkv", shapes, strict=True)]
        ends = np.cumsum([0, *(count * HEAD_DIM for count in counts)])
        packed = g.input("qkv", TensorProto.FLOAT, ["batch", "sequence", int(ends[-1])])
        if r.structure == "packed split":
            flat = g.many("Split", 3, packed, g.const(np.diff(ends)), axis=-1)
        else:
            flat = [g("Slice", packed, g.const([x]), g.const([y]), g.const([2])) for x, y in itertools.pairwise(ends)]
        split = [g("Reshape", x, g.const([0, 0, n, HEAD_DIM])) for x, n in zip(flat, counts, strict=True)]
        return [g("Transpose", x, perm=[0, 2, 1, 3]) for x in split]

    def _repeated(self, value: str) -> str:
        """The heads of keys and values, repeated for those of the queries."""
        g, groups = self.g, HEADS // self.r.kv_heads
        if groups == 1:
            return value
        wide = g("Expand", g.unsqueeze(value, 2), g.const([1, 1, groups, 1, 1]))
        return g("Reshape", wide, g.const([0, HEADS, -1, HEAD_DIM]))

    def _attention(self, query: str, key: str, value: str) -> str:
        g, r = self.g, self.r
        bmm = r.structure.startswith("bmm")
        if bmm:
            query, key, value = (self._merged(x) for x in (query, key, value))
        scores = g("MatMul", query, g("Transpose", key, perm=[0, 2, 1] if bmm else [0, 1, 3, 2]))
        if bmm:
            scores = self._apart(scores)
        if r.near_miss == "mixed heads":
            scores = g("Add", scores, g("ReduceMean", scores, g.const([1])))
        scores = self._scores(scores)
        if r.near_miss == "second consumer of scores":
            self.more.append(g("ReduceMax", scores, g.const([-1, -2])))
        probabilities = self._softmax(self._merged(scores) if r.structure == "bmm" else scores)
        if r.near_miss == "post scale":
            probabilities = g("Mul", probabilities, g("Sqrt", probabilities))
        if r.near_miss == "second consumer":
            self.more.append(g("ReduceSum", self._apart(probabilities), g.const([-1, -2])))
        if r.structure == "bmm with 4-D masks":
            probabilities = self._merged(probabilities)
        output = g("MatMul", probabilities, value)
        return self._row_guarded(self._apart(output) if bmm else output)

    def _merged(self, value: str) -> str:
        """[B, H, ...] as [B * H, ...]."""
        g = self.g
        shape = g("Concat", g.const([-1]), g("Shape", value, start=2), axis=0)
        return g("Reshape", value, shape)

    def _apart(self, value: str) -> str:
        """[B * H, ...] as [B, H, ...]."""
        g = self.g
        if not self.r.structure.startswith("bmm"):
            return value
        return g("Reshape", value, g("Concat", g.const([-1, HEADS]), g("Shape", value, start=-2), axis=0))

    def _scores(self, scores: str) -> str:
        g, r = self.g, self.r
        scale = g.const(0.35, np.float32)
        if r.near_miss == "data scale":
            scale = g.input("temperature", TensorProto.FLOAT, [])
        if not r.scale_after_mask:
            scores = g("Mul", scores, scale)
        scores = self._capped(scores) if r.softcap and r.near_miss != "late cap" else scores
        scores = self._biased(scores) if r.bias_first else scores
        if self.parts is None:
            self.parts = self._masks()
        for k, part in enumerate(self.parts[:-1] if self._hides() else self.parts):
            fill = r.fill if k or r.first_fill is None else r.first_fill
            scores = self._masked(scores, part, r.first_form if k == 0 and r.first_form else r.form, fill)
        scores = scores if r.bias_first else self._biased(scores)
        scores = self._capped(scores) if r.near_miss == "late cap" else scores
        return g("Mul", scores, scale) if r.scale_after_mask else scores

    def _capped(self, scores: str) -> str:
        g, cap = self.g, self.g.const(2.0, np.float32)
        return g("Mul", g("Tanh", g("Div", scores, cap)), cap)

    def _masks(self) -> list[str]:
        g, r = self.g, self.r
        parts = [self.part(name) for name in r.parts]
        if parts and r.negate_first:
            parts[0] = g("Not", parts[0])
        self.first = parts[:1]
        if parts and not r.apart:
            whole = parts[0]
            for part in parts[1:]:
                whole = g("And", whole, part)
            parts = [whole]
        return parts

    def _softmax(self, scores: str) -> str:
        g, r = self.g, self.r
        sinks = r.sinks and not r.structure.startswith("bmm") and r.softmax == "node"
        if sinks:
            column = g.const(np.asarray([0.5, -1.0]).reshape(1, HEADS, 1, 1), np.float32)
            column = g("Expand", column, g("Concat", g("Shape", scores, end=3), g.const([1]), axis=0))
            scores = g("Concat", scores, column, axis=-1)
            if r.near_miss == "sink scaled":
                scores = g("Mul", scores, g.const(0.5, np.float32))
        if r.wide_softmax:
            scores = g("Cast", scores, to=TensorProto.FLOAT)
            g.nodes[-1].name += WIDE
        p = self._weights(scores, -2 if r.near_miss == "other axis" else -1)
        if r.wide_softmax:
            p = g("Cast", p, to=TensorProto.FLOAT)
        p = g("Slice", p, g.const([0]), g.const([-1]), g.const([3])) if sinks else p
        return g("Where", g("IsNaN", p), g.const(0.0, np.float32), p) if r.guard else p

    def _hides(self) -> bool:
        """Is the last mask one of the exponentials?"""
        return self.r.softmax.startswith("hidden") and not self.r.structure.startswith("bmm") and bool(self.parts)

    def _weights(self, scores: str, axis: int) -> str:
        g, kind, last = self.g, self.r.softmax, self.g.const([-1])
        if kind == "column" and not self.r.structure.startswith("bmm"):
            padded = g("Pad", scores, g.const([0] * 7 + [1]), g.const(0.0, np.float32))
            return g("Slice", g("Softmax", padded, axis=-1), g.const([0]), last, g.const([3]))
        if kind in ("node", "column"):
            return g("Softmax", scores, axis=axis)
        top = g("ReduceMax", scores, last)
        e = g("Exp", g("Sub", scores, top))
        if self._hides():
            e = g("Mul", e, g("Cast", self.parts[-1], to=TensorProto.FLOAT))
        total = g("ReduceSum", e, last)
        if kind == "sum + 1":
            total = g("Add", total, g("Exp", g("Neg", top)))
        return g("Mul", e, g("Reciprocal", total)) if kind == "hidden late" else g("Div", e, total)

    def _row_guarded(self, output: str) -> str:
        g, kind = self.g, self.r.row_guard
        masks = self.first if kind == "first" else self.parts
        if kind == "none" or not masks:
            return output
        mask = masks[0]
        if kind.startswith("table >") and self.r.bias == "table":
            mask = g("And", mask, g("Greater", self.table, g.const(kind.split()[-1], np.float32)))
        count = g("ReduceSum", g("Cast", mask, to=TensorProto.FLOAT), g.const([-1]))
        empty = g("Less", count, g.const(2.0 if kind == "off by one" else 1.0, np.float32))
        return g("Where", empty, g.const(0.0, np.float32), output)

    def _masked(self, scores: str, keep: str, form: str, number: float) -> str:
        g = self.g
        fill, zero = g.const(number, np.float32), g.const(0.0, np.float32)
        if form == "where scores":
            return g("Where", keep, scores, fill)
        if form == "where not scores":
            return g("Where", g("Not", keep), fill, scores)
        if form == "float add" and np.isfinite(number):
            gone = g("Sub", g.const(1.0, np.float32), g("Cast", keep, to=TensorProto.FLOAT))
            return g("Add", scores, g("Mul", gone, fill))
        scores = g("Add", scores, g("Where", keep, zero, fill))
        return g("Max", scores, g.const(MINIMUM, np.float32)) if form == "max clamp" else scores

    def _biased(self, scores: str) -> str:
        if self.r.bias != "none" and not self.bias:
            self.bias = self._bias()
        return self.g("Add", scores, self.bias) if self.bias else scores

    def _bias(self) -> str:
        g, kind = self.g, self.r.bias
        slopes = g.const(np.asarray([0.5, 0.125]).reshape(1, HEADS, 1, 1), np.float32)
        if kind == "input":
            return g.input("bias", TensorProto.FLOAT, [1, HEADS, "sequence", "total"])
        if kind == "alibi j":
            return g("Mul", slopes, g("Cast", self.j, to=TensorProto.FLOAT))
        if kind == "padding":  # (1 - mask) * minimum, as BERT and GPT-2 had it
            padded = g("Sub", g.const(1.0, np.float32), g("Cast", self.attention_mask(), to=TensorProto.FLOAT))
            return g("Mul", g.unsqueeze(padded, 1, 2), g.const(MINIMUM, np.float32))
        if kind == "lower of two":  # as TimesFM has it, 1 for padding
            lowest = g.const(MINIMUM, np.float32)
            padded = g.input("padding", TensorProto.FLOAT, ["batch", "total" if self.r.cache else "sequence"])
            later = g("Where", g("Greater", self.j, self.i), lowest, g.const(0.0, np.float32))
            return g("Min", g("Mul", g.unsqueeze(padded, 1, 2), lowest), later)
        if kind == "alibi counted":
            mask = self.attention_mask()
            places = g("Mul", g("Sub", g("CumSum", mask, g.const(-1)), g.const(1)), mask)
            return g("Mul", slopes, g("Cast", g.unsqueeze(places, 1, 2), to=TensorProto.FLOAT))
        if kind == "alibi distance":
            distance = g("Cast", g("Neg", g("Abs", g("Sub", self.i, self.j))), to=TensorProto.FLOAT)
            return g("Mul", distance, slopes)
        if kind == "table":
            table = g.const(np.linspace(-1, 1, HEADS * 2 * MAX_LENGTH).reshape(-1, HEADS) ** 3, np.float32)
            places = g("Add", g("Sub", self.j, self.i), g.const(MAX_LENGTH))
            picked = g("Gather", table, g("Squeeze", places, g.const([0, 1])), axis=0)  # [S, T, H]
            self.table = g.unsqueeze(g("Transpose", picked, perm=[2, 0, 1]), 0)
            return self.table
        if kind == "row":
            return g("Cast", self.i, to=TensorProto.FLOAT)
        if kind == "query":
            return g("MatMul", self.query, g.const(np.linspace(-1, 1, HEAD_DIM)[:, None], np.float32))
        raise ValueError(kind)


def _fix(graph: onnx.GraphProto, length: int, past: int, cache: bool) -> None:
    """Numbers in the place of all names of sizes."""
    total = length + past * cache
    sizes = {"batch": 2, "entries": 2, "sequence": length, "past_sequence": past, "total": total, "tokens": total}
    for info in (*graph.input, *graph.output):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = sizes[dim.dim_param]


def build(recipe: Recipe) -> onnx.ModelProto:
    model = _build(recipe)
    for info in (*model.graph.input, *model.graph.output) if recipe.one_row else ():
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param == "sequence":
                dim.dim_value = 1
    return model


def _build(recipe: Recipe) -> onnx.ModelProto:
    """In float16 a mask's numbers are -inf, and stay it: what rows without keys give else is up to the runtime
    (docs/masks.md)."""
    if recipe.dtype == "float32":
        return _Builder(recipe).build()
    changes: dict[str, object] = {"bias": "none" if recipe.bias in ("padding", "lower of two") else recipe.bias}
    for name in ("fill", "first_fill"):
        number = getattr(recipe, name)
        changes[name] = -np.inf if number is not None and number <= -1e4 else number
    for name in ("form", "first_form"):
        changes[name] = "where add" if getattr(recipe, name) == "max clamp" else getattr(recipe, name)
    return in_half(dataclasses.replace(recipe, **changes))


def in_half(recipe: Recipe) -> onnx.ModelProto:
    """In float16 as it is: a mask's numbers from -65504 on are that number."""
    model = _Builder(recipe).build()
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor)
            limits = np.finfo(np.float16)
            kept = np.where(np.isfinite(array), np.clip(array, limits.min, limits.max), array)
            tensor.CopyFrom(numpy_helper.from_array(kept.astype(np.float16), tensor.name))
    for node in graph.node:
        if node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT and not node.name.endswith(WIDE):
            node.attribute[0].i = TensorProto.FLOAT16
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type == TensorProto.FLOAT:
            info.type.tensor_type.elem_type = TensorProto.FLOAT16
    return model
