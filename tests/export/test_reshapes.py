# SPDX-License-Identifier: Apache-2.0
"""Reshapes that stand one behind the other become one, or none."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser

from tests.export import compared
from tests.export.compared import fuse_one, run
from tests.export.form_text import replaced

TEXT = """
<ir_version: 9, opset_import: ["": 18]>
rows (float[batch, 12, 8] x) => (float[batch, 12, 8] y)
<int64[4] image = {0, 3, 4, 8}, int64[4] halves = {0, 6, 2, 8}, int64[3] rows = {0, 12, 8}, int64[1] one = {1}>
{
  w = Relu (x)
  k = Transpose <perm = [0, 2, 1]> (w)
  products = MatMul (w, k)
  weights = Softmax <axis = -1> (products)
  mixed = MatMul (weights, w)
  a = Reshape (mixed, image)
  b = Reshape (a, halves)
  c = Sin (b)
  y = Reshape (c, rows)
}
"""
NO_CHANGE = "b = Reshape (a, halves)\n  c = Sin (b)\n  y = Reshape (c, rows)"


def made_of(*pieces: tuple[str, str], **options: object) -> tuple[onnx.ModelProto, onnx.ModelProto, int]:
    given = parser.parse_model(replaced(TEXT, *pieces))
    made = fuse_one(given, **options)
    return given, made, sum(node.op_type in ("Reshape", "Unsqueeze", "Squeeze") for node in made.graph.node)


def agree(given: onnx.ModelProto, made: onnx.ModelProto, library: str, batches=(3, 1, 0), rows: int = 12) -> None:
    compared.agree(given, made, library, (compared.normal(batch, x=(batch, rows, 8)) for batch in batches))


JOINED = {
    "two": ((), 2),
    "three": ((("b = Reshape (a, halves)", "m = Reshape (a, rows) b = Reshape (m, halves)"),), 2),
    "an axis more": ((("b = Reshape (a, halves)", "m = Unsqueeze (a, one) b = Reshape (m, halves)"),), 2),
    "none": (((NO_CHANGE, "b = Reshape (a, rows)\n  y = Sin (b)"),), 0),
    "the first is read elsewhere": ((("c = Sin (b)", "c = Sin (b) z = Relu (a)"), (" y)", " y, float z)")), 3),
    "no change, but an output": (
        ((NO_CHANGE, "y = Reshape (a, rows)"), ("a = Reshape (mixed", "s = Sin (mixed) a = Reshape (s")),
        1,
    ),
    "windows of all entries": (
        (("[4] halves = {0, 6, 2, 8}", "[3] halves = {-1, 2, 8}"), ("{0, 12, 8}", "{-1, 12, 8}")),
        2,
    ),
}


@pytest.mark.parametrize("name", JOINED)
def test_reshapes_become_one(name: str, library: str) -> None:
    pieces, count = JOINED[name]
    given, made, found = made_of(*pieces)
    assert found == count
    agree(given, made, library)


def test_two_open_sizes_stay(library: str) -> None:
    """No target of numbers says both, where they change places."""
    given, made, found = made_of(
        ("[batch, 12, 8] x", "[batch, rows, 8] x"),
        ("{0, 3, 4, 8}", "{0, -1, 1, 8}"),
        ("b = Reshape (a, halves)", "t = Transpose <perm = [1, 0, 2, 3]> (a) b = Reshape (t, flat)"),
        ("y = Reshape (c, rows)", "y = Reshape (c, flat)"),
        ("[batch, 12, 8] y", "[all, 8] y"),
        ("int64[1] one", "int64[2] flat = {-1, 8}, int64[1] one"),
    )
    assert found >= 2
    agree(given, made, library, batches=(3, 1), rows=5)


def test_an_open_size_between_stays(library: str) -> None:
    """A model that refuses an odd number of rows goes on doing so."""
    given, made, found = made_of(
        ("[batch, 12, 8] x", "[batch, rows, 8] x"),
        ("[batch, 12, 8] y", "[all, 16] y"),
        ("[4] image = {0, 3, 4, 8}", "[4] image = {0, -1, 2, 8}"),
        ("[4] halves = {0, 6, 2, 8}", "[2] halves = {-1, 16}"),
        ("y = Reshape (c, rows)", "y = Relu (c)"),
    )
    assert found == 2
    agree(given, made, library, batches=(2,), rows=6)
    with pytest.raises(Exception, match="Reshape"):
        run(made, {"x": np.ones((2, 5, 8), np.float32)}, library)


@pytest.mark.parametrize("options", [{"rest": False}, {"target": "tensorrt"}])
def test_only_for_onnxruntime(options: dict) -> None:
    assert made_of(**options)[2] == 3
