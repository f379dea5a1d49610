# SPDX-License-Identifier: Apache-2.0
"""The only error budget of the attention tests. Errors are against tests/reference.py in float64.

FlashAttention's rule: our largest error is at most twice that of the unfused computation in the same dtype, + 1e-5. To
it comes one rounding of the output itself, which the unfused result may have escaped by luck; in TF32 that is one of
the values, of which an output is a mean. A log-sum-exp in TF32 has no share in that, but what rounding queries
and keys to 11 bits gives: independent errors e of mean 0, none above u = 2^-11, times factors c. Their sum passes
LAMBDA u ||c|| with a probability of at most 2 exp(-LAMBDA^2 / 2) (Hoeffding's inequality, as Higham and Mary use it, "A
New Approach to Probabilistic Rounding Error Analysis", 2019); uniform errors have a standard deviation of u / sqrt(3),
of which LAMBDA u is seven. The largest of 500 cases on an H200 is 2.57 u ||c||. The relative Frobenius error has a
limit of its own.

Of a float8 query (e4m3) the unfused result is computed in float32 and rounded once. Where weights are rounded to
float8, as by tensor cores, so are its own. Tensor cores also cut the sums of float8 products: each addend of 32 columns
to FLOAT8_SUM_EPSILON of the largest, so that a log-sum-exp may be off by that times the sum of the absolute products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from tests import reference
from tests.problems import FLOAT8, Problem

FACTOR = 2.0
ABSOLUTE = 1e-5
TF32_EPSILON = 2.0**-10
LAMBDA = 4.0
FLOAT8_SUM_EPSILON = 2.0**-12
RELATIVE = {
    "float32": 3e-6,
    "tf32": 6e-4,  # float32 in one TF32 product
    "float16": 6e-4,
    "bfloat16": 5e-3,
    "float8_e4m3fn": 4e-2,
}  # ||out - ref|| / ||ref||, where the unfused error is smaller


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What a problem's outputs are compared with, by output name."""

    exact: dict[str, np.ndarray]  # float64
    unfused: dict[str, np.ndarray]  # each result rounded to the query's dtype
    precision: str  # a key of RELATIVE: the output's dtype, or "tf32"
    lse_rounding: np.ndarray | None  # what each log-sum-exp may be off, where products are of TF32 or float8


def expectation(problem: Problem, float8_weights: bool = False) -> Expectation:
    """Computes both references of tests/reference.py: the costly part of a check, worth keeping for several.

    Args:
        problem: what is computed.
        float8_weights: a float8 query's weights are rounded to float8, and its products summed by tensor cores.
    """
    exact = reference.attention(problem)
    unfused = reference.attention(problem, unfused=True, float8_weights=float8_weights)
    dtype = problem.inputs["query"].dtype
    tf32 = dtype == np.float32 and problem.attributes.get("float32_precision") == "tf32"
    rounding = LAMBDA * TF32_EPSILON / 2 * reference.lse_spread(problem) if tf32 and "lse" in exact else None
    if float8_weights and dtype == FLOAT8 and "lse" in exact:
        rounding = FLOAT8_SUM_EPSILON * reference.score_magnitude(problem)
    return Expectation(exact, unfused, "tf32" if tf32 else reference.output_dtype(problem).name, rounding)


def check(actual: Mapping[str, np.ndarray], expected: Problem | Expectation) -> None:
    """Raises AssertionError with one sentence where an output is wrong.

    Args:
        actual: the operator's outputs by the names of docs/operator.md, shapes as the operator gives them.
        expected: what was computed, or its expectation() where that is known already.
    """
    if isinstance(expected, Problem):
        expected = expectation(expected)
    for name, want in expected.exact.items():
        got = np.asarray(actual[name])
        assert got.shape == want.shape, f"{name} has the shape {got.shape}, expected {want.shape}"
        if name.startswith("present"):
            assert np.array_equal(got.view(np.uint8), np.ascontiguousarray(want).view(np.uint8)), (
                f"{name} is not the exact copy"
            )
            continue
        _compare(
            name,
            got.astype(np.float64),
            want,
            expected.unfused[name].astype(np.float64),
            expected.precision if name == "output" else "float32",
            expected.lse_rounding if name == "lse" else None,
        )


def _compare(
    name: str, got: np.ndarray, want: np.ndarray, unfused: np.ndarray, precision: str, allowance: np.ndarray | None
) -> None:
    if not want.size:
        return
    nan = np.isnan(want)
    wrong = np.isnan(got) != nan
    assert not wrong.any(), f"{name}: {wrong.sum()} of {got.size} elements are NaN in one of both only"
    got, want, unfused = (np.where(nan, 0, x) for x in (got, want, unfused))
    special = (np.isinf(want) | (want == 0)) & ~nan
    assert np.array_equal(got[special], want[special]), f"{name}: rows without keys must be exactly {want[special][0]}"
    scale = np.where(special, 0, want)
    error = np.abs(np.subtract(got, want, where=~special, out=np.zeros_like(want)))
    limit = np.abs(np.subtract(unfused, want, where=~special, out=np.zeros_like(want)))
    epsilon = TF32_EPSILON if precision == "tf32" else float(ml_dtypes.finfo(precision).eps)
    rounding = epsilon / 2 * np.abs(scale).max()
    bound = ABSOLUTE + rounding + (FACTOR * limit.max() if allowance is None else 0)
    excess = error - (0 if allowance is None else np.where(special | nan, 0, allowance))
    worst = np.unravel_index(excess.argmax(), excess.shape)
    allowed = bound + error[worst] - excess[worst]
    place = tuple(map(int, worst))
    assert excess[worst] <= bound, f"{name}: error {error[worst]:.3g} at {place} is above {allowed:.3g}"
    norm = max(float(np.linalg.norm(scale)), 1e-30)
    relative, allowed = np.linalg.norm(error) / norm, max(RELATIVE[precision], FACTOR * np.linalg.norm(limit) / norm)
    if name == "output":
        assert relative <= allowed, f"{name}: relative error {relative:.3g} is above {allowed:.3g}"
