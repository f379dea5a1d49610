# SPDX-License-Identifier: Apache-2.0
"""--fp16 and --bf16: the whole model in half precision, what stays float32, and the comparison with the original."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable

import faexport
import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from faexport import jobs, pipeline
from faexport.files import model_io
from faexport.precision import half, half_check, half_nodes
from faexport.report.data import HalfPrecision, VerificationStatus
from faexport.runtimes import ort_session
from faexport.verify import model_check
from onnx import TensorProto, helper, numpy_helper

from tests.export.commands import here
from tests.export.test_around import with_gelu
from tests.export.test_projections import HEADS, D, E, attention

FLOAT, FLOAT16, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16


def behind(model: onnx.ModelProto, *nodes: onnx.NodeProto, **weights: object) -> onnx.ModelProto:
    """The model with more nodes, from "context" to "y"."""
    model.graph.node[-1].output[0] = "context"
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(x), name) for name, x in weights.items())
    return model


def squares() -> onnx.ModelProto:
    """A root-mean-square normalization written out, of numbers around 1000: their squares are too large for float16."""
    return behind(
        attention(),
        helper.make_node("Mul", ["context", "thousand"], ["large"], name="large"),
        helper.make_node("Mul", ["large", "large"], ["squares"], name="squares"),
        helper.make_node("ReduceMean", ["squares", "last"], ["mean"], name="mean"),
        helper.make_node("Sqrt", ["mean"], ["size"], name="size"),
        helper.make_node("Div", ["large", "size"], ["y"], name="normalized"),
        thousand=np.float32(1000),
        last=np.array([-1]),
    )


def with_positions() -> onnx.ModelProto:
    """y = context + sin(position * frequency), each row of another position."""
    return behind(
        attention(),
        helper.make_node("Shape", ["x"], ["sizes"], name="sizes"),
        helper.make_node("Gather", ["sizes", "one"], ["rows"], axis=0, name="rows"),
        helper.make_node("Range", ["zero", "rows", "one"], ["numbers"], name="numbers"),
        helper.make_node("Cast", ["numbers"], ["position"], to=FLOAT, name="position"),
        helper.make_node("Unsqueeze", ["position", "last"], ["column"], name="column"),
        helper.make_node("MatMul", ["column", "frequencies"], ["angle"], name="angle"),
        helper.make_node("Sin", ["angle"], ["wave"], name="wave"),
        helper.make_node("Add", ["context", "wave"], ["y"], name="sum"),
        zero=np.int64(0),
        one=np.int64(1),
        last=np.array([-1]),
        frequencies=np.linspace(0.01, 1, HEADS * D, dtype=np.float32)[None],
    )


def with_expanded_frequencies() -> onnx.ModelProto:
    """The same as TorchScript writes rotary positions: the stored frequencies are repeated for each batch entry."""
    model = with_positions()
    (place,) = (i for i, node in enumerate(model.graph.node) if node.name == "angle")
    model.graph.node[place].input[1] = "repeated"
    model.graph.node.insert(place, helper.make_node("Expand", ["frequencies", "batch"], ["repeated"], name="repeated"))
    model.graph.node.insert(place, helper.make_node("Concat", ["entries", "any"], ["batch"], axis=0, name="batch"))
    model.graph.node.insert(place, helper.make_node("Gather", ["sizes", "first"], ["entries"], name="entries"))
    weights = {"first": np.array([0]), "any": np.array([1, 1])}
    model.graph.initializer.extend(numpy_helper.from_array(x, name) for name, x in weights.items())
    return model


class Converted:
    """A model, its fused form and that in float16, in a folder."""

    def __init__(
        self,
        model: onnx.ModelProto,
        folder: pathlib.Path,
        keep_io_types: bool = True,
        dtype: ir.DataType = ir.DataType.FLOAT16,
    ):
        self.source, self.fused, self.target = (folder / f"{name}.onnx" for name in ("model", "fused", "half"))
        onnx.save(model, self.source)
        model_io.save(pipeline.run(model_io.load(self.source))[0], self.fused)
        self.reference = model_check.make_reference(self.source, open_session=ort_session.SessionHere)
        self.made = half_check.make(self.reference, self.fused, keep_io_types=keep_io_types, dtype=dtype)
        model_io.save(self.made.model, self.target)
        self.proto = onnx.load(self.target)

    def check(self) -> HalfPrecision:
        return half_check.check(self.reference, self.made.said, self.target)

    def types(self) -> dict[str, int]:
        known = [*self.proto.graph.value_info, *self.proto.graph.input, *self.proto.graph.output]
        types = {value.name: value.type.tensor_type.elem_type for value in known}
        return types | {tensor.name: tensor.data_type for tensor in self.proto.graph.initializer}


@pytest.mark.parametrize("keep_io_types", [True, False])
def test_the_whole_model_is_converted(keep_io_types: bool, library: str, tmp_path: pathlib.Path) -> None:
    half_model = Converted(attention(), tmp_path, keep_io_types)
    types = half_model.types()
    assert types["x"] == types["y"] == (FLOAT if keep_io_types else FLOAT16)
    weights = [t.data_type for t in half_model.proto.graph.initializer if t.data_type in (FLOAT, FLOAT16)]
    assert set(weights) == {FLOAT16} and not half_model.made.said.kept
    said = half_model.check()
    assert said.status == "passed", said.reason
    (row,) = said.outputs
    assert 0 < row.max_abs_diff <= row.tolerance and row.plain_abs_diff > 0


class EmptyFails(ort_session.SessionHere):
    """Crashes where onnxruntime optimizes, and can't run the model on nothing."""

    def __init__(self, job: ort_session.Job) -> None:
        if job.optimize:
            raise ort_session.Crashed("onnxruntime crashed (signal 11)")
        super().__init__(job)

    def run(self, tensors: ort_session.Tensors) -> dict[str, np.ndarray]:
        if any(tensor.size == 0 for tensor in tensors.values()):
            raise ort_session.ModelFailure("a size of -1")
        return super().run(tensors)


def test_what_onnxruntime_alone_gets_wrong_is_no_fault_of_the_model(library: str, tmp_path: pathlib.Path) -> None:
    half_model = Converted(attention(), tmp_path)
    assert any(x.size == 0 for item in half_model.reference.sets for x in item.tensors.values())
    half_model.reference.open_session = EmptyFails
    said = half_model.check()
    assert said.status == "passed", said.reason
    assert any("nothing to compute: a size of -1" in note for note in said.notes)
    assert any("only without its own graph optimizations (graph_optimization_level" in note for note in said.notes)


def test_casts_that_older_onnxruntime_writes_twice_are_one() -> None:
    """As its converter does where two Resize read the same tensor."""
    cast = helper.make_node("Cast", ["x"], ["x_cast_to_fp32"], "x_cast_to_fp32_node", to=FLOAT)
    readers = [helper.make_node("Relu", ["x_cast_to_fp32"], [name], name) for name in ("a", "b")]
    inputs = [helper.make_tensor_value_info("x", FLOAT16, [2])]
    outputs = [helper.make_tensor_value_info(name, FLOAT, [2]) for name in ("a", "b")]
    graph = helper.make_graph([cast, readers[0], cast, readers[1]], "twins", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    with pytest.raises(ir.serde.SerdeError):
        ir.from_proto(model)
    made = ir.from_proto(half.without_twins(model))
    assert [node.op_type for node in made.graph] == ["Cast", "Relu", "Relu"]


def test_what_overflows_stays_float32(library: str, tmp_path: pathlib.Path) -> None:
    half_model = Converted(squares(), tmp_path)
    kept = half_model.made.said.kept
    assert {"squares", "mean", "size"} <= kept.keys() and "numbers up to" in kept["squares"]
    assert not any("FlashAttention" in name or name.startswith("MatMul") for name in kept)
    said = half_model.check()
    assert said.status == "passed", said.reason


def test_without_that_it_would_be_found(library: str, tmp_path: pathlib.Path) -> None:
    """onnxruntime's CPU provider computes such nodes in float32, so only the run with roundings shows it."""
    half_model = Converted(squares(), tmp_path)
    broken = half.convert(half.prepared(half_model.fused), {}, keep_io_types=True, fallback=True)
    model_io.save(broken, half_model.target)
    said = half_model.check()
    assert said.status == "failed" and "differs by" in said.reason, said


def test_large_numbers_pass_between_nodes_that_stay(tmp_path: pathlib.Path) -> None:
    """The converter casts to float16 and back there; that is taken out."""
    model = Converted(squares(), tmp_path).proto
    made_by = {output: node for node in model.graph.node for output in node.output}
    (mean,) = (node for node in model.graph.node if node.name == "mean")
    assert made_by[mean.input[0]].name == "squares"


@pytest.mark.parametrize("make", [with_positions, with_expanded_frequencies])
def test_positions_stay_float32(make: Callable[[], onnx.ModelProto], library: str, tmp_path: pathlib.Path) -> None:
    """Short inputs would not show it: float16 counts to 2,048."""
    half_model = Converted(make(), tmp_path)
    kept = half_model.made.said.kept
    assert {"position", "angle", "wave"} <= kept.keys() and "sum" not in kept
    assert ("repeated" in kept) == (make is with_expanded_frequencies)
    rows = 3000
    x = np.random.default_rng(0).standard_normal((1, rows, E)).astype(np.float32)
    outputs = [
        ort_session.run_here(ort_session.Job(str(path), [{"x": x}])).outputs[0]["y"]
        for path in (half_model.source, half_model.target)
    ]
    assert np.abs(outputs[0] - outputs[1]).max() < 0.02


def test_embeddings_and_layers_are_no_positions(tmp_path: pathlib.Path) -> None:
    onnx.save(attention(), tmp_path / "model.onnx")
    assert not list(half_nodes.positions(half.prepared(tmp_path / "model.onnx")))


def test_wrong_weights_are_found(library: str, tmp_path: pathlib.Path) -> None:
    half_model = Converted(attention(), tmp_path)
    weight = next(t for t in half_model.proto.graph.initializer if t.name == "value_weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float16(1.02), weight.name))
    onnx.save(half_model.proto, half_model.target)
    said = half_model.check()
    assert said.status == "failed" and "in float16 output 'y' differs" in said.reason


def test_float32_inputs_of_the_operator_stay(library: str, tmp_path: pathlib.Path) -> None:
    """A sink is a float32 logit by the operator's definition."""
    model = attention()
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    (scores,), (weights,) = softmax.input, softmax.output
    nodes = [
        helper.make_node("Shape", [scores], ["score_sizes"]),
        helper.make_node("Gather", ["score_sizes", "three_axes"], ["sink_sizes"], axis=0),
        helper.make_node("Concat", ["sink_sizes", "one_column"], ["all_sizes"], axis=0),
        helper.make_node("Expand", ["sinks", "all_sizes"], ["sink_column"]),
        helper.make_node("Concat", [scores, "sink_column"], ["with_sink"], axis=-1),
        helper.make_node("Softmax", ["with_sink"], ["with_sink_weights"], axis=-1),
        helper.make_node("Slice", ["with_sink_weights", "begin", "end", "axis"], [weights]),
    ]
    index = list(model.graph.node).index(softmax)
    rest = list(model.graph.node)[index + 1 :]
    del model.graph.node[index:]
    model.graph.node.extend([*nodes, *rest])
    arrays = {
        "sinks": np.linspace(-1, 1, HEADS, dtype=np.float32).reshape(1, HEADS, 1, 1),
        "three_axes": np.array([0, 1, 2]), "one_column": np.array([1]),
        "begin": np.array([0]), "end": np.array([-1]), "axis": np.array([-1]),
    }  # fmt: skip
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    half_model = Converted(model, tmp_path)
    (node,) = (node for node in half_model.proto.graph.node if node.op_type == "FlashAttention")
    (words,) = (a.s.decode() for a in node.attribute if a.name == "optional_inputs")
    assert "sinks" in words.split(",")
    assert half_model.check().status == "passed"


def test_command(library: str, tmp_path: pathlib.Path) -> None:
    source, target = tmp_path / "model.onnx", tmp_path / "model.fa.onnx"
    onnx.save(attention(), source)
    done = here(source, "--fp16", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["half_precision"]["status"] == "passed" and said["half_precision"]["keep_io_types"]
    assert said["half_precision"]["outputs"][0]["ok"] and said["provenance"]["options"]["fp16"]
    assert not any("float32 attention" in note for note in said["notes"])
    assert "fp16=True" in {entry.key: entry.value for entry in onnx.load(target).metadata_props}["faexport"]
    shown = here(source, "--fp16", "--no-keep-io-types", "--dry-run")
    assert "in float32 still: nothing" in shown.stdout and "verification in float16 passed" in shown.stdout


@pytest.mark.parametrize("options", [{"fp16": True}, {"bf16": True}])
def test_weights_beside_the_file_stay_there(
    options: dict, library: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_io, "EXTERNAL_THRESHOLD_BYTES", 100)
    onnx.save(attention(), tmp_path / "given.onnx", save_as_external_data=True, location="w", size_threshold=100)
    faexport.optimize(tmp_path / "given.onnx", tmp_path / "made.onnx", faexport.Options(**options))
    stored = onnx.load(tmp_path / "made.onnx", load_external_data=False).graph.initializer
    assert {entry.value for tensor in stored for entry in tensor.external_data if entry.key == "location"} == {
        "made.onnx.data"
    }
    assert (tmp_path / "made.onnx.data").stat().st_size > 0


def test_usage(tmp_path: pathlib.Path) -> None:
    source = tmp_path / "model.onnx"
    onnx.save(attention(dtype=np.float16), source)
    done = here(source, "--fp16")
    assert done.returncode == 2 and "has half precision already" in done.stderr
    assert here(source, "--fp16", "--dtype", "fp16").returncode == 2
    assert here(source, "--no-keep-io-types").returncode == 2
    with pytest.raises(ValueError, match="optimize"):
        faexport.fuse(source, options=faexport.Options(fp16=True))


def test_a_float16_model_that_fails_is_not_written(
    library: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "model.onnx", tmp_path / "half.onnx"
    onnx.save(squares(), source)
    find = half_nodes.find
    for broken, words in (
        ((True, False), "in float16 output"),
        ((True, True), "mostly noise"),
    ):  # ours; the original too

        def nothing(
            path: object, reference: model_check.Reference, dtype: ir.DataType, broken: tuple[bool, bool] = broken
        ) -> dict[str, str]:
            return {} if broken[path == reference.path] else find(path, reference, dtype)

        monkeypatch.setattr(half_nodes, "find", nothing)
        with pytest.raises(faexport.NotVerifiedError, match=words):
            jobs.optimize(source, target, faexport.Options(fp16=True))
        assert not target.exists()


def test_what_fails_with_joined_operators_is_made_without(
    library: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody asked for them."""
    source, target = tmp_path / "model.onnx", tmp_path / "fused.onnx"
    onnx.save(with_gelu("TorchScript"), source)
    check = half_check.check

    def fails(reference: model_check.Reference, said: HalfPrecision, written: pathlib.Path, *rest: object) -> object:
        joined = any(node.op_type == "BiasGelu" for node in onnx.load(written).graph.node)
        found = check(reference, said, written, *rest)
        return dataclasses.replace(found, status=VerificationStatus.FAILED, reason="no") if joined else found

    monkeypatch.setattr(half_check, "check", fails)
    with pytest.raises(faexport.NotVerifiedError):
        jobs.optimize(source, target, faexport.Options(fp16=True, rest=True))
    assert not target.exists()
    done = jobs.optimize(source, target, faexport.Options(fp16=True))
    assert done.output and not done.joined and any("nothing is joined" in note for note in done.notes)


def test_bodies_are_refused(tmp_path: pathlib.Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Neg", ["context"], ["negative"])],
        "then",
        [],
        [helper.make_tensor_value_info("negative", FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["context"], ["same"])],
        "else",
        [],
        [helper.make_tensor_value_info("same", FLOAT, None)],
    )
    model = behind(attention(), helper.make_node("If", ["flag"], ["y"], then_branch=body, else_branch=other))
    model.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    onnx.save(model, tmp_path / "model.onnx")
    done = here(tmp_path / "model.onnx", "--fp16")
    assert done.returncode == 2 and "a body of an If, Loop or Scan" in done.stderr, done.stderr
    assert str(tmp_path / "model.onnx") in done.stderr and ".faexport-" not in done.stderr


def test_without_the_library_the_stand_in_is_measured(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ort_session, half_nodes):
        monkeypatch.setattr(module, "has_library", lambda: False)
    half_model = Converted(squares(), tmp_path)
    assert "squares" in half_model.made.said.kept
    assert half_model.check().status == "passed"


def of_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    model.opset_import[0].version = opset
    return model


@pytest.mark.parametrize("keep_io_types", [True, False])
def test_the_whole_model_becomes_bfloat16(keep_io_types: bool, library: str, tmp_path: pathlib.Path) -> None:
    model = attention()
    half_model = Converted(model, tmp_path, keep_io_types, ir.DataType.BFLOAT16)
    types, said = half_model.types(), half_model.made.said
    assert types["x"] == types["y"] == (FLOAT if keep_io_types else BFLOAT16)
    assert not said.kept and said.dtype == "bfloat16" and FLOAT16 not in types.values()
    wanted = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = [tensor for tensor in half_model.proto.graph.initializer if tensor.data_type == BFLOAT16]
    assert weights
    for tensor in weights:
        rounded = wanted[tensor.name].astype(ml_dtypes.bfloat16)
        assert np.array_equal(numpy_helper.to_array(tensor).astype(np.float32), rounded.astype(np.float32))
    said = half_model.check()
    assert said.status == "passed", said.reason
    (row,) = said.outputs
    assert 0 < row.max_abs_diff <= row.tolerance and row.plain_abs_diff > 0


def test_bfloat16_has_the_range_of_float32(library: str, tmp_path: pathlib.Path) -> None:
    """Numbers that float16 can't hold, stored ones and attributes too, come out as they are; not the end of float32's
    range, which bfloat16 would round to infinity."""
    stored = helper.make_tensor("value", FLOAT, [1], [1e6])
    model = behind(
        of_opset(attention(), 18),
        helper.make_node("ConstantOfShape", ["no_axis"], ["large"], name="large", value=stored),
        helper.make_node("Mul", ["context", "large"], ["by_attribute"], name="by attribute"),
        helper.make_node("Mul", ["by_attribute", "million"], ["by_weight"], name="by weight"),
        helper.make_node("Div", ["by_weight", "billions"], ["small"], name="small"),
        helper.make_node("Max", ["small", "least"], ["y"], name="above the least"),
        million=np.float32(1e6), billions=np.float32(1e12), least=np.float32(np.finfo(np.float32).min),
        no_axis=np.zeros(0, np.int64),
    )  # fmt: skip
    half_model = Converted(model, tmp_path, dtype=ir.DataType.BFLOAT16)
    assert half_model.made.said.kept.keys() == {"above the least"}
    said = half_model.check()
    assert said.status == "passed", said.reason


def test_what_onnxruntime_has_no_kernel_for_stays_float32(library: str, tmp_path: pathlib.Path) -> None:
    model = behind(of_opset(attention(), 18), helper.make_node("Sin", ["context"], ["y"], name="sine"))
    half_model = Converted(model, tmp_path, dtype=ir.DataType.BFLOAT16)
    assert half_model.made.said.kept == {"sine": "is Sin, which onnxruntime doesn't run in bfloat16"}
    (cast,) = (
        node for node in half_model.proto.graph.node if node.op_type == "Cast" and node.output[0] in sine_of(half_model)
    )
    assert onnx.helper.get_node_attr_value(cast, "to") == FLOAT
    assert half_model.check().status == "passed"


def sine_of(half_model: Converted) -> list[str]:
    (sine,) = (node for node in half_model.proto.graph.node if node.op_type == "Sin")
    return list(sine.input)


def test_positions_stay_float32_beside_bfloat16(library: str, tmp_path: pathlib.Path) -> None:
    kept = Converted(with_positions(), tmp_path, dtype=ir.DataType.BFLOAT16).made.said.kept
    assert {"position", "angle", "wave"} <= kept.keys() and "sum" not in kept


def test_wrong_weights_in_bfloat16_are_found(library: str, tmp_path: pathlib.Path) -> None:
    half_model = Converted(attention(), tmp_path, dtype=ir.DataType.BFLOAT16)
    weight = next(t for t in half_model.proto.graph.initializer if t.name == "value_weight")
    wrong = (numpy_helper.to_array(weight).astype(np.float32) * 1.1).astype(ml_dtypes.bfloat16)
    weight.CopyFrom(ir.to_proto(ir.tensor(wrong, name=weight.name)))
    onnx.save(half_model.proto, half_model.target)
    said = half_model.check()
    assert said.status == "failed" and "in bfloat16 output 'y' differs" in said.reason


def test_command_for_bfloat16(library: str, tmp_path: pathlib.Path) -> None:
    source, target = tmp_path / "model.onnx", tmp_path / "model.fa.onnx"
    onnx.save(with_gelu("TorchScript"), source)
    done = here(source, "--bf16", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["half_precision"]["status"] == "passed" and said["half_precision"]["dtype"] == "bfloat16"
    assert said["provenance"]["options"]["bf16"] and "BiasGelu" in {n.op_type for n in onnx.load(target).graph.node}
    shown = here(source, "--bf16", "--dry-run")
    assert "verification in bfloat16 passed" in shown.stdout


@pytest.mark.parametrize(
    ("model", "flags", "sentence"),
    [
        (attention(dtype=np.float16), ["--fp16"], "has half precision already"),
        (of_opset(attention(), 15), ["--bf16"], "add --opset 18"),
    ],
    ids=["half", "bf16"],
)
def test_a_precision_that_is_impossible_is_refused_before_anything_is_run(
    model: onnx.ModelProto, flags: list[str], sentence: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comparing the models takes minutes where they are large."""
    monkeypatch.setattr(jobs, "make_reference", lambda *args, **more: pytest.fail("the original was run"))
    onnx.save(model, tmp_path / "model.onnx")
    done = here(tmp_path / "model.onnx", *flags)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_usage_of_bfloat16(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "model.onnx"
    onnx.save(of_opset(attention(), 15), source)
    done = here(source, "--bf16")
    assert done.returncode == 2 and "add --opset 18" in done.stderr, done.stderr
    assert here(source, "--bf16", "--fp16").returncode == 2
    assert here(source, "--bf16", "--dtype", "bf16").returncode == 2
    for module in (ort_session, half_nodes):
        monkeypatch.setattr(module, "has_library", lambda: False)
    said = Converted(attention(), tmp_path, dtype=ir.DataType.BFLOAT16).check()
    assert said.status == "not run" and "the operator's library" in said.reason


def test_the_noise_of_the_original_is_that_of_its_farther_run() -> None:
    """Each way of running its conversion rounds otherwise: where scores are large, one alone may come out near by
    chance."""
    want = np.linspace(-5, 5, 8, dtype=np.float32)
    near, far, got = ({"y": want + x} for x in (0.01, 0.3, 0.5))

    def row(*plain: dict[str, np.ndarray]) -> half_check.HalfOutput:
        found = half_check._row("y", want, got["y"], plain, "float16", "large")
        assert not isinstance(found, str)
        return found

    assert row(near, far).ok and row(far, near).ok and not row(near, near).ok
    assert row(near, far).plain_abs_diff == pytest.approx(0.3)
    said = half_check._row("y", want, got["y"], ({"y": want + 4}, near), "float16", "large")
    assert isinstance(said, str) and "mostly noise" in said
