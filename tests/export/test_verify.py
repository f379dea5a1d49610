# SPDX-License-Identifier: Apache-2.0
"""verify: equal models pass, each kind of difference fails, and what can't be compared is said and not hidden."""

from __future__ import annotations

import pathlib

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from faexport import pipeline
from faexport.feeds import inputs
from faexport.feeds.open_sizes import OpenSizes
from faexport.feeds.settings import Assumed
from faexport.files import model_io
from faexport.report.data import Verification, VerificationStatus
from faexport.runtimes import ort_session
from faexport.verify import compare, model_check, reference
from onnx import TensorProto, helper, numpy_helper

from tests.export import big_model
from tests.export import mask_grammar as grammar
from tests.export.commands import here

PASSED, FAILED, NOT_RUN = VerificationStatus.PASSED, VerificationStatus.FAILED, VerificationStatus.NOT_RUN


def save(path: pathlib.Path, nodes: list, given: dict, output: tuple, constants: dict | None = None) -> pathlib.Path:
    """A model of these nodes; inputs and output as name: (dtype, shape)."""
    values = [helper.make_tensor_value_info(name, *what) for name, what in given.items()]
    weights = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", values, [helper.make_tensor_value_info("y", *output)], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def scaled(path: pathlib.Path, factor: float, dtype: int = TensorProto.FLOAT) -> pathlib.Path:
    """y = factor * x."""
    numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
    constants = {"factor": np.array(factor, numpy_type)}
    vector = (dtype, ["n", 8])
    return save(path, [helper.make_node("Mul", ["x", "factor"], ["y"])], {"x": vector}, vector, constants)


def test_equal_models_pass_on_several_sizes(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.onnx"
    onnx.save(big_model.encoder(big_model.EncoderSize()), path)
    result = model_check.verify(path, path)
    assert result.status is PASSED
    shapes = [run.inputs["hidden_states"] for run in result.runs]
    assert len(set(shapes)) >= 3, "other sizes where dims are dynamic"
    assert all(output.max_abs_diff == 0 for run in result.runs for output in run.outputs)


@pytest.mark.parametrize(
    ("dtype", "factor", "status"),
    [
        (TensorProto.FLOAT, 1 + 1e-5, PASSED),
        (TensorProto.FLOAT, 1 + 1e-3, FAILED),
        (TensorProto.FLOAT16, 1 + 1e-3, PASSED),
        (TensorProto.FLOAT16, 1 + 1e-2, FAILED),
    ],
)
def test_the_tolerance_follows_the_dtype(
    dtype: int, factor: float, status: VerificationStatus, tmp_path: pathlib.Path
) -> None:
    result = model_check.verify(scaled(tmp_path / "a.onnx", 1.0, dtype), scaled(tmp_path / "b.onnx", factor, dtype))
    assert result.status is status, result


@pytest.mark.parametrize(("right_window", "status"), [(0, PASSED), (1, FAILED)])
def test_a_mask_that_is_off_by_one_shows_in_float16(
    right_window: int, status: VerificationStatus, tmp_path: pathlib.Path
) -> None:
    """Behind a residual eighty times as large, where a wrong key changes the output by a hundredth."""
    recipe = grammar.Recipe(("j <= i",), fill=-np.inf, dtype="float16")
    model = grammar.build(recipe)
    attention = model.graph.output[0].name
    model.graph.initializer.append(numpy_helper.from_array(np.array(80, np.float16), "eighty"))
    model.graph.node.append(helper.make_node("Mul", ["q", "eighty"], ["residual"]))
    model.graph.node.append(helper.make_node("Add", ["residual", attention], ["y"]))
    model.graph.output[0].name = "y"
    onnx.save(model, tmp_path / "a.onnx")
    fused, report = pipeline.run(model_io.load(tmp_path / "a.onnx"))
    assert report.num_fused == 1
    node = next(node for node in fused.graph if node.op_type == "FlashAttention")
    node.attributes["right_window_size"] = ir.AttrInt64("right_window_size", right_window)
    node.attributes["is_causal"] = ir.AttrInt64("is_causal", 0)
    model_io.save(fused, tmp_path / "b.onnx")
    result = model_check.verify(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert result.status is status, result
    outputs = [output for run in result.runs for output in run.outputs if output.tolerance]
    worst = max(output.max_abs_diff / output.tolerance for output in outputs)
    assert worst < 1 if status is PASSED else 1 < worst < 10, "a tolerance of 2e-2 would not have seen it"


@pytest.mark.parametrize(("factor", "status"), [(1.0, PASSED), (1 + 1e-3, PASSED), (1.05, FAILED)])
def test_float16_is_judged_by_the_original_s_own_rounding(
    factor: float, status: VerificationStatus, tmp_path: pathlib.Path
) -> None:
    """The original rounds x + 100 to float16, so it is 0.03 away from itself in float32; the other one doesn't."""
    vector = (TensorProto.FLOAT, ["n", 8])
    nodes = [
        helper.make_node("Add", ["x", "hundred"], ["large"]),
        helper.make_node("Cast", ["large"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["back"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["back", "hundred"], ["y"]),
    ]
    original = save(tmp_path / "a.onnx", nodes, {"x": vector}, vector, {"hundred": np.array(100, np.float32)})
    result = model_check.verify(original, scaled(tmp_path / "b.onnx", factor))
    assert result.status is status, result
    assert result.worst.tolerance > compare.RELATIVE_TOLERANCE["float16"] * 5, "twice its own rounding, not more"


def test_bfloat16_values_are_compared() -> None:
    want = np.array([1.0, 2.0, 4.0], ml_dtypes.bfloat16)
    assert compare.compare("y", want, want, 1.6e-2).ok
    assert not compare.compare("y", want, want[::-1], 1.6e-2).ok


def test_what_differs_in_kind_fails() -> None:
    want = np.array([1.0, np.nan, np.inf], np.float32)
    assert compare.compare("y", want, np.array([1.0, 0.0, np.inf], np.float32), 1e-4).ok, "0 where 0 / 0 was"
    assert not compare.compare("y", want, np.array([np.nan, 0.0, np.inf], np.float32), 1e-4).ok
    assert not compare.compare("y", want, np.array([1.0, 0.0, 7.0], np.float32), 1e-4).ok
    assert not compare.compare("y", want, want[:2], 1e-4).ok
    assert not compare.compare("y", want, want.astype(np.float64), 1e-4).ok
    assert not compare.compare("y", np.array([1, 2]), np.array([1, 3]), 1e-4).ok


def test_an_original_that_does_not_run_is_said(tmp_path: pathlib.Path) -> None:
    node = helper.make_node("NoSuchOperator", ["x"], ["y"], domain="some.where")
    vector = (TensorProto.FLOAT, ["n", 8])
    path = save(tmp_path / "a.onnx", [node], {"x": vector}, vector)
    proto = onnx.load(path)
    proto.opset_import.append(helper.make_opsetid("some.where", 1))
    onnx.save(proto, path)
    result = model_check.verify(path, path)
    assert result.status is NOT_RUN and "NoSuchOperator" in result.reason and "does not run" in result.reason
    assert "--inputs" not in result.reason, "what does not load does not run on any inputs"


def test_a_rewritten_model_that_does_not_run_fails(tmp_path: pathlib.Path) -> None:
    good = scaled(tmp_path / "a.onnx", 1.0)
    vector = (TensorProto.FLOAT, ["n", 8])
    shape = {"shape": np.array([3, 5], np.int64)}
    bad = save(tmp_path / "b.onnx", [helper.make_node("Reshape", ["x", "shape"], ["y"])], {"x": vector}, vector, shape)
    result = model_check.verify(good, bad)
    assert result.status is FAILED and "does not run" in result.reason


def test_a_model_that_is_random_is_not_judged(tmp_path: pathlib.Path) -> None:
    vector = (TensorProto.FLOAT, ["n", 8])
    path = save(tmp_path / "a.onnx", [helper.make_node("RandomNormalLike", ["x"], ["y"])], {"x": vector}, vector)
    result = model_check.verify(path, path)
    assert result.status is NOT_RUN and "mostly noise" in result.reason
    assert "the model draws random numbers (RandomNormalLike" in result.reason


# Numbers that are random in few runs only, as stochastic depth makes them, look like a difference; so does dropout.
NOISES = {
    "RandomUniformLike": [
        helper.make_node("RandomUniformLike", ["x"], ["noise"], name="drawn", low=-1e-3, high=1e-3),
        helper.make_node("Add", ["x", "noise"], ["y"]),
    ],
    "Dropout": [
        helper.make_node("Dropout", ["x", "ratio", "training"], ["dropped"], name="drawn"),
        helper.make_node("Mul", ["dropped", "little"], ["noise"]),
        helper.make_node("Add", ["x", "noise"], ["y"]),
    ],
}
CONSTANTS = {"ratio": np.float32(0.5), "training": np.array(True), "little": np.float32(1e-3)}


@pytest.mark.parametrize("kind", NOISES)
def test_a_difference_of_a_model_that_draws_random_numbers_says_so(
    kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the original by chance agreed with itself when it ran a second time, the rewritten model seems wrong."""
    monkeypatch.setattr(reference.Reference, "plain_outputs", lambda self, index: self.outputs[index])
    vector = (TensorProto.FLOAT, ["n", 8])
    constants = CONSTANTS if kind == "Dropout" else {}
    path = save(tmp_path / "a.onnx", NOISES[kind], {"x": vector}, vector, constants)
    result = model_check.verify(path, path)
    assert result.status is FAILED and result.reason.startswith("output 'y' differs by")
    assert f"draws random numbers ({kind} 'drawn')" in result.reason
    assert result.reason.endswith("call model.eval() before exporting")


def test_what_is_advised_depends_on_no_words(tmp_path: pathlib.Path) -> None:
    vector = (TensorProto.FLOAT, ["n", 8])
    random = model_io.load(save(tmp_path / "a.onnx", NOISES["RandomUniformLike"], {"x": vector}, vector))
    other_words = Verification(FAILED, "said otherwise", of_output=True, any_numbers=True)
    reason = model_check._with_advice(other_words, random).reason
    assert "--assume zeros-and-ones" in reason and "draws random numbers" in reason
    like_them = Verification(FAILED, "output 'y' differs, on 'mask' not only 0 and 1")
    assert model_check._with_advice(like_them, random) == like_them


class _Optimizer:
    """Opens sessions; onnxruntime's optimizations fail on models of these names."""

    def __init__(self, *failing: str):
        self.failing = failing

    def __call__(self, job: ort_session.Job) -> ort_session.SessionHere:
        if job.optimize and pathlib.Path(str(job.model)).name in self.failing:
            raise ort_session.ModelFailure("an optimization of onnxruntime failed")
        return ort_session.SessionHere(job)


def test_optimizations_are_lost_where_they_fail_on_the_rewritten_model_alone(tmp_path: pathlib.Path) -> None:
    paths = [scaled(tmp_path / f"{name}.onnx", 1.0) for name in "abc"]
    original = reference.make_reference(paths[0], open_session=_Optimizer("b.onnx"))
    lost, kept = (model_check.verify_against(original, path) for path in paths[1:])
    assert "an optimization of onnxruntime failed" in lost.lost_optimizations and lost.lost_optimizations in lost.notes
    assert kept.lost_optimizations == "" and not kept.notes, "what was said of another model"
    of_both = model_check.verify(paths[0], paths[1], open_session=_Optimizer("a.onnx", "b.onnx"))
    assert of_both.lost_optimizations == "" and len(of_both.notes) == 2 and of_both.status is PASSED


def test_lengths_that_the_model_refuses_are_replaced(tmp_path: pathlib.Path) -> None:
    """Its input must divide into rows of 32."""
    shape = {"shape": np.array([-1, 32], np.int64)}
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    path = save(tmp_path / "a.onnx", [node], {"x": (TensorProto.FLOAT, [1, "n"])}, (TensorProto.FLOAT, None), shape)
    result = model_check.verify(path, path)
    compared = [run for run in result.runs if run.outputs]
    assert result.status is PASSED and compared[0].inputs["x"] == (1, 32)


def test_ids_stay_inside_their_tables_and_masks_are_masks(tmp_path: pathlib.Path) -> None:
    nodes = [
        helper.make_node("Unsqueeze", ["input_ids", "one"], ["ids"]),
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["kept"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["kept"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["rows", "sum"], ["y"]),
    ]
    given = {name: (TensorProto.INT64, ["batch", "sequence"]) for name in ("input_ids", "attention_mask")}
    constants = {"table": np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32), "one": np.array([1])}
    path = save(tmp_path / "a.onnx", nodes, given, (TensorProto.FLOAT, None), constants)
    specs = inputs.input_specs(model_io.load(path))
    bound = inputs.bind(specs, inputs.Sizes(4, 50))
    assert bound == {"batch": 4, "sequence": 50}
    drawn = inputs.draw(specs, bound, inputs.Drawing(inputs.MaskPattern.RIGHT_PADDED), np.random.default_rng(0))
    assert drawn["input_ids"].min() >= 0 and 5 < drawn["input_ids"].max() < 11
    mask = drawn["attention_mask"]
    assert set(np.unique(mask)) == {0, 1} and mask[0].all() and (np.diff(mask, axis=1) <= 0).all()
    left = inputs.draw(specs, bound, inputs.Drawing(inputs.MaskPattern.LEFT_PADDED), np.random.default_rng(0))[
        "attention_mask"
    ]
    assert (np.diff(left, axis=1) >= 0).all() and not left.all()


def test_a_mask_over_past_and_new_tokens_is_as_long_as_both() -> None:
    def value(name: str, *shape: object) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT if "past" in name else TensorProto.INT64, shape)

    given = [
        value("input_ids", "batch", "s"),
        value("attention_mask", "batch", "m"),
        value("past_key", "batch", 2, "p", 8),
        value("total", "batch", "s + p"),
    ]
    graph = helper.make_graph([], "g", given, [])
    model = model_io.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))
    bound = inputs.bind(inputs.input_specs(model), inputs.Sizes(2, 16, 5))
    assert bound == {"batch": 2, "s": 16, "m": 21, "p": 5}


def test_a_sequence_needs_inputs_of_the_user(tmp_path: pathlib.Path) -> None:
    parts = helper.make_tensor_sequence_value_info("parts", TensorProto.FLOAT, ["n"])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m"])
    graph = helper.make_graph(
        [helper.make_node("ConcatFromSequence", ["parts"], ["y"], axis=0)], "g", [parts], [output]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "a.onnx")
    result = model_check.verify(tmp_path / "a.onnx", tmp_path / "a.onnx")
    assert result.status is NOT_RUN and "parts" in result.reason and "--inputs" in result.reason


def test_a_crash_of_the_runtime_is_an_answer(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that is killed leaves a sentence, and this process alive."""
    crash = tmp_path / "onnxruntime.py"
    crash.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = ort_session.run(ort_session.Job("model.onnx", []))
    assert "crashed" in result.error and "11" in result.error


# Attention of rows of a table of four.
OF_A_TABLE = """<ir_version: 9, opset_import: ["": 17]>
g (int64[b, n] ids) => (float[b, n, 2] y) <float[4, 2] table = {1, 2, 3, 4, 5, 6, 7, 8}> {
    x = Gather (table, ids) t = Transpose <perm = [0, 2, 1]> (x) s = MatMul (x, t) w = Softmax (s) y = MatMul (w, x)
}"""


def test_inputs_of_the_user_that_the_original_does_not_run_on_are_no_comparison(tmp_path: pathlib.Path) -> None:
    """The user believes that they are compared, though the drawn ones pass."""
    path, given = tmp_path / "a.onnx", tmp_path / "in.npz"
    onnx.save(onnx.parser.parse_model(OF_A_TABLE), path)
    np.savez(given, ids=np.array([[0, 3]]))
    assert here(path, "--inputs", given, "--dry-run", "-q").returncode == 0
    np.savez(given, ids=np.array([[0, 4]]))
    done = here(path, "--inputs", given, "-q")
    assert done.returncode == 1 and not (tmp_path / "a.fa.onnx").exists()
    assert "the original does not run on in.npz: indices element out of data bounds" in done.stderr
    assert "; give inputs that it runs on; " in done.stderr


def test_sizes_that_the_exporter_fixed_are_said_to_be_so(tmp_path: pathlib.Path) -> None:
    nodes = [helper.make_node("Reshape", ["x", "traced"], ["y"])]
    constants = {"traced": np.array([11, 13])}
    for sizes, told in (["b", "s"], True), ([7, 7], False):
        given = {"x": (TensorProto.FLOAT, sizes)}
        path = save(tmp_path / "a.onnx", nodes, given, (TensorProto.FLOAT, [11, 13]), constants)
        found = model_check.verify(path, path, open_session=ort_session.SessionHere)
        assert found.status is NOT_RUN and "give inputs with --inputs file.npz" in found.reason
        assert ("of the sizes that it was exported with" in found.reason) == told


def test_messages_of_the_runtime_are_short() -> None:
    message = (
        "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Reshape node. Name:'r' "
        "Status Message: "
        "/src/onnxruntime/core/providers/cpu/tensor/reshape_helper.h:45 onnxruntime::ReshapeHelper(const X&, bool) "
        "size != 0 was false."
    )
    assert ort_session.one_line(message) == "size != 0 was false."
    message = (
        "[ONNXRuntimeError] : 1 : FAIL : Load model from a.onnx failed:/src/onnxruntime/core/graph/model.cc:179 "
        "onnxruntime::Model::Model(onnx::ModelProto&&, const std::function<void(int)>&, const X&) const Unsupported "
        "model IR version: 10, max supported IR version: 9\n"
    )
    said = "Unsupported model IR version: 10, max supported IR version: 9"
    assert ort_session.one_line(message) == said


# Where no key is left in float16, onnxruntime's CPU kernels, which compute in float32, know which was hidden least.
OVERFLOWING = """<ir_version: 8, opset_import: ["": 17]>
g (float16[B,2,T,8] q, float16[B,2,S,8] k, float16[B,2,S,8] v, float[B,1,1,S] mask) => (float16[B,2,T,8] y)
<float16 low = {-65504}, float one = {1}> {
    kt = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul (q, kt) away = Sub (one, mask) half = Cast <to = 10> (away)
    hidden = Mul (half, low) x = Add (s, hidden) p = Softmax <axis = -1> (x) y = MatMul (p, v)
}"""


def test_what_only_other_numbers_than_0_and_1_contradict_can_be_assumed(tmp_path: pathlib.Path) -> None:
    path, fused = tmp_path / "a.onnx", tmp_path / "b.onnx"
    model = onnx.parser.parse_model(OVERFLOWING)
    low = next(x for x in model.graph.initializer if x.name == "low")
    low.CopyFrom(numpy_helper.from_array(np.float16(-65504), "low"))
    onnx.save(model, path)
    model_io.save(pipeline.run(model_io.load(path))[0], fused)
    result = model_check.verify(path, fused)
    assert result.status is FAILED and "--assume zeros-and-ones" in result.reason
    assert model_check.verify(path, fused, assumed=Assumed(zeros_and_ones=True)).status is PASSED
    target = tmp_path / "c.onnx"
    assert here(path, "-o", target).returncode == 1 and not target.exists()
    assert here(path, "-o", target, "--assume", "zeros-and-ones").returncode == 0 and target.exists()


def test_a_result_larger_than_the_file_says_is_compared_too(tmp_path: pathlib.Path) -> None:
    """The file says that y has q's batch. It has the mask's where q's is 1."""
    path, fused = tmp_path / "a.onnx", tmp_path / "b.onnx"
    text = OVERFLOWING.replace("float16", "float").replace("B,1,1,S", "M,1,1,S").replace("to = 10", "to = 1")
    model = onnx.parser.parse_model(text)
    onnx.save(model, path)
    model_io.save(pipeline.run(model_io.load(path))[0], fused)
    result = model_check.verify(path, fused)
    assert result.status is PASSED
    assert not any(run.skipped for run in result.runs if "does not run" not in run.skipped)
    larger = [run for run in result.runs if run.outputs and run.inputs["q"][0] == 1 < run.inputs["mask"][0]]
    assert larger and all(run.outputs[0].shape[0] == run.inputs["mask"][0] for run in larger)


OPEN_SIZE = """<ir_version: 9, opset_import: ["" : 18]>
a (float[B,S,8] x) => (float[B,S,8] y) {
  any = Constant<value_ints = [-1]>()
  width = Constant<value_ints = [8]>()
  rows = Shape<start = 1, end = 2>(x)
  sizes = Concat<axis = 0>(any, rows, width)
  r = Reshape<allowzero = 1>(x, sizes)
  all = Shape(x)
  y = Reshape<allowzero = 1>(r, all)
}"""


def test_where_onnx_leaves_a_size_open_the_rewritten_model_need_not_run(tmp_path: pathlib.Path) -> None:
    """Without rows, onnxruntime takes -1 for 1 where zeros are allowed, and refuses it where 0 stands for the same."""
    original, rewritten = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(onnx.parser.parse_model(OPEN_SIZE), original)
    copied = OPEN_SIZE.replace("Shape<start = 1, end = 2>(x)", "Constant<value_ints = [0]>()")
    for name in ("rows", "sizes"):  # other values, so other names
        copied = copied.replace(name, f"new_{name}")
    copied = copied.replace("r = Reshape<allowzero = 1>(x", "t = Reshape(x").replace("(r, all)", "(t, all)")
    onnx.save(onnx.parser.parse_model(copied), rewritten)
    result = model_check.verify(original, rewritten)
    assert result.status is PASSED
    open_runs = [run for run in result.runs if "leaves open" in run.skipped]
    assert open_runs and all(0 in run.inputs["x"][:2] for run in open_runs)
    assert model_check.verify(rewritten, rewritten).status is PASSED
    onnx.save(onnx.parser.parse_model(copied.replace("[0]", "[5]")), rewritten)
    assert model_check.verify(original, rewritten).status is FAILED


ROWS_OF_HEADS = """<ir_version: 9, opset_import: ["" : 18]>
a (float[B,S,24] q, float[B,P,8] past, float[B,S,8] new, bool[B,S,1,T] m) => (float[B,S,24] y, float[B,N,8] k) {
  low = Constant<value = float {-1e9}>()
  three = Constant<value_ints = [3]>()
  width = Constant<value_ints = [8]>()
  k = Concat<axis = 1>(past, new)
  b = Shape<end = 1>(q)
  s = Shape<start = 1, end = 2>(q)
  n = Shape<start = 1, end = 2>(k)
  rows = Mul(s, three)
  to = Concat<axis = 0>(b, rows, width)
  q3 = Reshape<allowzero = 1>(q, to)
  kt = Transpose<perm = [0, 2, 1]>(k)
  flat = MatMul(q3, kt)
  four = Concat<axis = 0>(b, s, three, n)
  scores = Reshape<allowzero = 1>(flat, four)
  x = Where(m, scores, low)
  p4 = Softmax<axis = -1>(x)
  back = Concat<axis = 0>(b, rows, n)
  p = Reshape<allowzero = 1>(p4, back)
  o = MatMul(p, k)
  size = Shape(q)
  y = Reshape<allowzero = 1>(o, size)
}"""


SIZES = [
    ((2, 0, 1, 3), True),
    ((0, 1, 0, 6), True),
    ((2, 0, 1, 1), False),
    ((2, 2, 1, 3), False),
    ((2, 0, 3, 3), False),
]


@pytest.mark.parametrize(("sizes", "excused"), SIZES)
def test_sizes_that_only_the_lack_of_elements_makes_fit(sizes: tuple[int, ...], excused: bool) -> None:
    """Without rows the original takes a mask with another number of keys than there are; a rewritten model need not."""
    model = onnx.parser.parse_model(ROWS_OF_HEADS)
    batch, rows, past, keys = sizes
    shapes = {"q": (batch, rows, 24), "past": (batch, past, 8), "new": (batch, rows, 8), "m": (batch, rows, 1, keys)}
    tensors = {name: np.ones(shape, bool if name == "m" else np.float32) for name, shape in shapes.items()}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, tensors)[0].shape == (batch, rows, 24)
    sentence = OpenSizes(ir.from_proto(model)).sentence(tensors)
    assert ("since there are no elements" in sentence) == excused


EMPTY_CACHE = """<ir_version: 8, opset_import: ["" : 17]>
main (float[b,2,p,w] past, float[b,2,s,8] new) => (float[b,2,t,8] y) { y = Concat<axis = 2>(past, new) }"""


@pytest.mark.parametrize(("past", "excused"), [((1, 2, 0, 0), True), ((1, 2, 0, 8), False), ((1, 2, 3, 8), False)])
def test_a_cache_without_rows_may_have_any_size_for_concat_alone(past: tuple[int, ...], excused: bool) -> None:
    """onnxruntime's Concat looks at no size of an input without elements; the operator asks for the columns of a
    head."""
    model = onnx.parser.parse_model(EMPTY_CACHE)
    tensors = {"past": np.ones(past, np.float32), "new": np.ones((1, 2, 4, 8), np.float32)}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, tensors)[0].shape == (1, 2, 4 + past[2], 8)
    sentence = OpenSizes(ir.from_proto(model)).sentence(tensors)
    assert ("puts a size of 8 beside one of 0, since there are no elements" in sentence) == excused
