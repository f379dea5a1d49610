# SPDX-License-Identifier: Apache-2.0
"""Expected results of the cases to come, computed by other processes while the GPU works on the present one.

The references in float64 take most of the time of these tests. Every core but one computes them, in the order of the
tests and no further ahead than a few cases for each core.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from tests import cases, reference_backward, tolerances

CASES_AHEAD = 4  # of each process
Expected = Callable[[cases.Case], tolerances.Expectation]
ExpectedGradients = Callable[[cases.Case], reference_backward.Expectation]


def _expectation(case: cases.Case) -> tolerances.Expectation:
    return tolerances.expectation(case.problem(), float8_weights=True)


def _gradients(case: cases.Case) -> reference_backward.Expectation:
    problem = case.problem()
    return reference_backward.expectation(problem, *reference_backward.draw(case, problem))


class Ahead:
    """Gives the expectation of a case, and keeps the processes busy with those of the next ones."""

    def __init__(self, pool: concurrent.futures.Executor, count: int, coming: Iterable[cases.Case], compute: Callable):
        self._pool = pool
        self._compute = compute
        self._coming = iter(coming)
        self._pending: dict[str, concurrent.futures.Future] = {}
        self._submit(count)

    def _submit(self, count: int) -> None:
        for case in itertools.islice(self._coming, count):
            if case.id not in self._pending:
                self._pending[case.id] = self._pool.submit(self._compute, case)

    def __call__(self, case: cases.Case) -> Any:
        self._submit(1)
        pending = self._pending.pop(case.id, None)
        return pending.result() if pending is not None else self._compute(case)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes that start here run NumPy's products in one thread: they share the cores already."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _computed_ahead(request: pytest.FixtureRequest, compute: Callable) -> Iterator[Callable]:
    """Where pytest-xdist runs the tests in several processes, each of these computes its own."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        yield compute
        return
    own = (item.callspec.params for item in request.session.items if item.path == request.path and _has_case(item))
    coming = [params["case"] for params in own]
    count = max(1, (os.cpu_count() or 2) - 1)
    pool = concurrent.futures.ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))
    with _one_thread_each(), pool:
        yield Ahead(pool, count * CASES_AHEAD, coming, compute)
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def expected(request: pytest.FixtureRequest) -> Iterator[Expected]:
    """The expectation of a case; those of the module's later tests, whose parameter "case" it is, are under way."""
    yield from _computed_ahead(request, _expectation)


@pytest.fixture(scope="module")
def expected_gradients(request: pytest.FixtureRequest) -> Iterator[ExpectedGradients]:
    """The same of the backward pass, from the gradients that reference_backward.draw() gives."""
    yield from _computed_ahead(request, _gradients)


def _has_case(item: pytest.Item) -> bool:
    return hasattr(item, "callspec") and "case" in item.callspec.params
