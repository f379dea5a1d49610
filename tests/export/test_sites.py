# SPDX-License-Identifier: Apache-2.0
"""Every spelling of attention is fused and right, and each near-miss of it is left alone with a reason."""

from __future__ import annotations

import faexport
import numpy as np
import onnx
import pytest
from faexport.pipeline import Options
from faexport.report.data import Report

from tests.export.compared import OPTIONS, node_of, run
from tests.export.site_graphs import FLAWS, Form, build, feeds

TOLERANCE = 2e-5

FORMS = {
    "plain": Form(),
    "static sizes": Form(dynamic=False),
    "scale on q": Form(scale="query"),
    "scale on k": Form(scale="key"),
    "scale on both": Form(scale="both"),
    "scale by Div": Form(scale="div"),
    "scale computed": Form(scale="runtime"),
    "no scale": Form(scale="none"),
    "a learnt scale for each head": Form(scale="learnt"),
    "channels first": Form(rank="channels_first"),
    "channels first, bias": Form(rank="channels_first", mask="add"),
    "3-D bmm": Form(rank="3d"),
    "3-D bmm, static": Form(rank="3d", dynamic=False),
    "3-D bmm, bias": Form(rank="3d", mask="add"),
    "3-D single head": Form(rank="single"),
    "einsum": Form(rank="einsum"),
    "einsum, masked": Form(rank="einsum", mask="where"),
    "einsum, grouped": Form(rank="einsum", kv_heads=2),
    "exp of LogSoftmax": Form(softmax="log"),
    "5-D grouped": Form(rank="5d", kv_heads=2),
    "packed, Split": Form(packed="split"),
    "packed, Slice": Form(packed="slice"),
    "packed, [B, S, 3, H, D]": Form(packed="gather"),
    "packed, GQA": Form(packed="split", kv_heads=2),
    "GQA by Expand": Form(kv_heads=2),
    "GQA by Gather": Form(kv_heads=2, repeat="gather"),
    "GQA by Concat": Form(kv_heads=2, repeat="concat"),
    "MQA": Form(kv_heads=1),
    "softmax axis 3": Form(softmax="positive_axis"),
    "softmax by hand": Form(softmax="handwritten"),
    "softmax of x - max": Form(softmax="minus_max"),
    "softmax in another type": Form(softmax="cast"),
    "IsNaN guard": Form(softmax="guard"),
    "K Q^T over axis -2": Form(softmax="transposed"),
    "softcap": Form(softcap=5.0),
    "softcap and bias": Form(softcap=5.0, mask="add"),
    "sinks": Form(sinks=True),
    "sinks and causal": Form(sinks=True, mask="causal"),
    "bias": Form(mask="add"),
    "bias subtracted": Form(mask="sub"),
    "padding by Where": Form(mask="where"),
    "causal": Form(mask="causal"),
    "0 added": Form(mask="zero"),
    "clamped from below": Form(mask="clamp"),
    "output stays [B, H, S, D]": Form(output="heads"),
    "output flattened": Form(output="flat"),
}


def fuse_and_compare(form: Form, library: str, tolerance: float = TOLERANCE) -> tuple[onnx.ModelProto, Report]:
    """The fused model; it gave what the original gives, for the sizes of the model and for others."""
    model = build(form)
    fused, report = faexport.fuse(model, options=OPTIONS)
    for batch, rows in ((2, 6), (1, 6), (3, 1), (1, 9)) if form.dynamic else ((2, 6),):
        inputs = feeds(model, seed=rows, batch=batch, rows=rows)
        for expected, got in zip(run(model, inputs), run(fused, inputs, library), strict=True):
            assert got.shape == expected.shape
            np.testing.assert_allclose(got, expected, atol=tolerance, rtol=tolerance)
    return fused, report


def attributes_of(model: onnx.ModelProto) -> dict:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node_of(model).attribute}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_each_spelling_is_fused_and_right(form: Form, library: str) -> None:
    model, report = fuse_and_compare(form, library)
    assert report.num_fused == 1, [str(site.refusal) for site in report.sites]
    left = {n.op_type for n in model.graph.node}
    assert not left & {"Softmax", "LogSoftmax", "Exp", "Tanh", "IsNaN", "Einsum", "Expand", "Tile"}


@pytest.mark.parametrize("form", [Form(), Form(packed="split"), Form(kv_heads=2), Form(scale="both"), Form(rank="3d")])
def test_what_stands_around_the_core_is_absorbed(form: Form, library: str) -> None:
    model, _ = fuse_and_compare(form, library)
    assert {n.op_type for n in model.graph.node} - {"Concat"} == {"MatMul", "FlashAttention"}
    weights = {w.name for w in model.graph.initializer}
    assert all(weights.issuperset(n.input) for n in model.graph.node if n.op_type == "Concat")


def test_packed_projections_are_read_in_place(library: str) -> None:
    model, report = fuse_and_compare(Form(packed="gather"), library)
    assert len(set(node_of(model).input)) == 1
    assert list(attributes_of(model)["packed_columns"]) == [0, 8, 32, 8, 64, 8]
    assert "packed QKV read in place" in [fact.text for fact in report.sites[0].facts]


def test_shared_key_heads_are_not_repeated(library: str) -> None:
    model, report = fuse_and_compare(Form(kv_heads=2), library)
    assert attributes_of(model)["kv_num_heads"] == 2
    assert "4 query heads on 2 kv heads" in [fact.text for fact in report.sites[0].facts]


def test_tiled_heads_are_no_gqa_but_still_fused(library: str) -> None:
    """Tile puts the heads as 0, 1, 0, 1, where GQA reads 0, 0, 1, 1."""
    model, report = fuse_and_compare(Form(kv_heads=2, repeat="tile"), library)
    assert report.num_fused == 1
    assert any(n.op_type == "Tile" for n in model.graph.node)


@pytest.mark.parametrize(("flaw", "reason"), FLAWS.items(), ids=FLAWS.keys())
def test_near_misses_are_left_alone(flaw: str, reason: str | None, library: str) -> None:
    form = Form(flaw=flaw, dynamic=False, softcap=5.0 if flaw == "bias_before_softcap" else 0.0)
    model, report = fuse_and_compare(form, library)
    assert report.num_fused == 0
    assert not any(n.op_type == "FlashAttention" for n in model.graph.node)
    if reason is not None:
        (site,) = report.sites
        assert reason in site.refusal.reason
        assert site.refusal.node


def test_a_second_run_changes_nothing() -> None:
    once, _ = faexport.fuse(build(Form(kv_heads=2, mask="causal")), options=OPTIONS)
    twice, report = faexport.fuse(once, options=OPTIONS)
    assert not report.sites
    assert once.SerializeToString() == twice.SerializeToString()


def test_runs_give_the_same_bytes() -> None:
    model = build(Form(packed="split", mask="where"))
    first, second = (faexport.fuse(model, options=OPTIONS)[0].SerializeToString() for _ in range(2))
    assert first == second


def test_the_interface_of_the_model_stays() -> None:
    model = build(Form(output="heads"))
    model.graph.output[0].type.CopyFrom(onnx.helper.make_tensor_type_proto(1, ["batch", 4, "sequence", 8]))
    model.metadata_props.add(key="made by", value="a test")
    fused, _ = faexport.fuse(model, options=OPTIONS)
    assert list(fused.graph.input) == list(model.graph.input)
    assert list(fused.graph.output) == list(model.graph.output)
    assert list(fused.metadata_props) == list(model.metadata_props)
    assert {e.domain: e.version for e in fused.opset_import} == {"": 18, "faexport": 1}


def test_the_output_of_the_core_may_be_an_output_of_the_model(library: str) -> None:
    model = build(Form(output="heads"))
    product = next(n for n in model.graph.node if n.name == "last")
    model.graph.node.remove(product)
    next(n for n in model.graph.node if n.output[0] == product.input[0]).output[0] = "y"
    fused, report = faexport.fuse(model, options=OPTIONS)
    assert report.num_fused == 1
    inputs = feeds(model)
    np.testing.assert_allclose(run(fused, inputs, library)[0], run(model, inputs)[0], atol=TOLERANCE)


def test_half_precision_core(library: str) -> None:
    import onnx_ir as ir

    model = build(Form(mask="add"))
    fused, report = faexport.fuse(model, options=Options(fallback=False, dtype=ir.DataType.FLOAT16))
    inputs = feeds(model)
    expected, (got,) = run(model, inputs)[0], run(fused, inputs, library)
    assert got.dtype == np.float32
    assert 0 < np.abs(got - expected).max() < 1e-2
    assert "core in float16" in [fact.text for fact in report.sites[0].facts]
    assert not any("float32" in note for note in report.notes)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "limit"), ((256, None, 0), (264, None, 256), (264, "FLOAT16", 0), (520, "FLOAT16", 512))
)
def test_heads_that_no_cuda_kernel_takes_are_told(head_dim: int, dtype: str | None, limit: int) -> None:
    import onnx_ir as ir

    options = Options(fallback=False, dtype=dtype and ir.DataType[dtype])
    _, report = faexport.fuse(build(Form(heads=1, kv_heads=1, head_dim=head_dim)), options=options)
    assert report.num_fused == 1
    told = [note for note in report.notes if "no CUDA kernel" in note]
    assert len(told) == (limit > 0)
    assert all(f"head_dim {head_dim} in" in note and f"at most {limit}" in note for note in told)


@pytest.mark.parametrize("float32", ("", "tf32", "tf32x3"))
@pytest.mark.parametrize("fallback", (False, True))
def test_how_gpus_multiply_float32_is_written_and_told(float32: str, fallback: bool, library: str) -> None:
    model = build(Form(mask="add"))
    fused, report = faexport.fuse(model, options=Options(fallback=fallback, float32=float32))
    (node,) = (node for node in fused.graph.node if node.op_type == "FlashAttention")
    written = {a.name: a.s.decode() for a in node.attribute if a.name == "float32_precision"}
    assert written == ({"float32_precision": float32} if float32 else {})
    assert sum("on a GPU float32 attention" in note for note in report.notes) == 1
    inputs = feeds(model)
    for libraries in [library, None] if fallback else [library]:  # the CPU always computes in float32
        got = run(fused, inputs, libraries)[0] if libraries else run(fused, inputs)[0]
        np.testing.assert_allclose(got, run(model, inputs)[0], atol=TOLERANCE)


def test_the_model_is_converted_to_the_asked_opset(library: str) -> None:
    model = build(Form())
    fused, report = faexport.fuse(model, options=Options(fallback=False, opset=20))
    assert report.num_fused == 1
    assert fused.opset_import[0].version == 20
    np.testing.assert_allclose(run(fused, feeds(model), library)[0], run(model, feeds(model))[0], atol=TOLERANCE)
