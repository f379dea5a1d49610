# SPDX-License-Identifier: Apache-2.0
"""Query heads as rows of one product with a key head that they share: scores [B, S * H, T] that are looked at as
[B, S, H, T] when a mask meets them. Called by match/softmax_core.py and value_chain.py.

Such a product is read as one of queries [B, S, H, D], as an Einsum would write it. The graph is not changed.
"""

from __future__ import annotations

import dataclasses

from faexport.graph.nodes import given
from faexport.graph.surgery import Builder
from faexport.sizes.dims import Dim
from faexport.understand.core.fills import is_nothing
from faexport.understand.core.score_path import Path, Step
from faexport.understand.layout import view_ops
from faexport.understand.layout.heads import chain_of
from faexport.understand.layout.products import Factor, Product
from faexport.understand.layout.views import Axis, View, merged
from faexport.understand.shapes.analysis import Analysis


def heads_apart(path: Path, a: Analysis) -> Path | None:
    """The same path from a product whose heads have an axis of their own, where the first change of shape gives them
    one and nothing but numbers met the scores before."""
    product, whole = path.product, a.shape(path.product.node.outputs[0])
    count = next((i for i, step in enumerate(path.steps) if step.kind == "view"), None)
    if whole is None or count is None or not all(_is_number(step, a) for step in path.steps[:count]):
        return None
    view = view_ops.apply(path.steps[count].node.outputs[0], View.whole(whole), a)
    position = product.labels.index("row")
    parts = None if view is None else _parts(view, View.whole(whole), position)
    heads = None if parts is None else _position_of_heads(product.left, parts, a)
    if view is None or parts is None or heads is None:
        return None
    left = _split(product.left, parts, heads, len(product.leads), a)
    if left is None:
        return None
    labels = _labels(product.labels, heads, len(product.leads))
    apart = dataclasses.replace(product, left=left, labels=labels, order=(), shape=view.shape)
    steps = [*path.steps[:count], Step(path.steps[count].node, "pass"), *path.steps[count + 1 :]]
    return Path(apart, steps, together=count)


def _is_number(step: Step, a: Analysis) -> bool:
    """Does the step multiply the scores by a number, or add nothing?"""
    nothing = step.kind == "add" and is_nothing(given(step.node, 1 - step.index), a)
    return step.kind in ("pass", "scale") or nothing


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


def _parts(view: View, whole: View, position: int) -> Axis | None:
    """What the rows fall into, where they fall into two and all other axes stay."""
    parts = view.axes[position : position + 2]
    rest = (*view.axes[:position], *view.axes[position + 2 :])
    if len(view.axes) != len(whole.axes) + 1 or rest != (*whole.axes[:position], *whole.axes[position + 1 :]):
        return None
    atoms = [atom for axis in parts for atom in axis]
    return tuple(atoms) if [len(axis) for axis in parts] == [1, 1] and merged(atoms) == whole.axes[position] else None


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
