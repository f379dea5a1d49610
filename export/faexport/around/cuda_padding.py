# SPDX-License-Identifier: Apache-2.0
"""Writes padding as Concat, for onnxruntime's CUDA provider (Options.joins_cuda). Called by pipeline.py.

Models that attend within windows of an image pad its rows and columns first. onnxruntime's kernel of Pad finds each
element's place by divisions (measured on an H200: 0.37 ms for an image of 64 x 64 rows of 768 float16, to 70 x 70);
its kernels of Expand and Concat take a few microseconds. The last two of four axes alone have a fast kernel of Pad.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from faexport.graph.edits import Names, insert_in_front, remove_dead, take_over
from faexport.graph.nodes import RUNTIME_FLOATS, attribute, graphs_of, op, operand
from faexport.graph.surgery import Builder
from faexport.sizes.dims import Dim
from faexport.understand.layout.shape_uses import size_from
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.rules import constant_ints, resolve_axis

Pads = dict[int, tuple[int, int]]  # by axis: rows in front, rows behind


def join(model: ir.Model, a: Analysis, names: Names) -> None:
    """Changes the model in place. `a` knows it as it was before others joined what stands around attention."""
    a.extend(model)
    for graph, _ in graphs_of(model):
        if isinstance(graph, ir.Graph):
            _Graph(graph, a, names).join()


class _Graph:
    """One graph's Pads; what is put in front or behind is made once for all of a size, at the graph's beginning."""

    def __init__(self, graph: ir.Graph, a: Analysis, names: Names):
        self.graph, self.a, self.names = graph, a, names
        self.build = Builder(a.opset)
        self.shapes: dict[ir.Value, ir.Value] = {}  # of the graph's inputs
        self.blocks: dict[tuple, ir.Value | None] = {}

    def join(self) -> None:
        for node in list(self.graph):
            pads, x = _pads_of(node, self.a) if op(node) == "Pad" else None, operand(node, 0)
            if pads is None or x is None or self.a.dtype(x) not in RUNTIME_FLOATS:
                continue
            if not pads and not node.outputs[0].is_graph_output():
                ir.convenience.replace_all_uses_with(node.outputs[0], x)
                remove_dead([node])
            elif pads and not (self.a.rank(x) == 4 and set(pads) <= {2, 3}):
                self._write(node, x, pads)
        if self.build.nodes:
            insert_in_front(self.graph[0], self.build.nodes, "padding", self.names)
        remove_dead([*self.build.nodes])  # of Pads that stay because one of their blocks has a size that isn't known

    def _write(self, node: ir.Node, x: ir.Value, pads: Pads) -> None:
        """A Concat for each axis."""
        dtype, sizes, blocks = self.a.dtype(x), list(self.a.known_shape(x)), {}
        number = 0.0 if operand(node, 2) is None else self.a.scalar(operand(node, 2))
        assert dtype is not None
        if number is None:
            return
        for axis, counts in sorted(pads.items()):
            both = [self._block((*sizes[:axis], Dim.of(n), *sizes[axis + 1 :]), number, dtype) for n in counts]
            if any(block is None and count for block, count in zip(both, counts, strict=True)):
                return
            blocks[axis] = both
            sizes[axis] += sum(counts)
        concats = Builder(self.a.opset)
        for axis, (front, back) in blocks.items():
            parts = [part for part in (front, x, back) if part is not None]
            x = concats.add("Concat", parts, dtype, axis=axis)
        insert_in_front(node, concats.nodes, node.name or "padding", self.names)
        take_over(node.outputs[0], x)
        remove_dead([node])

    def _block(self, sizes: tuple[Dim, ...], number: float, dtype: ir.DataType) -> ir.Value | None:
        """A tensor of the number; None where its sizes are not those of the graph's inputs."""
        key = (sizes, number, dtype)
        if key not in self.blocks:
            self.blocks[key] = self._made(sizes, number, dtype)
        return self.blocks[key]

    def _made(self, sizes: tuple[Dim, ...], number: float, dtype: ir.DataType) -> ir.Value | None:
        if any(size == 0 for size in sizes):
            return None
        parts = []
        for size in sizes:
            if size.const is not None:
                part: ir.Value | None = self.build.ints([size.const])
            else:
                part = size_from(self.build, size, self.graph.inputs, self.shapes, self.a)
            if part is None:
                return None
            parts.append(part)
        shape = self.build.add("Concat", parts, ir.DataType.INT64, axis=0)
        return self.build.add("Expand", [self.build.constant(np.asarray(number, dtype.numpy())), shape], dtype)


def _pads_of(node: ir.Node, a: Analysis) -> Pads | None:
    """What a Pad adds, where that is known, is a constant, and nothing is cut off. Axes that nothing is added to are
    left out."""
    rank = a.rank(operand(node, 0))
    if rank is None or a.opset < 11 or attribute(node, "mode", "constant") not in ("constant", b"constant"):
        return None
    sizes = a.contents(operand(node, 1))
    axes = list(range(rank)) if operand(node, 3) is None else constant_ints(node, a, 3, "axes")
    if sizes is None or axes is None or len(sizes) != 2 * len(axes):
        return None
    known = [size.const for size in sizes]
    if any(size is None or size < 0 for size in known):
        return None
    counts = [size for size in known if size is not None]
    both = zip(axes, counts[: len(axes)], counts[len(axes) :], strict=True)
    return {resolve_axis(axis, rank): (front, back) for axis, front, back in both if front or back}
