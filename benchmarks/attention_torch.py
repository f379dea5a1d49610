# SPDX-License-Identifier: Apache-2.0
"""Contestants on PyTorch tensors: the operator, each of its kernels, and the peers of attention_peers.py."""

from __future__ import annotations

import re

import attention_peers
import faplugin
import torch
from attention_peers import Contestant
from attention_rows import Row, Tensors

PRECISIONS = ("tf32", "tf32x3")  # of float32 products


def _arguments(row: Row, tensors: Tensors) -> dict:
    arguments = {"query_layout": "BSHD", "key_layout": "BSHD", "value_layout": "BSHD", "is_causal": row.is_causal}
    if row.is_causal and row.kv_len != row.seqlen:
        arguments["alignment"] = "bottom_right"
    if row.window >= 0:
        arguments["left_window_size"] = row.window
    if row.mask == "mask":
        arguments["attn_mask"] = tensors.mask
    elif row.mask == "lengths":
        arguments["nonpad_kv_seqlen"] = tensors.lengths
    if tensors.bias is not None:
        arguments["attn_bias"] = tensors.bias
    return arguments


def kernels(row: Row, tensors: Tensors) -> list[str]:
    """Our kernels that can run the row; the first is the one that dispatch takes."""
    text = faplugin.explain(tensors.query, tensors.key, tensors.value, device="cuda", **_arguments(row, tensors))
    return re.findall(r"^(\w+): (?:runs this problem|could run it)", text, re.MULTILINE)


def ours(row: Row, kernel: str = "", **attributes: str) -> Contestant:
    def call(tensors: Tensors) -> torch.Tensor:
        arguments = _arguments(row, tensors) | attributes
        return faplugin.attention(
            tensors.query, tensors.key, tensors.value, **arguments, out={"output": tensors.out}, kernel=kernel
        )

    return call


def _operator(row: Row, tensors: Tensors) -> dict[str, Contestant]:
    """The operator, and its kernels that dispatch would not take; in float32 the operator in each precision."""
    if row.dtype == "float32":
        return {f"ours {precision}": ours(row, float32_precision=precision) for precision in PRECISIONS}
    return {"ours": ours(row)} | {kernel: ours(row, kernel) for kernel in kernels(row, tensors)[1:]}


def contestants(row: Row, tensors: Tensors, wanted: set[str]) -> dict[str, Contestant]:
    """By name, those wanted (all where empty). Whether each can run the row shows when it is called."""
    found = _operator(row, tensors) | attention_peers.contestants(row)
    return {name: call for name, call in found.items() if not wanted or name in wanted}
