# SPDX-License-Identifier: Apache-2.0
"""New keys and values that other nodes put into a cache: behind its rows (Concat), or at a position of a cache of fixed
size (TensorScatter, and the ScatterND that PyTorch writes for an assignment to neighbouring rows). Used by in_front.py.

A node with a cache counts positions of its own, so the mask of a site is said anew. What a cache of fixed size holds
behind the new rows stays visible where the mask of the graph lets it be: the node is told that all rows are in use.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import attribute, is_transpose, name_of, op, operand, producer, subgraphs
from faexport.graph.surgery import Builder
from faexport.match import Context
from faexport.sizes.dims import Dim
from faexport.spec import Alignment, Assumption, AttentionSpec, Fact, Layout, Mask, Operand
from faexport.understand.layout.shape_uses import shape_users
from faexport.understand.mask.nodes import Nodes
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.rules import constant_ints, resolve_axis


@dataclasses.dataclass(frozen=True)
class _Joined:
    """whole = past with the new rows, behind it, or from row `start` on."""

    whole: ir.Value
    past: ir.Value
    new: ir.Value
    start: ir.Value | None = None  # int64 or int32: one for all batch entries, or [B]
    of_each: bool = False  # the start is [B]
    may_wrap: bool = False  # a start below 0 counts from the end


def with_past(spec: AttentionSpec, context: Context) -> AttentionSpec:
    """Past and new rows apart, where the node can make of both what the graph makes."""
    a, layout = context.analysis, spec.key.layout
    if layout != spec.value.layout or spec.key.column_start is not None or a.shape(spec.query.value) is None:
        return spec
    for read in (_appended, _scattered, _assigned):
        key, value = (read(side, context) for side in (spec.key, spec.value))
        if key is None or value is None:
            continue
        rows = layout.index("S")
        pasts, news = ({a.known_shape(v)[rows] for v in vs} for vs in ((key.past, value.past), (key.new, value.new)))
        if len(pasts) > 1 or news != {size_of(spec.query, "S", a)} or key.start is not value.start:
            return spec
        grown = _grown(spec, key, value, context)
        if grown is not None and _depends(grown, {key.whole, value.whole}, context):
            grown = _with_sizes_said(grown, (key, value), rows, context)
            grown = None if _depends(grown, {key.whole, value.whole}, context) else grown
        return grown or spec
    return spec


def size_of(side: Operand, letter: str, a: Analysis) -> Dim:
    return a.known_shape(side.value)[side.layout.index(letter)]


def maker_name(value: ir.Value) -> str:
    node = producer(value)
    return "" if node is None else name_of(node)


def _grown(spec: AttentionSpec, key: _Joined, value: _Joined, context: Context) -> AttentionSpec | None:
    shared, layout = context.masks.nodes(context.graph), spec.key.layout
    names = (maker_name(key.whole), maker_name(value.whole))
    words: dict[str, int | float | str] = {} if layout is Layout.BHSD else {"cache_layout": str(layout)}
    facts = [Fact("new rows are appended to the cache", names)]
    inputs: dict[str, ir.Value] = {}
    if key.start is None:
        mask = _behind_past(spec.mask)
    else:
        mask = _in_capacity(spec, key, context.analysis, shared)
        inputs = {"write_indices": _starts(key, layout, shared)}
        words["cache"] = "write"
        facts = [Fact("new rows are written to the cache, in place where past and present are one buffer", names)]
        if key.may_wrap:
            facts.append(Assumption("rows are written at no position below 0, which would count from the end", names))
    if mask is None:
        return None
    values = [*inputs.values(), *([mask.kv_lengths] if mask.kv_lengths is not None else [])]
    values += [mask.query_offset] if mask.query_offset is not None else []
    made = dict.fromkeys(n for v in values for n in shared.nodes.get(v, ()))
    return dataclasses.replace(
        spec,
        key=dataclasses.replace(spec.key, value=key.new),
        value=dataclasses.replace(spec.value, value=value.new),
        mask=mask,
        past_key=key.past,
        past_value=value.past,
        present_key=key.whole,
        present_value=value.whole,
        new_nodes=(*(n for n in made if n not in (*spec.new_nodes, *mask.new_nodes)), *spec.new_nodes),
        further_inputs={**spec.further_inputs, **inputs},
        further_attributes={**spec.further_attributes, **words},
        facts=(*spec.facts, *facts),
    )


def _with_sizes_said(spec: AttentionSpec, both: tuple[_Joined, _Joined], rows: int, context: Context) -> AttentionSpec:
    """The spec with the sizes of past and new rows together computed from both, for nodes that ask what the Concat has:
    a bias may be made of the number of keys."""
    uses: list[tuple[ir.Node, list[ir.Node]]] = []
    for joined in both if both[0].whole is not both[1].whole else both[:1]:
        shapes = [node for node in shape_users(joined.whole) if node.graph is context.graph]
        uses += [(node, _shape_of(joined, node, rows, context.analysis)) for node in shapes]
    return dataclasses.replace(spec, shape_uses=(*spec.shape_uses, *uses))


def _shape_of(joined: _Joined, node: ir.Node, rows: int, a: Analysis) -> list[ir.Node]:
    """What a Shape node of the whole gives, from the past and the new rows."""
    build, shape = Builder(a.opset), a.known_shape(joined.whole)
    bounds = {name: attribute(node, name) for name in ("start", "end") if attribute(node, name) is not None}
    past = build.add("Shape", [joined.past], ir.DataType.INT64, **bounds)
    if joined.start is None:
        grows = [int(axis == rows) for axis in range(len(shape))][slice(bounds.get("start", 0), bounds.get("end"))]
        new = build.add("Shape", [joined.new], ir.DataType.INT64, **bounds)
        build.add("Add", [past, build.add("Mul", [new, build.ints(grows)], ir.DataType.INT64)], ir.DataType.INT64)
    return build.nodes


# ---------------------------------------------------------------------------------------------- how rows are joined


def _fits(operand: Operand, past: ir.Value | None, new: ir.Value | None, context: Context) -> bool:
    """Are these a cache and rows of one type and layout, made in the site's graph?"""
    a, rank, node = context.analysis, len(operand.layout), producer(operand.value)
    if past is None or new is None or past is new or node is None or node.graph is not context.graph:
        return False
    same_type = len({a.dtype(v) for v in (past, new, operand.value)}) == 1
    return same_type and a.rank(past) == rank and a.rank(new) == rank


def _appended(operand: Operand, context: Context) -> _Joined | None:
    node = producer(operand.value)
    if operand.layout is Layout.BSH or node is None or op(node) != "Concat" or len(node.inputs) != 2:
        return None
    past, new = node.inputs
    axis = resolve_axis(attribute(node, "axis", 0), len(operand.layout))
    if not _fits(operand, past, new, context) or axis != operand.layout.index("S") or past is None or new is None:
        return None
    return _Joined(operand.value, past, new)


def _scattered(side: Operand, context: Context) -> _Joined | None:
    """TensorScatter: rows of each entry from a position of its own on."""
    node = producer(side.value)
    if node is None or op(node) != "TensorScatter" or attribute(node, "mode", "linear") != "linear":
        return None
    past, new, start = (operand(node, i) for i in range(3))
    axis = resolve_axis(attribute(node, "axis", -2), len(side.layout))
    if not _fits(side, past, new, context) or axis != side.layout.index("S") or start is None:
        return None
    return _Joined(side.value, past, new, start, of_each=True) if past is not None and new is not None else None


def _assigned(side: Operand, context: Context) -> _Joined | None:
    """cache[:, :, start : start + rows] = new, as PyTorch's exporter writes it: rows in front, ScatterND, and back."""
    a, rows = context.analysis, side.layout.index("S")
    front = [rows, *(i for i in range(len(side.layout)) if i != rows)]
    back = [front.index(i) for i in range(len(front))]
    outer, node = producer(side.value), None
    if outer is not None and is_transpose(outer, back):
        node = producer(outer.inputs[0])
    if node is None or op(node) != "ScatterND" or attribute(node, "reduction", "none") != "none":
        return None
    past, new = (_transposed(operand(node, i), front) for i in (0, 2))
    start = _start_of(operand(node, 1), a)
    if not _fits(side, past, new, context) or start is None or past is None or new is None:
        return None
    return _Joined(side.value, past, new, start, may_wrap=True)


def _transposed(value: ir.Value | None, perm: list[int]) -> ir.Value | None:
    node = producer(value)
    return node.inputs[0] if node is not None and is_transpose(node, perm) else None


def _start_of(indices: ir.Value | None, a: Analysis) -> ir.Value | None:
    """The first of neighbouring rows, where the indices [S, 1] are these: start, start + 1 …"""
    node = producer(indices)
    if node is None or op(node) != "Unsqueeze" or constant_ints(node, a, 1, "axes") not in ([1], [-1]):
        return None
    node = producer(node.inputs[0])
    if node is not None and op(node) == "Add":
        for places, start in (node.inputs, node.inputs[::-1]):
            counted = producer(places)
            if counted is not None and op(counted) == "Range" and _is_count(counted, a) and _is_one(start, a):
                return start
    if node is not None and op(node) == "Range" and a.scalar(node.inputs[2]) == 1:
        return node.inputs[0]
    return None


def _is_count(node: ir.Node, a: Analysis) -> bool:
    return a.scalar(node.inputs[0]) == 0 and a.scalar(node.inputs[2]) == 1


def _is_one(value: ir.Value | None, a: Analysis) -> bool:
    shape = a.shape(value)
    return shape is not None and all(size == 1 for size in shape)


# ---------------------------------------------------------------------------------------------- the mask, said anew


def _behind_past(mask: Mask) -> Mask | None:
    """For a node with a past, which counts rows from the end of the past unless told otherwise."""
    if mask.empty_rows is not None:
        return None
    if not _has_position(mask) or mask.query_offset is not None or mask.alignment is Alignment.BOTTOM_RIGHT:
        return mask
    if mask.alignment is Alignment.ONNX and mask.kv_lengths is not None:
        return dataclasses.replace(mask, alignment=Alignment.BOTTOM_RIGHT)
    return None


def _has_position(mask: Mask) -> bool:
    return mask.window_left >= 0 or mask.window_right >= 0 or mask.alibi_slopes is not None


def _in_capacity(spec: AttentionSpec, key: _Joined, a: Analysis, shared: Nodes) -> Mask | None:
    """For a node that writes to a cache of fixed size, of which it attends nonpad_kv_seqlen rows."""
    mask = spec.mask
    if mask.empty_rows is not None:
        return None
    if mask.kv_lengths is not None:
        # Rows at or beyond the lengths are not stored, so these must reach over the new ones.
        if not _reaches(mask.kv_lengths, key, size_of(spec.query, "S", a), a):
            return None
        lengths = mask.kv_lengths
    else:
        capacity = _size(key.past, spec.key.layout.index("S"), shared)
        lengths = shared.add("Expand", [capacity, _size(key.new, 0, shared)], ir.DataType.INT64)
    if not _has_position(mask) or mask.query_offset is not None:
        return dataclasses.replace(mask, kv_lengths=lengths)
    counts_back = mask.alignment is Alignment.ONNX and mask.kv_lengths is not None
    if counts_back or mask.alignment is Alignment.BOTTOM_RIGHT:
        return dataclasses.replace(mask, kv_lengths=lengths, alignment=Alignment.BOTTOM_RIGHT)
    return dataclasses.replace(mask, kv_lengths=lengths, query_offset=shared.constant(np.array([0])))


def _reaches(lengths: ir.Value, key: _Joined, rows: Dim, a: Analysis) -> bool:
    """Are the lengths the starts and as many more as there are new rows?"""
    node = producer(lengths)
    if node is None or op(node) != "Add" or not key.of_each:
        return False
    sides = (node.inputs, node.inputs[::-1])
    return any(start is key.start and a.contents(count) == (rows,) for start, count in sides)


def _size(value: ir.Value, axis: int, shared: Nodes) -> ir.Value:
    """int64 [1]."""
    return shared.add("Shape", [value], ir.DataType.INT64, start=axis, end=axis + 1)


def _starts(key: _Joined, layout: Layout, shared: Nodes) -> ir.Value:
    """[B]."""
    assert key.start is not None
    if key.of_each:
        return key.start
    start = shared.add("Reshape", [key.start, shared.constant([1])], ir.DataType.INT64)
    return shared.add("Expand", [start, _size(key.new, 0, shared)], ir.DataType.INT64)


def _depends(spec: AttentionSpec, wholes: set[ir.Value], context: Context) -> bool:
    """Is what the new node reads made of what it makes?"""
    tainted, computed = set(wholes), {shape for shape, _ in spec.shape_uses}
    for node in context.graph:
        if node is spec.replaces:
            break
        if node in computed:
            continue
        captured = (v for body in subgraphs(node) for inner in body.all_nodes() for v in inner.inputs)
        if any(v in tainted for v in (*node.inputs, *captured)):
            tainted.update(node.outputs)
    operands = [spec.query.value, spec.key.value, spec.value.value, spec.past_key, spec.past_value, spec.sinks]
    pending = [*operands, *spec.mask.values, *spec.further_inputs.values()]
    new = [*spec.new_nodes, *spec.mask.new_nodes, *(n for _, instead in spec.shape_uses for n in instead)]
    pending += [v for node in new for v in node.inputs]
    return any(v in tainted for v in pending)
