# SPDX-License-Identifier: Apache-2.0
"""Long chains of nodes and enormous sizes: no recursion error, and no memory or time without end."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import faexport
import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tests.export.malformed_models import attention, node

LENGTH = 500
SECONDS = 60.0  # of CPU time, for a model that takes a tenth of a second
MEGABYTES = 1000  # more than before
BIG = 1 << 40

Step = tuple[str, tuple[str | None, ...], dict]  # an operator, its inputs (None: the step before) and attributes
WEIGHTS = {
    "one": np.float32(1),
    "zero": np.float32(0),
    "no": np.array(False),
    "i0": np.array(0, np.int64),
    "i1": np.array([1], np.int64),
    "i2": np.array(2, np.int64),
    "low": np.float32(-1e9),
}


def make(op_type: str, inputs: str, result: str = "made", **attributes: object) -> NodeProto:
    return helper.make_node(op_type, inputs.split(), [result], **attributes)


def cast(to: int) -> Step:
    return "Cast", (None,), {"to": to}


def insert(model: onnx.ModelProto, before: str, nodes: list[NodeProto]) -> None:
    """Puts nodes in front of the one that makes `before`, and adds the weights that they read."""
    place = list(model.graph.node).index(node(model, before))
    all_nodes = list(model.graph.node)
    all_nodes[place:place] = nodes
    del model.graph.node[:]
    model.graph.node.extend(all_nodes)
    there = {tensor.name for tensor in model.graph.initializer}
    wanted = {name for n in model.graph.node for name in n.input} & (WEIGHTS.keys() - there)
    model.graph.initializer.extend(numpy_helper.from_array(WEIGHTS[name], name) for name in sorted(wanted))


def chain(n: int, model: onnx.ModelProto, before: str, value: str, *steps: Step) -> onnx.ModelProto:
    """`n` nodes between `value` and the node that makes `before`."""
    nodes, last = [], value
    for k in range(n):
        op_type, inputs, attributes = steps[k % len(steps)]
        name = f"{value}_{k}"
        nodes.append(helper.make_node(op_type, [last if i is None else i for i in inputs], [name], **attributes))
        last = name
    target = node(model, before)
    target.input[:] = [last if name == value else name for name in target.input]
    insert(model, before, nodes)
    return model


def where_mask() -> onnx.ModelProto:
    """The mask is bool, and chooses between the scores and a fill."""
    model = attention()
    model.graph.input[3].type.tensor_type.elem_type = TensorProto.BOOL
    node(model, "s3").CopyFrom(helper.make_node("Where", ["m", "s2", "low"], ["s3"]))
    insert(model, "s3", [])
    return model


def causal() -> onnx.ModelProto:
    """The mask is row >= column."""
    model = attention()
    del model.graph.input[3]
    node(model, "s3").CopyFrom(helper.make_node("Where", ["m", "s2", "low"], ["s3"]))
    rows = [
        make("Shape", "q", "q_shape"),
        make("Shape", "k", "k_shape"),
        make("Gather", "q_shape i2", "num_rows"),
        make("Gather", "k_shape i2", "num_keys"),
        make("Squeeze", "i1", "step"),
        make("Range", "i0 num_rows step", "row"),
        make("Range", "i0 num_keys step", "column"),
        make("Unsqueeze", "row i1", "rows"),
        make("GreaterOrEqual", "rows column", "m"),
    ]
    insert(model, "s3", rows)
    return model


def reshaped() -> onnx.ModelProto:
    """The query is reshaped to its own shape."""
    model = attention()
    insert(
        model, "s", [helper.make_node("Shape", ["q"], ["shape"]), helper.make_node("Reshape", ["q", "shape"], ["r"])]
    )
    node(model, "s").input[0] = "r"
    return model


SWAP = ("Transpose", (None,), {"perm": [0, 2, 1, 3]})
TURN = ("Transpose", (None,), {"perm": [0, 1, 3, 2]})
CHAINS: dict[str, Callable[[int], onnx.ModelProto]] = {
    "mask + 0": lambda n: chain(n, attention(), "s3", "m", ("Add", (None, "zero"), {})),
    "mask * 1 + 0": lambda n: chain(n, attention(), "s3", "m", ("Mul", (None, "one"), {}), ("Add", (None, "zero"), {})),
    "mask, turned": lambda n: chain(n, attention(), "s3", "m", TURN),
    "mask, not": lambda n: chain(n, where_mask(), "s3", "m", ("Not", (None,), {})),
    "mask and itself": lambda n: chain(n, where_mask(), "s3", "m", ("And", (None, "m"), {})),
    "mask, cast": lambda n: chain(
        n, where_mask(), "s3", "m", cast(TensorProto.INT64), cast(TensorProto.BOOL)
    ),
    "causal, not": lambda n: chain(n, causal(), "s3", "m", ("Not", (None,), {})),
    "causal or no": lambda n: chain(n, causal(), "s3", "m", ("Or", (None, "no"), {})),
    "rows + 0": lambda n: chain(n, causal(), "m", "rows", ("Add", (None, "i0"), {})),
    "number of keys + 0": lambda n: chain(n, causal(), "column", "num_keys", ("Add", (None, "i0"), {})),
    "query * 1": lambda n: chain(n, attention(), "s", "q", ("Mul", (None, "one"), {})),
    "query, turned": lambda n: chain(n, attention(), "s", "q", SWAP),
    "keys": lambda n: chain(n, attention(), "s", "kt", ("Identity", (None,), {})),
    "values, turned": lambda n: chain(n, attention(), "y", "v", SWAP),
    "scores * 1": lambda n: chain(n, attention(), "s3", "s2", ("Mul", (None, "one"), {})),
    "scores + mask": lambda n: chain(n, attention(), "s3", "s2", ("Add", (None, "m"), {})),
    "scores, cast": lambda n: chain(
        n, attention(), "s3", "s2", cast(TensorProto.DOUBLE), cast(TensorProto.FLOAT)
    ),
    "weights": lambda n: chain(n, attention(), "y", "p", ("Identity", (None,), {})),
    "scale": lambda n: chain(n, attention(), "s2", "c", ("Sqrt", (None,), {}), ("Add", (None, "one"), {})),
    "shape + 0": lambda n: chain(n, reshaped(), "r", "shape", ("Add", (None, "i0"), {})),
    "shape, joined": lambda n: chain(n, reshaped(), "r", "shape", ("Concat", (None,), {"axis": 0})),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_long_chains(name: str) -> None:
    """Fused or left for a reason that isn't a failure of ours; the same as for a short chain."""
    outcomes = []
    for length in (4, LENGTH):
        _, report = faexport.fuse(CHAINS[name](length))
        assert not report.defects
        assert not any(site.refusal is not None and site.refusal.defect for site in report.sites), report.sites
        outcomes.append([site.refusal and site.refusal.reason for site in report.sites])
    if not name.startswith(("scores", "weights")):  # the search for the products ends after so many steps
        assert outcomes == [[None], [None]]


def masked(*nodes: NodeProto, **weights: np.ndarray) -> onnx.ModelProto:
    """The attention whose mask is the value "made"."""
    model = attention()
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items())
    insert(model, "s3", list(nodes))
    node(model, "s3").input[1] = "made"
    return model


def i64(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


ONES = helper.make_tensor("value", TensorProto.INT64, [1], [1])
EXPLOSIONS: dict[str, Callable[[], onnx.ModelProto]] = {
    "Range": lambda: masked(
        make("Range", "a b d", "r"), make("Cast", "r", to=1), a=np.int64(0), b=np.int64(BIG), d=np.int64(1)
    ),
    "Range of floats": lambda: masked(
        make("Range", "a b d"), a=np.float32(0), b=np.float32(1e30), d=np.float32(1e-9)
    ),
    "ConstantOfShape": lambda: masked(make("ConstantOfShape", "a"), a=i64(BIG, BIG)),
    "Expand": lambda: masked(make("Expand", "a b"), a=np.float32(1), b=i64(BIG, 4)),
    "Tile": lambda: masked(make("Tile", "a b"), a=np.ones(4, np.float32), b=i64(BIG)),
    "Pad": lambda: masked(make("Pad", "a b"), a=np.ones(4, np.float32), b=i64(0, BIG)),
    "OneHot": lambda: masked(make("OneHot", "a b d"), a=i64(1), b=np.int64(BIG), d=np.array([0, 1], np.float32)),
    "sum of a row and a column": lambda: masked(
        make("Add", "a b"), a=np.ones((1 << 13, 1), np.float32), b=np.ones((1, 1 << 13), np.float32)
    ),
    "product of a row and a column": lambda: masked(
        make("MatMul", "a b"), a=np.ones((1 << 13, 1), np.float32), b=np.ones((1, 1 << 13), np.float32)
    ),
    "rank of a Reshape": lambda: masked(
        make("ConstantOfShape", "a", "r", value=ONES), make("Reshape", "m r"), a=i64(1 << 28)
    ),
    "rank of an expanded shape": lambda: masked(
        make("Expand", "a b", "r"), make("Reshape", "m r"), a=np.int64(1), b=i64(1 << 28)
    ),
    "sizes of a Reshape": lambda: masked(make("Reshape", "m a"), a=i64(BIG, BIG, BIG, 1)),
    "axes of an Unsqueeze": lambda: masked(make("Unsqueeze", "m a"), a=np.arange(100_000)),
    "square of a square": lambda: masked(
        make("Mul", "a a", "r"), make("Mul", "r r", "r2"), make("ConstantOfShape", "r2"), a=i64(1 << 62)
    ),
    "EyeLike": lambda: masked(make("ConstantOfShape", "a", "r"), make("EyeLike", "r"), a=i64(1 << 30, 1 << 30)),
    "CumSum": lambda: masked(make("ConstantOfShape", "a", "r"), make("CumSum", "r i0"), a=i64(1 << 35)),
    "Slice": lambda: masked(
        make("Slice", "m a b d a"), a=i64(-BIG), b=i64(1 << 62), d=i64(3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPLOSIONS)
def test_enormous_sizes(name: str) -> None:
    """Whatever becomes of the site, or of the model: soon, and in little memory."""
    model = EXPLOSIONS[name]()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    _, report = faexport.fuse(model)
    assert len(report.sites) == 1 and not report.defects
    assert time.process_time() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10 < MEGABYTES
