# SPDX-License-Identifier: Apache-2.0
"""Products and sums with a vector that is the same for many rows, for onnxruntime's CUDA provider
(Options.joins_cuda). Called by pipeline.py.

Diffusion transformers scale and shift what a normalization gives by vectors of each batch entry (adaptive layer
normalization). LayerNormalization takes such vectors in the place of its weights, from onnxruntime 1.21 on.
Where a vector is the first operand, onnxruntime's kernels find each element's place by divisions; they have fast ones
for a vector that comes second.
"""

from __future__ import annotations

import onnx_ir as ir

from faexport.graph.edits import Names, insert_in_front, remove_dead, take_over
from faexport.graph.nodes import (
    RUNTIME_FLOATS,
    attribute,
    graphs_of,
    is_read_once,
    normalizes_rows,
    op,
    operand,
    producer,
)
from faexport.graph.surgery import Builder
from faexport.understand.layout.shape_uses import shape_users
from faexport.understand.shapes.analysis import Analysis


def join(model: ir.Model, a: Analysis, names: Names) -> None:
    """Changes the model in place."""
    a.extend(model)
    for graph, _ in graphs_of(model):
        for node in list(graph):
            if op(node) == "Add" and node.graph is not None:
                _modulated(node, a, names)
        for node in graph:
            if op(node) in ("Add", "Mul"):
                _put_vector_second(node, a)


def _modulated(added: ir.Node, a: Analysis, names: Names) -> None:
    """normalized * scale + shift, where the normalization has no weights of its own."""
    for product, shift in (added.inputs, added.inputs[::-1]):
        multiplied = _before(product, "Mul", added)
        for normal, scale in (multiplied.inputs, multiplied.inputs[::-1]) if multiplied is not None else ():
            node = _before(normal, "LayerNormalization", added)
            if node is None or scale is None or shift is None or not _is_plain(node, a):
                continue
            x, vectors = node.inputs[0], (scale, shift)
            if x is None or not _are_of_entries(vectors, x, a) or a.shape(added.outputs[0]) != a.shape(x):
                continue
            if _before(x, "Add", added) is not None:
                continue  # onnxruntime up to 1.24 would join both into an operator that refuses such weights
            build = Builder(a.opset)
            words = {"axis": -1, "epsilon": attribute(node, "epsilon", 1e-5), "stash_type": 1}
            made = build.add("LayerNormalization", [x, scale, shift], a.dtype(x), **words)
            insert_in_front(added, build.nodes, node.name or "modulated", names)
            for value in (normal, product):
                for shape in shape_users(value) if value is not None else ():
                    shape.replace_input_with(0, x)  # of the same shape
            take_over(added.outputs[0], made)
            remove_dead([added])
            return


def _before(value: ir.Value | None, kind: str, last: ir.Node) -> ir.Node | None:
    """The node of this kind that makes a value which one node reads."""
    node = producer(value)
    if value is None or node is None or op(node) != kind or node.graph is not last.graph:
        return None
    return node if is_read_once(value) else None


def _is_plain(node: ir.Node, a: Analysis) -> bool:
    """Does a LayerNormalization of the last of three axes multiply by 1, and add nothing?"""
    scale, shift = a.constant(operand(node, 1)), a.constant(operand(node, 2))
    rank = a.rank(operand(node, 0))
    if rank != 3 or not normalizes_rows(node, rank):
        return False
    ones = scale is not None and bool((scale == 1).all())
    return ones and (operand(node, 2) is None or (shift is not None and not shift.any()))


def _are_of_entries(vectors: tuple[ir.Value, ir.Value], x: ir.Value, a: Analysis) -> bool:
    """Are they [B, 1, columns] for an x of [B, rows, columns]?"""
    shape = a.shape(x)
    if not shape or not shape[2].const or a.dtype(x) not in RUNTIME_FLOATS:
        return False
    alike = all(a.shape(v) == (shape[0], 1, shape[2]) and a.dtype(v) == a.dtype(x) for v in vectors)
    return alike and shape[1] != 1


def _put_vector_second(node: ir.Node, a: Analysis) -> None:
    """Where the first operand is the one that is repeated."""
    first, second = node.inputs
    shape, whole = a.shape(first), a.shape(second)
    if shape is None or not whole or shape == whole or a.dtype(first) not in RUNTIME_FLOATS:
        return
    if a.shape(node.outputs[0]) == whole and len(shape) <= len(whole) and not a.is_static(second):
        node.replace_input_with(0, second)
        node.replace_input_with(1, first)
