# SPDX-License-Identifier: Apache-2.0
"""Contestants on float8 tensors: the operator, also on the same numbers in bfloat16, FlashAttention-3 and cuDNN.

cuDNN is called through its own frontend (nvidia-cudnn-frontend), since PyTorch offers no float8 attention. On Hopper it
writes float8 only. Where times are measured all factors are 1, which changes no peer's time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import attention_torch
import faplugin
import torch
from attention_peers import Contestant
from attention_rows import Row, Tensors

FLOAT8 = torch.float8_e4m3fn


def contestants(row: Row, first: Tensors, wanted: set[str]) -> dict[str, Contestant]:
    """By name, those wanted (all where empty) that are installed. Whether each can run the row shows when called."""
    found: dict[str, Contestant] = {"ours": ours(row), "ours bfloat16": in_bfloat16(row)}
    with contextlib.suppress(ImportError):
        found["FA3"] = flash_attention_3(row)
    with contextlib.suppress(ImportError):
        found["cuDNN"] = cudnn(row, first)
    return {name: call for name, call in found.items() if not wanted or name in wanted}


def ours(row: Row) -> Contestant:
    factors = {
        f"{name}_descale": torch.ones(heads, device="cuda")
        for name, heads in (("query", row.num_heads), ("key", row.kv_heads), ("value", row.kv_heads))
    }
    layouts = {f"{name}_layout": "BSHD" for name in ("query", "key", "value")}

    def call(tensors: Tensors) -> torch.Tensor:
        operands = tensors.query, tensors.key, tensors.value
        out = {"output": tensors.out}
        return faplugin.attention(*operands, **layouts, **factors, is_causal=row.is_causal, out=out)

    return call


def in_bfloat16(row: Row) -> Contestant:
    call = attention_torch.ours(row)
    return lambda tensors: call(tensors.in_bfloat16)


def flash_attention_3(row: Row) -> Contestant:
    from fa3_fwd_interface import flash_attn_func

    factors = torch.ones(row.batch_size, row.kv_heads, device="cuda")
    descales = {f"{name}_descale": factors for name in "qkv"}

    def call(tensors: Tensors) -> torch.Tensor:
        result = flash_attn_func(tensors.query, tensors.key, tensors.value, causal=row.is_causal, **descales)
        return result[0] if isinstance(result, tuple) else result

    return call


def cudnn(row: Row, first: Tensors) -> Contestant:
    run = cudnn_graph(first.query, first.key, first.value, row.head_dim**-0.5, row.is_causal)
    return lambda tensors: run(tensors.query, tensors.key, tensors.value, {})


def cudnn_graph(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, is_causal: bool
) -> Callable[..., torch.Tensor]:
    """A graph of one sdpa_fp8 node, planned for these shapes, [B, S, H, D]. It is called with such tensors and with
    those of cuDNN's factors by name (descale_q, scale_o …) that aren't 1; each call writes the same output."""
    import cudnn as frontend

    kinds = frontend.data_type
    graph = frontend.pygraph(
        io_data_type=kinds.FP8_E4M3, intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT
    )

    def shape_of(tensor: torch.Tensor) -> dict:
        """[B, S, H, D] as cuDNN's [B, H, S, D]."""
        return {"dim": list(tensor.transpose(1, 2).shape), "stride": list(tensor.transpose(1, 2).stride())}

    operands = {
        name: graph.tensor(name=name, **shape_of(tensor), data_type=kinds.FP8_E4M3)
        for name, tensor in (("q", query), ("k", key), ("v", value))
    }
    names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
    one = {"dim": [1, 1, 1, 1], "stride": [1, 1, 1, 1]}
    factors = {name: graph.tensor(name=name, **one, data_type=kinds.FLOAT) for name in names}
    options = {"is_inference": True, "attn_scale": scale, "use_causal_mask": is_causal}
    output, _, *largest = graph.sdpa_fp8(**operands, **factors, **options, name="sdpa")
    output.set_output(True).set_data_type(kinds.FP8_E4M3)
    output.set_dim(shape_of(query)["dim"]).set_stride(shape_of(query)["stride"])
    for tensor in largest:
        tensor.set_output(True).set_data_type(kinds.FLOAT).set_dim(one["dim"]).set_stride(one["stride"])
    graph.build([frontend.heur_mode.A])
    scalars = {tensor: torch.ones(1, 1, 1, 1, device="cuda") for tensor in (*factors.values(), *largest)}
    written = torch.empty(query.shape, dtype=torch.uint8, device="cuda").view(FLOAT8)
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device="cuda")
    handle = frontend.create_handle()

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scales: dict) -> torch.Tensor:
        for name, scale in scales.items():
            scalars[factors[name]].fill_(scale)
        frontend.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        given = {operands["q"]: query, operands["k"]: key, operands["v"]: value, output: written}
        graph.execute(given | scalars, workspace, handle=handle)
        return written

    return call
