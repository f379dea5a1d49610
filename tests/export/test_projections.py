# SPDX-License-Identifier: Apache-2.0
"""Projections of one tensor become one product, where that computes the same; the others stay, with the reason."""

from __future__ import annotations

import collections
import pathlib

import faexport
import faplugin
import numpy as np
import onnx
import onnxruntime
import pytest
from faexport import pipeline
from faexport.files import model_io
from onnx import TensorProto, helper, numpy_helper

from tests.export.compared import run

HEADS, KV_HEADS, D, DV, E = 4, 2, 8, 6, 24
QKV = "queries, keys and values"
CASES = {  # keyword arguments of `attention`, and which are one product then
    "queries, keys and values": ({}, QKV),
    "without biases": ({"biased": ()}, QKV),
    "one without a bias": ({"biased": ("query", "value")}, QKV),
    "fewer key heads, wider values": ({"kv_heads": KV_HEADS, "value_dim": DV}, QKV),
    "cross attention": ({"memory": True}, "keys and values"),
    "queries by another way": ({"flaw": "query_twice"}, "keys and values"),
    "transposed weights": ({"transposed": True}, QKV),
    "values of another tensor": ({"value_source": "Tanh"}, "queries and keys"),
    "float16": ({"dtype": np.float16}, QKV),
}
APART = {  # flaw of the keys -> words of the reason
    "weight_twice": "the weight of the keys is used elsewhere too",
    "quantized": "is quantized",
    "given": "given by the caller",
    "given_bias": "no stored bias of one number a column",
    "lora": "no stored bias",
    "result_twice": "the projected keys are used elsewhere too",
    "normalized": "not the result of a product",
}


class Model:
    def __init__(self, dtype: type = np.float32) -> None:
        self.random, self.dtype = np.random.default_rng(1), dtype
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs = [self.tensor("x", ["batch", "rows", E])]
        self.outputs = [self.tensor("y", ["batch", "rows", None])]

    def tensor(self, name: str, shape: list) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype)), shape)

    def const(self, array: np.ndarray, name: str = "") -> str:
        name = name or f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def random_const(self, *shape: int, name: str = "") -> str:
        return self.const((self.random.standard_normal(shape) / np.sqrt(shape[0])).astype(self.dtype), name)

    def op(self, kind: str, *inputs: str, out: str = "", **attributes: object) -> str:
        out = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out], name=f"{kind}_{len(self.nodes)}", **attributes))
        return out

    def heads(self, x: str, heads: int, size: int, perm: list[int]) -> str:
        split = self.op("Reshape", x, self.const(np.array([0, 0, heads, size], np.int64)))
        return self.op("Transpose", split, perm=perm)

    def proto(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def attention(
    *,
    kv_heads: int = HEADS,
    value_dim: int = D,
    biased: tuple[str, ...] = ("query", "key", "value"),
    memory: bool = False,
    transposed: bool = False,
    value_source: str = "",
    dtype: type = np.float32,
    flaw: str = "",
) -> onnx.ModelProto:
    """Attention of x [B, S, E] with itself or, with `memory`, with another tensor."""
    m = Model(dtype)
    if memory:
        m.inputs.append(m.tensor("memory", ["batch", "keys", E]))

    def projected(role: str, source: str, width: int) -> str:
        own_flaw = flaw if role == "key" else ""
        weight = m.random_const(width, E) if transposed else m.random_const(E, width, name=f"{role}_weight")
        if transposed:
            weight = m.op("Transpose", weight, perm=[1, 0])
        if own_flaw == "quantized":
            whole = m.const(m.random.integers(-127, 127, (E, width)).astype(np.int8))
            weight = m.op("DequantizeLinear", whole, m.const(np.float32(0.01)))
        if own_flaw == "weight_twice":
            m.outputs.append(m.tensor("sum", None))
            m.op("ReduceSum", weight, out="sum", keepdims=0)
        if own_flaw == "given":
            m.inputs.append(m.tensor(weight, [E, width]))
        y = m.op("MatMul", source, weight)
        if own_flaw == "lora":
            y = m.op("Add", y, m.op("MatMul", m.op("MatMul", source, m.random_const(E, 2)), m.random_const(2, width)))
        elif role in biased:
            bias = m.random_const(width, name=f"{role}_bias")
            y = m.op("Add", y, bias)
            if own_flaw == "given_bias":
                m.inputs.append(m.tensor(bias, [width]))
        if own_flaw == "result_twice" or (flaw == "query_twice" and role == "query"):
            m.outputs.append(m.tensor("other", None))
            m.op("Tanh", y, out="other")
        if own_flaw == "normalized":
            y = m.op("LayerNormalization", y, m.random_const(width), axis=-1)
        return y

    other = "memory" if memory else "x"
    query = projected("query", "x", HEADS * D)
    key = projected("key", other, kv_heads * D)
    value = projected("value", m.op(value_source, other) if value_source else other, kv_heads * value_dim)
    query = m.heads(query, HEADS, D, [0, 2, 1, 3])
    key, value = m.heads(key, kv_heads, D, [0, 2, 3, 1]), m.heads(value, kv_heads, value_dim, [0, 2, 1, 3])
    if kv_heads < HEADS:
        index = m.const(np.repeat(np.arange(kv_heads), HEADS // kv_heads))
        key, value = m.op("Gather", key, index, axis=1), m.op("Gather", value, index, axis=1)
    scores = m.op("Mul", m.op("MatMul", query, key), m.const(np.array(D**-0.5, dtype)))
    context = m.op("MatMul", m.op("Softmax", scores, axis=-1), value)
    merged = m.op("Transpose", context, perm=[0, 2, 1, 3])
    m.op("Reshape", merged, m.const(np.array([0, 0, HEADS * value_dim], np.int64)), out="y")
    return m.proto()


def fused(model: onnx.ModelProto, library: str) -> tuple[onnx.ModelProto, faexport.Report]:
    """The fused model; it gave what the original gives, by the library and by the stand-in."""
    result, found = faexport.fuse(model)
    names = {v.name for v in model.graph.input} - {w.name for w in model.graph.initializer}
    random, dtype = (
        np.random.default_rng(2),
        helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type),
    )
    for batch, rows in ((2, 5), (1, 1)):
        shapes = {"x": (batch, rows, E), "memory": (batch, rows + 2, E)}
        inputs = {name: random.standard_normal(shapes[name]).astype(dtype) for name in names}
        for by in (library, None):
            for expected, got in zip(run(model, inputs), run(result, inputs, by), strict=True):
                np.testing.assert_allclose(got, expected, atol=2e-3 if dtype == np.float16 else 2e-5)
    return result, found


def counts(model: onnx.ModelProto) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("case", CASES)
def test_one_product_remains(case: str, library: str) -> None:
    arguments, roles = CASES[case]
    products = 1 if roles.startswith("queries, keys") else 2
    model, found = fused(attention(**arguments), library)
    assert counts(model)["MatMul"] == products and counts(model)["FlashAttention"] == 1
    assert f"{roles} are one product" in [fact.text for fact in found.sites[0].facts]


@pytest.mark.parametrize("flaw", APART)
def test_what_is_no_plain_projection_stays(flaw: str, library: str) -> None:
    model, found = fused(attention(flaw=flaw), library)
    assert counts(model)["FlashAttention"] == 1
    assert "queries and values are one product" in [fact.text for fact in found.sites[0].facts]
    assert any("projections stay as they are" in note and APART[flaw] in note for note in found.notes), found.notes


def test_the_file_keeps_its_weights_and_their_place(tmp_path: pathlib.Path) -> None:
    source, target = tmp_path / "model.onnx", tmp_path / "fused.onnx"
    onnx.save(attention(), source, save_as_external_data=True, location="weights", size_threshold=0)
    fused, _ = faexport.fuse(source, options=pipeline.Options(fallback=False))
    model_io.save(fused, target, source=source)
    before, after = (
        {w.name: numpy_helper.to_array(w).tobytes() for w in onnx.load(path).graph.initializer}
        for path in (source, target)
    )
    kept = {name: after[name] for name in before.keys() & after.keys()}
    assert (
        kept == {name: before[name] for name in kept}
        and {f"{r}_weight" for r in ("query", "key", "value")} <= kept.keys()
    )
    assert sum(map(len, after.values())) <= sum(map(len, before.values()))


def test_onnxruntime_computes_the_weights_when_it_loads_the_file(tmp_path: pathlib.Path) -> None:
    optimized = optimized_counts(attention(), tmp_path)
    assert optimized["MatMul"] == 1 and optimized["Concat"] == 0


def optimized_counts(model: onnx.ModelProto, folder: pathlib.Path) -> collections.Counter[str]:
    """Operators of the fused model, with none of onnxruntime's, as onnxruntime's CPU provider runs it."""
    fused, _ = faexport.fuse(model, options=pipeline.Options(rest=False, fallback=False))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    faplugin.register(options)
    onnxruntime.InferenceSession(fused.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return counts(onnx.load(options.optimized_model_filepath))


def test_onnxruntime_joins_what_stands_around(library: str, tmp_path: pathlib.Path) -> None:
    """A residual whose shape the export computes: onnxruntime alone doesn't know that both sides are equal."""
    model = attention()
    graph = model.graph
    graph.node[-1].output[0] = "context"
    sizes = [
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("Reshape", ["x", "sizes"], ["again"]),
        helper.make_node("MatMul", ["context", "output_weight"], ["projected"]),
        helper.make_node("Add", ["projected", "output_bias"], ["biased"]),
        helper.make_node("Add", ["biased", "again"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "gamma", "beta"], ["y"], axis=-1),
    ]
    graph.node.extend(sizes)
    shapes = {"output_weight": (HEADS * D, E), "output_bias": (E,), "gamma": (E,), "beta": (E,)}
    random = np.random.default_rng(0)
    graph.initializer.extend(
        numpy_helper.from_array(random.standard_normal(shape, np.float32), name) for name, shape in shapes.items()
    )
    fused(model, library)
    assert optimized_counts(model, tmp_path)["SkipLayerNormalization"] == 1


def test_sizes_that_may_differ_are_not_declared_equal() -> None:
    model = attention()
    graph = model.graph
    graph.input.append(helper.make_tensor_value_info("residual", TensorProto.FLOAT, ["groups", "rows", HEADS * D]))
    graph.node[-1].output[0] = "context"
    graph.node.append(helper.make_node("Add", ["context", "residual"], ["sum"]))
    graph.node.append(helper.make_node("Relu", ["sum"], ["y"]))
    graph.output[0].type.tensor_type.shape.dim[0].dim_param = "either"  # or the file itself says which one it is
    fused, _ = faexport.fuse(model, options=pipeline.Options(fallback=False))
    shapes = {info.name: info.type.tensor_type.shape for info in fused.graph.value_info}
    size = shapes["sum"].dim[0]
    assert size.dim_param not in ("batch", "groups") and not size.dim_value
