# SPDX-License-Identifier: Apache-2.0
"""A grammar of attention graphs: masks in the spellings of exporters, and near misses. Used by test_random_graphs.py.

A Recipe says what is drawn; `build` writes it as an ONNX model with inputs q, k, v [B, H, S, D] of dynamic sizes and
whatever its masks read; `feeds` draws inputs.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

HEADS, HEAD_DIM, MAX_LENGTH, OPSET = 2, 8, 32, 20
MINIMUM = float(np.finfo(np.float32).min)

CAUSAL = (
    "j <= i", "i >= j", "not j > i", "j < i + 1", "i - j >= 0", "trilu", "buffer", "not upper", "float buffer",
    "j <= i + 1", "j <= i - 1",
)  # fmt: skip
WINDOWS = ("j > i - w", "i - j < w", "abs(i - j) <= w", "j <= i + w", "i < j + w")
PADDING = ("unsqueeze", "gather_nd", "flat gather", "not equal 0", "greater half", "rows")
OTHERS = ("always", "chunk", "prefix", "input mask", "segments", "lengths")
FILLS = (-np.inf, MINIMUM, -np.inf, MINIMUM, -1e9, -1e4, -5.0, -1.0)
FORMS = ("where add", "where scores", "where not scores", "float add", "max clamp")
BIASES = ("none", "input", "alibi j", "alibi distance", "alibi counted", "padding", "table", "row", "query")
ROW_GUARDS = ("none", "none", "none", "whole", "first", "off by one", "table > -2", "table > -0.5")
NEAR_MISSES = (*["none"] * 16, "other axis", "second consumer", "data scale", "post scale")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One drawn graph. `parts` are and-ed; with `apart` each is applied by itself."""

    parts: tuple[str, ...]
    window: int = 3
    fill: float = MINIMUM
    form: str = "where add"
    apart: bool = False
    negate_first: bool = False
    bias: str = "none"
    bias_first: bool = True
    scale_after_mask: bool = False
    cache: bool = False
    guard: bool = False
    row_guard: str = "none"  # 0 where a row sees no key in the whole mask, or its first part; or off by one
    near_miss: str = "none"


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    pools = [CAUSAL, WINDOWS, PADDING, OTHERS]
    parts = draw(st.lists(st.sampled_from(pools).flatmap(st.sampled_from), min_size=0, max_size=3, unique=True))
    return Recipe(
        parts=tuple(parts),
        window=draw(st.integers(0, 5)),
        fill=draw(st.sampled_from(FILLS)),
        form=draw(st.sampled_from(FORMS)),
        apart=draw(st.booleans()),
        negate_first=draw(st.sampled_from((False, False, False, True))),
        bias=draw(st.sampled_from(BIASES)),
        bias_first=draw(st.booleans()),
        scale_after_mask=draw(st.sampled_from((False, False, True))),
        cache=draw(st.booleans()),
        guard=draw(st.booleans()),
        row_guard=draw(st.sampled_from(ROW_GUARDS)),
        near_miss=draw(st.sampled_from(NEAR_MISSES)),
    )


class _Graph:
    """Collects nodes; every method returns the name of a value."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: dict[str, onnx.ValueInfoProto] = {}

    def __call__(self, op_type: str, *inputs: str, **attributes: object) -> str:
        name = f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=f"node_{name}", **attributes))
        return name

    def const(self, value: object, dtype: type = np.int64) -> str:
        name = f"const_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def input(self, name: str, dtype: int, shape: list[int | str]) -> str:
        self.inputs[name] = helper.make_tensor_value_info(name, dtype, shape)
        return name

    def size(self, value: str, axis: int) -> str:
        return self("Squeeze", self("Shape", value, start=axis, end=axis + 1))

    def arange(self, size: str) -> str:
        return self("Range", self.const(0), size, self.const(1))

    def unsqueeze(self, value: str, *axes: int) -> str:
        return self("Unsqueeze", value, self.const(list(axes)))


class _Builder:
    def __init__(self, recipe: Recipe):
        self.r, self.g = recipe, _Graph()

    def build(self) -> onnx.ModelProto:
        g, r = self.g, self.r
        for name in "qkv":
            g.input(name, TensorProto.FLOAT, ["batch", HEADS, "sequence", HEAD_DIM])
        key, value = "k", "v"
        self.past = g.const(0)
        if r.cache:
            for name in ("past_k", "past_v"):
                g.input(name, TensorProto.FLOAT, ["batch", HEADS, "past_sequence", HEAD_DIM])
            key, value = g("Concat", "past_k", "k", axis=2), g("Concat", "past_v", "v", axis=2)
            self.past = g.size("past_k", 2)
        self.length = g.size("q", 2)
        self.total = g("Add", self.past, self.length) if r.cache else self.length
        i = g.arange(self.length)
        self.i = g.unsqueeze(g("Add", i, self.past) if r.cache else i, 0, 1, 3)  # [1, 1, S, 1]
        self.j = g.unsqueeze(g.arange(self.total), 0, 1, 2)  # [1, 1, 1, T]
        scores = g("MatMul", "q", g("Transpose", key, perm=[0, 1, 3, 2]))
        probabilities = self._softmax(self._scores(scores))
        outputs = [g("MatMul", probabilities, value)]
        if r.near_miss == "post scale":
            outputs[0] = g("MatMul", g("Mul", probabilities, g.const([0.5], np.float32)), value)
        outputs[0] = self._row_guarded(outputs[0])
        if r.near_miss == "second consumer":
            outputs.append(g("ReduceSum", probabilities, g.const([-1, -2])))
        shapes = (["batch", HEADS, "sequence", HEAD_DIM], ["batch", HEADS, 1, 1])
        infos = [
            helper.make_tensor_value_info(*info) for info in zip(outputs, [TensorProto.FLOAT] * 2, shapes, strict=False)
        ]
        graph = helper.make_graph(g.nodes, "random", list(g.inputs.values()), infos, g.initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)

    def _scores(self, scores: str) -> str:
        g, r = self.g, self.r
        scale = g.const(0.35, np.float32)
        if r.near_miss == "data scale":
            scale = g.input("temperature", TensorProto.FLOAT, [])
        if not r.scale_after_mask:
            scores = g("Mul", scores, scale)
        scores = self._biased(scores) if r.bias_first else scores
        parts = [self._part(name) for name in r.parts]
        if parts and r.negate_first:
            parts[0] = g("Not", parts[0])
        self.first = parts[:1]
        if parts and not r.apart:
            whole = parts[0]
            for part in parts[1:]:
                whole = g("And", whole, part)
            parts = [whole]
        self.visible = parts
        for part in parts:
            scores = self._masked(scores, part)
        scores = scores if r.bias_first else self._biased(scores)
        return g("Mul", scores, scale) if r.scale_after_mask else scores

    def _softmax(self, scores: str) -> str:
        g, r = self.g, self.r
        p = g("Softmax", scores, axis=2 if r.near_miss == "other axis" else -1)
        return g("Where", g("IsNaN", p), g.const(0.0, np.float32), p) if r.guard else p

    def _row_guarded(self, output: str) -> str:
        g, kind = self.g, self.r.row_guard
        masks = self.first if kind == "first" else self.visible
        if kind == "none" or not masks:
            return output
        mask = masks[0]
        if kind.startswith("table >") and self.r.bias == "table":
            mask = g("And", mask, g("Greater", self.table, g.const(kind.split()[-1], np.float32)))
        count = g("ReduceSum", g("Cast", mask, to=TensorProto.FLOAT), g.const([-1]))
        empty = g("Less", count, g.const(2.0 if kind == "off by one" else 1.0, np.float32))
        return g("Where", empty, g.const(0.0, np.float32), output)

    def _masked(self, scores: str, keep: str) -> str:
        g, r = self.g, self.r
        fill, zero = g.const(r.fill, np.float32), g.const(0.0, np.float32)
        if r.form == "where scores":
            return g("Where", keep, scores, fill)
        if r.form == "where not scores":
            return g("Where", g("Not", keep), fill, scores)
        if r.form == "float add" and np.isfinite(r.fill):
            gone = g("Sub", g.const(1.0, np.float32), g("Cast", keep, to=TensorProto.FLOAT))
            return g("Add", scores, g("Mul", gone, fill))
        scores = g("Add", scores, g("Where", keep, zero, fill))
        return g("Max", scores, g.const(MINIMUM, np.float32)) if r.form == "max clamp" else scores

    def _biased(self, scores: str) -> str:
        g, kind = self.g, self.r.bias
        slopes = g.const(np.asarray([0.5, 0.125]).reshape(1, HEADS, 1, 1), np.float32)
        if kind == "input":
            return g("Add", scores, g.input("bias", TensorProto.FLOAT, [1, HEADS, "sequence", "total"]))
        if kind == "alibi j":
            return g("Add", scores, g("Mul", slopes, g("Cast", self.j, to=TensorProto.FLOAT)))
        if kind == "padding":  # (1 - mask) * minimum, as BERT and GPT-2 had it
            padded = g("Sub", g.const(1.0, np.float32), g("Cast", self._attention_mask(), to=TensorProto.FLOAT))
            return g("Add", scores, g("Mul", g.unsqueeze(padded, 1, 2), g.const(MINIMUM, np.float32)))
        if kind == "alibi counted":
            mask = self._attention_mask()
            places = g("Mul", g("Sub", g("CumSum", mask, g.const(-1)), g.const(1)), mask)
            return g("Add", scores, g("Mul", slopes, g("Cast", g.unsqueeze(places, 1, 2), to=TensorProto.FLOAT)))
        if kind == "alibi distance":
            distance = g("Cast", g("Neg", g("Abs", g("Sub", self.i, self.j))), to=TensorProto.FLOAT)
            return g("Add", scores, g("Mul", distance, slopes))
        if kind == "table":
            table = g.const(np.linspace(-1, 1, HEADS * 2 * MAX_LENGTH).reshape(-1, HEADS) ** 3, np.float32)
            places = g("Add", g("Sub", self.j, self.i), g.const(MAX_LENGTH))
            picked = g("Gather", table, g("Squeeze", places, g.const([0, 1])), axis=0)  # [S, T, H]
            self.table = g.unsqueeze(g("Transpose", picked, perm=[2, 0, 1]), 0)
            return g("Add", scores, self.table)
        if kind == "row":
            return g("Add", scores, g("Cast", self.i, to=TensorProto.FLOAT))
        if kind == "query":
            return g("Add", scores, g("MatMul", "q", g.const(np.linspace(-1, 1, HEAD_DIM)[:, None], np.float32)))
        return scores

    # ------------------------------------------------------------------------------------------ conditions

    def _part(self, name: str) -> str:
        if name in CAUSAL:
            return self._causal(name)
        return self._window(name) if name in WINDOWS else self._padding(name) if name in PADDING else self._other(name)

    def _causal(self, name: str) -> str:
        g, i, j = self.g, self.i, self.j
        if name in ("trilu", "buffer", "not upper", "float buffer"):
            return self._triangle(name)
        return {
            "j <= i": lambda: g("LessOrEqual", j, i),
            "i >= j": lambda: g("GreaterOrEqual", i, j),
            "not j > i": lambda: g("Not", g("Greater", j, i)),
            "j < i + 1": lambda: g("Less", j, g("Add", i, g.const(1))),
            "i - j >= 0": lambda: g("GreaterOrEqual", g("Sub", i, j), g.const(0)),
            "j <= i + 1": lambda: g("LessOrEqual", j, g("Add", i, g.const(1))),
            "j <= i - 1": lambda: g("LessOrEqual", j, g("Sub", i, g.const(1))),
        }[name]()

    def _triangle(self, name: str) -> str:
        g = self.g
        past, total = (g.unsqueeze(x, 0) for x in (self.past, self.total))
        if name in ("buffer", "float buffer"):
            dtype = np.bool_ if name == "buffer" else np.float32
            whole = g.const(np.tril(np.ones((1, 1, MAX_LENGTH, MAX_LENGTH))), dtype)
            rows = g("Slice", whole, past, total, g.const([2]))
            square = g("Slice", rows, g.const([0]), total, g.const([3]))
            return square if name == "buffer" else g("Equal", square, g.const(1.0, np.float32))
        shape = g("Concat", g.unsqueeze(self.length, 0), total, axis=0)
        ones = g("Expand", g.const(1.0, np.float32), shape)
        if name == "trilu":
            return g("Equal", g("Trilu", ones, self.past, upper=0), g.const(1.0, np.float32))
        above = g("Trilu", ones, g("Add", self.past, g.const(1)), upper=1)
        return g("Not", g("Cast", above, to=TensorProto.BOOL))

    def _window(self, name: str) -> str:
        g, i, j, w = self.g, self.i, self.j, self.g.const(self.r.window)
        return {
            "j > i - w": lambda: g("Greater", j, g("Sub", i, w)),
            "i - j < w": lambda: g("Less", g("Sub", i, j), w),
            "abs(i - j) <= w": lambda: g("LessOrEqual", g("Abs", g("Sub", i, j)), w),
            "j <= i + w": lambda: g("LessOrEqual", j, g("Add", i, w)),
            "i < j + w": lambda: g("Less", i, g("Add", j, w)),
        }[name]()

    def _attention_mask(self) -> str:
        return self.g.input("attention_mask", TensorProto.INT64, ["batch", "total" if self.r.cache else "sequence"])

    def _padding(self, name: str) -> str:
        """From attention_mask [batch, total], int64."""
        g, mask = self.g, self._attention_mask()
        flags = g("Cast", mask, to=TensorProto.BOOL)
        batch = g.arange(g.size("q", 0))
        if name == "gather_nd":
            rows, columns = g.unsqueeze(batch, 1, 2, 3), self.j
            shape = g("Shape", g("Max", rows, columns))
            pairs = [g.unsqueeze(g("Expand", x, shape), -1) for x in (rows, columns)]
            return g("GatherND", flags, g("Concat", *pairs, axis=-1))
        if name == "flat gather":
            places = g("Add", self.j, g("Mul", g.unsqueeze(batch, 1, 2, 3), g.size(mask, 1)))
            found = g("Gather", g("Reshape", flags, g.const([-1])), places)
            return g("Reshape", g("Reshape", found, g.const([-1])), g("Shape", places))
        if name == "not equal 0":
            return g("Not", g("Equal", g.unsqueeze(mask, 1, 2), g.const(0)))
        if name == "greater half":
            return g("Greater", g.unsqueeze(g("Cast", mask, to=TensorProto.FLOAT), 1, 2), g.const(0.5, np.float32))
        if name == "rows" and not self.r.cache:
            return g.unsqueeze(flags, 1, 3)
        return g.unsqueeze(flags, 1, 2)

    def _other(self, name: str) -> str:
        g, i, j = self.g, self.i, self.j
        if name == "always":
            return g("GreaterOrEqual", i, g.const(0))
        if name == "chunk":
            four = g.const(4)
            return g("Equal", g("Div", i, four), g("Div", j, four))
        if name == "prefix":
            return g("Or", g("LessOrEqual", j, i), g("Less", j, g.const(3)))
        if name == "segments":
            ids = g.input("segments", TensorProto.INT64, ["batch", "total"])
            tail = g("Gather", ids, g("Squeeze", i, g.const([0, 1, 3])), axis=1)
            return g("Equal", g.unsqueeze(tail, 1, 3), g.unsqueeze(ids, 1, 2))
        if name == "lengths":
            return g("Less", j, g.unsqueeze(g.input("lengths", TensorProto.INT64, ["batch"]), 1, 2, 3))
        return g.input("mask", TensorProto.BOOL, ["batch", 1, "sequence", "total"])


def build(recipe: Recipe) -> onnx.ModelProto:
    return _Builder(recipe).build()


def feeds(model: onnx.ModelProto, seed: int) -> dict[str, np.ndarray]:
    """Random inputs at random sizes: batch 1 … 3, up to 9 queries and 4 keys from a cache."""
    random = np.random.default_rng(seed)
    names = {i.name for i in model.graph.input}
    sizes = {
        "batch": int(random.integers(1, 4)),
        "sequence": int(random.integers(1, 10)),
        "past_sequence": int(random.integers(0, 5)),
    }
    sizes["total"] = sizes["sequence"] + (sizes["past_sequence"] if "past_k" in names else 0)
    result = {}
    for info in model.graph.input:
        shape = [d.dim_value or sizes[d.dim_param] for d in info.type.tensor_type.shape.dim]
        result[info.name] = _draw(info.name, shape, sizes, random)
    return result


def _draw(name: str, shape: list[int], sizes: dict[str, int], random: np.random.Generator) -> np.ndarray:
    if name == "attention_mask":
        return (random.random(shape) < 0.7).astype(np.int64)
    if name == "mask":
        return random.random(shape) < 0.7
    if name == "segments":
        return np.sort(random.integers(0, 3, shape), axis=-1)
    if name == "lengths":
        return random.integers(0, sizes["total"] + 2, shape)
    if name == "temperature":
        return np.asarray(0.4, np.float32)
    return random.standard_normal(shape).astype(np.float32)
