# SPDX-License-Identifier: Apache-2.0
"""Joins what stands around attention into those of onnxruntime's operators that have CUDA kernels only
(Options.joins_cuda): diffusion models are full of such places. Called by pipeline.py.

Each kernel takes certain sizes only, which stand here; what the operators compute stands in formulas.py.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from faexport.graph.edits import Names, insert_in_front, remove_dead, take_over
from faexport.graph.nodes import (
    RUNTIME_DOMAIN,
    RUNTIME_FLOATS,
    attribute,
    data_users,
    graphs_of,
    is_read_once,
    is_transpose,
    op,
    operand,
    producer,
)
from faexport.graph.surgery import Builder
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.rules import slice_of

# The sizes of the last axis that onnxruntime's kernels of these operators are compiled for.
GATED_WIDTHS = (2560, 5120, 10240)
BIASED_WIDTHS = (320, 640, 1280)
WIDEST_GROUP = 512  # channels; their number is even
LAST, FIRST = [0, 2, 3, 1], [0, 3, 1, 2]  # the permutations that make an image's channels its last axis, and back


def join(model: ir.Model, a: Analysis, names: Names) -> None:
    """Changes the model in place."""
    a.extend(model)
    for write in (_group_norm, _bias_split_gelu, _bias_add):
        for graph, _ in graphs_of(model):
            for node in list(graph):
                if node.graph is not None:  # else it was part of a place that was found before
                    write(_Place(node, a, names))


class _Place:
    """A node at which one of the operators may end, and what is known of it."""

    def __init__(self, node: ir.Node, a: Analysis, names: Names):
        self.node, self.a, self.names = node, a, names

    def sides(self, node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
        """Both inputs of a sum or product, in both orders."""
        first, second = node.inputs
        return [] if first is None or second is None else [(first, second), (second, first)]

    def before(self, value: ir.Value | None, *kinds: str) -> ir.Node | None:
        """The node that makes a value, where it is of one of these kinds and the value has one reader."""
        node = producer(value)
        if node is None or value is None or op(node) not in kinds:
            return None
        return node if node.graph is self.node.graph and is_read_once(value) else None

    def vector(self, value: ir.Value, size: int) -> bool:
        """Is it a stored tensor with one number for each place of an axis?"""
        shape = self.a.shape(value)
        return shape is not None and [d.const for d in shape] == [size] and self.a.is_static(value)

    def fits(self, value: ir.Value, rank: int) -> bool:
        return self.a.rank(value) == rank and self.a.dtype(value) in RUNTIME_FLOATS

    def biased(self, value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
        """Rows, and the stored bias that is added to each, where a value is the sum of both."""
        added = producer(value)
        shape = self.a.shape(value)
        if added is None or op(added) != "Add" or not shape or added.graph is not self.node.graph:
            return None
        for rows, bias in self.sides(added):
            if self.a.shape(rows) == shape and shape[-1].const and self.vector(bias, shape[-1].const):
                return rows, bias
        return None

    def write(self, op_type: str, inputs: list[ir.Value], result: ir.Value, **attributes: int | float) -> None:
        """Puts the operator in the place of what made `result`."""
        node = ir.node(op_type, inputs, attributes, domain=RUNTIME_DOMAIN)
        self.insert([node])
        take_over(result, node.outputs[0])
        remove_dead([producer(result)])

    def write_image(self, op_type: str, inputs: list[ir.Value], result: ir.Value, **attributes: int | float) -> None:
        """The same for an operator that takes and gives images whose channels are the last axis. `result` has the
        shape of the first input."""
        image, *others = inputs
        before, after = Builder(self.a.opset), Builder(self.a.opset)
        turned = producer(image)
        last = turned.inputs[0] if turned is not None and is_transpose(turned, FIRST) else None
        last = before.transpose(image, LAST) if last is None else last
        node = ir.node(op_type, [last, *others], attributes, domain=RUNTIME_DOMAIN)
        y = node.outputs[0]
        y.type, y.shape = image.type, None if image.shape is None else ir.Shape([image.shape[i] for i in LAST])
        self.insert([*before.nodes, node])
        for user in [use.node for use in result.uses() if op(use.node) == "Shape"]:
            user.replace_input_with(0, image)
        here = (use.node for use in result.uses() if use.node.graph is self.node.graph)
        back = next((user for user in here if is_transpose(user, LAST)), None)
        if back is not None:
            take_over(back.outputs[0], y)
            remove_dead([back])
        if result.uses() or result.is_graph_output():
            again = after.transpose(y, FIRST)
            self.insert(after.nodes)
            take_over(result, again)
        remove_dead([producer(result), turned])

    def insert(self, nodes: list[ir.Node]) -> None:
        """In front of the node."""
        insert_in_front(self.node, nodes, self.node.name or "joined", self.names)


def _bias_split_gelu(place: _Place) -> None:
    """left * gelu(right), where left and right are the halves of x + bias."""
    for left, active in place.sides(place.node) if op(place.node) == "Mul" else ():
        gelu = place.before(active, "com.microsoft::Gelu", "Gelu")
        if gelu is None or attribute(gelu, "approximate", "none") not in ("none", b"none"):
            continue
        both = _halved(place, left, gelu.inputs[0])
        rows = place.biased(both) if both is not None and place.fits(both, 3) else None
        if both is not None and rows is not None and place.a.known_shape(both)[-1].const in GATED_WIDTHS:
            place.write("BiasSplitGelu", list(rows), place.node.outputs[0])
            return


def _halved(place: _Place, left: ir.Value, right: ir.Value | None) -> ir.Value | None:
    """The tensor whose last axis both are the halves of."""
    a, makers = place.a, [producer(left), producer(right)]
    first, second = makers
    if first is None or second is None or right is None or op(first) != op(second) or first.inputs[0] is None:
        return None
    whole, shape = first.inputs[0], a.shape(first.inputs[0])
    if second.inputs[0] is not whole or not shape or not shape[-1].const or whole.is_graph_output():
        return None
    if not (is_read_once(left) and is_read_once(right)):
        return None
    if set(data_users(whole)) != {first, second}:
        return None
    half = shape[-1].const // 2
    sizes = [a.shape(value) for value in (left, right)]
    if any(size != (*shape[:-1], half) for size in sizes):
        return None
    if op(first) == "Split":
        return whole if first is second and [left, right] == list(first.outputs) else None
    if op(first) != "Slice":
        return None
    starts = [[(axis, start.const, step) for axis, start, _, step in slice_of(n, a, shape) or ()] for n in makers if n]
    axis = len(shape) - 1
    return whole if starts == [[(axis, 0, 1)], [(axis, half, 1)]] else None


def _bias_add(place: _Place) -> None:
    """x + bias + skip."""
    result = place.node.outputs[0] if op(place.node) == "Add" else None
    shape = place.a.shape(result)
    if result is None or not shape or not place.fits(result, 3) or shape[-1].const not in BIASED_WIDTHS:
        return
    for biased, skip in place.sides(place.node):
        rows = place.biased(biased) if place.before(biased, "Add") is not None else None
        if rows is not None and place.a.shape(biased) == place.a.shape(skip) == shape:
            place.write("BiasAdd", [*rows, skip], result)
            return


def _group_norm(place: _Place) -> None:
    """Group normalization of an image, with the scale and bias of each channel, and with SiLU where that follows."""
    node, a = place.node, place.a
    found = _normalized(place) if op(node) == "Add" else _named(place)
    if found is None:
        return
    x, shape = found.x, a.shape(found.x)
    channels = shape[1].const if shape is not None and place.fits(x, 4) else None
    if not channels or channels % found.groups or a.shape(node.outputs[0]) != shape:
        return
    width = channels // found.groups
    if width % 2 or width > WIDEST_GROUP or [x.size for x in found.weights] != [channels, channels]:
        return
    build, silu = Builder(a.opset), _silu(node.outputs[0])
    weights = [build.constant(vector.reshape(-1).astype(np.float32)) for vector in found.weights]
    place.insert(build.nodes)
    place.write_image(
        "GroupNorm",
        [x, *weights],
        node.outputs[0] if silu is None else silu.outputs[0],
        groups=found.groups,
        epsilon=found.epsilon,
        activation=int(silu is not None),
        channels_last=1,
    )


@dataclasses.dataclass
class _Normalized:
    """An image, and how each group of its channels is normalized."""

    x: ir.Value
    groups: int
    epsilon: float
    weights: list[np.ndarray]  # what each channel is multiplied by, and what is added to it


def _normalized(place: _Place) -> _Normalized | None:
    """Group normalization as exporters write it: an InstanceNormalization between Reshapes."""
    a = place.a
    for product, bias in place.sides(place.node):
        scaled = place.before(product, "Mul")
        for back, scale in place.sides(scaled) if scaled is not None else ():
            apart = place.before(back, "Reshape")
            normalized = place.before(apart.inputs[0], "InstanceNormalization") if apart is not None else None
            together = place.before(normalized.inputs[0], "Reshape") if normalized is not None else None
            weights = [_of_channels(value, a) for value in (scale, bias)]
            if normalized is None or together is None or any(w is None for w in weights):
                continue
            x, grouped = together.inputs[0], a.shape(together.outputs[0])
            shape = a.shape(x)
            if x is None or not shape or not grouped or len(grouped) < 3 or a.shape(back) != shape:
                continue
            groups = grouped[1].const
            if groups and grouped[0] == shape[0] and _is_plain(normalized, a):
                epsilon = attribute(normalized, "epsilon", 1e-5)
                return _Normalized(x, groups, epsilon, [w for w in weights if w is not None])
    return None


def _is_plain(normalization: ir.Node, a: Analysis) -> bool:
    """Does it scale by 1 and add 0?"""
    stored = [a.constant(operand(normalization, index)) for index in (1, 2)]
    return all(x is not None and (x == number).all() for x, number in zip(stored, (1, 0), strict=True))


def _of_channels(value: ir.Value, a: Analysis) -> np.ndarray | None:
    """Stored numbers, one for each channel of an image: [C, 1, 1] or [1, C, 1, 1]."""
    numbers = a.constant(value)
    fits = numbers is not None and numbers.ndim in (3, 4) and numbers.size == numbers.shape[-3]
    return numbers if fits else None


def _named(place: _Place) -> _Normalized | None:
    """Group normalization as ONNX's own operator, which has a weight for each channel since opset 21."""
    node, a = place.node, place.a
    if op(node) != "GroupNormalization" or a.opset < 21 or node.inputs[0] is None:
        return None
    weights = [a.constant(operand(node, index)) for index in (1, 2)]
    stored = [x for x in weights if x is not None and x.ndim == 1]
    if len(stored) < 2:
        return None
    return _Normalized(node.inputs[0], attribute(node, "num_groups"), attribute(node, "epsilon", 1e-5), stored)


def _silu(value: ir.Value) -> ir.Node | None:
    """The product of a value with its own sigmoid, where that is its only use."""
    users = data_users(value)
    sigmoid = next((user for user in users if op(user) == "Sigmoid"), None)
    product = next((user for user in users if op(user) == "Mul"), None)
    if len(users) != 2 or sigmoid is None or product is None or value.is_graph_output():
        return None
    other = sigmoid.outputs[0]
    only = not other.is_graph_output() and data_users(other) == [product]
    return product if only and set(product.inputs) == {value, other} else None
