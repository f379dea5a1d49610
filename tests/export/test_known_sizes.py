# SPDX-License-Identifier: Apache-2.0
"""Sizes that are proven become numbers, and targets of Reshapes keep their meaning, in a batch of 0, too."""

from __future__ import annotations

import faexport
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser

from tests.export.compared import run
from tests.export.form_text import replaced

# Windows of 4 of 8 rows, whose shapes are computed from x as TorchScript's exporter has it.
TEXT = """
<ir_version: 9, opset_import: ["": 18]>
windows (float[batch, 8, 6] x) => (float[batch, 8, 6] y, int64[2] sizes)
<int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64 four = {4}, int64[1] first = {0}, int64[1] minus = {-1},
 int64[1] side = {4}, int64[1] columns = {6}>
{
  shape_0 = Shape (x)
  batch = Gather (shape_0, zero)
  shape_1 = Shape (x)
  rows = Gather (shape_1, one)
  count = Div (rows, four)
  batch_1 = Unsqueeze (batch, first)
  count_1 = Unsqueeze (count, first)
  apart = Concat <axis = 0> (batch_1, count_1, side, columns)
  split = Reshape (x, apart)
  all = Mul (batch, count)
  all_1 = Unsqueeze (all, first)
  merged = Concat <axis = 0> (all_1, side, columns)
  w = Reshape (split, merged)
  k = Transpose <perm = [0, 2, 1]> (w)
  products = MatMul (w, k)
  weights = Softmax <axis = -1> (products)
  mixed = MatMul (weights, w)
  rows_1 = Unsqueeze (rows, first)
  back = Concat <axis = 0> (batch_1, rows_1, columns)
  y = Reshape (mixed, back)
  sizes = Concat <axis = 0> (batch_1, rows_1)
}
"""


def model(*pieces: tuple[str, str]) -> onnx.ModelProto:
    return parser.parse_model(replaced(TEXT, *pieces))


def as_written(given: onnx.ModelProto, x: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Not optimized: onnxruntime would write a 0 and a -1 into one target, which fails in a batch of 0."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(given.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, x)


def agree(
    given: onnx.ModelProto, fused: onnx.ModelProto, library: str, rows: int = 8, batches: tuple[int, ...] = (3, 1)
) -> None:
    for batch in batches:
        x = {"x": np.random.default_rng(batch).standard_normal((batch, rows, 6)).astype(np.float32)}
        for want, have in zip(as_written(given, x), run(fused, x, library), strict=True):
            assert have.shape == want.shape
            np.testing.assert_allclose(have, want, atol=1e-5)


def test_known_sizes_are_numbers(library: str) -> None:
    """Only the batch is computed, for the output that tells it; targets say it by 0 and -1."""
    given = model()
    fused, _ = faexport.fuse(given)
    kinds = [node.op_type for node in fused.graph.node]
    assert not {"Div", "Mul"} & set(kinds) and kinds.count("Shape") == 1
    agree(given, fused, library, batches=(3, 1, 0))


@pytest.mark.parametrize("rows", (8, 4))
def test_open_sizes_stay_computed(rows: int, library: str) -> None:
    """Two that no word of ONNX tells apart."""
    given = model(("batch, 8, 6] x", "batch, rows, 6] x"), ("batch, 8, 6] y", "batch, rows, 6] y"))
    fused, _ = faexport.fuse(given)
    assert "Div" in {node.op_type for node in fused.graph.node}
    agree(given, fused, library, rows)


def test_an_initializer_that_the_caller_may_give_is_not_known(library: str) -> None:
    given = model(("[batch, 8, 6] x)", "[batch, 8, 6] x, int64 four)"), ("int64 four = {4}, ", ""))
    given.graph.initializer.append(onnx.numpy_helper.from_array(np.array(4), "four"))
    fused, _ = faexport.fuse(given)
    assert "Div" in {node.op_type for node in fused.graph.node}
    agree(given, fused, library)
