# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values as operands of the fused node: which tensor of the graph, in which layout, how many heads.

Walks from an operand of a product back through everything that only rearranges (views) or scales, and takes the
earliest tensor in which the operator can read the heads in place: Transposes, Reshapes, Splits of packed QKV and the
repetition of GQA are absorbed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir

from faexport.graph.nodes import op, producer
from faexport.sizes.dims import Dim, product
from faexport.spec import Layout, Operand
from faexport.understand.layout import view_ops
from faexport.understand.layout.products import Factor
from faexport.understand.layout.view_ops import VIEW_OPS
from faexport.understand.layout.views import Atom, Axis, View, merged, size_of, take_inner
from faexport.understand.shapes.analysis import Analysis

MAX_CHAIN = 24
ONE = Dim.of(1)
# Numbers that tensors may be multiplied by, one after the other, before what is multiplied may leave its type.
_LARGEST_SCALE, _LARGEST_SCALE_OF_HALF = 2.0**64, 2.0**12


def is_lossless(scale: float, dtype: ir.DataType | None) -> bool:
    """May usual numbers be multiplied by this, and then by what makes up for it, without overflow or underflow?"""
    largest = _LARGEST_SCALE_OF_HALF if dtype is ir.DataType.FLOAT16 else _LARGEST_SCALE
    return 1 / largest <= abs(scale) <= largest


@dataclasses.dataclass(frozen=True)
class Link:
    """A tensor from which the operand is made by views and scalars alone."""

    value: ir.Value
    scale: float  # what the operand is multiplied by, seen from here
    view: View  # of the operand over this tensor


def chain_of(
    value: ir.Value, a: Analysis, before: Callable[[ir.Node], ir.Value | None] = lambda node: None
) -> list[Link]:
    """All tensors that `value` rearranges, `value` itself first. `before` gives the tensor that a node is taken to give
    unchanged, of those that are."""
    path: list[tuple[ir.Value, float]] = [(value, 1.0)]
    while len(path) < MAX_CHAIN:
        current, scale = path[-1]
        node = producer(current)
        if node is None:
            break
        if (same := before(node)) is not None:
            path.append((same, scale))
            continue
        factor = _scalar_factor(node, a) or ((0, 1.0) if op(node) in VIEW_OPS else None)
        source = node.inputs[factor[0]] if factor is not None else None
        if factor is None or source is None or not is_lossless(scale * factor[1], a.dtype(current)):
            break
        path.append((source, scale * factor[1]))
    links = []
    for i, (start, scale) in enumerate(path):
        view = _replay(path, i, a)
        if view is not None:
            links.append(Link(start, scale, view))
    return links


def _replay(path: list[tuple[ir.Value, float]], start: int, a: Analysis) -> View | None:
    shape = a.shape(path[start][0])
    if shape is None:
        return None
    view = View.whole(shape)
    for value, _ in reversed(path[:start]):
        if op(producer(value)) not in VIEW_OPS:  # it changes the numbers alone
            continue
        moved = view_ops.apply(value, view, a)
        if moved is None:
            return None
        view = moved
    return view


def _scalar_factor(node: ir.Node, a: Analysis) -> tuple[int, float] | None:
    """(index of the tensor, factor) where the node multiplies or divides it by one constant number."""
    if op(node) not in ("Mul", "Div"):
        return None
    for index in (0, 1) if op(node) == "Mul" else (0,):
        factor = a.scalar(node.inputs[1 - index])
        rank = a.rank(node.inputs[1 - index])
        if factor and rank is not None and rank <= (a.rank(node.inputs[index]) or 0):
            return index, factor if op(node) == "Mul" else 1.0 / factor
    return None


@dataclasses.dataclass(frozen=True)
class Parts:
    """An operand's axes by meaning, as atoms over the tensor that they are read from."""

    batch: Axis
    heads: Axis  # without the repetition of GQA
    group: Dim  # query heads per head of this tensor
    rows: Axis
    columns: Axis


@dataclasses.dataclass
class Reading:
    """One way to give an operand to the fused node."""

    operand: Operand
    heads: Dim
    source: ir.Value  # the tensor of the graph that it is read from
    scale: float = 1.0
    new_nodes: tuple[ir.Node, ...] = ()


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a reading must be: the labels in the order (leading …, rows, columns), the number of query heads, and what
    is allowed."""

    labels: tuple[str, ...]
    lead_sizes: tuple[Dim, ...]
    heads: Dim
    grouped: bool  # may have fewer heads than the queries
    packed: bool  # may be read from the columns of a wider tensor
    dtype: ir.DataType | None = None
    stated: bool = False  # the op itself states batch and heads: they fit, whatever is known of their sizes


def canonical(factor: Factor, view: View, wanted: Wanted) -> list[Axis]:
    """The axes of the operand in the wanted order; a leading axis that it broadcasts becomes a repetition."""
    axes = dict(zip(factor.labels, view.axes, strict=True))
    result = [axes.get(label, ()) for label in wanted.labels]
    for i, size in enumerate(wanted.lead_sizes):
        if not result[i] and size != 1:
            result[i] = (Atom(None, ONE, size),)
    return result


def parts_of(axes: list[Axis], wanted: Wanted) -> Parts | None:
    """Batch and heads apart, and in the heads the repetition of GQA; None where they can't be told apart."""
    split = take_inner([x for axis in axes[:-2] for x in axis], wanted.heads)
    if split is None and wanted.stated and len(axes) == 4 and (is_opaque(wanted.heads) or is_opaque(size_of(axes[1]))):
        split = axes[0], axes[1]
    if split is None:
        return None
    batch, heads = split
    total = product(wanted.lead_sizes).divide(wanted.heads)
    if not wanted.stated and size_of(batch) != total:
        return None
    real = tuple(x for x in heads if x.axis is not None)
    if any(x.axis is None for x in batch) or heads[: len(real)] != real:
        return None
    group = size_of(heads[len(real) :])
    if group != 1 and not wanted.grouped:
        return None
    return Parts(batch, merged(real), group, axes[-2], axes[-1])


def is_opaque(size: Dim) -> bool:
    """Is nothing known of the size? Then the operator reads it from the shape, and checks that it divides, when the
    model runs."""
    return any(s.startswith("?") for s in size.symbols)


def read(factor: Factor, links: list[Link], wanted: Wanted, a: Analysis) -> Reading | None:
    """The reading from the earliest tensor that the operator can read in place."""
    for link in reversed(links):
        if wanted.dtype is not None and a.dtype(link.value) not in (wanted.dtype, None):
            continue
        parts = parts_of(canonical(factor, link.view, wanted), wanted)
        if parts is None:
            continue
        operand = _in_place(link, parts, wanted, a)
        if operand is not None:
            return Reading(operand, size_of(parts.heads), link.value, link.scale)
    return None


def _is_whole(axis: Axis, source_axis: int, shape: tuple[Dim, ...]) -> bool:
    return shape[source_axis] == 1 if not axis else merged(axis) == (Atom(source_axis, ONE, shape[source_axis]),)


def _in_place(link: Link, parts: Parts, wanted: Wanted, a: Analysis) -> Operand | None:
    shape = a.shape(link.value)
    if shape is None:
        return None
    heads, head_dim = size_of(parts.heads), size_of(parts.columns)
    known = {"heads": heads.const, "head_dim": head_dim.const}
    orders = {
        Layout.BHSD: (parts.batch, parts.heads, parts.rows, parts.columns),
        Layout.BSHD: (parts.batch, parts.rows, parts.heads, parts.columns),
    }
    untouched = all(x == 0 for x in link.view.offsets)
    if len(shape) == 4 and untouched:
        for layout, order in orders.items():
            if all(_is_whole(axis, i, shape) for i, axis in enumerate(order)):
                return Operand(link.value, layout, **known)
    if (
        len(shape) != 3
        or heads.const is None
        or not _is_whole(parts.batch, 0, shape)
        or not _is_whole(parts.rows, 1, shape)
    ):
        return None
    if untouched and _is_whole((*parts.heads, *parts.columns), 2, shape):
        return Operand(link.value, Layout.BSH, **known)
    return _packed(link, parts, known) if wanted.packed else None


def _packed(link: Link, parts: Parts, known: dict) -> Operand | None:
    """Head h in the columns start + h * stride … of a wider tensor."""
    columns = merged(parts.columns)
    if len(columns) != 1 or columns[0].axis != 2 or columns[0].stride != 1 or len(parts.heads) > 1:
        return None
    if parts.heads and parts.heads[0].axis != 2:
        return None
    stride = parts.heads[0].stride.const if parts.heads else known["head_dim"]
    start = link.view.offsets[2].const
    if stride is None or start is None or known["head_dim"] is None or any(x != 0 for x in link.view.offsets[:2]):
        return None
    return Operand(link.value, Layout.BSH, **known, column_start=start, column_stride=stride)
