# SPDX-License-Identifier: Apache-2.0
"""attention() and explain(): the operator on arrays. Names and meanings are those of docs/operator.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from faplugin._frameworks import allocates, current_stream, empty, readable, told
from faplugin._native import Call, inputs


def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    attn_mask: Any = None,
    attn_bias: Any = None,
    past_key: Any = None,
    past_value: Any = None,
    nonpad_kv_seqlen: Any = None,
    query_lengths: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    query_offset: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    write_indices: Any = None,
    kv_extent: Any = None,
    cos_cache: Any = None,
    sin_cache: Any = None,
    position_ids: Any = None,
    q_norm_weight: Any = None,
    k_norm_weight: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    block_table: Any = None,
    slot_mapping: Any = None,
    query_descale: Any = None,
    key_descale: Any = None,
    value_descale: Any = None,
    output_scale: Any = None,
    query_bias: Any = None,
    empty_row_value: Any = None,
    q_num_heads: int = 0,
    kv_num_heads: int = 0,
    scale: float = 0.0,
    is_causal: bool = False,
    left_window_size: int = -1,
    right_window_size: int = -1,
    softcap: float = 0.0,
    alignment: str = "onnx",
    empty_row: str = "zero",
    float32_precision: str = "",
    output_dtype: str = "",
    query_layout: str = "",
    key_layout: str = "",
    value_layout: str = "",
    output_layout: str = "",
    packed_columns: Sequence[int] = (),
    head_dim: int = 0,
    head_dim_v: int = 0,
    cache: str = "append",
    cache_layout: str = "",
    kv_cache_bit_width: int = 8,
    rotary_interleaved: bool = False,
    rotary_dim: int = 0,
    q_norm_epsilon: float = 1e-6,
    k_norm_epsilon: float = 1e-6,
    return_present: bool = False,
    return_lse: bool = False,
    out: Mapping[str, Any] | None = None,
    stream: int | None = None,
    kernel: str = "",
    num_threads: int = 0,
) -> Any:
    """softmax(softcap(scale · Q Kᵀ) + bias, masked) V, without the matrix of scores in memory.

    Arrays are NumPy's or anything with `__dlpack__` (PyTorch, CuPy, …), all on one device and read in place; a stride
    is fine on any axis but the last. On CUDA the work is enqueued and not waited for.

    Args:
        query: float32, float16, bfloat16 or float8_e4m3fn, [B, H_q, S_q, D] (layout BHSD), [B, S_q, H_q, D] (BSHD) or
            [B, S_q, H_q·D] (BSH).
        key: likewise with H_kv heads and S_kv rows; H_q is a multiple of H_kv.
        value: likewise, head size D_v.
        attn_mask: bool (True = attend) or float (added), broadcastable to [B, H_q, S_q, S_kv].
        attn_bias: float, added after softcap, broadcastable likewise.
        past_key: [B, H_kv, P, D], rows in front of key, or the cache that key's rows are written to (`cache`). Pages
            are [blocks, rows of a block, H_kv, D]. A quantized cache is int8, float8_e4m3fn, or uint8 with
            kv_cache_bit_width 4, where two columns share a byte.
        past_value: likewise for value, head size D_v.
        nonpad_kv_seqlen: int64 or int32 [B], keys in use.
        query_lengths: int64 or int32 [B], query rows in use.
        cu_seqlens_q: int32 [sequences + 1], packed sequences of query rows.
        cu_seqlens_kv: int32 [sequences + 1], packed sequences of keys.
        query_offset: int64 or int32 [1] or [B], position of the first query among the keys.
        alibi_slopes: float32 [H_q] or [B, H_q].
        sinks: float32 [H_q], a logit without a value in each row's softmax.
        write_indices: int64 or int32 [B], position of the first new row in each entry's cache.
        kv_extent: any array: present has at least as many rows as its last axis; its values are not read.
        cos_cache: float [positions, rotary_dim / 2] or [B, S_q, rotary_dim / 2], cosines of the rotary embedding of
            query and of key's new rows.
        sin_cache: as cos_cache.
        position_ids: int64 or int32 [B, S_q] or [1, S_q], rows of cos_cache; None: each row's own position.
        q_norm_weight: float [D], factors of the RMS norm of each query head, before the rotary embedding.
        k_norm_weight: float [D], likewise of the new keys.
        k_scale: float32 [1] or [H_kv, D], what an element of a quantized past_key is multiplied by.
        v_scale: likewise of past_value.
        block_table: int64 or int32 [sequences, blocks of a sequence], for a paged cache.
        slot_mapping: int64 or int32 [S_q], rows of a paged cache that new rows go to, -1: nowhere; None: by position.
        query_descale: float32 [], [1], [H_q] or [B, H_q], what an element of a float8 query is multiplied by (with
            packed sequences B is their number); None: 1.
        key_descale: likewise of a float8 key, [], [1], [H_kv] or [B, H_kv].
        value_descale: likewise of a float8 value.
        output_scale: float32 as query_descale, what a float8 output is divided by before it is rounded.
        query_bias: query's dtype, [H_q, D], added to each row of query, the sum rounded to that dtype; neither with
            float8 nor with a norm or a rotary embedding.
        empty_row_value: query's dtype, [H_q, D_v], what a row that attends no key gives, in the place of 0; not with
            float8.
        q_num_heads: needed for layout BSH.
        kv_num_heads: needed for layout BSH.
        scale: multiplies Q Kᵀ; 0 stands for 1/√D.
        is_causal: key j is visible to query position p when j <= p.
        left_window_size: keys visible before the own position, -1 unbounded.
        right_window_size: keys visible after it, -1 unbounded.
        softcap: scores become softcap · tanh(score / softcap); 0 is none.
        alignment: position of the first query: "onnx", "top_left" or "bottom_right".
        empty_row: output of a row that attends no key: "zero", or "mean" of all values.
        float32_precision: how GPUs multiply float32 arrays: "tf32" (operands rounded to 11 bits, error about 4e-4) or
            "tf32x3" (three such products, error about 5e-7); empty: "tf32x3". The CPU always computes in float32.
        output_dtype: of the output of a float8 query: "float32", "float16", "bfloat16" (also if empty) or
            "float8_e4m3fn"; other queries give their own dtype.
        query_layout: "BHSD", "BSHD" or "BSH"; empty: by rank.
        key_layout: as query_layout.
        value_layout: as query_layout.
        output_layout: as query_layout; empty: the query's.
        packed_columns: q_start, q_stride, k_start, k_stride, v_start, v_stride in 3-D inputs.
        head_dim: needed with packed_columns.
        head_dim_v: with packed_columns, where it differs from head_dim.
        cache: how new rows join the past: "append" (behind it), "write" (each entry at its own position of a cache of
            fixed capacity), "window" (likewise, but the cache keeps the last rows only) or "paged" (in blocks, always
            in place: the past's memory is changed, and is shared with no other input).
        cache_layout: of past and present: "BHSD", "BSHD" or "BSH"; empty: BHSD.
        kv_cache_bit_width: bits of an element of a quantized cache, 8 or 4.
        rotary_interleaved: column 2 i is rotated with 2 i + 1, else i with i + rotary_dim / 2.
        rotary_dim: columns of a head that are rotated; 0: twice those of cos_cache.
        q_norm_epsilon: added to the mean of squares of a query head.
        k_norm_epsilon: likewise of a key head.
        return_present: also return present_key and present_value, [B, H_kv, P + S, D] and [B, H_kv, P + S, D_v]; with
            another `cache` than "append" they have the rows of the past.
        return_lse: also return the natural log-sum-exp of the masked scores, float32 [B, H_q, S_q].
        out: memory for results by name ("output", "present_key", "present_value", "lse"), row-major, shared with no
            input and no other result; but present_key and present_value may be the very arrays past_key and past_value
            where `cache` isn't "append": then only the new rows are written.
        stream: CUDA stream as an integer; None: the framework's current one.
        kernel: forces a kernel by its name in explain().
        num_threads: threads on the CPU; 0: all.

    Returns:
        The output, an array of the query's framework (NumPy's for unknown ones on the CPU); with return_present or
        return_lse a tuple (output, present_key, present_value, lse) of what was asked for.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value; the sentence names it.
        TypeError: an argument is no array, or of an unknown dtype.
        RuntimeError: no kernel can run this, or CUDA failed.
    """
    arguments = dict(locals())
    call = bind(arguments, stream)
    out = {} if out is None else out
    if not isinstance(out, Mapping):
        raise TypeError(f"out is a {type(out).__name__}; expected a dict of arrays by name, as {{'output': array}}")
    names = [name for name, _, _ in call.outputs]
    if unknown := [name for name in out if name not in names]:
        raise ValueError(f"out has {unknown}; this call returns {names}")
    outputs = [
        out[name] if name in out else empty(_like(name, arguments), tuple(shape), dtype, call.device, stream)
        for name, shape, dtype in call.outputs
    ]
    arrays = [readable(name, array) for (name, _, _), array in zip(call.outputs, outputs, strict=True)]
    num_bytes = call.prepare(arrays, kernel)
    call.run(workspace(query, num_bytes, call.device, stream), num_bytes, num_threads)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def workspace(like: Any, num_bytes: int, device: str, stream: int | None) -> Any:
    """Memory from the framework of `like`, where that can be asked; None: the call allocates its own."""
    if not num_bytes or not allocates(like):
        return None
    # int32, because not every framework has DLPack for bytes
    return empty(like, ((num_bytes + 3) // 4,), "int32", device, stream)


def _like(name: str, arguments: dict[str, Any]) -> Any:
    """The array that an output takes its framework and its kind of dtype from."""
    return (
        arguments["past_key"]
        if name.startswith("present") and arguments["past_key"] is not None
        else arguments["query"]
    )


def explain(query: Any, key: Any, value: Any, *, device: str = "", **arguments: Any) -> str:
    """Which kernel would run, and why: its name first, then a line for each kernel of the table.

    Args:
        query: an array, or (shape, dtype name) where there is none, e.g. ((1, 16, 4096, 128), "float16").
        key: likewise.
        value: likewise.
        device: "cpu", "cuda" (the current GPU), or "sm_80", "sm_86", "sm_89", "sm_90" for a GPU that need not be
            there; empty: where query is, the CPU for specifications.
        **arguments: as of attention(), arrays or specifications.

    Raises:
        ValueError, TypeError: as attention().
    """
    return bind({"query": query, "key": key, "value": value, **arguments}, None).explain(device)


def _is_set(name: str, arguments: dict[str, Any]) -> bool:
    value = arguments.get(name, False)
    if not isinstance(value, (int, np.bool_)):
        raise TypeError(f"{name} is {told(value)}; expected True or False")
    return bool(value)


REQUIRED = ("query", "key", "value")
_NOT_ATTRIBUTES = {"return_present", "return_lse", "out", "stream", "kernel", "num_threads"}


def bind(arguments: dict[str, Any], stream: int | None) -> Call:
    """A call bound to its inputs. The compiled library knows the names of inputs and attributes. `stream`: None: the
    current one of the query's framework."""
    names = inputs()
    given = [name for name in names if arguments.get(name) is not None or name in REQUIRED]
    outputs = ["present_key", "present_value"] if _is_set("return_present", arguments) else []
    outputs += ["lse"] if _is_set("return_lse", arguments) else []
    defaults = attention.__kwdefaults__ or {}
    attributes = {
        name: value
        for name, value in arguments.items()
        # What is the very object of the signature need not be passed on: that is most, and saves time in each call.
        if value is not defaults.get(name, defaults) and name not in names and name not in _NOT_ATTRIBUTES
    }
    if len(given) > len(REQUIRED):
        attributes["optional_inputs"] = ",".join(given[len(REQUIRED) :])
    if outputs:
        attributes["optional_outputs"] = ",".join(outputs)
    is_current = stream is None
    stream = current_stream(arguments["query"]) if stream is None else stream
    return Call(attributes, [(name, readable(name, arguments[name])) for name in given], stream, is_current)
