# SPDX-License-Identifier: Apache-2.0
"""onnxruntime's PagedAttention (com.microsoft): packed sequences, each on a cache of its own that lies in pages.

The packed rows become a batch entry of their own, as the operator has them; pages, tables and lengths carry over one to
one, and the cache is changed in place by both. attention_metadata only bounds the sizes of launches, and is not needed.
"""

from __future__ import annotations

import onnx_ir as ir

from faexport.graph.nodes import attribute, name_of
from faexport.match import Context, matcher
from faexport.match.ort_cached import Cached, examined_cached
from faexport.match.ort_contrib import Unfit
from faexport.sizes.dims import plain
from faexport.spec import AttentionSpec, Candidate, Fact, Mask, Operand, RefusalKind

SOURCE = "ort_contrib"
SLOTS = (
    "query", "key", "value", "past_key", "past_value", "cu_seqlens_q", "write_indices", "block_table", "cos_cache",
    "sin_cache", "slot_mapping", "sinks", "q_norm_weight", "k_norm_weight", "k_scale", "v_scale",
)  # fmt: skip
_NAMES = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16", ir.DataType.INT8: "int8"}
_NAMES |= {ir.DataType.FLOAT8E4M3FN: "float8e4m3fn"}


@matcher(SOURCE, ("com.microsoft::PagedAttention",))
def match(node: ir.Node, context: Context) -> list[Candidate]:
    return examined_cached(_Paged, node, context)


class _Paged(Cached):
    PLACES = {name: i for i, name in enumerate(SLOTS)}

    def spec(self, candidate: Candidate) -> AttentionSpec:
        self.refuse({**self.obstacles_of_both(), **self._obstacles(), **self.obstacles_of_cache_types()})
        operands = self._operands(candidate)
        self.words["cache"] = "paged"
        for name in ("cu_seqlens_q", "write_indices", "block_table"):
            self.inputs[name] = self.required(name)
        if (slots := self.given("slot_mapping")) is not None:
            self.inputs["slot_mapping"] = slots
            self.fact("new rows go to the slots that are given")
        self.norm()
        self.rotary()
        self.scales(operands[1].head_dim)
        self.fact("packed sequences on a cache in pages, which is changed in place")
        spec = self.finish(candidate, operands, self._mask(), sinks=self.sinks())
        self._unpack(spec)
        return self.complete(candidate, spec)

    def _obstacles(self) -> dict[str, bool]:
        node, names = self.node, ("cu_seqlens_q", "write_indices", "block_table")
        word = {side: attribute(node, f"{side}_cache_dtype", "") for side in "kv"}
        types = dict(zip("kv", (self.a.dtype(past) for past in self.past), strict=True))
        other = {side: word[side] not in ("", _NAMES.get(types[side])) for side in "kv"}  # type: ignore[arg-type]
        is_latent = attribute(node, "kv_cache_layout", "SEPARATE") != "SEPARATE"
        return {
            "its cache is a latent one, which holds keys and values in the same columns (kv_cache_layout)": is_latent,
            "it has a cache of keys or of values alone": not is_latent and not all(self.past),
            "its values have fewer columns than its keys (v_head_size)": bool(attribute(node, "v_head_size", 0)),
            "its rotary embedding begins behind the first column of a head (rotary_offset)": bool(
                attribute(node, "rotary_offset", 0)
            ),
            "it has no lengths, or no pages (cumulative_sequence_length, past_seqlens, block_table)": any(
                self.given(name) is None for name in names
            ),
            "its pages hold two numbers of 4 bits in a byte, of which onnxruntime does not say how they are signed "
            "(k_cache_dtype, v_cache_dtype)": ir.DataType.UINT8 in types.values(),
            "its cache is said to hold another type than it has (k_cache_dtype, v_cache_dtype)": any(other.values())
            and ir.DataType.UINT8 not in types.values(),
        }

    def _operands(self, candidate: Candidate) -> list[Operand]:
        """The packed rows [tokens, H·D] as [1, tokens, H·D]."""
        query = self.required("query")
        shape, table = self.a.shape(query), self.a.shape(self.given("block_table"))
        width = shape[1].const if shape is not None and len(shape) == 2 else None
        if shape is None or width is None:
            raise Unfit("the shape of its query is not known", RefusalKind.UNKNOWN_SIZES)
        batch = plain(table[0]) if table else None
        candidate.sizes.update(batch_size=batch, seqlen_q=plain(shape[0]), seqlen_kv=None)
        key, value = (
            None if side is None else self.build.unsqueeze(side, 0) for side in (self.given("key"), self.given("value"))
        )
        return self.operands(self.build.unsqueeze(query, 0), key, value, width)

    def _mask(self) -> Mask:
        """A local window counts the row's own key, as in GroupQueryAttention."""
        name = (name_of(self.node),)
        causal = bool(attribute(self.node, "is_causal", 1))
        facts = [Fact("causal", name)] if causal else []
        if self.window > 0:
            facts.append(Fact(f"window ({self.window - 1}, {0 if causal else -1})", name))
        left, right = max(self.window - 1, -1), 0 if causal else -1
        return Mask(window_left=left, window_right=right, facts=tuple(facts))

    def _unpack(self, spec: AttentionSpec) -> None:
        """The output without the batch axis."""
        spec.output_entry = ir.Value(name="packed")
        spec.output_entry.dtype = self.dtype
        rows = len(self.build.nodes)
        self.build.squeeze(spec.output_entry, 0)
        spec.output_nodes = tuple(self.build.nodes[rows:])
        spec.new_nodes = tuple(self.build.nodes[:rows])
