# SPDX-License-Identifier: Apache-2.0
"""From the two products of a site to operands and output of the fused node: number of heads, layouts, new nodes where
needed.

Several ways of reading the same graph are tried (heads apart or in the batch, GQA, packed QKV); the one with the
fewest new nodes wins. Called by match/softmax_core.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from faexport.graph.nodes import given, maker, name_of, op
from faexport.graph.surgery import Builder
from faexport.sizes.dims import Dim, product
from faexport.spec import Layout, Operand, Refusal, RefusalKind
from faexport.understand.core.factors import Weight, folded, times
from faexport.understand.core.outputs import Output, read_output
from faexport.understand.core.score_chain import Scores
from faexport.understand.core.value_chain import Values
from faexport.understand.layout.heads import Link, Reading, Wanted, canonical, chain_of, parts_of, read
from faexport.understand.layout.products import Factor
from faexport.understand.layout.shape_uses import size_from
from faexport.understand.layout.views import View, size_of
from faexport.understand.shapes.analysis import Analysis

ONE = Dim.of(1)
TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT)


@dataclasses.dataclass
class Structure:
    query: Reading
    key: Reading
    value: Reading
    output: Output
    heads: Dim

    @property
    def num_new_nodes(self) -> int:
        readings = (self.query, self.key, self.value)
        return sum(len(r.new_nodes) for r in readings) + len(self.output.nodes)


@dataclasses.dataclass(frozen=True)
class _Side:
    factor: Factor
    links: list[Link]
    labels: tuple[str, ...]
    lead_sizes: tuple[Dim, ...]
    source: ir.Value  # the operand in the graph; `factor` may be this times weights
    numbers: tuple[Weight, ...] = ()  # that the operand is multiplied by wherever it is read
    rows: Dim | None = None  # how many it is to have, where that may be more than it has
    wider: tuple[Factor, ...] = ()  # masks and factors that it may take sizes from

    def wanted(self, heads: Dim, grouped: bool, packed: bool, dtype: ir.DataType | None) -> Wanted:
        return Wanted(self.labels, self.lead_sizes, heads, grouped, packed, dtype)


def structure_of(scores: Scores, values: Values, a: Analysis) -> Structure | Refusal:
    """The cheapest way to write the site as one node."""
    sides = _sides(scores, values, a)
    if isinstance(sides, Refusal):
        return sides
    best: Structure | None = None
    cost = 0
    anchor = name_of(scores.product.node)
    refusal = Refusal("the heads of query, key and value cannot be told apart", anchor, RefusalKind.UNKNOWN_SIZES)
    for heads in _head_options(sides[0], scores):
        found = _with_heads(sides, values, heads, a)
        if isinstance(found, Refusal):
            refusal = found
            continue
        total = found.num_new_nodes + (100 if scores.terms and _hides_heads(sides[0].lead_sizes, heads) else 0)
        if best is None or total < cost:
            best, cost = found, total
    return best or refusal


def _hides_heads(lead_sizes: tuple[Dim, ...], heads: Dim) -> bool:
    """Does the batch take up what may be heads? A mask is smaller, and easier to name, where they are apart."""
    if len(lead_sizes) == 3:
        return heads != lead_sizes[1] * lead_sizes[2]
    return len(lead_sizes) == 1 and heads == 1


def _sides(scores: Scores, values: Values, a: Analysis) -> list[_Side] | Refusal:
    shape = a.simplified(scores.shape)
    leads = scores.product.leads
    sizes = tuple(shape[scores.product.labels.index(x)] for x in leads)
    if len(sizes) == len(values.lead_sizes):
        sizes = tuple(values.lead_sizes)  # where keys and queries have one batch entry, the values may have more
    right, value_sizes = values.product.right, tuple(values.lead_sizes)
    after = (values.product.left.labels, {"row": "column"}, a)
    before = (scores.product.labels, {"column": "sum"}, a), (scores.product.labels, {"row": "sum"}, a)
    sides = [
        _side(scores.product.left, scores.query_weights, before[0], (*leads, "row", "sum"), sizes),
        _side(scores.product.right, scores.key_weights, before[1], (*leads, "column", "sum"), sizes),
        _side(right, values.weights, after, (*values.product.leads, "sum", "column"), value_sizes),
    ]
    known = [side for side in sides if side is not None]
    if len(known) != len(sides):
        return Refusal(
            "the shape of query, key or value is not known", name_of(scores.product.node), RefusalKind.UNKNOWN_SIZES
        )
    if len(leads) == len(value_sizes) and _is_contradicted(known, a):
        why = "queries, keys and values may have different numbers of batch entries or heads, and the file states one"
        advice = "give sizes that are equal one name when exporting"
        return Refusal(f"{why} for the result: {advice}", name_of(values.product.node), RefusalKind.OTHER_NAMES)
    rows, keys = (shape[scores.product.labels.index(x)] for x in ("row", "column"))
    if scores.wider:
        own = [_size_along(side.factor, side.labels[-2], a) for side in known]
        whole = [rows, keys, keys if own[2] == own[1] else own[2]]
        known = [
            side if size == before else dataclasses.replace(side, rows=size)
            for side, size, before in zip(known, whole, own, strict=True)
        ]
    if broadcast := _summed_broadcast(known, scores, values, keys, a):
        return broadcast
    return [dataclasses.replace(side, wider=scores.wider) for side in known]


def _summed_broadcast(sides: Sequence[_Side], scores: Scores, values: Values, keys: Dim, a: Analysis) -> Refusal | None:
    """An Einsum takes one element of an operand for all that it sums over in the other one, where a MatMul fails."""
    query, key, value = (_size_along(side.factor, "sum", a) for side in sides)
    value = value if sides[2].rows is None else sides[2].rows
    for multiplied, pair in ((scores.product, (query, key)), (values.product, (keys, value))):
        if op(multiplied.node) == "Einsum" and len(set(a.simplified(pair))) > 1:
            why = f"an Einsum sums over an axis of size {pair[0]} in one operand and {pair[1]} in the other, and takes"
            text = f"{why} one element for all of them where one of both is 1"
            return Refusal(text, name_of(multiplied.node), RefusalKind.UNLIKE_SIZES)
    return None


def _is_contradicted(sides: Sequence[_Side], a: Analysis) -> bool:
    """Do two sizes of unknown numbers meet, where the result is said to have one of them? Either may be 1."""
    for position, size in enumerate(sides[0].lead_sizes):
        own = [_size_along(side.factor, side.labels[position], a) for side in sides]
        if size in own and functools.reduce(Dim.meet, own) != size:
            return True
    return False


def _size_along(factor: Factor, label: str, a: Analysis) -> Dim:
    return dict(zip(factor.labels, a.known_shape(factor.value), strict=True)).get(label, ONE)


def _side(
    factor: Factor,
    weights: list[Weight],
    how: tuple[Sequence[str], Mapping[str, str], Analysis],
    labels: tuple[str, ...],
    lead_sizes: tuple[Dim, ...],
) -> _Side | None:
    """One operand, times the weights that aren't single numbers; `how` says what `folded` needs to know."""
    a = how[-1]
    if set(labels[-2:]) - set(factor.labels) or a.shape(factor.value) is None:
        return None
    numbers = tuple(w for w in weights if w.is_single(a))
    whole = folded(factor, [w for w in weights if w not in numbers], *how)
    links = [x for x in chain_of(whole.value, a) if labels[-1] == "sum" or x.scale == 1.0]
    source = factor.value
    while new_producers(source):
        source = given(maker(source), 0)
    return _Side(whole, links, labels, lead_sizes, source, numbers)


def new_producers(value: ir.Value) -> tuple[ir.Node, ...]:
    """The nodes not yet in a graph that compute the value, in order."""
    node = value.producer()
    if node is None or node.graph is not None:
        return ()
    return (*(n for v in node.inputs if v is not None for n in new_producers(v)), node)


def in_graph(value: ir.Value) -> list[ir.Value]:
    """The value, or what the new nodes read that compute it: they may never be written."""
    new = new_producers(value)
    made = {output for node in new for output in node.outputs}
    return [v for node in new for v in node.inputs if v is not None and v not in made] or [value]


def _head_options(query: _Side, scores: Scores) -> list[Dim]:
    """Numbers of heads to try, the likely ones first."""
    sizes = query.lead_sizes
    if len(sizes) >= 2:
        inner = [product(sizes[k:]) for k in range(len(sizes) - 1, 0, -1)]
        return inner if any(size.const for size in inner) else [*inner, ONE]  # blocks inside of heads
    if not sizes:
        return [ONE]
    options: list[Dim] = []
    for link in query.links:
        axes = dict(zip(query.factor.labels, link.view.axes, strict=True))
        atoms = axes.get(query.labels[0], ())
        options += [size_of(atoms[i:]) for i in range(1, len(atoms))]
    options += [s for s in scores.splits if sizes[0].divide(s) is not None]
    constant = [s for s in dict.fromkeys(options) if s.const is not None and s != 1]
    return [*constant, ONE]


def _with_heads(sides: list[_Side], values: Values, heads: Dim, a: Analysis) -> Structure | Refusal:
    best: Structure | None = None
    problem = Refusal(
        "the heads of query, key and value cannot be told apart",
        name_of(values.product.node),
        RefusalKind.UNKNOWN_SIZES,
    )
    dtypes = _dtypes(sides, a)
    if not dtypes:
        return Refusal(
            "query, key and value are not float32, float16 or bfloat16", name_of(values.product.node), RefusalKind.TYPE
        )
    for dtype in dtypes:
        outputs: dict[tuple[ir.Value, ...], Output | Refusal] = {}
        for grouped, packed in ((True, True), (True, False), (False, True), (False, False)):
            if packed and any(side.numbers for side in sides):
                continue
            found = _try(sides, values, heads, (grouped, packed, dtype), outputs, a)
            if isinstance(found, Refusal):
                problem = found
            elif best is None or found.num_new_nodes < best.num_new_nodes:
                best = found
        if best is not None:
            return best
    return problem


def _dtypes(sides: list[_Side], a: Analysis) -> list[ir.DataType | None]:
    """Types to compute in: those in which all three operands can be read, the narrowest first (a Cast up is then
    absorbed)."""
    kinds = [{a.dtype(link.value) for link in side.links} for side in sides]
    found: list[ir.DataType | None] = [t for t in TYPES if t in set.intersection(*kinds)]
    if found or any(k == {None} for k in kinds):
        return found or [None]
    return [ir.DataType.FLOAT] if all(k & set(TYPES) for k in kinds) else []


def _try(
    sides: list[_Side],
    values: Values,
    heads: Dim,
    how: tuple[bool, bool, ir.DataType | None],
    outputs: dict[tuple[ir.Value, ...], Output | Refusal],
    a: Analysis,
) -> Structure | Refusal:
    """`how`: grouped, packed and dtype of what is wanted. `outputs`: what was read of the output before, by the sources
    of query, key and value."""
    grouped, packed, dtype = how
    readings = []
    for side in sides:
        is_query = side is sides[0]
        wanted = side.wanted(heads, grouped and not is_query, packed, dtype)
        reading = read(side.factor, side.links, wanted, a) if side.rows is None else None
        reading = reading or _rebuilt(side, wanted, sides, a)
        if reading is None:
            return Refusal(
                "the heads of query, key and value cannot be told apart",
                name_of(values.product.node),
                RefusalKind.UNKNOWN_SIZES,
            )
        readings.append(_weighted(reading, side, a))
    query, key, value = readings
    if key.heads != value.heads:
        return Refusal(
            "key and value have different numbers of heads", name_of(values.product.node), RefusalKind.UNLIKE_SIZES
        )
    in_columns = [r.operand.column_start is not None for r in readings]
    if any(in_columns) and not _all_in_columns(readings):
        return Refusal("only a part of query, key and value is packed", name_of(values.product.node))
    sources = tuple(r.source for r in readings)
    if sources not in outputs:
        outputs[sources] = read_output(values, heads, dtype, sources, _numbered(sides[0]), a)
    output = outputs[sources]
    return output if isinstance(output, Refusal) else Structure(query, key, value, output, heads)


def _numbered(query: _Side) -> Factor:
    """The factor of the query with its leading axes called lead0, lead1 … in the operator's order: an Einsum may have
    them in another one."""
    names = {label: f"lead{i}" for i, label in enumerate(query.labels[:-2])}
    return Factor(query.factor.value, tuple(names.get(x, x) for x in query.factor.labels))


def _all_in_columns(readings: list[Reading]) -> bool:
    """Gives every operand columns, where one has them; False where one can't have any."""
    for reading in readings:
        o = reading.operand
        if o.layout != Layout.BSH or o.head_dim is None or reading.new_nodes:
            return False
        if o.column_start is None:
            reading.operand = dataclasses.replace(o, column_start=0, column_stride=o.head_dim)
    return True


def _weighted(reading: Reading, side: _Side, a: Analysis) -> Reading:
    """The reading with the side's weights: what `folded` made stands in front, single numbers are multiplied here."""
    value, nodes = times(reading.operand.value, side.numbers, a)
    operand = dataclasses.replace(reading.operand, value=value)
    source = side.source if reading.source is side.factor.value else reading.source
    needed = new_producers(value)
    before = tuple(
        node for node in new_producers(side.factor.value) if node in needed and node not in reading.new_nodes
    )
    return dataclasses.replace(reading, operand=operand, source=source, new_nodes=(*before, *reading.new_nodes, *nodes))


def _rebuilt(side: _Side, wanted: Wanted, sides: Sequence[_Side], a: Analysis) -> Reading | None:
    """The operand as it stands at its product, brought to a layout by new nodes."""
    build = Builder(a.opset)
    value, dtype = side.factor.value, wanted.dtype
    if dtype is not None and a.dtype(value) != dtype:
        value = build.cast(value, dtype)
    own = tuple(x for x in side.labels if x in side.factor.labels)
    perm = [side.factor.labels.index(x) for x in own]
    value = build.transpose(value, perm)
    shape = tuple(a.known_shape(side.factor.value)[i] for i in perm)
    parts = parts_of(canonical(Factor(value, own), View.whole(shape), wanted), wanted)
    if parts is None or side.rows is not None:
        expanded = _expanded(build, value, dict(zip(own, shape, strict=True)), side, wanted, sides, a)
        if expanded is None:
            return None
        value, shape = expanded
        own = side.labels
        parts = parts_of(canonical(Factor(value, own), View.whole(shape), wanted), wanted)
        if parts is None:
            return None
    heads = size_of(parts.heads)
    placed, layout = _to_layout(build, value, shape, heads)
    if placed is None:
        return None
    batch = product(shape[:-2]).divide(heads)
    if layout is Layout.BHSD and placed is not value and batch is not None:
        a.define(placed, (batch, heads, *shape[-2:]))
    operand = Operand(placed, layout, heads=heads.const, head_dim=size_of(parts.columns).const)
    return Reading(operand, heads, side.source, 1.0, tuple(build.nodes))


def _expanded(
    build: Builder,
    value: ir.Value,
    known: dict[str, Dim],
    side: _Side,
    wanted: Wanted,
    sides: Sequence[_Side],
    a: Analysis,
) -> tuple[ir.Value, tuple[Dim, ...]] | None:
    """The operand with as many batch entries (and heads, where it may not have fewer) as the scores, and its shape. The
    sizes that it lacks are those of the other operands and of masks: each is equal to its own, or one of both is 1."""
    leads, rows = side.labels[:-2], side.labels[-2]
    missing = dict(zip(leads, side.lead_sizes, strict=True))
    if wanted.grouped:
        missing = {x: size for x, size in missing.items() if x not in _head_labels(leads, wanted)}
    if side.rows is not None:
        missing[rows] = side.rows
    targets: list[list[ir.Value]] = [[]]  # of Expands, one after the other: sizes of all axes but the last
    for position, label in enumerate(leads):
        if label not in known:
            value = build.unsqueeze(value, position)
    for label in (*leads, rows):
        own, size = known.get(label, ONE), missing.get(label, ONE)
        sizes = [] if size in (1, own) else _sizes(build, label, own, size, side, sides, a)
        if sizes is None:
            return None
        targets += [[] for _ in range(len(sizes) - len(targets))]
        for k, target in enumerate(targets):
            target.append(sizes[k] if k < len(sizes) else build.ints([1]))
    for target in targets:
        whole = build.add("Concat", [*target, build.ints([1])], ir.DataType.INT64, axis=0)
        value = build.add("Expand", [value, whole], value.dtype)
    own_sizes = {x: known.get(x, ONE) if missing.get(x, ONE) == 1 else missing[x] for x in (*leads, rows)}
    return value, (*own_sizes.values(), known[side.labels[-1]])


def _head_labels(leads: tuple[str, ...], wanted: Wanted) -> tuple[str, ...]:
    """The leading axes that are heads."""
    return next((leads[k:] for k in range(len(leads)) if product(wanted.lead_sizes[k:]) == wanted.heads), ())


def _sizes(
    build: Builder, label: str, own: Dim, size: Dim, side: _Side, sides: Sequence[_Side], a: Analysis
) -> list[ir.Value] | None:
    """The sizes, int64 [1], that an axis of size `own` is to be expanded to, one after the other, to become `size`."""
    if size.const is not None:
        return [build.ints([size.const])]
    found: dict[Dim, ir.Value] = {}
    givers = list(_with_sizes(sides))
    if label == side.labels[-2] and side is not sides[0]:  # keys, which masks alone may have more of
        label, givers = "column", givers[len(sides) :]
    for factor, sources in givers:
        given = _size_along(factor, label, a)
        if given in (1, own) or given in found:
            continue
        part = size_from(build, given, sources, {}, a)
        if part is not None:
            found[given] = part
    met = functools.reduce(Dim.meet, found, own)
    return list(found.values()) if a.simplified((met,)) == (size,) else None


def _with_sizes(sides: Sequence[_Side]) -> Iterator[tuple[Factor, list[ir.Value]]]:
    """The operands, and the masks that they may take sizes from, each with the tensors to read its sizes of."""
    for side in sides:
        sources = [x.value for x in reversed(side.links) if x.value is not side.factor.value]
        yield side.factor, [*sources, side.source]
    for factor in sides[0].wider:
        yield factor, _tensors_behind(factor.value)


def _tensors_behind(value: ir.Value) -> list[ir.Value]:
    """A mask, and in front of it the inputs of its graph: where one has its size, the mask itself may go."""
    found = in_graph(value)
    inputs = (v for own in found if own.graph is not None for v in own.graph.inputs)
    return list(dict.fromkeys([*inputs, *found]))


def _to_layout(build: Builder, value: ir.Value, shape: Sequence[Dim], heads: Dim) -> tuple[ir.Value | None, Layout]:
    rank = len(shape)
    if rank == 4 and shape[1] == heads:
        return value, Layout.BHSD
    if rank == 3 and heads == 1:
        return value, Layout.BSH
    if rank == 3 and heads.const is not None:
        return build.split_axis(value, 0, 3, heads.const), Layout.BHSD
    if rank == 2 and heads == 1:
        return build.unsqueeze(value, 0), Layout.BSH
    if rank >= 4 and heads.const is not None:
        return build.to_four_axes(value, [d.const for d in shape], heads.const), Layout.BHSD
    return None, Layout.BHSD
