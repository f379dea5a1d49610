# SPDX-License-Identifier: Apache-2.0
"""A half-precision model computed in float32: what its own rounding is measured against. Called by reference.py,
recompute.py and half.py.

The same nodes and the same weights, each float16 or bfloat16 tensor held as float32; constants keep their values, also
the finite fill of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import HALVES, outermost_graphs

TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


def in_float32(model: ir.Model) -> ir.Model:
    """Changes the model in place."""
    for graph in outermost_graphs(model):
        _widen_values(graph)
        for node in graph.all_nodes():
            widen_node(node)
    return model


def widen_node(node: ir.Node) -> None:
    """Changes the node's attributes and the types of its outputs in place."""
    for attribute in list(node.attributes.values()):
        _widen_attribute(node, attribute)
    for value in node.outputs:
        _widen(value)


def inputs_in_float32(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs of that model."""
    half = (np.float16, ml_dtypes.bfloat16)
    return {name: array.astype(np.float32) if array.dtype in half else array for name, array in tensors.items()}


def _widen_values(graph: ir.Graph | ir.Function) -> None:
    for value in (*graph.inputs, *(graph.initializers.values() if isinstance(graph, ir.Graph) else ())):
        _widen(value)


def _widen(value: ir.Value) -> None:
    if value.const_value is not None and value.const_value.dtype in HALVES:
        value.const_value = widened(value.const_value)
    if value.dtype in HALVES:
        value.dtype = ir.DataType.FLOAT


def widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same numbers as float32."""
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _widen_attribute(node: ir.Node, attribute: ir.Attr) -> None:
    if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in HALVES:
        node.attributes[attribute.name] = ir.AttrTensor(attribute.name, widened(attribute.value))
    elif attribute.type == ir.AttributeType.INT and attribute.name in TYPE_ATTRIBUTES and attribute.value in HALVES:
        node.attributes[attribute.name] = ir.AttrInt64(attribute.name, int(ir.DataType.FLOAT))
    elif attribute.type == ir.AttributeType.GRAPH:
        _widen_values(attribute.value)
    elif attribute.type == ir.AttributeType.GRAPHS:
        for graph in attribute.value:
            _widen_values(graph)
