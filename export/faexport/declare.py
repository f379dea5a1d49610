# SPDX-License-Identifier: Apache-2.0
"""Writes what is proven of shapes and element types into the model, as shape information of its values. Called by
pipeline.py.

onnxruntime joins what stands around attention (a residual, its bias and the layer normalization behind it) when it
loads a model, where it knows that shapes are equal. It doesn't follow the arithmetic by which many exports compute
them, and we do. No node changes.
"""

from __future__ import annotations

import onnx_ir as ir

from faexport.nodes import graphs_of
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
            for value in node.outputs:
                if value.name and not value.is_graph_output():
                    _declare(value, a)


def _declare(value: ir.Value, a: Analysis) -> None:
    sizes, dtype = a.shape(value), a.dtype(value)
    if sizes is None or dtype is None or value.type is not None and not isinstance(value.type, ir.TensorType):
        return
    own = list(value.shape) if value.shape is not None and len(value.shape) == len(sizes) else [None] * len(sizes)
    known = [d.const if d.const is not None else str(d) if d.is_known else None for d in sizes]
    value.dtype = dtype
    value.shape = ir.Shape([old if new is None else new for old, new in zip(own, known, strict=True)])
