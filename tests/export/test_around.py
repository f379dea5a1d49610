# SPDX-License-Identifier: Apache-2.0
"""What stands around attention becomes operators of onnxruntime, where that computes the same."""

from __future__ import annotations

import pathlib

import faexport
import faplugin
import numpy as np
import onnx
import onnxruntime
import pytest
from faexport import pipeline
from faexport.files import model_io
from faexport.runtimes import ort_session
from faexport.verify import model_check
from onnx import TensorProto, helper, numpy_helper

from tests.export.mutations import MODELS
from tests.export.test_projections import HEADS, D, E, attention, counts


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
    spelled_out = [
        helper.make_node("ReduceMean", ["sum", "last"], ["mean of rows"]),
        helper.make_node("Sub", ["sum", "mean of rows"], ["centred"]),
        helper.make_node("Pow", ["centred", "two"], ["squares"]),
        *root_mean_square[1:4],
        helper.make_node("Div", ["centred", "size"], ["of_size_one"]),
        helper.make_node("Mul", ["of_size_one", "gamma"], ["scaled"]),
        helper.make_node("Add", ["scaled", "beta"], ["normalized"]),
    ]
    nodes = {"layer": layer, "layer, spelled out": spelled_out}
    graph.node.extend(
        [
            helper.make_node("MatMul", ["context", "output_weight"], ["projected"]),
            helper.make_node("Add", ["x", "projected"], ["sum"]),
            *nodes.get(norm, root_mean_square),
            helper.make_node("Tanh", ["normalized"], ["changed"]),
            helper.make_node("Add", ["sum", "changed"], ["y"]),
        ]
    )
    return model


JOINED = {
    "layer": "SkipLayerNormalization",
    "layer, spelled out": "SkipLayerNormalization",
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
    checked = model_check.verify(source, target)
    assert checked.status == "passed", checked.reason
    assert {"normalized", "sum"} <= {row.value for row in checked.sites}


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_layer_normalizations_of_old_opsets_are_joined_whole(name: str, tmp_path: pathlib.Path) -> None:
    """TorchScript's exporter spells them out below opset 17. Where a part was taken for a root-mean-square
    normalization, onnxruntime's optimizer no longer knew the rest, and the file had more kernels than the original."""
    source, target = MODELS / f"{name}.onnx", tmp_path / "fused.onnx"
    result, found = faexport.fuse(source)
    model_io.save(result, target, source=source)
    assert onnx.load(source).opset_import[0].version == 14
    assert found.joined["SkipLayerNormalization"] + found.joined.get("LayerNormalization", 0) == 3
    assert not {"ReduceMean", "Sub", "SimplifiedLayerNormalization"} & counts(onnx.load(target)).keys()
    checked = model_check.verify(source, target)
    assert checked.status == "passed" and not checked.lost_optimizations, checked


def test_a_layer_normalization_without_a_bias(tmp_path: pathlib.Path) -> None:
    model = normalized_first("layer, spelled out")
    added = next(node for node in model.graph.node if list(node.output) == ["normalized"])
    model.graph.node.remove(added)
    next(node for node in model.graph.node if list(node.output) == ["scaled"]).output[0] = "normalized"
    source, target = tmp_path / "model.onnx", tmp_path / "fused.onnx"
    onnx.save(model, source)
    result, _ = faexport.fuse(source)
    model_io.save(result, target, source=source)
    (norm,) = (node for node in onnx.load(target).graph.node if node.op_type == "LayerNormalization")
    assert list(norm.input) == ["sum", "gamma"]
    checked = model_check.verify(source, target)
    assert checked.status == "passed", checked.reason


def test_numbers_that_nothing_reads_any_more_go() -> None:
    """onnxruntime warns of each stored tensor that no node reads; one that none read before stays."""
    model = normalized_first("layer")
    numbers = {"root": 2**0.5, "whole": 1.0, "half": 0.5, "nobody's": 7.0}
    for name, number in numbers.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(number, np.float32), name))
    last = model.graph.node.pop()
    model.graph.node.extend(
        [
            helper.make_node("Div", ["changed", "root"], ["divided"]),
            helper.make_node("Erf", ["divided"], ["erf"]),
            helper.make_node("Add", ["erf", "whole"], ["raised"]),
            helper.make_node("Mul", ["changed", "raised"], ["product"]),
            helper.make_node("Mul", ["product", "half"], ["active"]),
            helper.make_node("Add", ["sum", "active"], list(last.output)),
        ]
    )
    fused, found = faexport.fuse(model)
    assert found.joined == {"Gelu": 1, "SkipLayerNormalization": 1}
    read = {name for node in fused.graph.node for name in node.input}
    unread = {tensor.name for tensor in model.graph.initializer} - {x for node in model.graph.node for x in node.input}
    assert {tensor.name for tensor in fused.graph.initializer} - read == unread and "nobody's" in unread


def test_a_normalization_that_nothing_reads_stays_whole(tmp_path: pathlib.Path) -> None:
    """A dead node of the model that was given, as onnxruntime-genai's builder may leave one, keeps its output."""
    model = normalized_first("layer")
    nodes = [node for node in model.graph.node if node.op_type != "Tanh" and "y" not in node.output]
    dead = helper.make_node("SkipLayerNormalization", ["sum", "x", "gamma"], ["unread"], domain="com.microsoft")
    del model.graph.node[:]
    model.graph.node.extend([*nodes, dead, helper.make_node("Add", ["sum", "normalized"], ["y"])])
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    source, target = tmp_path / "model.onnx", tmp_path / "fused.onnx"
    onnx.save(model, source)
    result, found = faexport.fuse(source)
    assert found.joined == {"SkipLayerNormalization": 1}
    model_io.save(result, target, source=source)
    assert all(any(node.output) for node in onnx.load(target).graph.node)
    assert model_check.verify(source, target).status == "passed"


def test_a_normalization_whose_sum_alone_is_read_has_a_name(tmp_path: pathlib.Path) -> None:
    """onnxruntime takes no node whose first output has none."""
    model = normalized_first("layer")
    changed = next(node for node in model.graph.node if node.op_type == "Tanh")
    changed.input[0] = "projected"
    source, target = tmp_path / "model.onnx", tmp_path / "fused.onnx"
    onnx.save(model, source)
    result, found = faexport.fuse(source)
    model_io.save(result, target, source=source)
    assert all(node.output[0] for node in onnx.load(target).graph.node)
    assert model_check.verify(source, target).status == "passed"


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
    assert model_check.verify(source, target).status == "passed"


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
    assert model_check.verify(source, target).status == "passed"


def test_a_wrong_normalization_would_be_found(tmp_path: pathlib.Path) -> None:
    source, target = tmp_path / "model.onnx", tmp_path / "fused.onnx"
    onnx.save(normalized_first("layer"), source)
    result, _ = faexport.fuse(source, options=pipeline.Options(rest=True))
    model_io.save(result, target, source=source)
    wrong = onnx.load(target)
    joined = next(node for node in wrong.graph.node if node.op_type == "SkipLayerNormalization")
    joined.input[1] = joined.input[0]
    onnx.save(wrong, target)
    assert model_check.verify(source, target).status == "failed"


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
    checked = model_check.verify(source, target, open_session=ort_session.SessionHere)
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
    checked = model_check.verify(source, target, open_session=ort_session.SessionHere)
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
    checked = model_check.verify(source, target, open_session=ort_session.SessionHere)
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


def test_a_sum_that_is_read_in_front_of_its_normalization_is_made_there(tmp_path: pathlib.Path) -> None:
    """Every node stands behind those that make what it reads, as ONNX asks for."""
    model = normalized_first("layer")
    nodes = list(model.graph.node)
    place = next(i for i, node in enumerate(nodes) if node.op_type == "LayerNormalization")
    early = [helper.make_node("Sigmoid", ["sum"], ["early"]), helper.make_node("Mul", ["early", "early"], ["other"])]
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *early, *nodes[place:]])
    model.graph.output.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, None))
    result, found = faexport.fuse(model)
    assert found.joined == {"SkipLayerNormalization": 1}
    made = {value.name for value in (*result.graph.input, *result.graph.initializer)}
    for node in result.graph.node:
        assert set(filter(None, node.input)) <= made, node.name
        made.update(node.output)


def test_nothing_is_joined_where_onnxruntime_crashes_on_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on LED in float16: its optimizer for CPUs. Without what is joined it takes the file."""
    real = ort_session.Session

    def session(job: ort_session.Job, *arguments: object, **named: object) -> ort_session.Session:
        content = job.model if isinstance(job.model, bytes) else pathlib.Path(job.model).read_bytes()
        if job.optimize and b"SkipLayerNormalization" in content:
            raise ort_session.Crashed("onnxruntime crashed (signal 11)")
        return real(job, *arguments, **named)

    onnx.save(normalized_first("layer"), tmp_path / "model.onnx")
    monkeypatch.setattr(ort_session, "Session", session)
    report = faexport.optimize(tmp_path / "model.onnx", tmp_path / "fused.onnx")
    assert report.num_fused == 1 and report.verification.status == "passed" and not report.joined
    assert any("nothing is joined around attention" in note and "signal 11" in note for note in report.notes)
    written = onnx.load(tmp_path / "fused.onnx")
    assert not any(node.op_type == "SkipLayerNormalization" for node in written.graph.node)
