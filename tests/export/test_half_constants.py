# SPDX-License-Identifier: Apache-2.0
"""What depends on stored numbers alone is computed before a model becomes half precision."""

from __future__ import annotations

import collections
import pathlib

import faexport
import numpy as np
import onnx
import pytest
from faexport.precision import half_constants
from onnx import numpy_helper, parser

from tests.export.form_text import replaced

# A mask that is computed from stored numbers of regions, as Swin's is, and a stored weight that is multiplied.
TEXT = """
<ir_version: 9, opset_import: ["": 18]>
windows (float[batch, 6, 8] x) => (float[batch, 6, 8] y)
<float zero = {0.0}, float minus = {-100.0}, int64[1] first = {0}>
{
  w = Mul (x, slopes)
  k = Transpose <perm = [0, 2, 1]> (w)
  products = MatMul (w, k)
  same = Equal (regions, zero)
  others = Not (same)
  filled = Where (others, minus, regions)
  cleaned = Where (same, zero, filled)
  mask = Unsqueeze (cleaned, first)
  scores = Add (products, mask)
  weights = Softmax <axis = -1> (scores)
  mixed = MatMul (weights, w)
  halved = Mul (weight, half)
  turned = Transpose <perm = [1, 0]> (halved)
  y = MatMul (mixed, turned)
}
"""
ARITHMETIC = {"Equal", "Not", "Where"}
ANGLES = """angles = Mul (floats, frequency)
  slopes = Cos (angles)
  w = Mul (x, slopes)"""


def made_of(folder: pathlib.Path, *pieces: tuple[str, str], **options: object):
    given = parser.parse_model(replaced(TEXT, *pieces))
    random = np.random.default_rng(0)
    stored = {
        "regions": np.subtract.outer(np.arange(6) // 3, np.arange(6) // 3),
        "weight": random.standard_normal((8, 8)),
        "half": np.array(0.5),
        "slopes": np.linspace(0.5, 1, 8),
        "floats": 1e3 * np.arange(6)[:, None],
        "frequency": np.linspace(1, 2, 8),
    }
    for name, array in stored.items():
        if any(name in node.input for node in given.graph.node) and not any(name in n.output for n in given.graph.node):
            given.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    onnx.save(given, folder / "given.onnx")
    report = faexport.optimize(
        folder / "given.onnx", folder / "made.onnx", faexport.Options(**{"fp16": True, **options})
    )
    assert report.num_fused == 1 and report.half_precision.status == "passed"
    made = onnx.load(folder / "made.onnx")
    return made, collections.Counter(node.op_type for node in made.graph.node), report


@pytest.mark.parametrize("options", [{}, {"keep_io_types": False}, {"fp16": False, "bf16": True}])
def test_stored_numbers_are_computed(tmp_path: pathlib.Path, library: str, options: dict) -> None:
    made, kinds, _ = made_of(tmp_path, **options)
    assert kinds["Mul"] == 1
    # What onnxruntime doesn't run in bfloat16 stays in float32, and it computes that when it loads the model.
    assert not ARITHMETIC & kinds.keys() or "bf16" in options
    stored = {tensor.name: tensor for tensor in made.graph.initializer}
    (values,) = (tensor for name, tensor in stored.items() if "halved" in name)
    kind = onnx.TensorProto.BFLOAT16 if "bf16" in options else onnx.TensorProto.FLOAT16
    assert values.data_type == kind and not {"weight", "half"} & stored.keys()
    assert kinds["Transpose"] == 1, "onnxruntime turns the weight when it loads the model"


def test_an_exponent_of_another_type(tmp_path: pathlib.Path, library: str) -> None:
    """The power is of the type of what is raised."""
    power = ("halved = Mul (weight, half)", "halved = Pow (weight, two)")
    _, kinds, _ = made_of(tmp_path, power, ("int64[1] first", "int64 two = {2}, int64[1] first"))
    assert not kinds["Pow"]


def test_text_stays(tmp_path: pathlib.Path, library: str) -> None:
    made, kinds, _ = made_of(
        tmp_path, ("halved = Mul (weight, half)", "text = Cast <to = 8> (weight) halved = Cast <to = 1> (text)")
    )
    assert kinds["MatMul"] == 1


def test_what_a_caller_may_give_is_not(tmp_path: pathlib.Path, library: str) -> None:
    _, kinds, _ = made_of(tmp_path, ("8] x)", "8] x, float[6, 6] regions)"), ("zero = {0.0}", "zero = {0.5}"))
    assert kinds["Where"] == 2


def test_the_file_does_not_grow(tmp_path: pathlib.Path, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is larger than what it is made of stays computed, unless it is small."""
    outer = ("halved = Mul (weight, half)", "halved = Mul (column, row)")
    stored = (
        "float zero",
        "float[8, 1] column = {1, 2, 3, 4, 5, 6, 7, 8}, float[1, 8] row = {1, 2, 3, 4, 5, 6, 7, 8}, float zero",
    )
    assert made_of(tmp_path, outer, stored)[1]["Mul"] == 1
    monkeypatch.setattr(half_constants, "SMALL", 63)
    assert made_of(tmp_path, outer, stored)[1]["Mul"] == 2


def test_positions_stay_as_they_are(tmp_path: pathlib.Path, library: str) -> None:
    """They are numbers that half precision doesn't hold: what computes them stays in float32."""
    integers = ("int64[1] first", "int64[6, 1] whole = {0, 1000, 2000, 3000, 4000, 5000}, int64[1] first")
    made, kinds, report = made_of(
        tmp_path, ("w = Mul (x, slopes)", f"floats = Cast <to = 1> (whole)\n  {ANGLES}"), integers
    )
    assert kinds["Cos"] == 1 and set(report.half_precision.kept.values()) == {"computes positions"}
    (angles,) = (node for node in made.graph.node if "angles" in node.output[0])
    assert angles.op_type == "Mul"
