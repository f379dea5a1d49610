# SPDX-License-Identifier: Apache-2.0
"""Operators of onnxruntime that have CUDA kernels only: where they are written, and that they are compared on a CPU
too, by their formulas."""

from __future__ import annotations

import collections
import pathlib

import faexport
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from faexport import jobs, pipeline
from faexport.fallback import formulas
from faexport.runtimes import ort_session
from faexport.verify import model_check
from onnx import numpy_helper, parser

from tests.export.compared import run
from tests.export.form_text import replaced

# A block of a diffusion model: an image of 320 channels, its group normalization, attention, and a gated layer.
TEXT = """
<ir_version: 9, opset_import: ["": 18]>
block (float[batch, 320, 4, 4] image) => (float[batch, 320, 4, 4] result)
<int64[3] grouped = {0, 32, -1}, int64[3] rows = {0, 16, 320}, int64[4] heads = {0, 16, 5, 64},
 int64[4] back = {0, 4, 4, 320}, float scale = {0.125}, int64[2] zero = {0, 0}, int64[1] first = {0},
 int64[1] middle = {1280}, int64[1] far = {9223372036854775807}, int64[1] last = {2}>
{
  shape = Shape (image)
  apart = Reshape (image, grouped)
  normal = InstanceNormalization <epsilon = 0.001> (apart, ones, none)
  together = Reshape (normal, shape)
  scaled = Mul (together, gamma)
  norm = Add (scaled, beta)
  turned = Transpose <perm = [0, 2, 3, 1]> (norm)
  x = Reshape (turned, rows)
  split = Reshape (x, heads)
  q = Transpose <perm = [0, 2, 1, 3]> (split)
  k = Transpose <perm = [0, 2, 3, 1]> (split)
  products = MatMul (q, k)
  scores = Mul (products, scale)
  weights = Softmax <axis = -1> (scores)
  mixed = MatMul (weights, q)
  merged = Transpose <perm = [0, 2, 1, 3]> (mixed)
  attended = Reshape (merged, rows)
  wide = MatMul (attended, weight_in)
  both = Add (wide, bias_in)
  left, right = Split <axis = 2, num_outputs = 2> (both)
  root = Constant <value_float = 1.4142135> ()
  divided = Div (right, root)
  erf = Erf (divided)
  one = Constant <value_float = 1.0> ()
  raised = Add (erf, one)
  product = Mul (right, raised)
  half = Constant <value_float = 0.5> ()
  gelu = Mul (product, half)
  gated = Mul (left, gelu)
  narrow = MatMul (gated, weight_out)
  biased = Add (narrow, bias_out)
  added = Add (biased, attended)
  image_again = Reshape (added, back)
  result = Transpose <perm = [0, 3, 1, 2]> (image_again)
}
"""
ALL = {"GroupNorm": 1, "BiasSplitGelu": 1, "BiasAdd": 1}
SLICES = """left = Slice (both, first, middle, last)
  right = Slice (both, middle, far, last)"""
SPLIT = "left, right = Split <axis = 2, num_outputs = 2> (both)"
TURNED = "turned = Transpose <perm = [0, 2, 3, 1]> (norm)"
SILU = f"""sigmoid = Sigmoid (norm)
  active = Mul (norm, sigmoid)
  {TURNED.replace("(norm)", "(active)")}"""


def model(*pieces: tuple[str, str], opset: int = 18, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    """`pieces` of the text, each by another; `shapes` of weights, where not the usual ones."""
    made = parser.parse_model(replaced(TEXT, ('"": 18', f'"": {opset}'), *pieces))
    random = np.random.default_rng(0)
    usual = {
        "gamma": (320, 1, 1), "beta": (320, 1, 1), "weight_in": (320, 2560), "bias_in": (2560,),
        "weight_out": (1280, 320), "bias_out": (320,),
    }  # fmt: skip
    arrays = {name: random.standard_normal(shape) * 0.1 for name, shape in (usual | shapes).items()}
    arrays["gamma"] += 1
    arrays["ones"], arrays["none"] = np.ones(32), np.zeros(32)
    for name, array in arrays.items():
        made.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    return made


def fused(given: onnx.ModelProto, **options: object) -> tuple[onnx.ModelProto, faexport.Report]:
    made, report = faexport.fuse(given, options=faexport.Options(**{"target": "cuda", **options}))
    assert [site.fused for site in report.sites] == [True]
    return made, report


def written(made: onnx.ModelProto) -> dict[str, int]:
    kinds = collections.Counter(node.op_type for node in made.graph.node)
    return {name: kinds[name] for name in formulas.FORMULAS if kinds[name]}


def agree(given: onnx.ModelProto, made: onnx.ModelProto, library: str) -> None:
    inputs = {"image": np.random.default_rng(1).standard_normal((2, 320, 4, 4)).astype(np.float32)}
    content, folder = formulas.written_out(made.SerializeToString())
    assert not folder
    for want, have in zip(run(given, inputs), run(onnx.load_from_string(content), inputs, library), strict=True):
        np.testing.assert_allclose(have, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    "pieces",
    [(), ((SPLIT, SLICES),), ((TURNED, SILU),), (("Mul (left, gelu)", "Mul (gelu, left)"),)],
    ids=["as it is", "halves by Slice", "SiLU", "the other way round"],
)
def test_a_diffusion_model_s_block_for_cuda(pieces: tuple, library: str) -> None:
    given = model(*pieces)
    made, report = fused(given)
    assert written(made) == ALL
    kinds = collections.Counter(node.op_type for node in made.graph.node)
    assert not kinds.keys() & {"InstanceNormalization", "Split", "Slice", "Gelu", "Erf", "Sigmoid"}
    assert kinds["Transpose"] == 2, "one in front of the normalization, one at the end"
    assert any("BiasAdd, BiasSplitGelu, GroupNorm there are CUDA kernels alone" in note for note in report.notes)
    (norm,) = (node for node in made.graph.node if node.op_type == "GroupNorm")
    said = {a.name: onnx.helper.get_attribute_value(a) for a in norm.attribute}
    active = int(pieces == ((TURNED, SILU),))
    assert said == {"groups": 32, "epsilon": pytest.approx(1e-3), "activation": active, "channels_last": 1}
    agree(given, made, library)


def test_onnx_s_own_group_normalization(library: str) -> None:
    lines = TEXT[TEXT.index("  shape = Shape") : TEXT.index("  turned = ")]
    own = "  norm = GroupNormalization <epsilon = 0.001, num_groups = 32> (image, gamma, beta)\n"
    given = model((lines, own), opset=21, gamma=(320,), beta=(320,))
    made, _ = fused(given)
    assert written(made)["GroupNorm"] == 1
    agree(given, made, library)


def test_an_image_that_is_read_as_it_was_too(library: str) -> None:
    """Then it is turned back."""
    given = model(("result = Transpose <perm = [0, 3, 1, 2]> (image_again)",
                   "end = Transpose <perm = [0, 3, 1, 2]> (image_again) result = Add (end, norm)"))  # fmt: skip
    made, _ = fused(given)
    assert written(made) == ALL
    agree(given, made, library)


@pytest.mark.parametrize(
    "options", [{"target": "onnxruntime"}, {"rest": False}, {"bf16": True}, {"target": "tensorrt"}]
)
def test_only_for_cuda(options: dict) -> None:
    made, _ = pipeline.run(ir.from_proto(model()), faexport.Options(**{"target": "cuda", **options}))
    assert not written(ir.to_proto(made))


TWICE = "more = Add (added, biased) image_again = Reshape (more,"
UNFIT = {  # what is not written then
    "other weights of the normalization": ("GroupNorm", ("(apart, ones, none)", "(apart, twos, none)")),
    "groups of something else": ("GroupNorm", ("grouped = {0, 32, -1}", "grouped = {1, 32, -1}")),
    "a bias for each row": ("GroupNorm", ("gamma", "gamma_of_rows")),
    "the right half is left": ("BiasSplitGelu", (SPLIT, "right, left = Split <axis = 2, num_outputs = 2> (both)")),
    "halves that overlap": ("BiasSplitGelu", (SPLIT, SLICES.replace("(both, middle, far", "(both, first, middle"))),
    "no bias in front of the halves": ("BiasSplitGelu", ("both = Add (wide, bias_in)", "both = Relu (wide)")),
    "a sum that is read elsewhere": ("BiasAdd", ("image_again = Reshape (added,", TWICE)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_near_misses(name: str, library: str) -> None:
    absent, replacing = UNFIT[name]
    given = model(replacing)
    for extra, array in (("twos", np.full(32, 2)), ("gamma_of_rows", np.linspace(1, 2, 4).reshape(4, 1))):
        given.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), extra))
    made, _ = fused(given)
    assert absent not in written(made)
    assert written(made) == {kind: 1 for kind in ALL if kind != absent}
    if "groups of" not in name:  # that one takes one batch entry
        agree(given, made, library)


def test_sizes_that_the_kernels_are_not_compiled_for() -> None:
    given = model(weight_in=(320, 1280), bias_in=(1280,), weight_out=(640, 320))
    made, _ = fused(given)
    assert written(made) == {"GroupNorm": 1, "BiasAdd": 1}


def test_verified_on_a_cpu_by_their_formulas(tmp_path: pathlib.Path, library: str) -> None:
    path = tmp_path / "block.onnx"
    onnx.save(model(), path)
    report = faexport.optimize(path, tmp_path / "made.onnx", faexport.Options(target="cuda"))
    assert report.verification.status == "passed" and report.joined == {**ALL, **report.joined}
    sentence = "compared by their formulas in standard operators, as the CPU has no kernels for them: BiasAdd, "
    assert any(note.startswith(sentence) for note in report.verification.notes)
    compared = {row.value for row in report.verification.sites}
    assert compared >= {"turned", "gated", "added"}, "each is compared by itself"
    assert written(onnx.load(report.output)) == ALL, "the file has the operators, not their formulas"


def test_a_wrong_formula_is_found(tmp_path: pathlib.Path, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is made once more without the operators."""

    def without_epsilon(node, build):
        node.attributes.pop("epsilon")
        return formulas._group_norm(node, build)

    path = tmp_path / "block.onnx"
    onnx.save(model(), path)
    monkeypatch.setitem(formulas.FORMULAS, "GroupNorm", without_epsilon)
    monkeypatch.setattr(jobs.ort_session, "Session", lambda job, **others: ort_session.SessionHere(job))
    report = faexport.optimize(path, tmp_path / "made.onnx", faexport.Options(target="cuda"))
    assert report.verification.status == "passed" and not report.joined
    assert any("nothing is joined around attention" in note for note in report.notes)


NOTHING = "onnxruntime's kernels of BiasAdd, BiasSplitGelu, GroupNorm take no tensors without elements, on batch=0"


@pytest.mark.parametrize("takes_nothing", [True, False])
def test_no_run_on_nothing_is_excused(tmp_path: pathlib.Path, library: str, takes_nothing: bool) -> None:
    """On GPUs the operators fail there. What fails elsewhere is no excuse."""

    class OnGpu(ort_session.SessionHere):
        def __init__(self, job: ort_session.Job):
            self.original = job.model == str(path)
            super().__init__(job)

        def run(self, tensors):
            fails = (not tensors["image"].size) if takes_nothing else (len(tensors["image"]) == 3)
            if fails and not self.original:
                raise ort_session.ModelFailure("invalid configuration argument")
            return super().run(tensors)

    path, made = tmp_path / "block.onnx", tmp_path / "made.onnx"
    # Reshapes that take no elements, too
    onnx.save(model(("grouped = {0, 32, -1}", "grouped = {0, 32, 160}")), path)
    onnx.save(fused(onnx.load(path))[0], made)
    found = model_check.verify(path, made, open_session=OnGpu)
    if takes_nothing:
        assert found.status == "passed"
        assert any(run.skipped == NOTHING for run in found.runs) and NOTHING in found.notes
    else:
        assert found.status == "failed" and "invalid configuration" in found.reason


def test_in_float16(tmp_path: pathlib.Path, library: str) -> None:
    path = tmp_path / "block.onnx"
    onnx.save(model((TURNED, SILU)), path)
    report = faexport.optimize(path, tmp_path / "made.onnx", faexport.Options(target="cuda", fp16=True))
    assert report.half_precision.status == "passed" and not report.half_precision.kept
    made = onnx.load(report.output)
    assert written(made) == ALL
    (norm,) = (node for node in made.graph.node if node.op_type == "GroupNorm")
    types = {tensor.name: tensor.data_type for tensor in made.graph.initializer}
    assert [types[name] for name in norm.input[1:]] == [onnx.TensorProto.FLOAT] * 2, "as the kernel takes them"


PADDED = """
<ir_version: 9, opset_import: ["": 18]>
windows (float[batch, 3, 4, 8] x) => (float[batch, 5, 4, 8] y, float other)
<int64[8] pads = {0, 1, 0, 0, 0, 1, 0, 0}, int64[8] none = {0, 0, 0, 0, 0, 0, 0, 0}, float number = {0.0}>
{
  same = Pad (x, none)
  padded = Pad (same, pads, number)
  k = Transpose <perm = [0, 1, 3, 2]> (padded)
  products = MatMul (padded, k)
  weights = Softmax <axis = -1> (products)
  y = MatMul (weights, padded)
  other = ReduceSum <keepdims = 0> (padded)
}
"""


@pytest.mark.parametrize(
    ("pieces", "kept"),
    [
        ((), 0),
        ((("number = {0.0}", "number = {2.5}"),), 0),
        ((("(same, pads, number)", "(same, pads)"),), 0),
        ((("0, 1, 0, 0, 0, 1, 0, 0}", "0, 2, 0, 0, 0, 0, 0, 0}"),), 0),
        ((("0, 1, 0, 0, 0, 1, 0, 0}", "0, 1, 2, 0, 0, 1, 3, 1}"), ("[batch, 5, 4, 8] y", "[batch, 5, 9, 9] y")), 0),
        ((("Pad (same", 'Pad <mode = "edge"> (same'),), 1),
        ((("0, 1, 0, 0, 0, 1, 0, 0}", "0, 0, 1, 0, 0, 0, 1, 0}"), ("[batch, 5, 4, 8] y", "[batch, 3, 6, 8] y")), 1),
        ((("0, 1, 0, 0, 0, 1, 0, 0}", "0, 0, 0, 0, 0, -1, 0, 0}"), ("[batch, 5, 4, 8] y", "[batch, 2, 4, 8] y")), 1),
    ],
    ids=["rows", "a number", "no number", "in front", "three axes", "copies", "images", "cut off"],
)
def test_padding_for_cuda(pieces: tuple, kept: int, library: str) -> None:
    """Padding is joined on, but for what onnxruntime's kernel is fast at, and for what isn't a constant."""
    given = parser.parse_model(replaced(PADDED, *pieces))
    made, _ = fused(given)
    assert [node.op_type for node in made.graph.node].count("Pad") == kept
    read = {name for node in made.graph.node for name in node.input} | {value.name for value in made.graph.output}
    assert all(read.intersection(node.output) for node in made.graph.node)
    inputs = {"x": np.random.default_rng(1).standard_normal((2, 3, 4, 8)).astype(np.float32)}
    for want, have in zip(run(given, inputs), run(made, inputs, library), strict=True):
        np.testing.assert_allclose(have, want, rtol=0, atol=2e-5 * np.abs(want).max())
    assert "Pad" in {node.op_type for node in faexport.fuse(given)[0].graph.node}


def test_padding_of_unknown_sizes_stays_and_leaves_nothing_behind() -> None:
    """One of the blocks to join could be made, the other could not."""
    text = PADDED.replace("float other)", "float[batch, a, c, 8] wider)").replace("x) =>", "x, int64[1] n) =>")
    text = text.replace(
        "other = ReduceSum <keepdims = 0> (padded)",
        "cut = Slice (same, first, n, second)\n wider = Pad (cut, both, number)",
    )
    numbers = "int64[1] first = {0}, int64[1] second = {1}, int64[8] both = {0, 2, 1, 0, 0, 3, 1, 0}, float number"
    made, _ = fused(parser.parse_model(text.replace("float number", numbers)))
    assert [node.op_type for node in made.graph.node].count("Pad") == 1
    read = {name for node in made.graph.node for name in node.input} | {value.name for value in made.graph.output}
    assert all(read.intersection(node.output) for node in made.graph.node)
