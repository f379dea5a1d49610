# SPDX-License-Identifier: Apache-2.0
"""FlashAttention for PyTorch: forward and backward, with flash-attn's functions, in transformers, and in exports.

    from faplugin.torch import flash_attn_func
    output = flash_attn_func(query, key, value, causal=True)      # [B, S, H, D], differentiable

    faplugin.torch.register_transformers()                        # attn_implementation="faplugin"
    torch.onnx.export(model, …)                                   # writes faexport::FlashAttention nodes

On CUDA the backward pass takes heads of up to 256 columns. See docs/torch.md.
"""

from faplugin.torch._functions import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from faplugin.torch._op import attend
from faplugin.torch._sdpa import activate_sdpa
from faplugin.torch._transformers import register_transformers

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
