# SPDX-License-Identifier: Apache-2.0
"""What happens to a model before it is analysed. Called by pipeline.py.

Only what must: the conversion to another opset where the user asks for one, and the inlining of functions where one of
them holds a softmax or an attention op. What isn't attention stays as the exporter wrote it.
"""

from __future__ import annotations

import logging

import onnx
import onnx_ir as ir
import onnx_ir.passes.common

from faexport.graph.nodes import own_functions
from faexport.spec import DOMAIN


class ConversionError(ValueError):
    """Why a model can't be converted to another opset, as a sentence."""


def convert_opset(model: ir.Model, opset: int) -> ir.Model:
    """The model at this opset of ONNX. Raises ConversionError where a node has no counterpart there."""
    if model.opset_imports.get("", opset) == opset:
        return model
    if opset > (newest := onnx.defs.onnx_opset_version()):
        raise ConversionError(f"opset {opset} is newer than {newest}, the newest that onnx {onnx.__version__} knows")
    import onnxscript.version_converter  # slow to import, and few ask for it

    logging.getLogger("onnxscript.version_converter").setLevel(logging.ERROR)
    before = model.opset_imports.get("")
    try:
        onnxscript.version_converter.convert_version(model, opset, fallback=True)
    except Exception as error:  # the converters raise whatever their C++ or Python parts raise
        raise ConversionError(
            f"can't convert the model from opset {before} to {opset}: {_first_line(error)}"
        ) from error
    if model.opset_imports.get("") != opset:
        raise ConversionError(
            f"can't convert the model from opset {before} to {opset}: a node has no counterpart there"
        )
    return model


def inline_functions(model: ir.Model) -> ir.Model:
    """The model without functions, if one of them may hold attention: a call tells the shapes that a body alone leaves
    open, and onnxruntime can't infer the types of a function that has a custom op in its body."""
    anchors = ("Softmax", "Exp", "Attention", "MultiHeadAttention")
    if any(node.op_type in anchors for function in own_functions(model) for node in function.all_nodes()):
        onnx_ir.passes.common.InlinePass(criteria=lambda function: function.domain != DOMAIN)(model)
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
