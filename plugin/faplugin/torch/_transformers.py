# SPDX-License-Identifier: Apache-2.0
"""The operator as an attention implementation of Hugging Face transformers, under the name "faplugin"."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from faplugin.torch._op import attend

NAME = "faplugin"
# Arguments of single models' attention by which eager attention gives something else: a selection of keys (DeepSeek
# V3.2, MiniMax M3), a sink for each row (Inkling 2), factors of heads in older versions.
_REFUSED = ("indices", "block_indices", "sinks", "head_mask")


def register_transformers() -> None:
    """Makes `attn_implementation="faplugin"` known to transformers, for training and inference.

    Padding, sliding windows, packed sequences, softcap, sinks and position biases are computed by the operator; a
    causal mask or a window is not made into a tensor. Attention dropout is refused while training.

    A model that computes attention itself, past transformers' interface (Bloom, MPT, XGLM …), is refused when it asks
    for its mask.

    Raises:
        ImportError: transformers is not installed, or older than 4.56, which has no interface for masks.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(
    batch_size: int,
    q_length: Any = None,
    kv_length: int = 0,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Any = None,
    config: Any = None,
    **arguments: Any,
) -> Any:
    """None or the padding, bool [B, at least S_kv], where the mask is causal, a window or none, which the operator
    knows. The last S_kv columns are those of the keys: generate() hands this result in again, where a window's cache
    has dropped the first keys.

    Else all of the mask function, bool [B, 1, S_q, S_kv].
    """
    from transformers import masking_utils

    if config is not None and (why := _own_attention(type(config).__module__, type(config).__name__)):
        raise ValueError(why)
    causal, both = masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
    mask_function = causal if mask_function is None else mask_function
    is_known = not isinstance(q_offset, torch.Tensor) and q_length is not None
    is_last = is_known and q_offset + q_length == kv_offset + kv_length  # is the last query at the last key?
    if mask_function is both or (is_last and (mask_function is causal or _is_window(mask_function, causal))):
        padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if padding is None:
            return None
        return padding[:, : kv_offset + kv_length].bool()
    arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return masking_utils.sdpa_mask(
        batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, config=config, **arguments,
    )  # fmt: skip


@functools.cache
def _own_attention(module: str, config: str) -> str:
    """Why a model with such a configuration can't use the implementation: its file doesn't know the interface that
    attention_forward is registered with, and would apply our mask in a way of its own. "" where it can."""
    modeling = sys.modules.get(module.replace("configuration_", "modeling_"))
    if modeling is None or hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        return ""
    models = [kind for kind in vars(modeling).values() if isinstance(kind, type)]
    if any(getattr(kind, "_supports_sdpa", False) for kind in models):  # it hands attention on to another model
        return ""
    return (
        f"a model with {config} computes attention itself, not by transformers' attention interface; expected "
        f'attn_implementation="eager" in place of "{NAME}"'
    )


def _is_window(mask_function: Any, causal: Any) -> bool:
    """Is it transformers' causal mask and a sliding window over it, and nothing besides?"""
    cells = [cell.cell_contents for cell in (mask_function.__closure__ or ())]
    parts = [part for cell in cells if isinstance(cell, tuple) for part in cell]
    names = [getattr(part, "__qualname__", "") for part in parts if part is not causal]
    return (
        mask_function.__qualname__.startswith("and_masks")
        and len(parts) == 2
        and causal in parts
        and names[0].startswith("sliding_window_overlay")
    )


def attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [B, H_q, S_q, D], key and value [B, H_kv, S_kv, D].

    Returns:
        The output [B, S_q, H_q, D_v], and no weights.
    """
    if dropout != 0 and module.training:
        raise ValueError(f"attention dropout is {dropout}; expected 0: the faplugin implementation has no dropout")
    for name in _REFUSED:
        if others.get(name) is not None:
            raise ValueError(f"{name} is given; expected None: the faplugin implementation doesn't compute with it")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    mask, bias, window = None, position_bias, (-1, -1)
    if attention_mask is not None and attention_mask.ndim == 4:  # it says all, causality too
        causal = False
        if attention_mask.dtype == torch.bool:
            mask = attention_mask
        else:
            bias = attention_mask if bias is None else bias + attention_mask
    else:
        mask = None if attention_mask is None else attention_mask[:, None, None, -key.shape[2] :].bool()
        if sliding_window is not None and key.shape[2] > sliding_window:
            window = (sliding_window - 1, -1 if causal else sliding_window - 1)
    output = attend(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask=mask, bias=bias, sinks=s_aux,
        scale=scaling, softcap=softcap or 0.0, causal=bool(causal), window=window,
    )  # fmt: skip
    return output, None
