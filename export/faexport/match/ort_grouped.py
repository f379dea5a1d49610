# SPDX-License-Identifier: Apache-2.0
"""onnxruntime's GroupQueryAttention (com.microsoft): the attention of decoders as onnxruntime-genai's model builder
writes them, with its cache, norm, rotary embedding, windows and quantization.

seqlens_k + 1 keys of an entry are in use, and its new rows are the last of these. Its cache has at least
total_sequence_length rows, so a tensor with as many columns goes along (kv_extent). What can't be said in the
operator's words is refused with every obstacle.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import attribute, name_of, op, producer
from faexport.match import Context, matcher
from faexport.match.masks import understand
from faexport.match.onnx_attention import used_output
from faexport.match.ort_cached import Cached, examined_cached
from faexport.match.ort_contrib import Obstacles, Unfit
from faexport.sizes.dims import Dim, plain
from faexport.spec import (
    Alignment,
    AttentionSpec,
    Candidate,
    Fact,
    Mask,
    MaskTerm,
    Operand,
    Refusal,
    RefusalKind,
    ScoreShape,
    TermKind,
)

SOURCE = "ort_contrib"
SLOTS = (
    "query", "key", "value", "past_key", "past_value", "last_key", "total", "cos_cache", "sin_cache", "position_ids",
    "bias", "sinks", "k_scale", "v_scale", "q_norm_weight", "k_norm_weight", "query_lengths",
)  # fmt: skip
_BETWEEN = ("Cast", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze")  # of a size and its Shape node


@matcher(SOURCE, ("com.microsoft::GroupQueryAttention",))
def match(node: ir.Node, context: Context) -> list[Candidate]:
    return examined_cached(_Grouped, node, context)


class _Grouped(Cached):
    PLACES = {name: i for i, name in enumerate(SLOTS)}

    def __init__(self, node: ir.Node, context: Context):
        super().__init__(node, context)
        self.is_ring = bool(attribute(node, "sliding_window_cache", 0))

    def spec(self, candidate: Candidate) -> AttentionSpec:
        self.refuse({**self._obstacles(), **(self._obstacles_of_cache() if any(self.past) else self._without_cache())})
        operands = self._operands(candidate)
        mask = self._mask(self._bias(operands))
        self._cache()
        self.norm()
        if self.rotary() and (positions := self.given("position_ids")) is not None:
            self.inputs["position_ids"] = self._positions(positions)
        self.scales(operands[1].head_dim)
        return self.complete(candidate, self.finish(candidate, operands, mask, sinks=self.sinks()))

    # ------------------------------------------------------------------------------------------ what can't be said

    def _obstacles(self) -> Obstacles:
        node = self.node
        wants_scores = used_output(node, 3) is not None or attribute(node, "qk_output", 0) != 0
        lacks_lengths = self.given("last_key") is None or self.given("total") is None
        return {
            **self.obstacles_of_both(),
            "it has no lengths (seqlens_k, total_sequence_length)": lacks_lengths,
            "the model asks for the attention scores too (output_qk)": wants_scores and RefusalKind.SCORES_READ,
            "it is not causal, which onnxruntime's versions treat differently (causal)": not attribute(
                node, "causal", 1
            ),
        }

    def _without_cache(self) -> dict[str, bool]:
        is_quantized = self.given("k_scale") is not None or self.given("v_scale") is not None
        return {
            "without a cache onnxruntime shows rows beyond an entry's length other keys than a local window has "
            "(local_window_size)": self.window > 0,
            "it quantizes keys and values without a cache (k_scale, v_scale)": is_quantized,
            "it keeps a window of a cache that it doesn't have (sliding_window_cache)": self.is_ring,
        }

    def _obstacles_of_cache(self) -> Obstacles:
        outputs = self.node.outputs[1:3]
        given_on = len(outputs) == 2 and all(output.name for output in outputs)
        return {
            "it has a cache of keys or of values alone": not all(self.past),
            "onnxruntime doesn't read a cache that the node doesn't give on (present_key, present_value)": not given_on,
            **self.obstacles_of_cache_types(),
            "it keeps a window of the cache without a size (sliding_window_cache)": self.is_ring and self.window < 0,
        }

    # ------------------------------------------------------------------------------------------ operands and mask

    def _operands(self, candidate: Candidate) -> list[Operand]:
        query = self.given("query")
        shape = self.a.shape(query)
        width = shape[2].const if shape is not None and len(shape) == 3 else None
        if query is None or shape is None or width is None:
            raise Unfit("the shape of its query is not known", RefusalKind.UNKNOWN_SIZES)
        total = self.a.contents(self.given("total"))
        candidate.sizes.update(
            batch_size=plain(shape[0]), seqlen_q=plain(shape[1]), seqlen_kv=plain(total[0]) if total else None
        )
        return self.operands(query, self.given("key"), self.given("value"), width)

    def _bias(self, operands: list[Operand]) -> ir.Value | None:
        """attention_bias, where it says more than the node does by itself: exporters write a causal mask there."""
        bias = self.given("bias")
        query, shape = self.a.shape(self.given("query")), self.a.shape(bias)
        if bias is None or query is None or shape is None or len(shape) != 4 or shape[3] == 1:
            return bias
        sizes = (query[0], Dim.of(self.heads), query[1], shape[3])
        term = MaskTerm(TermKind.ADD, bias, self.node, "BHST", sizes)
        scores = ScoreShape(operands[0], operands[1], self.node, self.context.graph, *sizes, self.dtype)
        found = understand([term], scores, self.context)
        if isinstance(found, Refusal) or any(x is not None for x in (*found.values, found.empty_rows)):
            return bias
        # Rows of an entry stand no later than those of the longest one, so the node hides at least what the bias hides.
        is_open = found.window_left < 0 and found.window_right < 0
        is_causal = found.window_left < 0 and found.is_causal and found.alignment is Alignment.BOTTOM_RIGHT
        if not is_open and not is_causal:
            return bias
        self.fact("attention_bias hides no more keys than the node does" if is_causal else "attention_bias is 0")
        return None

    def _mask(self, bias: ir.Value | None) -> Mask:
        """Causal, and the keys of an entry end at seqlens_k + 1. A local window counts the row's own key."""
        name = (name_of(self.node),)
        facts = [Fact("causal", name)]
        if self.window > 0:
            facts.append(Fact(f"window ({self.window - 1}, 0)", name))
        facts.append(Fact("padding as lengths", name))
        lengths = self._key_lengths()
        return Mask(
            window_left=max(self.window - 1, -1),
            window_right=0,
            alignment=Alignment.TOP_LEFT if self.past[0] is None else Alignment.ONNX,
            kv_lengths=lengths,
            attn_bias=bias,
            facts=tuple(facts),
        )

    def _key_lengths(self) -> ir.Value:
        """seqlens_k + 1. Where the model subtracts 1 from the sums of a mask to make seqlens_k, as those of
        onnxruntime-genai's builder do, the sums are the lengths, and no node is added."""
        last = self.required("last_key")
        node = producer(last)
        if node is not None and op(node) == "Cast":
            node = producer(node.inputs[0])
        if node is not None and op(node) == "Sub" and self.a.scalar(node.inputs[1]) == 1:
            sums = node.inputs[0]
            is_whole = self.a.dtype(sums) in (ir.DataType.INT32, ir.DataType.INT64)
            if sums is not None and is_whole and self.a.rank(sums) == self.a.rank(last):
                return self._vector(sums)
        one = self.shared.constant(np.array([1], np.int32))
        return self.shared.node("Add", [self._vector(last), one], hint="lengths")

    def _vector(self, value: ir.Value) -> ir.Value:
        """Lengths of the batch entries, of which onnxruntime takes any shape, as [B]."""
        rank = self.a.rank(value)
        if rank == 1:
            return value
        if rank == 2:
            return self.shared.node("Squeeze", [value, self.shared.constant([1])], hint="last_key")
        return self.shared.node("Reshape", [value, self.shared.constant([-1])], hint="last_key")

    # ------------------------------------------------------------------------------------------ the cache

    def _cache(self) -> None:
        if (lengths := self.given("query_lengths")) is not None:
            self.inputs["query_lengths"] = self._vector(lengths)
            self.fact("query lengths")
        if self.past[0] is None:
            return
        self.words["cache"] = "window" if self.is_ring else "write"
        if self.is_ring:
            self.fact("the cache keeps a window, in place where past and present are one buffer")
            return
        self.inputs["kv_extent"] = self._extent()
        self.fact("new rows are written to the cache, in place where past and present are one buffer")

    def _extent(self) -> ir.Value:
        """A tensor whose last axis is total_sequence_length: the one that this is read from, as a rule the model's
        attention mask."""
        total = self.required("total")
        size, value = self.a.contents(total), total
        while (node := producer(value)) is not None and op(node) in _BETWEEN and node.inputs[0] is not None:
            value = node.inputs[0]
        source = node.inputs[0] if node is not None and op(node) == "Shape" else None
        shape = self.a.shape(source)
        if source is not None and shape and size and shape[-1] == size[0] and size[0].is_known:
            return source
        as_int64 = self.shared.node("Cast", [total], {"to": int(ir.DataType.INT64)}, hint="total")
        flat = self.shared.node("Reshape", [as_int64, self.shared.constant([1])], hint="total")
        nothing = {"value": ir.tensor(np.zeros(1, np.bool_))}
        return self.shared.node("ConstantOfShape", [flat], nothing, hint="extent")

    def _positions(self, given: ir.Value) -> ir.Value:
        """position_ids; of a prompt, where all keys are new, onnxruntime reads the first number alone and counts on."""
        made, shared = self.shared.node, self.shared
        sizes = made("Shape", [self.required("query")])
        rows = made("Gather", [sizes, shared.constant(np.array(1))], {"axis": 0}, hint="rows")
        total = made("Cast", [self.required("total")], {"to": int(ir.DataType.INT64)}, hint="total")
        is_prompt = made("Equal", [total, rows], hint="is_prompt")
        count = made("Range", [shared.constant(np.array(0)), rows, shared.constant(np.array(1))])
        bounds = [shared.constant(x) for x in ([0, 0], [1, 1], [0, 1])]
        prompt = made("Add", [made("Slice", [given, *bounds]), count], hint="prompt_positions")
        return made("Where", [is_prompt, prompt, given], hint="positions")
