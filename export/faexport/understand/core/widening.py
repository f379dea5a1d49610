# SPDX-License-Identifier: Apache-2.0
"""Masks, biases and factors that may have more rows, heads or batch entries than the scores that they meet.

Where both sizes have names of their own they are equal or one of them is 1, and scores of size 1 then take the other
one's. So would scores of queries that were expanded to it first: that is how such a site is fused. Called by
score_chain.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import onnx_ir as ir

from faexport.graph.nodes import attribute, op
from faexport.sizes.dims import Dim
from faexport.understand.layout.products import Factor, Product
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


def widened(product: Product, steps: Sequence[Step], a: Analysis) -> tuple[tuple[Dim, ...], tuple[Factor, ...]]:
    """The sizes of the scores once everything has met them that meets them in the shape in which they are multiplied,
    and the tensors that they may take them from."""
    shape = list(product.shape_of(a) or ())
    wider: dict[ir.Value, Factor] = {}
    for value, order in _others(steps, len(shape)):
        own = a.shape(value)
        if own is None or len(own) > len(shape):
            continue
        met = order[len(shape) - len(own) :]
        for axis, size in zip(met, own, strict=True):
            # More keys than the scores have would not fit the values.
            small = size.const is None or size.const <= MOST
            if small and product.labels[axis] != "column" and not a.leaves(size, shape[axis]):
                shape[axis] = shape[axis].meet(size)
                wider[value] = Factor(value, tuple(product.labels[k] for k in met))
    return tuple(shape), tuple(wider.values())


def _others(steps: Sequence[Step], rank: int) -> Iterator[tuple[ir.Value, tuple[int, ...]]]:
    """What meets the scores before they change their shape but for the order of the axes, and which axes of the product
    it meets."""
    order = tuple(range(rank))
    for step in steps:
        if step.kind == "view" and op(step.node) == "Transpose":
            perm = attribute(step.node, "perm", tuple(reversed(range(rank))))
            order = tuple(order[k] for k in perm)
        elif step.kind in ("view", "sink"):
            return
        elif step.kind in ("add", "sub", "from", "where", "clamp", "min", "factor"):
            yield from ((v, order) for i, v in enumerate(step.node.inputs) if i != step.index and v is not None)
