# SPDX-License-Identifier: Apache-2.0
"""onnxruntime's own attention ops (com.microsoft): MultiHeadAttention and Attention, where their semantics fit the
operator's.

What they mask they mask by adding mask_filter_value, so a mask becomes an attn_bias of [B, 1, 1, T] and stays exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import attribute, name_of, operand
from faexport.graph.surgery import Builder
from faexport.match import Context, matcher
from faexport.match.masks import understand
from faexport.match.onnx_attention import used_output
from faexport.sizes.dims import Dim, plain
from faexport.spec import (
    Alignment,
    Assumption,
    AttentionSpec,
    Candidate,
    EmptyRow,
    Fact,
    Layout,
    Mask,
    MaskTerm,
    Operand,
    Refusal,
    RefusalKind,
    ScoreShape,
    TermKind,
)
from faexport.understand.core.structure import TYPES
from faexport.understand.layout.declared import Declared, read_all, sizes_of
from faexport.understand.mask.words import rounding_text

SOURCE = "ort_contrib"
# A mask_filter_value in between hides keys as lengths do, and leaves scores as they are where it is added to all of a
# row: a larger one lets keys be seen, a smaller one makes all scores of such a row one number.
FILLS_LIKE_LENGTHS = (-65504.0, -5000.0)


# Sentences, and whether each stands in the way, or as which kind of refusal it does.
Obstacles = Mapping[str, bool | RefusalKind]


class Unfit(Exception):
    """The node uses something that the operator doesn't have; the text is the refusal's sentence."""

    def __init__(self, reason: str, kind: RefusalKind = RefusalKind.OTHER):
        super().__init__(reason)
        self.kind = kind


@matcher(SOURCE, ("com.microsoft::MultiHeadAttention", "com.microsoft::Attention"))
def match(node: ir.Node, context: Context) -> list[Candidate]:
    return examined(_MultiHead if node.op_type == "MultiHeadAttention" else _Attention, node, context)


def examined(reader: type[Contrib], node: ir.Node, context: Context) -> list[Candidate]:
    """The site of a node as the reader of its kind understands it, or with why it doesn't."""
    candidate = Candidate(node, context.graph, SOURCE)
    try:
        candidate.outcome = reader(node, context).spec(candidate)
    except Unfit as reason:
        candidate.outcome = Refusal(str(reason), name_of(node), reason.kind)
    return [candidate]


class Contrib:
    """What these ops have in common."""

    def __init__(self, node: ir.Node, context: Context):
        self.node, self.a, self.context = node, context.analysis, context
        self.build = Builder(self.a.opset)
        self.heads = attribute(node, "num_heads", 0)
        dtype = self.a.dtype(node.inputs[0])
        if dtype is None or dtype not in TYPES:
            raise Unfit("query, key and value are not float32, float16 or bfloat16", RefusalKind.TYPE)
        self.dtype = dtype
        if not self.heads:
            raise Unfit("the number of heads is missing")

    def spec(self, candidate: Candidate) -> AttentionSpec:
        """What the node computes; fills in the candidate's sizes. Raises Unfit."""
        raise NotImplementedError

    @staticmethod
    def refuse(obstacles: Obstacles) -> None:
        """Raises Unfit with all that stands in the way."""
        if standing := {text: what for text, what in obstacles.items() if what}:
            kind = next((what for what in standing.values() if isinstance(what, RefusalKind)), RefusalKind.OTHER)
            raise Unfit("; ".join(standing), kind)

    def scale(self) -> float:
        return attribute(self.node, "scale", 0.0)

    def mask(self, padding: ir.Value | None, bias: ir.Value | None, batch: Dim, keys: Dim, has_past: bool) -> Mask:
        causal = bool(attribute(self.node, "unidirectional", 0))
        mask = Mask(window_right=0 if causal else -1, facts=(Fact("causal", (name_of(self.node),)),) if causal else ())
        if padding is None:
            mask.attn_bias = bias
            return mask
        shape = self.a.shape(padding)
        if shape is None:
            raise Unfit("the shape of its padding mask is not known", RefusalKind.UNKNOWN_SIZES)
        if len(shape) == 1:
            if shape[0] != batch or has_past or bias is not None:
                raise Unfit("its padding mask is neither one length for each batch entry nor a mask of the keys")
            if FILLS_LIKE_LENGTHS[0] <= self.filler <= FILLS_LIKE_LENGTHS[1]:
                mask.kv_lengths, mask.alignment = self._lengths(padding), Alignment.TOP_LEFT
                mask.all_keys = padding
                mask.facts += (Fact("padding as lengths", (name_of(self.node),)),)
                return mask
            keep = self._within(padding)
        elif len(shape) in (2, 3) and shape[-1] == keys:
            zero = self.build.add("Constant", (), ir.DataType.INT32, value=ir.tensor(np.array(0, np.int32)))
            keep = self.build.add("Greater", [padding, zero], ir.DataType.BOOL)  # numbers below 0 hide, too
        else:
            raise Unfit("its padding mask has a shape that is not understood")
        for _ in range(1 if len(shape) == 3 else 2):
            keep = self.build.unsqueeze(keep, 1)
        if np.float32(self.filler) == np.finfo(np.float32).min:
            # Keys that causality hides get the same number, so that all keys of such a row are alike, those ahead too.
            mask.attn_mask, mask.attn_bias, mask.empty_row = keep, bias, EmptyRow.MEAN
            text = f"a row that sees no key gives the mean of all values, as the fill {self.filler:g} does"
            mask.facts += (Fact("padding mask", (name_of(self.node),)), Fact(text, (name_of(self.node),)))
            return mask
        added = self._as_bias(keep)
        dtype = added.dtype or self.dtype
        mask.attn_bias = added if bias is None else self.build.add("Add", [added, self.build.cast(bias, dtype)], dtype)
        mask.facts += (Fact("padding mask", (name_of(self.node),)),)
        if -1e30 < self.filler < 0:
            text = f"{rounding_text(self.filler, dtype)}; which step, depends on the runtime"
            mask.facts += (Assumption(text, (name_of(self.node),)),)
        return mask

    @property
    def filler(self) -> float:
        """What is added to the scores of keys that a mask hides."""
        return attribute(self.node, "mask_filter_value", -10000.0)

    def _lengths(self, padding: ir.Value) -> ir.Value:
        """The number of visible keys: that in the mask, and all where it hides all of them, since what is added to all
        scores of a row changes nothing."""
        build = self.build
        lengths = build.cast(padding, ir.DataType.INT64)
        some = build.add("Greater", [lengths, build.ints([0])], ir.DataType.BOOL)
        return build.add("Where", [some, lengths, self._count_of_keys()], ir.DataType.INT64)

    def _within(self, padding: ir.Value) -> ir.Value:
        """Which keys [B, T] the lengths let be seen."""
        build = self.build
        start, step = (build.constant(np.array(n, np.int64)) for n in (0, 1))
        places = build.add("Range", [start, build.squeeze(self._count_of_keys(), 0), step], ir.DataType.INT64)
        lengths = build.unsqueeze(build.cast(padding, ir.DataType.INT64), 1)
        return build.add("Less", [places, lengths], ir.DataType.BOOL)

    def _count_of_keys(self) -> ir.Value:
        """int64 [1]."""
        keys, axis = self.holds_keys()
        return self.build.slice(self.build.add("Shape", [keys], ir.DataType.INT64), axis, axis + 1)

    def holds_keys(self) -> tuple[ir.Value, int]:
        """A tensor and its axis of as many elements as there are keys, without those of a cache."""
        raise NotImplementedError

    def _as_bias(self, keep: ir.Value) -> ir.Value:
        """In float32 where float16 has no such number: onnxruntime adds it in float32."""
        build = self.build
        fits = self.dtype is not ir.DataType.FLOAT16 or abs(self.filler) <= float(np.finfo(np.float16).max)
        dtype = self.dtype if fits else ir.DataType.FLOAT
        values = (np.array(x, dtype.numpy()) for x in (0.0, self.filler))
        numbers = [build.add("Constant", (), dtype, value=ir.tensor(x)) for x in values]
        return build.add("Where", [keep, *numbers], dtype)

    def finish(self, candidate: Candidate, operands: list[Operand], mask: Mask, **more: Any) -> AttentionSpec:
        query, key, value = operands
        candidate.sizes.update(
            num_q_heads=self.heads, num_kv_heads=self.heads, head_dim=query.head_dim, head_dim_v=value.head_dim
        )
        return AttentionSpec(
            query,
            key,
            value,
            self.node.outputs[0],
            Layout.BSH,
            self.scale(),
            replaces=self.node,
            head_dim=query.head_dim,
            head_dim_v=value.head_dim,
            new_nodes=tuple(self.build.nodes),
            mask=mask,
            **more,
        )


class _MultiHead(Contrib):
    """Inputs: query, key, value, bias, key_padding_mask, attention_bias, past_key, past_value, …"""

    def spec(self, candidate: Candidate) -> AttentionSpec:
        node, a = self.node, self.a
        if operand(node, 9) is not None:
            raise Unfit("its keys are read from other entries, along beams (cache_indirection)")
        if used_output(node, 3) is not None:
            raise Unfit("the model asks for the attention scores too (qk)", RefusalKind.SCORES_READ)
        past = [operand(node, i) for i in (6, 7)]
        if (past[0] is None) != (past[1] is None):
            raise Unfit("it has a cache of keys or of values alone")
        present = [used_output(node, i) for i in (1, 2)]
        query = node.inputs[0]
        rank = a.rank(query)
        if query is not None and rank == 5:
            operands, batch, keys = self._packed_qkv(query)
        elif query is not None and rank == 3:
            operands, batch, keys = self._separate(query, any(past) or any(present))
        else:
            raise Unfit("the rank of its query is not known", RefusalKind.UNKNOWN_SIZES)
        if attribute(node, "unidirectional", 0) and keys != a.known_shape(query)[1]:
            raise Unfit("it is causal (unidirectional) and may have another number of new keys than of queries")
        length = operand(node, 8)
        if length is not None:
            self._refuse_shared(past)
            keys = Dim.unknown("keys")
        elif past[0] is not None:
            before = a.shape(past[0])
            keys = keys + before[2] if before is not None else Dim.unknown("keys")
        mask = self.mask(operand(node, 4), operand(node, 5), batch, keys, past[0] is not None)
        written = {} if length is None else self._written(mask, length, query)
        mask = self._proven(mask, operands, batch, keys, past) if length is None else mask
        caches = written | {
            "past_key": past[0],
            "past_value": past[1],
            "present_key": present[0],
            "present_value": present[1],
        }
        candidate.sizes.update(batch_size=plain(batch), seqlen_kv=plain(keys))
        return self.finish(candidate, operands, mask, **caches)

    def _refuse_shared(self, past: list[ir.Value | None]) -> None:
        """Raises Unfit with all that stands in the way of a cache of fixed capacity (past_sequence_length)."""
        outputs = self.node.outputs[1:3]
        key = operand(self.node, 1)
        obstacles = {
            "it has no cache for the length that it is given (past_sequence_length)": not all(past),
            "it does not give its cache on (present_key, present_value)": len(outputs) < 2
            or not all(output.name for output in outputs),
            "its new keys are packed or already in heads": key is None or self.a.rank(key) != 3,
            "it has a padding mask beside a cache of fixed capacity (key_padding_mask)": operand(self.node, 4)
            is not None,
        }
        self.refuse(obstacles)

    def _written(self, mask: Mask, length: ir.Value, query: ir.Value) -> dict:
        """New rows go behind the `length` rows of every entry's cache, and all rows up to there are attended."""
        build = self.build
        start = build.cast(build.reshape(length, [1]), ir.DataType.INT64)
        sizes = build.add("Shape", [query], ir.DataType.INT64)
        end = build.add("Add", [start, build.slice(sizes, 1, 2)], ir.DataType.INT64)
        mask.kv_lengths = build.add("Expand", [end, build.slice(sizes, 0, 1)], ir.DataType.INT64)
        fact = Fact(
            "new rows are written to the cache, in place where past and present are one buffer", (name_of(self.node),)
        )
        return {"further_attributes": {"cache": "write"}, "facts": (fact,)}

    def _proven(self, mask: Mask, operands: list[Operand], batch: Dim, keys: Dim, past: list[ir.Value | None]) -> Mask:
        """What its attention_bias is, as of scores in any graph, where nothing else masks: exporters put the causal
        mask and the padding there. It stays a bias where that can't be said of keys behind a past."""
        bias, query = mask.attn_bias, self.node.inputs[0]
        is_alone = bias is operand(self.node, 5) and mask.attn_mask is None and not mask.is_causal
        if query is None or bias is None or not is_alone:
            return mask
        rows, heads = self.a.known_shape(query)[1], Dim.of(self.heads)
        term = MaskTerm(TermKind.ADD, bias, self.node, "BHST", (batch, heads, rows, keys))
        scores = ScoreShape(
            operands[0], operands[1], self.node, self.context.graph, batch, heads, rows, keys, self.dtype
        )
        found = understand([term], scores, self.context)
        if isinstance(found, Refusal):
            return mask
        has_position = found.window_left >= 0 or found.window_right >= 0 or found.alibi_slopes is not None
        is_first = found.alignment is Alignment.TOP_LEFT and found.query_offset is None
        of_all_keys = found.kv_lengths is not None or found.empty_rows is not None
        return mask if past[0] is not None and ((has_position and is_first) or of_all_keys) else found

    def holds_keys(self) -> tuple[ir.Value, int]:
        key = operand(self.node, 1) or self.node.inputs[0]
        assert key is not None
        return key, 2 if self.a.rank(key) == 4 else 1

    def _packed_qkv(self, query: ir.Value) -> tuple[list[Operand], Dim, Dim]:
        shape = self.a.known_shape(query)
        if operand(self.node, 3) is not None or shape[4].const is None or shape[3] != 3:
            raise Unfit("its packed query, key and value have a bias or an unknown head size")
        size = shape[4].const
        flat = self.build.reshape(query, [0, 0, 3 * size * self.heads])
        return self._columns([(flat, i * size, 3 * size) for i in range(3)], [size] * 3), shape[0], shape[1]

    def _columns(self, places: list[tuple[ir.Value, int, int]], sizes: list[int]) -> list[Operand]:
        return [
            Operand(value, Layout.BSH, self.heads, size, start, stride)
            for (value, start, stride), size in zip(places, sizes, strict=True)
        ]

    def _separate(self, query: ir.Value, cached: bool) -> tuple[list[Operand], Dim, Dim]:
        node, a = self.node, self.a
        key, value = (operand(node, i) for i in (1, 2))
        ranks = a.rank(key), a.rank(value)
        bias = operand(node, 3)
        if key is not None and ranks == (5, None):
            return self._packed_kv(query, key, bias)
        if key is None or value is None or ranks[0] != ranks[1] or ranks[0] not in (3, 4):
            raise Unfit("the ranks of its key and value are not known", RefusalKind.UNKNOWN_SIZES)
        keys, batch = a.known_shape(key)[2 if ranks[0] == 4 else 1], a.known_shape(query)[0]
        if bias is not None:
            if ranks[0] == 4:
                raise Unfit("it adds a projection bias to a cached key and value")
            query, key, value = self._with_bias(bias, [query, key, value])
        layouts = [Layout.BSH, *([Layout.BHSD if ranks[0] == 4 else Layout.BSH] * 2)]
        declared = [
            Declared(v, layout, Dim.of(self.heads)) for v, layout in zip((query, key, value), layouts, strict=True)
        ]
        sizes = [sizes_of(d, a) for d in declared] if bias is None else None
        if sizes is None or None in sizes or cached:
            return [d.as_is().operand for d in declared], batch, keys
        readings = read_all(declared, a)
        return [r.operand for r in readings], batch, keys

    def _packed_kv(self, query: ir.Value, packed: ir.Value, bias: ir.Value | None) -> tuple[list[Operand], Dim, Dim]:
        shape = self.a.known_shape(packed)
        if bias is not None or shape[4].const is None or shape[3] != 2:
            raise Unfit("its packed key and value have a bias or an unknown head size")
        size = shape[4].const
        flat = self.build.reshape(packed, [0, 0, 2 * size * self.heads])
        places = [(query, 0, size), (flat, 0, 2 * size), (flat, size, 2 * size)]
        return self._columns(places, [size] * 3), shape[0], shape[1]

    def _with_bias(self, bias: ir.Value, values: list[ir.Value]) -> list[ir.Value]:
        """Each operand plus its part of the projection's bias."""
        build, start, result = self.build, 0, []
        for value in values:
            shape = self.a.shape(value)
            width = shape[2].const if shape is not None else None
            if width is None:
                raise Unfit("it adds a projection bias to tensors of unknown width")
            part = build.add("Slice", [bias, build.ints([start]), build.ints([start + width])], self.dtype)
            result.append(build.add("Add", [value, part], self.dtype))
            start += width
        return result


class _Attention(Contrib):
    """Inputs: input, weights, bias, mask_index, past, attention_bias, past_sequence_length. The projection becomes a
    MatMul of its own."""

    def spec(self, candidate: Candidate) -> AttentionSpec:
        node, a = self.node, self.a
        if attribute(node, "do_rotary", 0):
            raise Unfit("it rotates query and key itself (do_rotary)")
        if operand(node, 6) is not None or attribute(node, "past_present_share_buffer", 0):
            raise Unfit("it shares a cache buffer (past_sequence_length)")
        shape, weights = a.shape(node.inputs[0]), a.shape(node.inputs[1])
        if shape is None or weights is None or weights[1].const is None:
            raise Unfit("the shapes of its input and weights are not known", RefusalKind.UNKNOWN_SIZES)
        widths = attribute(node, "qkv_hidden_sizes") or [weights[1].const // 3] * 3
        if len(set(widths[:2])) != 1 or any(w % self.heads for w in widths) or sum(widths) != weights[1].const:
            raise Unfit("its hidden sizes don't divide by the number of heads")
        packed = self.build.add("MatMul", [node.inputs[0], node.inputs[1]], self.dtype)
        if operand(node, 2) is not None:
            packed = self.build.add("Add", [packed, node.inputs[2]], self.dtype)
        if operand(node, 4) is not None or used_output(node, 1) is not None:
            return self._cached(candidate, packed, widths, shape)
        sizes = [w // self.heads for w in widths]
        starts = [0, widths[0], widths[0] + widths[1]]
        operands = [
            Operand(packed, Layout.BSH, self.heads, d, start, d) for start, d in zip(starts, sizes, strict=True)
        ]
        mask = self.mask(operand(node, 3), operand(node, 5), shape[0], shape[1], has_past=False)
        candidate.sizes.update(batch_size=plain(shape[0]), seqlen_q=plain(shape[1]), seqlen_kv=plain(shape[1]))
        return self.finish(candidate, operands, mask)

    def holds_keys(self) -> tuple[ir.Value, int]:
        states = self.node.inputs[0]
        assert states is not None
        return states, 1

    def _cached(self, candidate: Candidate, packed: ir.Value, widths: list[int], shape: Sequence[Dim]) -> AttentionSpec:
        """One cache tensor of keys and values, [2, B, H, P, D]: the new ones are put behind it, and it is read from
        there."""
        build, past, present = self.build, operand(self.node, 4), used_output(self.node, 1)
        size = widths[0] // self.heads
        if len(set(widths)) != 1:
            raise Unfit("its cache holds keys and values of different widths")
        parts = [
            build.add(
                "Slice", [packed, *(build.ints([x]) for x in (i * widths[0], (i + 1) * widths[0], 2))], self.dtype
            )
            for i in range(3)
        ]
        new = [build.transpose(build.reshape(x, [0, 0, self.heads, size]), [0, 2, 1, 3]) for x in parts[1:]]
        whole = build.add("Concat", [build.unsqueeze(x, 0) for x in new], self.dtype, axis=0)
        keys = shape[1]
        if past is not None:
            before = self.a.shape(past)
            if before is None or len(before) != 5:
                raise Unfit("the shape of its cache is not known", RefusalKind.UNKNOWN_SIZES)
            whole, keys = build.add("Concat", [past, whole], self.dtype, axis=3), keys + before[3]
        read = [build.squeeze(build.add("Gather", [whole, build.ints([i])], self.dtype, axis=0), 0) for i in (0, 1)]
        operands = [
            Operand(parts[0], Layout.BSH, self.heads, size),
            *(Operand(x, Layout.BHSD, self.heads, size) for x in read),
        ]
        mask = self.mask(operand(self.node, 3), operand(self.node, 5), shape[0], keys, has_past=past is not None)
        if mask.is_causal and mask.kv_lengths is None:  # lengths are counted from the first key, without a cache
            mask.alignment = Alignment.BOTTOM_RIGHT
        candidate.sizes.update(batch_size=plain(shape[0]), seqlen_q=plain(shape[1]), seqlen_kv=plain(keys))
        outputs = () if present is None else ((present, whole),)
        return self.finish(candidate, operands, mask, other_outputs=outputs)
