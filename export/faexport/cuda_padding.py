# SPDX-License-Identifier: Apache-2.0
"""Writes padding as Concat, for onnxruntime's CUDA provider (Options.joins_cuda). Called by pipeline.py.

Models that attend within windows of an image pad its rows and columns first. onnxruntime's kernel of Pad finds each
element's place by divisions (measured on an H200: 0.37 ms for an image of 64 x 64 rows of 768 float16, to 70 x 70);
its kernels of Expand and Concat take a few microseconds. The last two of four axes alone have a fast kernel of Pad.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from faexport.nodes import RUNTIME_FLOATS, attribute, graphs_of, op, operand
from faexport.rewrite import Names, name_node, remove_dead, take_over
from faexport.surgery import Builder, Missing
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.rules import constant_ints, resolve_axis

Pads = dict[int, tuple[int, int]]  # by axis: rows in front, rows behind


def join(model: ir.Model, a: Analysis, names: Names) -> None:
    """Changes the model in place."""
    for graph, _ in graphs_of(model):
        for node in list(graph):
            pads = _pads_of(node, a) if op(node) == "Pad" else None
            x = operand(node, 0)
            if pads is None or x is None or a.dtype(x) not in RUNTIME_FLOATS:
                continue
            if not pads and not node.outputs[0].is_graph_output():
                ir.convenience.replace_all_uses_with(node.outputs[0], x)
                remove_dead([node])
            elif pads and not (a.rank(x) == 4 and set(pads) <= {2, 3}):
                _write(node, pads, a, names)


def _pads_of(node: ir.Node, a: Analysis) -> Pads | None:
    """What a Pad adds, where that is known, is a constant, and nothing is cut off. Axes that nothing is added to are
    left out."""
    rank = a.rank(operand(node, 0))
    if rank is None or a.opset < 11 or attribute(node, "mode", "constant") not in ("constant", b"constant"):
        return None
    sizes = a.contents(operand(node, 1))
    axes = list(range(rank)) if operand(node, 3) is None else constant_ints(node, a, 3, "axes")
    if sizes is None or axes is None or len(sizes) != 2 * len(axes):
        return None
    known = [size.const for size in sizes]
    if any(size is None or size < 0 for size in known):
        return None
    counts = [size for size in known if size is not None]
    both = zip(axes, counts[: len(axes)], counts[len(axes) :], strict=True)
    return {resolve_axis(axis, rank): (front, back) for axis, front, back in both if front or back}


def _write(node: ir.Node, pads: Pads, a: Analysis, names: Names) -> None:
    """A Concat for each axis."""
    x, number, graph = node.inputs[0], operand(node, 2), node.graph
    assert x is not None and graph is not None
    build, dtype, rank = Builder(a.opset), a.dtype(x), a.rank(x)
    assert rank is not None and dtype is not None
    try:
        number = build.constant(np.zeros((), dtype.numpy())) if number is None else number
        for axis, counts in sorted(pads.items()):
            sizes = build.add("Shape", [x], ir.DataType.INT64)
            parts = [x]
            for place, count in zip((0, 1), counts, strict=True):
                others = [build.slice(sizes, 0, axis, 0), build.ints([count]), build.slice(sizes, axis + 1, rank, 0)]
                target = build.add("Concat", others, ir.DataType.INT64, axis=0)
                rows = build.add("Expand", [number, target], dtype)
                parts.insert(place * len(parts), rows) if count else None
            x = build.add("Concat", parts, dtype, axis=axis)
    except Missing:
        return
    for made in build.nodes:
        name_node(made, node.name or "padding", names)
    graph.insert_before(node, build.nodes)
    take_over(node.outputs[0], x)
    remove_dead([node])
