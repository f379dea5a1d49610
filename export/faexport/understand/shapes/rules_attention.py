# SPDX-License-Identifier: Apache-2.0
"""Shape rules of attention ops: ONNX's and onnxruntime's. Our own has rules_operator.py.

Registered in rules.SHAPE_RULES; imported by analysis.py. A block's input is the output of the block in front, so
without them only the first of a model that another tool fused would have a shape.
"""

from __future__ import annotations

import onnx_ir as ir

from faexport.graph.nodes import attribute, operand
from faexport.sizes.dims import Dim
from faexport.understand.shapes.known import Known, Shapes
from faexport.understand.shapes.rules import shape_of


@shape_of("Attention")
def _attention(node: ir.Node, a: Known) -> Shapes:
    query, value = a.shape(node.inputs[0]), a.shape(node.inputs[2])
    if query is None or value is None or len(query) != len(value):
        return None
    if len(query) == 4:
        return [(*query[:3], value[3])]
    heads, kv_heads = (attribute(node, n) for n in ("q_num_heads", "kv_num_heads"))
    width = value[2].divide(kv_heads) if kv_heads else None
    return None if width is None or not heads else [(*query[:2], width * heads)]


@shape_of("com.microsoft::Attention", "com.microsoft::QAttention")
def _contrib_attention(node: ir.Node, a: Known) -> Shapes:
    x, weights = a.shape(node.inputs[0]), a.shape(node.inputs[1])
    widths = attribute(node, "qkv_hidden_sizes")
    if x is None or len(x) != 3:
        return None
    width = Dim.of(widths[2]) if widths else weights[1].divide(3) if weights is not None else None
    return None if width is None else [(*x[:2], width)]


@shape_of("com.microsoft::MultiHeadAttention")
def _multi_head_attention(node: ir.Node, a: Known) -> Shapes:
    query, value = a.shape(node.inputs[0]), a.shape(operand(node, 2))
    if query is None:
        return None
    if len(query) == 5:  # [B, S, H, 3, D]
        return [(*query[:2], query[2] * query[4])]
    if operand(node, 2) is None:  # key is [B, T, H, 2, D]
        return [query]
    if value is None:
        return None
    return [(*query[:2], value[2] if len(value) == 3 else value[1] * value[3])]


@shape_of("com.microsoft::GroupQueryAttention")
def _group_query_attention(node: ir.Node, a: Known) -> Shapes:
    query = a.shape(node.inputs[0])
    heads, kv_heads = (attribute(node, n) for n in ("num_heads", "kv_num_heads"))
    if query is None or operand(node, 1) is not None or not (heads and kv_heads):
        return [query]
    head_dim = query[-1].divide(heads + 2 * kv_heads)
    return None if head_dim is None else [(*query[:-1], head_dim * heads)]
