# SPDX-License-Identifier: Apache-2.0
"""Small questions about nodes and values of a graph that every part of the exporter asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from faexport.spec import DOMAIN

ONNX_DOMAINS = ("", "ai.onnx")
RUNTIME_DOMAIN = "com.microsoft"  # of onnxruntime's own operators
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
# Those for which onnxruntime has its own operators on every provider.
RUNTIME_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Identity")  # elements stay in their order
LEAVES = frozenset(
    ("Constant", "Unsqueeze", "Concat", "Gather", "Shape", "Reshape", "Transpose", "Cast", "MatMul", "Mul", "Add")
)  # for speed


def op(node: ir.Node | None) -> str:
    """The operator's name, "domain::name" outside ONNX's own domain, "" for no node."""
    if node is None:
        return ""
    return node.op_type if node.domain in ONNX_DOMAINS else f"{node.domain}::{node.op_type}"


def producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def maker(value: ir.Value) -> ir.Node:
    """The node of a value that is known to be the output of one."""
    node = value.producer()
    assert node is not None
    return node


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The attribute's Python value; `default` where it is absent or refers to an attribute of a function."""
    attr = node.attributes.get(name)
    return default if attr is None or attr.is_ref() else attr.value


def operand(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def given(node: ir.Node, index: int) -> ir.Value:
    """An input that an ONNX operator requires: proto_checks.py refuses models that lack one."""
    value = node.inputs[index]
    assert value is not None
    return value


def name_of(node: ir.Node) -> str:
    return node.name or (node.outputs[0].name if node.outputs else "") or node.op_type


def is_live(node: ir.Node, _depth: int = 0) -> bool:
    """False where nothing can depend on the node: its outputs are read by no live node and are no graph outputs."""
    if _depth > 8:
        return True
    return any(v.is_graph_output() or any(is_live(u.node, _depth + 1) for u in v.uses()) for v in node.outputs)


def dtype_name(dtype: ir.DataType | None) -> str | None:
    """By the name that NumPy has for it, as everywhere in a report; None where the type isn't known."""
    return None if dtype is None else str(dtype.numpy())


def is_read_once(value: ir.Value) -> bool:
    """Does one node alone read it, but for its shape?"""
    return not value.is_graph_output() and len(data_users(value)) == 1


def only_reader(value: ir.Value) -> ir.Node | None:
    """The node that reads it, where one alone does whose results matter."""
    readers = live_users(value)
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def normalizes_rows(node: ir.Node, rank: int) -> bool:
    """Does a LayerNormalization take the last of so many axes, in float32, and give nothing but the result?"""
    plain = attribute(node, "axis", -1) in (-1, rank - 1) and attribute(node, "stash_type", 1) == 1
    return plain and not any(value.uses() or value.is_graph_output() for value in node.outputs[1:])


def is_transpose(node: ir.Node | None, perm: list[int]) -> bool:
    """Is it the Transpose with this permutation?"""
    return node is not None and op(node) == "Transpose" and list(attribute(node, "perm") or ()) == perm


def always_runs(node: ir.Node) -> bool:
    """Does an output of the node's graph depend on it, by nodes of that graph? Then no run of that graph omits it."""
    pending, seen = [node], {node}
    while pending:
        values = pending.pop().outputs
        if any(v.is_graph_output() for v in values):
            return True
        users = {u.node for v in values for u in v.uses() if u.node.graph is node.graph} - seen
        seen |= users
        pending += users
    return False


def live_users(value: ir.Value) -> list[ir.Node]:
    """The nodes whose results matter and that read `value`, each once, in the order of their use."""
    return list(dict.fromkeys(use.node for use in value.uses() if is_live(use.node)))


def outermost_graphs(model: ir.Model) -> tuple[ir.Graph | ir.Function, ...]:
    """The main graph and the functions, which hold all the others."""
    return (model.graph, *model.functions.values())


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Those of all graphs and functions, however deep they are nested."""
    for graph in outermost_graphs(model):
        yield from graph.all_nodes()


def own_functions(model: ir.Model) -> list[ir.Function]:
    """The model's functions without the one that stands in for our operator."""
    return [f for f in model.functions.values() if f.domain != DOMAIN]


def own_graphs(model: ir.Model) -> tuple[ir.Graph | ir.Function, ...]:
    """The main graph and those functions."""
    return (model.graph, *own_functions(model))


def graphs_of(model: ir.Model) -> Iterator[tuple[ir.Graph | ir.Function, ir.Graph | ir.Function]]:
    """(graph, the main graph or function that it is nested in) for all graphs, outer before inner."""
    pending = [(graph, graph) for graph in own_graphs(model)]
    while pending:
        graph, root = pending.pop(0)
        yield graph, root
        pending.extend((body, root) for node in graph for body in subgraphs(node))


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    if node.op_type in LEAVES:
        return
    for attr in node.attributes.values():
        if attr.type == ir.AttributeType.GRAPH and not attr.is_ref():
            yield attr.value
        elif attr.type == ir.AttributeType.GRAPHS and not attr.is_ref():
            yield from attr.value


def data_users(value: ir.Value) -> list[ir.Node]:
    """live_users without those that only ask for the shape."""
    return [node for node in live_users(value) if op(node) != "Shape"]
