# SPDX-License-Identifier: Apache-2.0
"""A sample of the cases under the address and undefined-behaviour sanitizers: nothing leaves a tensor."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.csrc import conftest


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_cases_under_sanitizers(direction):
    runtime = subprocess.run(
        ["c++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("this compiler has no libasan.so")
    options = ("-DCMAKE_BUILD_TYPE=Debug", f"-DCMAKE_CXX_FLAGS={conftest.SANITIZE}")
    module = conftest.build(conftest.ROOT / "build" / "tests-csrc-sanitized", *options)
    # NumPy's and Python's own allocations are not looked at for leaks; libstdc++ must be there before a module throws.
    cxx = subprocess.run(
        ["c++", "-print-file-name=libstdc++.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime}:{cxx}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
    }
    command = [sys.executable, "-m", "tests.csrc.run_cases", os.fspath(module), direction]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
