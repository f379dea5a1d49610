# SPDX-License-Identifier: Apache-2.0
"""Sizes of inputs that belong together: found without names, so that decoders are compared in steps on filled caches;
where that can't be, the verdict isn't "passed"."""

from __future__ import annotations

import json
import pathlib

import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from faexport.commands import bench
from faexport.errors import ModelError
from faexport.feeds import inputs, relations
from faexport.report.data import Verification, VerificationStatus
from faexport.runtimes import ort_session
from faexport.verify import model_check
from faexport.verify.reference import outputs_or_sentence

from tests.export.commands import assert_bad_input, here

# One layer on a cache. The names of sizes say nothing; what the mask's [c, d] must be, the graph says in two ways.
DECODER = """<ir_version: 9, opset_import: ["" : 17]>
g (int64[n,m] i, int64[c,d] a, float[n,2,e,8] k, float[n,2,f,8] v)
  => (float[N,M,16] y, float[N,2,E,8] k1, float[N,2,F,8] v1)
<float[16] table = {1,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2}, int64 none = {0}, int64[1] zero = {0}, int64 step = {1},
 float[1] single = {2}, int64[4] heads = {0,0,2,8}, int64[3] rows = {0,0,16}, int64[2] ones = {1,2},
 int64[1] last = {-1}, float one = {1}, float low = {-1e9}> {
  x0 = Cast <to = 1> (i)
  x1 = Unsqueeze (x0, last)
  x = Mul (x1, table)
  h = Reshape (x, heads)
  q = Transpose <perm = [0,2,1,3]> (h)
  k1 = Concat <axis = 2> (k, q)
  v1 = Concat <axis = 2> (v, q)
  KEYS
  kept = Cast <to = 1> (seen)
  away = Sub (one, kept)
  far = Mul (away, low)
  bias = Unsqueeze (far, ones)
  t = Transpose <perm = [0,1,3,2]> (k1)
  s0 = MatMul (q, t)
  s = Add (s0, bias)
  p = Softmax <axis = -1> (s)
  o = MatMul (p, v1)
  o1 = Transpose <perm = [0,2,1,3]> (o)
  y = Reshape (o1, rows)
}"""
# The mask meets the scores; or it is read by indices, so that any longer one does.
BROADCAST = "seen = Identity (a)"
GATHERED = """sizes = Shape <start = 2, end = 3> (k1)  n1 = Squeeze (sizes, zero)  r = Range (none, n1, step)
  seen = Gather <axis = 1> (a, r)"""
# A table with one row, read at the number of rows in the cache: only an empty cache will do.
EMPTY_ONLY = "past = Shape <start = 2, end = 3> (k)  factor = Gather (single, past)  y = Mul (y0, factor)"
NEVER = "past = Shape <start = 3, end = 4> (k)  factor = Gather (single, past)  y = Mul (y0, factor)"


# Batch and heads in one axis of the product: the analysis itself knows that three names of a batch mean one size.
TOGETHER = """<ir_version: 9, opset_import: ["" : 17]>
g (float[a,4,s,8] q, float[b,4,t,8] k, float[c,4,t,8] v) => (float[n,s,8] y) {
  whole = Constant <value_ints = [-1]> ()
  to_q = Shape <start = 2> (q)  shape_q = Concat <axis = 0> (whole, to_q)  q3 = Reshape (q, shape_q)
  to_k = Shape <start = 2> (k)  shape_k = Concat <axis = 0> (whole, to_k)  k3 = Reshape (k, shape_k)
  v3 = Reshape (v, shape_k)
  kt = Transpose <perm = [0,2,1]> (k3)
  s0 = MatMul (q3, kt)
  p = Softmax <axis = -1> (s0)
  y = MatMul (p, v3)
}"""


@pytest.mark.parametrize("named", [True, False])
def test_sizes_that_are_known_to_be_equal_are_drawn_so(named: bool) -> None:
    proto = onnx.parser.parse_model(TOGETHER)
    for value in proto.graph.input if not named else ():
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.ClearField("dim_param")
    model = ir.from_proto(proto)
    q, k, v = (spec.dims for spec in relations.from_graph(inputs.input_specs(model), model))
    assert str(q[0]) == str(k[0]) != str(q[2])
    assert not named or str(v[0]) == str(k[0]), "without names the rows of keys and values differ, and so this Reshape"


def decoder(folder: pathlib.Path, keys: str, *, named: bool = True, end: str = "") -> pathlib.Path:
    text = DECODER.replace("KEYS", keys)
    if end:
        text = text.replace("y = Reshape (o1, rows)", f"y0 = Reshape (o1, rows) {end}")
    model = onnx.parser.parse_model(text)
    if not named:
        for value in model.graph.input:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.Clear()
    onnx.save(model, folder / "a.onnx")
    return folder / "a.onnx"


def steps(result: Verification) -> list:
    """Runs that were compared with rows in the cache, new rows, two entries and a mask of as many."""
    runs = [run for run in result.runs if run.outputs]
    return [
        run
        for run in runs
        if run.inputs["k"][0] > 1
        and run.inputs["k"][2] > 0
        and run.inputs["i"][1] > 0
        and run.inputs["a"] == (run.inputs["i"][0], run.inputs["i"][1] + run.inputs["k"][2])
    ]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("keys", [BROADCAST, GATHERED])
def test_a_decoder_is_compared_in_steps_whatever_its_sizes_are_called(
    keys: str, named: bool, tmp_path: pathlib.Path
) -> None:
    path = decoder(tmp_path, keys, named=named)
    result = model_check.verify(path, path)
    assert result.status is VerificationStatus.PASSED, result.reason
    compared = [run for run in result.runs if run.outputs]
    assert len(steps(result)) >= 8 and len({tuple(run.inputs["a"]) for run in steps(result)}) >= 4
    assert any(run.inputs["k"][2] == 0 for run in compared), "a prompt"
    assert any(run.inputs["i"][1] == 1 < run.inputs["k"][2] for run in compared), "one new row"


def test_what_is_found_is_still_doubted(tmp_path: pathlib.Path) -> None:
    """A mask of one entry or one key is broadcast: such runs are compared, too."""
    path = decoder(tmp_path, BROADCAST)
    compared = [run.inputs for run in model_check.verify(path, path).runs if run.outputs]
    assert any(run["a"][0] == 1 < run["i"][0] for run in compared)
    assert any(run["a"][1] == 1 < run["k"][2] for run in compared)


def test_broadcasts_and_products_say_which_sizes_belong_together(tmp_path: pathlib.Path) -> None:
    model = ir.load(decoder(tmp_path, BROADCAST))
    found = relations.from_graph(inputs.input_specs(model), model)
    assert [[str(dim) for dim in spec.dims] for spec in found] == [
        ["n", "m"], ["n", "e + m"], ["n", "2", "e", "8"], ["n", "2", "e", "8"],
    ]  # fmt: skip


WIDTHS = """<ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1]>
g (float[b,s,16] q, float[b,s,16] k, float[b,s,16] v, float[b,2,p,w] pk, float[b,2,p,x] pv)
  => (float[b,s,16] y, float[b,2,t,8] k1, float[b,2,t,8] v1) {
  y, k1, v1 = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v, , , , pk, pv)
}"""


def test_a_cache_of_multi_head_attention_has_the_columns_of_a_head() -> None:
    """onnxruntime-genai's builder leaves that size open (kv_cache_dim)."""
    model = ir.from_proto(onnx.parser.parse_model(WIDTHS))
    found = {spec.name: spec.dims for spec in relations.from_graph(inputs.input_specs(model), model)}
    assert str(found["pk"][3]) == str(found["pv"][3]) == "8"


def test_what_no_shape_says_is_tried(tmp_path: pathlib.Path) -> None:
    path = decoder(tmp_path, GATHERED)
    model, tried = ir.load(path), []
    with ort_session.SessionHere(ort_session.Job(str(path), library=False)) as session:

        def runs(tensors: dict) -> bool:
            tried.append(tensors)
            return isinstance(outputs_or_sentence(session, tensors), dict)

        found = relations.fitting(inputs.input_specs(model), model, runs)
    assert found is not None and str(found[1].dims[1]) == "e + m" and len(tried) < 20


def test_a_decoder_that_only_runs_on_an_empty_cache_is_not_passed(tmp_path: pathlib.Path) -> None:
    path = decoder(tmp_path, GATHERED, end=EMPTY_ONLY)
    result = model_check.verify(path, path)
    assert result.status is VerificationStatus.NOT_RUN
    for part in (
        "no step was compared",
        "settings were compared",
        "the original refuses n=2",
        "--inputs",
        "past + sequence",
    ):
        assert part in result.reason, result.reason
    assert any(run.outputs for run in result.runs) and any("does not run on" in run.skipped for run in result.runs)


def test_the_json_of_a_failure_lists_what_was_tried(tmp_path: pathlib.Path) -> None:
    """Also where the original runs nowhere, so that nothing is compared."""
    path = decoder(tmp_path, GATHERED, end=NEVER)
    done = here(path, "--dry-run", "--json")
    found = json.loads(done.stdout)["verification"]
    assert done.returncode == 1 and found["status"] == "not run" and len(found["runs"]) > 10
    assert "--inputs" in found["reason"]
    assert all(run["skipped"] and run["inputs"]["a"] for run in found["runs"])


def test_one_setting_is_too_few_and_the_sentence_says_why_and_what_to_do(tmp_path: pathlib.Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 17]> g (float[n] x) => (float[3] y) <int64[1] three = {3}>
    { y = Reshape (x, three) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "a.onnx")
    result = model_check.verify(tmp_path / "a.onnx", tmp_path / "a.onnx")
    assert result.status is VerificationStatus.NOT_RUN
    for part in ("in one setting only (n=3)", "the original refuses n=2", "--inputs", "past + sequence"):
        assert part in result.reason, result.reason
    assert [run.label for run in result.runs if run.skipped == f"the original runs on {run.label}"] == ["n=3"]
    assert sum("does not run on" in run.skipped for run in result.runs) == len(result.runs) - 1 > 5


def test_longer_inputs_are_tried_where_one_setting_alone_is_long_enough(tmp_path: pathlib.Path) -> None:
    """As in models of sound, whose convolutions need some samples."""
    text = """<ir_version: 9, opset_import: ["" : 17]> g (float[b, n] x) => (float[b] y) <int64 last = {19}>
    { y = Gather <axis = 1> (x, last) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "a.onnx")
    result = model_check.verify(tmp_path / "a.onnx", tmp_path / "a.onnx")
    assert result.status is VerificationStatus.PASSED
    assert {"b=3, n=33", "b=2, n=32"} <= {run.label for run in result.runs if run.outputs}


def test_a_length_that_the_exporter_fixed_is_found_and_said(tmp_path: pathlib.Path) -> None:
    """As PyTorch's older exporter does in nn.MultiheadAttention: keys get the length that was traced."""
    text = """<ir_version: 9, opset_import: ["" : 17]> g (float[b, n, 8] x) => (float[b, 13, 2, 4] y)
    <int64[3] rest = {13, 2, 4}, int64[1] zero = {0}, int64[1] one = {1}>
    { all = Shape (x) batch = Slice (all, zero, one) sizes = Concat <axis = 0> (batch, rest) y = Reshape (x, sizes) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "a.onnx")
    result = model_check.verify(tmp_path / "a.onnx", tmp_path / "a.onnx")
    assert result.status is VerificationStatus.PASSED
    assert {run.inputs["x"] for run in result.runs if run.outputs} >= {(2, 13, 8), (3, 13, 8), (1, 13, 8)}
    assert any("at length 13, which its nodes ask for" in note for note in result.notes)
    assert any("inputs times 12" in run.label for run in result.runs if run.outputs), "doubts are of that length, too"


def test_an_image_has_the_channels_of_its_convolution(tmp_path: pathlib.Path) -> None:
    """optimum names each size of an image; without this one, hundreds of channels are tried, and none fits."""
    text = """<ir_version: 9, opset_import: ["" : 17]> g (float[b, c, h, w] x) => (float[b, 2, i, j] y)
    <float[2, 3, 1, 1] weight = {1, 2, 3, 4, 5, 6}> { z = Identity (x) y = Conv (z, weight) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "a.onnx")
    result = model_check.verify(tmp_path / "a.onnx", tmp_path / "a.onnx")
    assert result.status is VerificationStatus.PASSED
    assert {run.inputs["x"][1] for run in result.runs} == {3}


# ---------------------------------------------------------------------------------------------- bench


def shapes_of(specs: list[inputs.InputSpec], text: str) -> dict:
    (tensors,) = bench._settings(specs, [text], inputs.Drawing())
    return {name: array.shape for name, array in tensors.items()}


def test_bench_follows_what_belongs_together(tmp_path: pathlib.Path) -> None:
    path = decoder(tmp_path, GATHERED)
    model = ir.load(path)
    specs = bench._related(inputs.input_specs(model), model, path)
    assert shapes_of(specs, "i:3x4") == {"i": (3, 4), "a": (3, 8), "k": (3, 2, 4, 8), "v": (3, 2, 4, 8)}
    assert shapes_of(specs, "i:2x1,a:2x8")["k"] == (2, 2, 7, 8), "what is left of the mask is in the cache"
    assert shapes_of(specs, "a:2x8,k:2x2x5x8")["i"] == (2, 3)
    for text in ("i:2x9,a:2x8", "i:2x4,a:3x8"):
        with pytest.raises(ModelError, match="e \\+ m"):
            shapes_of(specs, text)


@pytest.mark.skipif(not ort_session.has_library(), reason="the operator's library was not built")
def test_bench_measures_a_step(tmp_path: pathlib.Path) -> None:
    path = decoder(tmp_path, GATHERED)
    done = here("bench", path, "--shape", "i:2x1,a:2x8", "--runs", "5", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["sizes"] == {"i": [2, 1], "a": [2, 8], "k": [2, 2, 7, 8], "v": [2, 2, 7, 8]}
    assert_bad_input(here("bench", path, "--shape", "i:2x1,b:2x8", "--runs", "5"), "no input 'b'")
