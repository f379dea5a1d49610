# SPDX-License-Identifier: Apache-2.0
"""A Gemm between Reshapes that keep its rows becomes MatMul and Add, where that computes the same."""

from __future__ import annotations

import collections
import pathlib

import faexport
import numpy as np
import onnx
import pytest
from faexport.runtimes import ort_session
from onnx import helper, numpy_helper, parser

from tests.export.compared import run

WIDTH, INNER = 16, 24
# GPT-2's block: its projections as PyTorch's TorchScript exporter writes `Conv1D`.
TEXT = """
<ir_version: 8, opset_import: ["": 17]>
block (float[batch, rows, 16] x) => (float[batch, rows, 16] y)
<int64[4] heads = {0, 0, 2, 8}, int64[3] joined = {0, 0, 16}, int64[2] flat = {-1, 16}, int64[1] inner = {24},
 int64[6] ends = {0, 0, 0, 0, 0, 8}, int64[1] width = {16}, int64[2] flat_inner = {-1, 24}, float scale = {0.35355338}>
{
  split = Reshape (x, heads)
  q = Transpose <perm = [0, 2, 1, 3]> (split)
  k = Transpose <perm = [0, 2, 3, 1]> (split)
  products = MatMul (q, k)
  scores = Mul (products, scale)
  weights = Softmax <axis = -1> (scores)
  mixed = MatMul (weights, q)
  back = Transpose <perm = [0, 2, 1, 3]> (mixed)
  attended = Reshape (back, joined)
  sizes = Shape <start = 0, end = 2> (attended)
  to_inner = Concat <axis = 0> (sizes, inner)
  to_width = Concat <axis = 0> (sizes, width)
  rows_in = Reshape (attended, flat)
  raised = Gemm (rows_in, weight_in, bias_in)
  hidden = Reshape (raised, to_inner)
  active = Relu (hidden)
  rows_out = Reshape (active, flat_inner)
  lowered = Gemm (rows_out, weight_out)
  y = Reshape (lowered, to_width)
}
"""


# The second Reshape in a body that runs three times: the product must not go there, to be computed three times.
IN_A_LOOP = """times = Constant <value_int = 3> ()
  go = Cast <to = 9> (times)
  none = Sub (attended, attended)
  wide = Pad (none, ends)
  hidden = Loop (times, go, wide) <body = step (int64 i, bool on, float[batch, rows, 24] before)
      => (bool still, float[batch, rows, 24] after) {
    still = Identity (on)
    each = Reshape (raised, to_inner)
    after = Add (before, each)
  }>"""


def model(*, gemm: dict | None = None, bias: tuple[int, ...] = (INNER,), replacing: tuple[str, str] = ("", "")):
    """`gemm`: attributes of the first one; `replacing`: a piece of the text by another."""
    assert replacing[0] in TEXT
    made = parser.parse_model(TEXT.replace(*replacing) if replacing[0] else TEXT)
    random = np.random.default_rng(0)
    shapes = {"weight_in": (WIDTH, INNER), "bias_in": bias, "weight_out": (INNER, WIDTH)}
    if gemm and gemm.get("transB"):
        shapes["weight_in"] = (INNER, WIDTH)
    for name, shape in shapes.items():
        if name not in {value.name for value in made.graph.input}:
            array = random.standard_normal(shape).astype(np.float32)
            made.graph.initializer.append(numpy_helper.from_array(array, name))
    first = next(node for node in made.graph.node if node.op_type == "Gemm")
    first.attribute.extend(helper.make_attribute(name, value) for name, value in (gemm or {}).items())
    return made


def fused(
    given: onnx.ModelProto, library: str = "", **options: object
) -> tuple[onnx.ModelProto, collections.Counter[str]]:
    """With a library, both are run: a batch of two, of one, and of one row."""
    changed, report = faexport.fuse(given, options=faexport.Options(**options))
    assert report.num_fused == 1
    if library:
        random = np.random.default_rng(1)
        for sizes in ((2, 5), (1, 5), (3, 1)):
            shapes = {"x": (*sizes, WIDTH)} | {value.name: (INNER,) for value in given.graph.input[1:]}
            feeds = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
            (want,), (got,) = run(given, feeds), run(changed, feeds, library)
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
    return changed, collections.Counter(node.op_type for node in changed.graph.node)


def test_gemms_become_products(library: str) -> None:
    changed, counts = fused(model(), library)
    assert (counts["Gemm"], counts["MatMul"], counts["Add"], counts["Concat"]) == (0, 2, 1, 0)
    (add,) = (node for node in changed.graph.node if node.op_type == "Add")
    assert add.input[1] == "bias_in" and add.output[0] == "hidden"
    assert fused(model(), target="tensorrt")[1]["Gemm"] == fused(model(), rest=False)[1]["Gemm"] == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"gemm": {"alpha": 0.5}},
        {"gemm": {"beta": 2.0}},
        {"gemm": {"transB": 1}},
        {"bias": (1,)},
        {"bias": (1, INNER)},
        {"replacing": ("rows, 16] x)", "rows, 16] x, float[24] bias_in)")},
        {"replacing": ("active = Relu (hidden)", "again = Relu (raised)\n  active = Reshape (again, to_inner)")},
        {"replacing": ("sizes = Shape <start = 0, end = 2> (attended)", "sizes = Constant <value_ints = [-1, 1]> ()")},
    ],
    ids=[
        "alpha",
        "beta",
        "transposed",
        "one bias",
        "a row of biases",
        "given bias",
        "read otherwise",
        "other rows",
    ],
)
def test_others_stay(arguments: dict, library: str) -> None:
    assert fused(model(**arguments), library)[1]["Gemm"] >= 1


def test_a_product_stays_outside_of_a_loop(library: str) -> None:
    changed, counts = fused(model(replacing=("hidden = Reshape (raised, to_inner)", IN_A_LOOP)), library)
    (loop,) = (node for node in changed.graph.node if node.op_type == "Loop")
    assert [node.op_type for node in loop.attribute[0].g.node] == ["Identity", "Reshape", "Add"] and counts["Gemm"]


def test_the_rewritten_model_is_verified(tmp_path: pathlib.Path) -> None:
    if not ort_session.has_library():
        pytest.skip("the operator's library was not built")
    onnx.save(model(), tmp_path / "model.onnx")
    report = faexport.optimize(tmp_path / "model.onnx")
    assert report.verification is not None and report.verification.status == "passed"
