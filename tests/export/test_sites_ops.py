# SPDX-License-Identifier: Apache-2.0
"""Attention ops of others: ONNX's Attention and onnxruntime's MultiHeadAttention, Attention, GroupQueryAttention,
fused or refused."""

from __future__ import annotations

import faexport
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.export.compared import OPTIONS, run

B, S, L, H, D = 2, 5, 7, 4, 8
RANDOM = np.random.default_rng(3)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def model_of(
    op: str, domain: str, tensors: list, attributes: dict, num_outputs: int = 1, opset: int = 23
) -> onnx.ModelProto:
    """One node; `tensors` are its inputs, None where one is missing."""
    names = ["" if t is None else f"i{i}" for i, t in enumerate(tensors)]
    inputs = [
        helper.make_tensor_value_info(n, numpy_helper.from_array(t).data_type, t.shape)
        for n, t in zip(names, tensors, strict=True)
        if n
    ]
    outputs = [f"o{i}" for i in range(num_outputs)]
    node = helper.make_node(op, names, outputs, domain=domain, name="node", **attributes)
    graph = helper.make_graph(
        [node], "g", inputs, [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
    )
    imports = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def check(model: onnx.ModelProto, tensors: list, library: str, tolerance: float = 1e-4) -> list[str]:
    fused, report = faexport.fuse(model, options=OPTIONS)
    assert report.num_fused == 1, [str(site.refusal) for site in report.sites]
    assert any("on a GPU float32 attention" in note for note in report.notes), "whatever form the site had"
    feeds = {f"i{i}": t for i, t in enumerate(tensors) if t is not None}
    for expected, got in zip(run(model, feeds), run(fused, feeds, library), strict=True):
        np.testing.assert_allclose(got, expected, atol=tolerance)
    return [fact.text for fact in report.sites[0].facts]


def refusal(model: onnx.ModelProto) -> str:
    _, report = faexport.fuse(model, options=OPTIONS)
    assert report.num_fused == 0
    (site,) = report.sites
    assert site.refusal.node == "node"
    return site.refusal.reason


Q, K, V = floats(B, S, H * D), floats(B, L, H * D), floats(B, L, H * D)
SELF_K, SELF_V = floats(B, S, H * D), floats(B, S, H * D)
PADDING = np.array([[1, 1, 1, 0, 0, 1, 1], [1, 0, 1, 1, 1, 1, 0]], np.int32)
MULTI_HEAD = {
    "separate": ([Q, K, V], {}),
    "scale": ([Q, K, V], {"scale": 0.3}),
    "projection bias": ([Q, K, V, floats(3 * H * D)], {}),
    "unidirectional": ([Q, SELF_K, SELF_V], {"unidirectional": 1}),
    "lengths": ([Q, K, V, None, np.array([3, 7], np.int32)], {}),
    "lengths that hide little": ([Q, K, V, None, np.array([3, 6], np.int32)], {"mask_filter_value": -5.0}),
    "a length of 0 that absorbs": ([Q, K, V, None, np.array([0, 6], np.int32)], {"mask_filter_value": -1e30}),
    "the lowest number": (
        [Q, K, V, None, (PADDING * [[0], [1]]).astype(np.int32)],
        {"mask_filter_value": -3.4028235e38},
    ),
    "the lowest number and a bias": (
        [Q, K, V, None, (PADDING * [[0], [1]]).astype(np.int32), floats(1, H, S, L)],
        {"mask_filter_value": -3.4028235e38},
    ),
    "the lowest number, causal": (
        [Q, SELF_K, SELF_V, None, np.array([[0] * S, [0, 0] + [1] * (S - 2)], np.int32)],
        {"mask_filter_value": -3.4028235e38, "unidirectional": 1},
    ),
    "key mask": ([Q, K, V, None, PADDING], {}),
    "a mask of other numbers": ([Q, K, V, None, PADDING * 5 - 2], {}),
    "everything masked": ([Q, K, V, None, np.zeros_like(PADDING)], {}),
    "mask of each row": ([Q, K, V, None, (RANDOM.random((B, S, L)) < 0.6).astype(np.int32)], {}),
    "attention bias": ([Q, K, V, None, None, floats(1, H, S, L)], {}),
    "bias and mask": ([Q, K, V, None, PADDING, floats(1, H, S, L)], {}),
    "cached cross attention": ([Q, floats(B, H, L, D), floats(B, H, L, D)], {}),
    "past": ([Q, SELF_K, SELF_V, None, None, None, floats(B, H, 3, D), floats(B, H, 3, D)], {}),
    "past, unidirectional": (
        [Q, SELF_K, SELF_V, None, None, None, floats(B, H, 3, D), floats(B, H, 3, D)],
        {"unidirectional": 1},
    ),
}


@pytest.mark.parametrize(("tensors", "attributes"), MULTI_HEAD.values(), ids=MULTI_HEAD.keys())
def test_multi_head_attention(tensors: list, attributes: dict, library: str) -> None:
    outputs = 3 if len(tensors) > 6 else 1
    check(
        model_of("MultiHeadAttention", "com.microsoft", tensors, {"num_heads": H, **attributes}, outputs, 17),
        tensors,
        library,
    )


def test_causal_multi_head_attention_across(library: str) -> None:
    """What `unidirectional` means for other numbers of keys than queries no text says, and kernels differ."""
    model = model_of("MultiHeadAttention", "com.microsoft", [Q, K, V], {"num_heads": H, "unidirectional": 1}, opset=17)
    _, report = faexport.fuse(model, options=OPTIONS)
    refusal = report.sites[0].refusal
    assert refusal is not None and "unidirectional" in refusal.reason


def test_packed_multi_head_attention(library: str) -> None:
    """onnxruntime's CPU has no kernel for packed QKV: the separate form tells what it means."""
    packed = floats(B, S, H, 3, D)
    parts = [np.ascontiguousarray(packed[:, :, :, i].reshape(B, S, H * D)) for i in range(3)]
    expected = run(
        model_of("MultiHeadAttention", "com.microsoft", parts, {"num_heads": H}, opset=17),
        {f"i{i}": p for i, p in enumerate(parts)},
    )
    fused, report = faexport.fuse(
        model_of("MultiHeadAttention", "com.microsoft", [packed], {"num_heads": H}, opset=17), options=OPTIONS
    )
    assert report.num_fused == 1
    np.testing.assert_allclose(run(fused, {"i0": packed}, library)[0], expected[0], atol=1e-5)


def test_packed_keys_and_values(library: str) -> None:
    packed = floats(B, L, H, 2, D)
    parts = [Q, *(np.ascontiguousarray(packed[:, :, :, i].reshape(B, L, H * D)) for i in range(2))]
    expected = run(
        model_of("MultiHeadAttention", "com.microsoft", parts, {"num_heads": H}, opset=17),
        {f"i{i}": p for i, p in enumerate(parts)},
    )
    fused, _ = faexport.fuse(
        model_of("MultiHeadAttention", "com.microsoft", [Q, packed], {"num_heads": H}, opset=17), options=OPTIONS
    )
    np.testing.assert_allclose(run(fused, {"i0": Q, "i1": packed}, library)[0], expected[0], atol=1e-5)


ROW = floats(B, 1, H * D)
ENCODER = [floats(B, H, L, D), floats(B, H, L, D)]
MASKED = {
    "plain": ([ROW, *ENCODER], {}),
    "scale": ([ROW, *ENCODER], {"scale": 0.3}),
    "key mask": ([ROW, *ENCODER, PADDING], {}),
}


@pytest.mark.parametrize(("tensors", "attributes"), MASKED.values(), ids=MASKED.keys())
def test_one_row_on_an_encoder(tensors: list, attributes: dict, library: str) -> None:
    model = model_of(
        "DecoderMaskedMultiHeadAttention", "com.microsoft", tensors, {"num_heads": H, **attributes}, opset=17
    )
    check(model, tensors, library)


def test_one_row_on_a_cache_is_refused_with_all_reasons() -> None:
    new, cache = [ROW, ROW, ROW], [floats(B, H, L, D), floats(B, H, L, D)]
    tensors = [*new, None, None, *cache, np.array([3], np.int32), np.array([1], np.int32)]
    attributes = {"num_heads": H, "past_present_share_buffer": 1}
    model = model_of("DecoderMaskedMultiHeadAttention", "com.microsoft", tensors, attributes, 3, 17)
    reason = str(faexport.fuse(model, options=OPTIONS)[1].sites[0].refusal)
    assert "past_present_share_buffer" in reason and "beam_width" in reason


X, WEIGHTS, BIAS = floats(B, S, H * D), floats(H * D, 3 * H * D) * 0.2, floats(3 * H * D)
LOWEST = float(np.finfo(np.float32).min)
NOTHING, LEFT_PADDED = np.zeros((B, S), np.int32), np.ones((B, S), np.int32)
LEFT_PADDED[1, :2] = 0
WITH_PROJECTION = {
    "plain": ([X, WEIGHTS, BIAS], {}),
    "unidirectional": ([X, WEIGHTS, BIAS], {"unidirectional": 1}),
    "key mask": ([X, WEIGHTS, BIAS, PADDING[:, :S].copy()], {}),
    "lengths": ([X, WEIGHTS, BIAS, np.array([2, 5], np.int32)], {}),
    # Equal scores: behind -10000, which hides all keys alike, other ones would be rounded by the original.
    "a length of 0": ([X * np.float32([[[1]], [[0]]]), WEIGHTS, BIAS, np.array([2, 0], np.int32)], {}),
    "lengths, few of them": ([X, WEIGHTS, BIAS, np.array([1, 2], np.int32)], {"unidirectional": 1}),
    "lengths that hide little": ([X, WEIGHTS, BIAS, np.array([2, 4], np.int32)], {"mask_filter_value": -5.0}),
    "a length of 0 that absorbs": ([X, WEIGHTS, BIAS, np.array([2, 0], np.int32)], {"mask_filter_value": -1e30}),
    "a length of 0 that absorbs, causal": (
        [X, WEIGHTS, BIAS, np.array([2, 0], np.int32)],
        {"mask_filter_value": -1e30, "unidirectional": 1},
    ),
    "the lowest number, everything hidden": ([X, WEIGHTS, BIAS, NOTHING], {"mask_filter_value": LOWEST}),
    "the lowest number, everything hidden, causal": (
        [X, WEIGHTS, BIAS, NOTHING],
        {"mask_filter_value": LOWEST, "unidirectional": 1},
    ),
    "the lowest number, a length of 0, causal": (
        [X, WEIGHTS, BIAS, np.array([2, 0], np.int32)],
        {"mask_filter_value": LOWEST, "unidirectional": 1},
    ),
    "the lowest number, padded on the left, causal": (
        [X, WEIGHTS, BIAS, LEFT_PADDED],
        {"mask_filter_value": LOWEST, "unidirectional": 1},
    ),
    "own size of values": (
        [X, floats(H * D, 2 * H * D + 24) * 0.2, floats(2 * H * D + 24)],
        {"qkv_hidden_sizes": [H * D, H * D, 24]},
    ),
}


@pytest.mark.parametrize(("tensors", "attributes"), WITH_PROJECTION.values(), ids=WITH_PROJECTION.keys())
def test_attention_with_its_projection(tensors: list, attributes: dict, library: str) -> None:
    check(model_of("Attention", "com.microsoft", tensors, {"num_heads": H, **attributes}, opset=17), tensors, library)


PAST, LONGER = floats(2, B, H, 3, D), np.ones((B, S + 3), np.int32)
LONGER[1, -2:] = 0
CACHED = {
    "plain": ([X, WEIGHTS, BIAS, None, PAST], {}),
    "unidirectional": ([X, WEIGHTS, BIAS, None, PAST], {"unidirectional": 1}),
    "key mask": ([X, WEIGHTS, BIAS, LONGER, PAST], {"unidirectional": 1}),
    "nothing cached yet": ([X, WEIGHTS, BIAS], {"unidirectional": 1}),
    "nothing cached yet, lengths": ([X, WEIGHTS, BIAS, np.array([2, 4], np.int32)], {"unidirectional": 1}),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("number", [-70000.0, -1e9, -1e30, -3.4028235e38])
def test_numbers_that_float16_does_not_have(number: float, bias: bool, library: str) -> None:
    """onnxruntime adds them to scores in float32, so that a row whose keys are all hidden gives numbers, too."""
    mask = (PADDING * [[0], [1]]).astype(np.int32) if bias else np.array([0, 6], np.int32)
    tensors = [Q * 0.01, K, V, None, mask, *([floats(1, H, S, L) * 0.01] if bias else [])]  # any rounding is little
    tensors = [t.astype(np.float16) if t is not None and t.dtype == np.float32 else t for t in tensors]
    words = {"num_heads": H, "mask_filter_value": number}
    model = model_of("MultiHeadAttention", "com.microsoft", tensors, words, opset=17)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    fused, report = faexport.fuse(model, options=OPTIONS)
    assert report.num_fused == 1
    feeds = {f"i{i}": t for i, t in enumerate(tensors) if t is not None}
    np.testing.assert_allclose(run(fused, feeds, library)[0], run(model, feeds)[0], atol=1e-2)


@pytest.mark.parametrize(("tensors", "attributes"), CACHED.values(), ids=CACHED.keys())
def test_attention_with_a_cache_of_keys_and_values(tensors: list, attributes: dict, library: str) -> None:
    attributes = {"num_heads": H, **attributes}
    check(model_of("Attention", "com.microsoft", tensors, attributes, 2, opset=17), tensors, library)


def grouped(*more, **attributes) -> tuple[onnx.ModelProto, list]:
    lengths, total = np.array([S - 1, 2], np.int32), np.array(S, np.int32)
    tensors = [floats(B, S, H * 16), floats(B, S, 2 * 16), floats(B, S, 2 * 16), None, None, lengths, total, *more]
    attributes = {"num_heads": H, "kv_num_heads": 2, **attributes}
    return model_of("GroupQueryAttention", "com.microsoft", tensors, attributes, opset=17), tensors


@pytest.mark.parametrize("attributes", [{}, {"softcap": 3.0}, {"scale": 0.2}, {"smooth_softmax": 1}])
def test_grouped_prompts(attributes: dict, library: str) -> None:
    model, tensors = grouped(**attributes)
    assert {"causal", "padding as lengths"} <= set(check(model, tensors, library))


def test_grouped_keys_without_values_are_refused() -> None:
    tensors = [
        floats(B, S, H * 16),
        floats(B, S, 2 * 16),
        None,
        None,
        None,
        np.array([S, 2], np.int32),
        np.array(S, np.int32),
    ]
    model = model_of("GroupQueryAttention", "com.microsoft", tensors, {"num_heads": H, "kv_num_heads": 2}, opset=17)
    assert "no values" in refusal(model)


BHSD = [floats(B, H, S, D), floats(B, H, L, D), floats(B, H, L, D)]
ONNX = {
    "4-D": (BHSD, {}),
    "3-D": ([Q, K, V], {"q_num_heads": H, "kv_num_heads": H}),
    "3-D, grouped": ([Q, K[..., : 2 * D].copy(), V[..., : 2 * D].copy()], {"q_num_heads": H, "kv_num_heads": 2}),
    "causal": (BHSD, {"is_causal": 1}),
    "scale and softcap": (BHSD, {"scale": 0.2, "softcap": 4.0}),
    "bool mask": ([*BHSD, RANDOM.random((S, L)) < 0.7], {}),
    "float mask": ([*BHSD, floats(B, 1, S, L)], {}),
    "causal and mask": ([*BHSD, floats(1, H, S, L)], {"is_causal": 1}),
    "past": ([*BHSD, None, floats(B, H, 3, D), floats(B, H, 3, D)], {"is_causal": 1}),
}


@pytest.mark.parametrize(("tensors", "attributes"), ONNX.values(), ids=ONNX.keys())
def test_onnx_attention(tensors: list, attributes: dict, library: str) -> None:
    """Against ONNX's reference, since onnxruntime misses parts of the op."""
    model = model_of("Attention", "", tensors, attributes, 3 if len(tensors) > 4 else 1)
    feeds = {f"i{i}": t for i, t in enumerate(tensors) if t is not None}
    fused, report = faexport.fuse(model, options=OPTIONS)
    assert report.num_fused == 1, [str(site.refusal) for site in report.sites]
    assert report.sites[0].dtype == "float32"
    expected = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
    for wanted, got in zip(expected, run(fused, feeds, library), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_a_node_without_a_name_is_called_after_its_output() -> None:
    model = model_of("Attention", "", BHSD, {})
    model.graph.node[0].ClearField("name")
    _, report = faexport.fuse(model, options=OPTIONS)
    assert report.num_fused == 1 and report.sites[0].name == "o0"


def test_asking_for_the_scores_is_refused() -> None:
    assert "qk_matmul_output" in refusal(model_of("Attention", "", BHSD, {}, 4))


def test_double_precision_is_refused() -> None:
    assert "float32" in refusal(model_of("Attention", "", [t.astype(np.float64) for t in BHSD], {}))
