# SPDX-License-Identifier: Apache-2.0
"""Caches inside onnxruntime: in place where one OrtValue is bound as past and present, in pages, quantized; and the
same rows and results as onnxruntime's own GroupQueryAttention."""

from __future__ import annotations

import functools

import faplugin
import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper

from tests import decoding
from tests.plugin import nodes

VERSION = tuple(int(part) for part in ort.__version__.split(".")[:2])
HEADS, KV_HEADS, DIM = 4, 2, 16


DECODERS = [
    decoding.Decoder("write", rotary="half", norm=True),
    decoding.Decoder("write", "float16", layout="BHSD", in_place=False, mask=True, sinks=True),
    decoding.Decoder("append", in_place=False, rotary="interleaved"),
    decoding.Decoder("window", capacity=9, window_left=5, rotary="half-partial"),
    decoding.Decoder("window", capacity=6, window_left=5, in_place=False),
    decoding.Decoder("paged", rotary="half-ids", slots=True),
]
QUANTIZED = [
    decoding.Decoder("write", quantized="int8", rotary="half"),
    decoding.Decoder("write", quantized="int4", per_channel=True, in_place=False),
    decoding.Decoder("paged", quantized="int8", per_channel=True),
]


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_decoder(decoder: decoding.Decoder) -> None:
    decoding.run(decoder, nodes.step)


@pytest.mark.skipif(VERSION < (1, 28), reason="shapes and types of optional outputs can't be told before 1.28")
@pytest.mark.parametrize("decoder", QUANTIZED, ids=str)
def test_quantized_decoder(decoder: decoding.Decoder) -> None:
    decoding.run(decoder, nodes.step)


# --------------------------------------------------------------------------------------------- bound memory


def bound_step(cache: str, bound: dict[str, str], batch: int = 2) -> dict[str, np.ndarray]:
    """The outputs of one step, bound to memory of their own or, by name, to that of an input or another output."""
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal((batch, 1, 2, 8), dtype=np.float32) for name in ("query", "key", "value")}
    inputs |= {name: rng.standard_normal((batch, 1, 6, 8), dtype=np.float32) for name in ("past_key", "past_value")}
    if cache == "write":
        inputs["write_indices"] = np.array([3, 1])[:batch]
    attributes = {"cache": cache, "is_causal": 1, "optional_inputs": ",".join([*inputs][3:])}
    attributes["optional_outputs"] = "present_key,present_value"
    shapes = dict.fromkeys(("present_key", "present_value"), (batch, 1, 8 if cache == "append" else 6, 8))
    shapes["output"] = (batch, 1, 2, 8)
    made = nodes.session(nodes.make_model(inputs, attributes, [*shapes], shapes=dict.fromkeys(inputs)))
    binding, memory = made.io_binding(), {name: np.zeros(128, np.float32) for name in (*inputs, *shapes)}
    memory["write_indices"] = inputs.get("write_indices", np.zeros(0))
    for name, array in inputs.items():
        memory[name][: array.size] = array.ravel()
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, memory[name].ctypes.data)
    for name, shape in shapes.items():
        binding.bind_output(name, "cpu", 0, np.float32, shape, memory[bound.get(name, name)].ctypes.data)
    made.run_with_iobinding(binding)
    return {name: memory[bound.get(name, name)][: np.prod(shape)] for name, shape in shapes.items()}


IN_PLACE = {"present_key": "past_key", "present_value": "past_value"}


@pytest.mark.parametrize(
    ("cache", "bound", "sentence"),
    [
        ("write", {"present_key": "past_value"}, "present_key shares memory with past_value; .* just that of past_key"),
        ("write", {"present_key": "past_value", "present_value": "past_key"}, "present_key shares memory with past_v"),
        ("write", {"present_key": "past_key"}, "present_key is the memory of its past and present_value is not"),
        ("write", {"present_value": "present_key"}, "present_value shares memory with present_key; give it memory"),
        ("write", {"output": "past_key"}, "output shares memory with past_key; give it memory of its own"),
        ("append", {"present_value": "past_key"}, "present_value shares memory with past_key; give it memory"),
        ("append", IN_PLACE, "present_key shares memory with past_key; give it memory of its own"),
        ("append", {"output": "query"}, "output shares memory with query; give it memory of its own"),
    ],
)
def test_outputs_in_the_wrong_memory_are_refused(cache: str, bound: dict[str, str], sentence: str) -> None:
    with pytest.raises(Exception, match=f"FlashAttention: {sentence}"):
        bound_step(cache, bound)


@pytest.mark.parametrize(("cache", "batch"), [("write", 2), ("append", 1)])
def test_a_present_may_be_the_memory_of_its_past(cache: str, batch: int) -> None:
    """Appended rows too, where those of the past keep their places."""
    found, expected = bound_step(cache, IN_PLACE, batch), bound_step(cache, {}, batch)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


# ------------------------------------------------------------------------------------------ GroupQueryAttention

KINDS = {"": np.dtype(np.float32), "int8": np.dtype(np.int8), "int4": np.dtype(np.uint8)}


@functools.cache
def group_query_attention(quantized: str, **attributes) -> ort.InferenceSession:
    slots = "query key value past_key past_value seqlens_k total cos sin".split()
    slots += ["", "", "", "k_scale" if quantized else "", "v_scale" if quantized else "", "", "", "query_seqlens"]
    cache = nodes.element_type(KINDS[quantized])
    types = {"past_key": cache, "past_value": cache, "seqlens_k": 6, "total": 6, "query_seqlens": 6}
    node = helper.make_node(
        "GroupQueryAttention", slots, ["output", "present_key", "present_value"], domain="com.microsoft",
        num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=1, **attributes,
    )  # fmt: skip
    inputs = [helper.make_tensor_value_info(name, types.get(name, 1), None) for name in slots if name]
    outputs = [helper.make_tensor_value_info(name, 1 if name == "output" else cache, None) for name in node.output]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "gqa", inputs, outputs), opset_imports=opsets, ir_version=9)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.skipif(VERSION < (1, 32), reason="GroupQueryAttention has query_seqlens from 1.32 on")
@pytest.mark.parametrize(
    ("cache", "window", "capacity", "quantized", "per_channel"),
    [
        ("write", 0, 24, "", False), ("write", 4, 24, "", False), ("window", 4, 4, "", False),
        ("window", 4, 7, "", False), ("write", 0, 24, "int8", False), ("write", 0, 24, "int8", True),
        ("write", 0, 24, "int4", False), ("write", 3, 24, "int4", True),
    ],
)  # fmt: skip
def test_as_group_query_attention(cache: str, window: int, capacity: int, quantized: str, per_channel: bool) -> None:
    """Step by step, ragged: the same rows in the caches, and the same results."""
    rng = np.random.default_rng(0)
    angles = np.arange(64)[:, None] / 10 ** np.arange(DIM // 2)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    attributes: dict = {"local_window_size": window} if window else {}
    attributes |= {"sliding_window_cache": 1} if cache == "window" else {}
    scales, bits = {}, 4 if quantized == "int4" else 8
    if quantized:
        shape = (1, KV_HEADS, 1, DIM) if per_channel else (1,)
        scales = {
            n: rng.uniform(2.5, 3.5, shape).astype(np.float32) / (2 ** (bits - 1) - 1) for n in ("k_scale", "v_scale")
        }
        granularity = "PER_CHANNEL" if per_channel else "PER_TENSOR"
        attributes |= {"k_quant_type": granularity, "v_quant_type": granularity, "kv_cache_bit_width": bits}
    session = group_query_attention(quantized, **attributes)
    columns = DIM // 2 if quantized == "int4" else DIM
    ours = theirs = [np.zeros((2, KV_HEADS, capacity, columns), KINDS[quantized]) for _ in range(2)]
    lengths = np.zeros(2, int)
    for rows, counts in ((5, (5, 3)), (1, (1, 1)), (3, (3, 2)), *[(1, (1, 1))] * 5, (4, (4, 0)), (1, (0, 1))):
        lengths = lengths + counts
        query, key, value = (
            rng.standard_normal((2, rows, heads * DIM), dtype=np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        total = capacity if cache == "write" else lengths.max()
        feeds = {"query": query, "key": key, "value": value, "past_key": theirs[0], "past_value": theirs[1],
                 "seqlens_k": (lengths - 1).astype(np.int32), "total": np.array([total], np.int32), "cos": cos,
                 "sin": sin, "query_seqlens": np.array(counts, np.int32), **scales}  # fmt: skip
        expected, *theirs = session.run(None, feeds)
        found, *ours = faplugin.attention(
            query, key, value, past_key=ours[0], past_value=ours[1], cache=cache, nonpad_kv_seqlen=lengths,
            query_lengths=np.array(counts), cos_cache=cos, sin_cache=sin, q_num_heads=HEADS, kv_num_heads=KV_HEADS,
            is_causal=True, left_window_size=window - 1, return_present=True, kv_cache_bit_width=bits, **scales,
        )  # fmt: skip
        freed = capacity - window + 1
        for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            kept = length if length <= capacity else length - freed * -(-(length - capacity) // freed)
            for own, other in zip(ours, theirs, strict=True):
                difference = np.abs(own[b, :, :kept].astype(float) - other[b, :, :kept].astype(float))
                assert difference.max() <= (0 if quantized else 1e-6)
            np.testing.assert_allclose(found[b, :count], expected[b, :count], rtol=0, atol=2e-6)
