# SPDX-License-Identifier: Apache-2.0
"""Finds softmaxes, as a Softmax node or written by hand as exp / sum. Called by match/softmax_core.py."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from faexport.nodes import attribute, op, operand, producer
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.rules import constant_ints, resolve_axis


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
    if op(node) == "Exp" and op(producer(node.inputs[0])) == "Sub":
        return _by_log_sum(node, a)
    if op(node) == "Div":
        return _written_out(node, node.inputs[0], node.inputs[1], (), a)
    if op(node) == "Mul":
        for exp, inverse in (node.inputs, node.inputs[::-1]):
            reciprocal = producer(inverse)
            if op(reciprocal) == "Reciprocal":
                return _written_out(node, exp, reciprocal.inputs[0], (reciprocal,), a)
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


def _written_out(node, exp_value, total_value, more, a: Analysis) -> Softmax | None:
    """exp(x) / sum(exp(x))."""
    exp, total = producer(exp_value), reduction_of(total_value, a)
    if op(exp) != "Exp" or total is None or (total.name, total.source) != ("ReduceSum", exp_value):
        return None
    if len(total.axes) != 1:
        return None
    return Softmax(node, exp.inputs[0], total.axes[0], node.outputs[0], (exp, *total.nodes, *more, node))


def _by_log_sum(node: ir.Node, a: Analysis) -> Softmax | None:
    """exp(x - logsumexp(x))."""
    difference = producer(node.inputs[0])
    total = reduction_of(difference.inputs[1], a)
    if total is None or (total.name, total.source) != ("ReduceLogSumExp", difference.inputs[0]) or len(total.axes) != 1:
        return None
    return Softmax(node, total.source, total.axes[0], node.outputs[0], (difference, *total.nodes, node))


@dataclasses.dataclass(frozen=True)
class Reduction:
    """A value that holds `source` reduced along `axes` (not negative), which are there with size 1."""

    name: str
    source: ir.Value
    axes: tuple[int, ...]
    nodes: tuple[ir.Node, ...]  # from the reduction to the value


def reduction_of(value: ir.Value, a: Analysis) -> Reduction | None:
    """`value` as a reduction of another one; axes that it dropped may have been put back by other nodes."""
    node, nodes = producer(value), []
    while op(node) in ("Identity", "Cast", "Unsqueeze", "Reshape"):
        nodes.append(node)
        node = producer(node.inputs[0])
    if not op(node).startswith("Reduce"):
        return None
    source, rank = node.inputs[0], a.rank(node.inputs[0])
    if rank is None:
        return None
    axes = constant_ints(node, a, 1, "axes")
    if axes is None and (operand(node, 1) is not None or attribute(node, "axes") is not None):
        return None
    if not axes and attribute(node, "noop_with_empty_axes", 0):
        return None
    gone = sorted(resolve_axis(x, rank) for x in axes) if axes else list(range(rank))
    if not _is_in_place(value, source, gone, bool(attribute(node, "keepdims", 1)) and not nodes, a):
        return None
    return Reduction(op(node), source, tuple(gone), (node, *nodes[::-1]))


def _is_in_place(value: ir.Value, source: ir.Value, gone: list[int], kept: bool, a: Analysis) -> bool:
    """Has `value` the source's axes, those of `gone` with size 1 (or is it a single number)?"""
    if kept:
        return True
    shape, whole = a.shape(value), a.shape(source)
    if shape is None or whole is None:
        return False
    wanted = [1 if k in gone else size for k, size in enumerate(whole)]
    return all(size == 1 for size in shape) if len(gone) == len(whole) else list(shape) == wanted


def subtracts_own_maximum(node: ir.Node, axis: int, a: Analysis) -> Reduction | None:
    """The maximum of `x - max(x)` along the softmax axis (or more axes), which softmax doesn't notice; else None."""
    maximum = reduction_of(node.inputs[1], a) if op(node) == "Sub" else None
    if maximum is None or (maximum.name, maximum.source) != ("ReduceMax", node.inputs[0]):
        return None
    return maximum if axis in maximum.axes else None
