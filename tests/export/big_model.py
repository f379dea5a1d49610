# SPDX-License-Identifier: Apache-2.0
"""A transformer encoder of any size with random weights, written layer by layer.

Post-norm blocks as BERT's, attention decomposed as PyTorch exports it: [batch, sequence, hidden] in and out.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


@dataclasses.dataclass(frozen=True)
class EncoderSize:
    layers: int = 2
    heads: int = 4
    head_dim: int = 16

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim


class _Builder:
    def __init__(self, size: EncoderSize, seed: int) -> None:
        self.size = size
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, array: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op_type: str, name: str, *inputs: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def linear(self, name: str, x: str, rows: int, columns: int) -> str:
        weight = self.random.standard_normal((rows, columns), dtype=np.float32) / np.float32(np.sqrt(rows))
        product = self.node("MatMul", f"{name}/MatMul", x, self.constant(f"{name}.weight", weight))
        bias = self.random.standard_normal(columns, dtype=np.float32) * np.float32(0.02)
        return self.node("Add", f"{name}/Add", product, self.constant(f"{name}.bias", bias))

    def heads(self, name: str, x: str, perm: list[int]) -> str:
        """[B, S, H * D] to [B, S, H, D], transposed by `perm`."""
        return self.node(
            "Transpose", f"{name}/Transpose", self.node("Reshape", f"{name}/Reshape", x, "split_shape"), perm=perm
        )

    def attention(self, name: str, x: str) -> str:
        hidden = self.size.hidden
        query, key, value = (self.linear(f"{name}/{part}", x, hidden, hidden) for part in ("query", "key", "value"))
        scores = self.node(
            "MatMul",
            f"{name}/scores",
            self.heads(f"{name}/q", query, [0, 2, 1, 3]),
            self.heads(f"{name}/k", key, [0, 2, 3, 1]),
        )
        probabilities = self.node(
            "Softmax", f"{name}/Softmax", self.node("Div", f"{name}/Div", scores, "sqrt_head_dim"), axis=-1
        )
        context = self.node("MatMul", f"{name}/context", probabilities, self.heads(f"{name}/v", value, [0, 2, 1, 3]))
        merged = self.node("Transpose", f"{name}/merge", context, perm=[0, 2, 1, 3])
        return self.linear(
            f"{name}/output", self.node("Reshape", f"{name}/join", merged, "merge_shape"), hidden, hidden
        )

    def residual_norm(self, name: str, x: str, y: str) -> str:
        total = self.node("Add", f"{name}/Add", x, y)
        return self.node("LayerNormalization", f"{name}/LayerNorm", total, "norm_scale", "norm_bias", axis=-1)

    def layer(self, name: str, x: str) -> str:
        hidden = self.size.hidden
        x = self.residual_norm(f"{name}/attention_norm", x, self.attention(f"{name}/attention", x))
        inner = self.node("Relu", f"{name}/Relu", self.linear(f"{name}/up", x, hidden, 4 * hidden))
        return self.residual_norm(f"{name}/norm", x, self.linear(f"{name}/down", inner, 4 * hidden, hidden))


def encoder(size: EncoderSize, seed: int = 0) -> onnx.ModelProto:
    """A valid model with `size.layers` attention blocks; about 48 * layers * hidden ** 2 bytes."""
    builder = _Builder(size, seed)
    builder.constant("split_shape", np.array([0, 0, size.heads, size.head_dim], np.int64))
    builder.constant("merge_shape", np.array([0, 0, size.hidden], np.int64))
    builder.constant("sqrt_head_dim", np.sqrt(np.float32(size.head_dim)))
    builder.constant("norm_scale", np.ones(size.hidden, np.float32))
    builder.constant("norm_bias", np.zeros(size.hidden, np.float32))
    x = "hidden_states"
    for index in range(size.layers):
        x = builder.layer(f"/encoder/layer.{index}", x)
    shape = ["batch", "sequence", size.hidden]
    builder.nodes.append(helper.make_node("Identity", [x], ["last_hidden_state"], name="/output"))
    graph = helper.make_graph(
        builder.nodes,
        "encoder",
        [helper.make_tensor_value_info("hidden_states", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, shape)],
        builder.initializers,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9, producer_name="faexport-tests"
    )
    helper.set_model_props(model, {"author": "tests", "purpose": "sizes"})
    return model
