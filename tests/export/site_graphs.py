# SPDX-License-Identifier: Apache-2.0
"""Attention written out in the spellings of exporters, as small ONNX models: a Form says which, `build` makes the
model.

Used by test_sites.py (one form a test) and test_sites_random.py (random forms). Inputs: x [B, S, E], for some forms
more.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# ONNX text for the nodes of `ahead`, bool [S, S]: keys later than the row. Uses the query q [B, H, S, D].
AHEAD = """size = Shape(q)
two = Constant<value = int64 {2}>()
rows = Gather(size, two)
zero = Constant<value = int64 {0}>()
one = Constant<value = int64 {1}>()
place = Range(zero, rows, one)
standing = Constant<value = int64[2] {-1, 1}>()
row = Reshape(place, standing)
ahead = Greater(place, row)"""

HIDDEN_WEIGHTS = np.random.default_rng(7)


@dataclasses.dataclass(frozen=True)
class Form:
    """One spelling. Defaults are the plainest."""

    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 8
    rank: str = (
        "4d"  # 4d; 3d: batch and heads merged (bmm); einsum: never transposed; single: 3-D without heads; 5d: grouped;
    )
    # channels_first: one head, [B, C, S], V P^T
    packed: str = "none"  # none; split: one projection, Split; gather: [B, S, 3, H, D] transposed and indexed; slice
    key: str = "after"  # after: K transposed as [B, H, S, D]; direct: by one Transpose to [B, H, D, S]
    scale: str = "scores"  # scores, query, key, both, div, runtime, none; learnt: a weight for each head
    softmax: str = "node"  # node, positive_axis, handwritten, log, minus_max, cast, guard, transposed
    repeat: str = "expand"  # expand, gather, tile (not GQA: the heads' order differs), concat
    mask: str = "none"  # none, add, where, causal, bias3d, sub, zero, clamp
    softcap: float = 0.0
    sinks: bool = False
    output: str = "merge"  # merge: [B, S, H * D]; heads: [B, H, S, D]; flat: [B * S, H * D]
    dynamic: bool = True  # symbolic batch and sequence
    flaw: str = "none"  # one of FLAWS: what makes it no attention that may be fused


FLAWS = {
    "weights_output": "also an output of the model",
    "weights_used_twice": "used twice",
    "scores_used_twice": "used twice",
    "scores_output": "also an output of the model",
    "softmax_over_queries": "",
    "scores_times_scores": "rows and keys",
    "multiplied_after": "used twice",
    "constant_values": "constant",
    "quantized": "quantized",
    "bias_before_softcap": "before the softcap",
    "mixed_heads": "",
    "sigmoid": None,  # no softmax: not even a site
}


class Builder:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.count = 0

    def const(self, array) -> str:
        self.count += 1
        name = f"c{self.count}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))

    def op(self, op_type: str, *inputs: str, num_outputs: int = 1, **attributes):
        self.count += 1
        names = [f"v{self.count}_{i}" for i in range(num_outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, names, name=f"{op_type}_{self.count}", **attributes))
        return names[0] if num_outputs == 1 else names

    def add_input(self, name: str, dtype: int, shape: list) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def linear(self, x: str, rows: int, columns: int) -> str:
        weight = HIDDEN_WEIGHTS.standard_normal((rows, columns)).astype(np.float32) / math.sqrt(rows)
        return self.op("MatMul", x, self.const(weight))

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


class _Attention:
    def __init__(self, form: Form):
        self.form, self.b = form, Builder()
        self.embed = form.heads * form.head_dim
        self.batch, self.rows = ("batch", "sequence") if form.dynamic else (2, 6)

    def build(self) -> onnx.ModelProto:
        form, b = self.form, self.b
        x = b.add_input("x", TensorProto.FLOAT, [self.batch, self.rows, self.embed])
        query, key, value = self._project(x)
        scores = self._scores(query, key)
        scores = self._mask(self._softcap(scores))
        weights = self._softmax(scores)
        y = self._finish(self._times_value(weights, value))
        b.nodes.append(helper.make_node("Identity", [y], ["y"], name="last"))
        b.outputs.insert(0, helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
        if form.flaw == "weights_output":
            self._export(weights)
        return b.model()

    def _export(self, value: str) -> None:
        self.b.outputs.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, None))

    # Query, key and value.

    def _project(self, x: str) -> list[str]:
        form, b = self.form, self.b
        widths = [form.heads * form.head_dim, form.kv_heads * form.head_dim, form.kv_heads * form.head_dim]
        if form.packed == "none":
            flat = [b.linear(x, self.embed, w) for w in widths]
        elif form.packed == "gather":
            return self._gathered(b.linear(x, self.embed, 3 * self.embed))
        else:
            packed = b.linear(x, self.embed, sum(widths))
            ends = np.cumsum([0, *widths])
            if form.packed == "split":
                flat = b.op("Split", packed, b.ints(*widths), num_outputs=3, axis=-1)
            else:
                flat = [
                    b.op("Slice", packed, b.ints(i), b.ints(j), b.ints(2)) for i, j in zip(ends, ends[1:], strict=False)
                ]
        if form.rank == "single":
            return flat
        if form.rank == "channels_first":
            return [b.op("Transpose", v, perm=[0, 2, 1]) for v in flat]
        counts = [form.heads, form.kv_heads, form.kv_heads]
        split = [b.op("Reshape", v, b.ints(0, 0, n, form.head_dim)) for v, n in zip(flat, counts, strict=True)]
        if form.rank == "einsum":
            return split
        return [b.op("Transpose", v, perm=[0, 2, 1, 3]) for v in split]

    def _gathered(self, packed: str) -> list[str]:
        form, b = self.form, self.b
        five = b.op("Reshape", packed, b.ints(0, 0, 3, form.heads, form.head_dim))
        five = b.op("Transpose", five, perm=[2, 0, 3, 1, 4])
        return [b.op("Gather", five, b.const(np.int64(i)), axis=0) for i in range(3)]

    def _repeat(self, value: str) -> str:
        """kv heads to query heads."""
        form, b = self.form, self.b
        group = form.heads // form.kv_heads
        if group == 1:
            return value
        if form.repeat == "gather":
            return b.op("Gather", value, b.const(np.repeat(np.arange(form.kv_heads), group)), axis=1)
        if form.repeat == "tile":
            return b.op("Tile", value, b.ints(1, group, 1, 1))
        five = b.op("Unsqueeze", value, b.ints(2))
        if form.repeat == "concat":
            wide = b.op("Concat", *[five] * group, axis=2)
        else:
            wide = b.op("Expand", five, b.ints(1, 1, group, 1, 1))
        shape = b.op("Shape", value)
        last = b.op("Slice", shape, b.ints(2), b.ints(4))
        return b.op(
            "Reshape",
            wide,
            b.op("Concat", b.op("Slice", shape, b.ints(0), b.ints(1)), b.ints(form.heads), last, axis=0),
        )

    def _merge(self, value: str) -> str:
        return (
            self.b.op("Reshape", value, self.b.ints(-1, self._time(value), self.form.head_dim))
            if not self.form.dynamic
            else (self.b.op("Squeeze", self.b.op("Reshape", value, self.b.ints(-1, 1, 0, 0)), self.b.ints(1)))
        )

    def _time(self, value: str) -> int:
        return 6

    # Scores.

    def _scaled(self, value: str, factor: float) -> str:
        return self.b.op("Mul", value, self.b.const(np.float32(factor)))

    def _runtime_scale(self, query: str) -> str:
        b = self.b
        size = b.op("Cast", b.op("Slice", b.op("Shape", query), b.ints(-1), b.ints(2**62)), to=TensorProto.FLOAT)
        return b.op("Div", b.const(np.float32([1.0])), b.op("Sqrt", size))

    def _scores(self, query: str, key: str) -> str:
        form, b = self.form, self.b
        scale = form.head_dim**-0.5 if form.rank not in ("single", "channels_first") else self.embed**-0.5
        if form.scale in ("query", "both"):
            query = self._scaled(query, scale if form.scale == "query" else math.sqrt(scale))
        if form.scale in ("key", "both"):
            key = self._scaled(key, scale if form.scale == "key" else math.sqrt(scale))
        if form.scale == "runtime":
            query = b.op("Mul", query, self._runtime_scale(query))
        if form.rank == "4d":
            key = self._repeat(key)
        scores = self._product(query, key)
        if form.scale == "scores":
            scores = self._scaled(scores, scale)
        elif form.scale == "learnt":
            weight = self.b.const(HIDDEN_WEIGHTS.uniform(0.1, 1, (form.heads, 1, 1)).astype(np.float32))
            scores = b.op("Mul", scores, weight)
        elif form.scale == "div":
            scores = b.op("Div", scores, b.const(np.float32(1 / scale)))
        if form.flaw == "scores_times_scores":
            scores = b.op("Mul", scores, b.op("Sigmoid", scores))
        if form.flaw == "mixed_heads":
            mixed = b.op("Transpose", scores, perm=[0, 2, 3, 1])
            scores = b.op("Transpose", b.linear(mixed, form.heads, form.heads), perm=[0, 3, 1, 2])
        if form.flaw == "quantized":
            scores = self._quantized(scores)
        return scores

    def _quantized(self, value: str) -> str:
        scale, zero = self.b.const(np.float32(0.05)), self.b.const(np.int8(0))
        return self.b.op("DequantizeLinear", self.b.op("QuantizeLinear", value, scale, zero), scale, zero)

    def _product(self, query: str, key: str) -> str:
        form, b = self.form, self.b
        if form.rank == "einsum" and form.kv_heads < form.heads:
            grouped = b.op("Reshape", query, b.ints(0, 0, form.kv_heads, form.heads // form.kv_heads, form.head_dim))
            return b.op("Einsum", grouped, key, equation="bqkgd,bskd->bkgqs")
        if form.rank == "einsum":
            return b.op("Einsum", query, key, equation="bqhd,bkhd->bhqk")
        if form.rank == "single":
            return b.op("MatMul", query, b.op("Transpose", key, perm=[0, 2, 1]))
        if form.rank == "channels_first":
            return b.op("MatMul", b.op("Transpose", query, perm=[0, 2, 1]), key)
        if form.rank == "3d":
            return b.op("MatMul", self._merge(query), b.op("Transpose", self._merge(key), perm=[0, 2, 1]))
        if form.rank == "5d":
            shape = b.ints(0, form.kv_heads, form.heads // form.kv_heads, -1, form.head_dim)
            query = b.op("Reshape", query, shape)
            key = b.op("Unsqueeze", key, b.ints(2))
            return b.op("MatMul", query, b.op("Transpose", key, perm=[0, 1, 2, 4, 3]))
        if form.softmax == "transposed":
            return b.op("MatMul", key, b.op("Transpose", query, perm=[0, 1, 3, 2]))
        return b.op("MatMul", query, b.op("Transpose", key, perm=[0, 1, 3, 2]))

    def _softcap(self, scores: str) -> str:
        form, b = self.form, self.b
        if not form.softcap:
            return scores
        cap = b.const(np.float32(form.softcap))
        if form.flaw == "bias_before_softcap":
            scores = b.op("Add", scores, b.add_input("early", TensorProto.FLOAT, [self.rows, self.rows]))
        return b.op("Mul", b.op("Tanh", b.op("Div", scores, cap)), cap)

    def _mask(self, scores: str) -> str:
        form, b = self.form, self.b
        if form.flaw in ("scores_used_twice", "scores_output"):
            if form.flaw == "scores_output":
                self._export(scores)
            else:
                self._export(b.op("ReduceMean", scores, keepdims=0))
        if form.mask in ("add", "sub"):
            bias = b.add_input("bias", TensorProto.FLOAT, [self.rows, self.rows])
            return b.op("Add" if form.mask == "add" else "Sub", scores, bias)
        if form.mask == "where":
            keep = b.add_input(
                "keep", TensorProto.BOOL, [self.batch, 1, 1, self.rows] if form.rank != "3d" else [self.rows, self.rows]
            )
            return b.op("Where", keep, scores, b.const(np.float32(-1e30)))
        if form.mask == "causal":
            shape = b.op("Shape", scores)
            square = b.op("Slice", shape, b.ints(-2), b.ints(2**62))
            ones = b.op("ConstantOfShape", square, value=numpy_helper.from_array(np.ones(1, np.float32)))
            upper = b.op("Trilu", ones, b.const(np.int64(1)), upper=1)
            return b.op("Where", b.op("Cast", upper, to=TensorProto.BOOL), b.const(np.float32(-np.inf)), scores)
        if form.mask == "zero":
            return b.op("Add", scores, b.op("Mul", b.const(np.zeros((1, 1), np.float32)), b.const(np.float32(0))))
        if form.mask == "clamp":
            return b.op("Max", scores, b.const(np.float32(np.finfo(np.float32).min)))
        return scores

    # Probabilities.

    def _softmax(self, scores: str) -> str:
        form, b = self.form, self.b
        rank = {"3d": 3, "single": 3, "channels_first": 3, "5d": 5}.get(form.rank, 4)
        rank += form.rank == "einsum" and form.kv_heads < form.heads
        if form.flaw == "sigmoid":
            return b.op("Sigmoid", scores)
        if form.flaw == "softmax_over_queries":
            return b.op("Softmax", scores, axis=-2)
        if form.softmax == "transposed":
            return b.op("Transpose", b.op("Softmax", scores, axis=-2), perm=[0, 1, 3, 2])
        if form.sinks:
            return self._with_sink(scores)
        if form.softmax == "handwritten":
            exp = b.op("Exp", b.op("Sub", scores, b.op("ReduceMax", scores, b.ints(-1), keepdims=1)))
            weights = b.op("Div", exp, b.op("ReduceSum", exp, b.ints(-1), keepdims=1))
        elif form.softmax == "log":
            weights = b.op("Exp", b.op("LogSoftmax", scores, axis=-1))
        elif form.softmax == "minus_max":
            weights = b.op("Softmax", b.op("Sub", scores, b.op("ReduceMax", scores, b.ints(-1), keepdims=1)), axis=-1)
        elif form.softmax == "cast":
            double = b.op("Cast", scores, to=TensorProto.DOUBLE)
            weights = b.op("Cast", b.op("Softmax", double, axis=-1), to=TensorProto.FLOAT)
        else:
            weights = b.op("Softmax", scores, axis=rank - 1 if form.softmax == "positive_axis" else -1)
        if form.softmax == "guard":
            weights = b.op("Where", b.op("IsNaN", weights), b.const(np.float32(0)), weights)
        if form.flaw == "weights_used_twice":
            self._export(b.op("ReduceMean", weights, keepdims=0))
        if form.flaw == "multiplied_after":
            weights = b.op("Mul", weights, b.op("Sqrt", weights))
        return weights

    def _with_sink(self, scores: str) -> str:
        b, heads = self.b, self.form.heads
        sinks = b.const(HIDDEN_WEIGHTS.standard_normal(heads).astype(np.float32))
        column = b.op("Reshape", sinks, b.ints(1, heads, 1, 1))
        shape = b.op("Slice", b.op("Shape", scores), b.ints(0), b.ints(3))
        column = b.op("Expand", column, b.op("Concat", shape, b.ints(1), axis=0))
        weights = b.op("Softmax", b.op("Concat", scores, column, axis=-1), axis=-1)
        return b.op("Slice", weights, b.ints(0), b.ints(-1), b.ints(3))

    def _times_value(self, weights: str, value: str) -> str:
        form, b = self.form, self.b
        if form.flaw == "constant_values":
            value = b.const(HIDDEN_WEIGHTS.standard_normal((1, form.heads, 6, form.head_dim)).astype(np.float32))
            return b.op("MatMul", weights, value)
        if form.rank == "4d":
            return b.op("MatMul", weights, self._repeat(value))
        if form.rank == "einsum" and form.kv_heads < form.heads:
            return b.op("Einsum", weights, value, equation="bkgqs,bskd->bqkgd")
        if form.rank == "einsum":
            return b.op("Einsum", weights, value, equation="bhqk,bkhd->bqhd")
        if form.rank == "single":
            return b.op("MatMul", weights, value)
        if form.rank == "channels_first":
            return b.op("MatMul", value, b.op("Transpose", weights, perm=[0, 2, 1]))
        if form.rank == "5d":
            y = b.op("MatMul", weights, b.op("Unsqueeze", value, b.ints(2)))
            return b.op("Reshape", y, b.ints(0, form.heads, -1, form.head_dim))
        y = b.op("MatMul", weights, self._merge(value))
        if not form.dynamic:
            return b.op("Reshape", y, b.ints(-1, form.heads, 6, form.head_dim))
        return b.op("Reshape", b.op("Unsqueeze", y, b.ints(1)), b.ints(-1, form.heads, 0, 0))

    def _finish(self, y: str) -> str:
        form, b = self.form, self.b
        if form.rank in ("single", "channels_first") or form.output == "heads":
            return y
        if form.rank != "einsum":
            y = b.op("Transpose", y, perm=[0, 2, 1, 3])
        return b.op("Reshape", y, b.ints(*((0, 0, self.embed) if form.output == "merge" else (-1, self.embed))))


def build(form: Form) -> onnx.ModelProto:
    return _Attention(form).build()


def feeds(model: onnx.ModelProto, seed: int = 0, batch: int = 2, rows: int = 6) -> dict[str, np.ndarray]:
    """Random inputs; a bool mask leaves each row its first key."""
    rng = np.random.default_rng(seed)
    sizes = {"batch": batch, "sequence": rows}
    result = {}
    for value in model.graph.input:
        shape = [sizes[d.dim_param] if d.dim_param else d.dim_value for d in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.elem_type == TensorProto.BOOL:
            mask = rng.random(shape) < 0.6
            mask[..., 0] = True
            result[value.name] = mask
        else:
            result[value.name] = rng.standard_normal(shape).astype(np.float32)
    return result
