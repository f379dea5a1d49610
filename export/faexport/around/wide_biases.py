# SPDX-License-Identifier: Apache-2.0
"""The bias of a packed projection, where the operator reads it with further columns. Called by cuda_wide_heads.py.

As in projection_biases.py: the keys' part is the same for all scores of a row, and the values' is added to each row of
the output, and so goes into the bias of the product behind it. Only the queries, which are copied anyway, get theirs.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from faexport.graph.edits import Names, insert_in_front
from faexport.graph.nodes import attribute, is_live, only_reader, op, producer
from faexport.graph.surgery import Builder
from faexport.understand.shapes.analysis import Analysis


@dataclasses.dataclass(frozen=True)
class Biases:
    """packed = product + (queries, keys, values), and what the output is multiplied by and added to."""

    product: ir.Value
    queries: np.ndarray
    values: np.ndarray
    behind: ir.Node  # the MatMul
    added: ir.Node


def find(node: ir.Node, packed: ir.Value, end: ir.Value, each: int, a: Analysis) -> Biases | None:
    """The parts, of `each` columns, where nothing but the operator reads the packed projection."""
    total = producer(packed)
    if total is None or op(total) != "Add" or attribute(node, "softcap", 0.0) or len(node.outputs) != 1:
        return None
    if not _is_for(packed, node):
        return None
    for product, bias in (total.inputs, total.inputs[::-1]):
        stored, multiplied = _vector(bias, 3 * each, a), producer(product)
        if product is None or stored is None or multiplied is None or op(multiplied) != "MatMul":
            continue
        behind = only_reader(end)
        weight = a.tensor(behind.inputs[1]) if behind is not None and op(behind) == "MatMul" else None
        if behind is None or behind.inputs[0] is not end or weight is None or len(weight.shape) != 2:
            return None
        added = only_reader(behind.outputs[0])
        own = _own(added, behind, weight.shape[1], a) if added is not None else None
        if added is None or own is None:
            return None
        return Biases(product, stored[:each], stored[2 * each :], behind, added)
    return None


def _is_for(packed: ir.Value, node: ir.Node) -> bool:
    """Does all that is made of a value go into the node?"""
    pending, seen = [packed], {packed}
    while pending:
        value = pending.pop()
        users = {use.node for use in value.uses() if is_live(use.node)} - {node}
        if value.is_graph_output() or (not users and not any(use.node is node for use in value.uses())):
            return False
        further = {output for user in users for output in user.outputs} - seen
        seen |= further
        pending += further
    return True


def _vector(value: ir.Value | None, size: int, a: Analysis) -> np.ndarray | None:
    tensor = a.tensor(value)
    return tensor.numpy() if tensor is not None and tuple(tensor.shape) == (size,) else None


def _own(added: ir.Node, behind: ir.Node, size: object, a: Analysis) -> np.ndarray | None:
    """The bias of the product behind the output."""
    if op(added) != "Add" or not isinstance(size, int):
        return None
    others = [value for value in added.inputs if value is not behind.outputs[0]]
    return _vector(others[0], size, a) if len(others) == 1 else None


def move(found: Biases, end: ir.Value, a: Analysis, names: Names) -> None:
    """The values' part, behind the product. `end` is what the operator gives now."""
    weight, product = a.tensor(found.behind.inputs[1]), found.behind.outputs[0]
    own = next(x for value in found.added.inputs if value is not product and (x := a.tensor(value)) is not None).numpy()
    assert weight is not None
    total = own.astype(np.float64) + found.values.astype(np.float64) @ weight.numpy().astype(np.float64)
    build = Builder(a.opset)
    bias = build.constant(total.astype(own.dtype))
    bias.shape = ir.Shape(total.shape)
    insert_in_front(found.added, build.nodes, f"{found.behind.name}_bias", names)
    for index, value in enumerate((product, bias)):
        found.added.replace_input_with(index, value)
    for value in (end, product):  # they are others now
        value.name = names.fresh(f"{value.name}_unbiased")
