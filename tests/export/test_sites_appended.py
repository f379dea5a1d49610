# SPDX-License-Identifier: Apache-2.0
"""What stands in front of attention on a cache that a Concat appends to: rotary embeddings and norms in the spellings
of exporters become the operator's, for all positions, where they are the same; else they stay in front of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import faexport
import numpy as np
import onnx
import onnxruntime
import pytest
from faexport.options import Options
from onnx import helper

from tests.export import form_text
from tests.export.appended import Form, feeds, model_of
from tests.export.compared import OPTIONS, node_of, run, session
from tests.export.form_text import check

FORMS = {
    "plain": Form(rotary="none"),
    "slices": Form(),
    "slices, causal": Form(causal=True),
    "slices, one kv head": Form(kv_heads=1),
    "slices, as many kv heads": Form(kv_heads=4),
    "Split, -1 times": Form(rotary="split", layout="BSHD"),
    "halves by themselves": Form(rotary="halves", table="half"),
    "halves by themselves, wide table": Form(rotary="slices", table="gather", layout="BSHD"),
    "pairs": Form(rotary="pairs", table="pairs"),
    "pairs, heads behind rows": Form(rotary="pairs", table="pairs", layout="BSHD"),
    "a part of the columns": Form(turned=4),
    "a part of the columns, pairs": Form(turned=4, rotary="pairs", table="pairs", layout="BSHD"),
    "two columns": Form(turned=2, rotary="halves", table="half"),
    "stored table": Form(table="gather"),
    "operator": Form(rotary="operator"),
    "operator, a part": Form(rotary="operator", turned=4),
    "onnxruntime's operator": Form(rotary="onnxruntime's operator"),
    "norm": Form(rotary="none", norm="rsqrt"),
    "norm and rotary": Form(norm="rsqrt"),
    "norm by division, heads behind rows": Form(norm="div", layout="BSHD"),
    "norm by an operator": Form(norm="operator", layout="BSHD", rotary="split"),
}
HALF = {
    "float16": Form(half=True),
    "float16, norm in float32": Form(half=True, norm="rsqrt"),
    "float16, stored table": Form(half=True, table="gather", rotary="split", layout="BSHD"),
}
SIZES = ((2, 3, 4), (1, 1, 5), (3, 2, 0), (1, 1, 0), (2, 1, 1), (1, 1, 1))


def names_of(model: onnx.ModelProto) -> list[str]:
    """The optional inputs of the one fused node."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node_of(model).attribute}
    return attributes.get("optional_inputs", b"").decode().split(",")


def expected_names(form: Form) -> set[str]:
    names = set() if form.cache == "none" else {"past_key", "past_value"}
    if form.rotary != "none":
        names |= {"cos_cache", "sin_cache"} | ({"position_ids"} if "operator" in form.rotary else set())
    return names | ({"q_norm_weight", "k_norm_weight"} if form.norm != "none" else set())


def compare(form: Form, fused: onnx.ModelProto, libraries: Sequence[str | None], tolerance: float) -> None:
    """The fused model, with a library or by its stand-in (None), against the original."""
    model = model_of(form)
    original, *others = session(model), *(session(fused, library) for library in libraries)
    for seed, (batch, rows, past) in enumerate(SIZES):
        for positions in ("behind", "repeated", "apart"):
            tensors = feeds(form, batch, rows, past, seed, positions)
            tensors = {n.name: tensors[n.name] for n in model.graph.input}
            expected = original.run(None, tensors)
            for other in others:
                for want, got in zip(expected, other.run(None, tensors), strict=True):
                    assert got.shape == want.shape
                    np.testing.assert_allclose(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("form", [*FORMS.values(), *HALF.values()], ids=[*FORMS, *HALF])
def test_forms(form: Form, library: str) -> None:
    """The node has it all, reads the projections in place, and makes the same present."""
    fused, report = faexport.fuse(model_of(form), options=Options(fallback=True))
    assert report.num_fused == 1, [str(site.refusal) for site in report.sites]
    assert expected_names(form) <= set(names_of(fused))
    made_by = {name: node.op_type for node in fused.graph.node for name in node.output}
    assert {made_by[name] for name in node_of(fused).input[:3]} == {"MatMul"} or form.norm != "none"
    tolerance = 4e-3 if form.half else 2e-5
    compare(form, fused, (library, None), tolerance)


NEWER = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) >= (1, 25)
FIXED = {
    "ScatterND": Form(cache="ScatterND", rotary="none"),
    "ScatterND, causal": Form(cache="ScatterND", causal=True, norm="rsqrt"),
    "ScatterND, float16": Form(cache="ScatterND", half=True),
}
FIXED |= (
    {
        "TensorScatter": Form(cache="TensorScatter"),
        "TensorScatter, pairs": Form(cache="TensorScatter", rotary="pairs", table="pairs", layout="BSHD"),
        "TensorScatter and lengths": Form(cache="lengths"),
    }
    if NEWER
    else {}
)


@pytest.mark.parametrize("form", FIXED.values(), ids=FIXED.keys())
def test_fixed_caches(form: Form, library: str) -> None:
    """Rows are written by the node, and whatever is behind them is seen as before."""
    fused, report = faexport.fuse(model_of(form), options=Options(fallback=True))
    assert {*expected_names(form), "write_indices", "nonpad_kv_seqlen"} <= set(names_of(fused))
    assert "in place" in " ".join(fact.text for fact in report.sites[0].facts)
    assert not {"ScatterND", "TensorScatter"} & {node.op_type for node in fused.graph.node}
    tolerance = 4e-3 if form.half else 2e-5
    compare(form, fused, (library, None), tolerance)


def test_a_fixed_cache_is_written_in_place(library: str) -> None:
    """Where past and present are one buffer, nothing else of it changes."""
    form = Form(cache="ScatterND", causal=True)
    fused, _ = faexport.fuse(model_of(form), options=OPTIONS)
    names = {"present_key": "past_key", "present_value": "past_value"}
    assert set(names) <= set(node_of(fused).output), "the present itself is the output"
    tensors = feeds(form, 2, 3, 4)
    tensors = {n.name: tensors[n.name] for n in fused.graph.input}
    expected = dict(zip(("y", *names), run(model_of(form), tensors), strict=True))
    fused_one = session(fused, library)
    binding = fused_one.io_binding()
    values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(t) for n, t in tensors.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("y")
    for present, past in names.items():
        binding.bind_ortvalue_output(present, values[past])
    fused_one.run_with_iobinding(binding)
    for present, past in names.items():
        np.testing.assert_allclose(values[past].numpy(), expected[present], atol=1e-5)
    np.testing.assert_allclose(binding.get_outputs()[0].numpy(), expected["y"], atol=1e-5)


ALONE = {name: dataclasses.replace(form, cache="none") for name, form in {**FORMS, **HALF}.items() if name != "plain"}


@pytest.mark.parametrize("form", ALONE.values(), ids=ALONE.keys())
def test_without_a_cache(form: Form, library: str) -> None:
    """Attention among the rows of a prompt: as with a cache."""
    fused, report = faexport.fuse(model_of(form), options=Options(fallback=True))
    assert report.num_fused == 1, [str(site.refusal) for site in report.sites]
    assert expected_names(form) <= set(names_of(fused))
    read = {name for node in fused.graph.node for name in node.input}
    assert {tensor.name for tensor in fused.graph.initializer} <= read, (
        "onnxruntime warns of weights that nothing reads"
    )
    assert not {"Sin", "Cos", "Neg", "Split"} & {n.op_type for n in fused.graph.node} or form.rotary != "operator"
    compare(form, fused, (library, None), 4e-3 if form.half else 2e-5)


STAYS = {
    "every other row": (Form(flaw="every other row", cache="ScatterND"), set()),
    "other angles": (Form(flaw="other angles"), {"past_key"}),
    "the second half of another table": (Form(flaw="other half"), {"past_key"}),
    "turned backwards": (Form(flaw="wrong sign"), {"past_key"}),
    "rotated keys are read elsewhere": (Form(flaw="key read elsewhere"), {"past_key"}),
    "one position for all rows": (Form(flaw="one position"), {"past_key"}),
    "norm in float16": (Form(flaw="norm in half", half=True, norm="rsqrt"), {"past_key", "cos_cache"}),
    "norm over rows": (Form(flaw="norm over rows", norm="rsqrt"), {"past_key", "cos_cache"}),
    "new rows first": (Form(flaw="new rows first"), set()),
    **({"lengths of one row": (Form(cache="lengths", flaw="one row"), set())} if NEWER else {}),
    "a scale that the length decides": (Form(flaw="scale of the length"), set()),
    "causal from the first key": (Form(flaw="aligned at the top", causal=True), set()),
}


@pytest.mark.parametrize(("form", "has"), STAYS.values(), ids=STAYS.keys())
def test_what_the_operator_does_not_do_stays_in_front(form: Form, has: set[str], library: str) -> None:
    fused, report = faexport.fuse(model_of(form), options=OPTIONS)
    assert report.num_fused == 1
    every = {"past_key", "past_value", "cos_cache", "sin_cache", "q_norm_weight", "k_norm_weight"}
    found = {name.replace("value", "key").replace("sin", "cos") for name in every & set(names_of(fused))}
    assert found == has
    compare(form, fused, (library,), 4e-3 if form.half else 2e-5)


def test_nodes_that_tables_and_a_mask_share_stand_in_front_of_both(library: str) -> None:
    """A constant that both get an axis by: onnxruntime sorts the nodes of a model itself, but not those of a branch."""
    turned = """{0}1, {0}2 = Split<axis = -1>({0}, halves) {0}3 = Mul({0}1, cos) {0}4 = Mul({0}2, sin)
    {0}5 = Mul({0}2, cos) {0}6 = Mul({0}1, sin) {0}7 = Sub({0}3, {0}4) {0}8 = Add({0}5, {0}6)
    {0}9 = Concat<axis = -1>({0}7, {0}8)"""
    body = f"""halves = Constant<value = int64[2] {{4, 4}}>() low = Constant<value = float {{-10000.0}}>()
    {turned.format("q")} {turned.format("k")} kt = Transpose<perm = [0, 1, 3, 2]>(k9) s = MatMul(q9, kt)
    x = Where(mask, s, low) p = Softmax<axis = -1>(x) y = MatMul(p, v)"""
    inputs = "float[B, 3, S, 8] q, float[B, 3, S, 8] k, float[B, 3, S, 8] v, float[S, 4] cos, float[S, 4] sin"
    inputs, facts = f"{inputs}, bool[1, 1, S, S] mask", frozenset({"rotary embedding"})
    form = form_text.Form(inputs, body, facts=facts, output=("B", 3, "S", 8))
    check(form, library)
    onnx.checker.check_model(faexport.fuse(form.model())[0])


@pytest.mark.parametrize(("opset", "taken"), [(9, set()), (10, {"rotary embedding"})])
def test_every_other_column_of_a_table(opset: int, taken: set[str], library: str) -> None:
    """Slice takes no steps before opset 10: the rotation stays in front then."""
    names = [f"c{i}" for i in range(8)]
    turned = f"""{", ".join("{0}" + n for n in names)} = Split<axis = -1>({{0}})
    {" ".join(f"{{0}}n{i} = Neg({{0}}c{i})" for i in (1, 3, 5, 7))}
    {{0}}r = Concat<axis = -1>({", ".join(f"{{0}}n{i + 1}, {{0}}c{i}" for i in (0, 2, 4, 6))})
    {{0}}x = Mul({{0}}, cosines) {{0}}y = Mul({{0}}r, sines) {{0}}z = Add({{0}}x, {{0}}y)"""
    tables = ""
    for given, made in (("cos", "cosines"), ("sin", "sines")):
        parts = ", ".join(f"{given}{i}" for i in range(4))
        twice = ", ".join(f"{given}{i}, {given}{i}" for i in range(4))
        tables += f"{parts} = Split<axis = -1>({given}) {made} = Concat<axis = -1>({twice}) "
    body = f"""{tables} {turned.format("q")} {turned.format("k")} kt = Transpose<perm = [0, 1, 3, 2]>(kz)
    s = MatMul(qz, kt) p = Softmax<axis = 3>(s) y = MatMul(p, v)"""
    inputs = "float[B, 3, S, 8] q, float[B, 3, S, 8] k, float[B, 3, S, 8] v, float[S, 4] cos, float[S, 4] sin"
    report = check(form_text.Form(inputs, body, opset=opset), library)
    assert taken == {"rotary embedding"} & {fact.text for fact in report.sites[0].facts}


def test_what_two_sites_share_stands_in_front_of_both(library: str) -> None:
    """Though that which begins first ends last."""
    begin = "kt{0} = Transpose<perm = [0, 1, 3, 2]>(k{0}) s{0} = MatMul(q{0}, kt{0}) x{0} = Where(mask, s{0}, low)"
    begin += " p{0} = Softmax<axis = -1>(x{0}) "
    body = f"""low = Constant<value = float {{-10000.0}}>() {begin.format(1)} {begin.format(2)}
    y2 = MatMul(p2, v2) y1 = MatMul(p1, v1) y = Add(y1, y2)"""
    inputs = ", ".join(f"float[B, 3, S, 8] {x}{n}" for x in "qkv" for n in (1, 2))
    form = form_text.Form(f"{inputs}, bool[1, 1, S, S] mask", body, fused=2, output=("B", 3, "S", 8))
    check(form, library)
    onnx.checker.check_model(faexport.fuse(form.model())[0])


def test_norms_that_stay_become_onnxruntimes(library: str) -> None:
    """Of heads, on four axes, behind which rotations stay: an operator of onnxruntime each."""
    form = Form(cache="none", norm="rsqrt", flaw="other angles")
    fused, report = faexport.fuse(model_of(form), options=OPTIONS)
    assert report.joined == {"SimplifiedLayerNormalization": 2}
    assert not {"Pow", "Sqrt", "ReduceMean"} & {node.op_type for node in fused.graph.node}
    compare(form, fused, (library,), 2e-5)


ASKED = {
    "one size": "n = Shape<start = 2, end = 3>(kk)",
    "a size from the end": "n = Shape<start = -2, end = -1>(kk)",
    "the values' size": "n = Shape<start = 2, end = 3>(vv)",
    "all sizes": "whole = Shape(kk) n = Gather(whole, two)",
    "all sizes of both": """whole = Shape(kk) n0 = Gather(whole, two) own = Shape(vv) n1 = Gather(own, two)
    n = Min(n0, n1)""",
}


@pytest.mark.parametrize("name", ASKED)
def test_the_number_of_keys_may_be_asked_for(name: str, library: str) -> None:
    """As T5 does for its bias: it is computed from the past and the new rows, which the node joins."""
    bias = """zero = Constant<value = int64 {0}>() one = Constant<value = int64 {1}>() count = Squeeze(n)
    at = Range(zero, count, one) places = Cast<to = 1>(at) bias = Cos(places)"""
    body = f"""two = Constant<value = int64[1] {{2}}>() kk = Concat<axis = 2>(pk, k) vv = Concat<axis = 2>(pv, v)
    {ASKED[name]} {bias} kt = Transpose<perm = [0, 1, 3, 2]>(kk) s = MatMul(q, kt)
    x = Add(s, bias) p = Softmax<axis = -1>(x)
    y = MatMul(p, vv)"""
    inputs = "float[B, 3, S, 8] q, float[B, 3, S, 8] k, float[B, 3, S, 8] v, float[B, 3, P, 8] pk, float[B, 3, P, 8] pv"
    facts = frozenset({"new rows are appended to the cache"})
    check(form_text.Form(inputs, body, facts=facts, gone=frozenset({"Softmax", "Concat"})), library)


def test_tensorrt_gets_rows_as_they_are() -> None:
    fused, _ = faexport.fuse(model_of(Form()), options=Options(target="tensorrt"))
    assert "past_key" not in names_of(fused)
