# SPDX-License-Identifier: Apache-2.0
"""The operator as PyTorch ops, faplugin::attention and faplugin::attention_backward, and attend(), differentiable.

Tensors are [B, S, H, D]. The ops have shapes for torch.compile; the autograd.Function stands outside of them, which
costs a third of what an autograd formula of a custom op does.
"""

from __future__ import annotations

from typing import Any

import torch

import faplugin

LAYOUTS = {"query_layout": "BSHD", "key_layout": "BSHD", "value_layout": "BSHD"}
# The optional arguments of the ops, in their order, as faplugin.attention and the operator in a file call them:
# tensors that may have a gradient, other tensors, and what is no tensor.
DIFFERENTIATED = ("attn_bias", "sinks")
EXTRAS = ("attn_mask", "alibi_slopes", "query_lengths", "nonpad_kv_seqlen", "cu_seqlens_q", "cu_seqlens_kv")
SETTINGS = {
    "scale": "float",
    "softcap": "float",
    "is_causal": "bool",
    "left_window_size": "int",
    "right_window_size": "int",
    "alignment": "str",
}
OPTIONAL = (*DIFFERENTIATED, *EXTRAS)
_INPUTS = ", ".join(
    [
        *(f"Tensor {name}" for name in ("query", "key", "value")),
        *(f"Tensor? {name}" for name in OPTIONAL),
        *(f"{kind} {name}" for name, kind in SETTINGS.items()),
    ]
)

_library = torch.library.Library("faplugin", "DEF")
_library.define(f"attention({_INPUTS}) -> (Tensor, Tensor)")
_library.define(f"attention_output({_INPUTS}) -> Tensor")  # what tracing for an export sees
_library.define(
    "attention_backward(Tensor d_output, Tensor? d_lse, Tensor output, Tensor lse, bool d_bias, bool d_sinks, "
    f"int packed, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _arguments(*optional: Any) -> dict[str, Any]:
    """The arguments of faplugin.attention besides query, key and value."""
    tensors = zip(OPTIONAL, optional[: len(OPTIONAL)], strict=True)
    return {
        **LAYOUTS,
        **{name: tensor for name, tensor in tensors if tensor is not None},
        **dict(zip(SETTINGS, optional[len(OPTIONAL) :], strict=True)),
        "num_threads": torch.get_num_threads(),
    }


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a contiguous last axis: other strides are read in place."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _forward(query: Any, key: Any, value: Any, *optional: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return faplugin.attention(_rows(query), _rows(key), _rows(value), return_lse=True, **_arguments(*optional))


def _forward_output(*inputs: Any) -> torch.Tensor:
    return _forward(*inputs)[0]


def _forward_shapes(query: Any, key: Any, value: Any, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, rows, heads, _head_dim = query.shape
    lse = query.new_empty((batch, heads, rows), dtype=torch.float32)
    return query.new_empty((batch, rows, heads, value.shape[-1])), lse


def _backward(
    d_output: Any, d_lse: Any, output: Any, lse: Any, d_bias: bool, d_sinks: bool, packed: int, *inputs: Any
) -> tuple[torch.Tensor, ...]:
    query, key, value, *optional = inputs
    results = _backward_shapes(d_output, d_lse, output, lse, d_bias, d_sinks, packed, *inputs)
    out = dict(zip(("query", "key", "value"), _unpacked(results[:3], packed), strict=True))
    out |= {"attn_bias": results[3]} if d_bias else {}
    out |= {"sinks": results[4]} if d_sinks else {}
    faplugin.attention_backward(
        d_output.contiguous(),
        output,
        lse,
        _rows(query),
        _rows(key),
        _rows(value),
        d_lse=None if d_lse is None else d_lse.contiguous(),
        out=out,
        **_arguments(*optional),
    )
    return results


def _unpacked(gradients: Any, packed: int) -> Any:
    """Of the gradients of query, key and value, or of what they are packed in, those of each."""
    if packed == 3:
        return gradients[0].unbind(2)
    return (gradients[0], *gradients[1].unbind(2)) if packed == 2 else gradients


def _backward_shapes(
    d_output: Any, d_lse: Any, output: Any, lse: Any, d_bias: bool, d_sinks: bool, packed: int, *inputs: Any
) -> tuple[torch.Tensor, ...]:
    query, key, value, bias, sinks = inputs[:5]

    def empty(*shape: int, dtype: torch.dtype = query.dtype) -> torch.Tensor:
        return query.new_empty(shape, dtype=dtype)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        return empty(*tensor.shape[:2], packed, *tensor.shape[2:])

    if packed == 3:
        operands = (pack(query), empty(0), empty(0))
    elif packed == 2:
        operands = (empty(*query.shape), pack(key), empty(0))
    else:
        operands = (empty(*query.shape), empty(*key.shape), empty(*value.shape))
    return (
        *operands,
        empty(*(bias.shape if d_bias else (0,)), dtype=torch.float32),
        empty(*(sinks.shape if d_sinks else (0,)), dtype=torch.float32),
    )


for _device in ("CPU", "CUDA"):
    _library.impl("attention", _forward, _device)
    _library.impl("attention_output", _forward_output, _device)
    _library.impl("attention_backward", _backward, _device)
torch.library.register_fake("faplugin::attention", _forward_shapes, lib=_library)
torch.library.register_fake("faplugin::attention_backward", _backward_shapes, lib=_library)


class _Attention(torch.autograd.Function):
    """`packed`: 3 where query, key and value are parts of the first tensor, 2 where key and value are of the second."""

    @staticmethod
    def forward(ctx: Any, packed: int, query: Any, key: Any, value: Any, bias: Any, sinks: Any, *rest: Any) -> Any:
        operands = _unpacked((query, key, value), packed)
        output, lse = torch.ops.faplugin.attention(*operands, bias, sinks, *rest)
        ctx.save_for_backward(query, key, value, bias, sinks, output, lse, *rest[: len(EXTRAS)])
        ctx.packed, ctx.settings = packed, rest[len(EXTRAS) :]
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_output: Any, d_lse: Any) -> Any:
        query, key, value, bias, sinks, output, lse, *extras = ctx.saved_tensors
        if d_output is None:
            d_output = torch.zeros_like(output)
        wants_bias, wants_sinks = ctx.needs_input_grad[4], ctx.needs_input_grad[5]
        operands = _unpacked((query, key, value), ctx.packed)
        *d_operands, d_bias, d_sinks = torch.ops.faplugin.attention_backward(
            d_output, d_lse, output, lse, wants_bias, wants_sinks, ctx.packed, *operands, bias, sinks, *extras,
            *ctx.settings,
        )  # fmt: skip
        given = (query, key, value)
        d_operands = [d if tensor is not None else None for d, tensor in zip(d_operands, given, strict=True)]
        d_bias = d_bias.to(bias.dtype) if wants_bias else None
        return None, *d_operands, d_bias, d_sinks if wants_sinks else None, *[None] * (len(EXTRAS) + len(SETTINGS))


def attend(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    *,
    packed: int = 0,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    query_lengths: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_kv: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    alignment: str = "bottom_right",
    return_lse: bool = False,
) -> Any:
    """Attention with gradients for query, key, value, bias and sinks.

    Args:
        query: float32, float16 or bfloat16 [B, S_q, H_q, D]; with `packed` 3: [B, S, 3, H, D], query, key and value.
        key: [B, S_kv, H_kv, D]; with `packed` 2: [B, S_kv, 2, H_kv, D], key and value; with 3: None.
        value: [B, S_kv, H_kv, D_v]; None with `packed`.
        packed: 0, 2 or 3. Gradients have the form of what is packed; nothing is copied.
        bias: float, broadcastable to [B, H_q, S_q, S_kv], added after softcap.
        sinks: [H_q], a logit without a value in each row's softmax; computed in float32.
        mask: bool, True = attend, broadcastable to [B, H_q, S_q, S_kv].
        alibi_slopes: float32 [H_q] or [B, H_q]; they get no gradient.
        query_lengths: int32 or int64 [B], rows in use; the others' outputs are 0.
        kv_lengths: int32 or int64 [B], keys in use.
        cu_seqlens_q: int32 [sequences + 1], packed sequences in a batch of 1.
        cu_seqlens_kv: int32 [sequences + 1].
        scale: multiplies Q Kᵀ; None: 1/√D.
        softcap: scores become softcap · tanh(score / softcap); 0 is none.
        causal: key j is visible to position p when j <= p.
        window: keys visible before and after the own position, -1 unbounded.
        alignment: position of the first query: "bottom_right" or "top_left".
        return_lse: return (output, lse), lse being the natural log-sum-exp, float32 [B, H_q, S_q]. Not in an export.

    Returns:
        The output [B, S_q, H_q, D_v], dtype of query.

    Raises:
        ValueError, RuntimeError: as faplugin.attention and faplugin.attention_backward.
    """
    if scale == 0:
        raise ValueError("scale is 0; expected another number, or None for 1/√D")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (None if t is None else t.to(dtype) for t in (query, key, value))
    sinks = None if sinks is None else sinks.float()
    extras = (mask, alibi_slopes, query_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv)
    head_dim = query.shape[-1]
    settings = (head_dim**-0.5 if scale is None else float(scale), float(softcap), bool(causal), *window, alignment)
    if torch.onnx.is_in_onnx_export():
        from ._export import exported

        if return_lse:
            raise RuntimeError("the log-sum-exp is wanted during an ONNX export; expected a call for the output alone")
        query, key, value = _unpacked((query, key, value), packed)
        return exported(query, key, value, bias, sinks, extras, settings)
    output, lse = _Attention.apply(packed, query, key, value, bias, sinks, *extras, *settings)
    return (output, lse) if return_lse else output
