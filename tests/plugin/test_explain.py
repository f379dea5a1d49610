# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs what on which GPU, as explain() says it. Needs a build with CUDA kernels, but no GPU."""

from __future__ import annotations

import faplugin
import pytest
from faexport import cuda_heads

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90")
PREFILL, DECODE = "prefill", "decode_splitkv"

# (batch, query heads, key heads, seqlen_q, seqlen_kv, head_dim, dtype), other arguments, phase, for one of Hopper's
CONFIGURATIONS = [
    ((1, 16, 16, 512, 512, 64, "float16"), {}, PREFILL, True),
    ((4, 16, 16, 2048, 2048, 128, "bfloat16"), {"is_causal": True}, PREFILL, True),
    ((1, 8, 8, 4096, 4096, 256, "float16"), {}, PREFILL, True),
    ((2, 32, 8, 1024, 1024, 96, "bfloat16"), {}, PREFILL, True),
    ((2, 32, 8, 1024, 1024, 80, "float16"), {"is_causal": True, "left_window_size": 256}, PREFILL, True),
    ((2, 12, 12, 197, 197, 64, "float16"), {}, PREFILL, True),
    ((2, 12, 12, 128, 128, 32, "float16"), {}, PREFILL, True),
    ((2, 4, 4, 300, 300, 192, "bfloat16"), {}, PREFILL, True),
    ((2, 4, 4, 300, 300, 64, "float16"), {"attn_mask": ((2, 1, 1, 300), "bool")}, PREFILL, True),
    ((2, 4, 4, 300, 300, 64, "float16"), {"nonpad_kv_seqlen": ((2,), "int64")}, PREFILL, True),
    ((2, 4, 4, 304, 304, 64, "float16"), {"attn_bias": ((1, 4, 304, 304), "float16")}, PREFILL, True),
    ((2, 4, 4, 300, 300, 64, "float16"), {"alibi_slopes": ((4,), "float32")}, PREFILL, True),
    ((2, 4, 4, 300, 300, 64, "float16"), {"softcap": 30.0}, PREFILL, True),
    ((64, 4, 4, 49, 49, 32, "bfloat16"), {"attn_bias": ((1, 4, 49, 49), "bfloat16")}, PREFILL, True),  # Swin's windows
    ((2, 4, 4, 300, 300, 33, "float16"), {}, PREFILL, False),
    ((2, 4, 4, 300, 300, 64, "float32"), {}, PREFILL, True),
    ((2, 4, 4, 300, 300, 36, "float32"), {"float32_precision": "tf32"}, PREFILL, True),
    ((1, 16, 16, 4096, 4096, 128, "float32"), {"is_causal": True, "float32_precision": "tf32"}, PREFILL, True),
    ((2, 8, 4, 512, 300, 256, "float32"), {"attn_mask": ((2, 1, 512, 300), "bool")}, PREFILL, True),
    ((2, 4, 4, 300, 300, 33, "float32"), {}, PREFILL, False),
    ((2, 4, 4, 300, 300, 111, "bfloat16"), {}, PREFILL, False),
    ((1, 32, 8, 1, 32768, 128, "float16"), {}, DECODE, True),
    ((16, 32, 8, 1, 4096, 128, "bfloat16"), {"nonpad_kv_seqlen": ((16,), "int32")}, DECODE, True),
    ((3, 16, 1, 2, 700, 80, "float16"), {"attn_mask": ((3, 1, 2, 700), "bool")}, DECODE, True),
    ((3, 16, 1, 2, 700, 33, "float16"), {}, DECODE, False),
    ((1, 8, 1, 4, 1024, 64, "float32"), {"is_causal": True}, DECODE, False),
    ((1, 8, 8, 40, 8192, 128, "float16"), {}, DECODE, True),
]


def explain(shape: tuple, arguments: dict, device: str) -> str:
    batch, heads, kv_heads, rows, keys, dim, dtype = shape
    query, key = ((batch, heads, rows, dim), dtype), ((batch, kv_heads, keys, dim), dtype)
    return faplugin.explain(query, key, key, device=device, **arguments)


@pytest.fixture(autouse=True)
def _has_cuda_kernels() -> None:
    if "prefill_sm80" not in explain(CONFIGURATIONS[0][0], {}, "sm_80"):
        pytest.skip("a build without CUDA kernels")


@pytest.mark.parametrize("device", ARCHITECTURES)
@pytest.mark.parametrize(("shape", "arguments", "phase", "on_hopper"), CONFIGURATIONS)
def test_kernel_is_named(shape: tuple, arguments: dict, phase: str, on_hopper: bool, device: str) -> None:
    text = explain(shape, arguments, device)
    hoppers = "decode_sm90" if phase == DECODE else "prefill_sm90_f32" if shape[-1] == "float32" else "prefill_sm90"
    elsewhere = DECODE if phase == DECODE else "prefill_sm80"
    expected = hoppers if device == "sm_90" and on_hopper and hoppers in text else elsewhere
    assert text.splitlines()[0] == f"{expected}: chosen", text


@pytest.mark.parametrize("device", ARCHITECTURES)
def test_float8_needs_hopper(device: str) -> None:
    def text(head_dim: int, **arguments: object) -> str:
        return explain((2, 8, 2, 300, 300, head_dim, "float8_e4m3fn"), arguments, device)

    if "prefill_sm90_f8" not in text(128):
        pytest.skip("a build without Hopper's kernels")
    chosen = "prefill_sm90_f8: chosen" if device == "sm_90" else "no kernel"
    assert text(128).splitlines()[0] == chosen
    assert text(64, softcap=30.0, output_dtype="float32").splitlines()[0] == chosen
    assert "prefill_sm80: takes float32, float16 and bfloat16 only, the tensors are float8_e4m3fn" in text(128)
    assert device != "sm_90" or "must be multiples of 16: the copy engine (TMA) moves 16 bytes" in text(40)
    assert device != "sm_90" or "prefill_sm90_f8: head_dim 272 is above 256" in text(272)


@pytest.mark.parametrize("device", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_wide_heads(dtype: str, device: str) -> None:
    def text(head_dim: int) -> str:
        return explain((1, 1, 1, 4096, 4096, head_dim, dtype), {}, device)

    on_hopper = device == "sm_90" and "prefill_sm90_wide" in text(512)
    for head_dim in (264, 320, 512):
        assert text(head_dim).startswith(f"{'prefill_sm90_wide' if on_hopper else 'prefill_sm80'}: chosen")
    assert text(500).startswith("prefill_sm80: chosen")  # rows that the copy engine can't move
    assert "prefill_sm80: head_dim 520 is above 512" in text(520)


@pytest.mark.parametrize("device", ARCHITECTURES)
@pytest.mark.parametrize("dtype", cuda_heads.widest())
def test_widest_heads_are_those_of_the_table(dtype: str, device: str) -> None:
    columns = cuda_heads.widest()[dtype]
    for widths, is_taken in (((columns, columns), True), ((columns + 8, 64), False), ((64, columns + 8), False)):
        query, value = (((1, 2, 300, d), dtype) for d in widths)
        assert (": chosen" in faplugin.explain(query, query, value, device=device)) == is_taken


def test_refusals_say_why() -> None:
    assert "head_dim 320 is above 256" in explain((1, 1, 1, 128, 128, 320, "float32"), {}, "sm_80")
    text = explain((1, 1, 1, 128, 128, 64, "float16"), {}, "sm_80")
    assert "decode_splitkv: seqlen_q times the query heads of a key head is 128, for decoding at most 64" in text


@pytest.mark.parametrize("device", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_no_packed_sequences(device: str, head_dim: int) -> None:
    none = {"cu_seqlens_q": ((1,), "int32"), "cu_seqlens_kv": ((1,), "int32")}
    text = explain((1, 4, 4, 0, 8, head_dim, "float16"), none | {"is_causal": True}, device)
    assert ": chosen" in text, text


@pytest.mark.parametrize("device", ARCHITECTURES)
@pytest.mark.parametrize(
    "arguments",
    [
        {"cos_cache": ((64, 32), "float16"), "sin_cache": ((64, 32), "float16")},
        {"k_norm_weight": ((64,), "float16")},
        {"past": "float16", "cache": "write"},
        {"past": "float16", "cache": "window", "is_causal": True, "left_window_size": 9},
        {"past": "int8", "k_scale": ((1,), "float32"), "v_scale": ((1,), "float32")},
    ],
)
def test_every_cache_has_a_kernel(arguments: dict, device: str) -> None:
    if dtype := (arguments := dict(arguments)).pop("past", None):
        arguments |= {"past_key": ((1, 4, 32, 64), dtype), "past_value": ((1, 4, 32, 64), dtype)}
    if "cache" in arguments:
        arguments["nonpad_kv_seqlen"] = ((1,), "int64")
    text = explain((1, 4, 4, 1, 1, 64, "float16"), arguments, device)
    assert ": chosen" in text, text
