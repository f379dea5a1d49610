# SPDX-License-Identifier: Apache-2.0
"""What stands in front of a site and feeds it alone becomes the operator's: what puts new keys and values into a cache
(caches.py), and, with a cache or without, the rotary embedding of queries and new keys and the norms of their heads.

Called by find_sites with what a matcher understood. A spec that this adds nothing to comes back as it is. TensorRT's
plugin takes rows as they are, so nothing is taken in for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from faexport.graph.nodes import attribute, is_read_once, is_transpose, live_users, op, producer
from faexport.graph.surgery import Missing
from faexport.match import Context, refiner
from faexport.match.caches import maker_name, size_of, with_past
from faexport.sizes.dims import Dim
from faexport.spec import AttentionSpec, Fact, Layout, Operand
from faexport.understand.core.head_norm import HeadNorm, head_norm_of
from faexport.understand.core.rotary import Angles, Rotary, rotary_of
from faexport.understand.layout.declared import Declared, read_all
from faexport.understand.mask.nodes import Nodes
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.known import Shape
from faexport.understand.shapes.rules import constant_ints, resolve_axis

_REPEATABLE = ("Cos", "Sin", "Cast", "Mul", "Concat", "Gather", "Slice", "Squeeze", "Unsqueeze", "Transpose")
_NORMS = {"q_norm_weight", "k_norm_weight"}
_FAR = 24  # nodes between a norm or a rotation's operand and what they lead to


@refiner
def taken_in(spec: AttentionSpec, context: Context) -> AttentionSpec:
    """The spec with what stands in front of it, as far as the operator has it."""
    options, a = context.options, context.analysis
    dtype = a.dtype(spec.query.value)
    keeps_type = options.dtype is None or dtype != ir.DataType.FLOAT  # else Casts stand around a core without caches
    if options.target == "tensorrt" or options.float8 or not keeps_type or dtype is None:
        return spec
    if "cos_cache" in spec.further_inputs:
        return spec
    spec = with_past(spec, context) if spec.past_key is None and spec.present_key is None else spec
    if (spec.past_key is None) != (spec.past_value is None) or spec.query.column_start is not None:
        return spec
    ends = {spec.query.value, spec.key.value}
    changed = _with_norms(_with_rotation(spec, context), ends, a)
    return spec if changed is spec and spec.past_key is None else _in_place(changed, a)


# ---------------------------------------------------------------------------------------------- rotary embedding


def _with_rotation(spec: AttentionSpec, context: Context) -> AttentionSpec:
    """Queries and new keys as they are before both are turned by the same angles."""
    a, shared = context.analysis, context.masks.nodes(context.graph)
    if _NORMS & spec.further_inputs.keys():  # the node's own norm stands behind the rotation, the operator's in front
        return spec
    found = [_turned(side, a, shared) for side in (spec.query, spec.key)]
    query, key = found
    if query is None or key is None or query.rotary.turns != key.rotary.turns:
        return spec
    if query.tables.keys() != key.tables.keys() or not all(_same(v, key.tables[n]) for n, v in query.tables.items()):
        return spec
    if size_of(query.side, "S", a) != size_of(key.side, "S", a):
        return spec
    nodes = dict.fromkeys(n for value in query.tables.values() for n in shared.nodes.get(value, ()))
    return dataclasses.replace(
        spec,
        query=query.before,
        key=key.before,
        further_inputs={**spec.further_inputs, **query.tables},
        further_attributes={**spec.further_attributes, **query.rotary.turns},
        new_nodes=(*nodes, *spec.new_nodes),
        same_shapes=(*spec.same_shapes, *((x.side.value, x.rotary.source) for x in (query, key))),
        facts=(*spec.facts, Fact("rotary embedding", tuple(maker_name(x.side.value) for x in (query, key)))),
    )


def _same(one: ir.Value | None, other: ir.Value | None, depth: int = 8) -> bool:
    """Are two values computed in the same way from the same? Exporters write cosines once for queries and for keys."""
    if one is other:
        return True
    first, second = producer(one), producer(other)
    if first is None or second is None or one is None or other is None or depth == 0:
        return False
    if op(first) != op(second) or op(first) not in _REPEATABLE or len(first.inputs) != len(second.inputs):
        return False
    words = [{name: str(x.value) for name, x in node.attributes.items()} for node in (first, second)]
    if words[0] != words[1] or list(first.outputs).index(one) != list(second.outputs).index(other):
        return False
    return all(_same(x, y, depth - 1) for x, y in zip(first.inputs, second.inputs, strict=True))


@dataclasses.dataclass(frozen=True)
class _Turned:
    """An operand that is a rotation of another."""

    side: Operand
    rotary: Rotary
    tables: dict[str, ir.Value]  # the operator's inputs

    @property
    def before(self) -> Operand:
        return dataclasses.replace(self.side, value=self.rotary.source)


def _turned(operand: Operand, a: Analysis, shared: Nodes) -> _Turned | None:
    """The operand, or what is transposed for it, as a rotation that nothing else needs."""
    for side in (operand, _before_transpose(operand)):
        rotary = rotary_of(side.value, side.layout, a) if side is not None and is_read_once(side.value) else None
        if side is None or rotary is None or not _fits(rotary, side, a) or not _leads_to(rotary.source, {side.value}):
            continue
        tables = _tables(rotary, side.layout, a, shared)
        return None if tables is None else _Turned(side, rotary, tables)
    return None


def _before_transpose(operand: Operand) -> Operand | None:
    """The operand in front of the Transpose that exchanges heads and rows for it alone."""
    node, layouts = producer(operand.value), {Layout.BHSD: Layout.BSHD, Layout.BSHD: Layout.BHSD}
    if node is None or operand.layout not in layouts or not is_transpose(node, [0, 2, 1, 3]):
        return None
    if node.inputs[0] is None or operand.value.is_graph_output():
        return None
    is_alone = len(live_users(operand.value)) == 1
    return dataclasses.replace(operand, value=node.inputs[0], layout=layouts[operand.layout]) if is_alone else None


def _leads_to(value: ir.Value, ends: set[ir.Value], far: int = _FAR) -> bool:
    """Does everything that reads the value lead to these ends?"""
    if value in ends:
        return True
    if value.is_graph_output() or far == 0:
        return False
    return all(_leads_to(v, ends, far - 1) for node in live_users(value) for v in node.outputs if v.uses())


def _fits(rotary: Rotary, side: Operand, a: Analysis) -> bool:
    """Are the heads that the rotation sees those of the operand?"""
    heads, width = _heads_of(side, a)
    if width is None or heads is None or 2 * rotary.num_pairs > width:
        return False
    if not rotary.by_operator:
        return True
    node = producer(side.value)
    assert node is not None
    partial = attribute(node, "rotary_embedding_dim", 0)
    own = a.known_shape(rotary.source)
    if len(own) == 3 and attribute(node, "num_heads", 0) not in ((heads,) if partial else (0, heads)):
        return False
    is_row = len(own) == (3 if side.layout is Layout.BSH else 4) and side.layout is not Layout.BSHD
    batch, rows = _size(side, "B", own), _size(side, "S", own)
    given = a.known_shape(rotary.positions if rotary.positions is not None else rotary.cos.table)
    batches = (batch,) if rotary.positions is not None else (1, batch)
    return is_row and (partial or 2 * rotary.num_pairs == width) and given[0] in batches and given[1] == rows


def _size(side: Operand, letter: str, shape: Sequence[Dim]) -> Dim:
    return shape[side.layout.index(letter)]


def _heads_of(side: Operand, a: Analysis) -> tuple[int | None, int | None]:
    """(number of heads, columns of a head)."""
    shape = a.shape(side.value)
    if shape is None:
        return None, None
    if side.layout is Layout.BSH:
        width = shape[2].const
        return side.heads, width // side.heads if side.heads and width is not None and width % side.heads == 0 else None
    return _size(side, "H", shape).const, shape[3].const


def _tables(rotary: Rotary, layout: Layout, a: Analysis, shared: Nodes) -> dict[str, ir.Value] | None:
    """The operator's inputs."""
    try:
        cos, sin = (_table(angles, rotary, layout, a, shared) for angles in (rotary.cos, rotary.sin))
    except Missing:
        return None
    if cos is None or sin is None:
        return None
    positions = {} if rotary.positions is None else {"position_ids": rotary.positions}
    return {"cos_cache": cos, "sin_cache": sin, **positions}


def _table(angles: Angles, rotary: Rotary, layout: Layout, a: Analysis, shared: Nodes) -> ir.Value | None:
    """[B or 1, S, columns], the columns in question first: the operator looks at no others."""
    value, shape, heads = angles.table, a.known_shape(angles.table), layout.index("H")
    if rotary.by_operator:
        return value
    if len(shape) == 4:
        value = _without_axis(value, heads, a, shared)
    elif layout is not Layout.BHSD or len(shape) not in (2, 3):
        return None
    elif len(shape) == 2:
        value = _made("Unsqueeze", [value, shared.constant([0])], (Dim.of(1), *shape), a, shared)
    if angles.start == 0 and angles.step == 1:
        return value
    end = angles.start + (rotary.num_pairs - 1) * angles.step + 1
    bounds = [shared.constant([x]) for x in (angles.start, end, 2, angles.step)]
    return _made("Slice", [value, *bounds], (*a.known_shape(value)[:2], Dim.of(rotary.num_pairs)), a, shared)


def _without_axis(value: ir.Value, axis: int, a: Analysis, shared: Nodes) -> ir.Value:
    """The table [B or 1, S, columns] that was given an axis for the heads."""
    node = producer(value)
    if node is not None and op(node) == "Unsqueeze" and node.inputs[0] is not None:
        axes = constant_ints(node, a, 1, "axes")
        if axes is not None and [resolve_axis(x, 4) for x in axes] == [axis]:
            return node.inputs[0]
    shape = a.known_shape(value)
    return _made("Squeeze", [value, shared.constant([axis])], (*shape[:axis], *shape[axis + 1 :]), a, shared)


def _made(op_type: str, inputs: Sequence[ir.Value], shape: Shape, a: Analysis, shared: Nodes) -> ir.Value:
    value = shared.add(op_type, inputs, a.dtype(inputs[0]))
    a.define(value, shape)
    return value


# ---------------------------------------------------------------------------------------------- norms


def _with_norms(spec: AttentionSpec, ends: set[ir.Value], a: Analysis) -> AttentionSpec:
    """Queries and new keys as they are before each of their heads is normalized, where that leads to `ends` only."""
    inputs, words = dict(spec.further_inputs), dict(spec.further_attributes)
    shapes, names, sides = list(spec.same_shapes), [], []
    for operand, letter in ((spec.query, "q"), (spec.key, "k")):
        found = None if f"{letter}_norm_weight" in inputs else _norm(operand, ends, a)
        if found is None:
            sides.append(operand)
            continue
        norm, side = found
        inputs[f"{letter}_norm_weight"], words[f"{letter}_norm_epsilon"] = norm.weight, norm.epsilon
        names.append(maker_name(side.value))
        shapes.append((side.value, norm.source))
        sides.append(dataclasses.replace(side, value=norm.source))
    if not names:
        return spec
    facts = (*spec.facts, Fact("RMS norm of the heads of query and key", tuple(names)))
    return dataclasses.replace(
        spec,
        query=sides[0],
        key=sides[1],
        further_inputs=inputs,
        further_attributes=words,
        same_shapes=tuple(shapes),
        facts=facts,
    )


def _norm(operand: Operand, ends: set[ir.Value], a: Analysis) -> tuple[HeadNorm, Operand] | None:
    """The norm in front of an operand, and that or what is transposed for it, as it is behind the norm."""
    for side in (operand, _before_transpose(operand)):
        if side is None or side.layout is Layout.BSH or not _leads_to(side.value, ends):
            continue
        norm = head_norm_of(side.value, a)
        if norm is not None and a.rank(norm.source) == 4:
            return norm, side
    return None


# ---------------------------------------------------------------------------------------------- layouts


def _in_place(spec: AttentionSpec, a: Analysis) -> AttentionSpec:
    """Query, new keys and new values from the earliest tensors that the operator can read them in."""
    sides = [spec.query, spec.key, spec.value]
    widths = [_heads_of(side, a) for side in sides]
    if any(None in width for width in widths):
        return spec
    declared = [
        Declared(side.value, side.layout, Dim.of(heads))
        for side, (heads, _) in zip(sides, widths, strict=True)
        if heads is not None
    ]
    read = [reading.operand for reading in read_all(declared, a)]
    found = [dataclasses.replace(o, heads=n, head_dim=d) for o, (n, d) in zip(read, widths, strict=True)]
    return dataclasses.replace(spec, query=found[0], key=found[1], value=found[2])
