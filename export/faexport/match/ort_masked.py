# SPDX-License-Identifier: Apache-2.0
"""onnxruntime's DecoderMaskedMultiHeadAttention (com.microsoft): one query row, on keys and values of an encoder, or
on a cache of fixed capacity. The first is read. The second keeps its keys in an order of its own on CUDA, which other
nodes of the model and the caller have agreed upon, and is left."""

from __future__ import annotations

import onnx_ir as ir

from faexport.graph.nodes import attribute, operand
from faexport.match import Context, matcher
from faexport.match.onnx_attention import used_output
from faexport.match.ort_contrib import Contrib, Unfit, examined
from faexport.sizes.dims import plain
from faexport.spec import AttentionSpec, Candidate, Layout, Operand, RefusalKind

SOURCE = "ort_contrib"
QUERY, KEY, VALUE, PADDING, BIAS, PAST_KEY, PAST_VALUE, PAST_LENGTH, BEAM_WIDTH, BEAMS, PROJECTION_BIAS = range(11)


@matcher(SOURCE, ("com.microsoft::DecoderMaskedMultiHeadAttention",))
def match(node: ir.Node, context: Context) -> list[Candidate]:
    return examined(_Masked, node, context)


class _Masked(Contrib):
    def spec(self, candidate: Candidate) -> AttentionSpec:
        self._refuse()
        a, (query, key, value) = self.a, (operand(self.node, i) for i in (QUERY, KEY, VALUE))
        shapes = [a.shape(x) for x in (query, key, value)]
        if query is None or key is None or value is None or None in shapes:
            raise Unfit("the shapes of its query, key and value are not known", RefusalKind.UNKNOWN_SIZES)
        rows, keys, values = (shape for shape in shapes if shape is not None)
        sizes = [keys[3].const, values[3].const]
        operands = [
            Operand(query, Layout.BSH, self.heads, sizes[0]),
            *(Operand(x, Layout.BHSD, self.heads, size) for x, size in zip((key, value), sizes, strict=True)),
        ]
        mask = self.mask(operand(self.node, PADDING), None, rows[0], keys[2], has_past=False)
        candidate.sizes.update(batch_size=plain(rows[0]), seqlen_q=plain(rows[1]), seqlen_kv=plain(keys[2]))
        return self.finish(candidate, operands, mask)

    def _refuse(self) -> None:
        """Raises Unfit with all that stands in the way."""
        has = {i: operand(self.node, i) is not None for i in range(11)}
        obstacles = {
            "its cache of keys has an order of onnxruntime's own on CUDA (past_present_share_buffer)": has[PAST_KEY]
            or bool(attribute(self.node, "past_present_share_buffer", 0)),
            "its keys are read from other entries, along beams (beam_width, cache_indirection)": has[BEAM_WIDTH]
            or has[BEAMS],
            "onnxruntime has no bias on the keys of an encoder (attention_bias)": has[BIAS] and not has[PAST_KEY],
            "it adds a projection bias (bias)": has[PROJECTION_BIAS],
            "the model asks for the attention scores too (qk)": used_output(self.node, 3) is not None
            and RefusalKind.SCORES_READ,
            "its keys and values are not those of an encoder, in heads": not has[PAST_KEY]
            and (self.a.rank(operand(self.node, KEY)) != 4 or self.a.rank(operand(self.node, VALUE)) != 4),
        }
        self.refuse(obstacles)

    def holds_keys(self) -> tuple[ir.Value, int]:
        key = operand(self.node, KEY)
        assert key is not None  # _refuse has asked
        return key, 2
