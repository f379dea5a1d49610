# SPDX-License-Identifier: Apache-2.0
"""The operator in NumPy, as docs/operator.md says it: the oracle of every test, independent of the C++ code.

`attention(problem)` is in float64. `attention(problem, unfused=True)` is what a graph of MatMul, Softmax, MatMul gives
in the tensors' own dtype, each result rounded, with TF32 operands where the attribute float32_precision says so: its
error is the measure of the others'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from tests.problems import ELEMENTS, FLOAT8, Problem

DEFAULTS = {"q_num_heads": 0, "kv_num_heads": 0, "scale": 0.0, "is_causal": 0, "left_window_size": -1,
            "right_window_size": -1, "softcap": 0.0, "alignment": "onnx", "empty_row": "zero",
            "float32_precision": "", "output_dtype": ""}  # fmt: skip


@dataclasses.dataclass
class _Sequence:
    """One batch entry, or one of the packed sequences. Arrays are [heads, rows, head size]."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    query_length: int
    kv_length: int
    offset: int
    hidden: np.ndarray | None  # [H_q or 1, S_q or 1, S_kv]: True where a mask or a short last axis hides the key
    bias: np.ndarray | None  # likewise, added
    slopes: np.ndarray | None  # [H_q]
    sinks: np.ndarray | None  # [H_q]
    divisor: np.ndarray | int  # [H_q, 1, 1]: of the output; 1: none
    empty_row_value: np.ndarray | None  # [H_q, D_v]


@dataclasses.dataclass
class _Rounding:
    """What becomes of each result, and of what a product multiplies."""

    result: Callable[[np.ndarray], np.ndarray] = lambda x: x
    operand: Callable[[np.ndarray], np.ndarray] = lambda x: x
    exponentials: Callable[[np.ndarray], np.ndarray] = lambda x: x  # of scores less the row's maximum
    output: Callable[[np.ndarray], np.ndarray] = lambda x: x


def _tf32(x: np.ndarray) -> np.ndarray:
    """float32 to the nearest number of 11 significant bits, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & np.uint32(0xFFFFE000)).view(np.float32)


@np.errstate(over="ignore", invalid="ignore")  # a float16 bias near the least number, rounded, is -inf; NaN
def attention(problem: Problem, unfused: bool = False, float8_weights: bool = False) -> dict[str, np.ndarray]:
    """The operator's outputs by name, float64 (present_key and present_value in their own dtype).

    Args:
        problem: attributes and inputs as docs/operator.md names them.
        unfused: round every intermediate result to the dtype of the query, as an unfused graph does. That of a float8
            query computes in float32.
        float8_weights: the unfused result of a float8 query multiplies values by exponentials that are rounded to
            float8, with 256 for the largest.
    """
    attributes = DEFAULTS | problem.attributes
    query, key, value, past = _tensors(problem, attributes)
    outputs: dict[str, np.ndarray] = {"present_key": key, "present_value": value}
    rounding = _Rounding()
    if unfused:
        float8 = query.dtype == FLOAT8
        between = np.dtype(np.float32) if float8 else query.dtype
        rounding.result = lambda x: x.astype(between).astype(np.float32)
        rounding.output = lambda x: x.astype(output_dtype(problem)).astype(np.float32) if float8 else x
        if float8 and float8_weights:
            rounding.exponentials = lambda x: (x * 256).astype(FLOAT8).astype(np.float32) / 256
        if attributes["float32_precision"] == "tf32" and query.dtype == np.float32:
            rounding.operand = _tf32
    working = np.float32 if unfused else np.float64
    _, heads, rows, _ = query.shape
    out = np.zeros((*query.shape[:3], value.shape[3]), working)
    lse = np.full((query.shape[0], heads, rows), -np.inf, working)
    for batch_idx, row, sequence in _sequences(problem.inputs, attributes, query, key, value, past):
        o, log_sum = _sequence(sequence, attributes, working, rounding)
        out[batch_idx, :, row : row + o.shape[1]] = o
        lse[batch_idx, :, row : row + o.shape[1]] = log_sum
    if output_dtype(problem) == FLOAT8:
        out = np.clip(out, -448, 448)  # NaN stays
    outputs["output"] = to_layout(rounding.output(out), attributes, problem.inputs["query"].ndim)
    outputs["lse"] = lse
    return {name: outputs[name] for name in problem.outputs}


def output_dtype(problem: Problem) -> np.dtype:
    """Of the output: the query's dtype, or of a float8 query what the attribute output_dtype says."""
    query = problem.inputs["query"].dtype
    return ELEMENTS[problem.attributes.get("output_dtype") or "bfloat16"] if query == FLOAT8 else query


@np.errstate(over="ignore", invalid="ignore")
def score_magnitude(problem: Problem) -> np.ndarray:
    """The largest sum of |scale q k| over a key's columns, of the keys that each row sees: [B, H_q, S_q]."""
    attributes = DEFAULTS | problem.attributes
    query, key, value, past = _tensors(problem, attributes)
    largest = np.zeros(query.shape[:3])
    for batch_idx, row, s in _sequences(problem.inputs, attributes, query, key, value, past):
        for h, i, q, k, scores in _chunks(s, attributes, np.float64, _Rounding()):
            sums = np.abs(q) @ np.abs(np.where(np.isfinite(k), k, 0)).T
            largest[batch_idx, h, row + i] = np.where(np.isfinite(scores), sums, 0).max(axis=1, initial=0)
    return largest


@np.errstate(over="ignore", invalid="ignore")
def lse_spread(problem: Problem) -> np.ndarray:
    """How far rounding the operands of Q K^T moves each log-sum-exp: [B, H_q, S_q], in units of the rounding.

    To first order, errors e_i of the elements of q and f_ji of those of k_j add sum_j w_j sum_i q_i k_ji (e_i + f_ji)
    to it, w being the row's weights. This is the root of the sum of the squares of all factors of e_i and f_ji.
    """
    attributes = DEFAULTS | problem.attributes
    query, key, value, past = _tensors(problem, attributes)
    spread = np.zeros(query.shape[:3])
    for batch_idx, row, s in _sequences(problem.inputs, attributes, query, key, value, past):
        for h, i, q, k, scores in _chunks(s, attributes, np.float64, _Rounding()):
            weights, total, _ = _exponentials(scores, s, h)
            weights /= np.where(total == 0, 1, total)[:, None]
            k = np.where(np.isfinite(k), k, 0)  # those of hidden keys may be anything
            squares = q**2 * ((weights @ k) ** 2 + weights**2 @ k**2)
            spread[batch_idx, h, row + i] = np.sqrt(squares.sum(axis=1))
    return spread


def _tensors(problem: Problem, attributes: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Query, and keys and values behind those of the past, as [B, H, S, D], and how many the past has."""
    query, key, value = operands(problem, attributes)
    if "query_bias" in problem.inputs:
        bias = problem.inputs["query_bias"][:, None]
        query = (query.astype(np.float32) + bias.astype(np.float32)).astype(query.dtype)
    if "past_key" not in problem.inputs:
        return query, key, value, 0
    past_key, past_value = problem.inputs["past_key"], problem.inputs["past_value"]
    key, value = np.concatenate([past_key, key], axis=2), np.concatenate([past_value, value], axis=2)
    return query, key, value, past_key.shape[2]


def operands(problem: Problem, attributes: dict) -> list[np.ndarray]:
    """Query, key and value as [B, H, S, D]."""
    arrays = []
    columns = attributes.get("packed_columns")
    for i, name in enumerate(("query", "key", "value")):
        array = problem.inputs[name]
        heads = attributes["q_num_heads" if name == "query" else "kv_num_heads"]
        if columns:
            dim = attributes["head_dim"] if name != "value" else attributes.get("head_dim_v") or attributes["head_dim"]
            start, stride = columns[2 * i : 2 * i + 2]
            array = np.stack([array[:, :, start + h * stride : start + h * stride + dim] for h in range(heads)], axis=1)
        elif array.ndim == 3:
            array = array.reshape(*array.shape[:2], heads, -1).transpose(0, 2, 1, 3)
        elif attributes.get(f"{name}_layout") == "BSHD":
            array = array.transpose(0, 2, 1, 3)
        arrays.append(array)
    return arrays


def to_layout(out: np.ndarray, attributes: dict, query_rank: int) -> np.ndarray:
    layout = attributes.get("output_layout") or attributes.get("query_layout") or ("BSH" if query_rank == 3 else "BHSD")
    if layout == "BHSD":
        return out
    out = out.transpose(0, 2, 1, 3)
    return out if layout == "BSHD" else out.reshape(*out.shape[:2], -1)


def _of_batch(array: np.ndarray, batch_idx: int) -> np.ndarray:
    """[H or 1, S_q or 1, last] of a tensor which broadcasts from the right to [B, H, S_q, S_kv]."""
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    return array[batch_idx if array.shape[0] > 1 else 0]


def _pad_keys(array: np.ndarray, keys: int, fill) -> np.ndarray:
    """The last axis, where it is neither 1 nor `keys`, continued by `fill`."""
    missing = keys - array.shape[-1]
    if missing <= 0 or array.shape[-1] == 1:
        return array
    return np.concatenate([array, np.full((*array.shape[:-1], missing), fill, array.dtype)], axis=-1)


def _masks(inputs: dict, batch_idx: int, keys: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What hides keys, and what is added, for one batch entry."""
    mask, bias = inputs.get("attn_mask"), inputs.get("attn_bias")
    if mask is not None and mask.dtype != np.bool_:
        mask, bias = None, mask
    hidden = None if mask is None else ~_pad_keys(_of_batch(mask, batch_idx), keys, False)
    if bias is not None:
        bias = _pad_keys(_of_batch(bias, batch_idx).astype(np.float64), keys, -np.inf)
    return hidden, bias


def _sequences(inputs: dict, attributes: dict, query, key, value, past: int):
    """Yields (batch entry, first row, _Sequence)."""
    cu_q, cu_kv = inputs.get("cu_seqlens_q"), inputs.get("cu_seqlens_kv")
    count = len(cu_q) - 1 if cu_q is not None else query.shape[0]
    for i in range(count):
        batch_idx, row = (0, int(cu_q[i])) if cu_q is not None else (i, 0)
        rows = slice(int(cu_q[i]), int(cu_q[i + 1])) if cu_q is not None else slice(None)
        keys = slice(int(cu_kv[i]), int(cu_kv[i + 1])) if cu_kv is not None else slice(None)
        q, k, v = query[batch_idx, :, rows], key[batch_idx, :, keys], value[batch_idx, :, keys]
        q_length, kv_length, offset = q.shape[1], k.shape[1], past
        if "query_lengths" in inputs:
            q_length = int(np.clip(inputs["query_lengths"][i], 0, q_length))
        if "nonpad_kv_seqlen" in inputs:
            kv_length = int(np.clip(inputs["nonpad_kv_seqlen"][i], 0, kv_length))
            offset = kv_length - q.shape[1] if attributes["alignment"] == "onnx" else past
        if attributes["alignment"] == "bottom_right":
            offset = kv_length - q_length
        if "query_offset" in inputs:
            offset = int(inputs["query_offset"][i if len(inputs["query_offset"]) > 1 else 0])
        slopes = inputs.get("alibi_slopes")
        if slopes is not None and slopes.ndim == 2:
            slopes = slopes[i]
        hidden, bias = _masks(inputs, batch_idx, k.shape[1])
        if query.dtype == FLOAT8:
            q, k, v = (x.astype(np.float64) for x in (q, k, v))
        q, k, v = (x * _factors(inputs, f"{n}_descale", i, x) for x, n in ((q, "query"), (k, "key"), (v, "value")))
        sinks, divisor = inputs.get("sinks"), _factors(inputs, "output_scale", i, q)
        lengths = q_length, kv_length, offset
        instead = inputs.get("empty_row_value")
        yield batch_idx, row, _Sequence(q, k, v, *lengths, hidden, bias, slopes, sinks, divisor, instead)


def _factors(inputs: dict, name: str, sequence_idx: int, heads: np.ndarray) -> np.ndarray | int:
    """A factor for each of the heads [H, rows, columns]: [H, 1, 1], or 1 where there are none."""
    if name not in inputs:
        return 1
    array = inputs[name]
    array = array[sequence_idx] if array.ndim == 2 else array
    return np.broadcast_to(array, heads.shape[:1]).reshape(-1, 1, 1)


def _sequence(s: _Sequence, attributes: dict, working, rounding: _Rounding) -> tuple[np.ndarray, np.ndarray]:
    """Output [H_q, rows, D_v] and lse [H_q, rows] of one sequence."""
    heads, rows, _ = s.query.shape
    group = heads // s.key.shape[0] if s.key.shape[0] else 1
    out = np.zeros((heads, rows, s.value.shape[2]), working)
    lse = np.full((heads, rows), -np.inf, working)
    for h, i, _, _, scores in _chunks(s, attributes, working, rounding):
        v = s.value[h // group].astype(working)
        out[h, i], lse[h, i] = _softmax_times(scores, s, attributes, h, v, rounding)
    return out / s.divisor, lse


def _chunks(s: _Sequence, attributes: dict, working, rounding: _Rounding):
    """Yields (head, up to 512 rows in use, their scaled queries, the head's keys in use, masked scores)."""
    heads, _, dim = s.query.shape
    group = heads // s.key.shape[0] if s.key.shape[0] else 1
    scale = attributes["scale"] or 1.0 / np.sqrt(dim)
    for h in range(heads):
        k = s.key[h // group, : s.kv_length].astype(working)
        for first in range(0, s.query_length, 512):
            i = np.arange(first, min(first + 512, s.query_length))
            q = rounding.result(s.query[h, i].astype(working) * working(scale))
            scores = rounding.result(rounding.operand(q) @ rounding.operand(k).T)
            yield h, i, q, k, _masked_scores(scores, s, attributes, h, i, rounding.result)


def _masked_scores(
    scores: np.ndarray, s: _Sequence, attributes: dict, h: int, i: np.ndarray, round_to: Callable
) -> np.ndarray:
    """Softcap, bias, ALiBi and masks on the scaled scores of rows i of head h."""
    working = scores.dtype.type
    j = np.arange(s.kv_length)
    distance = (i[:, None] + s.offset) - j[None, :]
    if attributes["softcap"]:
        scores = round_to(working(attributes["softcap"]) * np.tanh(scores / working(attributes["softcap"])))
    if s.bias is not None:
        bias = s.bias[h if s.bias.shape[0] > 1 else 0]
        bias = bias[i] if bias.shape[0] > 1 else bias
        bias = np.broadcast_to(bias, (bias.shape[0], s.key.shape[1]))[:, : s.kv_length]
        scores = round_to(scores + bias.astype(working))
    if s.slopes is not None:
        scores = round_to(scores - working(s.slopes[h]) * np.abs(distance).astype(working))
    hide = np.zeros(scores.shape, bool)
    right = 0 if attributes["is_causal"] else attributes["right_window_size"]
    if right >= 0:
        hide |= -distance > right
    if attributes["left_window_size"] >= 0:
        hide |= distance > attributes["left_window_size"]
    if s.hidden is not None:
        hidden = s.hidden[h if s.hidden.shape[0] > 1 else 0]
        hidden = hidden[i] if hidden.shape[0] > 1 else hidden
        hide |= np.broadcast_to(hidden, (hidden.shape[0], s.key.shape[1]))[:, : s.kv_length]
    return np.where(hide, working(-np.inf), scores)


def _exponentials(scores, s: _Sequence, h: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """exp(scores - maximum), their sums with the sink's, and the maxima (0 where a row has no key)."""
    working = scores.dtype.type
    top = scores.max(axis=1, initial=-np.inf)
    if s.sinks is not None:
        top = np.maximum(top, working(s.sinks[h]))
    safe = np.where(np.isneginf(top), working(0), top)
    weights = np.exp(scores - safe[:, None])
    return weights, weights.sum(axis=1) + (np.exp(working(s.sinks[h]) - safe) if s.sinks is not None else 0), safe


def _softmax_times(scores, s: _Sequence, attributes: dict, h: int, v: np.ndarray, rounding: _Rounding):
    """Softmax of the scores with the sink, times the values; rows without keys as `empty_row` says."""
    working = scores.dtype.type
    weights, total, safe = _exponentials(scores, s, h)
    empty = total == 0
    weights = rounding.result(rounding.exponentials(weights) / np.where(empty, 1, total)[:, None])
    used = v[: s.kv_length]
    out = rounding.result(rounding.operand(weights) @ rounding.operand(np.where(np.isfinite(used), used, 0)))
    if not np.isfinite(used).all():  # 0 * NaN is NaN, but a key that the row doesn't see has no part in it
        sees = (~np.isneginf(scores)).astype(working)
        high, low, lost = (sees @ x.astype(working) > 0 for x in (used == np.inf, used == -np.inf, np.isnan(used)))
        lost |= np.isnan(out) | (high & low)
        out[high], out[low], out[lost] = np.inf, -np.inf, np.nan
    if s.empty_row_value is not None:
        out[empty] = s.empty_row_value[h]
    if attributes["empty_row"] == "mean" and empty.any() and len(v):
        out[empty] = rounding.result(v.mean(axis=0))
    with np.errstate(divide="ignore"):
        return out, np.where(empty, -np.inf, safe + np.log(total))
