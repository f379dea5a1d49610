# SPDX-License-Identifier: Apache-2.0
"""Models with wrong bytes: exit code 0, 1 or 2, one line on stderr, and nothing written that was not compared.

MUTATIONS=5000 runs more of them than `make test` does.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

from tests.export import commands, mutations

COUNT = int(os.environ.get("MUTATIONS", "300"))
PART = max(20, COUNT // 50)  # of a model, in one process, which takes seconds to start
NAMES = sorted(path.stem for path in mutations.MODELS.glob("*.onnx"))


def test_there_are_five_models() -> None:
    assert len(NAMES) == 5


@pytest.mark.parametrize("part", range(math.ceil(COUNT / len(NAMES) / PART)))
@pytest.mark.parametrize("name", NAMES)
def test_wrong_bytes(name: str, part: int) -> None:
    command = [sys.executable, "-m", "tests.export.mutations", name, str(part * PART), str((part + 1) * PART)]
    done = subprocess.run(command, env=commands.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *faults, last = map(json.loads, done.stdout.splitlines())
    assert faults == []
    ends = last["ends"]
    assert sum(ends.values()) == PART
    if part == 0:  # its first is the model itself, and not every mutation is fatal, or harmless
        assert ends["exit 0, 1 fused, passed"] > 1 and ends["exit 2"] > 1, ends
