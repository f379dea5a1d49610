# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square norms of the heads of queries and keys: the operators, and what exporters write for them. Those are
read that are taken in float32: in half precision the squares of a graph may overflow, which the operator's don't."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from faexport.graph.nodes import attribute, op, operand, producer
from faexport.sizes.dims import Dim
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.rules import constant_ints

OPERATORS = ("RMSNormalization", "SimplifiedLayerNormalization")


@dataclasses.dataclass(frozen=True)
class HeadNorm:
    """value = source / sqrt(mean of squares of the last axis + epsilon) * weight."""

    source: ir.Value
    weight: ir.Value  # [D]
    epsilon: float


def head_norm_of(value: ir.Value, a: Analysis) -> HeadNorm | None:
    """The norm over the last axis that `value` is the result of."""
    node = producer(value)
    if node is not None and op(node) in OPERATORS:
        found = _by_operator(node, value, a)
    else:
        found = _spelled_out(value, a)
    if found is None:
        return None
    shape, weights = a.shape(found.source), a.shape(found.weight)
    fits = shape is not None and a.shape(value) == shape and weights == (shape[-1],) and found.epsilon >= 0
    return found if fits and a.dtype(found.source) == a.dtype(value) else None


def _by_operator(node: ir.Node, value: ir.Value, a: Analysis) -> HeadNorm | None:
    source, weight, rank = operand(node, 0), operand(node, 1), a.rank(operand(node, 0))
    if source is None or weight is None or rank is None or value is not node.outputs[0]:
        return None
    if attribute(node, "axis", -1) not in (-1, rank - 1) or attribute(node, "stash_type", 1) != 1:
        return None
    return HeadNorm(source, weight, float(attribute(node, "epsilon", 1e-5)))


def _spelled_out(value: ir.Value, a: Analysis) -> HeadNorm | None:
    node = producer(_before_cast(value))
    if node is None or op(node) != "Mul":
        return None
    for scaled, weight in (node.inputs, node.inputs[::-1]):
        if scaled is None or weight is None or a.rank(weight) != 1:
            continue
        divided = _divided(_before_cast(scaled), a)
        if divided is not None:
            wide, epsilon = divided
            own = a.dtype(value)
            source = wide if a.dtype(wide) == own else _before_cast(wide)
            rounded = {a.dtype(v) for v in (node.outputs[0], scaled, _before_cast(scaled))}
            is_exact = a.dtype(wide) == ir.DataType.FLOAT and rounded <= {own, ir.DataType.FLOAT}
            return HeadNorm(source, weight, epsilon) if is_exact else None
    return None


def _before_cast(value: ir.Value) -> ir.Value:
    node = producer(value)
    return node.inputs[0] if node is not None and op(node) == "Cast" and node.inputs[0] is not None else value


def _divided(value: ir.Value, a: Analysis) -> tuple[ir.Value, float] | None:
    """(x, epsilon) where the value is x over its root mean square."""
    node = producer(value)
    if node is None or op(node) not in ("Mul", "Div") or len(node.inputs) != 2:
        return None
    sides = (node.inputs, node.inputs[::-1]) if op(node) == "Mul" else (node.inputs,)
    for x, other in sides:
        root = _inverted(other, a) if op(node) == "Mul" else other
        mean = _under_root(root)
        epsilon = _epsilon_over_squares(mean, x, a)
        if x is not None and epsilon is not None:
            return x, epsilon
    return None


def _inverted(value: ir.Value | None, a: Analysis) -> ir.Value | None:
    """y where the value is 1 / y."""
    node = producer(value)
    if node is not None and op(node) == "Reciprocal":
        return node.inputs[0]
    is_quotient = node is not None and op(node) == "Div" and a.scalar(node.inputs[0]) == 1.0
    return node.inputs[1] if node is not None and is_quotient else None


def _under_root(value: ir.Value | None) -> ir.Value | None:
    node = producer(value)
    return node.inputs[0] if node is not None and op(node) == "Sqrt" else None


def _epsilon_over_squares(value: ir.Value | None, x: ir.Value | None, a: Analysis) -> float | None:
    """epsilon where the value is the mean of x's squares over the last axis, plus that."""
    node = producer(value)
    if node is None or x is None or op(node) != "Add":
        return None
    for mean, number in (node.inputs, node.inputs[::-1]):
        epsilon, squares = a.scalar(number), mean_of_rows(mean, a)
        if epsilon is not None and _is_square(squares, x, a) and _is_number(a.shape(number)):
            return epsilon
    return None


def mean_of_rows(mean: ir.Value | None, a: Analysis) -> ir.Value | None:
    """x where a value is the mean of x over its last axis, which stays as one of size 1."""
    node = producer(mean)
    if node is None or op(node) != "ReduceMean" or not attribute(node, "keepdims", 1):
        return None
    x, axes = operand(node, 0), constant_ints(node, a, 1, "axes")
    rank = a.rank(x)
    return x if rank is not None and axes in ([-1], [rank - 1]) else None


def _is_number(shape: tuple[Dim, ...] | None) -> bool:
    return shape is not None and all(size == 1 for size in shape)


def _is_square(value: ir.Value | None, x: ir.Value, a: Analysis) -> bool:
    node = producer(value)
    if node is None or node.inputs[0] is not x:
        return False
    return a.scalar(node.inputs[1]) == 2.0 if op(node) == "Pow" else op(node) == "Mul" and node.inputs[1] is x
