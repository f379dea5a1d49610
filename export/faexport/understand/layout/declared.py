# SPDX-License-Identifier: Apache-2.0
"""Operands and outputs of ops that state their heads and layouts themselves: ONNX Attention, com.microsoft
MultiHeadAttention …

What stands in front of them (Transposes, Reshapes, the repetition of GQA, the Split of a packed projection) is
absorbed as in heads.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from faexport.sizes.dims import Dim
from faexport.spec import Layout, Operand
from faexport.understand.layout.heads import Link, Reading, Wanted, chain_of, read
from faexport.understand.layout.products import Factor
from faexport.understand.layout.views import View
from faexport.understand.shapes.analysis import Analysis

LABELS = ("batch", "heads", "rows", "columns")
Sizes = tuple[Dim, Dim, Dim, Dim]  # B, H, S, D


@dataclasses.dataclass(frozen=True)
class Declared:
    """One operand in a layout, and its number of heads where that is known."""

    value: ir.Value
    layout: Layout
    heads: Dim | None

    def as_is(self) -> Reading:
        heads = self.heads if self.heads is not None else Dim.unknown("heads")
        return Reading(Operand(self.value, self.layout, heads=heads.const), heads, self.value)


def sizes_of(declared: Declared, a: Analysis) -> Sizes | None:
    """[B, H, S, D], or None where the shape isn't known."""
    shape = a.shape(declared.value)
    if shape is None or declared.heads is None:
        return None
    if declared.layout != Layout.BSH:
        return tuple(shape[declared.layout.index(x)] for x in "BHSD") if len(shape) == 4 else None  # type: ignore[return-value]
    head_dim = shape[2].divide(declared.heads) if len(shape) == 3 else None
    return None if head_dim is None else (shape[0], declared.heads, shape[1], head_dim)


def read_all(sides: Sequence[Declared], a: Analysis) -> list[Reading]:
    """Query, key and value from the earliest tensors that can be read in place; as they are where nothing is proven."""
    as_is = [side.as_is() for side in sides]
    sizes = [size for side in sides if (size := sizes_of(side, a)) is not None]
    if len(sizes) != len(sides) or len({a.dtype(side.value) for side in sides}) > 1:
        return as_is
    for grouped, packed in ((True, True), (True, False), (False, False)):
        tried = (
            _read(side, size, sizes[0][1], grouped and side is not sides[0], packed, a)
            for side, size in zip(sides, sizes, strict=True)
        )
        found = [reading for reading in tried if reading is not None]
        if len(found) == len(sides) and _agree(found):
            return found
    return as_is


def _agree(readings: Sequence[Reading]) -> bool:
    columns = [r.operand.column_start is not None for r in readings]
    return readings[1].heads == readings[2].heads and (all(columns) or not any(columns))


def _read(side: Declared, sizes: Sizes, query_heads: Dim, grouped: bool, packed: bool, a: Analysis) -> Reading | None:
    repeat = query_heads.divide(sizes[1])
    if repeat is None:
        return None
    links = []
    for link in chain_of(side.value, a):
        view = _as_bhsd(link.view, side.layout, sizes)
        if view is not None and link.scale == 1.0:
            links.append(Link(link.value, 1.0, view.repeat(1, repeat, inner=True)))
    wanted = Wanted(
        LABELS, (sizes[0], query_heads), query_heads, grouped or repeat != 1, packed, a.dtype(side.value), True
    )
    return read(Factor(side.value, LABELS), links, wanted, a)


def _as_bhsd(view: View, layout: Layout, sizes: Sizes) -> View | None:
    if layout != Layout.BSH:
        return view.transpose([layout.index(x) for x in "BHSD"]) if len(view.axes) == 4 else None
    split = view.reshape((sizes[0], sizes[2], sizes[1], sizes[3]))
    return None if split is None else split.transpose((0, 2, 1, 3))
