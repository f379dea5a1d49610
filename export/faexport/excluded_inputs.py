# SPDX-License-Identifier: Apache-2.0
"""Inputs that a model runs on, but of which its file, or ONNX, leaves open what comes out. Called by reference.py,
verify.py and site_check.py."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from .nodes import all_nodes, attribute, operand
from .understand.shapes import algebra
from .understand.shapes.analysis import Analysis
from .understand.shapes.evaluate import evaluate


def _sizes(model: ir.Model, tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The number that each name of the inputs' sizes stands for."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        tensor = tensors.get(value.name or "")
        if tensor is not None and value.shape is not None:
            named = zip(value.shape, tensor.shape, strict=False)
            sizes.update((str(dim), size) for dim, size in named if not isinstance(dim, int) and dim.value)
    return sizes


def contradiction(model: ir.Model, tensors: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> str:
    """Where an input has size 1 and a broadcast makes an output larger that the file gives the same size: what is so.
    The file's word stands (docs/masks.md), and such inputs are not among those that it is for. `outputs` are
    the model's own."""
    sizes = _sizes(model, tensors)
    for value in model.graph.outputs:
        output = outputs.get(value.name or "")
        for dim, size in zip(value.shape or (), () if output is None else output.shape, strict=False):
            if not isinstance(dim, int) and sizes.get(str(dim)) == 1 < size:
                return f"output '{value.name}' has size {size} where the file says {dim}, which is 1"
    return ""


def open_size(model: ir.Model, tensors: Mapping[str, np.ndarray]) -> str:
    """A sentence where a Reshape with allowzero has a size of 0 beside one of -1. ONNX calls that invalid, since the
    size that -1 stands for is open, but onnxruntime runs some. There a rewritten model need not run."""
    sizes = _sizes(model, tensors)
    if 0 not in sizes.values():
        return ""
    nodes = [node for node in all_nodes(model) if node.op_type == "Reshape" and attribute(node, "allowzero", 0)]
    analysis = Analysis(model) if nodes else None
    for node in nodes:
        target = analysis.contents(operand(node, 1)) if analysis is not None else None
        if target is None or not any(size == -1 for size in target):
            continue
        for size in target:
            atoms = algebra.atoms(size.expr, "sym")
            try:
                if evaluate(size.expr, {atom: sizes[atom.args[0]] for atom in atoms}) == 0:
                    return f"node '{node.name}' reshapes to a size of 0 beside one of -1, which ONNX leaves open"
            except (KeyError, ZeroDivisionError):
                continue
    return ""
