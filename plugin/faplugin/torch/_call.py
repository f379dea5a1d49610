# SPDX-License-Identifier: Apache-2.0
"""Both passes on PyTorch tensors that have memory, by the compiled library; results are PyTorch's memory."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch

from faplugin._exchange import run
from faplugin._frameworks import refuse_negative_bit
from faplugin._native import Node

LAYOUTS = {"query_layout": "BSHD", "key_layout": "BSHD", "value_layout": "BSHD"}
# The optional arguments of a call, in their order, as the operator calls them: tensors that may have a gradient, other
# tensors, and what is no tensor.
DIFFERENTIATED = ("attn_bias", "sinks")
EXTRAS = ("attn_mask", "alibi_slopes", "query_lengths", "nonpad_kv_seqlen", "cu_seqlens_q", "cu_seqlens_kv")
OPTIONAL = (*DIFFERENTIATED, *EXTRAS)
ABSENT = (None,) * len(OPTIONAL)
SETTINGS = {
    "scale": "float",
    "softcap": "float",
    "is_causal": "bool",
    "left_window_size": "int",
    "right_window_size": "int",
    "alignment": "str",
}
Tensors = tuple[Any, ...]  # of tensors and None


@functools.lru_cache(maxsize=256)
def _node(given: tuple[str, ...], settings: tuple, outputs: str) -> Node:
    """With inputs beside query, key and value, and outputs beside the first."""
    named = dict(zip(SETTINGS, settings, strict=True))
    return Node({**LAYOUTS, **named, "optional_inputs": ",".join(given), "optional_outputs": outputs})


def _inputs(
    operands: Tensors, optional: Tensors, settings: tuple, outputs: str = "lse"
) -> tuple[Node, list[torch.Tensor]]:
    inputs = [rows(tensor) for tensor in operands]
    given: tuple[str, ...] = ()
    if optional is not ABSENT:
        given = tuple(name for name, tensor in zip(OPTIONAL, optional, strict=True) if tensor is not None)
        inputs += [_stored(tensor) for tensor in optional if tensor is not None]
    return _node(given, settings, outputs), inputs


def scale_of(query: torch.Tensor, scale: float | None) -> float:
    """The scale of a call: 1/√D where none is given (heads of no columns are refused later)."""
    if scale is not None:
        return float(scale)
    size = query.shape[-1]
    if type(size) is torch.Tensor:  # in a trace of torch.onnx
        with warnings.catch_warnings():  # that the trace has this size as a number: a model's heads have one size
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            size = int(size)
    return max(size, 1) ** -0.5


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its numbers in memory, as DLPack's C exchange API takes it to be: PyTorch may have the negative
    ones there (the imaginary part of a conjugate)."""
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a contiguous last axis: other strides are read in place."""
    tensor = _stored(tensor)
    # The first question is the one that PyTorch answers fastest.
    if tensor.is_contiguous() or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


def empty_like(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Row-major memory."""
    if dtype is None and tensor.is_contiguous():  # the shortest way
        return torch.empty_like(tensor)
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _result(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Memory for the output."""
    shape = query.shape
    if len(shape) != 4:
        raise ValueError(f"query has {len(shape)} axes; expected 4: batch, rows, heads, head_dim")
    if query.element_size() == 1:  # the operator takes float8, but its gradients and its output are of another type
        raise ValueError(f"query is {str(query.dtype).removeprefix('torch.')}; expected float32, float16 or bfloat16")
    head_dim_v = value.shape[-1]
    if head_dim_v == 0:  # also without a log-sum-exp, beside which the operator refuses it
        raise ValueError("value has head_dim 0; expected at least 1")
    return empty_like(query) if head_dim_v == shape[3] else query.new_empty((*shape[:3], head_dim_v))


def results(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for the output and the log-sum-exp."""
    output = _result(query, value)
    batch, length, heads, _ = query.shape
    return output, query.new_empty((batch, heads, length), dtype=torch.float32)


def operand_gradients(operands: Tensors, packed: int) -> Tensors:
    """Memory for the gradients of what was given: None for tensors that are parts of one before them."""

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_empty((*tensor.shape[:2], packed, *tensor.shape[2:]))

    query, key, value = operands
    if packed == 3:
        return pack(query), None, None
    if packed == 2:
        return empty_like(query), pack(key), None
    return empty_like(query), empty_like(key), empty_like(value)


def unpacked(tensors: Tensors, packed: int) -> Tensors:
    """Of query, key and value, or of what they are packed in, each."""
    if not packed:
        return tensors
    *apart, whole = tensors[: 4 - packed]
    if whole.dim() != 5 or whole.shape[2] != packed:
        shape = f"[B, S, {packed}, H, D]"
        raise ValueError(
            f"the packed tensor has shape {list(whole.shape)}; expected {shape}, without B in varlen forms"
        )
    return (*apart, *whole.unbind(2))


def forward(operands: Tensors, optional: Tensors, settings: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the log-sum-exp; `operands`: query, key, value; `optional` by OPTIONAL, `settings` by SETTINGS."""
    node, inputs = _inputs(operands, optional, settings)
    outputs = results(operands[0], operands[2])
    run(torch.Tensor, node, inputs, outputs, False, torch.get_num_threads())
    return outputs


def forward_output(operands: Tensors, optional: Tensors, settings: tuple) -> torch.Tensor:
    """The output alone, where nobody wants the log-sum-exp."""
    node, inputs = _inputs(operands, optional, settings, "")
    output = _result(operands[0], operands[2])
    run(torch.Tensor, node, inputs, (output,), False, torch.get_num_threads())
    return output


@functools.lru_cache(maxsize=64)
def _step_node(given: tuple[str, ...], settings: tuple, interleaved: bool) -> Node:
    """Rows are written to a cache in place; with the log-sum-exp."""
    named = {**LAYOUTS, **dict(zip(SETTINGS, settings, strict=True)), "rotary_interleaved": interleaved}
    outputs = "present_key,present_value,lse"
    cache = {"cache": "write", "cache_layout": "BSHD"}
    return Node({**named, **cache, "optional_inputs": ",".join(given), "optional_outputs": outputs})


def step(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, optional: dict[str, torch.Tensor], settings: tuple,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The output and the log-sum-exp of a step that writes to its cache, past_key and past_value of `optional`."""
    output, lse = results(query, value)
    cache = (optional["past_key"], optional["past_value"])
    for name, tensor in zip(("past_key", "past_value"), cache, strict=True):
        refuse_negative_bit(name, tensor)
    inputs = [rows(query), rows(key), rows(value), *map(_stored, optional.values())]
    node = _step_node(tuple(optional), settings, interleaved)
    run(torch.Tensor, node, inputs, (output, *cache, lse), False, torch.get_num_threads())
    torch.autograd.graph.increment_version(cache)
    return output, lse


def backward(
    d_output: torch.Tensor, d_lse: torch.Tensor | None, output: torch.Tensor, lse: torch.Tensor,
    wants_bias: bool, wants_sinks: bool, packed: int,
    operands: Tensors, optional: Tensors, settings: tuple,
) -> Tensors:  # fmt: skip
    """Gradients of what query, key and value are packed in (`operand_gradients`), in float32 of the bias and the sinks;
    None where one isn't wanted."""
    node, inputs = _inputs(operands, optional, settings)
    d_operands = operand_gradients(operands, packed)
    d_bias = empty_like(optional[0], torch.float32) if wants_bias else None
    d_sinks = empty_like(optional[1], torch.float32) if wants_sinks else None
    d_lse = None if d_lse is None else _stored(d_lse).contiguous()
    arrays = (output, lse, _stored(d_output).contiguous(), d_lse, *unpacked(d_operands, packed), d_bias, d_sinks)
    run(torch.Tensor, node, inputs, arrays, True, torch.get_num_threads())
    return *d_operands, d_bias, d_sinks
