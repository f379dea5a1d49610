# SPDX-License-Identifier: Apache-2.0
"""Residuals with the normalization behind them, of images [batch, height, width, channels], as onnxruntime's
SkipLayerNormalization. Called by joins.py.

That operator and the rules that find its places elsewhere know three axes: here the inner ones are taken together and
apart again, which costs nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import onnx_ir as ir

from faexport.graph.edits import Names, insert_in_front, remove_dead, take_over
from faexport.graph.nodes import (
    RUNTIME_DOMAIN,
    RUNTIME_FLOATS,
    attribute,
    graphs_of,
    is_read_once,
    normalizes_rows,
    op,
    operand,
    producer,
)
from faexport.graph.surgery import Builder
from faexport.sizes.dims import Dim
from faexport.understand.shapes.analysis import Analysis

NORMALIZATION = "SkipLayerNormalization"


def join(model: ir.Model, a: Analysis, names: Names) -> None:
    """Changes the model in place."""
    a.extend(model)
    for graph, _ in graphs_of(model):
        places = {node: number for number, node in enumerate(graph)}
        for node in list(places):
            found = _place_of(node, a) if op(node) == "LayerNormalization" else None
            if found is not None and _comes_first(found, places):
                _write(found, a, names)


@dataclasses.dataclass(frozen=True)
class _Place:
    """normalization(rows + bias + skip), and the sum."""

    node: ir.Node
    added: ir.Node
    rows: ir.Value
    skip: ir.Value
    bias: ir.Value | None
    sizes: list[int]  # of all axes but the first


def _place_of(node: ir.Node, a: Analysis) -> _Place | None:
    total = operand(node, 0)
    added, shape = producer(total), a.shape(total)
    if added is None or op(added) != "Add" or added.graph is not node.graph:
        return None
    sizes = [size.const for size in (shape or ())[1:] if size.const]
    if not shape or len(shape) < 4 or len(sizes) != len(shape) - 1 or not _is_of_rows(node, shape, a):
        return None
    if any(a.shape(value) != shape or a.is_static(value) for value in added.inputs):
        return None
    for rows, skip in _sides(added):
        made_by = producer(rows) if is_read_once(rows) else None
        if made_by is None or op(made_by) != "Add" or made_by.graph is not node.graph:
            continue
        for inner, bias in _sides(made_by):
            if a.shape(inner) == shape and _is_vector(bias, shape[-1], a):
                return _Place(node, added, inner, skip, bias, sizes)
    first, second = added.inputs
    assert first is not None and second is not None
    return _Place(node, added, first, second, None, sizes)


def _comes_first(place: _Place, places: Mapping[ir.Node, int]) -> bool:
    """Do the weights stand in front of the sum, which other nodes may read at once? All of an outer graph does."""
    makers = (producer(value) for value in (*place.node.inputs[1:], place.bias))
    return all(node is None or places.get(node, -1) < places[place.added] for node in makers)


def _sides(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    first, second = node.inputs
    if first is not None and second is not None:
        yield first, second
        yield second, first


def _is_of_rows(node: ir.Node, shape: tuple[Dim, ...], a: Analysis) -> bool:
    """Does it normalize the last axis, with a weight and a bias for each column, and give nothing else?"""
    weights = [operand(node, 1), operand(node, 2)]
    if any(weight is None or not _is_vector(weight, shape[-1], a) for weight in weights):
        return False
    dtypes = {a.dtype(value) for value in node.inputs}
    return normalizes_rows(node, len(shape)) and len(dtypes) == 1 and dtypes <= {*RUNTIME_FLOATS}


def _is_vector(value: ir.Value, size: Dim, a: Analysis) -> bool:
    return a.shape(value) == (size,) and a.is_static(value)


def _write(place: _Place, a: Analysis, names: Names) -> None:
    *middle, width = place.sizes
    before, after = Builder(a.opset), Builder(a.opset)
    total, dtype = place.added.outputs[0], a.dtype(place.rows)
    flat = [before.reshape(value, [0, math.prod(middle), width]) for value in (place.rows, place.skip)]
    inputs = [*flat, place.node.inputs[1], place.node.inputs[2], *([place.bias] if place.bias is not None else [])]
    words = {"epsilon": attribute(place.node, "epsilon", 1e-5)}
    goes_on = not (is_read_once(total) and set(total.consumers()) == {place.node})
    joined = ir.node(NORMALIZATION, inputs, words, domain=RUNTIME_DOMAIN, num_outputs=4 if goes_on else 1)
    assert dtype is not None
    for value in joined.outputs:
        value.dtype = dtype
    norm = after.reshape(joined.outputs[0], [0, *middle, width])
    whole = after.reshape(joined.outputs[3], [0, *middle, width]) if goes_on else None
    insert_in_front(place.added, [*before.nodes, joined, *after.nodes], place.node.name or "joined", names)
    for unused in joined.outputs[1:3]:
        unused.name = ""
    shape = a.shape(total)
    for old, new in ((place.node.outputs[0], norm), (total, whole)):
        if new is not None:
            take_over(old, new)
            a.define(new, shape)
    remove_dead([place.node, place.added])
