# SPDX-License-Identifier: Apache-2.0
"""The operator behind torch.nn.functional.scaled_dot_product_attention on the CPU."""

from __future__ import annotations

from typing import Any

import torch

from faplugin.torch._call import EXTRAS, backward, forward, scale_of

_OP = "_scaled_dot_product_flash_attention_for_cpu"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NO_MORE = [None] * (len(EXTRAS) - 1)  # extras besides the mask, which is the first
_active: list[torch.library.Library] = []
_replaced: dict[str, Any] = {}  # PyTorch's kernels, for what is not taken


def _is_taken(query: torch.Tensor, scale: float | None) -> bool:
    """A scale of 0 is the operator's word for 1/√D."""
    return query.dtype in _DTYPES and scale != 0


def _by_pytorch(name: str, *arguments: Any, **keywords: Any) -> Any:
    return _replaced[name].call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *arguments, **keywords)


def _settings(query: torch.Tensor, dropout_p: float, is_causal: bool, scale: float | None) -> tuple:
    if dropout_p != 0:
        raise ValueError(f"dropout_p is {dropout_p}; expected 0 while faplugin computes attention")
    return (scale_of(query, scale), 0.0, is_causal, -1, -1, "top_left")


def _operands(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def _masks(attn_mask: torch.Tensor | None) -> tuple[Any, Any]:
    """As a bias or as a mask."""
    is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
    return (None, attn_mask) if is_bool else (attn_mask, None)


def _sdpa(
    query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False, *,
    attn_mask: Any = None, scale: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    if not _is_taken(query, scale):
        return _by_pytorch(_OP, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
    bias, mask = _masks(attn_mask)
    settings = _settings(query, dropout_p, is_causal, scale)
    output, lse = forward(_operands(query, key, value), (bias, None, mask, *_NO_MORE), settings)
    return output.transpose(1, 2), lse


def _sdpa_backward(
    d_output: Any, query: Any, key: Any, value: Any, output: Any, lse: Any, dropout_p: float, is_causal: bool, *,
    attn_mask: Any = None, scale: Any = None
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    if not _is_taken(query, scale):
        given = (d_output, query, key, value, output, lse, dropout_p, is_causal)
        return _by_pytorch(f"{_OP}_backward", *given, attn_mask=attn_mask, scale=scale)
    bias, mask = _masks(attn_mask)
    settings = _settings(query, dropout_p, is_causal, scale)
    d_output, output, *operands = _operands(d_output, output, query, key, value)
    optional = (bias, None, mask, *_NO_MORE)
    before = (d_output, None, output.contiguous(), lse.contiguous(), False, False, 0)
    gradients = backward(*before, tuple(operands), optional, settings)
    return tuple(gradient.transpose(1, 2) for gradient in gradients[:3])


def activate_sdpa(active: bool = True) -> None:
    """Makes F.scaled_dot_product_attention compute with the operator wherever PyTorch takes its fused CPU kernel, in
    float32, float16 and bfloat16, with a scale other than 0. It is for eager mode: results have strides of their own.

    Args:
        active: False: PyTorch's own kernel again.
    """
    while _active:
        _active.pop()._destroy()
    if not active:
        return
    for name in (_OP, f"{_OP}_backward"):
        _replaced[name] = torch.library.get_kernel(f"aten::{name}", "CPU")
    library = torch.library.Library("aten", "IMPL")
    _active.append(library)
    library.impl(_OP, _sdpa, "CPU", allow_override=True)
    library.impl(f"{_OP}_backward", _sdpa_backward, "CPU", allow_override=True)
