# SPDX-License-Identifier: Apache-2.0
"""Attention that is not read: onnxruntime's operators of other kinds, and its softmax of quantized numbers. Each has a
row in the report, so that no model with attention is told to have none."""

from __future__ import annotations

import onnx_ir as ir

from faexport.graph.nodes import name_of, operand
from faexport.match import Context, matcher
from faexport.match.roundings import why_unread
from faexport.spec import Candidate, Refusal, RefusalKind
from faexport.understand.core.softmax import Softmax
from faexport.understand.core.value_chain import feeds_product

SOURCE = "unread"
OPERATORS = (
    "DecoderAttention",
    "DecoderMaskedSelfAttention",
    "LongformerAttention",
    "PackedAttention",
    "PackedMultiHeadAttention",
    "QAttention",
    "QOrderedAttention",
    "QOrderedLongformerAttention",
    "SparseAttention",
)
SOFTMAXES = {
    "QLinearSoftmax": (
        "the scores and the attention weights are quantized inside the block (QLinearSoftmax)",
        RefusalKind.QUANTIZED,
    ),
    "BiasSoftmax": (
        "a bias is added inside of the softmax (BiasSoftmax, which onnxruntime's optimizer writes)",
        RefusalKind.RUNTIME_OPERATOR,
    ),
}


@matcher(SOURCE, tuple(f"com.microsoft::{name}" for name in OPERATORS))
def match_operator(node: ir.Node, context: Context) -> list[Candidate]:
    why = f"onnxruntime's {node.op_type} is not read: export the model without it"
    return [Candidate(node, context.graph, SOURCE, outcome=Refusal(why, name_of(node), RefusalKind.RUNTIME_OPERATOR))]


@matcher(SOURCE, tuple(f"com.microsoft::{name}" for name in SOFTMAXES))
def match_softmax(node: ir.Node, context: Context) -> list[Candidate]:
    scores = operand(node, 0)
    if scores is None:
        return []
    softmax = Softmax(node, scores, 0, node.outputs[0], (node,))
    if not feeds_product(softmax, context.analysis):
        return []
    why, kind = SOFTMAXES[node.op_type]
    refusal = Refusal(why_unread(why, kind is RefusalKind.QUANTIZED, context), name_of(node), kind)
    return [Candidate(node, context.graph, SOURCE, outcome=refusal)]
