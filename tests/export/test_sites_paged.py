# SPDX-License-Identifier: Apache-2.0
"""onnxruntime's PagedAttention: everything of it that the operator has is fused and right, step by step; the rest is
refused with all its reasons. onnxruntime has a kernel for CUDA only (tests/gpu/test_ort_paged.py compares with it):
here float64 is the measure."""

from __future__ import annotations

import dataclasses
import pathlib

import faexport
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from faexport.report.data import VerificationStatus
from faexport.runtimes import ort_session
from faexport.verify import model_check
from onnx import TensorProto

from tests import decoding
from tests.export import paged
from tests.export.compared import OPTIONS

VERSION = tuple(int(part) for part in ort.__version__.split(".")[:2])
PLAIN = decoding.Decoder("paged", "float16", layout="BSH", lengths="write_indices", index_dtype="int32", page_rows=4)
DECODERS = {
    "plain": PLAIN,
    "rotary": dataclasses.replace(PLAIN, rotary="half"),
    "interleaved rotary": dataclasses.replace(PLAIN, rotary="interleaved-partial", head_dim=32, head_dim_v=32),
    "slots": dataclasses.replace(PLAIN, slots=True, rotary="half"),
    "window, softcap, sinks": dataclasses.replace(PLAIN, window_left=3, softcap=5.0, sinks=True),
    "window of 1": dataclasses.replace(PLAIN, window_left=0),
    "one head, three sequences": dataclasses.replace(PLAIN, batch_size=3, num_q_heads=1, num_kv_heads=1, seed=5),
}
QUANTIZED = {
    "int8": dataclasses.replace(PLAIN, quantized="int8", rotary="half"),
    "int8 by channel": dataclasses.replace(PLAIN, quantized="int8", per_channel=True),
    "int8, window, sinks": dataclasses.replace(PLAIN, quantized="int8", window_left=3, sinks=True),
}


class Fused:
    """Computes a step by the model that faexport makes of a model of PagedAttention."""

    def __init__(self, decoder: decoding.Decoder, *, packed: bool = False, **attributes):
        self.decoder, self.packed, self.attributes = decoder, packed, attributes
        self.facts: list[str] = []

    def __call__(self, query: np.ndarray, key: np.ndarray, value: np.ndarray, **given) -> np.ndarray:
        tensors = paged.arguments_of(self.decoder, query, key, value, given)
        model = paged.model_of(self.decoder, tensors, packed=self.packed, **self.attributes)
        fused, report = faexport.fuse(model, options=OPTIONS)
        assert report.num_fused == 1, [str(site.refusal) for site in report.sites]
        self.facts = [fact.text for fact in report.sites[0].facts]
        if self.packed:
            tensors["query"] = np.concatenate([tensors.pop(name) for name in ("query", "key", "value")], axis=1)
        return paged.run(fused, tensors)[None]


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS.keys())
def test_forms(decoder: decoding.Decoder) -> None:
    fused = Fused(decoder)
    decoding.run(decoder, fused, steps=9)
    assert "causal" in fused.facts and any("pages" in fact for fact in fused.facts)


@pytest.mark.skipif(VERSION < (1, 28), reason="types of optional outputs can't be told before 1.28")
@pytest.mark.parametrize("decoder", QUANTIZED.values(), ids=QUANTIZED.keys())
def test_quantized_forms(decoder: decoding.Decoder) -> None:
    decoding.run(decoder, Fused(decoder), steps=9)


def test_norm() -> None:
    """PagedAttention has one epsilon for queries and keys."""
    decoder = dataclasses.replace(PLAIN, norm=True, rotary="half")
    tensors = _tensors(decoder)
    fused, report = faexport.fuse(paged.model_of(decoder, tensors, qk_norm_epsilon=1e-3), options=OPTIONS)
    assert "RMS norm of the heads of query and key" in [fact.text for fact in report.sites[0].facts]
    (node,) = (node for node in fused.graph.node if node.domain == "faexport")
    epsilons = {a.name: a.f for a in node.attribute if "epsilon" in a.name}
    assert epsilons == pytest.approx({"q_norm_epsilon": 1e-3, "k_norm_epsilon": 1e-3})


def test_packed_rows() -> None:
    decoding.run(PLAIN, Fused(PLAIN, packed=True), steps=9)


def test_bounds_are_not_needed() -> None:
    tensors = _tensors(PLAIN) | {"bounds": np.array([9, 40], np.int32)}
    fused, report = faexport.fuse(paged.model_of(PLAIN, tensors), options=OPTIONS)
    assert report.num_fused == 1 and not any(x.name == "bounds" for x in fused.graph.initializer)


def test_rows_that_see_each_other() -> None:
    """is_causal = 0, for which tests/decoding.py has no measure: each row attends all of its sequence."""
    tensors = _tensors(PLAIN)
    fused, _ = faexport.fuse(paged.model_of(PLAIN, tensors, is_causal=0), options=OPTIONS)
    found = paged.run(fused, tensors).reshape(-1, PLAIN.num_q_heads, PLAIN.head_dim)
    query, key, value = (tensors[name].astype(float).reshape(len(found), -1, 16) for name in ("query", "key", "value"))
    for first, end in zip(tensors["cu_seqlens_q"], tensors["cu_seqlens_q"][1:], strict=False):
        for head in range(PLAIN.num_q_heads):
            scores = query[first:end, head] @ key[first:end, head // 2].T / 4
            weights = np.exp(scores - scores.max(1, keepdims=True))
            want = weights @ value[first:end, head // 2] / weights.sum(1, keepdims=True)
            np.testing.assert_allclose(found[first:end, head], want, atol=2e-3)


def _tensors(decoder: decoding.Decoder) -> dict[str, np.ndarray]:
    """Those of a prompt on empty pages."""
    kept: dict[str, np.ndarray] = {}

    def keep(query: np.ndarray, key: np.ndarray, value: np.ndarray, **given) -> None:
        kept.update(paged.arguments_of(decoder, query, key, value, given))
        raise StopIteration

    with pytest.raises(StopIteration):
        decoding.run(decoder, keep)
    return kept


REFUSED = {
    "latent": ({"kv_cache_layout": "LATENT"}, "latent"),
    "narrower values": ({"v_head_size": 8, "scale": 0.1}, "v_head_size"),
    "rotary behind columns": ({"rotary_offset": 8}, "rotary_offset"),
    "another type": ({"k_cache_dtype": "int4"}, "k_cache_dtype"),
    "two obstacles": ({"rotary_offset": 8, "v_head_size": 8}, "v_head_size"),
    "no window": ({"local_window_size": 0}, "local_window_size"),
}


@pytest.mark.parametrize(("attributes", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(attributes: dict, words: str) -> None:
    _, report = faexport.fuse(paged.model_of(PLAIN, _tensors(PLAIN), **attributes), options=OPTIONS)
    reason = str(report.sites[0].refusal)
    assert report.num_fused == 0 and words in reason
    assert all(name in reason for name in attributes if name != "scale")


def test_pages_of_4_bits_are_refused() -> None:
    model = paged.model_of(PLAIN, _tensors(PLAIN), k_cache_dtype="int4", v_cache_dtype="int4")
    for value in [*model.graph.input, *model.graph.output]:
        if value.name.startswith(("past", "present")):
            value.type.tensor_type.elem_type = TensorProto.UINT8
    reason = str(faexport.fuse(model, options=OPTIONS)[1].sites[0].refusal)
    assert "4 bits" in reason


def test_a_changed_argument_is_noticed() -> None:
    """The measure of these tests sees a window that is one wider."""
    decoder = DECODERS["window, softcap, sinks"]
    with pytest.raises(AssertionError, match="output of entry"):
        decoding.run(decoder, Fused(decoder, local_window_size=5), steps=9)


def test_the_interface_stays() -> None:
    model = paged.model_of(PLAIN, _tensors(PLAIN))
    before = [[value.name for value in values] for values in (model.graph.input, model.graph.output)]
    fused, _ = faexport.fuse(model, options=OPTIONS)
    assert before == [[value.name for value in values] for values in (fused.graph.input, fused.graph.output)]
    assert not any(node.domain == "com.microsoft" for node in fused.graph.node)


def test_the_report_tells_that_pages_are_gathered_on_a_gpu() -> None:
    _, report = faexport.fuse(paged.model_of(PLAIN, _tensors(PLAIN)), options=OPTIONS)
    assert any("pages of a cache are gathered first" in note for note in report.notes)


def test_a_model_without_a_kernel_on_the_cpu_is_not_verified(tmp_path: pathlib.Path) -> None:
    """onnxruntime has PagedAttention for CUDA only; no inputs would help."""
    model = paged.model_of(PLAIN, _tensors(PLAIN))
    onnx.save(model, tmp_path / "a.onnx")
    onnx.save(faexport.fuse(model, options=OPTIONS)[0], tmp_path / "b.onnx")
    found = model_check.verify(tmp_path / "a.onnx", tmp_path / "b.onnx", open_session=ort_session.SessionHere)
    assert found.status is VerificationStatus.NOT_RUN
    assert "PagedAttention" in found.reason and "--inputs" not in found.reason
