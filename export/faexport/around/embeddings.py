# SPDX-License-Identifier: Apache-2.0
"""Joins a sum of embeddings with the layer normalization behind it, for onnxruntime (Options.joins_rest). Called by
joins.py.

A BERT looks up three tables: of tokens, of positions, and of token types, whose indices exports compute at some length
although each is 0. Where it is proven that all indices into a table are the same number (index/), its row becomes part
of the table of positions, which onnxruntime adds up once, when it loads the model. What is left, a residual with a
normalization, is one of its operators; positions may lack the batch there.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from faexport.graph.edits import Names, insert_in_front, remove_dead, take_over
from faexport.graph.nodes import (
    RUNTIME_DOMAIN,
    RUNTIME_FLOATS,
    attribute,
    given,
    normalizes_rows,
    op,
    operand,
    producer,
)
from faexport.graph.surgery import Builder
from faexport.sizes import algebra as ia
from faexport.sizes.dims import Dim
from faexport.understand.index import transfer_layout, transfer_math  # noqa: F401  (registers the transfer functions)
from faexport.understand.index.interpreter import Interpreter
from faexport.understand.shapes.analysis import Analysis

OPERATOR = "SkipLayerNormalization"


@dataclasses.dataclass(frozen=True)
class _Embedding:
    """table[indices], a summand."""

    value: ir.Value  # [B, S, E], or [1, S, E]
    table: ir.Value  # [V, E], stored
    index: int | None  # all indices are this number; None: that isn't proven


def join(model: ir.Model, a: Analysis, names: Names) -> None:
    """Changes the model in place, wherever embeddings are summed and normalized."""
    ctx = Interpreter(a)
    for node in list(model.graph):
        if op(node) == "LayerNormalization" and (found := _read(node, ctx)) is not None:
            _write(node, *found, Builder(a.opset), names)


def _read(node: ir.Node, ctx: Interpreter) -> tuple[_Embedding, _Embedding, list[_Embedding]] | None:
    """The tokens, the positions and the tables of one index each; None where it is something else."""
    a, total = ctx.analysis, given(node, 0)
    sizes = a.shape(total)
    weights = [operand(node, 1), operand(node, 2)]
    if sizes is None or len(sizes) != 3 or not normalizes_rows(node, 3) or None in weights:
        return None
    summands = [_embedding(value, ctx) for value in _summands(total)]
    found = [one for one in summands if one is not None]
    rows = [one for one in found if one.index is not None]
    others = [one for one in found if one.index is None]
    if len(found) != len(summands) or len(others) != 2:
        return None
    fits = [a.shape(one.value) == sizes for one in others]
    tokens, positions = others if fits[0] else others[::-1]
    shape = a.shape(positions.value)
    if not any(fits) or shape is None or len(shape) != 3 or shape[0] != 1 or shape[2] != sizes[2]:
        return None
    if not _is_as_long(shape[1], sizes[1]):
        return None
    types = {a.dtype(value) for value in (*(one.table for one in found), *weights)}
    widths = [a.shape(value) for value in weights]
    if len(types) != 1 or not types <= {*RUNTIME_FLOATS} or any(width != sizes[2:] for width in widths):
        return None
    return tokens, positions, rows


def _is_as_long(size: Dim, rows: Dim) -> bool:
    """Are two sizes that are broadcast against each other always equal? They are unless this one can be 1 alone."""
    symbols = list(ia.atoms(rows.expr, "sym"))
    if size == rows or len(symbols) != 1 or Dim.of(ia.of_atom(symbols[0])) != rows:
        return size == rows
    return size.substitute({symbols[0]: ia.sym(symbols[0].args[0], 2)}).is_at_least(2)


def _summands(value: ir.Value) -> list[ir.Value]:
    """Of a tree of additions whose results are read by nothing else."""
    node = producer(value)
    if op(node) != "Add" or node is None or len(list(value.uses())) != 1 or value.is_graph_output():
        return [value]
    return [summand for side in node.inputs if side is not None for summand in _summands(side)]


def _embedding(value: ir.Value, ctx: Interpreter) -> _Embedding | None:
    node = producer(value)
    if op(node) != "Gather" or node is None or attribute(node, "axis", 0) != 0:
        return None
    table, indices = given(node, 0), given(node, 1)
    shape = ctx.analysis.shape(table)
    if ctx.analysis.tensor(table) is None or shape is None or len(shape) != 2:
        return None
    read = ctx.known(indices)
    if read is None:
        return None
    at = read.at(tuple(ia.var(f"embedding {axis}", [size]) for axis, size in enumerate(read.shape)))
    return _Embedding(value, table, ia.value_of(at) if at.kind == "int" else None)


def _write(
    node: ir.Node,
    tokens: _Embedding,
    positions: _Embedding,
    rows: list[_Embedding],
    build: Builder,
    names: Names,
) -> None:
    total, dtype = given(node, 0), positions.table.dtype
    table = positions.table
    for row in rows:
        assert row.index is not None
        its = build.add("Gather", [row.table, build.constant(np.array(row.index))], dtype, axis=0)
        table = build.add("Add", [table, its], dtype)
        table.shape = positions.table.shape
    looked_up = producer(positions.value)
    assert looked_up is not None
    skip = positions.value
    if rows:
        skip = build.add("Gather", [table, given(looked_up, 1)], dtype, axis=0)
        skip.shape = positions.value.shape
    inputs = [tokens.value, skip, *node.inputs[1:3]]
    epsilon = float(attribute(node, "epsilon", 1e-5))
    joined = ir.node(OPERATOR, inputs, {"epsilon": epsilon}, domain=RUNTIME_DOMAIN)
    build.nodes.append(joined)
    insert_in_front(node, build.nodes, f"{node.name or node.outputs[0].name}_embeddings", names)
    take_over(node.outputs[0], joined.outputs[0])
    node.replace_input_with(0, None)
    remove_dead([node, total.producer()])
