# SPDX-License-Identifier: Apache-2.0
"""The only error budget of the attention tests. Errors are against tests/reference.py in float64.

FlashAttention's rule: our largest error is at most twice that of the unfused computation in the same dtype, + 1e-5. To
it comes one rounding of the output itself, which the unfused result may have escaped by luck; in TF32 that is one of
the values, of which an output is a mean, and one of the scores, which a log-sum-exp is at least as large as. The
relative Frobenius error has a limit of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from tests import reference
from tests.problems import Problem

FACTOR = 2.0
ABSOLUTE = 1e-5
TF32_EPSILON = 2.0**-10
RELATIVE = {
    "float32": 3e-6,
    "tf32": 6e-4,  # float32 in one TF32 product
    "float16": 6e-4,
    "bfloat16": 5e-3,
}  # ||out - ref|| / ||ref||, where the unfused error is smaller


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What a problem's outputs are compared with, by output name."""

    exact: dict[str, np.ndarray]  # float64
    unfused: dict[str, np.ndarray]  # each result rounded to the query's dtype
    precision: str  # a key of RELATIVE: the query's dtype, or "tf32"


def expectation(problem: Problem) -> Expectation:
    """Computes both references of tests/reference.py: the costly part of a check, worth keeping for several."""
    exact, unfused = reference.attention(problem), reference.attention(problem, unfused=True)
    dtype = problem.inputs["query"].dtype
    tf32 = dtype == np.float32 and problem.attributes.get("float32_precision") == "tf32"
    return Expectation(exact, unfused, "tf32" if tf32 else dtype.name)


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
            expected.precision if name == "output" or expected.precision == "tf32" else "float32",
        )


def _compare(name: str, got: np.ndarray, want: np.ndarray, unfused: np.ndarray, precision: str) -> None:
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
    bound = FACTOR * limit.max() + ABSOLUTE + rounding
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error.max() <= bound, f"{name}: error {error.max():.3g} at {tuple(map(int, worst))} is above {bound:.3g}"
    norm = max(float(np.linalg.norm(scale)), 1e-30)
    relative, allowed = np.linalg.norm(error) / norm, max(RELATIVE[precision], FACTOR * np.linalg.norm(limit) / norm)
    if name == "output":
        assert relative <= allowed, f"{name}: relative error {relative:.3g} is above {allowed:.3g}"
