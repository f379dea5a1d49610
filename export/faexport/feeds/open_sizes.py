# SPDX-License-Identifier: Apache-2.0
"""Inputs that a model runs on in onnxruntime, but on which a rewritten one need not run: ONNX leaves open what comes
out, or an operator takes no tensors without elements. Called by model_check.py and site_check.py."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from faexport.fallback.formulas import cuda_only
from faexport.feeds.relations import sizes_beside
from faexport.graph.nodes import all_nodes, attribute, operand
from faexport.sizes import algebra
from faexport.sizes.dims import Dim
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.evaluate import evaluate


class OpenSizes:
    """The nodes of a model that onnxruntime runs where a rewritten one need not run. Reshapes with allowzero may have a
    size of 0 beside one of -1, which ONNX calls invalid, since the size that -1 stands for is open. And where there
    are no elements, sizes that a Reshape or a Concat finds equal in any other run may differ: onnxruntime's Concat
    looks at no size of an input without elements, as an empty cache."""

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

    @functools.cached_property
    def _pairs(self) -> list[tuple[ir.Node, Dim, Dim]]:
        """Each node that runs only where two sizes are equal, or where there are no elements."""
        analysis, found = Analysis(self._model), []
        for node in all_nodes(self._model):
            if node.op_type == "Reshape":
                before, target = analysis.shape(operand(node, 0)), analysis.contents(operand(node, 1))
                if before is None or target is None or any(size in (0, -1) for size in target):
                    continue
                left, right = _apart(before, target)
                if len(left) == len(right) == 1:
                    found.append((node, left[0], right[0]))
            elif node.op_type == "Concat":
                shapes = [analysis.shape(value) for value in node.inputs]
                found += [(node, *pair) for pair in sizes_beside(shapes, attribute(node, "axis", 0))]
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
            if any(_number(size, sizes) == 0 for size in beside):
                return f"node '{name}' reshapes to a size of 0 beside one of -1, which ONNX leaves open"
        for node, before, behind in self._pairs:
            found = [_number(size, sizes) for size in (before, behind)]
            if None not in found and found[0] != found[1]:
                puts = "puts a size of {} beside" if node.op_type == "Concat" else "makes a size of {} of"
                said = f"{puts.format(found[1])} one of {found[0]}"
                return f"node '{node.name or '?'}' {said}, since there are no elements"
        return ""


def _apart(before: Sequence[Dim], behind: Sequence[Dim]) -> tuple[list[Dim], list[Dim]]:
    """The sizes before and behind a Reshape without those in front of both, alone or multiplied, that are the same."""
    left, right = list(before), list(behind)
    while left and right:
        a, b, used = left[0], right[0], [1, 1]
        while a != b:
            if a.divide(b) is not None and used[1] < len(right):
                b, used[1] = b * right[used[1]], used[1] + 1
            elif b.divide(a) is not None and used[0] < len(left):
                a, used[0] = a * left[used[0]], used[0] + 1
            else:
                return left, right
        left, right = left[used[0] :], right[used[1] :]
    return left, right


def excuse(open_sizes: OpenSizes, rewritten: ir.Model, tensors: Mapping[str, np.ndarray]) -> str:
    """Why a rewritten model need not run with these inputs, or "". `open_sizes` is of the original."""
    if all(tensor.size for tensor in tensors.values()):
        return ""
    if sentence := open_sizes.sentence(tensors):
        return sentence
    names = sorted({node.op_type for node in cuda_only(rewritten)})
    return f"onnxruntime's kernels of {', '.join(names)} take no tensors without elements" if names else ""


def _number(size: Dim, sizes: Mapping[str, int]) -> int | None:
    """None where it isn't known."""
    try:
        return evaluate(size.expr, {atom: sizes[atom.args[0]] for atom in algebra.atoms(size.expr, "sym")})
    except (KeyError, ZeroDivisionError):
        return None
