# SPDX-License-Identifier: Apache-2.0
"""Runs `faexport MODEL --target cuda --verify-on cuda` on the exports that models.py times, and writes what it says.

The exports are verified in float32. The file that models.py times is the same graph in float16: that it has the same
fused operators is checked here, and how far its results are from the original's stands in the rows of models.json.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import dealing
import results_file
import skeletons
from model_pages import NO_TIME
from model_table import CLAIMS

TIMED = "float16 ours"


def verified(name: str, how: str, folder: pathlib.Path, seconds: float) -> dict:
    """What the command says of one export."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="verify-models-") as temporary:
        model, fused, report = (pathlib.Path(temporary) / file for file in ("model.onnx", "fused.onnx", "report.json"))
        model.write_bytes(skeletons.Weights(folder / f"{name}.weights.json").restored(folder / f"{name} {how}.onnx"))
        command = [sys.executable, "-m", "faexport", model, "-o", fused, "--target", "cuda", "--verify-on", "cuda"]
        command += ["--report", report, "--quiet"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return {"status": f"unfinished after {seconds:.0f} s"}
        said = json.loads(report.read_text()) if report.exists() else {}
        found = {"status": (said.get("verification") or {}).get("status", "no report"), "exit_code": done.returncode}
        if done.returncode:
            found["reason"] = " ".join(done.stderr.split())[-300:]
        if fused.exists():
            timed = folder / f"{name} {how} {TIMED}.onnx"
            same = timed.exists() and skeletons.fused_operators(timed) == skeletons.fused_operators(fused)
            runs = said["verification"]["runs"]
            found |= {"settings": sum(bool(run["outputs"]) for run in runs), "operators_as_timed": same}
        return found | {
            "seconds": round(time.monotonic() - start, 1),
            "steps": said.get("provenance", {}).get("seconds"),
        }


Found = dict[tuple[str, str], dict]  # by model and export


def recorded() -> dict:
    path = results_file.RESULTS / "models_verified.json"
    return json.loads(path.read_text()) if path.exists() else {"commit": "", "models": {}}


def verify_all(
    folder: pathlib.Path, models: list[str], gpus: int, jobs: int, seconds: float, known: dict[str, dict]
) -> Iterator[Found]:
    """Yields what is known of all exports each time that one ends; several run on each GPU at a time, those that took
    longest in the recorded run first. `known`: what isn't done again, by model and export."""
    end, free = time.monotonic() + seconds, queue.SimpleQueue()
    for _ in range(max(1, jobs // gpus)):
        for host in dealing.hosts(gpus):
            free.put(host)

    def one(pair: tuple[str, str]) -> dict:
        host = free.get()
        try:
            left = end - time.monotonic()
            return _apart(*pair, folder, left, host.gpu) if left > 1 else {"status": NO_TIME}
        finally:
            free.put(host)

    pairs = [(name, how) for name in models for how in CLAIMS[name].exports]
    before = recorded()["models"]
    pairs.sort(key=lambda pair: -before.get(" ".join(pair), {}).get("seconds", float("inf")))
    found: Found = {pair: known.get(" ".join(pair), {"status": NO_TIME}) for pair in pairs}
    with concurrent.futures.ThreadPoolExecutor(free.qsize()) as pool:
        running = {pool.submit(one, pair): pair for pair in pairs if " ".join(pair) not in known}
        for done in concurrent.futures.as_completed(running):
            found[running[done]] = done.result()
            print(*running[done], done.result(), flush=True)
            yield found


def _apart(name: str, how: str, folder: pathlib.Path, seconds: float, gpu: str) -> dict:
    """verified(), in a process of its own, which sees one GPU."""
    command = [sys.executable, __file__, "--models", folder, "--one", name, how, "--seconds", str(seconds)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"status": "failed", "reason": " ".join(done.stderr.split())[-300:]}
    return json.loads(lines[-1])


def document(found: Found, commit: str) -> dict:
    import torch

    packages = ("torch", "onnxruntime-gpu", "onnxruntime")
    made = results_file.environment(*packages, commit=commit) | {"gpu": torch.cuda.get_device_name()}
    return made | {"models": {f"{name} {how}": said for (name, how), said in found.items()}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=pathlib.Path, required=True, help="folder of the files that models.py made")
    parser.add_argument("--encoders", help="some of the models, with commas between (default: all)")
    parser.add_argument("--gpus", type=int, default=1, help="over how many they are dealt (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=4, help="side by side, over all GPUs (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3600, help="after which no more is verified")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the recorded run, which is of the same commit"
    )
    results_file.add_options(parser)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "EXPORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(verified(*options.one, options.models, options.seconds)))
        return 0
    models = options.encoders.split(",") if options.encoders else list(CLAIMS)
    if wrong := sorted(set(models) - set(CLAIMS)):
        parser.error(f"there is no model {wrong[0]}; there are {', '.join(CLAIMS)}")
    known: dict[str, dict] = {}
    if options.resume:
        before = recorded()
        if before["commit"] != options.commit:
            parser.error(f"the recorded run is of commit {before['commit']}, not of {options.commit}")
        known = {name: said for name, said in before["models"].items() if said["status"] == "passed"}
    found: Found = {}
    for found in verify_all(options.models, models, options.gpus, options.jobs, options.seconds, known):
        path = results_file.write("models_verified", document(found, options.commit), options.record)
    print(f"written: {path}")
    return 0 if all(said["status"] == "passed" for said in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
