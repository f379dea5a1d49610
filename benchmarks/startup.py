# SPDX-License-Identifier: Apache-2.0
"""CPU time of commands that do little: `--help`, `--version`, and a look at a model of about 100 nodes, beside OnnxSlim
and Polygraphy (pip install onnxslim polygraphy). Prints a table; the least of several runs, the programs in turn."""

from __future__ import annotations

import argparse
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import onnx
import results_file

sys.path.insert(0, os.fspath(pathlib.Path(__file__).parent.parent))
from tests.export import big_model

PROGRAMS = {"faexport": "faexport", "OnnxSlim": "onnxslim", "Polygraphy": "polygraphy"}
LOOKS = {"faexport": ("inspect",), "OnnxSlim": ("--inspect",), "Polygraphy": ("inspect", "model")}


def cpu_seconds(command: Sequence[str]) -> float | None:
    """User and system time of a command and its children, None where it is not installed or fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        return None
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        model = pathlib.Path(folder) / "model.onnx"
        proto = big_model.encoder(big_model.EncoderSize(4, 4, 16))
        onnx.save(proto, model)
        rows = {
            "--help": {name: (program, "--help") for name, program in PROGRAMS.items()},
            "--version": {name: (program, "--version") for name, program in PROGRAMS.items()},
            f"look at {len(proto.graph.node)} nodes": {
                name: (program, *LOOKS[name], os.fspath(model)) for name, program in PROGRAMS.items()
            },
        }
        best: dict[str, dict[str, float | None]] = {row: dict.fromkeys(PROGRAMS) for row in rows}
        for _ in range(runs):
            for row, commands in rows.items():
                for name, command in commands.items():
                    used = cpu_seconds(command)
                    known = best[row][name]
                    best[row][name] = used if known is None else known if used is None else min(known, used)
    versions = results_file.environment("faexport", "onnxslim", "polygraphy", "onnx")
    print(f"{versions['cpu']}, Python {versions['python']}, {versions['versions']}; seconds of CPU, least of {runs}")
    print(f"{'':20}" + "".join(f"{name:>12}" for name in PROGRAMS))
    for row, times in best.items():
        print(f"{row:20}" + "".join(f"{'-' if used is None else f'{used:.2f}':>12}" for used in times.values()))


if __name__ == "__main__":
    main()
