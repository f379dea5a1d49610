# SPDX-License-Identifier: Apache-2.0
"""benchmarks/half_files.py and skeletons.py: the files that whole models are timed in."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.pages import ROOT


def _rotary() -> onnx.ModelProto:
    """cos(position * frequency) * x."""
    nodes = [
        helper.make_node("Mul", ["position", "frequency"], ["angle"], "angle"),
        helper.make_node("Cos", ["angle"], ["cos"], "cos"),
        helper.make_node("Mul", ["cos", "x"], ["y"], "product"),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8]) for name in ("position", "x")]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8])]
    frequency = numpy_helper.from_array(np.float32([0.7123]), "frequency")
    graph = helper.make_graph(nodes, "rotary", inputs, outputs, [frequency])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_angles_stay_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Position 1000 is one that float16 holds; its angle is not."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import half_files

    assert sorted(half_files.angles(_rotary())) == ["angle", "cos"]
    made = half_files.in_half(_rotary())
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    position, x = np.full((1, 8), 1000, np.float16), np.ones((1, 8), np.float16)
    (found,) = session.run(None, {"position": position, "x": x})
    assert np.abs(found - np.cos(712.3)).max() < 2e-3


@pytest.mark.parametrize(
    ("source", "to", "joined"),
    [
        (TensorProto.FLOAT, TensorProto.FLOAT, True),
        (TensorProto.DOUBLE, TensorProto.FLOAT, False),
        (TensorProto.FLOAT, TensorProto.INT64, False),
    ],
)
def test_only_casts_from_float32_and_back_are_joined(
    source: int, to: int, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import half_files

    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["whole"], saturate=1, to=to),
        helper.make_node("Identity", ["whole"], ["y"]),
    ]
    x, y = helper.make_tensor_value_info("x", source, [1]), helper.make_tensor_value_info("y", to, [1])
    made = half_files.join_casts(helper.make_model(helper.make_graph(nodes, "casts", [x], [y])))
    assert made.graph.node[-1].input == ["x" if joined else "whole"]


def test_weights_are_drawn_alike_by_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import skeletons

    recipe = {"shape": [64, 32], "mean": 0.0, "deviation": 0.02}
    path = tmp_path / "weights.json"
    path.write_text(json.dumps(dict.fromkeys("abcdef", recipe)))
    assert skeletons.num_weights(path) == 6 * 64 * 32
    at_once, one_by_one = skeletons.Weights(path), skeletons.Weights(path)
    at_once.draw(4)
    for name in "fbdace":
        assert np.array_equal(at_once._weight(name), one_by_one._weight(name))
    assert at_once._weight("a") is at_once._weight("a")


def test_files_that_make_all_scores_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """With more than 2^31 of them onnxruntime's kernels are wrong, so such files are neither timed nor compared
    with."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import skeletons

    for name, node in (
        ("scores", helper.make_node("Softmax", ["x"], ["y"])),
        ("none", helper.make_node("Relu", ["x"], ["y"])),
    ):
        tensors = [helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, 8]) for x in "xy"]
        onnx.save(helper.make_model(helper.make_graph([node], name, tensors[:1], tensors[1:])), tmp_path / name)
    assert [skeletons.holds_scores(tmp_path / name) for name in ("scores", "none")] == [True, False]
