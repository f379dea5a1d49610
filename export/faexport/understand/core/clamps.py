# SPDX-License-Identifier: Apache-2.0
"""max(scores, a hugely negative number), which only takes -inf away. Called by score_chain.py."""

from __future__ import annotations

import ml_dtypes
import onnx_ir as ir

from faexport.graph.nodes import FLOATS, op, operand
from faexport.understand.shapes.analysis import Analysis


def clamped_input(node: ir.Node, a: Analysis) -> int | None:
    """Which input of a Max or Clip the scores may come in by; None where it may change numbers that scores have."""
    if op(node) == "Max" and len(node.inputs) == 2:
        candidates = [(0, 1), (1, 0)]
    elif op(node) == "Clip" and operand(node, 1) is not None and not _cuts_off(node, a):
        candidates = [(0, 1)]
    else:
        return None
    for index, bound in candidates:
        low = a.scalar(node.inputs[bound])
        if low is not None and low <= -65504.0:
            return index
    return None


def _cuts_off(clip: ir.Node, a: Analysis) -> bool:
    """Has it an upper bound that a number of its type may lie above?"""
    bound, dtype = operand(clip, 2), a.dtype(clip.outputs[0])
    high = a.scalar(bound)
    if bound is None:
        return False
    return high is None or dtype not in FLOATS or high < float(ml_dtypes.finfo(dtype.numpy()).max)
