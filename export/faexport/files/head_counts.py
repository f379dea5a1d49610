# SPDX-License-Identifier: Apache-2.0
"""Head counts of attention operators that contradict each other or their tensors: bad input, told at once. Called by
graph_checks.py.

onnx.checker and onnx.shape_inference accept such models, runtimes refuse them when they load or, worse, when they run.
"""

from __future__ import annotations

import onnx_ir as ir

from faexport.graph.nodes import op

# op type -> (attribute of the query heads, attribute of the key and value heads)
_HEADS = {
    "Attention": ("q_num_heads", "kv_num_heads"),
    "com.microsoft::MultiHeadAttention": ("num_heads", "num_heads"),
    "com.microsoft::GroupQueryAttention": ("num_heads", "kv_num_heads"),
}


def contradiction(node: ir.Node) -> str:
    """What is wrong with the head counts of `node`, as a sentence; "" where nothing is known to be."""
    names = _HEADS.get(op(node))
    if names is None or len(node.inputs) < 3 or None in node.inputs[:3]:  # packed QKV among them
        return ""
    query_heads = _heads(node, 0, names[0])
    key_heads = _heads(node, 1, names[1])
    if query_heads and key_heads and query_heads % key_heads:
        return f"{query_heads} query heads are not a multiple of {key_heads} key and value heads"
    for position, (what, heads) in enumerate((("query", query_heads), ("key", key_heads), ("value", key_heads))):
        width = _size(node, position, 3, 2)
        if heads and isinstance(width, int) and width % heads:
            return f"{what} is {width} wide, which does not divide into {heads} heads"
    return ""


def _heads(node: ir.Node, position: int, attribute: str) -> int | None:
    """From axis 1 of a 4-D tensor [B, H, S, D], else from the attribute."""
    size = _size(node, position, 4, 1)
    return size if isinstance(size, int) else node.attributes.get_int(attribute, 0) or None


def _size(node: ir.Node, position: int, rank: int, axis: int) -> int | ir.SymbolicDim | None:
    value = node.inputs[position] if position < len(node.inputs) else None
    return value.shape[axis] if value is not None and value.shape is not None and len(value.shape) == rank else None
