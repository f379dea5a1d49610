# SPDX-License-Identifier: Apache-2.0
"""Biases that are added while the scores' rows and columns are split, as relative positions of an image are: the scores
as [N, rows_y, rows_x, columns_y, columns_x]. Called by score_chain.py.

Adding and rearranging may be exchanged: the sum of such biases, as large as the scores, goes through the nodes that
bring the scores back, and is then a bias of their own shape. The graph is not changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from faexport.graph.surgery import Builder
from faexport.sizes.dims import Dim
from faexport.understand.shapes.analysis import Analysis


class SplitBias:
    """The sum of the biases since the scores were split; its nodes aren't in the graph yet."""

    def __init__(self, a: Analysis):
        self.a, self.factor = a, 1.0
        self.value: ir.Value | None = None
        self._count = 0  # of new nodes
        self._followed = False  # has it gone through a node already?

    @property
    def sum(self) -> ir.Value:
        """What add() made."""
        assert self.value is not None
        return self.value

    @property
    def _sizes(self) -> tuple[Dim, ...]:
        """Of the sum, without what was learnt when it met the scores: they keep their sizes only if these fit."""
        with self.a.without_learnt():
            return self.a.known_shape(self.sum)

    def add(self, node: ir.Node, value: ir.Value, factor: float, shape: Sequence[Dim]) -> bool:
        """Adds factor * value, which `node` adds to scores of this shape; False where that can't be done here."""
        sizes = self.a.shape(value)
        if sizes is None or len(sizes) > len(shape) or self._followed or (self.value and factor != self.factor):
            return False
        self.factor = factor
        if self.value is None:
            self.value = value
        else:
            build = Builder(self.a.opset)
            build.add("Add", [self.value, value], self.a.dtype(value))
            before = self.value
            self._become(build, node)
            self.a.define_broadcast(self.sum, before, value)
        return True

    def follow(self, node: ir.Node, before: Sequence[Dim], after: Sequence[Dim]) -> bool:
        """Goes through a node that takes the scores from one shape to another; False where that isn't possible. In the
        axes in front, which a Reshape leaves alone, the bias may be broadcast; in all others it is as large as the
        scores."""
        kept = 0
        while node.op_type == "Reshape" and kept < min(len(before), len(after)) and before[kept] == after[kept]:
            kept += 1
        if not self._expand(node, before, kept):
            return False
        own = self._sizes
        build, dtype = Builder(self.a.opset), self.a.dtype(self.sum)
        is_literal = node.op_type == "Reshape" and sum(d.const is None for d in after) <= 1
        if own == tuple(before) and not is_literal:
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            build.add(node.op_type, [self.value, *node.inputs[1:]], dtype, **attributes)
        else:
            rest = [-1 if d.const is None else d.const for d in after[kept:]]
            if rest.count(-1) > 1:
                return False
            build.add("Reshape", [self.value, build.ints([*(0,) * kept, *rest])], dtype)
        self._become(build, node)
        self.a.define(self.sum, (*own[:kept], *after[kept:]))
        return True

    def pad(self, node: ir.Node, shape: Sequence[Dim], starts: Sequence[int], whole: Sequence[Dim]) -> bool:
        """Becomes 0 in all of `whole` but the part of this shape that begins at `starts`, on the first axes; False
        where sizes aren't known."""
        rests = [end - size - start for end, size, start in zip(whole, shape, starts, strict=False)]
        counts = [rest.const for rest in rests if rest.const is not None]
        if len(counts) != len(rests) or self.a.opset < 11 or not self._expand(node, shape, 0):
            return False
        more = (0,) * (len(whole) - len(starts))
        build = Builder(self.a.opset)
        build.add("Pad", [self.value, build.ints([*starts, *more, *counts, *more])], self.a.dtype(self.value))
        self._become(build, node)
        self.a.define(self.sum, tuple(whole))
        return True

    def _expand(self, node: ir.Node, shape: Sequence[Dim], kept: int) -> bool:
        """Gives the sum the rank of the scores, and their sizes but for the first `kept` axes, where sizes that it
        lacks are constants."""
        given = self._sizes
        own = (Dim.of(1),) * (len(shape) - len(given)) + tuple(given)
        if any(x not in (1, size) for x, size in zip(own, shape, strict=True)):
            return False
        sizes = (*own[:kept], *shape[kept:])
        counts = (1 if x == size else size.const for x, size in zip(own, sizes, strict=True))
        missing = [count for count in counts if count is not None]
        if len(missing) != len(sizes):
            return False
        if sizes != given:
            build = Builder(self.a.opset)
            build.add("Expand", [self.value, build.ints(missing)], self.a.dtype(self.value))
            self._become(build, node)
            self.a.define(self.sum, sizes)
        self._followed = True
        return True

    def _become(self, build: Builder, node: ir.Node) -> None:
        """Takes what was built, called after the node on the scores' way."""
        for new in build.nodes:
            new.outputs[0].name = f"{node.outputs[0].name}_faexport_bias_{self._count}"
            self._count += 1
        self.value = build.nodes[-1].outputs[0]
