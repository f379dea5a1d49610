# SPDX-License-Identifier: Apache-2.0
"""The convolution that cuts an image into patches becomes a product, where it is one."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from tests.export import compared
from tests.export.compared import fuse_one
from tests.export.form_text import replaced

TEXT = """
<ir_version: 9, opset_import: ["": 18]>
patches (float[batch, 3, 8, 6] image) => (float[batch, 4, 8] y)
<int64[3] flat = {0, 8, 4}, int64[3] rows = {0, 4, 8}>
{
  conv = Conv <kernel_shape = [4, 3], strides = [4, 3]> (image, weight, bias)
  merged = Reshape (conv, flat)
  w = Transpose <perm = [0, 2, 1]> (merged)
  k = Transpose <perm = [0, 2, 1]> (w)
  products = MatMul (w, k)
  weights = Softmax <axis = -1> (products)
  y = MatMul (weights, w)
}
"""
LAST = """turned = Transpose <perm = [0, 2, 3, 1]> (conv)
  w = Reshape (turned, rows)"""
MERGED = """merged = Reshape (conv, flat)
  w = Transpose <perm = [0, 2, 1]> (merged)"""


def model(*pieces: tuple[str, str], weight: tuple[int, ...] = (8, 3, 4, 3)) -> onnx.ModelProto:
    made = parser.parse_model(replaced(TEXT, *pieces))
    random = np.random.default_rng(0)
    for name, shape in (("weight", weight), ("bias", weight[:1])):
        array = 0.3 * random.standard_normal(shape).astype(np.float32)
        made.graph.initializer.append(numpy_helper.from_array(array, name))
    return made


def kinds_of(given: onnx.ModelProto, **options: object) -> tuple[onnx.ModelProto, collections.Counter]:
    made = fuse_one(given, **{"target": "cuda", **options})
    return made, collections.Counter(node.op_type for node in made.graph.node)


def agree(given: onnx.ModelProto, made: onnx.ModelProto, library: str, *sizes: int, batches=(3, 1, 0)) -> None:
    shape = sizes or (3, 8, 6)
    compared.agree(given, made, library, (compared.normal(batch, image=(batch, *shape)) for batch in batches))


BOTH = f"""{MERGED}
  turned = Transpose <perm = [0, 2, 3, 1]> (conv)
  end = Relu (turned)"""
COMPUTED = (  # as TorchScript's exporter flattens
    (
        "merged = Reshape (conv, flat)",
        "sizes = Shape (conv) front = Slice (sizes, first, second) open = Concat <axis = 0> (front, minus) "
        "merged = Reshape (conv, open)",
    ),
    ("int64[3] flat", "int64[1] first = {0}, int64[1] second = {2}, int64[1] minus = {-1}, int64[3] flat"),
)
IS_A_PRODUCT = {
    "patches as one axis": (),
    "channels last": ((MERGED, LAST),),
    "a shape that is computed": COMPUTED,
    "a shape that is an output": (
        ("y = MatMul (weights, w)", "y = MatMul (weights, w) sizes = Shape (conv) more = Shape (merged)"),
        (" y)", " y, int64[4] sizes, int64[3] more)"),
    ),
    "no bias": (("weight, bias", "weight"),),
    "valid padding": (("Conv <", 'Conv <auto_pad = "VALID", '),),
    "read in both ways": ((MERGED, BOTH), ("[batch, 4, 8] y)", "[batch, 4, 8] y, float[batch, 2, 2, 8] end)")),
    "read twice in one way": (
        (MERGED, f"{MERGED}\n  again = Transpose <perm = [0, 2, 1]> (merged) z = Relu (again)"),
        (" y)", " y, float[batch, 4, 8] z)"),
    ),
}


@pytest.mark.parametrize("name", IS_A_PRODUCT)
def test_patches_are_a_product(name: str, library: str) -> None:
    given = model(*IS_A_PRODUCT[name])
    made, kinds = kinds_of(given)
    assert kinds["Conv"] == 0 and kinds["MatMul"] >= 1
    assert kinds["Transpose"] == 2, "of the pixels and of the weight, which onnxruntime turns when it loads the model"
    agree(given, made, library, batches=(3, 1) if name == "a shape that is computed" else (3, 1, 0))


def test_patches_of_a_video(library: str) -> None:
    given = model(
        ("[batch, 3, 8, 6] image", "[batch, 3, 2, 8, 6] image"),
        ("kernel_shape = [4, 3], strides = [4, 3]", "kernel_shape = [2, 4, 3], strides = [2, 4, 3]"),
        weight=(8, 3, 2, 4, 3),
    )
    made, kinds = kinds_of(given)
    assert kinds["Conv"] == 0
    agree(given, made, library, 3, 2, 8, 6)


STAYS = {
    "patches that overlap": (
        ("strides = [4, 3]", "strides = [2, 3]"),
        ("{0, 4, 8}", "{0, 6, 8}"),
        ("4, 8] y", "6, 8] y"),
    ),
    "gaps": (("strides = [4, 3]", "strides = [4, 4]"), ("{0, 4, 8}", "{0, 2, 8}"), ("4, 8] y", "2, 8] y")),
    "padding": (("Conv <", "Conv <pads = [1, 0, 1, 0], "), ("8, 6] image", "10, 6] image"), ("4, 8] y", "6, 8] y")),
    "padding that is computed": (("Conv <", 'Conv <auto_pad = "SAME_UPPER", '),),
    "holes": (("Conv <", "Conv <dilations = [1, 2], "), ("8, 6] image", "8, 8] image"), ("4, 8] y", "4, 8] y")),
    "rows that are left over": (("8, 6] image", "9, 6] image"),),
    "an open size": (("8, 6] image", "height, 6] image"), ("4, 8] y", "n, 8] y")),
    "read as it is, too": (
        ("y = MatMul (weights, w)", "y = MatMul (weights, w) z = Relu (conv)"),
        (" y)", " y, float z)"),
    ),
    "an output": ((" y)", " y, float[batch, 8, 2, 2] conv)"),),
    "a weight that a caller may give": (("6] image)", "6] image, float[8, 3, 4, 3] weight)"),),
    "turned in a branch": (
        (" y)", " y, float[batch, 2, 2, 8] z)"),
        (
            "y = MatMul (weights, w)",
            "y = MatMul (weights, w) size = Size (image) some = Cast <to = 9> (size) z = If (some) <"
            "then_branch = one () => (float[batch, 2, 2, 8] u) { u = Transpose <perm = [0, 2, 3, 1]> (conv) }, "
            "else_branch = two () => (float[batch, 2, 2, 8] v) "
            "{ turned = Transpose <perm = [0, 2, 3, 1]> (conv) v = Relu (turned) }>",
        ),
    ),
    "turned otherwise": (
        (MERGED, "merged = Reshape (conv, flat) w = Transpose <perm = [0, 2, 1]> (merged) v = Relu (merged)"),
        (" y)", " y, float v)"),
    ),
}
SIZES = {"padding": (3, 10, 6), "holes": (3, 8, 8), "rows that are left over": (3, 9, 6)}


@pytest.mark.parametrize("name", STAYS)
def test_other_convolutions_stay(name: str, library: str) -> None:
    given = model(("{0, 8, 4}", "{0, 8, -1}"), *STAYS[name])
    made, kinds = kinds_of(given)
    assert kinds["Conv"] == 1
    agree(given, made, library, *SIZES.get(name, ()), batches=(2,))


def test_groups_stay(library: str) -> None:
    given = model(
        ("Conv <", "Conv <group = 3, "), ("{0, 8, 4}", "{0, 6, 4}"), ("4, 8] y", "4, 6] y"), weight=(6, 1, 4, 3)
    )
    made, kinds = kinds_of(given)
    assert kinds["Conv"] == 1
    agree(given, made, library, batches=(2,))


def test_single_pixels_stay(library: str) -> None:
    given = model(
        ("kernel_shape = [4, 3], strides = [4, 3]", "kernel_shape = [1, 1]"),
        ("4, 8] y", "48, 8] y"),
        ("{0, 8, 4}", "{0, 8, 48}"),
        weight=(8, 3, 1, 1),
    )
    made, kinds = kinds_of(given)
    assert kinds["Conv"] == 1
    agree(given, made, library, batches=(2,))


@pytest.mark.parametrize("options", [{"target": "onnxruntime"}, {"rest": False}, {"target": "tensorrt"}])
def test_only_for_cuda(options: dict) -> None:
    assert kinds_of(model(), **options)[1]["Conv"] == 1
