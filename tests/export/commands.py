# SPDX-License-Identifier: Apache-2.0
"""Runs the command line as a user does: in a process of its own, without a terminal."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys


def environment() -> dict[str, str]:
    """This process's, with its import path: the tests run on the same faexport whether it is installed or not.

    Without COLUMNS, which pytest-xdist sets for its workers: a pipe has no width.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return inherited | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def faexport(*arguments: str | os.PathLike, cwd: pathlib.Path | None = None, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "faexport", *map(os.fspath, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment() | env, capture_output=True, text=True, timeout=600)


def assert_bad_input(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2 and one line on stderr that has these words."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0], done.stderr
