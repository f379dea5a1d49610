# SPDX-License-Identifier: Apache-2.0
"""Makes one Reshape of several that stand one behind the other, for onnxruntime (Options.joins_rest). Called by
pipeline.py.

A Reshape moves nothing, but the host spends a few microseconds on each, which a GPU waits for in models of many small
kernels.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from faexport.around.known_sizes import as_numbers
from faexport.graph.edits import Names, insert_in_front, remove_dead
from faexport.graph.nodes import given, graphs_of, op, producer
from faexport.graph.surgery import Builder
from faexport.understand.shapes.analysis import Analysis

_VIEWS = ("Reshape", "Squeeze", "Unsqueeze")


def join(model: ir.Model, a: Analysis, names: Names) -> None:
    """Changes the model in place."""
    a.extend(model)
    for graph, _ in graphs_of(model):
        for node in list(graph):
            if op(node) == "Reshape" and node.graph is not None:
                _join(node, a, names)


def _join(node: ir.Node, a: Analysis, names: Names) -> None:
    """Has a Reshape read what is in front of those in front of it, or what reads it do so."""
    value = source = given(node, 0)
    before = producer(source)
    while before is not None and op(before) in _VIEWS and before.graph is node.graph and _is_known(source, a):
        source = given(before, 0)
        before = producer(source)
    result = node.outputs[0]
    if not (_is_known(source, a) and _is_known(result, a)):
        return
    own, sizes = a.known_shape(source), a.known_shape(result)
    if own == sizes and not result.is_graph_output():
        ir.convenience.replace_all_uses_with(result, source)
        remove_dead([node])
        return
    numbers = as_numbers(own, sizes) if source is not value else None
    if numbers is None:
        return
    build = Builder(a.opset)
    target = build.constant(np.asarray(numbers, np.int64))
    old = producer(node.inputs[1])
    insert_in_front(node, build.nodes, node.name or "reshaped", names)
    node.replace_input_with(0, source)
    node.replace_input_with(1, target)
    node.attributes.pop("allowzero", None)
    remove_dead([producer(value), old])


def _is_known(value: ir.Value, a: Analysis) -> bool:
    """Is the first size alone open? With more of them a Reshape may fail where one that takes its place does not."""
    shape = a.shape(value)
    return shape is not None and len(shape) > 0 and all(size.const for size in shape[1:])
