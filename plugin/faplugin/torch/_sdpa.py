# SPDX-License-Identifier: Apache-2.0
"""The operator behind torch.nn.functional.scaled_dot_product_attention on the CPU."""

from __future__ import annotations

from typing import Any

import torch

from ._op import _backward, _forward

_OP = "_scaled_dot_product_flash_attention_for_cpu"
_active: list[torch.library.Library] = []


def _settings(query: torch.Tensor, dropout_p: float, is_causal: bool, scale: float | None) -> tuple:
    if dropout_p != 0:
        raise ValueError(f"dropout_p is {dropout_p}; expected 0 while faplugin computes attention")
    return (query.shape[-1] ** -0.5 if scale is None else scale, 0.0, is_causal, -1, -1, "top_left")


def _operands(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


def _masks(attn_mask: torch.Tensor | None) -> tuple[Any, Any]:
    """As a bias or as a mask."""
    is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
    return (None, attn_mask) if is_bool else (attn_mask, None)


def _sdpa(
    query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False, *,
    attn_mask: Any = None, scale: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    bias, mask = _masks(attn_mask)
    settings = _settings(query, dropout_p, is_causal, scale)
    output, lse = _forward(*_operands(query, key, value), bias, None, mask, *[None] * 5, *settings)
    return output.transpose(1, 2), lse


def _sdpa_backward(
    d_output: Any, query: Any, key: Any, value: Any, output: Any, lse: Any, dropout_p: float, is_causal: bool, *,
    attn_mask: Any = None, scale: Any = None
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    bias, mask = _masks(attn_mask)
    settings = _settings(query, dropout_p, is_causal, scale)
    d_output, output, query, key, value = _operands(d_output, output, query, key, value)
    inputs = (query, key, value, bias, None, mask, *[None] * 5, *settings)
    gradients = _backward(d_output, None, output.contiguous(), lse.contiguous(), False, False, 0, *inputs)
    return tuple(gradient.transpose(1, 2) for gradient in gradients[:3])


def activate_sdpa(active: bool = True) -> None:
    """Makes F.scaled_dot_product_attention compute with the operator wherever PyTorch takes its fused CPU kernel.

    Args:
        active: False: PyTorch's own kernel again.
    """
    while _active:
        _active.pop()._destroy()
    if not active:
        return
    library = torch.library.Library("aten", "IMPL")
    _active.append(library)
    library.impl(_OP, _sdpa, "CPU", allow_override=True)
    library.impl(f"{_OP}_backward", _sdpa_backward, "CPU", allow_override=True)
