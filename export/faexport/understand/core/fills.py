# SPDX-License-Identifier: Apache-2.0
"""Tensors whose elements are all the same number, as far as the graph tells. Called by score_chain.py and sinks.py."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import attribute, given, op, operand, producer
from faexport.graph.surgery import Builder
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.rules import constant_ints

MAX_PATH = 8
SPREADING = ("Expand", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Identity")


def fill_of(value: ir.Value, a: Analysis) -> float | None:
    """The number that all elements are, whatever their number."""
    while True:
        if (array := a.constant(value)) is not None:
            same = array.size > 0 and np.isfinite(array.flat[0]) and bool((array == array.flat[0]).all())
            return float(array.flat[0]) if same else None
        node = producer(value)
        if node is None:
            return None
        if op(node) == "ConstantOfShape":
            tensor = attribute(node, "value")
            return 0.0 if tensor is None else float(tensor.numpy().reshape(-1)[0])
        source = node.inputs[0] if op(node) in SPREADING else None
        if source is None:
            return None
        value = source


def is_nothing(value: ir.Value, a: Analysis, times_finite: bool = False) -> bool:
    """Is the value 0, or 0 times something, as torch.baddbmm(beta=0) leaves it? Of what is infinite or NaN that makes
    NaN, which baddbmm means to leave out; `times_finite`: it has to be known that there is none."""
    array = a.constant(value)
    if array is not None:
        return not np.any(array)
    node = producer(value)
    while node is not None and op(node) in ("Cast", "Identity", "Expand", "Reshape", "Unsqueeze", "Transpose"):
        node = producer(node.inputs[0])
    if node is None:
        return False
    if op(node) == "ConstantOfShape":
        fill = attribute(node, "value")
        return fill is None or not np.any(fill.numpy())
    others = [given(node, 1 - i) for i, v in enumerate(node.inputs) if a.scalar(v) == 0] if op(node) == "Mul" else []
    return bool(others) and (not times_finite or _is_small(others[0], a))


def _is_small(value: ir.Value, a: Analysis, depth: int = 0) -> bool:
    """Is it made of booleans and of numbers from -1 to 1, without a quotient?"""
    array, node = a.constant(value), producer(value)
    if array is not None:
        return bool((np.abs(array.astype(np.float64)) <= 1).all())
    if node is None or depth > MAX_PATH:
        return False
    if op(node) == "Cast" and a.dtype(node.inputs[0]) is ir.DataType.BOOL:
        return True
    several = op(node) in ("Mul", "Sub", "Add")
    parts = node.inputs if several else node.inputs[:1] if op(node) in (*SPREADING, "Cast") else ()
    return bool(parts) and all(v is not None and _is_small(v, a, depth + 1) for v in parts)


def padded_column(node: ir.Node, axis: int, a: Analysis) -> tuple[ir.Value, bool] | None:
    """The number that a Pad puts beside the scores, as one more column of their last axis, and whether it stands in
    front of them; None where the node does anything else."""
    rank = a.rank(node.outputs[0])
    if op(node) != "Pad" or rank is None or axis != rank - 1 or operand(node, 3) is not None:
        return None
    pads = constant_ints(node, a, 1, "pads")
    if pads is None or len(pads) != 2 * rank or attribute(node, "mode", "constant") != "constant":
        return None
    if sum(map(abs, pads)) != 1 or pads[rank - 1] + pads[-1] != 1:
        return None
    fill = operand(node, 2) or Builder(a.opset).constant(np.asarray(attribute(node, "value", 0.0), np.float32))
    return fill, pads[rank - 1] == 1
