# SPDX-License-Identifier: Apache-2.0
"""Inputs that a model runs on in onnxruntime, but on which a rewritten one need not run: ONNX leaves open what comes
out, or an operator takes no tensors without elements. Called by verify.py and site_check.py."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from .formulas import cuda_only
from .nodes import all_nodes, attribute, operand
from .understand.shapes import algebra
from .understand.shapes.analysis import Analysis
from .understand.shapes.dims import Dim
from .understand.shapes.evaluate import evaluate


class OpenSizes:
    """The Reshapes of a model with allowzero, which may have a size of 0 beside one of -1. ONNX calls that invalid,
    since the size that -1 stands for is open, but onnxruntime runs some. There a rewritten model need not run."""

    def __init__(self, model: ir.Model):
        self._model = model

    @functools.cached_property
    def _targets(self) -> list[tuple[str, list[Dim]]]:
        """The name of each such node that has a -1, and the sizes beside it."""
        nodes = [n for n in all_nodes(self._model) if n.op_type == "Reshape" and attribute(n, "allowzero", 0)]
        analysis = Analysis(self._model) if nodes else None
        found = []
        for node in nodes:
            target = (analysis.contents(operand(node, 1)) if analysis is not None else None) or ()
            if any(size == -1 for size in target):
                found.append((node.name or "?", [size for size in target if size != -1]))
        return found

    def sentence(self, tensors: Mapping[str, np.ndarray]) -> str:
        """Which size is open with these inputs, or ""."""
        if all(tensor.size for tensor in tensors.values()):
            return ""
        sizes: dict[str, int] = {}
        for value in self._model.graph.inputs:
            tensor = tensors.get(value.name or "")
            if tensor is not None and value.shape is not None:
                named = zip(value.shape, tensor.shape, strict=False)
                sizes.update((str(dim), size) for dim, size in named if not isinstance(dim, int) and dim.value)
        for name, beside in self._targets:
            if any(_is_zero(size, sizes) for size in beside):
                return f"node '{name}' reshapes to a size of 0 beside one of -1, which ONNX leaves open"
        return ""


def excuse(open_sizes: OpenSizes, rewritten: ir.Model, tensors: Mapping[str, np.ndarray]) -> str:
    """Why a rewritten model need not run with these inputs, or "". `open_sizes` is of the original."""
    if all(tensor.size for tensor in tensors.values()):
        return ""
    if sentence := open_sizes.sentence(tensors):
        return sentence
    names = sorted({node.op_type for node in cuda_only(rewritten)})
    return f"onnxruntime's kernels of {', '.join(names)} take no tensors without elements" if names else ""


def _is_zero(size: Dim, sizes: Mapping[str, int]) -> bool:
    try:
        return evaluate(size.expr, {atom: sizes[atom.args[0]] for atom in algebra.atoms(size.expr, "sym")}) == 0
    except (KeyError, ZeroDivisionError):
        return False
