# SPDX-License-Identifier: Apache-2.0
"""Writes a chain of nodes that only moves a tensor's rows as one Gather, for onnxruntime's CUDA provider
(Options.joins_cuda). Called by pipeline.py.

Models that attend within shifted windows (Swin) roll an image, two Slices and a Concat an axis, cut it into windows by
a Transpose, and go back; between two such stages they take every second row and column. onnxruntime runs each of these
nodes as a kernel, and some with several copies from the host. Which row goes where is the same in every run and for
each batch entry, so it is found by running the chain on the numbers of the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from faexport.graph.edits import Names, insert_in_front, remove_dead, take_over
from faexport.graph.nodes import FLOATS, VIEWS, attribute, given, graphs_of, live_users, op
from faexport.graph.surgery import Builder
from faexport.sizes.dims import Dim
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.rules import resolve_axis, slice_of, split_sizes

MOST_ROWS = 1 << 16  # of a batch entry
# How long onnxruntime's kernels take for a tensor of some megabytes, as multiples of a Transpose; a Gather takes 3.
COSTS = {"Transpose": 1, "Concat": 1, "Slice": 2, "Split": 2}
LEAST_COST = 4  # of a chain, so that one Gather is worth it
Indices = np.ndarray  # the numbers of rows, in the place where each stands
Shape = tuple[Dim, ...]


def write(model: ir.Model, a: Analysis, names: Names) -> None:
    """Changes the model in place."""
    a.extend(model)
    for graph, _ in graphs_of(model):
        if not isinstance(graph, ir.Graph):
            continue
        made: dict[bytes, ir.Value] = {}
        build = Builder(a.opset)
        for node in reversed(list(graph)):
            found = _chain_to(node, a) if node.graph is not None and op(node) in _MOVES else None
            if found is not None:
                key = found.rows.tobytes()
                if key not in made:
                    made[key] = build.constant(found.rows.reshape(-1))
                _replace(found, made[key], a, names)
        if build.nodes:
            insert_in_front(graph[0], build.nodes, "rows", names)


@dataclasses.dataclass(frozen=True)
class _Chain:
    """`result` has the rows of `source` [n * x, ..., columns], in another order, each n times as often as `unit`."""

    source: ir.Value
    result: ir.Value
    rows: Indices  # as the axes of the result lie, but for the unit
    num_rows: int  # of the source, for each of the unit
    columns: int


def _chain_to(node: ir.Node, a: Analysis) -> _Chain | None:
    """The longest chain that ends here, where something else reads its end and a Gather takes less time."""
    if len(node.outputs) != 1 or a.dtype(node.outputs[0]) not in FLOATS:
        return None
    result = node.outputs[0]
    if not result.is_graph_output() and all(_is_move(user, a) for user in live_users(result)):
        return None
    nodes, sources = _walked(node, a)
    cost = sum(COSTS.get(op(n), 0) for n in nodes)
    if len(sources) != 1 or cost < LEAST_COST or not _is_closed(nodes, node):
        return None
    source = sources.pop()
    return _evaluated(source, result, nodes, a)


def _walked(last: ir.Node, a: Analysis) -> tuple[list[ir.Node], set[ir.Value]]:
    """The moves that a node's result is made by, and what these read that is no move's."""
    nodes, sources, pending = {last: None}, set(), [last]
    while pending:
        for value in _moved(pending.pop()):
            before = value.producer()
            if before is None or before.graph is not last.graph or not _is_move(before, a):
                sources.add(value)
            elif before not in nodes:
                nodes[before] = None
                pending.append(before)
    return list(nodes), sources


def _moved(node: ir.Node) -> list[ir.Value]:
    return [value for value in (node.inputs if op(node) == "Concat" else node.inputs[:1]) if value is not None]


def _is_closed(nodes: list[ir.Node], last: ir.Node) -> bool:
    """Does nothing else read what a kernel in front of the last node gives, or a view of it?"""
    moved: set[ir.Node] = set()
    for node in reversed(_in_order(nodes)):
        if op(node) not in VIEWS or any(value.producer() in moved for value in _moved(node)):
            moved.add(node)
    values = [value for node in moved if node is not last for value in node.outputs]
    return all(not v.is_graph_output() and set(live_users(v)) <= {*nodes} for v in values)


def _is_move(node: ir.Node, a: Analysis) -> bool:
    """Does the node move whole rows, within a batch entry? All sizes but the first are known then."""
    kind = op(node)
    if kind not in _MOVES or any(v is None for v in node.inputs[:1]):
        return False
    shapes = [a.shape(value) for value in (*_moved(node), *node.outputs)]
    if any(not shape or len(shape) < 2 or not all(size.const for size in shape[1:]) for shape in shapes):
        return False
    first, last = shapes[0], shapes[-1]
    assert first and last
    if kind == "Transpose":
        perm = list(attribute(node, "perm") or ())
        return bool(perm) and perm[0] == 0 and perm[-1] == len(perm) - 1
    if kind == "Slice":
        pieces = slice_of(node, a, first)
        inner = range(1, len(first) - 1)
        return pieces is not None and all(
            axis in inner and start.const is not None and step > 0 for axis, start, _, step in pieces
        )
    if kind in ("Concat", "Split"):
        axis = resolve_axis(attribute(node, "axis", 0), len(first))
        return axis > 0 if kind == "Concat" else 0 < axis < len(first) - 1
    return first[-1] == last[-1]


def _evaluated(source: ir.Value, result: ir.Value, nodes: list[ir.Node], a: Analysis) -> _Chain | None:
    shapes = [a.known_shape(source), *(a.known_shape(value) for node in nodes for value in node.outputs)]
    unit = _unit([shape[0] for shape in shapes])
    columns = shapes[0][-1].const
    if unit is None or columns is None or len(shapes[0]) < 2:
        return None
    sizes = _sizes(source, unit, columns, a)
    if sizes is None or np.prod(sizes) > MOST_ROWS:
        return None
    places: dict[ir.Value, Indices] = {source: np.arange(np.prod(sizes)).reshape(sizes)}
    for node in reversed(_in_order(nodes)):
        if not _run(node, places, unit, columns, a):
            return None
    return _Chain(source, result, places[result], int(np.prod(sizes)), columns)


def _in_order(nodes: list[ir.Node]) -> list[ir.Node]:
    """Last first."""
    assert nodes[0].graph is not None
    wanted = set(nodes)
    return [node for node in reversed(nodes[0].graph) if node in wanted]


def _unit(sizes: list[Dim]) -> Dim | None:
    """What all of these are constant multiples of."""
    known = [size.const for size in sizes]
    numbers = [size for size in known if size is not None]
    if len(numbers) == len(sizes):
        return Dim.of(int(np.gcd.reduce(numbers))) if all(numbers) else None
    for size in sizes:
        ratios = [other.divide(size) for other in sizes]
        if all(ratio is not None and ratio.const for ratio in ratios):
            return size
    return None


def _sizes(value: ir.Value, unit: Dim, columns: int, a: Analysis) -> list[int] | None:
    """A tensor's axes in multiples of the unit and of the columns."""
    first, *middle, last = a.known_shape(value)
    count = first.divide(unit)
    known = [size.const for size in middle]
    if count is None or not count.const or not last.const or last.const % columns or not all(known):
        return None
    return [count.const, *(size for size in known if size), last.const // columns]


def _run(node: ir.Node, places: dict[ir.Value, Indices], unit: Dim, columns: int, a: Analysis) -> bool:
    """Adds what a node gives to the places; False where its sizes are no such multiples."""
    sizes = [_sizes(value, unit, columns, a) for value in (*_moved(node), *node.outputs)]
    if any(one is None for one in sizes):
        return False
    read = [places[value] for value in _moved(node)]
    made = _MOVES[op(node)](node, read, a)
    for value, rows in zip(node.outputs, made, strict=True):
        wanted = _sizes(value, unit, columns, a)
        if wanted is None or rows.size != np.prod(wanted) or rows.size > MOST_ROWS:
            return False
        if op(node) not in VIEWS and list(rows.shape) != wanted:
            return False
        places[value] = rows.reshape(wanted)
    return True


def _sliced(node: ir.Node, read: list[Indices], a: Analysis) -> list[Indices]:
    cut = [slice(None)] * read[0].ndim
    for axis, start, size, step in slice_of(node, a, a.known_shape(given(node, 0))) or ():
        assert start.const is not None and size.const is not None
        cut[axis] = slice(start.const, start.const + size.const * step, step)
    return [read[0][tuple(cut)]]


def _split(node: ir.Node, read: list[Indices], a: Analysis) -> list[Indices]:
    shape = a.known_shape(given(node, 0))
    axis = resolve_axis(attribute(node, "axis", 0), len(shape))
    sizes = split_sizes(node, a, shape[axis]) or []
    return np.split(read[0], np.cumsum([size.const or 0 for size in sizes])[:-1], axis)


def _joined(node: ir.Node, read: list[Indices], a: Analysis) -> list[Indices]:
    return [np.concatenate(read, resolve_axis(attribute(node, "axis"), read[0].ndim))]


def _turned(node: ir.Node, read: list[Indices], a: Analysis) -> list[Indices]:
    return [read[0].transpose(attribute(node, "perm"))]


def _same(node: ir.Node, read: list[Indices], a: Analysis) -> list[Indices]:
    return read


# What each kind of node does to the places of rows.
_MOVES: dict[str, Callable[[ir.Node, list[Indices], Analysis], list[Indices]]] = {
    **dict.fromkeys(VIEWS, _same), "Slice": _sliced, "Split": _split, "Concat": _joined, "Transpose": _turned,
}  # fmt: skip


def _replace(found: _Chain, rows: ir.Value, a: Analysis, names: Names) -> None:
    build, dtype, last = Builder(a.opset), a.dtype(found.source), found.result.producer()
    assert last is not None
    value = found.source
    if [size.const for size in a.known_shape(value)[1:]] != [found.num_rows, found.columns]:
        value = build.add("Reshape", [value, build.ints([-1, found.num_rows, found.columns])], dtype)
    value = build.add("Gather", [value, rows], dtype, axis=1)
    middle = [size.const for size in a.known_shape(found.result)[1:]]
    value = build.add("Reshape", [value, build.ints([-1, *(size for size in middle if size)])], dtype)
    insert_in_front(last, build.nodes, last.name or "rows", names)
    take_over(found.result, value)
    remove_dead([last])
