# SPDX-License-Identifier: Apache-2.0
"""The builder of nodes: what it is asked for runs in each opset as the model's opset writes it, or it says why not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from faexport.graph.surgery import AXES_AS_INPUT, Builder, Missing

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
FIVE = [1, 1, None, None, None]  # a shape of five axes of which three sizes are open


def run(opset: int, make) -> np.ndarray:
    """What the nodes that `make(builder, x)` adds compute from X."""
    build = Builder(opset)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["a", "b", "c"]))
    y = make(build, x)
    for number, value in enumerate(v for node in build.nodes for v in node.outputs):
        value.name = f"v{number}"
    y.dtype = y.dtype or ir.DataType.FLOAT
    graph = ir.Graph([x], [y], nodes=build.nodes, opset_imports={"": opset}, name="g")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    model = ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {"x": X})[0]


# What is asked for, and what it gives.
WANTED = {
    "unsqueeze": (lambda b, x: b.unsqueeze(x, 0, 2), X[None, :, None]),
    "squeeze": (lambda b, x: b.squeeze(b.unsqueeze(x, 1), 1), X),
    "slice": (lambda b, x: b.slice(x, 1, 3, axis=1), X[:, 1:3]),
    "slice by ones": (lambda b, x: b.add("Slice", [x, *(b.ints([k]) for k in (0, 2, 1, 1))]), X[:, :2]),
    "size": (lambda b, x: b.add("Shape", [x], ir.DataType.INT64, start=1, end=2), np.array([3])),
    "reshape": (lambda b, x: b.reshape(x, [0, -1]), X.reshape(2, -1)),
    "at least": (lambda b, x: b.add("GreaterOrEqual", [x, b.constant(np.float32(5))], ir.DataType.BOOL), X >= 5),
    "at most": (lambda b, x: b.add("LessOrEqual", [x, b.constant(np.float32(5))], ir.DataType.BOOL), X <= 5),
    "four axes": (lambda b, x: b.to_four_axes(x, [2, 3, None], 2), X.reshape(1, 2, 3, 4)),
    "four axes of five": (lambda b, x: b.to_four_axes(b.unsqueeze(x, 0, 1), FIVE, 2), X.reshape(1, 2, 3, 4)),
    "split": (lambda b, x: b.split_axis(x, 0, 3, 2), X.reshape(1, 2, 3, 4)),
    "split in the middle": (lambda b, x: b.split_axis(x, 1, 3, 3, outer=True), X.reshape(2, 3, 1, 4)),
    "split at the end": (lambda b, x: b.split_axis(x, 2, 3, 2), X.reshape(2, 3, 2, 2)),
    "merge": (lambda b, x: b.merge_first_axes(b.split_axis(x, 0, 3, 2)), X),
    "sum": (lambda b, x: b.add("ReduceSum", [x, b.ints([1])], keepdims=0), X.sum(1)),
    "largest": (lambda b, x: b.add("ReduceMax", [x, b.ints([2])], keepdims=1), X.max(2, keepdims=True)),
    "mean": (lambda b, x: b.add("ReduceMean", [x, b.ints([0])], keepdims=0), X.mean(0)),
}  # fmt: skip


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 21])
def test_each_opset_has_its_spelling(opset: int) -> None:
    for what, (make, want) in WANTED.items():
        np.testing.assert_array_equal(run(opset, make), want, err_msg=what)


def test_what_an_opset_lacks_is_said() -> None:
    build = Builder(10)
    with pytest.raises(Missing, match="needs Range, which opset 10 doesn't have"):
        build.add("Range", [build.ints([0])])
    computed = build.add("Shape", [ir.Value(name="x")], ir.DataType.INT64)
    with pytest.raises(Missing, match="computed axis"):
        build.add("Unsqueeze", [ir.Value(name="x"), computed])
    with pytest.raises(Missing, match="needs Slice with steps, which opset 9 doesn't have"):
        build = Builder(9)
        build.add("Slice", [ir.Value(name="x"), *(build.ints([k]) for k in (0, 3, 1, 2))])


@pytest.mark.parametrize("op_type", AXES_AS_INPUT)
def test_no_constant_is_left_where_axes_are_an_attribute(op_type: str) -> None:
    build = Builder(AXES_AS_INPUT[op_type] - 1)
    build.add(op_type, [ir.Value(name="x"), build.ints([1])])
    assert [node.op_type for node in build.nodes] == [op_type]
    assert tuple(build.nodes[0].attributes.get_ints("axes")) == (1,)
