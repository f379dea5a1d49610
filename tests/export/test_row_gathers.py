# SPDX-License-Identifier: Apache-2.0
"""Chains of nodes that only move rows become one Gather, for CUDA."""

from __future__ import annotations

import collections

import onnx
import pytest
from faexport.around import row_gathers
from onnx import parser

from tests.export import compared
from tests.export.compared import fuse_one
from tests.export.form_text import replaced

# An image of 4 x 6 rows, rolled, cut into windows of 2 x 3, and back.
TEXT = """
<ir_version: 9, opset_import: ["": 18]>
windows (float[batch, 24, 8] x) => (float[batch, 24, 8] y)
<int64[4] image = {0, 4, 6, 8}, int64[6] cut = {0, 2, 2, 2, 3, 8}, int64[3] window = {-1, 6, 8},
 int64[6] apart = {-1, 2, 2, 2, 3, 8}, int64[3] rows = {0, 24, 8}, int64[1] first = {0}, int64[1] one = {1},
 int64[1] far = {9223372036854775807}, int64[1] axis_1 = {1}, int64[1] axis_2 = {2}, int64[1] minus = {-1}>
{
  active = Relu (x)
  picture = Reshape (active, image)
  top = Slice (picture, first, one, axis_1)
  rest = Slice (picture, one, far, axis_1)
  down = Concat <axis = 1> (rest, top)
  left = Slice (down, first, one, axis_2)
  right = Slice (down, one, far, axis_2)
  rolled = Concat <axis = 2> (right, left)
  split = Reshape (rolled, cut)
  turned = Transpose <perm = [0, 1, 3, 2, 4, 5]> (split)
  w = Reshape (turned, window)
  k = Transpose <perm = [0, 2, 1]> (w)
  products = MatMul (w, k)
  weights = Softmax <axis = -1> (products)
  mixed = MatMul (weights, w)
  split_2 = Reshape (mixed, apart)
  turned_2 = Transpose <perm = [0, 1, 3, 2, 4, 5]> (split_2)
  picture_2 = Reshape (turned_2, image)
  bottom = Slice (picture_2, minus, far, axis_1)
  most = Slice (picture_2, first, minus, axis_1)
  up = Concat <axis = 1> (bottom, most)
  flat = Reshape (up, rows)
  y = Add (flat, x)
}
"""
MOVES = ("Slice", "Concat", "Transpose", "Split")


def made_of(*pieces: tuple[str, str], **options: object) -> tuple[onnx.ModelProto, onnx.ModelProto, dict[str, int]]:
    given = parser.parse_model(replaced(TEXT, *pieces))
    made = fuse_one(given, **{"target": "cuda", **options})
    kinds = collections.Counter(node.op_type for node in made.graph.node)
    return given, made, {kind: kinds[kind] for kind in ("Gather", *MOVES) if kinds[kind]}


def agree(given: onnx.ModelProto, made: onnx.ModelProto, library: str, batches: tuple[int, ...] = (3, 1, 0)) -> None:
    compared.agree(given, made, library, (compared.normal(batch, x=(batch, 24, 8)) for batch in batches))


SPLIT = """top, rest = Split <axis = 1> (picture, sizes)
  """
SLICES = """top = Slice (picture, first, one, axis_1)
  rest = Slice (picture, one, far, axis_1)
  """
# Every second row and column, side by side in one row, as between Swin's stages.
MERGED = """flat_up = Reshape (up, rows)
  again = Reshape (flat_up, image)
  a = Slice (again, first, far, axis_1, two)
  b = Slice (again, one, far, axis_1, two)
  aa = Slice (a, first, far, axis_2, two)
  ab = Slice (a, one, far, axis_2, two)
  ba = Slice (b, first, far, axis_2, two)
  bb = Slice (b, one, far, axis_2, two)
  merged = Concat <axis = -1> (aa, ba, ab, bb)
  result = Reshape (merged, quarter)
  y = Relu (result)"""
ARE_ONE = {
    "open batch": (),
    "a batch of 3": (("[batch, 24, 8]", "[3, 24, 8]"),),
    "Split": ((SLICES, SPLIT), ("int64[1] first", "int64[2] sizes = {1, 3}, int64[1] first")),
    "the end is an output": ((" y)", " y, float[n, 6, 8] w)"),),
}


@pytest.mark.parametrize("name", ARE_ONE)
def test_chains_are_one_gather(name: str, library: str) -> None:
    given, made, kinds = made_of(*ARE_ONE[name])
    assert kinds == {"Gather": 2}
    agree(given, made, library, batches=(3,) if name == "a batch of 3" else (3, 1, 0))


def test_rows_that_are_joined_side_by_side(library: str) -> None:
    given, made, kinds = made_of(
        ("flat = Reshape (up, rows)\n  y = Add (flat, x)", MERGED),
        ("24, 8] y", "6, 32] y"),
        ("int64[1] first", "int64[1] two = {2}, int64[3] quarter = {0, 6, 32}, int64[1] first"),
    )
    assert kinds == {"Gather": 2}, "the way back and the merging are one"
    agree(given, made, library, batches=(3, 1))


UP = """bottom = Slice (picture_2, minus, far, axis_1)
  most = Slice (picture_2, first, minus, axis_1)
  up = Concat <axis = 1> (bottom, most)"""
DOWN_AGAIN = """low = Relu (picture_2)
  bottom = Slice (low, first, one, axis_1)
  most = Slice (low, one, far, axis_1)
  higher = Concat <axis = 1> (most, bottom)
  above = Slice (higher, first, one, axis_2)
  below = Slice (higher, one, far, axis_2)
  rolled_2 = Concat <axis = 2> (below, above)
  split_3 = Reshape (rolled_2, cut)
  turned_3 = Transpose <perm = [0, 1, 3, 2, 4, 5]> (split_3)
  up = Reshape (turned_3, image)"""


def test_equal_chains_share_their_indices(library: str) -> None:
    given, made, _ = made_of((UP, DOWN_AGAIN))
    rows = [node.input[1] for node in made.graph.node if node.op_type == "Gather"]
    assert len(rows) == 2 and len(set(rows)) == 1
    agree(given, made, library)


def test_what_is_read_between_stays(library: str) -> None:
    """The Slices are needed anyway."""
    given, made, kinds = made_of(("y = Add (flat, x)", "y = Add (flat, x) z = Relu (top)"), (" y)", " y, float z)"))
    assert kinds.get("Gather", 0) <= 2 and kinds["Slice"] >= 1
    agree(given, made, library)


STAY = {
    "a number that isn't known": (
        ("int64[1] minus", "int64[1] none"),
        ("float[batch, 24, 8] x)", "float[batch, 24, 8] x, int64[1] minus)"),
    ),
    "rows of two tensors": (
        ("up = Concat <axis = 1> (bottom, most)", "other = Relu (most) up = Concat <axis = 1> (bottom, other)"),
    ),
    "columns that are cut": (
        (
            "bottom = Slice (picture_2, minus, far, axis_1)",
            "bottom_8 = Slice (picture_2, minus, far, axis_1) half = Slice (bottom_8, first, four, last) "
            "bottom = Concat <axis = -1> (half, half)",
        ),
        ("int64[1] minus", "int64[1] four = {4}, int64[1] last = {3}, int64[1] minus"),
    ),
}


@pytest.mark.parametrize("name", STAY)
def test_other_chains_stay(name: str, library: str) -> None:
    given, made, kinds = made_of(*STAY[name])
    assert kinds["Gather"] == 1, "the one in front of attention"
    assert kinds["Slice"] >= 1
    if name != "a number that isn't known":
        agree(given, made, library, batches=(2,))


def test_rows_of_other_batch_entries_stay(library: str) -> None:
    """What is rolled in front of that Transpose is a chain of its own."""
    given, made, kinds = made_of(
        ("turned = Transpose <perm = [0, 1, 3, 2, 4, 5]>", "turned = Transpose <perm = [1, 0, 3, 2, 4, 5]>")
    )
    assert kinds == {"Gather": 2, "Transpose": 1}
    agree(given, made, library)


def test_many_rows_stay(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file would grow by their numbers, also where only the result has so many."""
    repeated = (
        ("up = Concat <axis = 1> (bottom, most)", "up = Concat <axis = 1> (bottom, most, bottom, most)"),
        ("flat = Reshape (up, rows)\n  y = Add (flat, x)", "y = Relu (up)"),
        ("24, 8] y", "8, 6, 8] y"),
    )
    assert made_of(*repeated)[2] == {"Gather": 2}
    monkeypatch.setattr(row_gathers, "MOST_ROWS", 47)
    given, made, kinds = made_of(*repeated)
    assert kinds["Gather"] == 1 and kinds["Concat"] == 1
    agree(given, made, library)
    monkeypatch.setattr(row_gathers, "MOST_ROWS", 23)
    assert not made_of(*repeated)[2].get("Gather")


def test_a_single_transpose_stays(library: str) -> None:
    given, made, kinds = made_of(
        ("split = Reshape (rolled, cut)", "split = Reshape (picture, cut)"),
        ("(bottom, most)", "(most, bottom)"),
        ("picture_2 = Reshape (turned_2, image)", "picture_3 = Reshape (turned_2, image) picture_2 = Relu (picture_3)"),
    )
    assert kinds["Transpose"] == 2 and kinds["Gather"] == 1
    agree(given, made, library)


def test_two_transposes_stay(library: str) -> None:
    """They take less time than a Gather."""
    again = """halves = Transpose <perm = [0, 2, 1, 3, 4, 5]> (turned_2)
  picture_2 = Reshape (halves, image)
  y_2 = Relu (picture_2)"""
    given, made, kinds = made_of(("picture_2 = Reshape (turned_2, image)", again), ("Slice (picture_2", "Slice (y_2"))
    assert kinds["Transpose"] == 2
    agree(given, made, library)


@pytest.mark.parametrize("options", [{"target": "onnxruntime"}, {"rest": False}, {"target": "tensorrt"}])
def test_only_for_cuda(options: dict) -> None:
    assert "Gather" not in made_of(**options)[2]
