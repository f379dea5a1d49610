# SPDX-License-Identifier: Apache-2.0
"""Writes a Gemm between two Reshapes, which take the leading axes together and apart again, as MatMul and Add
(Options.joins_rest). Called by pipeline.py.

That is how GPT-2's projections are exported (`Conv1D`). onnxruntime's Gemm on CUDA writes the bias to every row of its
output before it multiplies, and knows no operator that takes the bias in; of a MatMul and an Add it joins the Add
with what follows: GELU, the next normalization, or the operator of attention. What computed the shapes goes, too.
"""

from __future__ import annotations

import onnx_ir as ir

from faexport.graph.edits import Names, insert_in_front, remove_dead, take_over
from faexport.graph.nodes import RUNTIME_FLOATS, attribute, given, graphs_of, op, operand, producer
from faexport.understand.shapes.analysis import Analysis


def write_as_products(model: ir.Model, a: Analysis, names: Names) -> None:
    """Changes the model in place, and has the analysis know the new nodes."""
    gemms = [node for graph, _ in graphs_of(model) for node in graph if op(node) == "Gemm"]
    if gemms:
        a.extend(model)  # it doesn't know the operator's nodes yet
    rewritten = [_rewrite(node, a, names) for node in gemms]
    if any(rewritten):
        a.extend(model)


def _rewrite(gemm: ir.Node, a: Analysis, names: Names) -> bool:
    together, apart = producer(gemm.inputs[0]), _only_user(gemm.outputs[0])
    if op(together) != "Reshape" or op(apart) != "Reshape" or not _is_plain(gemm, a):
        return False
    assert together is not None and apart is not None
    x, result = given(together, 0), apart.outputs[0]
    is_here = apart.inputs[0] is gemm.outputs[0] and apart.graph is gemm.graph  # a body of a Loop computes it often
    if not is_here or not _keeps_rows(x, gemm, result, a):
        return False
    made = [ir.node("MatMul", [x, given(gemm, 1)])]
    if (bias := operand(gemm, 2)) is not None:
        made.append(ir.node("Add", [made[0].outputs[0], bias]))
    for node in made:
        node.outputs[0].type, node.outputs[0].shape = result.type, result.shape
    insert_in_front(apart, made, gemm.name or "gemm", names)
    take_over(result, made[-1].outputs[0])
    remove_dead([apart])
    return True


def _only_user(value: ir.Value) -> ir.Node | None:
    uses = value.uses()
    return next(iter(uses)).node if len(uses) == 1 and not value.is_graph_output() else None


def _is_plain(gemm: ir.Node, a: Analysis) -> bool:
    """rows @ weight, perhaps + a stored bias as long as a row."""
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    if any(attribute(gemm, name, default) != default for name, default in plain.items()):
        return False
    bias, columns = operand(gemm, 2), a.shape(gemm.inputs[1])
    if columns is None or a.dtype(gemm.outputs[0]) not in RUNTIME_FLOATS:
        return False
    return bias is None or (a.is_static(bias) and a.shape(bias) == columns[1:])


def _keeps_rows(x: ir.Value, gemm: ir.Node, result: ir.Value, a: Analysis) -> bool:
    """Are the rows of x those of the product, and those of the result?"""
    before, rows, columns, after = (a.shape(value) for value in (x, gemm.inputs[0], gemm.inputs[1], result))
    if before is None or rows is None or columns is None or after is None or len(rows) != 2 or len(before) < 3:
        return False
    # With widths that are known and not 0, the number of rows follows from that of elements.
    has_widths = bool(before[-1].const) and bool(columns[1].const)
    return has_widths and rows[1] == before[-1] and after == (*before[:-1], columns[1])
