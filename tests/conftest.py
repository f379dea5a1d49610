# SPDX-License-Identifier: Apache-2.0
"""What all tests share: GPU tests are skipped where there is no GPU, and the paths of the compiled library."""

from __future__ import annotations

import functools

import faplugin
import pytest


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


@pytest.fixture(scope="session")
def library() -> str:
    """The path of libfa_ort.so."""
    return faplugin.library_path()
