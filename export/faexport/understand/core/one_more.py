# SPDX-License-Identifier: Apache-2.0
"""One more exponential in the sum of a softmax that is written out, as an attention sink is. Called by softmax.py.

It is a number, exp(x) / (1 + sum(exp(x))), or behind a maximum exp(x - m) / (exp(sink - m) + sum(exp(x - m))).
"""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from faexport.graph.nodes import given, op, operand, producer
from faexport.understand.core.reductions import SUMS, reduction_of
from faexport.understand.shapes.analysis import Analysis


@dataclasses.dataclass(frozen=True)
class Logit:
    """log(number) + value, where there is a value."""

    number: float
    value: ir.Value | None
    node: ir.Node  # that adds its exponential


@dataclasses.dataclass(frozen=True)
class OneMore:
    logit: Logit
    scores: ir.Value  # without the maximum that is subtracted
    axis: int
    nodes: tuple[ir.Node, ...]  # all but the exponentials and the division


def one_more_of(exp: ir.Node, exponentials: ir.Value, total: ir.Value, a: Analysis) -> OneMore | None:
    """`total` as the sum of these exponentials and of one more, or None."""
    add = producer(total)
    if add is None or op(add) != "Add":
        return None
    for own, other in (add.inputs, add.inputs[::-1]):
        summed = reduction_of(own, a)
        if summed is None or summed.name not in SUMS or summed.source is not exponentials or len(summed.axes) != 1:
            continue
        if a.shape(total) is None or a.shape(total) != a.shape(own):
            return None
        axis = summed.axes[0]
        number = a.scalar(other)
        if number is not None and number > 0:  # nothing is subtracted from x then: such a sum depends on the row
            difference = producer(exp.inputs[0])
            if difference is not None and op(difference) == "Sub":
                return None
            return OneMore(Logit(number, None, add), given(exp, 0), axis, (*summed.nodes, add))
        found = _behind_maximum(exp, other, axis, add, a)
        if found is not None:
            return dataclasses.replace(found, nodes=(*found.nodes, *summed.nodes, add))
    return None


def _behind_maximum(exp: ir.Node, other: ir.Value | None, axis: int, add: ir.Node, a: Analysis) -> OneMore | None:
    """Where the exponentials are exp(x - m) and the other part of the sum is number * exp(value - m)."""
    difference = producer(exp.inputs[0])
    if difference is None or op(difference) != "Sub":
        return None
    scores, maximum = given(difference, 0), given(difference, 1)
    number, nodes = 1.0, [difference]
    part = producer(other)
    if part is not None and op(part) == "Mul":
        for index in (0, 1):
            factor = a.scalar(part.inputs[index])
            if factor is not None and factor > 0:
                number, nodes, other = factor, [*nodes, part], part.inputs[1 - index]
                break
    one = producer(other)
    inside = None if one is None or op(one) != "Exp" else producer(one.inputs[0])
    if one is None or inside is None or other is None or other.is_graph_output():
        return None
    value: ir.Value | None = None
    if op(inside) == "Sub" and inside.inputs[1] is maximum:
        value = given(inside, 0)
    elif op(inside) != "Neg" or inside.inputs[0] is not maximum:
        return None
    own = _maximum_of(maximum, scores, value, axis, a)
    if own is None:
        return None
    if value is not None and (constant := a.scalar(value)) is not None and abs(constant) < 80:
        number, value = number * math.exp(constant), None
    return OneMore(Logit(number, value, add), scores, axis, (*nodes, *own, inside, one))


def _maximum_of(
    maximum: ir.Value, scores: ir.Value, value: ir.Value | None, axis: int, a: Analysis
) -> tuple[ir.Node, ...] | None:
    """The nodes of the scores' own maximum along the axis, or of the greater one of it and the logit."""
    more: tuple[ir.Node, ...] = ()
    node = producer(maximum)
    found = reduction_of(maximum, a)
    if found is None and node is not None and op(node) in ("Max", "Clip", "Relu"):
        bounds = node.inputs[1::-1] if op(node) == "Max" else [operand(node, 1)]
        if operand(node, 2) is not None:
            return None
        for own, bound in zip(node.inputs, bounds, strict=False):
            reduced = reduction_of(own, a)
            at_zero = op(node) == "Relu" or (bound is not None and a.scalar(bound) == 0)
            if reduced is not None and (bound is value if value is not None else at_zero):
                found, more = reduced, (node,)
                break
    if found is None or found.name != "ReduceMax" or found.source is not scores or axis not in found.axes:
        return None
    return (*found.nodes, *more)
