# SPDX-License-Identifier: Apache-2.0
"""The output's projection moves behind nodes that only move rows, so that its bias, the residual and the normalization
behind become one operator; residuals of images [batch, height, width, channels] do, too."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from tests.export import compared
from tests.export.compared import fuse_one
from tests.export.form_text import replaced

# Attention within windows of 2 x 3 of an image of 4 x 6, whose rows go back to their places in front of the residual.
TEXT = """
<ir_version: 9, opset_import: ["": 18]>
windows (float[batch, 4, 6, 8] x) => (float[batch, 4, 6, 8] y)
<int64[6] cut = {0, 2, 2, 2, 3, 8}, int64[3] window = {-1, 6, 8}, int64[6] apart = {-1, 2, 2, 2, 3, 8},
 int64[4] image = {0, 4, 6, 8}, float epsilon = {0.001}>
{
  split = Reshape (x, cut)
  turned = Transpose <perm = [0, 1, 3, 2, 4, 5]> (split)
  w = Reshape (turned, window)
  k = Transpose <perm = [0, 2, 1]> (w)
  products = MatMul (w, k)
  weights = Softmax <axis = -1> (products)
  mixed = MatMul (weights, w)
  product = MatMul (mixed, weight)
  biased = Add (product, bias)
  split_2 = Reshape (biased, apart)
  turned_2 = Transpose <perm = [0, 1, 3, 2, 4, 5]> (split_2)
  back = Reshape (turned_2, image)
  total = Add (x, back)
  norm = LayerNormalization <axis = -1, epsilon = 0.001> (total, gamma, beta)
  active = Relu (norm)
  y = Add (active, total)
}
"""


def model(*pieces: tuple[str, str], **shapes: tuple[int, ...]) -> onnx.ModelProto:
    made = parser.parse_model(replaced(TEXT, *pieces))
    random = np.random.default_rng(0)
    usual = {"weight": (8, 8), "bias": (8,), "gamma": (8,), "beta": (8,), "wide": (8, 16), "columns": (16,)}
    for name, shape in (usual | shapes).items():
        if any(name in node.input for node in made.graph.node):
            array = random.standard_normal(shape).astype(np.float32)
            made.graph.initializer.append(numpy_helper.from_array(array, name))
    return made


def fused(given: onnx.ModelProto, **options: object) -> tuple[onnx.ModelProto, dict[str, list[onnx.NodeProto]]]:
    made = fuse_one(given, **options)
    return made, compared.nodes_by_kind(made)


def is_behind(made: onnx.ModelProto) -> bool:
    """Is the projection behind the last Transpose?"""
    kinds = [node.op_type for node in made.graph.node]
    return kinds.index("MatMul") > len(kinds) - 1 - kinds[::-1].index("Transpose")


def agree(
    given: onnx.ModelProto, made: onnx.ModelProto, library: str, batches=(3, 1, 0), shape: tuple[int, ...] = (4, 6, 8)
) -> None:
    feeds = (compared.normal(batch, x=(batch, *shape)) for batch in batches)
    compared.agree(given, made, library, feeds, atol=2e-5)


def test_bias_residual_and_normalization_are_one(library: str) -> None:
    given = model()
    made, nodes = fused(given)
    assert is_behind(made)
    (norm,) = nodes["SkipLayerNormalization"]
    assert len(norm.input) == 5 and len(norm.output) == 4 and not nodes["LayerNormalization"]
    assert norm.attribute[0].f == pytest.approx(1e-3)
    assert len(nodes["Add"]) == 1
    agree(given, made, library)


CROP = (
    "image = {0, 4, 6, 8}",
    "image = {0, 4, 6, 8}, int64[2] none = {0, 0}, int64[2] three = {3, 5}, int64[2] inner = {1, 2}",
)
CROPPED = "whole = Reshape (turned_2, image) back = Slice (whole, none, three, inner)"
MOVES = {
    "as it is": (),
    "bias first": (("Add (product, bias)", "Add (bias, product)"),),
    "residual second": (("Add (x, back)", "Add (back, x)"),),
    "rows that are cut off": (
        CROP,
        ("back = Reshape (turned_2, image)", CROPPED),
        ("Add (x, back)", "Add (smaller, back)"),
        ("split = Reshape (x, cut)", "smaller = Slice (x, none, three, inner) split = Reshape (x, cut)"),
        ("6, 8] y", "5, 8] y"),
        ("float[batch, 4, 5, 8] y", "float[batch, 3, 5, 8] y"),
    ),
    "rows that are chosen": (
        ("image = {0, 4, 6, 8}", "image = {0, 4, 6, 8}, int64[2] chosen = {3, 1}"),
        (
            "back = Reshape (turned_2, image)",
            "whole = Reshape (turned_2, image) back = Gather <axis = 1> (whole, chosen)",
        ),
        ("Add (x, back)", "Add (smaller, back)"),
        ("4, 6, 8] y", "2, 6, 8] y"),
        ("split = Reshape (x, cut)", "smaller = Gather <axis = 1> (x, chosen) split = Reshape (x, cut)"),
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_products_move_behind_rows(name: str, library: str) -> None:
    given = model(*MOVES[name])
    made, nodes = fused(given)
    assert is_behind(made) and len(nodes["SkipLayerNormalization"]) == 1
    agree(given, made, library)


STAYS = {
    "read elsewhere": (
        ("y = Add (active, total)", "z = Relu (biased) y = Add (active, total)"),
        (" y)", " y, float z)"),
    ),
    "the product, too": (
        ("y = Add (active, total)", "z = Relu (product) y = Add (active, total)"),
        (" y)", " y, float z)"),
    ),
    "the product's shape": (
        ("y = Add (active, total)", "sizes = Shape (product) y = Add (active, total)"),
        (" y)", " y, int64[3] sizes)"),
    ),
    "a shape that is read": (
        ("y = Add (active, total)", "sizes = Shape (split_2) y = Add (active, total)"),
        (" y)", " y, int64[6] sizes)"),
    ),
    "no residual": (("total = Add (x, back)", "total = Relu (back)"),),
    "a residual that is repeated": (("total = Add (x, back)", "total = Add (gamma, back)"),),
    "columns that move": (
        (
            "back = Reshape (turned_2, image)",
            "whole = Reshape (turned_2, image) back = Transpose <perm = [0, 1, 3, 2]> (whole)",
        ),
        (
            "total = Add (x, back)",
            "first = Transpose <perm = [0, 1, 3, 2]> (x) sum = Add (first, back) "
            "total = Transpose <perm = [0, 1, 3, 2]> (sum)",
        ),
    ),
    "rows that are repeated": (
        ("image = {0, 4, 6, 8}", "image = {0, 4, 6, 8}, int64[5] chosen = {3, 1, 2, 0, 0}"),
        (
            "back = Reshape (turned_2, image)",
            "whole = Reshape (turned_2, image) back = Gather <axis = 1> (whole, chosen)",
        ),
        ("Add (x, back)", "Add (larger, back)"),
        ("4, 6, 8] y", "5, 6, 8] y"),
        ("split = Reshape (x, cut)", "larger = Gather <axis = 1> (x, chosen) split = Reshape (x, cut)"),
    ),
    "a computed weight": (
        (
            "product = MatMul (mixed, weight)",
            "row = ReduceMean <keepdims = 0, axes = [0, 1, 2]> (x) square = Mul (weight, row) "
            "product = MatMul (mixed, square)",
        ),
        ('"": 18', '"": 17'),
    ),
    "a bias of places": (("Add (product, bias)", "Add (product, rows)"),),
}


@pytest.mark.parametrize("name", STAYS)
def test_near_misses(name: str, library: str) -> None:
    given = model(*STAYS[name], rows=(6, 8))
    made, nodes = fused(given)
    assert not is_behind(made) and len(nodes["MatMul"]) == 1
    agree(given, made, library, batches=(3, 1))


OLDER = """
<ir_version: 7, opset_import: ["": 9]>
cut (float[batch, 24, 8] x) => (float[batch, 20, 8] y)
{
  k = Transpose <perm = [0, 2, 1]> (x)
  products = MatMul (x, k)
  weights = Softmax <axis = 2> (products)
  mixed = MatMul (weights, x)
  product = MatMul (mixed, weight)
  biased = Add (product, bias)
  back = Slice <axes = [1], starts = [0], ends = [20]> (biased)
  rest = Slice <axes = [1], starts = [4], ends = [24]> (x)
  y = Add (rest, back)
}
"""


def test_what_moves_keeps_its_opsets_spelling(library: str) -> None:
    """Before opset 10 the bounds of a Slice are attributes."""
    given = model((TEXT, OLDER))
    made, nodes = fused(given)
    kinds = [node.op_type for node in made.graph.node]
    assert kinds.index("Slice") < kinds.index("MatMul"), "the projection is behind"
    agree(given, made, library, shape=(24, 8))


def test_weights_that_are_not_square_stay(library: str) -> None:
    """What is moved would not be as wide."""
    given = model(
        ("MatMul (mixed, weight)", "MatMul (mixed, wide)"),
        ("(product, bias)", "(product, columns)"),
        ("apart = {-1, 2, 2, 2, 3, 8}", "apart = {-1, 2, 2, 2, 3, 16}"),
        ("image = {0, 4, 6, 8}", "image = {0, 4, 6, 16}"),
        ("Add (x, back)", "Add (double, back)"),
        ("split = Reshape (x, cut)", "double = Concat <axis = -1> (x, x) split = Reshape (x, cut)"),
        ("4, 6, 8] y", "4, 6, 16] y"),
        gamma=(16,),
        beta=(16,),
    )
    made, _ = fused(given)
    assert not is_behind(made)
    agree(given, made, library)


IMAGES_STAY = {
    "a weight for each place": (("gamma, beta)", "places, beta)"),),
    "no bias of the normalization": (("gamma, beta)", "gamma)"),),
    "of two axes": (("axis = -1, epsilon", "axis = -2, epsilon"), ("gamma, beta)", "both, both)")),
    "mean, too": (("norm =", "norm, mean ="), ("y = Add (active, total)", "y = Add (active, mean)")),
    "a sum with a stored tensor": (("total = Add (x, back)", "total = Add (both_4, back)"),),
}


@pytest.mark.parametrize("name", IMAGES_STAY)
def test_other_normalizations_stay(name: str, library: str) -> None:
    given = model(*IMAGES_STAY[name], places=(6, 8), both=(6, 8), both_4=(1, 4, 6, 8))
    made, nodes = fused(given)
    assert not nodes["SkipLayerNormalization"] and len(nodes["LayerNormalization"]) == 1
    agree(given, made, library, batches=(3,))


def test_an_open_height_stays(library: str) -> None:
    given = model(
        ("6, 8] x)", "6, 8] x, float[batch, height, 6, 8] z)"),
        (" y)", " y, float[batch, height, 6, 8] end)"),
        (
            "active = Relu",
            "grown = Relu (z) more = Add (z, grown) end = LayerNormalization (more, gamma, beta) active = Relu",
        ),
    )
    made, nodes = fused(given)
    assert len(nodes["SkipLayerNormalization"]) == len(nodes["LayerNormalization"]) == 1
    compared.agree(given, made, library, [compared.normal(1, x=(2, 4, 6, 8), z=(2, 5, 6, 8))], atol=2e-5)


IN_A_BRANCH = """count = Size (x)
  some = Cast <to = 9> (count)
  gamma = Identity (bias)
  beta = Identity (stored)
  y = If (some) <
    then_branch = one () => (float[batch, 4, 6, 8] norm) {
      total = Add (x, back)
      norm = LayerNormalization <axis = -1> (total, gamma, beta)
    },
    else_branch = two () => (float[batch, 4, 6, 8] sum) { sum = Add (x, back) }
  >
}"""


def test_weights_of_a_branch_may_stand_outside(library: str) -> None:
    """A node outside of the branch makes one of them."""
    given = model((TEXT[TEXT.index("total = ") :], IN_A_BRANCH), stored=(8,))
    made, _ = fused(given)
    (choice,) = (node for node in made.graph.node if node.op_type == "If")
    assert "SkipLayerNormalization" in [node.op_type for node in choice.attribute[0].g.node]
    agree(given, made, library)


@pytest.mark.parametrize("options", [{"rest": False}, {"target": "tensorrt"}])
def test_only_for_onnxruntime(options: dict) -> None:
    made, nodes = fused(model(), **options)
    assert not is_behind(made) and not nodes["SkipLayerNormalization"]
