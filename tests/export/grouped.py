# SPDX-License-Identifier: Apache-2.0
"""Models of one GroupQueryAttention node, as onnxruntime-genai's model builder and others write it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HEADS, KV_HEADS, DIM, TABLE = 4, 2, 16, 64
SLOTS = (
    "query", "key", "value", "past_key", "past_value", "seqlens_k", "total", "cos", "sin", "position_ids", "bias",
    "sinks", "k_scale", "v_scale", "q_norm", "k_norm", "query_seqlens",
)  # fmt: skip
TYPES = {
    "seqlens_k": TensorProto.INT32, "total": TensorProto.INT32, "position_ids": TensorProto.INT64,
    "query_seqlens": TensorProto.INT32, "k_scale": TensorProto.FLOAT, "v_scale": TensorProto.FLOAT,
    "mask": TensorProto.INT64,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Form:
    """A model of one node, whose cache has `cache` elements: "" (none), float, int8 or int4."""

    cache: str = "float"
    packed: bool = True
    rotary: bool = False
    position_ids: bool = False
    norm: bool = False
    bias: bool = False
    sinks: bool = False
    chunks: bool = False  # query_seqlens
    mask: bool = False  # lengths and total come from a mask, as in onnxruntime-genai's models
    half: bool = False
    flat: bool = False  # scales of a quantized cache in one axis, as the builder writes them
    attributes: tuple[tuple[str, Any], ...] = ()

    @property
    def names(self) -> list[str]:
        unwanted = {
            "key": self.packed, "value": self.packed, "past_key": not self.cache, "past_value": not self.cache,
            "cos": not self.rotary, "sin": not self.rotary, "position_ids": not self.position_ids,
            "bias": not self.bias, "sinks": not self.sinks, "q_norm": not self.norm, "k_norm": not self.norm,
            "k_scale": not self.cache.startswith("int"), "v_scale": not self.cache.startswith("int"),
            "query_seqlens": not self.chunks,
        }  # fmt: skip
        names = ["" if unwanted.get(name) else name for name in SLOTS]
        while not names[-1]:
            names.pop()
        return names


def with_attributes(**attributes: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(attributes.items())


def quantized(by: str, bits: int) -> tuple[tuple[str, Any], ...]:
    return with_attributes(k_quant_type=by, v_quant_type=by, kv_cache_bit_width=bits)


def model_of(form: Form) -> onnx.ModelProto:
    element = TensorProto.FLOAT16 if form.half else TensorProto.FLOAT
    cache = {"int8": TensorProto.INT8, "int4": TensorProto.UINT8}.get(form.cache, element)
    stored = DIM // 2 if form.cache == "int4" else DIM
    width = (HEADS + 2 * KV_HEADS if form.packed else HEADS) * DIM
    shapes = {
        "query": ["B", "S", width], "key": ["B", "S", KV_HEADS * DIM], "value": ["B", "S", KV_HEADS * DIM],
        "past_key": ["B", KV_HEADS, "P", stored], "past_value": ["B", KV_HEADS, "P", stored], "seqlens_k": ["B"],
        "total": [1], "position_ids": ["B", "S"], "bias": [1, HEADS, "S", "T"], "query_seqlens": ["B"],
        "mask": ["B", "T"],
    }  # fmt: skip
    names = form.names
    per_channel = ("k_quant_type", "PER_CHANNEL") in form.attributes
    angles = np.arange(TABLE)[:, None] / 10 ** np.arange(DIM // 2)
    random = np.random.default_rng(1)
    scale = random.uniform(0.02, 0.03, (1, KV_HEADS, 1, DIM) if per_channel else 1).astype(np.float32)
    weights = {
        "cos": np.cos(angles), "sin": np.sin(angles), "sinks": random.standard_normal(HEADS),
        "q_norm": random.uniform(0.5, 2, DIM), "k_norm": random.uniform(0.5, 2, DIM),
    }  # fmt: skip
    kept = {name: array.astype(helper.tensor_dtype_to_np_dtype(element)) for name, array in weights.items()}
    scale = scale.reshape(-1) if form.flat else scale
    kept |= {"k_scale": scale, "v_scale": scale * 10 if form.cache == "int4" else scale}
    initializers = [numpy_helper.from_array(array, name) for name, array in kept.items() if name in names]
    given = [name for name in names if name and name not in kept]
    nodes = []
    if form.mask:
        given = [name for name in given if name not in ("seqlens_k", "total")] + ["mask"]
        initializers += [numpy_helper.from_array(np.array(1), "one"), numpy_helper.from_array(np.array([1]), "ones")]
        nodes = [
            helper.make_node("ReduceSum", ["mask", "ones"], ["sum"]),
            helper.make_node("Sub", ["sum", "ones"], ["last"]),
            helper.make_node("Cast", ["last"], ["seqlens_k"], to=TensorProto.INT32),
            helper.make_node("Shape", ["mask"], ["sizes"]),
            helper.make_node("Gather", ["sizes", "one"], ["size"]),
            helper.make_node("Cast", ["size"], ["total"], to=TensorProto.INT32),
        ]
    outputs = ["output", "present_key", "present_value"] if form.cache else ["output"]
    attributes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "do_rotary": int(form.rotary), **dict(form.attributes)}
    nodes.append(helper.make_node("GroupQueryAttention", names, outputs, "node", domain="com.microsoft", **attributes))
    kinds = {"past_key": cache, "past_value": cache} | TYPES
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kinds.get(name, element), shapes[name]) for name in given],
        [helper.make_tensor_value_info(name, element if name == "output" else cache, None) for name in outputs],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
