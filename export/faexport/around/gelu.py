# SPDX-License-Identifier: Apache-2.0
"""Writes GELU as onnxruntime recognises it when it loads a model: its factor 0.5 last. Called by pipeline.py.

PyTorch's newer exporter writes x · (0.5 · (1 + erf(x / √2))) up to opset 19, which onnxruntime computes operator by
operator. Where the factor 0.5 comes last, onnxruntime joins the whole, with the bias in front of it, into one operator.
A factor of 0.5 changes no digit of a float32 number wherever it stands, unless |x| is above 1.7e38 or the result below
1e-37. The operators stay those of ONNX.
"""

from __future__ import annotations

import onnx_ir as ir

from faexport.graph.edits import Names
from faexport.graph.nodes import graphs_of, op, producer
from faexport.understand.shapes.analysis import Analysis


def put_half_last(model: ir.Model, a: Analysis, names: Names) -> str:
    """Changes the model in place. Returns a note that counts the places, or "" where there are none."""
    count = sum(_turned(node, a, names) for graph, _ in graphs_of(model) for node in graph)
    if not count:
        return ""
    return f"the factor 0.5 of {count} GELU{'s' * (count != 1)} was moved to the end, where onnxruntime recognises them"


def _turned(node: ir.Node, a: Analysis, names: Names) -> bool:
    if op(node) != "Mul":
        return False
    for at, other in ((0, 1), (1, 0)):
        x, halved = node.inputs[at], producer(node.inputs[other])
        if x is None or halved is None or op(halved) != "Mul" or a.dtype(x) != ir.DataType.FLOAT:
            continue
        place = next((i for i in (0, 1) if _is_scalar(halved.inputs[i], 0.5, a)), None)
        (product,) = halved.outputs
        if place is None or product.is_graph_output() or len(product.uses()) != 1:
            continue
        if _is_one_plus_erf_of(halved.inputs[1 - place], x, a):
            half = halved.inputs[place]
            halved.replace_input_with(place, x)
            node.replace_input_with(at, half)
            product.name = names.fresh(f"{product.name}_whole")  # it is another value now
            return True
    return False


def _is_one_plus_erf_of(value: ir.Value | None, x: ir.Value, a: Analysis) -> bool:
    """1 + erf(x / c), of whatever c."""
    added = producer(value)
    if added is None or op(added) != "Add":
        return False
    for one, erf in (added.inputs, reversed(added.inputs)):
        found = producer(erf)
        divided = producer(found.inputs[0]) if found is not None and op(found) == "Erf" else None
        if _is_scalar(one, 1.0, a) and divided is not None and op(divided) == "Div":
            return divided.inputs[0] is x and a.rank(divided.inputs[1]) == 0
    return False


def _is_scalar(value: ir.Value | None, number: float, a: Analysis) -> bool:
    """Without axes, so that a product has the shape of the other factor."""
    constant = a.constant(value)
    return constant is not None and constant.shape == () and constant == number
