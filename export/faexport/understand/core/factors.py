# SPDX-License-Identifier: Apache-2.0
"""Factors that scores or probabilities are multiplied by: which may as well be multiplied to queries, keys or values,
and the nodes that do so. Called by score_chain.py, value_chain.py and structure.py.

A factor that is the same for all keys of a row may be multiplied to the row's query, one that is the same for all rows
to the keys (before the softmax) or to the values (after it). The graph is not changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import attribute, data_users, name_of, op, producer
from faexport.graph.surgery import Builder
from faexport.sizes.dims import Dim
from faexport.spec import Refusal, RefusalKind
from faexport.understand.core.softmax import divisor_of
from faexport.understand.layout import view_ops
from faexport.understand.layout.products import Factor, Product
from faexport.understand.layout.views import View, merged
from faexport.understand.shapes.analysis import Analysis

MAX_PATH = 8
LARGEST = 2.0**64  # of a factor; queries, keys and values may leave their type beside larger ones
_OF_PARTS = ("Where", "Mul", "Add", "Sub", "Neg", "Max", "Min", "MatMul", "Einsum")
REARRANGING = ("Unsqueeze", "Squeeze", "Reshape", "Expand", "Slice", "Gather", "Transpose", "Identity", "Tile", "Cast")


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor that scores or probabilities are multiplied or divided by."""

    value: ir.Value
    op_type: str  # Mul or Div
    node: ir.Node  # that does it

    def is_single(self, a: Analysis) -> bool:
        """Is it one number?"""
        return all(d == 1 for d in a.known_shape(self.value))

    def is_finite(self, a: Analysis) -> bool:
        """Does it multiply by numbers that what they are multiplied to keeps its type beside, as far as the file tells?
        Infinity times a sum is not the sum of infinity times each part, where signs differ."""
        if self.op_type == "Div" and (numbers := a.constant(self.value)) is not None:
            return _are_moderate(_inverse(numbers))
        return all(map(_are_moderate, _numbers_in(self.value, a)))


def _inverse(numbers: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.reciprocal(numbers.astype(np.float64))


def _are_moderate(numbers: np.ndarray) -> bool:
    return bool((np.abs(numbers.astype(np.float64)) <= LARGEST).all())


def _numbers_in(value: ir.Value | None, a: Analysis, depth: int = 0) -> Iterator[np.ndarray]:
    """The constants that a tensor is made of, element by element."""
    array, node = a.constant(value), producer(value)
    if array is not None:
        yield array
    elif node is not None and depth < MAX_PATH:
        parts = node.inputs if op(node) in _OF_PARTS else node.inputs[:1] if op(node) in REARRANGING else ()
        for part in parts:
            yield from _numbers_in(part, a, depth + 1)


def fits(value: ir.Value, shape: Sequence[Dim], a: Analysis) -> bool:
    """Does multiplying a tensor of this shape by the value leave its shape as it is, whatever the sizes are?"""
    own = a.shape(value)
    if own is None or len(own) > len(shape):
        return False
    return all(a.leaves(x, size) for x, size in zip(reversed(own), reversed(shape), strict=False))


def is_gate(value: ir.Value | None, a: Analysis, depth: int = 0) -> bool:
    """Does the tensor hold nothing but 0 and 1, as far as its nodes tell? (Of a constant the mask's proof looks at each
    element.)"""
    if a.is_static(value) or a.dtype(value) == ir.DataType.BOOL:
        return True
    node = producer(value)
    if node is None or depth > MAX_PATH:
        return False
    if op(node) in REARRANGING:
        return is_gate(node.inputs[0], a, depth + 1)
    if op(node) == "Sub":
        return a.scalar(node.inputs[0]) == 1 and is_gate(node.inputs[1], a, depth + 1)
    if op(node) == "ConstantOfShape":
        tensor = attribute(node, "value")
        return tensor is None or float(tensor.numpy().reshape(-1)[0]) in (0.0, 1.0)
    chosen = {"Mul": node.inputs, "Trilu": node.inputs[:1], "Where": node.inputs[1:], "Concat": node.inputs}
    return op(node) in chosen and all(_is_gate_or_number(v, a, depth + 1) for v in chosen[op(node)])


def _is_gate_or_number(value: ir.Value | None, a: Analysis, depth: int) -> bool:
    number = a.scalar(value)
    return number in (0, 1) if number is not None else is_gate(value, a, depth)


def folded(
    factor: Factor, weights: Sequence[Weight], labels: Sequence[str], other: Mapping[str, str], a: Analysis
) -> Factor:
    """The operand of a product times weights, by nodes that are not in the graph yet.

    Args:
        labels: of the axes of the tensor that the graph multiplies by the weights; theirs are aligned with the last.
        other: the axis of that tensor which the operand lacks, and the one that it has instead.
    """
    for weight in weights:
        build = Builder(a.opset)
        sizes = a.known_shape(weight.value)
        own = [other.get(label, label) for label in labels[len(labels) - len(sizes) :]]
        missing = [x for x, size in zip(own, sizes, strict=True) if x not in factor.labels and size != 1]
        target = (*missing, *factor.labels)
        value = _placed(build, weight.value, own, target)
        dtype = a.dtype(factor.value)
        product = _product(build, weight.op_type, factor.value, value, dtype, a)
        known = {x: size for x, size in zip(own, sizes, strict=True) if size != 1}
        known |= {x: d.meet(known.get(x, 1)) for x, d in zip(factor.labels, a.known_shape(factor.value), strict=True)}
        a.define(product, tuple(known[x] for x in target))
        factor = Factor(product, target)
    return factor


def _placed(build: Builder, value: ir.Value, own: list[str], target: Sequence[str]) -> ir.Value:
    """The tensor, whose axes have the labels `own`, with axes in the order of `target`."""
    for position in reversed([i for i, x in enumerate(own) if x not in target]):
        value = build.squeeze(value, position)
    own = [x for x in own if x in target]
    ordered = sorted(own, key=target.index)
    value = build.transpose(value, [own.index(x) for x in ordered])
    if not ordered:
        return value
    for position, label in enumerate(target[target.index(ordered[0]) :]):
        if label not in ordered:
            value = build.unsqueeze(value, position)
    return value


def weighed(value: ir.Value, weight: Weight, a: Analysis) -> ir.Value:
    """A bias of the scores times the weight, by a node that is not in the graph yet."""
    build = Builder(a.opset)
    product = _product(build, weight.op_type, value, weight.value, a.dtype(value), a)
    for count, node in enumerate(build.nodes):
        node.outputs[0].name = f"{weight.node.outputs[0].name}_{value.name}_faexport_{count}"
    a.define_broadcast(product, value, weight.value)
    return product


def times(value: ir.Value, weights: Sequence[Weight], a: Analysis) -> tuple[ir.Value, tuple[ir.Node, ...]]:
    """A tensor times numbers, and the new nodes."""
    build = Builder(a.opset)
    dtype = a.dtype(value)
    for weight in weights:
        number = weight.value
        if len(a.known_shape(number)) > 1:
            number = build.reshape(number, [1])
        value = _product(build, weight.op_type, value, number, dtype, a)
    return value, tuple(build.nodes)


def _product(
    build: Builder, op_type: str, value: ir.Value, weight: ir.Value, dtype: ir.DataType | None, a: Analysis
) -> ir.Value:
    """In the weight's type, if that is a wider one: it may hold numbers that the tensor's can't."""
    given = a.dtype(weight)
    if given is None or dtype is None or given == dtype:
        return build.add(op_type, [value, weight], dtype)
    product = build.add(op_type, [build.add("Cast", [value], given, to=int(given)), weight], given)
    return build.add("Cast", [product], dtype, to=int(dtype))


def division_by(total: ir.Value, axis: int, view: View, product: Product, a: Analysis) -> list[ir.Node] | Refusal:
    """The nodes that divide the product of exponentials and values by the sums of the exponentials.

    Args:
        total: the sums as they leave the reduction.
        axis: of the exponentials, the one that is summed.
        view: of the exponentials that are multiplied, over the scores.
    """
    result = product.node.outputs[0]
    users = data_users(result)
    refusal = Refusal(
        "the exponentials are not divided by their sum in a way that is understood",
        name_of(product.node),
        RefusalKind.NO_ATTENTION,
    )
    if len(users) != 1 or result.is_graph_output() or op(users[0]) not in ("Mul", "Div"):
        return refusal
    node = users[0]
    index = 0 if node.inputs[0] is result else 1
    divisor = node.inputs[1 - index]
    inverse: list[ir.Node] = []
    if op(node) == "Mul":
        maker = producer(divisor)
        inverse = [maker] if maker is not None else []
        divisor = divisor_of(divisor, a)
    elif index == 1:
        return refusal
    if divisor is None:
        return refusal
    nodes: list[ir.Node] = []
    while divisor is not total and len(nodes) < MAX_PATH:
        step = producer(divisor)
        if step is None:
            return refusal
        if op(step) not in view_ops.VIEW_OPS or (op(step) == "Cast" and not view_ops.is_widening(step, a)):
            return refusal  # a sum may leave a narrower type
        nodes.append(step)
        divisor = step.inputs[0]
    nodes.reverse()
    found = _axes_of_sums(total, axis, view, nodes, a)
    wanted = dict(zip(product.left.labels, view.axes, strict=True)) | {"column": ()}
    if set(product.labels) - set(wanted):  # the values have an axis of their own
        return refusal
    expected = [merged(wanted[label]) for label in product.labels]
    if divisor is not total or found is None or [()] * (len(expected) - len(found)) + found != expected:
        return refusal
    return [*nodes, *inverse, node]


def _axes_of_sums(total: ir.Value, axis: int, view: View, nodes: Sequence[ir.Node], a: Analysis) -> list | None:
    """The axes of the sums behind these nodes, as a view of the scores."""
    axes, rank = list(view.axes), a.rank(total)
    if rank == len(axes):
        axes[axis] = ()
    elif rank == len(axes) - 1:
        del axes[axis]
    else:
        return None
    current = View(tuple(axes), view.offsets)
    for node in nodes:
        if op(node) == "Cast":
            continue
        moved = view_ops.apply(node.outputs[0], current, a)
        if moved is None:
            return None
        current = moved
    return [merged(x) for x in current.axes]
