# SPDX-License-Identifier: Apache-2.0
"""explain() for GPUs that need not be there: which kernel runs each of 20 configurations, on each architecture."""

from __future__ import annotations

import faplugin
import pytest
from faplugin._library import native

pytestmark = pytest.mark.skipif(not native().with_cuda, reason="a build without CUDA kernels")

HALVES = ("float16", "bfloat16")
# name: ((S_q, S_kv, D, D_v), other arguments)
CONFIGURATIONS = {
    "d32": ((1024, 1024, 32, 32), {}),
    "d40": ((4096, 4096, 40, 40), {}),
    "d64": ((512, 512, 64, 64), {}),
    "d64_causal": ((4096, 4096, 64, 64), {"is_causal": True}),
    "d72": ((1024, 1024, 72, 72), {}),
    "d80": ((1024, 1024, 80, 80), {}),
    "d96": ((197, 197, 96, 96), {}),
    "d128": ((2048, 2048, 128, 128), {}),
    "d128_window": ((4096, 4096, 128, 128), {"is_causal": True, "left_window_size": 1024}),
    "d192_v128": ((1024, 1024, 192, 128), {"is_causal": True}),
    "d256": ((1024, 1024, 256, 256), {}),
    "padding_mask": ((512, 512, 64, 64), {"attn_mask": ((2, 1, 1, 512), "bool")}),
    "lengths": ((512, 512, 64, 64), {"nonpad_kv_seqlen": ((2,), "int64")}),
    "bias": ((1024, 1024, 64, 64), {"attn_bias": ((1, 8, 1024, 1024), "float16")}),
    "alibi": ((1024, 1024, 64, 64), {"alibi_slopes": ((8,), "float32"), "is_causal": True}),
    "softcap": ((1024, 1024, 128, 128), {"softcap": 30.0}),
    "sinks": ((1024, 1024, 64, 64), {"sinks": ((8,), "float32"), "is_causal": True}),
    "cross": ((1024, 77, 64, 64), {}),
    "cache": ((128, 128, 128, 128), {"past_key": ((2, 2, 900, 128), "T"), "past_value": ((2, 2, 900, 128), "T")}),
    "lse": ((1024, 1024, 64, 64), {"return_lse": True}),
}


def chosen(dtype: str, device: str, sizes: tuple[int, ...], arguments: dict) -> str:
    """The kernel's name; tensors are specifications, "T" in them stands for dtype."""
    rows, keys, head_dim, head_dim_v = sizes
    specs = [
        ((2, heads, rows, d), dtype)
        for heads, rows, d in ((8, rows, head_dim), (2, keys, head_dim), (2, keys, head_dim_v))
    ]
    arguments = {name: (x[0], dtype) if isinstance(x, tuple) and x[1] == "T" else x for name, x in arguments.items()}
    return faplugin.explain(*specs, device=device, **arguments).partition(":")[0]


@pytest.mark.parametrize("device", ["sm_80", "sm_86", "sm_89", "sm_90"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_prefill(name: str, device: str) -> None:
    for dtype in HALVES:
        assert chosen(dtype, device, *CONFIGURATIONS[name]) == ("prefill_sm90" if device == "sm_90" else "prefill_sm80")
    assert chosen("float32", device, *CONFIGURATIONS[name]) == "prefill_sm80"


@pytest.mark.parametrize("device", ["sm_80", "sm_86", "sm_89", "sm_90"])
@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
def test_one_row_is_split_over_the_keys(dtype: str, device: str) -> None:
    for head_dim in (64, 128, 256):
        assert chosen(dtype, device, (1, 8192, head_dim, head_dim), {}) == "decode_splitkv"


def test_each_kernel_that_refuses_says_why() -> None:
    spec = ((2, 8, 1024, 64), "float32")
    lines = faplugin.explain(spec, spec, spec, device="sm_90").splitlines()
    reasons = dict(line.split(": ", 1) for line in lines[1:])
    assert reasons["cpu"] == "runs on the CPU only"
    assert "float16 and bfloat16 only" in reasons["prefill_sm90"]
    assert reasons["decode_splitkv"].startswith("seqlen_q times the query heads of a key head is 1024")
    assert reasons["prefill_sm80"] == "runs this problem"
    too_large = ((2, 8, 1024, 257), "float16")
    assert chosen("float16", "sm_90", (1024, 1024, 257, 257), {}) == "no kernel"
    assert "above 256" in faplugin.explain(too_large, too_large, too_large, device="sm_90")
