# SPDX-License-Identifier: Apache-2.0
"""A sample of the cases under compute-sanitizer: no access out of bounds, no race in shared memory, no barrier
that threads leave out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("torch")
from tests.gpu import sanitizer_sample

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.parametrize("part", sanitizer_sample.PARTS)
@pytest.mark.parametrize("tool", ("memcheck", "racecheck", "synccheck"))
def test_sample(tool: str, part: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not in PATH")
    options = ["--tool", tool, "--error-exitcode", "9", "--kernel-name", "kernel_substring=2fa"]
    environment = dict(os.environ)
    if tool == "memcheck":  # PyTorch's cache would hide an access beyond a tensor; bytes between allocations show it
        options += ["--padding", "512"]
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    command = [sanitizer, *options, sys.executable, "-m", sanitizer_sample.__name__, part]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    assert re.search(r"^[1-9]\d+ runs$", log, re.MULTILINE), log[-4000:]
    assert "ERROR SUMMARY: 0 errors" in log or "RACECHECK SUMMARY: 0 hazards" in log, log[-4000:]
