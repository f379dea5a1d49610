# SPDX-License-Identifier: Apache-2.0
"""Biases of projections leave the way from the products to the operator, where that computes the same."""

from __future__ import annotations

import pathlib

import faexport
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from faexport import pipeline
from faexport.files import model_io
from faexport.runtimes import ort_session
from faexport.verify import model_check
from onnx import helper

from tests.export.compared import run
from tests.export.test_projections import DV, HEADS, KV_HEADS, E, Model, attention, counts, fused, numpy_helper

QUERIES, KEYS, VALUES = "the queries' bias", "the keys' bias", "the values' bias"
WHICH = {QUERIES: "query", KEYS: "key", VALUES: "value"}
CASES = {  # keyword arguments of `projected`
    "self attention": {},
    "cross attention": {"memory": True},
    "fewer key heads, wider values": {"kv_heads": KV_HEADS, "value_dim": DV},
    "keys without a bias": {"biased": ("query", "value")},
    "values without a bias": {"biased": ("query", "key")},
    "transposed weights": {"transposed": True},
    "float16": {"dtype": np.float16},
    "a bias in front": {"turned": True},
    "causal": {"mask": "causal"},
    "padding, added": {"mask": "min"},
    "padding that may leave nothing": {"mask": "guarded"},
}
MAY_GIVE_ZERO = ("cross attention", "padding that may leave nothing")  # memory may have no rows
STAYS = {  # keyword arguments of `projected` -> words of the reason
    "softcap": ({"mask": "softcap"}, "softcap"),
    "a factor of the rows": ({"mask": "factor"}, "queries come to the operator with an axis for heads"),
    "a mean of no values": ({"mask": "min", "memory": True}, "there may be no keys"),
    "used twice": ({"after": "used twice"}, "the output goes elsewhere"),
    "an output of the model": ({"after": "output"}, "the output goes elsewhere"),
    "not projected": ({"after": ""}, "the output goes elsewhere"),
    "no bias": ({"after": "no bias"}, "the output goes elsewhere"),
    "a given weight": ({"after": "given weight"}, "the weight behind the output"),
    "a given bias": ({"after": "given bias"}, "the bias behind the output"),
}


def projected(*, mask: str = "", after: str = "bias", turned: bool = False, **arguments: object) -> onnx.ModelProto:
    """Attention with its output projection, and a mask between the scores and the softmax."""
    model = attention(**arguments)
    dtype = helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)
    m = Model(dtype.type)
    m.nodes, m.weights = list(model.graph.node), list(model.graph.initializer)
    m.inputs, m.outputs = list(model.graph.input), list(model.graph.output)
    m.random = np.random.default_rng(7)
    if mask:
        _mask(m, mask)
    if turned:
        for node in m.nodes:
            if node.op_type == "Add" and node.input[1].endswith("_bias"):
                node.input[:] = node.input[::-1]
    if after:
        _project(m, after, HEADS * int(arguments.get("value_dim", 8)))
    return m.proto()


def _mask(m: Model, kind: str) -> None:
    """Puts a mask or softcap in front of the softmax."""
    keys = "memory" if len(m.inputs) > 1 else "x"
    place = next(i for i, node in enumerate(m.nodes) if node.op_type == "Softmax")
    softmax, count = m.nodes[place], len(m.nodes)
    scores = softmax.input[0]
    if kind == "softcap":
        cap = m.const(np.array(2, m.dtype))
        softmax.input[0] = m.op("Mul", cap, m.op("Tanh", m.op("Div", scores, cap)))
    elif kind == "factor":
        column = m.op("Slice", "x", *(m.const(np.array([k])) for k in (0, 1, 2)))
        softmax.input[0] = m.op("Mul", scores, m.op("Unsqueeze", column, m.const(np.array([1]))))
    elif kind == "causal":
        size = m.op("Squeeze", m.op("Shape", "x", start=1, end=2))
        rows = m.op("Range", m.const(np.int64(0)), size, m.const(np.int64(1)))
        later = m.op("Greater", *(m.op("Unsqueeze", rows, m.const(np.array([axis]))) for axis in (0, 1)))
        softmax.input[0] = m.op("Where", later, m.const(np.array(-np.inf, m.dtype)), scores)
    else:  # keys whose first column is above 0
        column = m.op("Slice", keys, *(m.const(np.array([k])) for k in (0, 1, 2)))
        limit = m.const(np.array(99 if kind.startswith("all by") else 0, m.dtype))
        kept = m.op("Transpose", m.op("Greater", column, limit), perm=[0, 2, 1])
        kept = m.op("Unsqueeze", kept, m.const(np.array([1])))
        least = {"min": np.finfo(m.dtype).min, "all by -1e9": -1e9, "all by -1e4": -1e4}.get(kind, -np.inf)
        added = m.op("Where", kept, *(m.const(np.array(x, m.dtype)) for x in (0, least)))
        softmax.input[0] = m.op("Add", scores, added)
    m.nodes = [*m.nodes[:place], *m.nodes[count:], *m.nodes[place:count]]
    if kind == "guarded":
        (weights,) = softmax.output
        softmax.output[0] = "unguarded"
        m.op("Where", m.op("IsNaN", "unguarded"), m.const(np.array(0, m.dtype)), "unguarded", out=weights)
        behind = m.nodes.index(softmax) + 1
        m.nodes = [*m.nodes[:behind], *m.nodes[-2:], *m.nodes[behind:-2]]


def _project(m: Model, how: str, width: int) -> None:
    m.nodes[-1].output[0] = "context"
    if how == "used twice":
        m.outputs.append(m.tensor("other", None))
        m.op("Tanh", "context", out="other")
    if how == "output":
        m.outputs.append(m.tensor("context", None))
    weight = m.random_const(width, 5, name="output_weight")
    if how == "given weight":
        m.inputs.append(m.tensor(weight, [width, 5]))
    if how == "no bias":
        m.op("MatMul", "context", weight, out="y")
        return
    bias = m.random_const(5, name="output_bias")
    if how == "given bias":
        m.inputs.append(m.tensor(bias, [5]))
    m.op("Add", m.op("MatMul", "context", weight), bias, out="y")


@pytest.mark.parametrize("assumed", [False, True])
@pytest.mark.parametrize("fill", ["-1e9", "-1e4"])
def test_the_keys_bias_stays_where_rounding_sees_it(fill: str, assumed: bool, library: str) -> None:
    """-1e9 leaves of a score how often it has 64 in it, -1e4 how often it has 0.001. Where it is added to all scores of
    a row, a number that is the same for all of them decides which are alike."""
    model = projected(mask=f"all by {fill}")
    for weight in model.graph.initializer:
        if weight.name in ("query_weight", "key_bias"):
            array = numpy_helper.to_array(weight) * np.float32(20)
            weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    if assumed:
        _, found = faexport.fuse(model, options=pipeline.Options(assume_full_rows=True))
    else:
        _, found = fused(model, library)
    assert ("the keys' bias stays" in facts(found)) is not assumed
    assert QUERIES in facts(found) and VALUES in facts(found)


def facts(found: faexport.Report) -> str:
    return "; ".join(fact.text for fact in found.sites[0].facts)


@pytest.mark.parametrize("case", CASES)
def test_no_addition_is_left_in_front(case: str, library: str) -> None:
    arguments = CASES[case]
    model, found = fused(projected(**arguments), library)
    assert counts(model)["FlashAttention"] == 1 and counts(model)["Add"] == 1
    biased = arguments.get("biased", ("query", "key", "value"))
    for words, role in WHICH.items():
        assert (words in facts(found)) == (role in biased)
    (node,) = (node for node in model.graph.node if node.op_type == "FlashAttention")
    names = next(a.s.decode() for a in node.attribute if a.name == "optional_inputs").split(",")
    assert "query_bias" in names and ("empty_row_value" in names) == (case in MAY_GIVE_ZERO)


@pytest.mark.parametrize("case", STAYS)
def test_biases_stay_with_a_reason(case: str, library: str) -> None:
    arguments, words = STAYS[case]
    model, found = fused(projected(**arguments), library)
    assert counts(model)["FlashAttention"] == 1 and counts(model)["Add"] >= 1
    assert QUERIES not in facts(found)
    assert any("biases of projections stay as they are" in note and words in note for note in found.notes), found.notes


def test_other_targets_keep_them() -> None:
    for options in ({"target": "tensorrt"}, {"rest": False}):
        model, found = faexport.fuse(projected(), options=pipeline.Options(**options))
        assert counts(model)["Add"] == 2 and QUERIES not in facts(found)


def test_one_product_for_all_three(library: str) -> None:
    """As where queries, keys and values are columns of one projection in the source already."""
    source = projected()
    weights = {w.name: numpy_helper.to_array(w) for w in source.graph.initializer}
    parts = ("query", "key", "value")
    for kind, axis in (("weight", 1), ("bias", 0)):
        joined = np.concatenate([weights[f"{part}_{kind}"] for part in parts], axis=axis)
        source.graph.initializer.append(numpy_helper.from_array(joined, f"all_{kind}"))
    sums = {node.input[1].split("_")[0]: node for node in source.graph.node if node.op_type == "Add"}
    split = helper.make_node("Split", ["all"], [sums[part].output[0] for part in parts], axis=2, num_outputs=3)
    product = helper.make_node("MatMul", ["x", "all_weight"], ["all_product"])
    total = helper.make_node("Add", ["all_product", "all_bias"], ["all"])
    gone = [sums[part] for part in parts]
    gone += [node for node in source.graph.node if node.op_type == "MatMul" and node.input[0] == "x"]
    rest = [node for node in source.graph.node if node not in gone]
    del source.graph.node[:]
    source.graph.node.extend([product, total, split, *rest])
    model, found = fused(source, library)
    assert counts(model)["Add"] == 1 and counts(model)["MatMul"] == 2
    assert all(words in facts(found) for words in WHICH)


def test_the_result_is_verified_site_by_site(tmp_path: pathlib.Path) -> None:
    source, target = tmp_path / "model.onnx", tmp_path / "fused.onnx"
    onnx.save(projected(mask="guarded"), source)
    model, _ = faexport.fuse(source)
    model_io.save(model, target, source=source)
    given = model_check.InputSet("nothing to see", {"x": -np.ones((2, 3, E), np.float32)})
    checked = model_check.verify(source, target, extra_inputs=[given], open_session=ort_session.SessionHere)
    assert checked.status == "passed", checked.reason
    assert {row.value for row in checked.sites} == {"y"} and all(row.ok for row in checked.sites)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_that_were_nan_are_compared_with_those_of_0(dtype: type, right: bool, tmp_path: pathlib.Path) -> None:
    """A row that sees no key is NaN in the original; in the fused model attention gives 0 there, and behind the
    projection into which the values' bias went comes what the original's projection makes of 0."""
    source, target = tmp_path / "model.onnx", tmp_path / "fused.onnx"
    onnx.save(projected(mask="hidden", dtype=dtype), source)
    model, _ = faexport.fuse(source)
    if not right:
        (site,) = (node for node in model.graph if node.op_type == "FlashAttention")
        constant = site.inputs[-1].producer()  # of empty_row_value
        number = constant.attributes["value"].value.numpy()
        constant.attributes["value"] = ir.AttrTensor("value", ir.tensor(number * dtype(1.1)))
    model_io.save(model, target, source=source)
    seen, hidden = np.ones((3, E), dtype), -np.ones((3, E), dtype)
    given = model_check.InputSet("one of two sees nothing", {"x": np.stack([seen, hidden])})
    checked = model_check.verify(source, target, extra_inputs=[given], open_session=ort_session.SessionHere)
    assert (checked.status == "passed") is right, checked.reason
    assert right or "(value 'y') differs by" in checked.reason


def test_memory_without_rows(library: str) -> None:
    source = projected(memory=True)
    model, _ = faexport.fuse(source)
    inputs = {"x": np.ones((2, 3, E), np.float32), "memory": np.ones((2, 0, E), np.float32)}
    for by in (library, None):
        np.testing.assert_allclose(run(model, inputs, by)[0], run(source, inputs)[0], atol=2e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_that_see_no_key_give_what_they_gave(dtype: type, library: str) -> None:
    source = projected(mask="guarded", dtype=dtype)
    model, _ = faexport.fuse(source)
    hidden = np.ones((3, 4, E), dtype)
    hidden[1] *= -1
    for by in (library, None):
        expected, got = run(source, {"x": hidden})[0], run(model, {"x": hidden}, by)[0]
        np.testing.assert_allclose(got, expected, atol=2e-3 if dtype == np.float16 else 2e-5)
