# SPDX-License-Identifier: Apache-2.0
"""The functions of flash-attn, with its arguments, defaults, shapes and conventions.

Causal masks and windows are aligned to the last key, and rows that attend no key are 0.
"""

from __future__ import annotations

import operator
import re
from typing import Any

import torch

from faplugin._frameworks import told
from faplugin.torch._call import ABSENT, scale_of, step
from faplugin.torch._op import compute, is_eager
from faplugin.torch._refusals import FAILURES, is_number, refuse_flag, refuse_operands, refuse_settings


def _settings(
    q: torch.Tensor, dropout_p: float, scale: float | None, causal: bool, window: tuple[int, int], softcap: float
) -> tuple:
    """By SETTINGS."""
    failure: Exception | None = None
    try:
        left, right = window
        settings = scale_of(q, scale), float(softcap), bool(causal), max(left, -1), max(right, -1), "bottom_right"
        if dropout_p == 0 and scale != 0 and causal in (True, False):
            return settings
    except FAILURES as error:
        failure = error
    refuse_operands({"query": q})
    if not is_number(dropout_p) or dropout_p != 0:
        raise ValueError(
            f"dropout_p is {told(dropout_p)}; expected 0: dropout of attention weights is not offered (in evaluation "
            "pass 0, for training set the model's attention dropout to 0)"
        )
    refuse_settings(scale, causal, softcap, window, "softmax_scale", "window_size")
    assert failure is not None
    raise failure


def _optional(slopes: Any = None, kv_lengths: Any = None, cu_q: Any = None, cu_kv: Any = None) -> tuple:
    """By OPTIONAL."""
    if slopes is None and kv_lengths is None and cu_q is None:
        return ABSENT
    return None, None, None, slopes, None, kv_lengths, cu_q, cu_kv


def _attend(q: Any, k: Any, v: Any, packed: int, slopes: Any, settings: tuple, probs: bool) -> Any:
    refuse_flag("return_attn_probs", probs)
    found = compute(q, k, v, packed, _optional(slopes), settings, probs)
    return (*found, None) if probs else found


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q [B, S_q, H_q, D] to k [B, S_kv, H_kv, D] and v [B, S_kv, H_kv, D_v]; H_q is a multiple of H_kv.

    Args:
        q: float32, float16 or bfloat16.
        k: dtype of q.
        v: dtype of q.
        dropout_p: 0; anything else is refused.
        softmax_scale: multiplies Q Kᵀ; None: 1/√D.
        causal: the last query sees all keys, each before it one less.
        window_size: keys seen before and after the own position; -1 is unbounded.
        softcap: scores become softcap · tanh(score / softcap); 0 is none.
        alibi_slopes: float32 [H_q] or [B, H_q].
        deterministic: gradients are bitwise repeatable; they always are, whatever is passed.
        return_attn_probs: return (output, lse, None), lse being the log-sum-exp, float32 [B, H_q, S_q].

    Returns:
        The output, [B, S_q, H_q, D_v], dtype of q.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value.
    """
    settings = _settings(q, dropout_p, softmax_scale, causal, window_size, softcap)
    return _attend(q, k, v, 0, alibi_slopes, settings, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_func of qkv [B, S, 3, H, D]; its gradient has that form, too, and is written without a copy."""
    settings = _settings(qkv, dropout_p, softmax_scale, causal, window_size, softcap)
    return _attend(qkv, None, None, 3, alibi_slopes, settings, return_attn_probs)


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_func of q [B, S_q, H_q, D] and kv [B, S_kv, 2, H_kv, D]."""
    settings = _settings(q, dropout_p, softmax_scale, causal, window_size, softcap)
    return _attend(q, kv, None, 2, alibi_slopes, settings, return_attn_probs)


def _attend_packed_sequences(
    tensors: tuple[torch.Tensor | None, ...],
    packed: int,
    slopes: Any,
    cu_q: Any,
    cu_kv: Any,
    settings: tuple,
    probs: bool,
) -> Any:
    """Tensors [total rows, …] as a batch of 1."""
    refuse_flag("return_attn_probs", probs)
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_kv)):
        if cu is None:
            raise TypeError(f"{name} is None; expected int32 [sequences + 1]")
    there = [(name, tensor) for name, tensor in zip("qkv", tensors, strict=True) if not packed or tensor is not None]
    for i, (name, tensor) in enumerate(there):
        is_packed = packed > 0 and i == len(there) - 1
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
        if not is_packed and tensor.dim() != 3:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; expected [total rows, heads, head_dim]")
    try:
        query, key, value = (None if t is None else t.unsqueeze(0) for t in tensors)
    except RuntimeError:
        refuse_operands(dict(there))
        raise
    found: Any = compute(query, key, value, packed, _optional(slopes, None, cu_q, cu_kv), settings, probs)
    return (found[0].squeeze(0), found[1].squeeze(0), None) if probs else found.squeeze(0)


def _refuse(**given: Any) -> None:
    """Raises ValueError for arguments of flash-attn that are not offered, where one is given."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is given; expected None: faplugin.torch does not offer it")


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Any:
    """flash_attn_func of sequences one behind the other: q [total rows, H_q, D], k and v [total keys, H_kv, D].

    Args:
        q: rows of all sequences; the other arguments are those of flash_attn_func.
        k: keys of all sequences.
        v: values of all sequences.
        cu_seqlens_q: int32 [sequences + 1], where each sequence's rows begin, and their end.
        cu_seqlens_k: int32 [sequences + 1], likewise of keys.
        max_seqlen_q: not needed, whatever is passed.
        max_seqlen_k: not needed.
        dropout_p: 0.
        softmax_scale: None: 1/√D.
        causal: within each sequence.
        window_size: within each sequence.
        softcap: 0 is none.
        alibi_slopes: float32 [H_q] or [sequences, H_q].
        deterministic: gradients always are.
        return_attn_probs: return (output, lse [H_q, total rows], None).
        block_table: None.

    Returns:
        The output, [total rows, H_q, D_v].
    """
    _refuse(block_table=block_table)
    settings = _settings(q, dropout_p, softmax_scale, causal, window_size, softcap)
    return _attend_packed_sequences((q, k, v), 0, alibi_slopes, cu_seqlens_q, cu_seqlens_k, settings, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_varlen_func of qkv [total rows, 3, H, D]."""
    settings = _settings(qkv, dropout_p, softmax_scale, causal, window_size, softcap)
    return _attend_packed_sequences(
        (qkv, None, None), 3, alibi_slopes, cu_seqlens, cu_seqlens, settings, return_attn_probs
    )


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_varlen_func of q [total rows, H_q, D] and kv [total keys, 2, H_kv, D]."""
    settings = _settings(q, dropout_p, softmax_scale, causal, window_size, softcap)
    return _attend_packed_sequences(
        (q, kv, None), 2, alibi_slopes, cu_seqlens_q, cu_seqlens_k, settings, return_attn_probs
    )


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """One step with a cache: rows k and v are written to it at cache_seqlens, in place, then q attends.

    It has no gradient.

    Args:
        q: [B, S, H_q, D].
        k_cache: [B, rows, H_kv, D], changed in place where k is given.
        v_cache: [B, rows, H_kv, D_v], likewise.
        k: new keys [B, S, H_kv, D], as many rows as q; None: the cache is complete.
        v: new values [B, S, H_kv, D_v].
        rotary_cos: [positions, rotary_dim / 2], at least as many as k_cache has rows; q and k are rotated by it before
            k is written.
        rotary_sin: as rotary_cos.
        cache_seqlens: rows in use before the new ones, int32 [B] or one for all; None: all rows, without k. Rows that
            would lie outside of the cache are refused on the CPU, and not written on a GPU: the host can't see its
            lengths.
        cache_batch_idx: None; anything else is refused, as the next two are.
        cache_leftpad: None.
        block_table: None.
        softmax_scale: None: 1/√D.
        causal: the last query sees all keys in use, each before it one less.
        window_size: keys seen before and after the own position; -1 is unbounded.
        softcap: 0 is none.
        rotary_interleaved: column 2 i is rotated with 2 i + 1, else i with i + rotary_dim / 2.
        alibi_slopes: float32 [H_q] or [B, H_q].
        num_splits: not needed, whatever is passed.
        return_softmax_lse: return (output, lse).

    Returns:
        The output, [B, S, H_q, D_v].

    Raises:
        ValueError: an argument has a wrong shape, dtype or value.
    """
    _refuse(cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, block_table=block_table)
    operands = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    for name, tensor in operands.items():
        if not isinstance(tensor, torch.Tensor) and (tensor is not None or name not in ("k", "v")):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
        if tensor is not None and tensor.dim() != 4:
            raise ValueError(f"{name} has {tensor.dim()} axes; expected 4: batch, rows, heads, head_dim")
    if (k is None) != (v is None):
        raise ValueError("one of k and v is given; expected both or none")
    if rotary_cos is not None and k is None:
        raise ValueError("rotary_cos is given without k; expected both")
    if k is not None and cache_seqlens is None:
        raise ValueError("k is given without cache_seqlens; expected where it is to be written")
    if rotary_cos is not None and (not isinstance(rotary_cos, torch.Tensor) or rotary_cos.dim() != 2):
        raise TypeError(f"rotary_cos is {told(rotary_cos)}; expected a torch.Tensor [positions, rotary_dim / 2]")
    if rotary_cos is not None and rotary_cos.shape[0] < k_cache.shape[1]:
        raise ValueError(f"rotary_cos has {rotary_cos.shape[0]} positions; expected at least the {k_cache.shape[1]} "
                         "rows of k_cache")  # fmt: skip
    if rotary_cos is not None and q.shape[1] > 1 and not causal and tuple(window_size) == (-1, -1):
        raise ValueError("rotary_cos is given for several queries without causal or a window; expected one of these, "
                         "so that each query has a position of its own")  # fmt: skip
    refuse_flag("rotary_interleaved", rotary_interleaved)
    refuse_flag("return_softmax_lse", return_softmax_lse)
    settings = _settings(q, 0.0, softmax_scale, causal, window_size, softcap)
    lengths = _lengths(cache_seqlens, q)
    with torch.no_grad():
        try:
            if k is None or v is None:
                return compute(q, k_cache, v_cache, 0, _optional(alibi_slopes, lengths), settings, return_softmax_lse)
            extras = {"alibi_slopes": alibi_slopes, "cos_cache": rotary_cos, "sin_cache": rotary_sin}
            output, lse = _written((q, k, v), (k_cache, v_cache), lengths, extras, settings, rotary_interleaved)
        except ValueError as error:
            raise ValueError(_in_words_of_flash_attn(str(error))) from None
        except (AttributeError, RuntimeError):
            others = {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "alibi_slopes": alibi_slopes}
            refuse_operands({name: tensor for name, tensor in (operands | others).items() if tensor is not None})
            raise
    return (output, lse) if return_softmax_lse else output


def _written(
    operands: tuple[torch.Tensor, ...], cache: tuple[torch.Tensor, torch.Tensor], lengths: torch.Tensor,
    extras: dict[str, Any], settings: tuple, interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The output and the log-sum-exp of a step that writes its keys and values behind `lengths` rows of the cache."""
    query, key, value = operands
    _check_room(lengths, key, cache[0])
    inputs = {"past_key": cache[0], "past_value": cache[1], "nonpad_kv_seqlen": lengths + key.shape[1]}
    inputs |= {name: tensor for name, tensor in extras.items() if tensor is not None}
    if not is_eager(*operands, *inputs.values()):
        raise RuntimeError("flash_attn_with_kvcache writes to its cache; it can't be compiled, traced or transformed")
    return step(query, key, value, inputs, settings, interleaved)


def _lengths(cache_seqlens: Any, q: torch.Tensor) -> Any:
    if cache_seqlens is None or isinstance(cache_seqlens, torch.Tensor):
        return cache_seqlens
    if not isinstance(cache_seqlens, (int, torch.SymInt)):  # torch.compile has the second
        try:
            cache_seqlens = operator.index(cache_seqlens)
        except TypeError:
            raise TypeError(f"cache_seqlens is {told(cache_seqlens)}; expected a whole number, or a tensor") from None
    if isinstance(cache_seqlens, int) and not -(2**31) <= cache_seqlens < 2**31:
        raise ValueError(f"cache_seqlens is {cache_seqlens}; expected a number of rows")
    return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)


def _check_room(lengths: torch.Tensor, new: torch.Tensor, cache: torch.Tensor) -> None:
    if lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cache_seqlens is {str(lengths.dtype).removeprefix('torch.')}; expected int32 or int64")
    least, used = (int(x) for x in torch.aminmax(lengths)) if lengths.is_cpu and lengths.numel() else (0, 0)
    if least < 0:
        raise ValueError(f"cache_seqlens is {least} for a sequence; expected 0 or more")
    if used + new.shape[1] > cache.shape[1]:
        raise ValueError(
            f"cache_seqlens is up to {used}; expected at most {cache.shape[1] - new.shape[1]}: "
            f"k_cache has {cache.shape[1]} rows and k has {new.shape[1]}"
        )


# The operator's names for arguments of flash_attn_with_kvcache.
_NAMES = {
    "past_key": "k_cache",
    "past_value": "v_cache",
    "present_key": "k_cache",
    "present_value": "v_cache",
    "cos_cache": "rotary_cos",
    "sin_cache": "rotary_sin",
    "nonpad_kv_seqlen": "cache_seqlens",
}


def _in_words_of_flash_attn(sentence: str) -> str:
    return re.sub("|".join(_NAMES), lambda found: _NAMES[found[0]], sentence)
