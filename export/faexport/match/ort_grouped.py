# SPDX-License-Identifier: Apache-2.0
"""onnxruntime's GroupQueryAttention (com.microsoft) without a cache: prompts of decoders, padded on the right to one
length.

With a past its keys are placed by each entry's own length, which the operator's past isn't; that, rotary embedding
inside the node and quantized caches are refused.
"""

from __future__ import annotations

import onnx_ir as ir

from faexport.match import Context, matcher
from faexport.match.onnx_attention import used_output
from faexport.match.ort_contrib import Contrib, Unfit
from faexport.nodes import attribute, name_of, operand
from faexport.spec import Alignment, AttentionSpec, Candidate, Fact, Layout, Mask, Operand, Refusal
from faexport.understand.shapes.dims import plain

SOURCE = "ort_contrib"
UNFIT_INPUTS = {
    7: "rotates query and key itself",
    8: "rotates query and key itself",
    12: "has a quantized cache",
    13: "has a quantized cache",
    14: "normalises query and key itself",
    15: "normalises query and key itself",
}


@matcher(SOURCE, ("com.microsoft::GroupQueryAttention",))
def match(node: ir.Node, context: Context) -> list[Candidate]:
    candidate = Candidate(node, context.graph, SOURCE)
    try:
        candidate.outcome = _Grouped(node, context).spec(candidate)
    except Unfit as reason:
        candidate.outcome = Refusal(str(reason), name_of(node))
    return [candidate]


class _Grouped(Contrib):
    """Inputs: query, key, value, past_key, past_value, seqlens_k, total_sequence_length, cos, sin, positions, bias,
    sinks, …"""

    def spec(self, candidate: Candidate) -> AttentionSpec:
        node, a = self.node, self.a
        self._refuse()
        kv_heads = attribute(node, "kv_num_heads", 0)
        query, key, value = (operand(node, i) for i in range(3))
        shape = a.shape(query)
        width = shape[2].const if shape is not None and len(shape) == 3 else None
        if query is None or shape is None or width is None or not kv_heads:
            raise Unfit("the shape of its query or the number of its key heads is not known")
        size = width // (self.heads + 2 * kv_heads if key is None else self.heads)
        if key is None:
            starts = (0, self.heads * size, (self.heads + kv_heads) * size)
            operands = [
                Operand(query, Layout.BSH, n, size, start, size)
                for n, start in zip((self.heads, kv_heads, kv_heads), starts, strict=True)
            ]
        elif value is not None:
            operands = [
                Operand(v, Layout.BSH, n, size)
                for v, n in zip((query, key, value), (self.heads, kv_heads, kv_heads), strict=True)
            ]
        else:
            raise Unfit("it has keys and no values")
        candidate.sizes.update(batch_size=plain(shape[0]), seqlen_q=plain(shape[1]), seqlen_kv=plain(shape[1]))
        spec = self.finish(candidate, operands, self._mask(), sinks=self._sinks())
        candidate.sizes["num_kv_heads"] = kv_heads
        spec.softcap = attribute(node, "softcap", 0.0)
        return spec

    def _refuse(self) -> None:
        node = self.node
        if operand(node, 3) is not None or operand(node, 4) is not None:
            raise Unfit("it has a cache whose entries have lengths of their own (past_key, past_value)")
        if any(used_output(node, i) is not None for i in (1, 2)):
            raise Unfit("it fills a cache of the model's outputs (present_key, present_value)")
        if used_output(node, 3) is not None or attribute(node, "qk_output", 0):
            raise Unfit("the model asks for the attention scores too (output_qk)")
        for index, what in UNFIT_INPUTS.items():
            if operand(node, index) is not None and (index not in (7, 8) or attribute(node, "do_rotary", 0)):
                raise Unfit(f"it {what}")
        if (
            attribute(node, "do_rotary", 0)
            or attribute(node, "smooth_softmax", 0) == 1
            or attribute(node, "sliding_window_cache", 0)
        ):
            raise Unfit("it rotates query and key, smooths the softmax or keeps a window of the cache itself")
        if not attribute(node, "causal", 1):
            raise Unfit("it is not causal, which onnxruntime's versions treat differently")

    def _mask(self) -> Mask:
        """Causal; the keys of an entry end at seqlens_k + 1. A local window of w reads w keys besides the own."""
        window = attribute(self.node, "local_window_size", -1)
        if window >= 0:
            raise Unfit("its local window is counted differently by onnxruntime's versions")
        one = self.build.add("Constant", (), ir.DataType.INT32, value=ir.tensor([1], ir.DataType.INT32))
        lengths = self.build.add("Add", [self.node.inputs[5], one], ir.DataType.INT32)
        bias = operand(self.node, 10)
        facts = (Fact("causal", (name_of(self.node),)), Fact("padding as lengths", (name_of(self.node),)))
        return Mask(window_right=0, alignment=Alignment.TOP_LEFT, kv_lengths=lengths, attn_bias=bias, facts=facts)

    def _sinks(self) -> ir.Value | None:
        sinks = operand(self.node, 11)
        if sinks is None or self.a.dtype(sinks) == ir.DataType.FLOAT:
            return sinks
        return self.build.add("Cast", [sinks], ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
