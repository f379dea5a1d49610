# SPDX-License-Identifier: Apache-2.0
"""FlashAttention for PyTorch: forward and backward, with flash-attn's functions, in transformers, and in exports.

    from faplugin.torch import flash_attn_func
    output = flash_attn_func(query, key, value, causal=True)      # [B, S, H, D], differentiable

    faplugin.torch.register_transformers()                        # attn_implementation="faplugin"
    torch.onnx.export(model, …)                                   # writes faexport::FlashAttention nodes

On CUDA the backward pass takes float16 and bfloat16. See docs/torch.md.
"""

from ._functions import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from ._op import attend
from ._sdpa import activate_sdpa
from ._transformers import register_transformers

__all__ = [
    "activate_sdpa",
    "attend",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "register_transformers",
]
