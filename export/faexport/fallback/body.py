# SPDX-License-Identifier: Apache-2.0
"""The body of the stand-in function: docs/operator.md's arithmetic in standard ONNX operators of the model's opset.

Called by functions.py. Sums are taken in float32, as by the kernels. Numbers (scale, windows, heads …) are read from
the calling node's attributes; which inputs there are, layouts and words are fixed by `Form`. Before opset 13 no
operator reads an attribute of the calling node, so there the form fixes the numbers too. No Reshape has to guess a
size: the body runs for tensors without elements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from faexport.fallback.ops import READS_ATTRIBUTES, Ops
from faexport.fallback.rows import Rotary, Transform, first_position, written
from faexport.spec import DOMAIN, OP_TYPE, Layout
from faexport.understand.shapes.rules_operator import OPTIONAL_OUTPUTS

INTEGERS = (
    "q_num_heads",
    "kv_num_heads",
    "is_causal",
    "left_window_size",
    "right_window_size",
    "head_dim",
    "head_dim_v",
    "rotary_dim",
    "rotary_interleaved",
)
FLOATS = {"scale": 0.0, "softcap": 0.0, "q_norm_epsilon": 1e-6, "k_norm_epsilon": 1e-6}
DEFAULTS = {"left_window_size": -1, "right_window_size": -1}
LOWEST = float(np.finfo(np.float32).min)
WORDS = (
    "alignment", "empty_row", "float32_precision", "output_dtype", "query_layout", "key_layout", "value_layout",
    "output_layout", "optional_inputs", "optional_outputs", "cache_layout",
    "cache",
)  # fmt: skip
WORD_DEFAULTS = {"alignment": "onnx", "empty_row": "zero", "cache": "append"}


@dataclasses.dataclass(frozen=True)
class Form:
    """What the nodes that one function stands in for have in common."""

    layouts: tuple[Layout, ...]  # query, key, value, output
    inputs: tuple[
        str, ...
    ]  # roles after value: names of the operator's inputs; "float_mask" for an attn_mask of floats
    outputs: tuple[str, ...]  # names after the first
    alignment: str
    empty_row: str
    packed: bool = False
    windows: bool = False  # some node has one
    softcap: bool = False
    numbers: tuple[tuple[str, Any], ...] = ()  # attributes that are fixed, before opset READS_ATTRIBUTES
    float8: bool = False  # query, key and value are float8_e4m3fn
    heads: tuple[int, int] | None = None  # of query and key, where Range can't count them (before opset 11)
    rotary: Rotary | None = None
    cache_layout: Layout = Layout.BHSD  # of past and present
    writes: bool = False  # new rows go to a position of a cache of fixed size


def function(form: Form, opset: int, dtype: ir.DataType, overload: str = "") -> ir.Function:
    """The stand-in for nodes of this form whose output is of this type, for a model of this opset."""
    ops = Ops(opset, dict(form.numbers))
    inputs = [ir.Value(name=name) for name in ("query", "key", "value", *_names(form.inputs))]
    given = dict(zip(("query", "key", "value", *form.inputs), inputs, strict=True))
    outputs = _Attention(ops, form, given, dtype).build()
    graph = ir.Graph(inputs, outputs, nodes=ops.nodes, opset_imports={"": opset}, name=OP_TYPE)
    return ir.Function(DOMAIN, OP_TYPE, overload, graph=graph, attributes=_attributes())


def numbers_of(node: ir.Node) -> tuple[tuple[str, Any], ...]:
    """A node's attributes that are numbers, or the operator's defaults."""
    given = {
        attr.name: node.attributes[attr.name].value if attr.name in node.attributes else attr.value
        for attr in _attributes()
    }
    return tuple((name, tuple(x) if isinstance(x, list) else x) for name, x in given.items() if name not in WORDS)


def _names(roles: Sequence[str]) -> list[str]:
    return [f"{role}_{k}" if roles.count(role) > 1 else role for k, role in enumerate(roles)]


def _attributes() -> list[ir.Attr]:
    """All attributes that a node may have, with the operator's defaults."""
    result = [ir.AttrInt64(name, DEFAULTS.get(name, 0)) for name in INTEGERS]
    result += [ir.AttrFloat32(name, default) for name, default in FLOATS.items()]
    result += [ir.AttrInt64s("packed_columns", [0] * 6)]
    return result + [ir.AttrString(name, WORD_DEFAULTS.get(name, "")) for name in WORDS]


class _Attention:
    """Builds the body. Shapes: q [B, H_q, S_q, D], k [B, H_kv, S_kv, D], v [B, H_kv, S_kv, D_v], scores [B, H_q,
    S_q, S_kv]."""

    def __init__(self, ops: Ops, form: Form, given: dict[str, ir.Value], dtype: ir.DataType):
        self.ops, self.form, self.given, self.dtype = ops, form, given, dtype

    def build(self) -> list[ir.Value]:
        ops, given = self.ops, self.given
        q, k, v = (self._operand(n, name) for n, name in enumerate(("query", "key", "value")))
        transform = Transform(ops, given, self.form.rotary)
        q = transform(q, "q")
        if transform.changes("k"):
            k = ops("Cast", transform(k, "k"), to=int(self.dtype))
        self.past = ops.const([0])
        if "past_key" in given:
            past_key, past_value = (self._cached(given[name], ops.size(k, 1)) for name in ("past_key", "past_value"))
            self.past = ops.size(past_key, 2)
            if self.form.writes:
                self.past = first_position(ops, given, ops.size(q, 2))
                k, v = (
                    written(ops, given, past, new, self.past, self.dtype)
                    for past, new in ((past_key, k), (past_value, v))
                )
            else:
                k, v = ops.concat(past_key, k, axis=2), ops.concat(past_value, v, axis=2)
        present_key, present_value = (self._placed(x, self.form.cache_layout) for x in (k, v))
        q, k, v = (ops.float32(x) for x in (q, k, v))
        if "query_bias" in given:  # the sum is rounded to the query's type
            q = ops("Add", q, ops.float32(ops.unsqueeze(given["query_bias"], 1)))
            q = ops.float32(ops("Cast", q, to=int(self.dtype)))
        q, k, v = (self._descaled(x, f"{name}_descale") for x, name in ((q, "query"), (k, "key"), (v, "value")))
        self.rows, self.keys = ops.size(q, 2), ops.size(k, 2)
        k, v = (self._repeat(x, ops.size(q, 1)) for x in (k, v))
        scores = self._capped(ops("Mul", ops("MatMul", q, ops("Transpose", k, perm=[0, 1, 3, 2])), self._scale(q)))
        scores = self._masked(self._biased(scores))
        probabilities, lse, empty = self._softmax(scores)
        out = ops("MatMul", probabilities, v)
        if "empty_row_value" in given and empty is not None:
            out = ops("Where", empty, ops.float32(ops.unsqueeze(given["empty_row_value"], 1)), out)
        if "output_scale" in given:
            out = ops("Div", out, self._factors("output_scale"))
        if self.form.float8:  # at the end: Transpose takes float8 from opset 21 on only
            out = ops("Cast", self._placed(out, self.form.layouts[3]), to=int(self.dtype))
        else:
            out = self._placed(ops("Cast", out, to=int(self.dtype)), self.form.layouts[3])
        # A node's outputs are told by place, so those in front of its last one are there, be they wanted or not.
        places = [out, present_key, present_value, *([] if lse is None else [lse])]
        last = max((1 + OPTIONAL_OUTPUTS.index(name) for name in self.form.outputs), default=0)
        return [ops("Identity", x) for x in places[: last + 1]]

    # ------------------------------------------------------------------------------------------ operands

    def _operand(self, n: int, name: str) -> ir.Value:
        """[B, H, S, D] of query, key or value."""
        ops, x, layout = self.ops, self.given[name], self.form.layouts[n]
        x = ops.float32(x) if self.form.float8 else x
        if layout is Layout.BHSD:
            return x
        heads = "q_num_heads" if n == 0 else "kv_num_heads"
        if layout is Layout.BSH and self.form.packed:
            x = self._packed(x, n, ops.number(heads))
        elif layout is Layout.BSH:
            count = ops.vector(ops.number(heads))
            x = ops.resize(x, count, ops("Div", ops.size(x, 2), count))
        return ops("Transpose", x, perm=[0, 2, 1, 3])

    def _cached(self, x: ir.Value, count: ir.Value) -> ir.Value:
        """From the cache's layout to BHSD. `count`: of heads."""
        ops, layout = self.ops, self.form.cache_layout
        if layout is Layout.BSH:
            x = ops.resize(x, count, ops("Div", ops.size(x, 2), count))
        return x if layout is Layout.BHSD else ops("Transpose", x, perm=[0, 2, 1, 3])

    def _factors(self, name: str) -> ir.Value:
        """One factor, one for each head, or one for each batch entry and head: [1 or B, 1 or H, 1, 1]."""
        ops = self.ops
        return ops.unsqueeze(ops("Expand", self.given[name], ops.const([1, 1])), -1, -2)

    def _descaled(self, x: ir.Value, name: str) -> ir.Value:
        return self.ops("Mul", x, self._factors(name)) if name in self.given else x

    def _packed(self, x: ir.Value, n: int, heads: ir.Value) -> ir.Value:
        """[B, S, H, D] from columns start + head * stride … + head_dim of a 3-D tensor."""
        ops = self.ops
        columns = ops.ref("packed_columns", ir.AttributeType.INTS)
        start, stride = (ops("Gather", columns, ops.const(2 * n + part)) for part in (0, 1))
        width = ops.number("head_dim")
        if n == 2 and ops.opset < READS_ATTRIBUTES:
            width = ops.const(ops.numbers["head_dim_v"] or ops.numbers["head_dim"])
        elif n == 2:
            other = ops.number("head_dim_v")
            width = ops("Where", ops("Equal", other, ops.const(0)), width, other)
        first = ops("Add", ops("Mul", ops.arange(heads), stride), start)
        index = ops("Add", ops.unsqueeze(first, 1), ops.unsqueeze(ops.arange(width), 0))
        return ops("Gather", x, index, axis=2)

    def _repeat(self, x: ir.Value, num_q_heads: ir.Value) -> ir.Value:
        """Each key and value head as often as query heads share it."""
        ops = self.ops
        if self.form.heads is not None:
            heads, own = self.form.heads
            return x if heads == own else ops("Gather", x, ops.const([h * own // heads for h in range(heads)]), axis=1)
        count = ops("Max", ops.size(x, 1), ops.const([1])) if ops.opset >= 12 else ops.size(x, 1)  # Max of integers
        group = ops("Div", num_q_heads, count)
        # NOTE: without heads there is no tensor element; the quotients are only kept from failing.
        group = ops("Max", group, ops.const([1])) if ops.opset >= 12 else group
        return ops("Gather", x, ops("Div", ops.arange(ops.squeeze(num_q_heads, 0)), group), axis=1)

    def _placed(self, x: ir.Value, layout: Layout) -> ir.Value:
        """[B, H, S, D] in this layout."""
        if layout is Layout.BHSD:
            return x
        ops = self.ops
        width = ops("Mul", ops.size(x, 1), ops.size(x, 3))
        x = ops("Transpose", x, perm=[0, 2, 1, 3])
        return x if layout is Layout.BSHD else ops.resize(x, width)

    # ------------------------------------------------------------------------------------------ scores

    def _scale(self, q: ir.Value) -> ir.Value:
        ops = self.ops
        scale = ops.ref("scale", ir.AttributeType.FLOAT)
        if ops.numbers.get("scale"):
            return scale
        usual = ops("Reciprocal", ops("Sqrt", ops.float32(ops.scalar_size(q, 3))))
        if ops.numbers:
            return usual
        return ops("Where", ops("Equal", scale, ops.const(0.0, np.float32)), usual, scale)

    def _capped(self, scores: ir.Value) -> ir.Value:
        if not self.form.softcap:
            return scores
        ops = self.ops
        cap = ops.ref("softcap", ir.AttributeType.FLOAT)
        if ops.numbers:
            return ops("Mul", cap, ops("Tanh", ops("Div", scores, cap)))
        off = ops("Equal", cap, ops.const(0.0, np.float32))
        divisor = ops("Where", off, ops.const(1.0, np.float32), cap)
        return ops("Where", off, scores, ops("Mul", divisor, ops("Tanh", ops("Div", scores, divisor))))

    def _whole(self, name: str, beyond: object, dtype: type) -> ir.Value:
        """A mask or bias with rank 4. A last axis shorter than S_kv (and not 1), which ONNX Attention takes, goes on
        with `beyond`."""
        ops = self.ops
        if ops.opset < 13:
            return ops.float32(self.given[name]) if dtype is np.float32 else self.given[name]
        x = ops("Expand", self.given[name], ops.const([1, 1, 1, 1]))
        x = ops.float32(x) if dtype is np.float32 else x
        columns = ops.size(x, 3)
        missing = ops("Where", ops("Equal", columns, ops.const([1])), ops.const([0]), ops("Sub", self.keys, columns))
        return ops("Pad", x, ops.concat(ops.const([0] * 7), missing), ops.const(beyond, dtype))

    def _biased(self, scores: ir.Value) -> ir.Value:
        ops = self.ops
        for name in ("attn_bias", "float_mask"):
            if name in self.given:
                scores = ops("Add", scores, self._whole(name, -np.inf, np.float32))
        if "alibi_slopes" in self.given:
            slopes = ops.unsqueeze(self.given["alibi_slopes"], -1, -2)  # [H, 1, 1] or [B, H, 1, 1]
            scores = ops("Sub", scores, ops("Mul", slopes, ops.float32(ops("Abs", self._ahead()))))
        return scores

    def _ahead(self) -> ir.Value:
        """How far key j is ahead of row i's position: [1 or B, 1, S_q, S_kv]."""
        ops = self.ops
        rows = ops.unsqueeze(ops.arange(ops.squeeze(self.rows, 0)), 1)
        positions = ops("Add", rows, ops("Reshape", self._offset(), ops.const([-1, 1, 1, 1])))
        return ops("Sub", self._key_index(), positions)

    def _key_index(self) -> ir.Value:
        return self.ops.arange(self.ops.squeeze(self.keys, 0))

    def _offset(self) -> ir.Value:
        """Position of row 0: [1] or [B]."""
        ops, given = self.ops, self.given
        if "query_offset" in given:
            return ops("Cast", given["query_offset"], to=int(ir.DataType.INT64))
        lengths = self._lengths() if "nonpad_kv_seqlen" in given or self.form.writes else None
        if self.form.alignment == "bottom_right":
            return ops("Sub", self.keys if lengths is None else lengths, self.rows)
        if self.form.alignment == "onnx" and lengths is not None and "past_key" not in given:
            return ops("Sub", lengths, self.rows)
        return self.past

    def _lengths(self) -> ir.Value:
        """[B]: keys in use of each entry; of a cache of fixed size no more than it has, and all up to the last new
        row unless it is told."""
        ops, name = self.ops, "nonpad_kv_seqlen"
        if name in self.given:
            lengths = ops("Cast", self.given[name], to=int(ir.DataType.INT64))
        else:
            lengths = ops("Add", self.past, self.rows)
        if not self.form.writes:
            return lengths
        return ops("Where", ops("Less", self.keys, lengths), self.keys, lengths)

    def _masked(self, scores: ir.Value) -> ir.Value:
        ops, seen = self.ops, []
        if self.form.windows:
            seen += self._window(self._ahead())
        if "nonpad_kv_seqlen" in self.given or self.form.writes:
            lengths = ops("Reshape", self._lengths(), ops.const([-1, 1, 1, 1]))
            seen.append(ops("Less", self._key_index(), lengths))
        if "attn_mask" in self.given:
            seen.append(self._whole("attn_mask", False, np.bool_))
        for keep in seen:
            scores = ops("Where", keep, scores, ops.const(-np.inf, np.float32))
        return scores

    def _window(self, ahead: ir.Value) -> list[ir.Value]:
        """The conditions on how far a key is ahead of its row."""
        ops, numbers, zero = self.ops, self.ops.numbers, self.ops.const(0)
        if numbers:
            right = 0 if numbers["is_causal"] else numbers["right_window_size"]
            sides = ((right, ahead), (numbers["left_window_size"], ops("Neg", ahead)))
            return [ops("LessOrEqual", distance, ops.const(size)) for size, distance in sides if size >= 0]
        causal = ops("Equal", ops.number("is_causal"), ops.const(1))
        right = ops("Where", causal, zero, ops.number("right_window_size"))
        left = ops.number("left_window_size")
        sides = ((right, ahead), (left, ops("Neg", ahead)))
        return [ops("Or", ops("Less", size, zero), ops("LessOrEqual", distance, size)) for size, distance in sides]

    def _softmax(self, scores: ir.Value) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
        """(probabilities, log-sum-exp if it is asked for, whether a row has no key where it may have none), with what a
        row without keys gives."""
        ops, form = self.ops, self.form
        none: ir.Value | None = None
        if "sinks" in self.given:
            sinks = ops("Reshape", self.given["sinks"], ops.const([1, -1, 1, 1]))
            column = ops("Expand", sinks, ops.concat(*(ops.size(scores, k) for k in range(3)), ops.const([1])))
            scores = ops.concat(scores, column, axis=3)
        p = ops("Softmax", scores, axis=3)
        lse = self._log_sum(scores) if "lse" in form.outputs else None
        if form.empty_row:
            seen = ops("Not", ops("Less", scores, ops.const(LOWEST, np.float32)))  # also where the score is NaN
            none = ops("Less", ops.reduce("ReduceSum", ops.float32(seen)), ops.const(0.5, np.float32))
        if "sinks" in self.given:
            p = ops("Slice", p, ops.const([0]), self.keys, ops.const([3]))
        if none is not None:
            mean = form.empty_row == "mean"
            instead = self._equal_weights() if mean else ops.const(0.0, np.float32)
            p = ops("Where", none, instead, p)
        return p, lse, none

    def _equal_weights(self) -> ir.Value:
        """Of all keys, of a cache of fixed size those in use."""
        ops = self.ops
        if not self.form.writes:
            return ops("Reciprocal", ops.float32(self.keys))
        lengths = ops("Reshape", self._lengths(), ops.const([-1, 1, 1, 1]))
        weight = ops("Reciprocal", ops.float32(lengths))
        return ops("Where", ops("Less", self._key_index(), lengths), weight, ops.const(0.0, np.float32))

    def _log_sum(self, scores: ir.Value) -> ir.Value:
        """The natural logarithm of the sum of exponentials, -inf in a row without keys: [B, H, S_q]."""
        ops = self.ops
        top = ops.reduce("ReduceMax", scores)
        base = ops("Where", ops("Less", top, ops.const(LOWEST, np.float32)), ops.const(0.0, np.float32), top)
        total = ops.reduce("ReduceSum", ops("Exp", ops("Sub", scores, base)))
        return ops.squeeze(ops("Add", ops("Log", total), base), -1)
