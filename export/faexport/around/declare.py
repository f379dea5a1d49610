# SPDX-License-Identifier: Apache-2.0
"""Writes what is proven of shapes and element types into the model, as shape information of its values. Called by
pipeline.py.

onnxruntime joins what stands around attention (a residual, its bias and the layer normalization behind it) when it
loads a model, where it knows that shapes are equal. It doesn't follow the arithmetic by which many exports compute
them, and we do. No node changes.
"""

from __future__ import annotations

import functools

import onnx
import onnx_ir as ir

from faexport.graph.nodes import ONNX_DOMAINS, graphs_of, op
from faexport.spec import DOMAIN
from faexport.understand.shapes.analysis import Analysis


def declare_shapes(model: ir.Model, a: Analysis) -> None:
    """Fills in the shapes and types of what nodes compute; the model's outputs stay as they are declared.

    Args:
        a: knows the model as it is now.
    """
    for graph, _ in graphs_of(model):
        if isinstance(graph, ir.Function):
            continue
        for node in graph:
            for index, value in enumerate(node.outputs):
                if value.name and not value.is_graph_output():
                    _declare(value, _dtype(node, index, a), a)


def _dtype(node: ir.Node, index: int, a: Analysis) -> ir.DataType | None:
    """The type of an output, where the operator's definition and the file leave no doubt: a wrong one, and runtimes
    refuse the model."""
    value = node.outputs[index]
    if value.dtype is not None or op(node) in ("Cast", "Constant", "ConstantOfShape"):
        return a.dtype(value)
    if node.domain not in (*ONNX_DOMAINS, DOMAIN):
        return None
    place = 0 if node.domain == DOMAIN else _input_of_the_same_type(node.op_type, a.opset, index)
    if place is None or place >= len(node.inputs) or (node.domain == DOMAIN and index > 0):
        return ir.DataType.INT64 if op(node) in ("Shape", "Size") else None
    given = node.inputs[place]
    constant = a.tensor(given)
    return constant.dtype if constant is not None else given.dtype if given is not None else None


@functools.cache
def _input_of_the_same_type(op_type: str, opset: int, index: int) -> int | None:
    """Which input of an ONNX operator has the type of this output, whatever that is."""
    try:
        schema = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None
    if not schema.outputs:
        return None
    output = schema.outputs[min(index, len(schema.outputs) - 1)]
    if not output.is_homogeneous:  # each result of a Loop has a type of its own
        return None
    return next((k for k, formal in enumerate(schema.inputs) if formal.type_str == output.type_str), None)


def _declare(value: ir.Value, dtype: ir.DataType | None, a: Analysis) -> None:
    sizes = a.shape(value)
    if sizes is None or dtype is None or value.type is not None and not isinstance(value.type, ir.TensorType):
        return
    own = list(value.shape) if value.shape is not None and len(value.shape) == len(sizes) else [None] * len(sizes)
    known = [d.const if d.const is not None else str(d) if d.is_known else None for d in sizes]
    value.dtype = dtype
    value.shape = ir.Shape([old if new is None else new for old, new in zip(own, known, strict=True)])
