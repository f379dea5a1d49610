# SPDX-License-Identifier: Apache-2.0
"""What onnxruntime's GroupQueryAttention and PagedAttention have in common: norm, rotary embedding, sinks and quantized
caches, as attributes of the same names and inputs in places of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import attribute, name_of, operand
from faexport.graph.surgery import Missing
from faexport.match import Context
from faexport.match.onnx_attention import used_output
from faexport.match.ort_contrib import Contrib, Obstacles, Unfit, examined
from faexport.sizes.dims import Dim
from faexport.spec import AttentionSpec, Candidate, Fact, Layout, Operand, RefusalKind
from faexport.understand.index.tensor import Unknown

QUANTIZED = {ir.DataType.INT8: 8, ir.DataType.UINT8: 4, ir.DataType.FLOAT8E4M3FN: 8}  # type of a cache: bits


def examined_cached(reader: type[Cached], node: ir.Node, context: Context) -> list[Candidate]:
    """As `examined`. Raises Missing where the model's opset lacks an operator that lengths are made with."""
    try:
        return examined(reader, node, context)
    except Unknown:
        raise Missing(f"needs operators that opset {context.analysis.opset} doesn't have") from None


class Cached(Contrib):
    """One node. A subclass says in which places its inputs are.

    `inputs`, `words` and `facts` collect what the operator's node gets beside query, key, value and mask.
    """

    PLACES: Mapping[str, int]  # by the names of the operator's inputs, as far as they agree

    def __init__(self, node: ir.Node, context: Context):
        super().__init__(node, context)
        self.shared = context.masks.nodes(context.graph)  # layers have lengths and positions in common
        self.kv_heads: int = attribute(node, "kv_num_heads", 0)
        self.past = [self.given("past_key"), self.given("past_value")]
        self.present = [used_output(node, i) for i in (1, 2)]
        self.window: int = attribute(node, "local_window_size", -1)
        self.inputs: dict[str, ir.Value] = {}
        self.words: dict[str, int | float | str] = {}
        self.facts: list[Fact] = []

    def given(self, name: str) -> ir.Value | None:
        return operand(self.node, self.PLACES[name])

    def required(self, name: str) -> ir.Value:
        """An input of which the subclass has asked whether it is there."""
        value = self.given(name)
        assert value is not None
        return value

    def fact(self, text: str) -> None:
        self.facts.append(Fact(text, (name_of(self.node),)))

    def obstacles_of_both(self) -> dict[str, bool]:
        node = self.node
        lacks_tables = bool(attribute(node, "do_rotary", 0)) and not (
            self.given("cos_cache") is not None and self.given("sin_cache") is not None
        )
        return {
            "an attribute is a parameter of the function that the node is in": any(
                x.is_ref() for x in node.attributes.values()
            ),
            "the number of its key heads is missing": not self.kv_heads,
            "it has keys and no values": (self.given("key") is None) != (self.given("value") is None),
            "a local window of 0 keys leaves a row nothing to attend (local_window_size)": self.window == 0,
            "it rotates by tables that it doesn't have (do_rotary, cos_cache, sin_cache)": lacks_tables,
        }

    def obstacles_of_cache_types(self) -> Obstacles:
        key, value = (self.a.dtype(past) for past in self.past)
        return {
            "the element type of its cache is not known": key is None and RefusalKind.UNKNOWN_SIZES,
            "its cache has another type than query and key": key not in (self.dtype, None, *QUANTIZED),
            "its caches of keys and of values have different types": key != value,
        }

    def operands(self, query: ir.Value, key: ir.Value | None, value: ir.Value | None, width: int) -> list[Operand]:
        """Query, key and value [B, S, H·D], which may lie side by side in one tensor of `width` columns."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        if self.heads != self.kv_heads:
            self.facts.append(Fact(f"{self.heads} query heads on {self.kv_heads} kv heads"))
        if key is None or value is None:
            size = width // sum(heads)
            starts = (0, self.heads * size, (self.heads + self.kv_heads) * size)
            return [Operand(query, Layout.BSH, n, size, at, size) for n, at in zip(heads, starts, strict=True)]
        size = width // self.heads
        return [Operand(v, Layout.BSH, n, size) for v, n in zip((query, key, value), heads, strict=True)]

    def complete(self, candidate: Candidate, spec: AttentionSpec) -> AttentionSpec:
        """Puts into the spec what was collected."""
        candidate.sizes["num_kv_heads"] = self.kv_heads
        spec.softcap = attribute(self.node, "softcap", 0.0)
        spec.past_key, spec.past_value = self.past
        spec.present_key, spec.present_value = self.present
        spec.further_inputs, spec.further_attributes = self.inputs, self.words
        made = [*self.inputs.values(), *spec.mask.values]
        shared = dict.fromkeys(n for value in made for n in self.shared.nodes.get(value, ()))
        spec.new_nodes = (*shared, *spec.new_nodes)
        spec.facts = tuple(self.facts)
        return spec

    # ------------------------------------------------------------------------------------------ inputs

    def sinks(self) -> ir.Value | None:
        sinks = self.given("sinks")
        if sinks is None and attribute(self.node, "smooth_softmax", 0) == 1:  # exp(0) more in each row's sum
            self.fact("smooth softmax: sinks of 0")
            return self.build.constant(np.zeros(self.heads, np.float32))
        if sinks is None or self.a.dtype(sinks) == ir.DataType.FLOAT:
            return sinks
        return self.build.add("Cast", [sinks], ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))

    def scales(self, head_dim: int | None) -> None:
        dtype = self.a.dtype(self.past[0])
        if dtype not in QUANTIZED:
            return
        bits = QUANTIZED[dtype]
        if attribute(self.node, "kv_cache_bit_width", 0) not in (0, bits):
            raise Unfit(f"its cache of {dtype.name.lower()} doesn't hold {bits} bits a number (kv_cache_bit_width)")
        for name, kind in (("k_scale", "k_quant_type"), ("v_scale", "v_quant_type")):
            scale, word = self.given(name), attribute(self.node, kind, "NONE")
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
        self.fact(f"cache of {'int4' if bits == 4 else dtype.name.lower()}")

    def norm(self) -> None:
        both = attribute(self.node, "qk_norm_epsilon", 1e-6)
        for kind in ("q_norm", "k_norm"):
            if (weight := self.given(f"{kind}_weight")) is not None:
                self.inputs[f"{kind}_weight"] = weight
                self.words[f"{kind}_epsilon"] = float(attribute(self.node, f"{kind}_epsilon", both))
        if any(f"{kind}_norm_weight" in self.inputs for kind in "qk"):
            self.fact("RMS norm of the heads of query and key")

    def rotary(self) -> bool:
        if not attribute(self.node, "do_rotary", 0):
            return False
        self.inputs["cos_cache"], self.inputs["sin_cache"] = self.required("cos_cache"), self.required("sin_cache")
        if attribute(self.node, "rotary_interleaved", 0):
            self.words["rotary_interleaved"] = 1
        self.fact("rotary embedding")
        return True
