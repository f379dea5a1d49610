# SPDX-License-Identifier: Apache-2.0
"""Peers on PyTorch tensors: PyTorch's SDPA backends, its unfused graph, FlashAttention-3 and FlashAttention-4.

Rows with lengths reach each peer in every form that it has: as a bool mask, and as packed sequences (varlen), whose
keys and values have been packed before the clock starts. The better form counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

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


@contextlib.contextmanager
def tf32(allowed: bool):
    """PyTorch's float32 products in TF32, or in float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def sdpa(row: Row, backend: SDPBackend, allow_tf32: bool = False) -> Contestant:
    """PyTorch's SDPA has no lengths: they become its bool mask."""

    def call(tensors: Tensors) -> torch.Tensor:
        query, key, value = (t.transpose(1, 2) for t in (tensors.query, tensors.key, tensors.value))
        mask = tensors.bias if tensors.bias is not None else tensors.mask
        options = {"attn_mask": mask, "is_causal": row.is_causal, "enable_gqa": row.num_kv_heads > 0}
        with sdpa_kernel(backend), tf32(allow_tf32):
            return scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)

    return call


def unfused(row: Row, allow_tf32: bool) -> Contestant:
    """MatMul, scale, mask, Softmax, MatMul."""

    def call(tensors: Tensors) -> torch.Tensor:
        query, key, value = (t.transpose(1, 2) for t in (tensors.query, tensors.key, tensors.value))
        with tf32(allow_tf32):
            scores = query @ key.transpose(-1, -2) * row.head_dim**-0.5
            if tensors.bias is not None:
                scores += tensors.bias
            if tensors.mask is not None:
                scores.masked_fill_(~tensors.mask, float("-inf"))
            if row.is_causal:
                shape = scores.shape[-2:]
                hidden = torch.ones(shape, device="cuda", dtype=torch.bool).triu(1 + shape[1] - shape[0])
                scores.masked_fill_(hidden, float("-inf"))
            return (scores.softmax(-1) @ value).transpose(1, 2)

    return call


def varlen_of_torch(row: Row) -> Contestant:
    """PyTorch's FlashAttention-2 on packed sequences."""
    from torch.nn.attention.varlen import varlen_attn

    def call(tensors: Tensors) -> torch.Tensor:
        starts = (tensors.cu_seqlens_q, tensors.cu_seqlens_kv)
        query = tensors.query.flatten(0, 1)
        out = varlen_attn(query, tensors.packed_key, tensors.packed_value, *starts, row.seqlen, row.kv_len)
        return out.view(tensors.query.shape)

    return call


def flash_attention(row: Row, function: Callable) -> Contestant:
    """flash_attn_func of FlashAttention-3 or -4, on [B, S, H, D]."""
    window = {"window_size": (row.window, 0)} if row.window >= 0 else {}

    def call(tensors: Tensors) -> torch.Tensor:
        result = function(tensors.query, tensors.key, tensors.value, causal=row.is_causal, **window)
        return result[0] if isinstance(result, tuple) else result

    return call


def flash_attention_varlen(row: Row, function: Callable) -> Contestant:
    """flash_attn_varlen_func of FlashAttention-3 or -4, on packed sequences."""

    def call(tensors: Tensors) -> torch.Tensor:
        result = function(
            tensors.query.flatten(0, 1),
            tensors.packed_key,
            tensors.packed_value,
            cu_seqlens_q=tensors.cu_seqlens_q,
            cu_seqlens_k=tensors.cu_seqlens_kv,
            max_seqlen_q=row.seqlen,
            max_seqlen_k=row.kv_len,
        )
        result = result[0] if isinstance(result, tuple) else result
        return result.view(tensors.query.shape)

    return call


def _flash_attention_modules() -> dict[str, object]:
    """The modules of FlashAttention-3 and -4, those that are installed."""
    found: dict[str, object] = {}
    with contextlib.suppress(ImportError):
        import fa3_fwd_interface

        found["FA3"] = fa3_fwd_interface
    with contextlib.suppress(ImportError):
        import flash_attn.cute

        found["FA4"] = flash_attn.cute
    return found


def _half_precision(row: Row) -> dict[str, Contestant]:
    found: dict[str, Contestant] = {}
    if row.window < 0 and not (row.is_causal and row.kv_len != row.seqlen):
        # The memory-efficient backend is of interest only where the others refuse.
        found |= {name: sdpa(row, backend) for name, backend in BACKENDS.items() if row.mask or name != "efficient"}
    has_lengths = row.mask in ("lengths", "mask")
    if has_lengths:
        with contextlib.suppress(ImportError):
            found["FA2 varlen"] = varlen_of_torch(row)
    for name, module in _flash_attention_modules().items():
        if not row.mask:
            found[name] = flash_attention(row, module.flash_attn_func)
        elif has_lengths and hasattr(module, "flash_attn_varlen_func"):
            found[f"{name} varlen"] = flash_attention_varlen(row, module.flash_attn_varlen_func)
    if row.unfused:
        found["unfused"] = unfused(row, allow_tf32=False)
    return found


def _float32(row: Row) -> dict[str, Contestant]:
    efficient = BACKENDS["efficient"]
    return {
        "unfused TF32": unfused(row, allow_tf32=True),
        "unfused float32": unfused(row, allow_tf32=False),
        "efficient TF32": sdpa(row, efficient, allow_tf32=True),
        "efficient float32": sdpa(row, efficient),
    }


def contestants(row: Row) -> dict[str, Contestant]:
    """The row's peers by name. Whether each can run the row shows when it is called."""
    return _float32(row) if row.dtype == "float32" else _half_precision(row)
