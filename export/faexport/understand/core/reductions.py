# SPDX-License-Identifier: Apache-2.0
"""Reductions that a softmax written out is made of: the sum of the exponentials, and the maximum that is subtracted
before. Called by softmax.py, one_more.py and score_chain.py."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from faexport.graph.nodes import attribute, given, op, producer
from faexport.understand.layout.view_ops import is_widening
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.rules import reduced_axes

SUMS = ("ReduceSum", "ReduceL1")  # of exponentials, which are not negative, they are the same


@dataclasses.dataclass(frozen=True)
class Reduction:
    """A value that holds `source` reduced along `axes` (not negative), which are there with size 1."""

    name: str  # the op's, or "log of ReduceSum"
    source: ir.Value
    axes: tuple[int, ...]
    nodes: tuple[ir.Node, ...]  # from the reduction to the value


def reduction_of(value: ir.Value | None, a: Analysis) -> Reduction | None:
    """`value` as a reduction of another one; axes that it dropped may have been put back by other nodes."""
    node, is_log = producer(value), False
    nodes: list[ir.Node] = []
    while node is not None and op(node) in ("Identity", "Cast", "Unsqueeze", "Reshape", "Expand", "Log"):
        if (op(node) == "Log" and is_log) or (op(node) == "Cast" and not is_widening(node, a)):
            return None
        is_log = is_log or op(node) == "Log"
        nodes.append(node)
        node = producer(node.inputs[0])
    if value is None or node is None or not op(node).startswith("Reduce") or (is_log and op(node) != "ReduceSum"):
        return None
    source = given(node, 0)
    rank = a.rank(source)
    gone = None if rank is None else reduced_axes(node, a, rank)
    if not gone:
        return None
    kept = bool(attribute(node, "keepdims", 1)) and all(op(n) in ("Identity", "Cast", "Log") for n in nodes)
    if not _is_in_place(value, source, gone, kept, a):
        return None
    return Reduction("log of ReduceSum" if is_log else op(node), source, tuple(gone), (node, *nodes[::-1]))


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
