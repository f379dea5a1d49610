# SPDX-License-Identifier: Apache-2.0
"""Query heads as rows of one product with a key head that they share: scores [B, S * H, T] that are looked at as
[B, S, H, T] when a mask meets them, or [B * K, H * S, T] as [B, K, H, S, T]. Called by match/softmax_core.py and
value_chain.py.

Such a product is read as one of queries [B, S, H, D], as an Einsum would write it. The graph is not changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from faexport.graph.nodes import given
from faexport.graph.surgery import Builder
from faexport.sizes.dims import Dim
from faexport.understand.core.factors import fits
from faexport.understand.core.fills import is_nothing
from faexport.understand.core.score_path import Path, Step
from faexport.understand.layout import view_ops
from faexport.understand.layout.heads import chain_of
from faexport.understand.layout.products import Factor, Product
from faexport.understand.layout.views import Axis, View, merged
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.known import Shape


def heads_apart(path: Path, a: Analysis) -> Path | None:
    """The same path from a product whose heads have an axis of their own, where the first change of shape gives them
    one and nothing but numbers met the scores before."""
    product, whole = path.product, a.shape(path.product.node.outputs[0])
    count = next((i for i, step in enumerate(path.steps) if step.kind == "view"), None)
    if whole is None or count is None or not all(_is_number(step, whole, a) for step in path.steps[:count]):
        return None
    node = path.steps[count].node
    product, whole = _with_key_heads(product, whole, node, a) or (product, whole)
    view = view_ops.apply(node.outputs[0], View.whole(whole), a)
    position = product.labels.index("row")
    parts = None if view is None else _parts(view, View.whole(whole).axes[position], position)
    heads = None if parts is None else _position_of_heads(product.left, parts, a)
    if view is None or parts is None or heads is None:
        return None
    shape = (*whole[:position], *(atom.size for atom in parts), *whole[position + 1 :])
    left = _split(product.left, parts, heads, len(product.leads), a) if _keeps_all(view, shape) else None
    if left is None:
        return None
    labels = _labels(product.labels, heads, len(product.leads))
    apart = dataclasses.replace(product, left=left, labels=labels, order=(), shape=shape)
    kind = "pass" if view.shape == shape else "view"  # which gives axes of size 1, too
    steps = [*path.steps[:count], Step(node, kind), *path.steps[count + 1 :]]
    return Path(apart, steps, together=count)


def _keeps_all(view: View, shape: Sequence[Dim]) -> bool:
    """Has the view an axis for each of these sizes, in their order, and else only axes of size 1?"""
    return [size for size in view.shape if size != 1] == [size for size in shape if size != 1]


def _with_key_heads(product: Product, whole: Shape, node: ir.Node, a: Analysis) -> tuple[Product, Shape] | None:
    """Where batch and key heads have one axis, and `node`, the first change of shape, tells them apart as well: the
    product with an axis for each, by nodes that aren't in the graph yet, and its shape."""
    view = view_ops.apply(node.outputs[0], View.whole(whole), a)
    factors = (product.left, product.right)
    if view is None or product.labels != ("lead0", "row", "column") or any(f.labels[0] != "lead0" for f in factors):
        return None
    batch = [axis[0] for axis in view.axes if len(axis) == 1 and axis[0].axis == 0]
    if len(batch) != 2 or merged(batch) != View.whole(whole).axes[0] or batch[1].size.const is None:
        return None
    sizes = tuple(atom.size for atom in batch)
    left, right = (_split_batch(factor, sizes, a) for factor in factors)
    labels = ("lead0", "lead1", "row", "column")
    return dataclasses.replace(product, left=left, right=right, labels=labels), (*sizes, *whole[1:])


def _split_batch(factor: Factor, sizes: tuple[Dim, ...], a: Analysis) -> Factor:
    build, shape, heads = Builder(a.opset), a.known_shape(factor.value), sizes[1].const
    assert heads is not None
    value = build.split_axis(factor.value, 0, len(shape), heads)
    a.define(given(build.nodes[-1], 0), (shape[0], Dim.of(1), *shape[1:]))
    a.define(value, (*sizes, *shape[1:]))
    return Factor(value, ("lead0", "lead1", *factor.labels[1:]))


def _is_number(step: Step, whole: Shape, a: Analysis) -> bool:
    """Does the step multiply the scores, which have this shape, by a number, or add nothing?"""
    added = given(step.node, 1 - step.index) if step.kind == "add" else None
    return step.kind in ("pass", "scale") or (added is not None and is_nothing(added, a) and fits(added, whole, a))


def with_heads_apart(
    product: Product, rows: Axis, of_scores: Product, shape: tuple[Dim, ...], a: Analysis
) -> Product | None:
    """A product of weights and values whose rows are the rows and a leading axis of the scores, with that axis apart;
    None where they are something else. `rows` runs over the axes of the scores' product, whose sizes are `shape`."""
    axes, whole = View.whole(shape).axes, a.shape(product.node.outputs[0])
    if whole is None or len(rows) != 2 or any(atom.axis is None or (atom,) != axes[atom.axis] for atom in rows):
        return None
    names = [of_scores.labels[atom.axis] for atom in rows if atom.axis is not None]
    if names.count("row") != 1 or "column" in names:
        return None
    heads, count = 1 - names.index("row"), len(product.leads)
    position = product.labels.index("row")
    sizes = (*whole[:position], *(atom.size for atom in rows), *whole[position + 1 :])
    left = Factor(product.left.value, _labels(product.left.labels, heads, count))
    labels = _labels(product.labels, heads, count)
    return dataclasses.replace(product, left=left, labels=labels, order=(), shape=sizes)


def _labels(labels: tuple[str, ...], heads: int, count: int) -> tuple[str, ...]:
    """With the heads in front of the rows (0) or behind them (1); `count` leading labels are there already."""
    both = ["row"]
    both.insert(heads, f"lead{count}")
    return tuple(x for label in labels for x in (both if label == "row" else [label]))


def _parts(view: View, rows: Axis, position: int) -> Axis | None:
    """What the rows fall into, where they fall into two axes of the view, next to each other."""
    places = [k for k, axis in enumerate(view.axes) if any(atom.axis == position for atom in axis)]
    atoms = [atom for k in places for atom in view.axes[k]]
    if len(places) != 2 or len(atoms) != 2 or places[1] != places[0] + 1:
        return None
    return tuple(atoms) if merged(atoms) == rows else None


def _position_of_heads(queries: Factor, parts: Axis, a: Analysis) -> int | None:
    """Which of the two parts are the heads: the one that comes from the columns of a projection, else the first whose
    size is a constant. Either would be right."""
    for link in reversed(chain_of(queries.value, a)):
        rows, columns = (link.view.axes[queries.labels.index(label)] for label in ("row", "sum"))
        if len(rows) == 2 and columns and [x.size for x in rows] == [x.size for x in parts]:
            found = [i for i, atom in enumerate(rows) if atom.axis == columns[0].axis]
            if len(found) == 1:
                return found[0]
    constant = [i for i, atom in enumerate(parts) if atom.size.const is not None]
    return constant[0] if constant else None


def _split(queries: Factor, parts: Axis, heads: int, count: int, a: Analysis) -> Factor | None:
    """The queries with an axis for the heads, by nodes that aren't in the graph yet."""
    number, axis = parts[heads].size.const, queries.labels.index("row")
    if number is None:
        return None
    build, shape = Builder(a.opset), a.known_shape(queries.value)
    value = build.split_axis(queries.value, axis, len(shape), number, outer=heads == 0)
    made = build.nodes[-1]
    place = axis if heads == 0 else axis + 1
    a.define(given(made, 0), (*shape[:place], Dim.of(1), *shape[place:]))
    a.define(value, (*shape[:axis], *(atom.size for atom in parts), *shape[axis + 1 :]))
    return Factor(value, _labels(queries.labels, heads, count))
