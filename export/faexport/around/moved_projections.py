# SPDX-License-Identifier: Apache-2.0
"""Moves the product with a stored weight behind nodes that only move rows (Options.joins_rest). Called by pipeline.py.

In attention within windows of an image, the rows go back to their places in the image between the output's projection
and the residual. Behind them the projection's bias, the residual and the normalization that follows can be joined into
one operator, and rows that were padding are not multiplied. A product of rows with a weight doesn't depend on where
the rows are.
"""

from __future__ import annotations

import onnx_ir as ir

from faexport.graph.edits import Names, insert_in_front, remove_dead, take_over
from faexport.graph.nodes import RUNTIME_FLOATS, VIEWS, attribute, graphs_of, live_users, only_reader, op, producer
from faexport.graph.surgery import Builder
from faexport.sizes.dims import product
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.rules import resolve_axis, slice_of


def write(model: ir.Model, a: Analysis, names: Names) -> None:
    """Changes the model in place."""
    a.extend(model)
    for graph, _ in graphs_of(model):
        for node in list(graph):
            if op(node) == "Add" and node.graph is not None:
                _move(node, a, names)


def _move(added: ir.Node, a: Analysis, names: Names) -> None:
    """Behind the moves that read a biased product, where these end at a residual."""
    found = _projected(added, a)
    moves = _moves_from(added, a) if found is not None else []
    if found is None or not moves or all(op(node) in VIEWS for node in moves):
        return
    rows, weight, bias = found
    end, own = moves[-1].outputs[0], a.shape(added.outputs[0])
    residual = live_users(end)
    shape = a.shape(end)
    if shape is None or own is None or len(residual) != 1 or op(residual[0]) != "Add":
        return
    if any(a.shape(value) != shape or a.is_static(value) for value in residual[0].inputs):
        return
    if product(shape) != product(own) and not (product(own) - product(shape)).is_at_least(0):
        return  # more rows would be multiplied
    build, dtype = Builder(a.opset), a.dtype(rows)
    for node in moves:
        rows = build.again(node, rows)
    multiplied = build.add("MatMul", [rows, weight], dtype)
    biased = build.add("Add", [multiplied, bias], dtype)
    insert_in_front(moves[-1], build.nodes, moves[-1].name or "moved", names)
    take_over(end, biased)
    remove_dead([moves[-1]])


def _projected(added: ir.Node, a: Analysis) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Rows, a stored weight as wide as they are, and the bias of a biased product."""
    for value, bias in (added.inputs, added.inputs[::-1]):
        multiplied = producer(value)
        if multiplied is None or bias is None or op(multiplied) != "MatMul" or multiplied.graph is not added.graph:
            continue
        rows, weight = multiplied.inputs
        shape, sizes = a.shape(rows), a.shape(weight)
        if value is None or rows is None or weight is None or not shape or not sizes or len(sizes) != 2:
            continue
        square = len(shape) > 1 and shape[-1].const and list(sizes) == [shape[-1], shape[-1]]
        if not square or a.shape(bias) != (shape[-1],) or a.dtype(rows) not in RUNTIME_FLOATS:
            continue
        if a.is_static(weight) and a.is_static(bias) and not value.is_graph_output() and live_users(value) == [added]:
            return rows, weight, bias
    return None


def _moves_from(added: ir.Node, a: Analysis) -> list[ir.Node]:
    """The nodes one behind the other that read a value and only move its rows."""
    moves: list[ir.Node] = []
    value = added.outputs[0]
    while (user := only_reader(value)) is not None:
        if user.graph is not added.graph or user.inputs[0] is not value or not _moves_rows(user, a):
            break
        moves.append(user)
        value = user.outputs[0]
    return moves


def _moves_rows(node: ir.Node, a: Analysis) -> bool:
    """Does it leave each row whole?"""
    before, behind = a.shape(node.inputs[0]), a.shape(node.outputs[0])
    if not before or not behind or not before[-1].const or before[-1] != behind[-1]:
        return False
    last, kind = len(before) - 1, op(node)
    if kind == "Transpose":
        perm = list(attribute(node, "perm") or ())
        return bool(perm) and perm[-1] == last
    if kind == "Slice":
        pieces = slice_of(node, a, before)
        return pieces is not None and all(axis != last for axis, *_ in pieces)
    if kind == "Gather":
        return resolve_axis(attribute(node, "axis", 0), last + 1) != last and a.is_static(node.inputs[1])
    return kind in VIEWS and a.is_static(node.inputs[1] if len(node.inputs) > 1 else None)
