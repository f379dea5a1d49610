# SPDX-License-Identifier: Apache-2.0
"""Contestants on PyTorch tensors: the operator, each of its kernels, PyTorch's SDPA backends, FlashAttention-4."""

from __future__ import annotations

import re
from collections.abc import Callable

import faplugin
import torch
from attention_rows import Row, Tensors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {
    "FA2": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Contestant = Callable[[Tensors], torch.Tensor]


def _arguments(row: Row, tensors: Tensors) -> dict:
    arguments = {"query_layout": "BSHD", "key_layout": "BSHD", "value_layout": "BSHD", "is_causal": row.is_causal}
    if row.is_causal and row.kv_len != row.seqlen:
        arguments["alignment"] = "bottom_right"
    if row.window >= 0:
        arguments["left_window_size"] = row.window
    if row.mask == "mask":
        arguments["attn_mask"] = tensors.mask
    elif row.mask == "lengths":
        arguments["nonpad_kv_seqlen"] = tensors.lengths
    if tensors.bias is not None:
        arguments["attn_bias"] = tensors.bias
    return arguments


def kernels(row: Row, tensors: Tensors) -> list[str]:
    """Our kernels that can run the row; the first is the one that dispatch takes."""
    text = faplugin.explain(tensors.query, tensors.key, tensors.value, device="cuda", **_arguments(row, tensors))
    return re.findall(r"^(\w+): (?:runs this problem|could run it)", text, re.MULTILINE)


def ours(row: Row, kernel: str) -> Contestant:
    def call(tensors: Tensors) -> torch.Tensor:
        arguments = _arguments(row, tensors)
        return faplugin.attention(
            tensors.query, tensors.key, tensors.value, **arguments, out={"output": tensors.out}, kernel=kernel
        )

    return call


def sdpa(row: Row, backend: SDPBackend) -> Contestant:
    """PyTorch has no lengths: they become its bool mask."""

    def call(tensors: Tensors) -> torch.Tensor:
        query, key, value = (t.transpose(1, 2) for t in (tensors.query, tensors.key, tensors.value))
        mask = tensors.bias if tensors.bias is not None else tensors.mask
        options = {"attn_mask": mask, "is_causal": row.is_causal, "enable_gqa": row.num_kv_heads > 0}
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)

    return call


def flash_attention_4(row: Row) -> Contestant | None:
    """None where it isn't installed, or where the row has what it lacks."""
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        return None
    if row.mask:
        return None
    window = (row.window, 0) if row.window >= 0 else (None, None)

    def call(tensors: Tensors) -> torch.Tensor:
        result = flash_attn_func(tensors.query, tensors.key, tensors.value, causal=row.is_causal, window_size=window)
        return result[0] if isinstance(result, tuple) else result

    return call


def contestants(row: Row, tensors: Tensors, wanted: set[str]) -> dict[str, Contestant]:
    """By name, those wanted (all where empty). Whether each can run the row shows when it is called."""
    found: dict[str, Contestant] = {"ours": ours(row, "")}
    found |= {kernel: ours(row, kernel) for kernel in kernels(row, tensors)[1:]}
    if row.window < 0 and not (row.is_causal and row.kv_len != row.seqlen):
        # the memory-efficient backend is of interest only where the others refuse
        found |= {name: sdpa(row, backend) for name, backend in BACKENDS.items() if row.mask or name != "efficient"}
    if fa4 := flash_attention_4(row):
        found["FA4"] = fa4
    return {name: call for name, call in found.items() if not wanted or name in wanted}
