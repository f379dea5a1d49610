# SPDX-License-Identifier: Apache-2.0
"""Has onnxruntime round to half precision where a model says so. Called by reference.py, side_by_side.py
and recompute.py.

On the CPU most operators have no half-precision kernel. onnxruntime runs these in float32 and casts between them, and
of two casts that undo each other it keeps none: what follows reads numbers that were never rounded, where a GPU rounds
each. An Identity has a kernel for every type, so a tensor that passes through one is rounded; through two, since a node
by itself among those of float32 is made one of them. Optimizations would take them out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as ir

from faexport.graph.nodes import HALVES, graphs_of
from faexport.understand.shapes.analysis import Analysis

TypeOf = Callable[[ir.Value], ir.DataType | None]


def round_all(model: ir.Model) -> ir.Model:
    """Each half-precision result of a node, but for the model's outputs. Changes the model in place."""
    a = Analysis(model)
    for graph, _ in graphs_of(model):
        round_values([value for node in graph for value in node.outputs], a.dtype)
    return model


def rounded_by_itself(value: ir.Value, emit: Callable[[str, ir.Value], ir.Value]) -> ir.Value:
    """The value rounded, for those who read what this gives; `emit` appends a node of a type to a graph."""
    return emit("Identity", emit("Identity", value))


def round_values(values: Iterable[ir.Value], type_of: TypeOf) -> None:
    """All who read these values, if they are results of nodes in half precision, read an Identity's result instead."""
    for value in values:
        node = value.producer()
        if node is None or node.graph is None or type_of(value) not in HALVES:
            continue
        readers, made, last = list(value.uses()), [], value
        for number in range(2):
            made.append(ir.node("Identity", [last], name=f"faexport_rounded_{number} {value.name}"))
            last = made[-1].outputs[0]
            last.name, last.type, last.shape = made[-1].name, value.type, value.shape
        node.graph.insert_after(node, made)
        for reader, index in readers:
            reader.replace_input_with(index, last)
