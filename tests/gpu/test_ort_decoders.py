# SPDX-License-Identifier: Apache-2.0
"""Caches inside onnxruntime's CUDA provider: in place where one OrtValue is bound as past and present; in a CUDA graph
whose lengths advance on the device."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime as ort
import pytest

from tests import decoding
from tests.plugin import nodes, test_ort_cache

CUDA = "CUDAExecutionProvider"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA not in ort.get_available_providers(), reason="onnxruntime has no CUDA provider"),
]
on_cuda = functools.partial(nodes.step, providers=[(CUDA, {"use_tf32": "0"})], device="cuda")


@pytest.mark.parametrize("decoder", test_ort_cache.DECODERS, ids=str)
def test_decoder(decoder: decoding.Decoder) -> None:
    decoding.run(decoder, on_cuda)


@pytest.mark.skipif(test_ort_cache.VERSION < (1, 28), reason="types of optional outputs can't be told before 1.28")
@pytest.mark.parametrize("decoder", test_ort_cache.QUANTIZED, ids=str)
def test_quantized_decoder(decoder: decoding.Decoder) -> None:
    decoding.run(decoder, on_cuda)


HEADS, KV_HEADS, DIM, CAPACITY = 8, 2, 64, 96


@pytest.mark.parametrize("mode", ("write", "window"))
def test_a_graph_replays_while_lengths_advance(mode: str) -> None:
    """onnxruntime captures the first run; the host changes nothing but tensors on the device."""
    rng = np.random.default_rng(0)
    inputs = {"query": (2, 1, HEADS * DIM), "key": (2, 1, KV_HEADS * DIM), "value": (2, 1, KV_HEADS * DIM)}
    inputs |= dict.fromkeys(("past_key", "past_value"), (2, KV_HEADS, CAPACITY, DIM))
    feeds = {name: np.zeros(shape, np.float16) for name, shape in inputs.items()}
    angles = np.arange(256)[:, None] / 100.0 ** (np.arange(DIM // 2) / 32)
    feeds |= {"nonpad_kv_seqlen": np.array([1, 40], np.int32)}
    feeds |= {"cos_cache": np.cos(angles).astype(np.float16), "sin_cache": np.sin(angles).astype(np.float16)}
    attributes = {"cache": mode, "is_causal": 1, "q_num_heads": HEADS, "kv_num_heads": KV_HEADS}
    attributes |= {"left_window_size": 90} if mode == "window" else {}
    attributes |= {
        "optional_inputs": ",".join(list(feeds)[3:]),
        "optional_outputs": "present_key,present_value",
    }
    model = nodes.make_model(feeds, attributes, ("output", "present_key", "present_value"))
    runs = []
    for options in ({}, {"enable_cuda_graph": "1"}):
        made = nodes.session(model, [(CUDA, options)])
        assert made.get_providers()[0] == CUDA
        binding, values = made.io_binding(), {}
        for name, array in feeds.items():
            values[name] = ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0)
            binding.bind_ortvalue_input(name, values[name])
        values["output"] = ort.OrtValue.ortvalue_from_numpy(np.full(inputs["query"], np.nan, np.float16), "cuda", 0)
        binding.bind_ortvalue_output("output", values["output"])
        for name in ("key", "value"):
            binding.bind_ortvalue_output(f"present_{name}", values[f"past_{name}"])
        runs.append((made, binding, values))
    for step in range(30):
        fresh = {name: rng.standard_normal(inputs[name], np.float32).astype(np.float16) for name in list(feeds)[:3]}
        fresh["nonpad_kv_seqlen"] = np.array([1 + 2 * step, 40 + 2 * step], np.int32)
        for made, binding, values in runs:
            for name, array in fresh.items():
                values[name].update_inplace(array)
            made.run_with_iobinding(binding)
        for name in ("output", "past_key", "past_value"):
            found, expected = (values[name].numpy() for _, _, values in runs)
            assert np.array_equal(found, expected) and np.isfinite(found).all(), f"{name}, step {step}"
