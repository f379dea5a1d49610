# SPDX-License-Identifier: Apache-2.0
"""Writes sizes that are proven as numbers, in the place of the nodes that compute them. Called by pipeline.py.

Exports with an open batch or length compute every shape from it, also the sizes that never change: a Swin exported by
TorchScript has 1,800 nodes in onnxruntime, of which 1,200 compute sizes, one after the other on the CPU, while a GPU
waits. onnxruntime folds them only where a whole shape is known. What is proven of sizes here holds for each of them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from faexport.graph.edits import Names, insert_in_front, remove_dead
from faexport.graph.nodes import attribute, graphs_of, op, operand, producer
from faexport.graph.surgery import Builder
from faexport.sizes.dims import Dim
from faexport.understand.shapes.analysis import Analysis

_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)


def write(model: ir.Model, a: Analysis, names: Names) -> None:
    """Changes the model in place. `a` knows it as it is now."""
    for graph, _ in graphs_of(model):
        if isinstance(graph, ir.Graph):
            _Sizes(graph, a, names).write()


class _Sizes:
    """Those of one graph; equal numbers become one Constant at its beginning."""

    def __init__(self, graph: ir.Graph, a: Analysis, names: Names):
        self.graph, self.a, self.names = graph, a, names
        self.build = Builder(a.opset)
        self.made: dict[tuple, ir.Value] = {}

    def write(self) -> None:
        unneeded: list[ir.Node | None] = []
        for node in list(self.graph):
            if op(node) == "Reshape":
                unneeded.append(self._reshape(node))
            value = node.outputs[0] if len(node.outputs) == 1 else None
            number = None if value is None or op(node) == "Constant" else self._number(value)
            if value is not None and number is not None and value.uses() and not value.is_graph_output():
                ir.convenience.replace_all_uses_with(value, self._constant(number))
                unneeded.append(node)
        if self.build.nodes:
            insert_in_front(self.graph[0], self.build.nodes, "known_size", self.names)
        remove_dead(unneeded)

    def _number(self, value: ir.Value) -> np.ndarray | None:
        """The integers that a value has in every run."""
        dtype, sizes, rank = self.a.dtype(value), self.a.contents(value), self.a.rank(value)
        if dtype not in _INTEGERS or sizes is None or rank not in (0, 1):
            return None
        known = [size.const for size in sizes]
        if any(size is None for size in known) or (rank == 0 and len(known) != 1):
            return None
        return np.asarray(known if rank else known[0], dtype.numpy())

    def _constant(self, number: np.ndarray) -> ir.Value:
        key = (number.dtype.str, number.shape, number.tobytes())
        if key not in self.made:
            self.made[key] = self.build.constant(number)
        return self.made[key]

    def _reshape(self, node: ir.Node) -> ir.Node | None:
        """Gives a Reshape a target of numbers: 0 for an open size that stays in its place, or -1 for the only one there
        is. Returns what computed the target."""
        data, target = operand(node, 0), operand(node, 1)
        own, sizes = self.a.shape(data), self.a.contents(target)
        if own is None or sizes is None or target is None or self.a.tensor(target) is not None:
            return None
        if attribute(node, "allowzero", 0) == 0 and any(size in (0, -1) for size in sizes):
            return None  # ONNX's own words
        numbers = as_numbers(own, sizes)
        if numbers is None:
            return None
        node.replace_input_with(1, self._constant(np.asarray(numbers, np.int64)))
        node.attributes.pop("allowzero", None)
        return producer(target)


def as_numbers(own: tuple[Dim, ...], sizes: tuple[Dim, ...]) -> list[int] | None:
    """A target whose meaning is `sizes` in every run, also where the tensor has no elements: 0 copies a size that is 0,
    but -1 beside a 0 has no meaning."""
    known = [size.const for size in sizes]
    open_places = [k for k, size in enumerate(known) if size is None]
    if any(size is not None and size < 1 for size in known):
        return None
    if all(k < len(own) and own[k] == sizes[k] for k in open_places):
        return [0 if size is None else size for size in known]
    return [-1 if size is None else size for size in known] if len(open_places) == 1 else None
