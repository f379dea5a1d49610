# SPDX-License-Identifier: Apache-2.0
"""The gradients of the operator in NumPy, derived by hand from tests/reference.py: the oracle of the backward tests.

`gradients(problem, ...)` is in float64 and is itself held against differences of the forward oracle. With
`unfused=True` it is what automatic differentiation of a graph of MatMul, Softmax, MatMul gives in the tensors' own
dtype, each result rounded: its error is the measure of the others', as in tests/tolerances.py.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from tests import reference, tolerances
from tests.problems import Case, Problem


def bias_name(problem: Problem) -> str | None:
    """The input that is added to scores, if there is one."""
    for name in ("attn_bias", "attn_mask"):
        if name in problem.inputs and problem.inputs[name].dtype != np.bool_:
            return name
    return None


@np.errstate(over="ignore", invalid="ignore")
def gradients(
    problem: Problem, d_out: np.ndarray, d_lse: np.ndarray | None = None, unfused: bool = False
) -> dict[str, np.ndarray]:
    """Gradients by name: query, key and value as [B, H, S, D]; bias in its own shape; sinks [H_q].

    Args:
        problem: as docs/operator.md says it; no cache, and empty_row "zero".
        d_out: [B, H_q, S_q, D_v].
        d_lse: [B, H_q, S_q].
        unfused: round every intermediate result to the dtype of the query, as an unfused graph does.
    """
    attributes = reference.DEFAULTS | problem.attributes
    query, key, value = reference.operands(problem, attributes)
    working = np.float32 if unfused else np.float64
    rounding = reference._Rounding()
    if unfused:
        rounding.result = lambda x: x.astype(query.dtype).astype(np.float32)
        if attributes["float32_precision"] == "tf32" and query.dtype == np.float32:
            rounding.operand = reference._tf32
    found = {"query": np.zeros(query.shape, working), "key": np.zeros(key.shape, working)}
    found["value"] = np.zeros(value.shape, working)
    scores = np.zeros((*query.shape[:3], key.shape[2]), working) if bias_name(problem) else None
    if "sinks" in problem.inputs:
        found["sinks"] = np.zeros(query.shape[1], working)
    group = query.shape[1] // max(1, key.shape[1])
    starts = problem.inputs.get("cu_seqlens_kv", np.zeros(query.shape[0] + 1, int))
    sequences = reference._sequences(problem.inputs, attributes, query, key, value, 0)
    for first_key, (batch_idx, row, s) in zip(starts, sequences, strict=False):
        keys = slice(first_key, first_key + s.kv_length)
        for h, i, q, k, masked in reference._chunks(s, attributes, working, rounding):
            rows = row + i
            do = d_out[batch_idx, h, rows].astype(working)
            dl = 0 if d_lse is None else d_lse[batch_idx, h, rows].astype(working)[:, None]
            used = _finite(s.value[h // group, : s.kv_length].astype(working))
            dq, dk, dv, ds, sink = _rows(s, attributes, rounding, h, q, _finite(k), masked, used, do, dl)
            found["query"][batch_idx, h, rows] = dq
            found["key"][batch_idx, h // group, keys] += dk
            found["value"][batch_idx, h // group, keys] += dv
            if scores is not None:
                scores[batch_idx, h, i, : s.kv_length] = ds
            if "sinks" in found:
                found["sinks"][h] += sink
    if scores is not None:
        found["bias"] = _reduce(scores, problem.inputs[bias_name(problem)])
    return {
        name: rounding.result(array) if name in ("query", "key", "value") else array for name, array in found.items()
    }


def _finite(x: np.ndarray) -> np.ndarray:
    """A key that no row sees may be anything; 0 times it is 0."""
    return np.where(np.isfinite(x), x, 0)


def _rows(s, attributes: dict, rounding: reference._Rounding, h: int, q, k, masked, v, do, dl):
    """Of some rows of a head: dQ, their shares of dK and dV, the gradients of the scores, their share of the sink's."""
    working, round_to = masked.dtype.type, rounding.result

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return rounding.operand(a) @ rounding.operand(b)

    weights, total, safe = reference._exponentials(masked, s, h)
    total = np.where(total == 0, 1, total)[:, None]
    p = round_to(weights / total)
    dp = round_to(product(do, v.T))
    delta = (p * dp).sum(axis=1, keepdims=True) - dl
    ds = d_masked = round_to(p * (dp - delta))
    if attributes["softcap"]:
        tanh = round_to(np.tanh(round_to(product(q, k.T)) / working(attributes["softcap"])))
        ds = round_to(ds * (1 - tanh * tanh))
    scale = working(attributes["scale"] or 1.0 / np.sqrt(q.shape[1]))
    sink = 0
    if s.sinks is not None:
        sink = -(np.exp(working(s.sinks[h]) - safe)[:, None] / total * delta).sum()
    return round_to(product(ds, k)) * scale, product(ds.T, q), product(p.T, do), d_masked, sink


def _reduce(scores: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """[B, H, S_q, S_kv] summed over the axes that the bias is broadcast on; its last axis may end early."""
    shape = (1,) * (4 - bias.ndim) + bias.shape
    if shape[3] > 1:
        scores = scores[..., : shape[3]]
    axes = tuple(axis for axis in range(4) if shape[axis] == 1)
    return scores.sum(axis=axes, keepdims=True).reshape(bias.shape)


def draw(case: Case, problem: Problem) -> tuple[np.ndarray, np.ndarray | None]:
    """d_out, and for every second case d_lse; equal for equal cases."""
    query, _, value = reference.operands(problem, reference.DEFAULTS | problem.attributes)
    rng = np.random.default_rng([1, *case.id.encode()])
    d_out = rng.standard_normal((*query.shape[:3], value.shape[3]), np.float32).astype(query.dtype)
    return d_out, rng.standard_normal(query.shape[:3], np.float32) if case.seqlen_q % 2 == 0 else None


Expectation = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


def expectation(problem: Problem, d_out: np.ndarray, d_lse: np.ndarray | None = None) -> Expectation:
    """The gradients in float64, and the unfused ones: the costly part of a check, worth keeping for several."""
    return gradients(problem, d_out, d_lse), gradients(problem, d_out, d_lse, unfused=True)


def check(
    actual: dict[str, np.ndarray],
    problem: Problem,
    d_out: np.ndarray,
    d_lse: np.ndarray | None = None,
    expected: Expectation | None = None,
) -> None:
    """FlashAttention's rule: the largest error is at most twice the unfused one's, + 1e-5, + one rounding of it."""
    exact, unfused = expected or expectation(problem, d_out, d_lse)
    assert set(actual) == set(exact)
    for name, want in exact.items():
        got = np.asarray(actual[name]).astype(np.float64)
        assert got.shape == want.shape, f"d_{name} has the shape {got.shape}, expected {want.shape}"
        if not want.size:
            continue
        dtype = problem.inputs["query"].dtype if name in ("query", "key", "value") else np.float32
        rounding = float(ml_dtypes.finfo(dtype).eps) / 2 * np.abs(want).max()
        bound = tolerances.FACTOR * np.abs(unfused[name] - want).max() + tolerances.ABSOLUTE + rounding
        error = np.abs(got - want)
        assert not np.isnan(error).any(), f"d_{name}: {np.isnan(error).sum()} of {got.size} elements are NaN"
        assert error.max() <= bound, f"d_{name}: error {error.max():.3g} is above {bound:.3g}"
