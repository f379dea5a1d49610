# SPDX-License-Identifier: Apache-2.0
"""Finds softmaxes, as a Softmax node or written by hand as exp / sum. Called by match/softmax_core.py."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import onnx_ir as ir

from faexport.understand.nodes import attribute, op, producer
from faexport.understand.shape_rules import constant_ints, resolve_axis

if TYPE_CHECKING:
    from faexport.understand.shapes import Analysis


@dataclasses.dataclass(frozen=True)
class Softmax:
    node: ir.Node  # the one that yields the probabilities
    scores: ir.Value
    axis: int  # not negative
    probabilities: ir.Value
    inner: tuple[ir.Node, ...]  # all nodes that belong to it


def softmax_of(node: ir.Node, a: Analysis) -> Softmax | None:
    """`node` as the end of a softmax over one axis, or None."""
    if op(node) == "Softmax":
        return _softmax_node(node, a)
    if op(node) == "Exp" and op(producer(node.inputs[0])) == "LogSoftmax":
        inner = _softmax_node(producer(node.inputs[0]), a)
        return inner and Softmax(node, inner.scores, inner.axis, node.outputs[0], (*inner.inner, node))
    if op(node) == "Div":
        return _written_out(node, node.inputs[0], producer(node.inputs[1]), (), a)
    if op(node) == "Mul":
        for exp, inverse in (node.inputs, node.inputs[::-1]):
            reciprocal = producer(inverse)
            if op(reciprocal) == "Reciprocal":
                return _written_out(node, exp, producer(reciprocal.inputs[0]), (reciprocal,), a)
    return None


def _softmax_node(node: ir.Node, a: Analysis) -> Softmax | None:
    rank = a.rank(node.inputs[0])
    axis = attribute(node, "axis", -1 if a.opset >= 13 else 1)
    if rank is None:
        # Of an unknown rank only "the last axis" can be told, and up to opset 12 the axes behind `axis` are taken
        # together.
        return None
    axis = resolve_axis(axis, rank)
    if a.opset < 13 and axis != rank - 1:
        return None
    return Softmax(node, node.inputs[0], axis, node.outputs[0], (node,))


def _written_out(node, exp_value, total, more, a: Analysis) -> Softmax | None:
    """exp(x) / sum(exp(x))."""
    exp, rank = producer(exp_value), a.rank(exp_value)
    if op(exp) != "Exp" or op(total) != "ReduceSum" or total.inputs[0] is not exp_value or rank is None:
        return None
    axes = constant_ints(total, a, 1, "axes")
    if axes is None or len(axes) != 1 or not attribute(total, "keepdims", 1):
        return None
    return Softmax(node, exp.inputs[0], resolve_axis(axes[0], rank), node.outputs[0], (exp, total, *more, node))


def subtracts_own_maximum(node: ir.Node, rank: int, axis: int, a: Analysis) -> ir.Node | None:
    """The ReduceMax of `x - max(x)` along the softmax axis, which softmax doesn't notice; else None."""
    reduce = producer(node.inputs[1]) if op(node) == "Sub" else None
    while op(reduce) in ("Identity", "Cast"):
        reduce = producer(reduce.inputs[0])
    if op(reduce) != "ReduceMax" or reduce.inputs[0] is not node.inputs[0] or not attribute(reduce, "keepdims", 1):
        return None
    axes = constant_ints(reduce, a, 1, "axes")
    return reduce if axes is not None and [resolve_axis(x, rank) for x in axes] == [axis] else None
