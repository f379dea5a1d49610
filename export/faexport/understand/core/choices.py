# SPDX-License-Identifier: Apache-2.0
"""Scores or scores with a number added, chosen by multiplication: `keep * s + hide * (s - 1e9)`, as tf2onnx writes what
Keras' Attention layer does to them. That is `s - hide * 1e9`. Called by score_path.py."""

from __future__ import annotations

import itertools
import math

import onnx_ir as ir

from faexport.graph.nodes import given, op, producer
from faexport.graph.surgery import Builder
from faexport.understand.shapes.analysis import Analysis

_LARGEST = 1e30  # beside what an earlier mask left of scores a larger one is infinite, and infinity times 0 is NaN


def added_where_chosen(node: ir.Node, a: Analysis) -> tuple[ir.Node, tuple[ir.Node, ...]] | None:
    """An Add or Sub of scores, its first input, and what is added to those that are chosen, which is not in the graph
    yet, and the nodes whose place it takes; None where an Add does anything else."""
    products = [producer(value) for value in node.inputs]
    for kept, moved in (products, products[::-1]):
        if kept is None or moved is None or op(kept) != "Mul" or op(moved) != "Mul" or kept is moved:
            continue
        for i, j in itertools.product((0, 1), repeat=2):
            change, keep, hide = (
                producer(given(moved, j)),
                _condition(given(kept, 1 - i), a),
                _condition(given(moved, 1 - j), a),
            )
            if change is None or keep is None or hide is None or keep[0] is not hide[0] or keep[1] == hide[1]:
                continue
            number = _added(change, given(kept, i))
            if number is not None and abs(a.scalar(number) or math.inf) <= _LARGEST:
                made = _made(node, given(kept, i), given(moved, 1 - j), number, op(change), a)
                return made, (node, kept, moved, change)
    return None


def _condition(value: ir.Value, a: Analysis) -> tuple[ir.Value, bool] | None:
    """(a bool tensor, whether it is negated), of which the value is 1 where it is true."""
    node = producer(value)
    if node is None or op(node) != "Cast" or a.dtype(given(node, 0)) is not ir.DataType.BOOL:
        return None
    condition, negated = given(node, 0), False
    while (node := producer(condition)) is not None and op(node) == "Not":
        condition, negated = given(node, 0), not negated
    return condition, negated


def _added(change: ir.Node, scores: ir.Value) -> ir.Value | None:
    """What an Add or Sub adds to the scores, or takes from them."""
    if op(change) == "Sub":
        return given(change, 1) if given(change, 0) is scores else None
    others = [given(change, 1 - i) for i in (0, 1) if op(change) == "Add" and given(change, i) is scores]
    return others[0] if others else None


def _made(node: ir.Node, scores: ir.Value, chosen: ir.Value, number: ir.Value, op_type: str, a: Analysis) -> ir.Node:
    build = Builder(a.opset)
    part = build.add("Mul", [chosen, number], a.dtype(number))
    whole = build.add(op_type, [scores, part], a.dtype(scores))
    a.define_broadcast(part, chosen, number)
    a.define_broadcast(whole, node.outputs[0])
    for value, name in ((part, "chosen"), (whole, "scores")):
        value.name = f"{node.outputs[0].name}_faexport_{name}"
    return build.nodes[-1]
