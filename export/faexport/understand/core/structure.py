# SPDX-License-Identifier: Apache-2.0
"""From the two products of a site to operands and output of the fused node: number of heads, layouts, new nodes where
needed.

Several ways of reading the same graph are tried (heads apart or in the batch, GQA, packed QKV); the one with the
fewest new nodes wins. Called by match/softmax_core.py.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from faexport.nodes import name_of
from faexport.spec import Layout, Operand, Refusal
from faexport.surgery import Builder
from faexport.understand.core.outputs import Output, read_output
from faexport.understand.core.score_chain import Scores
from faexport.understand.core.value_chain import Values
from faexport.understand.layout.heads import Link, Reading, Wanted, canonical, chain_of, parts_of, read, same_heads
from faexport.understand.layout.products import Factor
from faexport.understand.layout.views import View, size_of
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.dims import Dim, product

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
    refusal = Refusal("the heads of query, key and value cannot be told apart", anchor)
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


def _sides(scores: Scores, values: Values, a: Analysis) -> tuple[_Side, _Side, _Side] | Refusal:
    shape = a.shape(scores.product.node.outputs[0])
    leads = scores.product.leads
    sizes = tuple(shape[scores.product.labels.index(x)] for x in leads)
    made = []
    query = scores.product.left
    if scores.row_weights:
        query = Factor(_weighted(query.value, scores.row_weights, a), query.labels)
    for factor, names, lead_sizes, rows in (
        (query, leads, sizes, "row"),
        (scores.product.right, leads, sizes, "column"),
        (values.product.right, values.product.leads, tuple(values.lead_sizes), "sum"),
    ):
        columns = "column" if rows == "sum" else "sum"
        missing = {rows, columns} - set(factor.labels)
        if missing or a.shape(factor.value) is None:
            return Refusal("the shape of query, key or value is not known", name_of(scores.product.node))
        links = [x for x in chain_of(factor.value, a) if rows != "sum" or x.scale == 1.0]
        made.append(_Side(factor, links, (*names, rows, columns), lead_sizes))
    return tuple(made)


def _weighted(query: ir.Value, weights: list[ir.Value], a: Analysis) -> ir.Value:
    """The query times the weights; the new nodes are found by `new_producers`."""
    value = query
    for weight in weights:
        build = Builder(a.opset)
        product_value = build.add("Mul", [value, weight], a.dtype(query))
        a.define(product_value, a.shape(query))
        value = product_value
    return value


def new_producers(value: ir.Value) -> tuple[ir.Node, ...]:
    """The nodes not yet in a graph that compute the value, in order."""
    node = value.producer()
    if node is None or node.graph is not None:
        return ()
    return (*(n for v in node.inputs if v is not None for n in new_producers(v)), node)


def _head_options(query: _Side, scores: Scores) -> list[Dim]:
    """Numbers of heads to try, the likely ones first."""
    sizes = query.lead_sizes
    if len(sizes) >= 2:
        return [product(sizes[k:]) for k in range(len(sizes) - 1, 0, -1)]
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


def _with_heads(sides, values: Values, heads: Dim, a: Analysis) -> Structure | Refusal:
    best: Structure | None = None
    problem = Refusal("the heads of query, key and value cannot be told apart", name_of(values.product.node))
    dtypes = _dtypes(sides, a)
    if not dtypes:
        return Refusal("query, key and value are not float32, float16 or bfloat16", name_of(values.product.node))
    for dtype in dtypes:
        for grouped, packed in ((True, True), (True, False), (False, True), (False, False)):
            found = _try(sides, values, heads, (grouped, packed, dtype), a)
            if isinstance(found, Refusal):
                problem = found
            elif best is None or found.num_new_nodes < best.num_new_nodes:
                best = found
        if best is not None:
            return best
    return problem


def _dtypes(sides, a: Analysis) -> list[ir.DataType | None]:
    """Types to compute in: those in which all three operands can be read, the narrowest first (a Cast up is then
    absorbed)."""
    kinds = [{a.dtype(link.value) for link in side.links} for side in sides]
    found = [t for t in TYPES if t in set.intersection(*kinds)]
    if found or any(k == {None} for k in kinds):
        return found or [None]
    return [ir.DataType.FLOAT] if all(k & set(TYPES) for k in kinds) else []


def _try(sides, values: Values, heads: Dim, how, a: Analysis) -> Structure | Refusal:
    grouped, packed, dtype = how
    readings = []
    for side in sides:
        is_query = side is sides[0]
        wanted = side.wanted(heads, grouped and not is_query, packed, dtype)
        reading = read(side.factor, side.links, wanted, a) or _rebuilt(side, wanted, a)
        if reading is None:
            return Refusal("the heads of query, key and value cannot be told apart", name_of(values.product.node))
        readings.append(reading)
    query, key, value = readings
    if not same_heads(key.heads, value.heads):
        return Refusal("key and value have different numbers of heads", name_of(values.product.node))
    in_columns = [r.operand.column_start is not None for r in readings]
    if any(in_columns) and not _all_in_columns(readings):
        return Refusal("only a part of query, key and value is packed", name_of(values.product.node))
    output = read_output(values, heads, dtype, [r.source for r in readings], sides[0].factor, a)
    return output if isinstance(output, Refusal) else Structure(query, key, value, output, heads)


def _all_in_columns(readings: list[Reading]) -> bool:
    """Gives every operand columns, where one has them; False where one can't have any."""
    for reading in readings:
        o = reading.operand
        if o.layout != Layout.BSH or o.head_dim is None or reading.new_nodes:
            return False
        if o.column_start is None:
            reading.operand = dataclasses.replace(o, column_start=0, column_stride=o.head_dim)
    return True


def _rebuilt(side: _Side, wanted: Wanted, a: Analysis) -> Reading | None:
    """The operand as it stands at its product, brought to a layout by new nodes."""
    value, shape = side.factor.value, a.shape(side.factor.value)
    parts = parts_of(canonical(side.factor, View.whole(shape), wanted), wanted)
    if parts is None:
        return None
    own = tuple(x for x in side.labels if x in side.factor.labels)
    perm = [side.factor.labels.index(x) for x in own]
    heads, dtype = size_of(parts.heads), wanted.dtype
    build = Builder(a.opset)
    if dtype is not None and a.dtype(value) != dtype:
        value = build.cast(value, dtype)
    value = build.transpose(value, perm)
    value, layout = _to_layout(build, value, len(own), heads, parts.group)
    if value is None:
        return None
    operand = Operand(value, layout, heads=heads.const, head_dim=size_of(parts.columns).const)
    return Reading(operand, heads, side.factor.value, 1.0, tuple(build.nodes))


def _to_layout(build: Builder, value: ir.Value, rank: int, heads: Dim, group: Dim) -> tuple[ir.Value | None, Layout]:
    if rank == 4:
        return value, Layout.BHSD
    if rank == 3 and heads == 1:
        return value, Layout.BSH
    if rank == 3 and heads.const is not None:
        return build.split_first_axis(value, heads.const), Layout.BHSD
    if rank == 2 and heads == 1:
        return build.unsqueeze(value, 0), Layout.BSH
    if rank > 4 and heads.const is not None:
        return build.to_four_axes(value, rank, heads.const), Layout.BHSD
    return None, Layout.BHSD
