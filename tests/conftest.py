# SPDX-License-Identifier: Apache-2.0
"""What all tests share: GPU tests are skipped where there is no GPU, and the paths of the compiled library.

With FA_REQUIRE_GPU=1 nothing that needs a GPU may be skipped: a missing device, package or provider is a failure then,
so that a run on a GPU machine can't be green without having tested anything.
"""

from __future__ import annotations

import functools
import os
import pathlib

import faplugin
import pytest

GPU_TESTS = pathlib.Path(__file__).with_name("gpu")
REQUIRE_GPU = os.environ.get("FA_REQUIRE_GPU", "0") not in ("", "0")


@functools.cache
def has_gpu() -> bool:
    """Can the operator run on a CUDA device of this machine?"""
    spec = ((1, 1, 1, 64), "float16")
    try:
        faplugin.explain(spec, spec, spec, device="cuda")
    except RuntimeError:  # no driver, no device, or a build without CUDA kernels
        return False
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing and not has_gpu():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="no GPU, or a build without CUDA kernels"))


def _fail_instead(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Makes a failure of a skip."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome, report.longrepr = "failed", f"FA_REQUIRE_GPU is set, but this was skipped: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if REQUIRE_GPU and report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("gpu"):
        _fail_instead(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    report = yield
    if REQUIRE_GPU and report.skipped and GPU_TESTS in collector.path.parents:
        _fail_instead(report)
    return report


@pytest.fixture(scope="session")
def library() -> str:
    """The path of libfa_ort.so."""
    return faplugin.library_path()
