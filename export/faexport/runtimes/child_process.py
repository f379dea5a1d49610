# SPDX-License-Identifier: Apache-2.0
"""How a Python process of our own is started: the one that loads a model in onnxruntime, checks it, or measures it.

It imports what this process imports and nothing else. NOTE: without -P, Python would look for modules in the working
directory first, and that is often the folder of a model somebody else made.
"""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys


def run(
    module: str, argument: pathlib.Path, timeout: float, cwd: pathlib.Path | None = None
) -> subprocess.CompletedProcess:
    """Runs main() of a module on a file to its end, and keeps what it prints. Raises subprocess.TimeoutExpired."""
    return subprocess.run(
        command(module, os.fspath(argument)),
        env=environment(),
        cwd=cwd,
        capture_output=True,
        timeout=timeout,
        check=False,
    )


def was_killed(code: int) -> bool:
    """Does this exit code tell that the system ended the process, as it does when memory runs out? That says nothing of
    the model."""
    return code == -signal.SIGKILL


def end_of(code: int) -> str:
    """How a process in which onnxruntime ran has ended with this exit code, as a sentence."""
    if was_killed(code):
        return "onnxruntime's process was killed, as the system does when memory runs out"
    return f"onnxruntime crashed (signal {-code})" if code < 0 else f"onnxruntime's process ended (exit code {code})"


def command(module: str, *arguments: str) -> list[str]:
    """Runs main() of a module, with these arguments behind the program's name."""
    return [sys.executable, "-P", "-c", f"from {module} import main; main()", *arguments]


def environment() -> dict[str, str]:
    """The variables of this process, with its search path for modules. onnxruntime's telemetry is off unless it was
    chosen: it would tell of the user's model, and leave a file (.ses) in the temporary folder."""
    search_path = os.pathsep.join(map(os.path.abspath, sys.path))  # "" is the working directory of this process
    return {"ORT_DISABLE_TELEMETRY": "1", **os.environ, "PYTHONPATH": search_path}
