# SPDX-License-Identifier: Apache-2.0
"""onnxruntime's GroupQueryAttention (com.microsoft): the attention of decoders as onnxruntime-genai's model builder
writes them, with its cache, norm, rotary embedding, windows and quantization.

seqlens_k + 1 keys of an entry are in use, and its new rows are the last of these. Its cache has at least
total_sequence_length rows, so a tensor with as many columns goes along (kv_extent). What can't be said in the
operator's words is refused with every obstacle.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from faexport.match import Context, matcher
from faexport.match.onnx_attention import used_output
from faexport.match.ort_contrib import Contrib, Unfit
from faexport.nodes import attribute, name_of, op, operand, producer
from faexport.spec import Alignment, AttentionSpec, Candidate, Fact, Layout, Mask, Operand, Refusal
from faexport.surgery import Missing
from faexport.understand.index.tensor import Unknown
from faexport.understand.shapes.dims import Dim, plain

SOURCE = "ort_contrib"
(
    QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE, LAST_KEY, TOTAL, COS, SIN, POSITIONS, BIAS, SINKS, K_SCALE, V_SCALE,
    Q_NORM, K_NORM, QUERY_LENGTHS,
) = range(17)  # fmt: skip
QUANTIZED = {ir.DataType.INT8: 8, ir.DataType.UINT8: 4, ir.DataType.FLOAT8E4M3FN: 8}  # type of a cache: bits
_BETWEEN = ("Cast", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze")  # of a size and its Shape node


@matcher(SOURCE, ("com.microsoft::GroupQueryAttention",))
def match(node: ir.Node, context: Context) -> list[Candidate]:
    candidate = Candidate(node, context.graph, SOURCE)
    try:
        candidate.outcome = _Grouped(node, context).spec(candidate)
    except Unfit as reason:
        candidate.outcome = Refusal(str(reason), name_of(node))
    except Unknown:
        raise Missing(f"needs operators that opset {context.analysis.opset} doesn't have") from None
    return [candidate]


class _Grouped(Contrib):
    def __init__(self, node: ir.Node, context: Context):
        super().__init__(node, context)
        self.shared = context.masks.nodes(context.graph)  # layers have lengths and positions in common
        self.kv_heads: int = attribute(node, "kv_num_heads", 0)
        self.past = [operand(node, i) for i in (PAST_KEY, PAST_VALUE)]
        self.present = [used_output(node, i) for i in (1, 2)]
        self.window: int = attribute(node, "local_window_size", -1)
        self.is_ring = bool(attribute(node, "sliding_window_cache", 0))
        self.inputs: dict[str, ir.Value] = {}
        self.words: dict[str, int | float | str] = {}
        self.facts: list[Fact] = []

    def spec(self, candidate: Candidate) -> AttentionSpec:
        self._refuse()
        operands = self._operands(candidate)
        mask = self._mask()
        self._cache()
        self._norm()
        self._rotary()
        self._scales(operands[1].head_dim)
        sinks = self._sinks()
        spec = self.finish(candidate, operands, mask, sinks=sinks)
        candidate.sizes["num_kv_heads"] = self.kv_heads
        spec.softcap = attribute(self.node, "softcap", 0.0)
        spec.past_key, spec.past_value = self.past
        spec.present_key, spec.present_value = self.present
        spec.further_inputs, spec.further_attributes = self.inputs, self.words
        made = [*self.inputs.values(), *mask.values]
        shared = dict.fromkeys(n for value in made for n in self.shared.nodes.get(value, ()))
        spec.new_nodes = (*shared, *spec.new_nodes)
        spec.facts = tuple(self.facts)
        return spec

    def _fact(self, text: str) -> None:
        self.facts.append(Fact(text, (name_of(self.node),)))

    # ------------------------------------------------------------------------------------------ what can't be said

    def _refuse(self) -> None:
        """Raises Unfit with all that stands in the way."""
        obstacles = {**self._obstacles(), **(self._obstacles_of_cache() if any(self.past) else self._without_cache())}
        if standing := [text for text, stands in obstacles.items() if stands]:
            raise Unfit("; ".join(standing))

    def _has(self, index: int) -> bool:
        return operand(self.node, index) is not None

    def _obstacles(self) -> dict[str, bool]:
        node = self.node
        wants_scores = used_output(node, 3) is not None or attribute(node, "qk_output", 0) != 0
        lacks_tables = bool(attribute(node, "do_rotary", 0)) and not (self._has(COS) and self._has(SIN))
        is_parameter = any(x.is_ref() for x in node.attributes.values())
        return {
            "an attribute is a parameter of the function that the node is in": is_parameter,
            "the number of its key heads is missing": not self.kv_heads,
            "it has keys and no values": self._has(KEY) != self._has(VALUE),
            "it has no lengths (seqlens_k, total_sequence_length)": not (self._has(LAST_KEY) and self._has(TOTAL)),
            "the model asks for the attention scores too (output_qk)": wants_scores,
            "it is not causal, which onnxruntime's versions treat differently (causal)": not attribute(
                node, "causal", 1
            ),
            "a local window of 0 keys leaves a row nothing to attend (local_window_size)": self.window == 0,
            "it rotates by tables that it doesn't have (do_rotary, cos_cache, sin_cache)": lacks_tables,
        }

    def _without_cache(self) -> dict[str, bool]:
        return {
            "without a cache onnxruntime shows rows beyond an entry's length other keys than a local window has "
            "(local_window_size)": self.window > 0,
            "it quantizes keys and values without a cache (k_scale, v_scale)": self._has(K_SCALE) or self._has(V_SCALE),
            "it keeps a window of a cache that it doesn't have (sliding_window_cache)": self.is_ring,
        }

    def _obstacles_of_cache(self) -> dict[str, bool]:
        key, value = (self.a.dtype(past) for past in self.past)
        outputs = self.node.outputs[1:3]
        given_on = len(outputs) == 2 and all(output.name for output in outputs)
        return {
            "it has a cache of keys or of values alone": not all(self.past),
            "onnxruntime doesn't read a cache that the node doesn't give on (present_key, present_value)": not given_on,
            "the element type of its cache is not known": key is None,
            "its cache has another type than query and key": key not in (self.dtype, None, *QUANTIZED),
            "its caches of keys and of values have different types": key != value,
            "it keeps a window of the cache without a size (sliding_window_cache)": self.is_ring and self.window < 0,
        }

    # ------------------------------------------------------------------------------------------ operands and mask

    def _operands(self, candidate: Candidate) -> list[Operand]:
        """Query, key and value, which may lie side by side in one tensor."""
        query, key, value = (operand(self.node, i) for i in (QUERY, KEY, VALUE))
        shape = self.a.shape(query)
        width = shape[2].const if shape is not None and len(shape) == 3 else None
        if query is None or shape is None or width is None:
            raise Unfit("the shape of its query is not known")
        heads = (self.heads, self.kv_heads, self.kv_heads)
        total = self.a.contents(operand(self.node, TOTAL))
        candidate.sizes.update(
            batch_size=plain(shape[0]), seqlen_q=plain(shape[1]), seqlen_kv=plain(total[0]) if total else None
        )
        if self.heads != self.kv_heads:
            self.facts.append(Fact(f"{self.heads} query heads on {self.kv_heads} kv heads"))
        if key is None or value is None:
            size = width // sum(heads)
            starts = (0, self.heads * size, (self.heads + self.kv_heads) * size)
            return [Operand(query, Layout.BSH, n, size, at, size) for n, at in zip(heads, starts, strict=True)]
        size = width // self.heads
        return [Operand(v, Layout.BSH, n, size) for v, n in zip((query, key, value), heads, strict=True)]

    def _mask(self) -> Mask:
        """Causal, and the keys of an entry end at seqlens_k + 1. A local window counts the row's own key."""
        name = (name_of(self.node),)
        facts = [Fact("causal", name)]
        if self.window > 0:
            facts.append(Fact(f"window ({self.window - 1}, 0)", name))
        facts.append(Fact("padding as lengths", name))
        last = self._vector(self._input(LAST_KEY))
        lengths = self.shared.node("Add", [last, self.shared.constant(np.array([1], np.int32))], hint="lengths")
        return Mask(
            window_left=max(self.window - 1, -1),
            window_right=0,
            alignment=Alignment.TOP_LEFT if self.past[0] is None else Alignment.ONNX,
            kv_lengths=lengths,
            attn_bias=operand(self.node, BIAS),
            facts=tuple(facts),
        )

    def _input(self, index: int) -> ir.Value:
        value = self.node.inputs[index]
        assert value is not None  # _refuse has asked
        return value

    def _vector(self, value: ir.Value) -> ir.Value:
        """Lengths of the batch entries, of which onnxruntime takes any shape, as [B]."""
        rank = self.a.rank(value)
        if rank == 1:
            return value
        if rank == 2:
            return self.shared.node("Squeeze", [value, self.shared.constant([1])], hint="last_key")
        return self.shared.node("Reshape", [value, self.shared.constant([-1])], hint="last_key")

    def _sinks(self) -> ir.Value | None:
        sinks = operand(self.node, SINKS)
        if sinks is None and attribute(self.node, "smooth_softmax", 0) == 1:  # exp(0) more in each row's sum
            self._fact("smooth softmax: sinks of 0")
            return self.build.constant(np.zeros(self.heads, np.float32))
        if sinks is None or self.a.dtype(sinks) == ir.DataType.FLOAT:
            return sinks
        return self.build.add("Cast", [sinks], ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))

    # ------------------------------------------------------------------------------------------ the cache

    def _cache(self) -> None:
        if (lengths := operand(self.node, QUERY_LENGTHS)) is not None:
            self.inputs["query_lengths"] = self._vector(lengths)
            self._fact("query lengths")
        if self.past[0] is None:
            return
        self.words["cache"] = "window" if self.is_ring else "write"
        if self.is_ring:
            self._fact("the cache keeps a window, in place where past and present are one buffer")
            return
        self.inputs["kv_extent"] = self._extent()
        self._fact("new rows are written to the cache, in place where past and present are one buffer")

    def _extent(self) -> ir.Value:
        """A tensor whose last axis is total_sequence_length: the one that this is read from, as a rule the model's
        attention mask."""
        total = self._input(TOTAL)
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

    def _scales(self, head_dim: int | None) -> None:
        dtype = self.a.dtype(self.past[0])
        if dtype not in QUANTIZED:
            return
        bits = QUANTIZED[dtype]
        if attribute(self.node, "kv_cache_bit_width", 0) not in (0, bits):
            raise Unfit(f"its cache of {dtype.name.lower()} doesn't hold {bits} bits a number (kv_cache_bit_width)")
        for name, index, kind in (("k_scale", K_SCALE, "k_quant_type"), ("v_scale", V_SCALE, "v_quant_type")):
            scale, word = operand(self.node, index), attribute(self.node, kind, "NONE")
            if scale is None or head_dim is None or word not in ("PER_TENSOR", "PER_CHANNEL"):
                raise Unfit(f"the scales of its quantized cache are missing ({name}, {kind} {word})")
            sizes = [1] if word == "PER_TENSOR" else [self.kv_heads, head_dim]
            shape = [d.const for d in self.a.shape(scale) or (Dim.unknown("scales"),)]
            if None in shape or math.prod(n for n in shape if n is not None) != math.prod(sizes):
                raise Unfit(f"the scales of its quantized cache have another shape than {sizes} ({name})")
            # onnxruntime counts the elements, whatever their axes are.
            self.inputs[name] = scale if shape == sizes else self.build.reshape(scale, sizes)
        if bits == 4:
            self.words["kv_cache_bit_width"] = 4
        self._fact(f"cache of {'int4' if bits == 4 else dtype.name.lower()}")

    # ------------------------------------------------------------------------------------------ norm and rotary

    def _norm(self) -> None:
        both = attribute(self.node, "qk_norm_epsilon", 1e-6)
        for index, kind in ((Q_NORM, "q_norm"), (K_NORM, "k_norm")):
            if (weight := operand(self.node, index)) is not None:
                self.inputs[f"{kind}_weight"] = weight
                self.words[f"{kind}_epsilon"] = float(attribute(self.node, f"{kind}_epsilon", both))
        if any(f"{kind}_norm_weight" in self.inputs for kind in "qk"):
            self._fact("RMS norm of the heads of query and key")

    def _rotary(self) -> None:
        if not attribute(self.node, "do_rotary", 0):
            return
        self.inputs["cos_cache"], self.inputs["sin_cache"] = self._input(COS), self._input(SIN)
        if attribute(self.node, "rotary_interleaved", 0):
            self.words["rotary_interleaved"] = 1
        positions = operand(self.node, POSITIONS)
        if positions is not None:
            self.inputs["position_ids"] = self._positions(positions)
        self._fact("rotary embedding")

    def _positions(self, given: ir.Value) -> ir.Value:
        """position_ids; of a prompt, where all keys are new, onnxruntime reads the first number alone and counts on."""
        made, shared = self.shared.node, self.shared
        sizes = made("Shape", [self._input(QUERY)])
        rows = made("Gather", [sizes, shared.constant(np.array(1))], {"axis": 0}, hint="rows")
        total = made("Cast", [self._input(TOTAL)], {"to": int(ir.DataType.INT64)}, hint="total")
        is_prompt = made("Equal", [total, rows], hint="is_prompt")
        count = made("Range", [shared.constant(np.array(0)), rows, shared.constant(np.array(1))])
        bounds = [shared.constant(x) for x in ([0, 0], [1, 1], [0, 1])]
        prompt = made("Add", [made("Slice", [given, *bounds]), count], hint="prompt_positions")
        return made("Where", [is_prompt, prompt, given], hint="positions")
