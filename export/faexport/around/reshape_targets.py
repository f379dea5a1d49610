# SPDX-License-Identifier: Apache-2.0
"""Keeps onnxruntime's optimizer from leaving a size open that the model computes. Called by pipeline.py before
declare.py says what is proven of shapes.

Where onnxruntime knows the shape of what a Reshape is given, it writes 0 for a computed size that stays in its place
and -1 for one that doesn't. Without elements, in a batch of 0, such a Reshape fails, which the model's own doesn't.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from faexport.graph.edits import Names, insert_in_front
from faexport.graph.nodes import attribute, graphs_of, op, operand, producer
from faexport.graph.surgery import FIRST_OPSET, Builder
from faexport.sizes.dims import product
from faexport.understand.shapes.analysis import Analysis


def keep_computed(model: ir.Model, a: Analysis, names: Names) -> None:
    """Makes each target that onnxruntime would write as 0 and -1 one that it leaves alone.

    Args:
        a: knows the model as it is now.
    """
    for graph, _ in graphs_of(model):
        if isinstance(graph, ir.Function):
            continue
        for node in list(graph):
            moved = _moved_size(node, a) if op(node) == "Reshape" else None
            if moved is not None and a.opset >= FIRST_OPSET["Where"]:
                _write_target(node, moved, a, names)


def _moved_size(reshape: ir.Node, a: Analysis) -> int | None:
    """Which computed size, one of several, is not that of the data at its place; None where the file says all of the
    data's shape, or where ONNX's own 0 or -1 is in the target."""
    data, target = operand(reshape, 0), operand(reshape, 1)
    concat = producer(target)
    if data is None or concat is None or op(concat) != "Concat" or attribute(reshape, "allowzero", 0):
        return None
    if data.shape is not None and all(isinstance(dim, int) or dim.value for dim in data.shape):
        return None
    sizes, own = a.contents(target), a.shape(data)
    if sizes is None or own is None or any(size in (0, -1) for size in sizes) or product(sizes) != product(own):
        return None
    parts = [part for part in concat.inputs for _ in a.contents(part) or ()]  # of each size
    computed = [k for k, part in enumerate(parts) if producer(part) is not None and a.tensor(part) is None]
    moved = [k for k in computed if k >= len(own) or sizes[k] != own[k]]
    return moved[0] if len(parts) == len(sizes) and len(computed) > 1 and len(moved) == 1 else None


def _write_target(reshape: ir.Node, moved: int, a: Analysis, names: Names) -> None:
    """The same sizes, but -1 where that one alone is 0, which stands for the data's size at its place: onnxruntime may
    have written -1 there before, and such a model runs."""
    target, build = operand(reshape, 1), Builder(a.opset)
    sizes = a.contents(target) or ()
    zeros = build.add("Equal", [target, build.ints([0])], ir.DataType.BOOL)
    count = build.add("Cast", [zeros], ir.DataType.INT64, to=int(ir.DataType.INT64))
    count = build.add("ReduceSum", [count, build.ints([0])], ir.DataType.INT64, keepdims=1)
    is_single = build.add("Equal", [count, build.ints([1])], ir.DataType.BOOL)
    at_place = build.constant(np.arange(len(sizes)) == moved)
    is_open = build.add("And", [zeros, build.add("And", [is_single, at_place], ir.DataType.BOOL)], ir.DataType.BOOL)
    new = build.add("Where", [is_open, build.ints([-1]), target], ir.DataType.INT64)
    new.shape = ir.Shape([len(sizes)])
    insert_in_front(reshape, build.nodes, f"{reshape.name}_sizes", names)
    reshape.replace_input_with(1, new)
