# SPDX-License-Identifier: Apache-2.0
"""Scores of which a part gets a bias, cut out and written back: `x[:, :, 1:, 1:] += b`, the relative positions of
MViTv2 beside its class token. That is all of the scores with a bias that is 0 elsewhere. Called by score_path.py."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from faexport.graph.nodes import data_users, given, op, producer
from faexport.graph.surgery import Builder
from faexport.sizes.dims import Dim
from faexport.understand.core.split_bias import SplitBias
from faexport.understand.core.writes import Writes
from faexport.understand.layout import view_ops
from faexport.understand.layout.views import View, merged
from faexport.understand.shapes.analysis import Analysis

_MAX_NODES = 32
_MOVES = ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Identity", "Expand")


@dataclasses.dataclass(frozen=True)
class _Part:
    """A value as a part of the scores, and what was added to it."""

    view: View
    added: SplitBias | None = None


def added_in_part(node: ir.Node, writes: Writes, a: Analysis) -> tuple[ir.Node, tuple[ir.Node, ...]] | None:
    """An Add of a ScatterND's data and the bias that it amounts to, which is not in the graph yet, and the nodes whose
    place it takes; None where the ScatterND does anything else."""
    data = given(node, 0)
    root, shape = data, a.shape(data)
    while (before := producer(root)) is not None and op(before) in _MOVES and op(before) != "Slice":
        root = given(before, 0)
    whole = a.shape(root)
    if shape is None or whole is None:
        return None
    reader = _Reader(root, View.whole(whole), writes, a)
    part, all_of_it = reader.read(node.outputs[0]), reader.read(data)
    if part is None or all_of_it is None or part.added is None or not _is_same(part.view, all_of_it.view):
        return None
    build = Builder(a.opset)
    made = build.add("Add", [data, part.added.sum], a.dtype(data))
    made.name = f"{node.outputs[0].name}_faexport_part"
    a.define(made, shape)
    moved = [node for value in (root, *(n.outputs[0] for n in reader.nodes)) for node in _moved_for_shapes(value)]
    return build.nodes[-1], tuple(dict.fromkeys([*reader.nodes, *moved]))


def _moved_for_shapes(value: ir.Value) -> list[ir.Node]:
    """Nodes that move a value, and of which nothing is asked but the shape."""
    found: list[ir.Node] = []
    for user in data_users(value):
        if op(user) in _MOVES and value is given(user, 0):
            behind = _moved_for_shapes(user.outputs[0])
            if {*data_users(user.outputs[0])} <= {*behind}:
                found += [user, *behind]
    return found


def _is_same(one: View, other: View) -> bool:
    return one.offsets == other.offsets and [*map(merged, one.axes)] == [*map(merged, other.axes)]


class _Reader:
    def __init__(self, root: ir.Value, whole: View, writes: Writes, a: Analysis):
        self.root, self.whole, self.writes, self.a = root, whole, writes, a
        self.nodes: list[ir.Node] = []
        self.dead: set[ir.Value] = set()  # no part of the scores
        self.depth = 0

    def read(self, value: ir.Value) -> _Part | None:
        """None where the value is no part of the scores, or more happens to it."""
        if value is self.root:
            return _Part(self.whole)
        if value in self.dead or self.depth > _MAX_NODES:
            return None
        self.depth += 1
        found = self._read(value)
        self.depth -= 1
        if found is None:
            self.dead.add(value)
        return found

    def _read(self, value: ir.Value) -> _Part | None:
        node, shape = producer(value), self.a.shape(value)
        if node is None or shape is None:
            return None
        made = self._add(node) if op(node) == "Add" else self._written(node) if op(node) == "ScatterND" else None
        made = self._moved(node) if op(node) in _MOVES else made
        if made is None or made.view.shape != tuple(shape):
            return None
        self.nodes.append(node)
        return made

    def _moved(self, node: ir.Node) -> _Part | None:
        part = self.read(given(node, 0))
        view = None if part is None else view_ops.apply(node.outputs[0], part.view, self.a)
        if part is None or view is None or (op(node) == "Expand" and view != part.view):
            return None
        if part.added is not None and op(node) not in ("Expand", "Identity"):
            if op(node) == "Slice" or not part.added.follow(node, part.view.shape, view.shape):
                return None
        return _Part(view, part.added)

    def _add(self, node: ir.Node) -> _Part | None:
        for index in (0, 1):
            before = len(self.nodes)
            part = self.read(given(node, index))
            if part is not None:
                added = part.added or SplitBias(self.a)
                known = added.add(node, given(node, 1 - index), 1.0, part.view.shape)
                return _Part(part.view, added) if known else None
            del self.nodes[before:]
        return None

    def _written(self, node: ir.Node) -> _Part | None:
        """A part, with what was added to another part of it that is written there."""
        starts, sizes = self.writes.starts_of_part(node), self.a.shape(given(node, 2))
        whole, part = self.read(given(node, 0)), self.read(given(node, 2))
        if starts is None or sizes is None or whole is None or part is None or whole.added or not part.added:
            return None
        cut: View | None = whole.view
        for axis, start in enumerate(starts):
            cut = None if cut is None else cut.slice(axis, Dim.of(start), sizes[axis])
        if cut is None or not _is_same(cut, part.view):
            return None
        if not part.added.pad(node, part.view.shape, starts, whole.view.shape):
            return None
        return _Part(whole.view, part.added)
