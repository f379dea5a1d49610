# SPDX-License-Identifier: Apache-2.0
"""Which nodes only rearrange a tensor, and how: one function per ONNX op, applied to a View of the node's input.

Each returns the View of the asked output, or None where it isn't proven to be a rearrangement.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import FLOATS, attribute, op, operand
from faexport.sizes.dims import Dim, product
from faexport.understand.layout.views import View
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.rules import constant_ints, resolve_axis, same_count, slice_of, split_sizes

ViewOp = Callable[[ir.Node, ir.Value, View, Analysis], View | None]
VIEW_OPS: dict[str, ViewOp] = {}
# A float type holds all numbers of those that are narrower.
WIDTHS = {ir.DataType.FLOAT16: 1, ir.DataType.BFLOAT16: 1, ir.DataType.FLOAT: 2, ir.DataType.DOUBLE: 3}


def _view(*names: str) -> Callable[[ViewOp], ViewOp]:
    def register(function: ViewOp) -> ViewOp:
        VIEW_OPS.update(dict.fromkeys(names, function))
        return function

    return register


def apply(value: ir.Value, view: View, a: Analysis) -> View | None:
    """The view of `value`, an output of a node, given the view of that node's first input."""
    node = value.producer()
    function = VIEW_OPS.get(op(node))
    return None if node is None or function is None else function(node, value, view, a)


@_view("Identity")
def _identity(node: ir.Node, value: ir.Value, view: View, a: Analysis) -> View | None:
    return view


@_view("Dropout")
def _dropout(node: ir.Node, value: ir.Value, view: View, a: Analysis) -> View | None:
    return view if value is node.outputs[0] and not is_training(node, a) else None


def is_training(node: ir.Node, a: Analysis) -> bool:
    """May this Dropout drop anything?"""
    mode = operand(node, 2)
    if mode is None:
        return False
    flag = a.constant(mode)
    return flag is None or bool(flag.reshape(-1)[0])


@_view("Cast")
def _cast(node: ir.Node, value: ir.Value, view: View, a: Analysis) -> View | None:
    """Only a Cast that loses nothing is looked through."""
    return view if is_widening(node, a) else None


def is_widening(cast: ir.Node, a: Analysis) -> bool:
    """Does a Cast turn floats into floats that hold them all?"""
    source, target = a.dtype(cast.inputs[0]), ir.DataType(attribute(cast, "to", 0))
    if source not in FLOATS or target not in FLOATS:
        return False
    return source == target or WIDTHS[source] < WIDTHS[target]


@_view("Transpose")
def _transpose(node: ir.Node, value: ir.Value, view: View, a: Analysis) -> View | None:
    perm = attribute(node, "perm") or list(range(len(view.axes)))[::-1]
    return view.transpose(perm) if len(perm) == len(view.axes) else None


@_view("Reshape", "Flatten")
def _reshape(node: ir.Node, value: ir.Value, view: View, a: Analysis) -> View | None:
    target = a.contents(operand(node, 1)) if node.op_type == "Reshape" else None
    if target is None:
        shape = a.shape(value)
        return None if shape is None else view.reshape(shape)
    sizes, copies = view.shape, not attribute(node, "allowzero", 0)
    dims = [sizes[i] if d == 0 and copies and i < len(sizes) else d for i, d in enumerate(target)]
    if -1 in dims:
        rest = product(sizes).divide(product(d for d in dims if d != -1))
        if rest is None:
            return None
        dims = [rest if d == -1 else d for d in dims]
    return view.reshape(same_count(sizes, dims))


@_view("Unsqueeze")
def _unsqueeze(node: ir.Node, value: ir.Value, view: View, a: Analysis) -> View | None:
    axes = constant_ints(node, a, 1, "axes")
    if axes is None:
        return None
    rank = len(view.axes) + len(axes)
    for position in sorted(resolve_axis(x, rank) for x in axes):
        view = view.insert(position)
    return view


@_view("Squeeze")
def _squeeze(node: ir.Node, value: ir.Value, view: View, a: Analysis) -> View | None:
    axes = constant_ints(node, a, 1, "axes")
    if axes is None:
        return None
    for position in sorted((resolve_axis(x, len(view.axes)) for x in axes), reverse=True):
        dropped = view.drop(position)
        if dropped is None:
            return None
        view = dropped
    return view


@_view("Expand")
def _expand(node: ir.Node, value: ir.Value, view: View, a: Analysis) -> View | None:
    shape = a.shape(value)
    return None if shape is None else view.expand(shape)


@_view("Slice")
def _slice(node: ir.Node, value: ir.Value, view: View, a: Analysis) -> View | None:
    pieces = slice_of(node, a, view.shape)
    for axis, start, size, step in pieces or ():
        if step != 1:
            return None
        piece = view.slice(axis, start, size)
        if piece is None:
            return None
        view = piece
    return None if pieces is None else view


@_view("Split")
def _split(node: ir.Node, value: ir.Value, view: View, a: Analysis) -> View | None:
    axis = resolve_axis(attribute(node, "axis", 0), len(view.axes))
    sizes = split_sizes(node, a, view.shape[axis])
    if sizes is None:
        return None
    index = node.outputs.index(value)
    return view.slice(axis, sum(sizes[:index], Dim.of(0)), sizes[index])


@_view("Gather")
def _gather(node: ir.Node, value: ir.Value, view: View, a: Analysis) -> View | None:
    """One index, a run of them, or each index several times: a slice or a repetition."""
    index = a.constant(node.inputs[1])
    axis = resolve_axis(attribute(node, "axis", 0), len(view.axes))
    size = view.shape[axis].const
    if index is None or index.ndim > 1 or index.size == 0 or (size is None and index.min() < 0):
        return None
    index = np.where(index < 0, index + (size or 0), index)
    if index.ndim == 0:
        one = view.slice(axis, Dim.of(int(index)), Dim.of(1))
        return None if one is None else one.drop(axis)
    count = len(np.unique(index))
    copies = index.size // count
    run = np.arange(index[0], index[0] + count)
    inner = np.array_equal(index, np.repeat(run, copies))
    if not inner and not np.array_equal(index, np.tile(run, copies)):
        return None
    part = view.slice(axis, Dim.of(int(index[0])), Dim.of(count))
    return None if part is None else part.repeat(axis, Dim.of(copies), inner)


@_view("Tile")
def _tile(node: ir.Node, value: ir.Value, view: View, a: Analysis) -> View | None:
    counts = a.contents(operand(node, 1))
    if counts is None or len(counts) != len(view.axes):
        return None
    for axis, count in enumerate(counts):
        view = view.repeat(axis, count, inner=False)
    return view


@_view("Concat")
def _concat(node: ir.Node, value: ir.Value, view: View, a: Analysis) -> View | None:
    """Copies of one tensor."""
    if any(v is not node.inputs[0] for v in node.inputs):
        return None
    axis = resolve_axis(attribute(node, "axis", 0), len(view.axes))
    return view.repeat(axis, Dim.of(len(node.inputs)), inner=False)
