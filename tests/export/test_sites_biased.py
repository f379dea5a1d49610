# SPDX-License-Identifier: Apache-2.0
"""What stands in the attention_bias of onnxruntime's MultiHeadAttention is proven as a mask of any graph is: causal,
windows and padding, with a past and without; what would mean something else behind a past stays a bias."""

from __future__ import annotations

import faexport
import numpy as np
import onnx.parser
import pytest

from tests.export.compared import OPTIONS, run

HEADS, DIM = 2, 8
MODEL = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
main (float[b, s, 16] q, float[b, s, 16] k, float[b, s, 16] v, float[b, 2, p, 8] pk, float[b, 2, p, 8] pv,
      int64[b, t] attention_mask)
  => (float[b, s, 16] y, float[b, 2, t, 8] present_k, float[b, 2, t, 8] present_v) {
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    first = Constant <value = int64[1] {0}> ()
    axis1 = Constant <value = int64[1] {1}> ()
    axes_row = Constant <value = int64[3] {0, 1, 3}> ()
    axes_key = Constant <value = int64[3] {0, 1, 2}> ()
    axes_pad = Constant <value = int64[2] {1, 2}> ()
    low = Constant <value = float {-3.4028235e38}> ()
    nothing = Constant <value = float {0.0}> ()
    width = Constant <value = int64 {WINDOW}> ()
    q_shape = Shape (q)
    rows = Gather <axis = 0> (q_shape, one)
    p_shape = Shape (pk)
    two = Constant <value = int64 {2}> ()
    past = Gather <axis = 0> (p_shape, two)
    total = Add (past, rows)
    i0 = Range (zero, rows, one)
    i1 = Add (i0, START)
    i = Unsqueeze (i1, axes_row)
    j0 = Range (zero, total, one)
    j = Unsqueeze (j0, axes_key)
    causal = LessOrEqual (j, i)
    edge = Sub (i, width)
    near = Greater (j, edge)
    kept = Cast <to = 9> (attention_mask)
    padding = Unsqueeze (kept, axes_pad)
    windowed = And (causal, near)
    padded = And (causal, padding)
    both = And (windowed, padding)
    bias = Where (CONDITION, nothing, low)
    y, present_k, present_v = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v, , , bias, pk, pv)
}"""


def model_of(condition: str, start: str = "past") -> onnx.ModelProto:
    text = MODEL.replace("CONDITION", condition).replace("START", start).replace("WINDOW", "3")
    return onnx.parser.parse_model(text)


def compared(model: onnx.ModelProto, library: str) -> tuple[dict, list]:
    """The fused node's attributes and facts; it gives what the original gives."""
    fused, report = faexport.fuse(model, options=OPTIONS)
    assert report.num_fused == 1, [str(site.refusal) for site in report.sites]
    random = np.random.default_rng(0)
    for batch, rows, past in ((2, 5, 0), (2, 1, 7), (1, 4, 3), (3, 2, 1)):
        drawn = {name: random.standard_normal((batch, rows, HEADS * DIM), np.float32) for name in "qkv"}
        drawn |= {name: random.standard_normal((batch, HEADS, past, DIM), np.float32) for name in ("pk", "pv")}
        drawn["attention_mask"] = (random.random((batch, past + rows)) < 0.6).astype(np.int64)
        for want, got in zip(run(model, drawn), run(fused, drawn, library), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5, err_msg=f"{batch} {rows} {past}")
    (node,) = (node for node in fused.graph.node if node.domain == "faexport")
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}, report.sites[0].facts


@pytest.mark.parametrize("condition", ("causal", "windowed", "padded", "both"))
def test_causal_biases_are_proven(condition: str, library: str) -> None:
    attributes, facts = compared(model_of(condition), library)
    names = attributes["optional_inputs"].decode().split(",")
    assert attributes["is_causal"] == 1 and "attn_bias" not in names
    assert ("attn_mask" in names) == (condition in ("padded", "both"))
    assert attributes.get("left_window_size", -1) == (2 if condition in ("windowed", "both") else -1)
    assert any("causal" in fact.text for fact in facts)


def test_a_bias_that_ignores_the_past_is_right_all_the_same(library: str) -> None:
    """Row i sees keys 0 … i: no diagonal of the operator's where a past is in front."""
    compared(model_of("causal", start="zero"), library)


def test_the_bias_is_not_computed_any_more() -> None:
    fused, _ = faexport.fuse(model_of("causal"), options=OPTIONS)
    assert not any("bias" in node.output for node in fused.graph.node)


# ------------------------------------------------------------------------------------------ caches of fixed capacity


def shared_model(*, bias: bool = False, **changes) -> onnx.ModelProto:
    """MultiHeadAttention with past_sequence_length; `changes`: other names in its places, "" for none."""
    slots = ["q", "k", "v", "", "", "bias" if bias else "", "pk", "pv", "length"]
    slots += [""] * (10 - len(slots))
    for place, name in changes.items():
        slots[int(place[1:])] = name
    float32, int32 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
    shapes = dict.fromkeys("qkv", (float32, ["b", "s", 16]))
    shapes |= dict.fromkeys(("pk", "pv"), (float32, ["b", 2, "capacity", 8]))
    shapes |= {"length": (int32, [1]), "bias": (float32, [1, 2, "s", "total"]), "beams": (int32, ["b", 1, "capacity"])}
    shapes |= {"padding": (int32, ["b", "total"])}
    while not slots[-1]:
        slots.pop()
    node = onnx.helper.make_node(
        "MultiHeadAttention", slots, ["y", "present_k", "present_v"], "node", domain="com.microsoft", num_heads=2
    )
    inputs = [onnx.helper.make_tensor_value_info(name, *shapes[name]) for name in slots if name]
    outputs = [onnx.helper.make_tensor_value_info(name, float32, None) for name in node.output]
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = onnx.helper.make_graph([node], "shared", inputs, outputs)
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)


@pytest.mark.parametrize("bias", (False, True))
def test_new_rows_go_behind_the_length_that_is_given(bias: bool, library: str) -> None:
    model = shared_model(bias=bias)
    fused, report = faexport.fuse(model, options=OPTIONS)
    assert report.num_fused == 1, [str(site.refusal) for site in report.sites]
    assert any("in place" in fact.text for fact in report.sites[0].facts)
    random = np.random.default_rng(1)
    for batch, length, capacity in ((2, 5, 9), (1, 0, 4), (3, 7, 8)):
        drawn = {name: random.standard_normal((batch, 1, 16), np.float32) for name in "qkv"}
        drawn |= {name: random.standard_normal((batch, 2, capacity, 8), np.float32) for name in ("pk", "pv")}
        drawn["length"] = np.array([length], np.int32)
        if bias:
            drawn["bias"] = random.standard_normal((1, 2, 1, length + 1), np.float32)
        want, got = run(model, drawn), run(fused, drawn, library)
        np.testing.assert_allclose(got[0], want[0], atol=1e-5)
        for own, other in zip(got[1:], want[1:], strict=True):
            np.testing.assert_array_equal(own[:, :, : length + 1], other[:, :, : length + 1])
            assert own.shape == other.shape


def test_what_stands_in_the_way_of_a_cache_of_fixed_capacity() -> None:
    for changes, words in (
        ({"_9": "beams"}, ["cache_indirection"]),
        ({"_4": "padding"}, ["key_padding_mask"]),
        ({"_6": "", "_7": "", "_4": "padding"}, ["past_sequence_length", "key_padding_mask"]),
    ):
        reason = str(faexport.fuse(shared_model(**changes), options=OPTIONS)[1].sites[0].refusal)
        assert all(word in reason for word in words), reason
