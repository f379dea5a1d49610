# SPDX-License-Identifier: Apache-2.0
"""What happens to a model before it is analysed: the conversion to another opset where the user asks for one. Called by pipeline.py.

Nothing else is changed in front of the analysis: what isn't attention stays as the exporter wrote it.
"""

from __future__ import annotations

import logging

import onnx_ir as ir
import onnxscript.version_converter


def convert_opset(model: ir.Model, opset: int) -> ir.Model:
    """The model at this opset of ONNX. Raises ValueError with a sentence where a node has no counterpart there."""
    if model.opset_imports.get("", opset) == opset:
        return model
    logging.getLogger("onnxscript.version_converter").setLevel(logging.ERROR)
    before = model.opset_imports.get("")
    try:
        onnxscript.version_converter.convert_version(model, opset, fallback=True)
    except Exception as error:  # the converters raise whatever their C++ or Python parts raise
        raise ValueError(f"can't convert the model from opset {before} to {opset}: {_first_line(error)}") from error
    if model.opset_imports.get("") != opset:
        raise ValueError(f"can't convert the model from opset {before} to {opset}: a node has no counterpart there")
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
