# SPDX-License-Identifier: Apache-2.0
"""Normalizations that a graph spells out become one operator of onnxruntime. Called by joins.py, whose rules join that
with the residual in front of it.

Below opset 17 exports spell layer normalizations out, and in most opsets root-mean-square normalizations. A layer
normalization is a root-mean-square normalization of rows less their mean, and perhaps a bias behind it. One part alone
is never replaced: onnxruntime's own optimizer would no longer know the whole.
"""

from __future__ import annotations

import onnx_ir as ir

from faexport.graph.edits import Names, insert_in_front, remove_dead, take_over
from faexport.graph.nodes import RUNTIME_FLOATS, graphs_of, is_read_once, only_reader, op, producer
from faexport.understand.core.head_norm import HeadNorm, head_norm_of, mean_of_rows
from faexport.understand.shapes.analysis import Analysis

LAYER, ROOT_MEAN_SQUARE = "LayerNormalization", "SimplifiedLayerNormalization"
FIRST_OPSET_OF_LAYER = 17  # of ONNX's own operator


def misplaced(model: ir.Model) -> tuple[str, ...]:
    """Operators of onnxruntime that lie in ONNX's own domain, though its opset of the model has none such."""
    opset = model.opset_imports.get("", FIRST_OPSET_OF_LAYER)
    return (ROOT_MEAN_SQUARE,) if opset >= FIRST_OPSET_OF_LAYER else (ROOT_MEAN_SQUARE, LAYER)


def join(model: ir.Model, a: Analysis, names: Names) -> None:
    """Changes the model in place: normalizations in any of the spellings that are also read in front of attention."""
    for graph, _ in graphs_of(model):
        for node in list(graph):
            if node.graph is None or op(node) not in ("Mul", "Cast"):  # else it was part of one that was found before
                continue
            norm, value = head_norm_of(node.outputs[0], a), node.outputs[0]
            if norm is None or a.dtype(value) not in RUNTIME_FLOATS or a.dtype(norm.weight) != a.dtype(value):
                continue
            _write(node, norm, a, names)


def _write(node: ir.Node, norm: HeadNorm, a: Analysis, names: Names) -> None:
    """One operator for what ends with `node`, or with the bias behind it."""
    words = {"axis": -1, "epsilon": norm.epsilon, "stash_type": 1}
    if (whole := _less_mean(norm.source, a)) is None:
        last, joined = node, ir.node(ROOT_MEAN_SQUARE, [norm.source, norm.weight], words)
    else:
        added, bias = _bias_behind(node, norm, a)
        last = added or node
        joined = ir.node(LAYER, [whole, norm.weight, *([bias] if bias is not None else [])], words)
    insert_in_front(last, [joined], last.name or "joined", names)
    take_over(last.outputs[0], joined.outputs[0])
    remove_dead([last])


def _less_mean(value: ir.Value, a: Analysis) -> ir.Value | None:
    """x where the value is x less its mean over the last axis."""
    node = producer(value)
    if node is None or op(node) != "Sub":
        return None
    x, mean = node.inputs
    return x if x is not None and mean_of_rows(mean, a) is x else None


def _bias_behind(node: ir.Node, norm: HeadNorm, a: Analysis) -> tuple[ir.Node | None, ir.Value | None]:
    """The Add of a vector as long as the weight, where nothing else reads what the node gives, and that vector."""
    value = node.outputs[0]
    added = only_reader(value) if is_read_once(value) else None
    if added is None or op(added) != "Add" or added.graph is not node.graph:
        return None, None
    bias = added.inputs[1] if added.inputs[0] is value else added.inputs[0]
    fits = bias is not value and a.shape(bias) == a.shape(norm.weight) and a.dtype(bias) == a.dtype(value)
    return (added, bias) if fits else (None, None)
