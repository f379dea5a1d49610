# SPDX-License-Identifier: Apache-2.0
"""Segment Anything's packed projection is read where it is, with the columns that its positions become, for CUDA."""

from __future__ import annotations

import collections

import faexport
import numpy as np
import onnx
import pytest
from faexport import Options
from onnx import numpy_helper, parser

from tests.export import compared
from tests.export.compared import node_of, run
from tests.export.form_text import replaced

# Two heads of 8 columns on an image of 12 x 16 tokens, by the spelling of transformers.
TEXT = """
<ir_version: 9, opset_import: ["": 18]>
sam (float[batch, 12, 16, 16] x) => (float[batch, 12, 16, 16] y)
<int64[5] apart = {-1, 192, 3, 2, 8}, int64[4] flat = {3, -1, 192, 8}, int64[4] image = {-1, 12, 16, 8},
 int64[4] heads = {-1, 2, 192, 8}, int64[4] whole = {-1, 2, 192, 192}, int64[5] places = {-1, 2, 12, 16, 8},
 int64[4] back = {-1, 12, 16, 16}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3},
 int64[1] last = {-1}, float scale = {0.35}>
{
  product = MatMul (x, weight)
  packed = Add (product, bias)
  split = Reshape (packed, apart)
  turned = Transpose <perm = [2, 0, 3, 1, 4]> (split)
  rows = Reshape (turned, flat)
  q1 = Slice (rows, zero, one, zero)
  q0 = Squeeze (q1, zero)
  k1 = Slice (rows, one, two, zero)
  k0 = Squeeze (k1, zero)
  v1 = Slice (rows, two, three, zero)
  v0 = Squeeze (v1, zero)
  tokens = Reshape (q0, image)
  tall = Einsum <equation = "bhwc,hkc->bhwk"> (tokens, a)
  wide = Einsum <equation = "bhwc,wkc->bhwk"> (tokens, b)
  tall_5 = Unsqueeze (tall, last)
  wide_5 = Unsqueeze (wide, three)
  both = Add (tall_5, wide_5)
  bias_4 = Reshape (both, whole)
  q = Reshape (q0, heads)
  k = Reshape (k0, heads)
  v = Reshape (v0, heads)
  k_t = Transpose <perm = [0, 1, 3, 2]> (k)
  products = MatMul (q, k_t)
  scaled = Mul (products, scale)
  scores = Add (scaled, bias_4)
  weights = Softmax <axis = -1> (scores)
  mixed = MatMul (weights, v)
  parts = Reshape (mixed, places)
  parts_t = Transpose <perm = [0, 2, 3, 1, 4]> (parts)
  y = Reshape (parts_t, back)
}
"""
OPTIONS = Options(target="cuda", float32="tf32x3")
STORED = {"weight": (16, 48), "bias": (48,), "a": (12, 12, 8), "b": (16, 16, 8)}


def model(*pieces: tuple[str, str], **shapes: tuple[int, ...]) -> onnx.ModelProto:
    made = parser.parse_model(replaced(TEXT, *pieces))
    random = np.random.default_rng(0)
    given = {value.name for value in made.graph.input}
    for name, shape in (STORED | shapes).items():
        array = (0.3 * random.standard_normal(shape)).astype(np.float32)
        if name not in given:
            made.graph.initializer.append(numpy_helper.from_array(array, name))
    return made


def fused(given: onnx.ModelProto, options: Options = OPTIONS) -> tuple[onnx.ModelProto, onnx.NodeProto, dict[str, int]]:
    made, report = faexport.fuse(given, options=options)
    assert [site.fused for site in report.sites] == [True]
    return made, node_of(made), collections.Counter(node.op_type for node in made.graph.node)


def agree(given: onnx.ModelProto, made: onnx.ModelProto, library: str, batches=(3, 1)) -> None:
    feeds = (compared.normal(batch, x=(batch, 12, 16, 16)) for batch in batches)
    compared.agree(given, made, library, feeds, atol=2e-5)


def words(node: onnx.NodeProto) -> dict:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


GATHERED = (
    ("q1 = Slice (rows, zero, one, zero)\n  q0 = Squeeze (q1, zero)", "q0 = Gather <axis = 0> (rows, number_0)"),
    ("k1 = Slice (rows, one, two, zero)\n  k0 = Squeeze (k1, zero)", "k0 = Gather <axis = 0> (rows, number_1)"),
    ("v1 = Slice (rows, two, three, zero)\n  v0 = Squeeze (v1, zero)", "v0 = Gather <axis = 0> (rows, number_2)"),
    ("int64[1] zero", "int64 number_0 = {0}, int64 number_1 = {1}, int64 number_2 = {2}, int64[1] zero"),
)
READ = {
    "as it is": (),
    "by Gather": GATHERED,
    "other letters": (("bhwc,hkc->bhwk", "xyzc,ykc->xyzk"), ("bhwc,wkc->bhwk", "abcd,ced->abce")),
}


@pytest.mark.parametrize("name", READ)
def test_the_packed_projection_is_read_in_place(name: str, library: str) -> None:
    given = model(*READ[name])
    made, node, kinds = fused(given)
    assert words(node)["packed_columns"] == [0, 40, 0, 40, 32, 8], "columns of 8 + 12 + 16 + 4 that fill eight"
    assert not kinds["Einsum"] and kinds["Transpose"] == 2, "of the stored positions alone"
    agree(given, made, library)


def test_columns_that_fill_eight(library: str) -> None:
    """Then there are no zeros."""
    pieces = (("12", "8"), ("192", "128"), ("{-1, 8, 16, 16}", "{-1, 8, 16, 16}"))
    given = model(*pieces, a=(8, 8, 8))
    made, node, _ = fused(given)
    assert words(node)["packed_columns"] == [0, 32, 0, 32, 32, 8]
    x = {"x": np.random.default_rng(1).standard_normal((2, 8, 16, 16)).astype(np.float32)}
    np.testing.assert_allclose(run(made, x, library)[0], run(given, x)[0], atol=2e-5)


PROJECTED = (
    (
        "y = Reshape (parts_t, back)",
        "end = Reshape (parts_t, back) out = MatMul (end, weight_out) y = Add (out, bias_out)",
    ),
)
WEIGHTS = {"weight_out": (16, 16), "bias_out": (16,)}


def widths_of_sums(made: onnx.ModelProto) -> list[int]:
    """How many columns each Add has, in the order of the nodes."""
    shapes = {value.name: value for value in onnx.shape_inference.infer_shapes(made).graph.value_info}
    shapes |= {value.name: value for value in made.graph.output}
    sums = [node.output[0] for node in made.graph.node if node.op_type == "Add"]
    return [shapes[name].type.tensor_type.shape.dim[-1].dim_value for name in sums]


def test_biases_of_keys_and_values_are_not_added(library: str) -> None:
    given = model(*PROJECTED, **WEIGHTS)
    made, node, _ = fused(given)
    assert words(node)["packed_columns"] == [0, 40, 0, 40, 32, 8]
    assert widths_of_sums(made) == [16, 16], "the queries' bias, and the output projection's"
    agree(given, made, library)


ALL_ADDED = {
    "the projection is read elsewhere": (
        ("split = Reshape", "z = Relu (packed) split = Reshape"),
        (" y)", " y, float z)"),
    ),
    "the keys, too": (("k = Reshape (k0, heads)", "z = Relu (k0) k = Reshape (k0, heads)"), (" y)", " y, float z)")),
    "the output, too": (("out = MatMul", "z = Relu (end) out = MatMul"), (" y)", " y, float z)")),
    "no bias behind": (("y = Add (out, bias_out)", "y = Relu (out)"),),
    "a bias that a caller gives": (("16] x)", "16] x, float[16] bias_out)"),),
    "a computed weight": (
        (
            "out = MatMul (end, weight_out)",
            "w = ReduceMean <keepdims = 0> (x, axes) w2 = Mul (weight_out, w) out = MatMul (end, w2)",
        ),
        ("int64[1] zero", "int64[3] axes = {0, 1, 2}, int64[1] zero"),
    ),
}


@pytest.mark.parametrize("name", ALL_ADDED)
def test_biases_that_are_needed_are_added(name: str, library: str) -> None:
    given = model(*PROJECTED, *ALL_ADDED[name], **WEIGHTS)
    made, node, _ = fused(given)
    assert words(node)["packed_columns"] == [0, 40, 0, 40, 32, 8] and widths_of_sums(made)[0] == 48
    if name != "a bias that a caller gives":
        agree(given, made, library)


ELSEWHERE = {
    "keys first": (
        ("q1 = Slice (rows, zero, one, zero)", "q1 = Slice (rows, one, two, zero)"),
        ("k1 = Slice (rows, one, two, zero)", "k1 = Slice (rows, zero, one, zero)"),
    ),
    "positions of the keys": (("tokens = Reshape (q0, image)", "tokens = Reshape (k0, image)"),),
    "positions that a caller gives": ((" x)", " x, float[12, 12, 8] a)"),),
    "heads side by side": (("{-1, 192, 3, 2, 8}", "{-1, 192, 2, 3, 8}"), ("[2, 0, 3, 1, 4]", "[3, 0, 2, 1, 4]")),
    "an output of heads": (
        ("places = {-1, 2, 12, 16, 8}", "places = {-1, 2, 12, 16, 8}, int64[4] heads_of = {-1, 2, 192, 8}"),
        ("parts = Reshape (mixed, places)", "active = Relu (mixed) parts = Reshape (active, places)"),
    ),
    "an output that is read to no end": (
        ("parts = Reshape", "t = Transpose <perm = [0, 2, 1, 3]> (mixed) dead = Relu (t) parts = Reshape"),
    ),
    "an output that is read twice": ((" y)", " y, float z)"), ("parts = Reshape", "z = Relu (mixed) parts = Reshape")),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_others_stay_as_they_are(name: str, library: str) -> None:
    given = model(*ELSEWHERE[name])
    made, node, _ = fused(given)
    assert "packed_columns" not in words(node)
    if name != "positions that a caller gives":
        agree(given, made, library, batches=(2,))


def test_only_for_cuda(library: str) -> None:
    for options in (Options(target="tensorrt"), Options(), Options(target="cuda", rest=False, float32="tf32x3")):
        assert "packed_columns" not in words(fused(model(), options)[1])


def test_it_is_verified(tmp_path, library: str) -> None:
    onnx.save(model(*PROJECTED, **WEIGHTS), tmp_path / "sam.onnx")
    report = faexport.optimize(tmp_path / "sam.onnx", tmp_path / "made.onnx", Options(target="cuda", fp16=True))
    assert report.verification.status == report.half_precision.status == "passed"
    assert "packed_columns" in words(
        *(n for n in onnx.load(tmp_path / "made.onnx").graph.node if n.op_type == "FlashAttention")
    )
