# SPDX-License-Identifier: Apache-2.0
"""Runs the command line as a user does: in a process of its own, without a terminal."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys

from faexport import cli
from faexport.files.signals import SIGNALS


def environment() -> dict[str, str]:
    """This process's, with its import path: the tests run on the same faexport whether it is installed or not.

    Without COLUMNS, which pytest-xdist sets for its workers: a pipe has no width.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return inherited | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def faexport(*arguments: str | os.PathLike, cwd: pathlib.Path | None = None, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "faexport", *map(os.fspath, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment() | env, capture_output=True, text=True, timeout=600)
    done.stderr = _without_progress(done.stderr)
    return done


def _without_progress(stderr: str) -> str:
    """On a machine that has other work, any command may take long enough to tell so (terminal.FIRST_LINE)."""
    return re.sub(r"^.*: \d+ s since the start\n", "", stderr, flags=re.MULTILINE)


def started(*arguments: str | os.PathLike, heeding: int, **env: str) -> subprocess.Popen[bytes]:
    """As faexport(), not waited for. `heeding`: a signal, which a test that runs under nohup or behind & ignores."""
    command = [sys.executable, "-m", "faexport", *map(os.fspath, arguments)]
    heed = functools.partial(signal.signal, heeding, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment() | env, preexec_fn=heed, **pipes)


def on_a_full_disk(*arguments: str | os.PathLike) -> subprocess.CompletedProcess:
    """As faexport(), where no file can exceed 2000 bytes."""
    command = [sys.executable, "-m", "faexport", *map(os.fspath, arguments)]
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2000, 2000))
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, preexec_fn=limit)


def here(*arguments: str | os.PathLike, progress: bool = False) -> subprocess.CompletedProcess:
    """As faexport(), in this process: faster. Not for tests of signals, of the environment, or of crashes. `progress`:
    stderr with what is told of long work."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, {number: signal.getsignal(number) for number in SIGNALS}
    sys.argv = ["faexport", *map(os.fspath, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before[0]
        for number, handler in before[1].items():
            signal.signal(number, handler)
    told = err.getvalue() if progress else _without_progress(err.getvalue())
    return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), told)


def assert_bad_input(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2 and one line on stderr that has these words."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0], done.stderr
