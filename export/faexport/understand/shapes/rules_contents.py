# SPDX-License-Identifier: Apache-2.0
"""What small integer tensors hold, as far as it can be told: sizes of other tensors and what is computed from them.

Registered in rules.CONTENT_RULES; imported by analysis.py.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import attribute, op, operand, producer
from faexport.sizes.dims import Dim, product
from faexport.understand.shapes.constants import fold
from faexport.understand.shapes.floor_division import floor_division
from faexport.understand.shapes.known import Contents, Known, Shape
from faexport.understand.shapes.rules import (
    constant_ints,
    contents_of,
    quotient,
    reduced_axes,
    shape_window,
    split_sizes,
)


@contents_of("Shape")
def _contents_shape(node: ir.Node, a: Known) -> Contents:
    shape = a.shape(node.inputs[0])
    return None if shape is None else shape_window(node, shape)


def _all_contents(values: Sequence[ir.Value | None], a: Known) -> list[Shape] | None:
    """The elements of each; None where those of any are not known."""
    found = [contents for value in values if (contents := a.contents(value)) is not None]
    return found if len(found) == len(values) else None


@contents_of("Size")
def _contents_size(node: ir.Node, a: Known) -> Contents:
    shape = a.shape(node.inputs[0])
    return None if shape is None else (product(shape),)


@contents_of("Identity", "Unsqueeze", "Squeeze", "Reshape")
def _contents_same(node: ir.Node, a: Known) -> Contents:
    contents, rank = a.contents(node.inputs[0]), a.rank(node.outputs[0])
    if node.op_type == "Reshape":
        sizes = a.contents(operand(node, 1))
        rank = 1 if sizes is None else len(sizes)
        before = producer(node.inputs[0])
        if rank == 1 and before is not None and op(before) == "OneHot":
            return _one_hot(before, a)
        if rank == 1 and contents is None and node.inputs[0] is not None:
            return _moved(node.inputs[0], a)
    return contents if rank is None or rank <= 1 else None


def _moved(value: ir.Value, a: Known) -> Shape | None:
    """Numbers that went through more than one axis and stand in another order, as TorchScript's exporter writes the
    widths of a Pad: from the last axis to the first, turned around by Reshape, Slice and Transpose."""
    path: list[ir.Node] = []
    while (contents := a.contents(value)) is None:
        node = value.producer()
        if node is None or op(node) not in _MOVES or node.inputs[0] is None or len(path) == _LONGEST_PATH:
            return None
        path.append(node)
        value = node.inputs[0]
    places: np.ndarray | None = np.arange(len(contents))
    for node in reversed(path):
        others = [a.constant(v) for v in node.inputs[1:]]
        places = fold(node, [places, *others]) if places is not None else None
    return None if places is None else tuple(contents[i] for i in places.reshape(-1))


_MOVES = ("Reshape", "Transpose", "Slice")
_LONGEST_PATH = 8


def _one_hot(node: ir.Node, a: Known) -> Shape | None:
    """One number at one place and another elsewhere: the repeats of a Tile, as torch.repeat_interleave writes them."""
    place, depth, values = (a.contents(v) for v in node.inputs)
    if place is None or depth is None or values is None or len(place) != 1:
        return None
    where, count = place[0].const, depth[0].const
    if where is None or count is None:
        return None
    if not -count <= where < count or count > 32:
        return None
    return tuple(values[1] if i == where % count else values[0] for i in range(count))


@contents_of("Cast")
def _contents_cast(node: ir.Node, a: Known) -> Contents:
    if attribute(node, "to") not in (int(ir.DataType.INT64), int(ir.DataType.INT32)):
        return None
    test = producer(node.inputs[0])
    if test is None or op(test) != "Equal":
        return a.contents(node.inputs[0])
    parts = _all_contents(test.inputs, a)  # tf.slice's sizes, where -1 stands for all that is left (tf2onnx)
    if parts is None or len({len(p) for p in parts} - {1}) > 1:
        return None
    count = max(map(len, parts))
    equal = [_is_equal(p, q) for p, q in zip(*(p * count if len(p) == 1 else p for p in parts), strict=True)]
    return None if None in equal else tuple(Dim.of(int(bool(e))) for e in equal)


@contents_of("Concat")
def _contents_concat(node: ir.Node, a: Known) -> Contents:
    parts = _all_contents(node.inputs, a)
    return None if parts is None else tuple(itertools.chain.from_iterable(parts))


@contents_of("Gather")
def _contents_gather(node: ir.Node, a: Known) -> Contents:
    data, index = a.contents(node.inputs[0]), a.constant(node.inputs[1])
    if data is None or index is None or index.ndim > 1 or attribute(node, "axis", 0) not in (0, -1):
        return None
    if any(not -len(data) <= i < len(data) for i in index.reshape(-1)):
        return None
    return tuple(data[int(i)] for i in index.reshape(-1))


@contents_of("Slice")
def _contents_slice(node: ir.Node, a: Known) -> Contents:
    data = a.contents(node.inputs[0])
    bounds = [constant_ints(node, a, i, n) for i, n in ((1, "starts"), (2, "ends"), (4, "steps"))]
    if bounds[0] is None or bounds[1] is None or len(bounds[0]) != 1:
        return None
    if data is None:
        return () if bounds[0] == bounds[1] and a.rank(node.inputs[0]) == 1 else None
    return data[slice(bounds[0][0], bounds[1][0], (bounds[2] or [1])[0])]


@contents_of("Split")
def _contents_split(node: ir.Node, a: Known) -> Contents:
    """Sizes apart, as onnxruntime's optimizer writes several Gathers from one Shape."""
    data = a.contents(node.inputs[0])
    sizes = None if data is None else split_sizes(node, a, Dim.of(len(data)))
    counts = [d.const for d in sizes or () if d.const is not None]
    if data is None or sizes is None or len(counts) != len(sizes):
        return None
    return [data[end - count : end] for end, count in zip(itertools.accumulate(counts), counts, strict=True)]


@contents_of("Add", "Sub", "Mul", "Div", "Mod")
def _contents_arithmetic(node: ir.Node, a: Known) -> Contents:
    """The node applied to numbers that are known, or the quotient that a Sub makes of what Div rounded towards 0."""
    divided = floor_division(node, a)
    x, y = (a.contents(v) for v in divided or node.inputs)
    if x is None or y is None or (len(x) != len(y) and 1 not in (len(x), len(y))):
        return None
    count = max(len(x), len(y))
    x, y = (p * count if len(p) == 1 else p for p in (x, y))
    name = "floor" if divided else "fmod" if attribute(node, "fmod", 0) else node.op_type
    result = [r for p, q in zip(x, y, strict=True) if (r := _arithmetic(name, p, q)) is not None]
    return tuple(result) if len(result) == count else None


def _arithmetic(name: str, x: Dim, y: Dim) -> Dim | None:
    if name == "floor":
        return _floored(x, y)
    if name in ("Div", "fmod"):  # this remainder belongs to the quotient that is rounded towards 0
        whole = _divided(x, y)
        return whole if name == "Div" or whole is None else x - whole * y
    if name == "Mod":
        whole = _floored(x, y)
        return None if whole is None else x - whole * y
    return {"Add": x + y, "Sub": x - y, "Mul": x * y}[name]


def _divided(x: Dim, y: Dim) -> Dim | None:
    """ONNX rounds towards 0."""
    if x.const is not None and y.const:
        whole = abs(x.const) // abs(y.const)
        return Dim.of(whole if (x.const < 0) == (y.const < 0) else -whole)
    if x.divide(y) is not None:
        return x.divide(y)
    return quotient(x, y) if x.is_at_least(0) and y.is_at_least(0) else None


def _floored(x: Dim, y: Dim) -> Dim | None:
    """x / y rounded down, for integers of any sign; y is not 0, or the model fails."""
    if y.is_at_least(0):
        return quotient(x, y)
    return quotient(-x, -y) if (-y).is_at_least(0) else x.divide(y)


@contents_of("Min", "Max")
def _contents_extreme(node: ir.Node, a: Known) -> Contents:
    parts = _all_contents(node.inputs, a)
    if parts is None or len({len(p) for p in parts} - {1}) > 1:
        return None
    count = max(map(len, parts))
    parts = [p * count if len(p) == 1 else p for p in parts]
    function = Dim.minimum if node.op_type == "Min" else Dim.maximum
    return tuple(functools.reduce(function, x) for x in zip(*parts, strict=True))


@contents_of("Neg")
def _contents_neg(node: ir.Node, a: Known) -> Contents:
    contents = a.contents(node.inputs[0])
    return None if contents is None else tuple(-d for d in contents)


@contents_of("Where")
def _contents_where(node: ir.Node, a: Known) -> Contents:
    """The idiom `Where(shape == -1, 1, shape)`: sizes are never negative, so a symbol is never -1."""
    condition, x, y = node.inputs
    test = producer(condition)
    if test is None or test.op_type != "Equal":
        return None
    parts = _all_contents((*test.inputs, x, y), a)
    if parts is None or len(set(map(len, parts))) != 1:
        return None
    result = []
    for p, q, if_equal, if_not in zip(*parts, strict=True):
        equal = _is_equal(p, q)
        if equal is None and if_equal != if_not:
            return None
        result.append(if_equal if equal else if_not)
    return tuple(result)


def _is_equal(p: Dim, q: Dim) -> bool | None:
    """None: it depends on the sizes."""
    apart = (p - q).is_at_least(1) or (q - p).is_at_least(1)
    return True if p == q else False if apart else None


@contents_of("ConstantOfShape")
def _contents_constant_of_shape(node: ir.Node, a: Known) -> Contents:
    length, fill = a.contents(node.inputs[0]), attribute(node, "value")
    if length is None or len(length) != 1 or length[0].const is None or fill is None or length[0].const > 32:
        return None
    if fill.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    return (Dim.of(int(fill.numpy().reshape(-1)[0])),) * length[0].const


@contents_of("ReduceProd")
def _contents_reduce_prod(node: ir.Node, a: Known) -> Contents:
    contents = a.contents(node.inputs[0])
    return None if contents is None or not reduced_axes(node, a, rank=1) else (product(contents),)
