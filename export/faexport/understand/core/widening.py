# SPDX-License-Identifier: Apache-2.0
"""Masks, biases and factors that may have more rows, heads or batch entries than the scores that they meet.

Where both sizes have names of their own they are equal or one of them is 1, and scores of size 1 then take the other
one's. So would scores of queries that were expanded to it first: that is how such a site is fused. Called by
score_chain.py.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Sequence
from typing import Protocol

import onnx_ir as ir

from faexport.graph.nodes import attribute, op
from faexport.sizes.dims import Dim
from faexport.understand.layout import view_ops
from faexport.understand.layout.products import Factor, Product
from faexport.understand.layout.views import View
from faexport.understand.shapes.analysis import Analysis

MOST = 1 << 12  # rows, heads or batch entries: scores that a file makes larger than that are no attention


class Step(Protocol):
    """One node on the way from the scores to the softmax (score_chain.Step)."""

    @property
    def node(self) -> ir.Node: ...

    @property
    def kind(self) -> str: ...

    @property
    def index(self) -> int: ...


class Widen(enum.Enum):
    """What the scores may take from a mask that has sizes of its own."""

    NOTHING = enum.auto()
    NOT_KEYS = enum.auto()  # more keys than there are would not fit the values …
    ALL = enum.auto()  # … but where an Einsum takes one value for all of them


def widened(
    product: Product, steps: Sequence[Step], widen: Widen, a: Analysis
) -> tuple[tuple[Dim, ...], tuple[Factor, ...]]:
    """The sizes of the scores once everything has met them that meets them in the shape in which they are multiplied,
    and the tensors that they may take them from."""
    shape = list(product.shape_of(a) or ())
    wider: dict[ir.Value, Factor] = {}
    for value, order in _others(steps if widen is not Widen.NOTHING else (), tuple(shape), a):
        own = a.shape(value)
        if own is None or len(own) > len(order):
            continue
        met = order[len(order) - len(own) :]
        for axis, size in zip(met, own, strict=True):
            if axis is None or (product.labels[axis] == "column" and widen is not Widen.ALL):
                continue
            if (size.const is None or size.const <= MOST) and not a.leaves(size, shape[axis]):
                shape[axis] = shape[axis].meet(size)
                wider[value] = Factor(value, tuple("" if k is None else product.labels[k] for k in met))
    return tuple(shape), tuple(wider.values())


Order = tuple[int | None, ...]  # which axis of a product each axis is; None: one of size 1 that is in front of none


def _others(steps: Sequence[Step], shape: tuple[Dim, ...], a: Analysis) -> Iterator[tuple[ir.Value, Order]]:
    """What meets the scores before they change their shape but for the order of the axes and axes of size 1, and which
    axes of the product it meets."""
    order: Order = tuple(range(len(shape)))
    for step in steps:
        behind = followed(step.node, order, shape, a) if step.kind == "view" else order
        if behind is None or step.kind == "sink":
            return
        order = behind
        if step.kind in ("add", "sub", "from", "where", "clamp", "min", "factor"):
            yield from ((v, order) for i, v in enumerate(step.node.inputs) if i != step.index and v is not None)
        if a.rank(step.node.outputs[0]) not in (len(order), None):
            return


def followed(node: ir.Node, order: Order, shape: tuple[Dim, ...], a: Analysis) -> Order | None:
    """The order behind a node that changes nothing but the order of the axes and axes of size 1; None where it changes
    more. `shape`: of the product."""
    if op(node) == "Transpose":
        return tuple(order[k] for k in attribute(node, "perm", tuple(reversed(range(len(order))))))
    whole = View.whole([Dim.of(1) if k is None else shape[k] for k in order])
    view = view_ops.apply(node.outputs[0], whole, a)
    if view is None or any(axis and axis not in whole.axes for axis in view.axes):
        return None
    kept = [whole.axes.index(axis) if axis else None for axis in view.axes]
    return tuple(None if k is None else order[k] for k in kept)


def as_view(order: Order, shape: tuple[Dim, ...]) -> View:
    """The view of a product of this shape with its axes in an order."""
    whole = View.whole(shape)
    return dataclasses.replace(whole, axes=tuple(() if k is None else whole.axes[k] for k in order))
