# SPDX-License-Identifier: Apache-2.0
"""Decoder layers as onnxruntime-genai's model builder writes them, with GroupQueryAttention. Used by benchmarks/llm.py.

Weights are inputs of the model, so that two sessions share them, and so that they need not be written anywhere.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Shape:
    """The layers of a decoder. `windows` take turns, 0: none."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int = 0  # of the gated MLP; 0: attention alone
    windows: tuple[int, ...] = (0,)
    sinks: bool = False
    rope_theta: float = 500000.0

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def weights(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The weights of one layer by name."""
        found: dict[str, tuple[int, ...]] = {
            "norm": (self.hidden,),
            "qkv": (self.hidden, self.qkv),
            "o": (self.heads * self.head_dim, self.hidden),
        }
        if self.intermediate:
            found |= {"norm_mlp": (self.hidden,), "down": (self.intermediate, self.hidden)}
            found |= dict.fromkeys(("gate", "up"), (self.hidden, self.intermediate))
        return {f"layer{layer}.{name}": shape for name, shape in found.items()}


LLAMA = Shape("Llama-3-8B", 4096, 32, 8, 128, intermediate=14336)
GPT_OSS = Shape("gpt-oss-20B, attention alone", 2880, 64, 8, 64, windows=(128, 0), sinks=True, rope_theta=150000.0)


def caches(layers: int) -> dict[str, str]:
    """The caches that are inputs, and the outputs that continue them."""
    sides = [(layer, side) for layer in range(layers) for side in ("key", "value")]
    return {f"past_key_values.{layer}.{side}": f"present.{layer}.{side}" for layer, side in sides}


def decoder(shape: Shape, layers: int, positions: int) -> onnx.ModelProto:
    """`layers` layers in float16: hidden states [B, S, hidden] in and out, an attention mask [B, total] that tells the
    lengths, caches [B, H_kv, capacity, head_dim]. The rotary tables have `positions` rows."""
    half = TensorProto.FLOAT16
    inputs = [
        helper.make_tensor_value_info("hidden_states", half, ["B", "S", shape.hidden]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["B", "T"]),
    ]
    inputs += [
        helper.make_tensor_value_info(name, half, ["B", shape.kv_heads, "C", shape.head_dim]) for name in caches(layers)
    ]
    weights = {name: size for layer in range(layers) for name, size in shape.weights(layer).items()}
    inputs += [helper.make_tensor_value_info(name, half, size) for name, size in weights.items()]
    outputs = [helper.make_tensor_value_info("output", half, ["B", "S", shape.hidden])]
    outputs += [
        helper.make_tensor_value_info(name, half, ["B", shape.kv_heads, "C2", shape.head_dim])
        for name in caches(layers).values()
    ]
    angles = np.arange(positions)[:, None] / shape.rope_theta ** (np.arange(shape.head_dim // 2) * 2 / shape.head_dim)
    tables = {"cos_cache": np.cos(angles).astype(np.float16), "sin_cache": np.sin(angles).astype(np.float16)}
    constants = {"one": np.array(1), "ones": np.array([1])} | tables
    if shape.sinks:  # part of the file, as those of a model are: whatever a session casts them to, it casts once
        drawn = np.random.default_rng(0).standard_normal((layers, shape.heads)).astype(np.float16)
        constants |= {f"layer{layer}.sinks": drawn[layer] for layer in range(layers)}
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    nodes = [*_lengths()]
    states, residual = "hidden_states", ""
    for layer in range(layers):
        made, states, residual = _layer(shape, layer, states, residual)
        nodes += made
    nodes.append(helper.make_node("Add", [states, residual], ["output"], name="last_residual"))
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _lengths() -> list[onnx.NodeProto]:
    """seqlens_k and total_sequence_length from the mask, as in every model of the builder."""
    return [
        helper.make_node("ReduceSum", ["attention_mask", "ones"], ["sums"], name="sums", keepdims=0),
        helper.make_node("Sub", ["sums", "ones"], ["last"], name="last"),
        helper.make_node("Cast", ["last"], ["seqlens_k"], name="seqlens_k", to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["sizes"], name="sizes"),
        helper.make_node("Gather", ["sizes", "one"], ["size"], name="size"),
        helper.make_node("Cast", ["size"], ["total"], name="total", to=TensorProto.INT32),
    ]


def _norm(layer: str, which: str, states: str, residual: str, to: str) -> onnx.NodeProto:
    """The norm of the states, and with them the residual that they are added to, named `to`_sum."""
    weight = f"{layer}.{which}"
    if not residual:
        attributes = {"axis": -1, "epsilon": EPSILON, "stash_type": 1}
        return helper.make_node("SimplifiedLayerNormalization", [states, weight], [to], name=to, **attributes)
    return helper.make_node(
        "SkipSimplifiedLayerNormalization", [residual, states, weight], [to, "", "", f"{to}_sum"], name=to,
        domain="com.microsoft", epsilon=EPSILON,
    )  # fmt: skip


def _layer(shape: Shape, index: int, states: str, residual: str) -> tuple[list[onnx.NodeProto], str, str]:
    """The nodes, and the names of the states and of what they have still to be added to."""
    layer, window = f"layer{index}", shape.windows[index % len(shape.windows)]

    def node(op_type: str, given: list[str], name: str) -> onnx.NodeProto:
        return helper.make_node(op_type, given, [f"{layer}.{name}"], name=f"{layer}.{name}")

    pasts = [f"past_key_values.{index}.{side}" for side in ("key", "value")]
    grouped = [f"{layer}.packed", "", "", *pasts, "seqlens_k", "total", "cos_cache", "sin_cache"]
    grouped += ["", "", f"{layer}.sinks"] if shape.sinks else []
    nodes = [
        _norm(layer, "norm", states, residual, f"{layer}.normed"),
        node("MatMul", [f"{layer}.normed", f"{layer}.qkv"], "packed"),
        helper.make_node(
            "GroupQueryAttention", grouped, [f"{layer}.attended", *(caches(index + 1)[past] for past in pasts)],
            name=f"{layer}.attention", domain="com.microsoft", num_heads=shape.heads, kv_num_heads=shape.kv_heads,
            do_rotary=1, local_window_size=window or -1,
        ),
        node("MatMul", [f"{layer}.attended", f"{layer}.o"], "projected"),
    ]  # fmt: skip
    residual = f"{layer}.normed_sum" if residual else states
    if not shape.intermediate:
        return nodes, f"{layer}.projected", residual
    nodes += [
        _norm(layer, "norm_mlp", f"{layer}.projected", residual, f"{layer}.normed_mlp"),
        node("MatMul", [f"{layer}.normed_mlp", f"{layer}.gate"], "gated"),
        node("MatMul", [f"{layer}.normed_mlp", f"{layer}.up"], "raised"),
        node("Sigmoid", [f"{layer}.gated"], "sigmoid"),
        node("Mul", [f"{layer}.gated", f"{layer}.sigmoid"], "silu"),
        node("Mul", [f"{layer}.silu", f"{layer}.raised"], "product"),
        node("MatMul", [f"{layer}.product", f"{layer}.down"], "lowered"),
    ]
    return nodes, f"{layer}.lowered", f"{layer}.normed_mlp_sum"
