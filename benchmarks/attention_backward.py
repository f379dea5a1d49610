# SPDX-License-Identifier: Apache-2.0
"""Contestants of the backward pass: the operator, each of its kernels, PyTorch's SDPA backends, FlashAttention-4. In
float32 the operator in both precisions, and PyTorch's memory-efficient backend and unfused graph with and without TF32.

Timed is the backward pass alone, after a forward pass that is done once, or both, by the row. FlashAttention-4 compiles
for most of a minute; benchmarks/compile_fa4.py does that ahead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import attention_peers
import faplugin
import torch
from attention_rows import Row, Tensors
from attention_torch import PRECISIONS
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

KERNELS = ("backward_sm90", "backward_sm80")  # ours, forced
LAYOUTS = {f"{name}_layout": "BSHD" for name in ("query", "key", "value")}
OPERANDS = ("query", "key", "value")
Gradients = tuple[torch.Tensor, ...]  # of query, key, value and the bias, where the row has one
Contestant = Callable[[Tensors], Gradients]
Forward = Callable[[Gradients], torch.Tensor]  # of the operands, to the output [B, S, H, D]


def operands_of(tensors: Tensors) -> Gradients:
    bias = () if tensors.bias is None else (tensors.bias,)
    return tensors.query, tensors.key, tensors.value, *bias


def ours(row: Row, kernel: str = "", **attributes: str) -> Contestant:
    """By faplugin.attention and faplugin.attention_backward, into memory that is there."""
    kept: dict[int, tuple[dict, dict]] = {}
    options = {"is_causal": row.is_causal, "left_window_size": row.window, **LAYOUTS, **attributes}

    def call(tensors: Tensors) -> Gradients:
        query, key, value, *bias = operands_of(tensors)
        arguments = options | ({"attn_bias": bias[0]} if bias else {})

        def forward(out: dict | None) -> dict:
            found = faplugin.attention(query, key, value, return_lse=True, out=out, **arguments)
            return dict(zip(("output", "lse"), found, strict=True))

        if id(tensors) not in kept:
            memory = {name: torch.empty_like(t) for name, t in zip(OPERANDS, (query, key, value), strict=True)}
            memory |= {"attn_bias": torch.empty_like(bias[0], dtype=torch.float32)} if bias else {}
            kept[id(tensors)] = (forward(None), memory)
        results, memory = kept[id(tensors)]
        if row.both:
            forward(results)
        before = (tensors.d_out, results["output"], results["lse"])
        found = faplugin.attention_backward(*before, query, key, value, out=memory, kernel=kernel, **arguments)
        return tuple(found.values())

    return call


def by_autograd(row: Row, forward: Forward, allow_tf32: bool = False) -> Contestant:
    kept: dict[int, tuple] = {}

    def call(tensors: Tensors) -> Gradients:
        if id(tensors) not in kept:
            leaves = tuple(t.detach().requires_grad_() for t in operands_of(tensors))
            kept[id(tensors)] = (leaves, None if row.both else forward(leaves))
        leaves, output = kept[id(tensors)]
        output = forward(leaves) if row.both else output
        with attention_peers.tf32(allow_tf32):
            return torch.autograd.grad(output, leaves, tensors.d_out, retain_graph=not row.both)

    return call


def sdpa(row: Row, name: str) -> Contestant:
    def forward(leaves: Gradients) -> torch.Tensor:
        query, key, value, *bias = leaves
        operands = (t.transpose(1, 2) for t in (query, key, value))
        options = {"attn_mask": bias[0] if bias else None, "is_causal": row.is_causal}
        with sdpa_kernel(attention_peers.BACKENDS[name]):
            return scaled_dot_product_attention(*operands, **options).transpose(1, 2)

    return by_autograd(row, forward)


def in_float32(row: Row) -> dict[str, Contestant]:
    """PyTorch's contestants of the forward pass, differentiated."""

    def differentiated(contestant: attention_peers.Contestant, allow_tf32: bool) -> Contestant:
        def forward(leaves: Gradients) -> torch.Tensor:
            query, key, value, *bias = leaves
            return contestant(Tensors(query, key, value, out=query, bias=bias[0] if bias else None))

        return by_autograd(row, forward, allow_tf32)

    peers = attention_peers.contestants(row)
    found = {f"ours {precision}": ours(row, float32_precision=precision) for precision in PRECISIONS}
    return found | {name: differentiated(peer, name.endswith("TF32")) for name, peer in peers.items()}


def fa4(row: Row, function: Callable) -> Contestant:
    window = {"window_size": (row.window, 0)} if row.window >= 0 else {}

    def forward(leaves: Gradients) -> torch.Tensor:
        found = function(*leaves, causal=row.is_causal, **window)
        return found[0] if isinstance(found, tuple) else found

    return by_autograd(row, forward)


def contestants(row: Row, tensors: Tensors, wanted: set[str]) -> dict[str, Contestant]:
    """By name, those wanted (all where empty). Whether each can run the row shows when it is called."""
    if row.dtype == "float32":
        return {name: call for name, call in in_float32(row).items() if not wanted or name in wanted}
    found: dict[str, Contestant] = {"ours": ours(row)} | {kernel: ours(row, kernel) for kernel in KERNELS}
    if row.window < 0:  # PyTorch has no argument for it
        found |= {name: sdpa(row, name) for name in (("FA2", "cuDNN", "efficient") if row.mask else ("FA2", "cuDNN"))}
    if not row.mask:
        with contextlib.suppress(ImportError):
            import flash_attn.cute

            found["FA4"] = fa4(row, flash_attn.cute.flash_attn_func)
    return {name: call for name, call in found.items() if not wanted or name in wanted}


def _hidden(row: Row) -> torch.Tensor:
    """bool [S, S]"""
    places = torch.arange(row.seqlen, device="cuda")
    distance = places[:, None] - places[None]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    hidden |= (distance < 0) if row.is_causal else hidden
    return hidden | (distance > row.window) if row.window >= 0 else hidden


def relative_error(row: Row, tensors: Tensors, found: Gradients) -> float:
    """The largest of the gradients' ||d - d64|| / ||d64||, of the last head: of the first batch entry, and of the bias,
    which all entries share."""
    hidden, wanted, got = _hidden(row), [], []
    bias = None if tensors.bias is None else tensors.bias[0, -1].double().requires_grad_()
    d_bias = 0.0
    for entry in range(1 if bias is None else row.batch_size):
        operands = (tensors.query, tensors.key, tensors.value)
        leaves = [t[entry, :, -1].double().requires_grad_() for t in operands] + ([] if bias is None else [bias])
        query, key, value = leaves[:3]
        scores = query @ key.T * row.head_dim**-0.5 + (0.0 if bias is None else bias)
        output = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value
        gradients = torch.autograd.grad(output, leaves, tensors.d_out[entry, :, -1].double())
        d_bias += 0.0 if bias is None else gradients[3]
        if entry == 0:
            wanted, got = list(gradients[:3]), [d[0, :, -1] for d in found[:3]]
    if bias is not None:
        wanted.append(d_bias)
        got.append(found[3][0, -1])
    pairs = zip(got, wanted, strict=True)
    return max(((d.double() - w).norm() / w.norm()).item() for d, w in pairs)
