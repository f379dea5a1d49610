# SPDX-License-Identifier: Apache-2.0
"""A bias that is a sum over the rows and the columns of an image of keys becomes further columns of queries and keys,
for CUDA; any other bias stays one."""

from __future__ import annotations

import faexport
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from faexport import pipeline
from faexport.options import Options
from onnx import numpy_helper, parser

from tests.export.compared import run
from tests.export.form_text import replaced
from tests.export.test_sites_appended import names_of

# Heads of 8 columns on an image of 32 x 40 tokens, by Segment Anything's spelling.
TEXT = """
<ir_version: 9, opset_import: ["": 18]>
sam (float[batch, 2, 1280, 8] q, float[batch, 2, 1280, 8] k, float[batch, 2, 1280, 8] v, float[32, 32, 8] a,
     float[40, 40, 8] b) => (float[batch, 2, 1280, 8] y)
<int64[4] image = {-1, 32, 40, 8}, int64[1] last = {-1}, int64[1] before = {3}, int64[4] whole = {-1, 2, 1280, 1280},
 float scale = {0.35}>
{
  tokens = Reshape (q, image)
  rows = Einsum <equation = "bhwc,hkc->bhwk"> (tokens, a)
  columns = Einsum <equation = "bhwc,wkc->bhwk"> (tokens, b)
  tall = Unsqueeze (rows, last)
  wide = Unsqueeze (columns, before)
  both = Add (tall, wide)
  bias = Reshape (both, whole)
  turned = Transpose <perm = [0, 1, 3, 2]> (k)
  products = MatMul (q, turned)
  scaled = Mul (products, scale)
  scores = Add (scaled, bias)
  weights = Softmax <axis = -1> (scores)
  y = MatMul (weights, v)
}
"""
MERGED = (  # heads and batch are one axis, as TorchScript's exporter has them
    (
        "products = MatMul (q, turned)",
        "q3 = Reshape (q, flat)\n t3 = Reshape (turned, across)\n products = MatMul (q3, t3)",
    ),
    ("bias = Reshape (both, whole)", "bias = Reshape (both, square)"),
    ("y = MatMul (weights, v)", "v3 = Reshape (v, flat)\n y3 = MatMul (weights, v3)\n y = Reshape (y3, apart)"),
    (
        "float scale = {0.35}",
        "float scale = {0.35}, int64[3] flat = {-1, 1280, 8}, int64[3] across = {-1, 8, 1280}, "
        "int64[3] square = {-1, 1280, 1280}, int64[4] apart = {-1, 2, 1280, 8}",
    ),
)  # fmt: skip


OPTIONS = Options(target="cuda", float32="tf32x3")
NARROW = (("1280", "1080"), ("32, 40", "30, 36"), ("[32, 32", "[30, 30"), ("[40, 40", "[36, 36"))


def model(*pieces: tuple[str, str]) -> onnx.ModelProto:
    return parser.parse_model(replaced(TEXT, *pieces))


def feeds_of(given: onnx.ModelProto, dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = {x.name: [d.dim_value or 2 for d in x.type.tensor_type.shape.dim] for x in given.graph.input}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in sizes.items()}


def agree(given: onnx.ModelProto, fused: onnx.ModelProto, library: str) -> None:
    feeds = feeds_of(given)
    expected, found = run(given, feeds), run(fused, feeds, library)
    np.testing.assert_allclose(found[0], expected[0], atol=2e-5)


@pytest.mark.parametrize(
    "pieces",
    [(), NARROW, (("Add (tall, wide)", "Add (wide, tall)"),), (("Add (scaled, bias)", "Add (bias, scaled)"),), MERGED],
    ids=["as it is", "columns that fill no eight", "columns first", "bias first", "merged heads"],
)
def test_it_becomes_columns(pieces: tuple, library: str) -> None:
    """Nothing of the size of the scores is left, and results are the same."""
    given = model(*pieces)
    fused, report = faexport.fuse(given, options=OPTIONS)
    assert "attn_bias" not in names_of(fused) and "further columns" in " ".join(f.text for f in report.sites[0].facts)
    shapes = onnx.shape_inference.infer_shapes(fused).graph.value_info
    sizes = [[d.dim_value for d in value.type.tensor_type.shape.dim] for value in shapes]
    assert not any(size.count(1280) > 1 or size.count(1080) > 1 for size in sizes)
    agree(given, fused, library)


def test_other_biases_stay(library: str) -> None:
    """Of keys in another order than the image's; and all where products are what takes time, or would round them."""
    turned = "other = Transpose <perm = [0, 1, 2, 4, 3]> (both)\n bias = Reshape (other, whole)"
    given = model(("bias = Reshape (both, whole)", turned))
    fused, _ = faexport.fuse(given, options=OPTIONS)
    assert "attn_bias" in names_of(fused)
    agree(given, fused, library)
    for options in (
        Options(),
        Options(target="tensorrt"),
        Options(target="cuda"),
        Options(target="cuda", float32="tf32"),
    ):
        assert "attn_bias" in names_of(faexport.fuse(model(), options=options)[0])


def test_half_precision_takes_it() -> None:
    fused, _ = pipeline.run(ir.from_proto(model()), Options(target="cuda", fp16=True))
    assert "attn_bias" not in names_of(ir.to_proto(fused))


def test_a_bias_over_the_scale_may_be_too_large_for_float16(library: str) -> None:
    """It is not divided by the scale by itself: 700 / 0.01 is more than 65504."""
    small = "small = Cast <to = 10> (scale)\n scaled = Mul (products, small)"
    half = model(("0.35", "0.01"), ("float[", "float16["), ("scaled = Mul (products, scale)", small))
    fused, report = faexport.fuse(half, options=OPTIONS)
    assert "further columns" in " ".join(f.text for f in report.sites[0].facts)
    feeds = feeds_of(half, np.float16)
    feeds["q"] = np.sign(feeds["q"])  # so that rows and columns are whole numbers, without rounding
    feeds["a"] = np.where(np.arange(8) == 0, 700, 0).astype(np.float16) * np.sign(feeds["a"])
    feeds["b"] = np.sign(feeds["b"])
    expected, found = run(half, feeds), run(fused, feeds, library)
    assert np.isfinite(expected[0]).all()
    np.testing.assert_allclose(found[0], expected[0], atol=1e-2)


@pytest.mark.parametrize("scale", ["0.00001", "100000.0"])
def test_a_scale_without_an_inverse_in_float16(scale: str, library: str) -> None:
    given = model(("0.35", scale))
    fused, _ = faexport.fuse(given, options=OPTIONS)
    assert "attn_bias" in names_of(fused)


def test_what_may_be_infinite_stays() -> None:
    """Infinity times 0 is no number."""
    given = model(
        ("rows = Einsum", "raw = Einsum"),
        ("tall = Unsqueeze (rows, last)", "rows = Where (hidden, raw, far)\n tall = Unsqueeze (rows, last)"),
        ("float[40, 40, 8] b)", "float[40, 40, 8] b, bool[batch, 32, 40, 32] hidden)"),
        ("float scale", "float far, float scale"),
    )
    given.graph.initializer.append(numpy_helper.from_array(np.array(-np.inf, np.float32), "far"))
    fused, _ = faexport.fuse(given, options=OPTIONS)
    assert "attn_bias" in names_of(fused)
