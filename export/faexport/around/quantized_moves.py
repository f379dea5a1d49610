# SPDX-License-Identifier: Apache-2.0
"""Puts what only moves elements behind a DequantizeLinear of int8 in front of it, for onnxruntime. Called by
pipeline.py.

A fused node may want the keys of a quantized model in another order, and then a Transpose stands behind their
DequantizeLinear. From opset 21 on onnxruntime (1.32) doesn't load such a file: its optimizer carries the pair of
QuantizeLinear and DequantizeLinear behind the move and gives the new QuantizeLinear no zero point, which is then one of
uint8. The move gives the same on int8, and has a quarter of the bytes to move.
"""

from __future__ import annotations

import onnx_ir as ir

from faexport.graph.edits import Names, insert_in_front, remove_dead, take_over
from faexport.graph.nodes import data_users, given, graphs_of, op, operand, producer
from faexport.understand.shapes.analysis import Analysis

_MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice")  # what that optimizer carries a pair behind
_FIRST_OPSET = 21


def put_in_front(model: ir.Model, a: Analysis, names: Names) -> None:
    """Changes the model in place."""
    if a.opset < _FIRST_OPSET:
        return
    for graph, _ in graphs_of(model):
        for node in list(graph):
            if op(node) in _MOVES and not _is_quantized_again(node.outputs[0]):
                _put_in_front(node, a, names)


def _is_quantized_again(value: ir.Value) -> bool:
    """Is it read by nothing but QuantizeLinear? onnxruntime has no pair to carry then."""
    return not value.is_graph_output() and all(op(user) == "QuantizeLinear" for user in data_users(value))


def _put_in_front(move: ir.Node, a: Analysis, names: Names) -> None:
    dequantize = producer(given(move, 0))
    if dequantize is None or op(dequantize) != "DequantizeLinear":
        return
    quantized, scale = given(dequantize, 0), a.shape(operand(dequantize, 1))
    has_one_scale = scale is not None and len(scale) <= 1 and all(size == 1 for size in scale)
    if not has_one_scale or a.dtype(quantized) != ir.DataType.INT8 or a.is_static(quantized):
        return
    result, said = move.outputs[0], dequantize.attributes.get("output_dtype")
    moved = ir.Node("", move.op_type, [quantized, *move.inputs[1:]], list(move.attributes.values()))
    # Not its axis, which is that of many scales.
    back = ir.Node("", "DequantizeLinear", [moved.outputs[0], *dequantize.inputs[1:]], [said] if said else [])
    moved.outputs[0].dtype, moved.outputs[0].shape = ir.DataType.INT8, result.shape
    insert_in_front(move, [moved, back], move.name or "moved", names)
    take_over(result, back.outputs[0])
    remove_dead([move])
