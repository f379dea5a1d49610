# SPDX-License-Identifier: Apache-2.0
"""Runs the command line on models with wrong bytes in them, each in a process of its own: whatever such a file does to
onnx or onnxruntime must end in one line and an exit code of ours.

    python -m tests.export.mutations bert 0 100    (model, first and last number)

Prints one line of JSON a fault. test_mutations.py calls it. The processes are forked from one that has imported
everything, and so are those that the tool itself starts: that is what makes thousands of runs affordable. The command
line imports its modules as late as it can, so this one runs the model itself once before it forks.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import time

import google.protobuf.message
import numpy as np
import onnx

from tests.export import commands

MODELS = pathlib.Path(__file__).parent / "models"
TIMEOUT_SECONDS = 300.0
MEMORY_BYTES = 8 << 30  # of address space: what wants more fails at once, instead of taking the machine with it


def mutated(original: bytes, number: int) -> bytes:
    """`original` with a few wrong bytes; those that protobuf doesn't read are mostly drawn again, since it refuses all
    of them alike."""
    random = np.random.default_rng(number)
    numbers = [k for k, byte in enumerate(original) if not chr(byte).isalnum()]  # sizes, types, tags, weights
    for _ in range(200):
        changed = _changed(original, numbers, random)
        with contextlib.suppress(google.protobuf.message.DecodeError):
            onnx.ModelProto().ParseFromString(changed)
            return changed
        if random.random() < 0.02:
            return changed
    return changed


def _changed(original: bytes, numbers: list[int], random: np.random.Generator) -> bytes:
    """Bytes replaced, flipped, counted up or down, and now and then inserted or removed; half of them no letters."""
    changed = bytearray(original)
    for _ in range(int(random.choice((1, 1, 2, 4)))):
        at = int(random.choice(numbers)) if random.random() < 0.5 else int(random.integers(len(changed)))
        at = min(at, len(changed) - 1)
        kind = random.integers(16)
        if kind < 6:
            changed[at] = int(random.integers(256))
        elif kind < 10:
            changed[at] ^= 1 << int(random.integers(8))
        elif kind < 14:
            changed[at] = (changed[at] + int(random.choice((-1, 1)))) % 256
        elif kind == 14:
            changed[at:at] = random.bytes(int(random.integers(1, 4)))
        else:
            del changed[at : at + int(random.integers(1, 4))]
    return bytes(changed)


class ForkingPopen(subprocess.Popen):
    """Popen of `python -P -c code …` without a new interpreter: the code runs in a fork of this process."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = rest[3:9]
        assert args[:3] == [sys.executable, "-P", "-c"], args
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                for end, place in ((p2cread, 0), (c2pwrite, 1), (errwrite, 2)):
                    if end not in (-1, None):
                        os.dup2(end, place)
                for end in (p2cwrite, c2pread, errread):
                    if end not in (-1, None):
                        os.close(end)
                sys.stdout, sys.stderr = (open(place, "w", closefd=False) for place in (1, 2))
                sys.argv = ["-c", *args[4:]]
                exec(args[3], {"__name__": "__main__"})
                sys.stdout.flush()
                code = 0
            os._exit(code)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def run(model: pathlib.Path, out: pathlib.Path, report: pathlib.Path) -> tuple[int | None, str, str]:
    """(exit code, or None where it took too long, stdout, stderr) of `faexport model -o out --report report`."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        done = commands.here(model, "-o", out, "--report", report, "--quiet")
        with open(writing, "w") as pipe:
            json.dump([done.returncode, done.stdout, done.stderr], pipe)
        os._exit(0)
    os.close(writing)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reading)
            return None, "", ""
        time.sleep(0.01)
    with open(reading) as pipe:
        answer = pipe.read()
    return tuple(json.loads(answer)) if answer else (-1, "", "the process crashed")


def fault(model: pathlib.Path, folder: pathlib.Path) -> tuple[str, str]:
    """What is wrong with a run on this model, or "", and how the run ended."""
    out, report = folder / "out.onnx", folder / "r.json"
    code, printed, errors = run(model, out, report)
    told = json.loads(report.read_text()) if report.exists() else {}
    verified = (told.get("verification") or {}).get("status")
    ended = f"exit {code}" + (f", {told.get('num_fused')} fused, {verified}" if code == 0 else "")
    if code not in (0, 1, 2):
        return f"exit {code}: {errors[-400:]}", ended
    if printed or (code == 0 and errors) or (code and not (errors.startswith("error: ") and errors.count("\n") == 1)):
        return f"exit {code}, and printed {printed[-200:]!r} {errors[-400:]!r}", ended
    if out.exists() and (code or verified != "passed"):
        return f"exit {code}, written although verification says {verified}", ended
    left = sorted(entry.name for entry in folder.iterdir() if entry not in (model, out, report))
    return f"left {left}" if left else "", ended


def import_everything(name: str) -> None:
    """Imports whatever a run on this model imports, and what its child processes do."""
    import onnxruntime  # noqa: F401

    done = commands.here(MODELS / f"{name}.onnx", "--dry-run", "--quiet", "-o", f"{name}.fa.onnx")
    assert done.returncode == 0, done.stderr
    gc.freeze()  # a child's collections would copy the pages of all these objects


def main() -> None:
    name, first, last = sys.argv[1], *map(int, sys.argv[2:4])
    import_everything(name)
    subprocess.Popen = ForkingPopen
    original = (MODELS / f"{name}.onnx").read_bytes()
    ends: dict[str, int] = {}
    for number in range(first, last):
        data = mutated(original, number) if number else original
        with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
            path = pathlib.Path(folder) / "model.onnx"
            path.write_bytes(data)
            wrong, ended = fault(path, path.parent)
        ends[ended] = ends.get(ended, 0) + 1
        if wrong:
            print(json.dumps({"model": name, "number": number, "fault": wrong}), flush=True)
    print(json.dumps({"model": name, "done": last - first, "ends": ends}), flush=True)


if __name__ == "__main__":
    main()
