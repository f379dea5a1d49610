# SPDX-License-Identifier: Apache-2.0
"""A problem of tests/cases.py as the fields of AttentionParams: [B, H, S, D] views, broadcast axes with stride 0.

Written from docs/operator.md and csrc/include/fa/attention.h, not from plugin/bind.cpp, so that each tests the other.
"""

from __future__ import annotations

import ml_dtypes  # noqa: F401  (registers bfloat16)
import numpy as np

from tests import reference
from tests.problems import Problem

INDEX_NAMES = {"nonpad_kv_seqlen": "kv_lengths", "query_lengths": "query_lengths", "cu_seqlens_q": "cu_seqlens_q",
               "cu_seqlens_kv": "cu_seqlens_kv", "sinks": "sinks", "query_bias": "query_bias",
               "empty_row_value": "empty_row_value"}  # fmt: skip


def poisoned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An output that was never written is NaN."""
    return np.full(shape, np.nan, np.float32).astype(dtype)


def _broadcast(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    keys = array.shape[-1] if array.shape[-1] != 1 else shape[3]
    return np.broadcast_to(array, (*shape[:3], keys))


def fields(problem: Problem) -> tuple[dict, dict[str, np.ndarray]]:
    """The fields of AttentionParams, and the outputs among them by the operator's names.

    `present_key` and `present_value` are joined by NumPy here; append_kv has a test of its own.
    """
    attributes, inputs = reference.DEFAULTS | problem.attributes, problem.inputs
    query, key, value = reference.operands(problem, attributes)
    past = 0
    if "past_key" in inputs:
        past = inputs["past_key"].shape[2]
        key = np.concatenate([inputs["past_key"], key], axis=2)
        value = np.concatenate([inputs["past_value"], value], axis=2)
    batch, heads, rows, dim = query.shape
    out = poisoned((batch, rows, heads, value.shape[3]), reference.output_dtype(problem)).transpose(0, 2, 1, 3)
    result = {"query": query, "key": key, "value": value, "out": out}
    result["softmax_scale"] = attributes["scale"] or dim**-0.5
    result["softcap"] = attributes["softcap"]
    result["window_left"] = attributes["left_window_size"]
    result["window_right"] = 0 if attributes["is_causal"] else attributes["right_window_size"]
    result["empty_row_mean"] = attributes["empty_row"] == "mean"
    _add_positions(result, attributes, inputs, past)
    shape = (batch, heads, rows, key.shape[2])
    for name in ("attn_mask", "attn_bias"):
        if name in inputs:
            array = inputs[name]
            result["mask" if array.dtype == np.bool_ else "bias"] = _broadcast(array, shape)
    for name, field in INDEX_NAMES.items():
        if name in inputs:
            result[field] = inputs[name]
    if "alibi_slopes" in inputs:
        count = len(inputs["cu_seqlens_q"]) - 1 if "cu_seqlens_q" in inputs else batch
        result["alibi_slopes"] = np.broadcast_to(inputs["alibi_slopes"], (count, heads))
    for name in ("query_descale", "key_descale", "value_descale", "output_scale"):
        if name in inputs:
            count = len(inputs["cu_seqlens_q"]) - 1 if "cu_seqlens_q" in inputs else batch
            result[name] = np.broadcast_to(inputs[name], (count, (key if name[0] in "kv" else query).shape[1]))
    if "lse" in problem.outputs:
        result["lse"] = poisoned((batch, heads, rows), np.dtype(np.float32))
    outputs = {"output": out, "lse": result.get("lse"), "present_key": key, "present_value": value}
    return result, {name: outputs[name] for name in problem.outputs}


def _add_positions(result: dict, attributes: dict, inputs: dict, past: int) -> None:
    """query_offset in one of its three forms."""
    rows = result["query"].shape[2]
    if "query_offset" in inputs:
        count = len(inputs["cu_seqlens_q"]) - 1 if "cu_seqlens_q" in inputs else result["query"].shape[0]
        result["query_offsets"] = np.broadcast_to(inputs["query_offset"], (count,))
    elif attributes["alignment"] == "bottom_right":
        result["align_bottom_right"] = True
    elif attributes["alignment"] == "onnx" and "nonpad_kv_seqlen" in inputs:
        result["query_offsets"] = inputs["nonpad_kv_seqlen"] - inputs["nonpad_kv_seqlen"].dtype.type(rows)
    else:
        result["query_offset"] = past


def to_layout(problem: Problem, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The output as the operator lays it out."""
    attributes = reference.DEFAULTS | problem.attributes
    output = reference.to_layout(outputs["output"], attributes, problem.inputs["query"].ndim)
    return outputs | {"output": output}
