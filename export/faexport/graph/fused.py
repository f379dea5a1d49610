# SPDX-License-Identifier: Apache-2.0
"""Reads the operator's own node, and exchanges its optional inputs: what is named by attributes of the node."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from faexport.spec import DOMAIN, NUM_REQUIRED, OP_TYPE, Layout, listed

LAYOUTS = ("query_layout", "key_layout", "value_layout")  # attributes, in the order of the inputs


def is_fused(node: ir.Node) -> bool:
    """Is it the operator?"""
    return node.domain == DOMAIN and node.op_type == OP_TYPE


def optional_inputs(node: ir.Node) -> list[str]:
    """Names of the inputs behind query, key and value, in their order."""
    return listed(node.attributes.get_string("optional_inputs", ""))


def optional_outputs(node: ir.Node) -> list[str]:
    """Names of the outputs behind the first, in their order."""
    return listed(node.attributes.get_string("optional_outputs", ""))


def layouts_of(node: ir.Node) -> tuple[Layout, ...]:
    """Of query, key, value and output."""
    heads = [node.attributes.get_int(name, 0) for name in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
    found = []
    for value, name, count in zip(node.inputs, LAYOUTS, heads, strict=False):
        word = node.attributes.get_string(name, "")
        rank = len(value.shape) if value is not None and value.shape is not None else 3 if count else 4
        found.append(Layout(word) if word else Layout.BSH if rank == 3 else Layout.BHSD)
    word = node.attributes.get_string("output_layout", "")
    return (*found, Layout(word) if word else found[0])


def set_optional_inputs(node: ir.Node, named: Sequence[tuple[str, ir.Value | None]]) -> None:
    """The inputs behind value, and the attribute that names them. Constants that nothing reads any more go."""
    old = list(node.inputs[NUM_REQUIRED:])
    node.resize_inputs(NUM_REQUIRED + len(named))
    for k, (_, value) in enumerate(named):
        node.replace_input_with(NUM_REQUIRED + k, value)
    if named:
        node.attributes["optional_inputs"] = ir.AttrString("optional_inputs", ",".join(name for name, _ in named))
    else:
        node.attributes.pop("optional_inputs", None)
    for value in (v for v in old if v is not None):
        producer = value.producer()
        if producer is not None and producer.op_type == "Constant" and not value.uses() and producer.graph is not None:
            producer.graph.remove(producer, safe=True)
