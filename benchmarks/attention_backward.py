# SPDX-License-Identifier: Apache-2.0
"""Contestants of the backward pass: the operator, each of its backward kernels, and PyTorch's SDPA backends.

Timed is the backward pass alone: the forward pass of each set of tensors is done once, before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable

import attention_peers
import faplugin
import torch
from attention_rows import Row, Tensors
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

KERNELS = ("backward_sm90", "backward_sm80")  # ours, forced
LAYOUTS = {f"{name}_layout": "BSHD" for name in ("query", "key", "value")}
Gradients = tuple[torch.Tensor, ...]
Contestant = Callable[[Tensors], Gradients]


def ours(row: Row, kernel: str = "") -> Contestant:
    results: dict[int, tuple] = {}

    def call(tensors: Tensors) -> Gradients:
        operands = (tensors.query, tensors.key, tensors.value)
        if id(tensors) not in results:
            forward = faplugin.attention(*operands, is_causal=row.is_causal, return_lse=True, **LAYOUTS)
            memory = {n: torch.empty_like(t) for n, t in zip(("query", "key", "value"), operands, strict=True)}
            results[id(tensors)] = (*forward, memory)
        output, lse, out = results[id(tensors)]
        arguments = {"is_causal": row.is_causal, "out": out, "kernel": kernel, **LAYOUTS}
        return tuple(faplugin.attention_backward(tensors.d_out, output, lse, *operands, **arguments).values())

    return call


def sdpa(row: Row, name: str) -> Contestant:
    results: dict[int, tuple] = {}

    def call(tensors: Tensors) -> Gradients:
        if id(tensors) not in results:
            leaves = [t.detach().requires_grad_() for t in (tensors.query, tensors.key, tensors.value)]
            with sdpa_kernel(attention_peers.BACKENDS[name]):
                output = scaled_dot_product_attention(*(t.transpose(1, 2) for t in leaves), is_causal=row.is_causal)
            results[id(tensors)] = (output.transpose(1, 2), leaves)
        output, leaves = results[id(tensors)]
        return torch.autograd.grad(output, leaves, tensors.d_out, retain_graph=True)

    return call


def contestants(row: Row, tensors: Tensors, wanted: set[str]) -> dict[str, Contestant]:
    """By name, those wanted (all where empty). Whether each can run the row shows when it is called."""
    found: dict[str, Contestant] = {"ours": ours(row)} | {kernel: ours(row, kernel) for kernel in KERNELS}
    found |= {name: sdpa(row, name) for name in ("FA2", "cuDNN")}
    return {name: call for name, call in found.items() if not wanted or name in wanted}


def relative_error(row: Row, tensors: Tensors, found: Gradients) -> float:
    """The largest of the three gradients' ||d - d64|| / ||d64||, of the last head of the first batch entry."""
    leaves = [t[0, :, -1].double().requires_grad_() for t in (tensors.query, tensors.key, tensors.value)]
    query, key, value = leaves
    scores = query @ key.T * row.head_dim**-0.5
    if row.is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    want = torch.autograd.grad(scores.softmax(-1) @ value, leaves, tensors.d_out[0, :, -1].double())
    pairs = zip(found, want, strict=True)
    return max(((d[0, :, -1].double() - w).norm() / w.norm()).item() for d, w in pairs)
