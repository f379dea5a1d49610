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
from faexport import model_io, ort_session, pipeline, report, verify
from onnx import TensorProto, helper, numpy_helper

from tests.export.test_sites import run

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


def fused(model: onnx.ModelProto, library: str) -> tuple[onnx.ModelProto, report.Report]:
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


def normalized_first(norm: str) -> onnx.ModelProto:
    """x + attention(x), whose sum is normalized and read again: y = sum + tanh(norm(sum))."""
    model = attention()
    graph = model.graph
    graph.node[-1].output[0] = "context"
    random = np.random.default_rng(0)
    weights = {"output_weight": (HEADS * D, E), "gamma": (E,), "beta": (E,)}
    graph.initializer.extend(
        numpy_helper.from_array(random.standard_normal(shape, np.float32), name) for name, shape in weights.items()
    )
    for name, number in (("two", 2.0), ("epsilon", 1e-6)):
        graph.initializer.append(numpy_helper.from_array(np.array(number, np.float32), name))
    graph.initializer.append(numpy_helper.from_array(np.array([-1]), "last"))
    layer = [helper.make_node("LayerNormalization", ["sum", "gamma", "beta"], ["normalized"], axis=-1)]
    root_mean_square = [
        helper.make_node("Pow", ["sum", "two"], ["squares"]),
        helper.make_node("ReduceMean", ["squares", "last"], ["mean"], keepdims=1, noop_with_empty_axes=0),
        helper.make_node("Add", ["mean", "epsilon"], ["above_zero"]),
        helper.make_node("Sqrt", ["above_zero"], ["size"]),
        helper.make_node("Reciprocal", ["size"], ["inverse"]),
        helper.make_node("Mul", ["sum", "inverse"], ["of_size_one"]),
        helper.make_node("Mul", ["gamma", "of_size_one"], ["normalized"]),
    ]
    if norm.endswith("TorchScript"):  # which casts first, to the type that is there
        graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), "one"))
        root_mean_square[4] = helper.make_node("Div", ["one", "size"], ["inverse"])
        root_mean_square[5].input[0] = root_mean_square[0].input[0] = "cast"
        root_mean_square.insert(0, helper.make_node("Cast", ["sum"], ["cast"], to=TensorProto.FLOAT))
    graph.node.extend(
        [
            helper.make_node("MatMul", ["context", "output_weight"], ["projected"]),
            helper.make_node("Add", ["x", "projected"], ["sum"]),
            *(layer if norm == "layer" else root_mean_square),
            helper.make_node("Tanh", ["normalized"], ["changed"]),
            helper.make_node("Add", ["sum", "changed"], ["y"]),
        ]
    )
    return model


JOINED = {
    "layer": "SkipLayerNormalization",
    "root mean square": "SkipSimplifiedLayerNormalization",
    "root mean square by TorchScript": "SkipSimplifiedLayerNormalization",
}


@pytest.mark.parametrize("norm", JOINED)
def test_the_rest_is_joined_where_asked(norm: str, tmp_path: pathlib.Path) -> None:
    source = tmp_path / "model.onnx"
    onnx.save(normalized_first(norm), source)
    for rest in (False, True):
        target = tmp_path / f"fused {rest}.onnx"
        result, found = faexport.fuse(source, options=pipeline.Options(rest=rest))
        model_io.save(result, target, source=source)
        written = onnx.load(target)
        assert counts(written)[JOINED[norm]] == rest
        assert any(f"joined around attention: 1 {JOINED[norm]}" in note for note in found.notes) == rest
    joined = next(node for node in written.graph.node if node.op_type == JOINED[norm])
    assert list(joined.output) == ["normalized", "", "", "sum"]
    checked = verify.verify(source, target)
    assert checked.status == "passed", checked.reason
    assert {"normalized", "sum"} <= {row.value for row in checked.sites}


@pytest.mark.parametrize("order", [("biased", "placed"), ("placed", "biased")], ids=str)
@pytest.mark.parametrize("place", [(1, 1, E), (E,)], ids=["a sum of embeddings", "a projection that is read again"])
def test_a_bias_is_joined_beside_another_sum(order: tuple[str, str], place: tuple, tmp_path: pathlib.Path) -> None:
    """The residual of a first layer is a sum whose second summand is no bias, or one that can't be joined."""
    model = normalized_first("layer")
    graph, random = model.graph, np.random.default_rng(1)
    graph.initializer.extend(
        numpy_helper.from_array(random.standard_normal(shape, np.float32), name)
        for name, shape in (("output_bias", E), ("place", place))
    )
    (residual,) = (node for node in graph.node if list(node.output) == ["sum"])
    residual.input[:] = order
    position = list(graph.node).index(residual)
    graph.node.insert(position, helper.make_node("Add", ["projected", "output_bias"], ["biased"]))
    graph.node.insert(position, helper.make_node("Add", ["x", "place"], ["placed"]))
    if len(place) == 1:
        (last,) = (node for node in graph.node if list(node.output) == ["y"])
        last.input[:] = ["changed", "both"]
        graph.node.insert(len(graph.node) - 1, helper.make_node("Add", ["sum", "placed"], ["both"]))
    source, target = tmp_path / "model.onnx", tmp_path / "fused.onnx"
    onnx.save(model, source)
    result, _ = faexport.fuse(source)
    model_io.save(result, target, source=source)
    (joined,) = (node for node in onnx.load(target).graph.node if node.op_type == "SkipLayerNormalization")
    assert len(joined.input) == 5 and joined.input[1] == "placed"
    assert verify.verify(source, target).status == "passed"


@pytest.mark.parametrize("divisor, joined", [(1.0, 1), (2.0, 0)])
def test_a_division_by_one_stands_in_no_one_s_way(divisor: float, joined: int, tmp_path: pathlib.Path) -> None:
    """diffusers ends its attention with one."""
    model = normalized_first("layer")
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.random.default_rng(1).standard_normal(E, np.float32), "bias"))
    graph.initializer.append(numpy_helper.from_array(np.float32(divisor), "divisor"))
    (residual,) = (node for node in graph.node if list(node.output) == ["sum"])
    residual.input[:] = ["divided", "x"]
    position = list(graph.node).index(residual)
    graph.node.insert(position, helper.make_node("Div", ["biased", "divisor"], ["divided"]))
    graph.node.insert(position, helper.make_node("Add", ["bias", "projected"], ["biased"]))
    source, target = tmp_path / "model.onnx", tmp_path / "fused.onnx"
    onnx.save(model, source)
    result, _ = faexport.fuse(source)
    model_io.save(result, target, source=source)
    (norm,) = (node for node in onnx.load(target).graph.node if node.op_type == "SkipLayerNormalization")
    assert (len(norm.input) == 5 and bool(norm.input[4])) == bool(joined)
    assert counts(onnx.load(target))["Div"] == 1 - joined
    assert verify.verify(source, target).status == "passed"


def test_a_wrong_normalization_would_be_found(tmp_path: pathlib.Path) -> None:
    source, target = tmp_path / "model.onnx", tmp_path / "fused.onnx"
    onnx.save(normalized_first("layer"), source)
    result, _ = faexport.fuse(source, options=pipeline.Options(rest=True))
    model_io.save(result, target, source=source)
    wrong = onnx.load(target)
    joined = next(node for node in wrong.graph.node if node.op_type == "SkipLayerNormalization")
    joined.input[1] = joined.input[0]
    onnx.save(wrong, target)
    assert verify.verify(source, target).status == "failed"


GELU = {  # how exporters write it -> the last nodes, of "biased", its error function "erf" and constants
    "TorchScript": (("Mul", "biased", "above", "twice"), ("Mul", "twice", "half", "y")),
    "torch.export": (("Mul", "half", "above", "share"), ("Mul", "biased", "share", "y")),
}


def with_gelu(spelling: str, bias_first: bool = True) -> onnx.ModelProto:
    model, random = attention(), np.random.default_rng(0)
    graph = model.graph
    graph.node[-1].output[0] = "context"
    sides = ["bias", "product"] if bias_first else ["product", "bias"]
    graph.node.extend(
        [
            helper.make_node("MatMul", ["context", "weight"], ["product"]),
            helper.make_node("Add", sides, ["biased"]),
            helper.make_node("Div", ["biased", "root"], ["divided"]),
            helper.make_node("Erf", ["divided"], ["erf"]),
            helper.make_node("Add", ["erf", "one"], ["above"]),
            *(helper.make_node(kind, inputs, [out]) for kind, *inputs, out in GELU[spelling]),
        ]
    )
    arrays = {
        "weight": random.standard_normal((HEADS * D, E), np.float32),
        "bias": random.standard_normal(E, np.float32),
    }
    arrays |= {name: np.array(x, np.float32) for name, x in (("root", np.sqrt(2)), ("one", 1), ("half", 0.5))}
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return model


@pytest.mark.parametrize("bias_first", [True, False])
@pytest.mark.parametrize("spelling", GELU)
def test_gelu_is_joined_with_its_bias(spelling: str, bias_first: bool, tmp_path: pathlib.Path) -> None:
    """TorchScript's exporter writes the bias first; onnxruntime by itself doesn't know torch.export's GELU."""
    source, target = tmp_path / "model.onnx", tmp_path / "fused.onnx"
    onnx.save(with_gelu(spelling, bias_first), source)
    result, found = faexport.fuse(source, options=pipeline.Options(rest=True))
    model_io.save(result, target, source=source)
    assert counts(onnx.load(target))["BiasGelu"] == 1 and any("1 BiasGelu" in note for note in found.notes)
    checked = verify.verify(source, target, open_session=ort_session.SessionHere)
    assert checked.status == "passed", checked.reason


@pytest.mark.parametrize("spelling", GELU)
def test_gelu_is_left_as_onnxruntime_recognizes_it(spelling: str, tmp_path: pathlib.Path) -> None:
    """In ONNX's own operators, which TensorRT runs too."""
    source, target, optimized = (tmp_path / name for name in ("model.onnx", "fused.onnx", "optimized.onnx"))
    onnx.save(with_gelu(spelling), source)
    result, found = faexport.fuse(source, options=pipeline.Options(target="tensorrt"))
    model_io.save(result, target, source=source)
    made = onnx.load(target)
    assert [node.op_type for node in made.graph.node][-5:] == ["Div", "Erf", "Add", "Mul", "Mul"]
    assert any("0.5 of 1 GELU was moved" in note for note in found.notes) == (spelling == "torch.export")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    faplugin.register(options)
    onnxruntime.InferenceSession(target, options, providers=["CPUExecutionProvider"])
    assert counts(onnx.load(optimized))["BiasGelu"] == 1
    checked = verify.verify(source, target, open_session=ort_session.SessionHere)
    assert checked.status == "passed", checked.reason


def test_only_a_gelu_in_float32_is_turned() -> None:
    for change in ("read twice", "an output", "another factor", "with an axis"):
        model = with_gelu("torch.export")
        graph = model.graph
        half = next(x for x in graph.initializer if x.name == "half")
        if change == "read twice":
            graph.node.append(helper.make_node("Identity", ["share"], ["also"]))
            graph.output.append(helper.make_tensor_value_info("also", TensorProto.FLOAT, None))
        elif change == "an output":
            graph.output.append(helper.make_tensor_value_info("share", TensorProto.FLOAT, None))
        else:
            value = np.array(0.25, np.float32) if change == "another factor" else np.full((1,), 0.5, np.float32)
            half.CopyFrom(numpy_helper.from_array(value, "half"))
        _, found = faexport.fuse(model)
        assert found.num_fused == 1 and not any("GELU" in note for note in found.notes), change


def not_sure(change: str) -> onnx.ModelProto:
    """Models that come near to what is joined, and differ from it."""
    if change in ("bias of one number", "double"):
        model = with_gelu("TorchScript")
        sizes = {"bias": (1,)}
    else:
        model = normalized_first("layer" if change == "sizes unknown" else "root mean square")
        sizes = {"gamma": ()}
    graph = model.graph
    if change == "sizes unknown":
        graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [None, None, E]))
        next(node for node in graph.node if list(node.output) == ["sum"]).input[0] = "other"
    elif change == "double":
        for node in graph.node:
            node.input[:] = ["context_wide" if name == "context" else name for name in node.input]
        wide = helper.make_node("Cast", ["context"], ["context_wide"], to=TensorProto.DOUBLE)
        graph.node.insert(next(i for i, node in enumerate(graph.node) if "context_wide" in node.input), wide)
        graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
        for tensor in graph.initializer:
            if tensor.name in ("weight", "bias", "root", "one", "half"):
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    else:
        for tensor in graph.initializer:
            if tensor.name in sizes:
                tensor.CopyFrom(numpy_helper.from_array(np.full(sizes[tensor.name], 0.5, np.float32), tensor.name))
    return model


@pytest.mark.parametrize("change", ["bias of one number", "double", "sizes unknown", "weight of one number"])
def test_what_may_not_fit_is_not_joined(change: str, tmp_path: pathlib.Path) -> None:
    """onnxruntime's operators take weights of a whole row, residuals of equal sizes, and float32 or float16."""
    source, target = tmp_path / "model.onnx", tmp_path / "fused.onnx"
    onnx.save(not_sure(change), source)
    result, found = faexport.fuse(source)
    model_io.save(result, target, source=source)
    assert found.num_fused == 1
    assert not {"BiasGelu", *JOINED.values(), "SimplifiedLayerNormalization"} & found.joined.keys()
    if change == "double":  # onnxruntime's CPU provider has no Erf of such numbers
        return
    checked = verify.verify(source, target, open_session=ort_session.SessionHere)
    assert checked.status == "passed", checked.reason


def test_a_target_decides_what_is_joined() -> None:
    for options, wanted in (({}, 1), ({"target": "tensorrt"}, 0), ({"rest": False}, 0), ({"rest": True}, 1)):
        result, found = faexport.fuse(with_gelu("TorchScript"), options=pipeline.Options(**options))
        assert found.joined == ({"BiasGelu": 1} if wanted else {})
        assert counts(result)["BiasGelu"] == wanted
    for options, word in (({"target": "tensorrt", "rest": True}, "tensorrt"), ({"target": "openvino"}, "expected")):
        with pytest.raises(ValueError, match=word):
            pipeline.Options(**options)


def test_a_bias_in_front_of_the_residual_is_joined(tmp_path: pathlib.Path) -> None:
    """As TorchScript's exporter writes it: bias + product, then the residual; what isn't joined stays as it was."""
    model, random = attention(), np.random.default_rng(0)
    graph = model.graph
    graph.node[-1].output[0] = "context"
    graph.node.extend(
        [
            helper.make_node("MatMul", ["context", "weight"], ["product"]),
            helper.make_node("Add", ["bias", "product"], ["biased"]),
            helper.make_node("Add", ["biased", "x"], ["sum"]),
            helper.make_node("LayerNormalization", ["sum", "gamma", "beta"], ["normalized"], axis=-1),
            helper.make_node("Add", ["shift", "normalized"], ["y"], name="shifted"),
        ]
    )
    shapes = {"weight": (HEADS * D, E), **dict.fromkeys(("bias", "gamma", "beta", "shift"), (E,))}
    graph.initializer.extend(
        numpy_helper.from_array(random.standard_normal(shape, np.float32), name) for name, shape in shapes.items()
    )
    result, _ = faexport.fuse(model, options=pipeline.Options(rest=True, fallback=False))
    (joined,) = (node for node in result.graph.node if node.op_type == "SkipLayerNormalization")
    constants = {node.output[0] for node in result.graph.node if node.op_type == "Constant"}
    assert joined.input[4] in constants and counts(result)["Add"] == 1  # with the values' bias in it; the last
    (last,) = (node for node in result.graph.node if node.name == "shifted")
    assert list(last.input) == ["shift", "normalized"]
