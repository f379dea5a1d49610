# SPDX-License-Identifier: Apache-2.0
"""The output of a site: follows the product with the values through Transposes and Reshapes to the last tensor of a
known layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from faexport.graph.nodes import data_users, name_of, op
from faexport.graph.surgery import Builder
from faexport.sizes.dims import Dim, product
from faexport.spec import Layout, Refusal
from faexport.understand.core.score_path import RESHAPES
from faexport.understand.core.value_chain import Values
from faexport.understand.layout import view_ops
from faexport.understand.layout.products import Factor
from faexport.understand.layout.shape_uses import ShapeUse, rebuild, uses_of
from faexport.understand.layout.views import Atom, View, merged
from faexport.understand.shapes.analysis import Analysis

ONE = Dim.of(1)
MAX_CHAIN = 8
ORDERS = {
    Layout.BHSD: ((0,), (1,), (2,), (3,)),
    Layout.BSHD: ((0,), (2,), (1,), (3,)),
    Layout.BSH: ((0,), (2,), (1, 3)),
}


@dataclasses.dataclass
class Output:
    value: ir.Value  # what the fused node (and `nodes` behind it) replaces
    layout: Layout
    nodes: tuple[ir.Node, ...] = ()
    shape_uses: tuple[ShapeUse, ...] = ()  # Shape nodes that read a tensor between the product and `value`
    entry: ir.Value | None = None  # stands for the fused node's output in the first of `nodes`


def read_output(
    values: Values, heads: Dim, dtype: ir.DataType | None, sources: Sequence[ir.Value], query: Factor, a: Analysis
) -> Output | Refusal:
    """The furthest tensor behind the product that is the whole output in one of the layouts. `sources` are query, key
    and value: Shape nodes on the way are rebuilt from them, or end it. `query` stands in the score product."""
    y = values.result
    shape = a.shape(y)
    refusal = Refusal("the output's shape is not understood", name_of(values.product.node))
    if shape is None:
        return refusal
    total = product(values.lead_sizes)
    batch = total.divide(heads)
    if batch is None:
        return refusal
    labels = values.product.labels
    by_label = values.product.shape or shape
    sizes = (batch, heads, by_label[labels.index("row")], by_label[labels.index("column")])
    view = View.whole(sizes).reshape((*values.lead_sizes, *sizes[2:]))
    if view is None:
        return refusal
    order = [*values.product.leads, "row", "column"]
    view = view.transpose([order.index(x) for x in labels]).reshape(shape)
    if view is None:
        return refusal
    found = _furthest(y, view, sizes, dtype, sources, a) if not values.rows else None
    return found or _rebuilt(values, sizes, dtype, query, a) or refusal


def declared_output(
    value: ir.Value, layout: Layout, sizes: tuple[Dim, ...], dtype: ir.DataType | None, a: Analysis
) -> Output:
    """The output of an op that states its layout, followed through what rearranges it; sizes are those of [B, H, S,
    D_v]."""
    view = View.whole(sizes)
    axes = tuple(tuple(x for i in group for x in view.axes[i]) for group in ORDERS[layout])
    return _furthest(value, dataclasses.replace(view, axes=axes), sizes, dtype, (), a) or Output(value, layout)


def _furthest(
    value: ir.Value,
    view: View,
    sizes: tuple[Dim, ...],
    dtype: ir.DataType | None,
    sources: Sequence[ir.Value],
    a: Analysis,
) -> Output | None:
    found: Output | None = None
    passed: tuple[ShapeUse, ...] = ()
    for _ in range(MAX_CHAIN):
        layout = _layout_of(view, sizes)
        if layout is not None and a.dtype(value) in (dtype, None):
            found = Output(value, layout, shape_uses=passed)
        users = data_users(value)
        uses = uses_of(value, view.shape)
        if any(isinstance(rebuild(use, sources, a), Refusal) for use in uses):
            break
        passed += tuple(uses)
        if value.is_graph_output() or len(users) != 1 or users[0].inputs[0] is not value:
            break
        node = users[0]
        next_view: View | None
        if op(node) == "Cast" and dtype is not None:
            next_view = view
        elif op(node) in (*RESHAPES, "Identity"):
            next_view = view_ops.apply(node.outputs[0], view, a)
        else:
            break
        if next_view is None:
            break
        value, view = node.outputs[0], next_view
    return found


def _layout_of(view: View, sizes: tuple[Dim, ...]) -> Layout | None:
    for layout, order in ORDERS.items():
        if len(order) != len(view.axes) or (layout == Layout.BSH and sizes[1].const is None):
            continue
        wanted = [tuple(Atom(i, ONE, sizes[i]) for i in group if sizes[i] != 1) for group in order]
        if [merged(axis) for axis in view.axes] == wanted:
            return layout
    return None


def _rebuilt(
    values: Values, sizes: tuple[Dim, ...], dtype: ir.DataType | None, query: Factor, a: Analysis
) -> Output | None:
    """The product's own output, made from the fused node's by new nodes."""
    if values.product.shape:
        return None
    value, labels = values.result, values.product.labels
    leads = len(labels) - 2
    entry = ir.Value(name=None, type=value.type)
    build = Builder(a.opset)
    current = entry
    layout = Layout.BHSD
    order = [*values.product.leads, "row", "column"]
    if leads <= 1 and sizes[1] == 1:
        layout = Layout.BSH
        current = build.squeeze(current, 0) if leads == 0 else current
    elif leads == 1:
        current = build.merge_first_axes(current)
    elif list(values.lead_sizes) != list(sizes[:2]):
        split = _split_leads(build, current, values, query, a)
        if split is None:
            return None
        current = split
    current = build.transpose(current, [order.index(x) for x in labels])
    own = a.dtype(value)
    if dtype is not None and own is not None and own != dtype:
        current = build.add("Cast", [current], own, to=int(own))
    for done in values.rows:
        current = build.again(done.node, current, done.index)
    return Output(value, layout, tuple(build.nodes), entry=entry if build.nodes else None)


def _split_leads(build: Builder, fused: ir.Value, values: Values, query: Factor, a: Analysis) -> ir.Value | None:
    """[B, H, S, D_v] to as many leading axes as the product has; their sizes are constants but one, or the query's."""
    product = values.product
    shape = a.known_shape(product.node.outputs[0])
    dims = [shape[product.labels.index(x)].const for x in (*product.leads, "row", "column")]
    if dims.count(None) <= 1:
        return build.reshape(fused, [-1 if d is None else d for d in dims])
    own = a.known_shape(query.value)
    names = [f"lead{i}" for i in range(len(product.leads))]  # of the score product, in the same order
    if set(names) - set(query.labels) or len(query.labels) != len(product.labels):
        return None
    axes = [query.labels.index(x) for x in names]
    if [own[i] for i in axes] != values.lead_sizes:
        return None
    sizes = build.add("Shape", [query.value], ir.DataType.INT64)
    first = build.add("Gather", [sizes, build.ints(axes)], ir.DataType.INT64, axis=0)
    if 11 <= build.opset < 14:
        return build.split_leads(fused, first, len(names))
    # Rows are the fused node's, since a mask may have more than the query. Nothing is left to -1, nor to 0 as a copy:
    # both are wrong for a tensor without elements.
    rest = build.slice(build.add("Shape", [fused], ir.DataType.INT64), 2, 4)
    if build.opset >= 14:
        return build.reshape_to(fused, first, rest)
    target = build.add("Concat", [first, rest], ir.DataType.INT64, axis=0)
    return build.add("Reshape", [fused, target], fused.dtype)
