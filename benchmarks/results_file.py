# SPDX-License-Identifier: Apache-2.0
"""What every benchmark does alike: times contestants in turn, says on which machine, writes benchmarks/results."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = pathlib.Path(__file__).with_name("results")  # committed; the documentation's tables are made from it
SCRATCH = ROOT / "build" / "benchmarks"


def add_options(parser: argparse.ArgumentParser, name: str = "") -> None:
    """--commit, for a tree that is no checkout, --record, and where the benchmark has a name --name."""
    parser.add_argument("--commit", default="", help="of the sources, where this is no checkout of it")
    if name:
        parser.add_argument("--name", default=name, help="of the JSON file that is written")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results, not to build/benchmarks")


def cpu_model() -> str:
    """The processor as /proc/cpuinfo names it, with the widest vectors that it has."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    vectors = next((name for name in ("avx512f", "avx2") if name in flags), "")
    return " ".join(filter(None, (fields.get("model name", platform.machine()), vectors)))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", os.fspath(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def environment(*packages: str, commit: str = "") -> dict:
    """Machine, versions, commit and date: what a number means nothing without. `commit`: where this is no checkout."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or _git("rev-parse", "--short", "HEAD"),
        "sources_changed_since": None if commit else bool(_git("status", "--porcelain", "-uno", "csrc", "plugin")),
        "cpu": cpu_model(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
    }


def time_in_turn(
    contestants: Mapping[str, Callable[[], object]], rounds: int, warmups: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call, by name. Every round runs each contestant once, so that all see the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmups + rounds):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            if turn >= warmups:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median, fastest and slowest of a list of times."""
    times = {"median_ms": statistics.median(seconds), "min_ms": min(seconds), "max_ms": max(seconds)}
    return {name: round(1e3 * x, 3) for name, x in times.items()}


def write(name: str, document: dict, record: bool) -> pathlib.Path:
    """Writes NAME.json, whole or not at all: to benchmarks/results where the run is to be recorded, else to
    build/benchmarks, since the documentation is tested against what is recorded."""
    folder = RESULTS if record else SCRATCH
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(document, indent=2) + "\n")
    partial.replace(path)
    return path
