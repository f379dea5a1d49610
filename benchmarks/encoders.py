# SPDX-License-Identifier: Apache-2.0
"""Times whole encoders in onnxruntime, by exporter and by tool: BERT, MiniLM, DistilBERT, ViT, CLIP text, Whisper, T5.

First the files (encoder_models.py), where --models has none: `--export-only` stops there. They are graphs without their
weights, which are drawn again when a file is loaded (skeletons.py), so the folder may go to another machine. Then the
times, on CUDA with bound inputs and outputs or on the CPU; results are compared with the float32 original's. Each
encoder runs in a process of its own (encoder_times.py): they load at the same time, and are timed one after the other
(dealing.py). What fails is written down. Rows go into the results as they come, and rows of an earlier part of the same
run (--encoders) stay, so that the whole may be split over several commands, or over the GPUs of one host (--gpus).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import fcntl
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import dealing
import encoder_times
import results_file
import skeletons


def _export_all(options: argparse.Namespace) -> None:
    """Each encoder and export in a process of its own; they take two threads each, and memory."""
    from model_table import MODELS

    todo = [(name, how) for name in options.encoders for how in MODELS[name].exports]
    todo = [pair for pair in todo if _to_do(*pair, options.models)]
    options.models.mkdir(parents=True, exist_ok=True)

    def export(pair: tuple[str, str]) -> None:
        name, how = pair
        start = time.monotonic()
        command = [sys.executable, __file__, "--models", options.models, "--layers", str(options.layers)]
        environment = os.environ | {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
        log = options.models / f"{name} {how}.log"
        with log.open("w") as file:
            done = subprocess.run(
                [*command, "--export-one", name, how], stdout=file, stderr=file, env=environment, check=False
            )
        said = options.models / f"{name} {how}.json"
        if not said.exists():
            said.write_text(json.dumps({"failed": {"all": f"the process ended with {done.returncode}"}}))
        failed = json.loads(said.read_text())["failed"]
        print(f"{name} {how}: {time.monotonic() - start:.0f} s", *(f"{k}: {v}" for k, v in failed.items()), sep="\n  ")

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(export, todo))


def _to_do(name: str, how: str, folder: pathlib.Path) -> bool:
    """Is a file missing of which nobody has said that it can't be made?"""
    from encoder_models import missing

    said = folder / f"{name} {how}.json"
    failed = json.loads(said.read_text())["failed"] if said.exists() else {}
    return any(title not in failed and "all" not in failed for title in missing(name, how, folder))


def _show(row: dict) -> None:
    print(f"\n{row['device']} {row['dtype']} {row['row']}: milliseconds, difference from the float32 original")
    for name, found in sorted(row["contestants"].items(), key=lambda item: item[1]["median_ms"]):
        host = f"  host {found['host_ms']:.3f}  latency {found['latency_ms']:.3f}" if "host_ms" in found else ""
        away = "not a number" if found["difference"] is None else f"{found['difference']:.1e}"
        print(f"  {name:<22} {found['median_ms']:9.3f} ({found['q1_ms']:.3f} to {found['q3_ms']:.3f}){host}  {away}")
    for name, why in row["failed"].items():
        print(f"  {name:<22} failed: {why}", flush=True)


def _run_all(options: argparse.Namespace) -> list[dict]:
    rows: list[dict] = []

    def said(task: dealing.Task, line: str) -> None:
        if not line.startswith('{"encoder"'):
            print(f"[{time.monotonic() - start:.0f} s] {task.name}: {line}", flush=True)
            return
        rows.append(json.loads(line))
        _show(rows[-1])

    def ended(task: dealing.Task, why: str) -> None:
        if why:
            print(f"{task.name}: {why}", flush=True)
            rows.extend(_refused(task, why, rows, options))
        with _alone(options.models):
            _write(options, rows)

    start, where = time.monotonic(), dealing.hosts(options.gpus if options.device == "cuda" else 0)
    tasks = [_task(name, dtype, options) for dtype in options.dtypes for name in options.encoders]
    dealing.run(tasks, where, max(1, options.jobs // len(where)), options.seconds, said, ended)
    return rows


def _task(name: str, dtype: str, options: argparse.Namespace) -> dealing.Task:
    """A process that times one model. What it costs: its weights, for each size."""
    from model_table import MODELS

    command = [sys.executable, __file__, "--models", options.models, "--device", options.device]
    command += ["--threads", str(options.threads), "--rounds", str(options.rounds), "--sizes", options.sizes]
    command += ["--layers", str(options.layers), "--compiled" if options.compiled else "--no-compiled"]
    recipes = options.models / f"{name}.weights.json"
    weights = skeletons.num_weights(recipes) if recipes.exists() else 0
    cost = weights * len(encoder_times.sizes_of(MODELS[name], options))
    return dealing.Task(f"{name} {dtype}", [*command, "--time-one", name, dtype], cost)


def _refused(task: dealing.Task, why: str, rows: list[dict], options: argparse.Namespace) -> list[dict]:
    """Rows of the sizes that a task which failed has said nothing of."""
    from model_table import MODELS

    name, dtype = task.name.split()
    sizes = encoder_times.sizes_of(MODELS[name], options)
    empty = [encoder_times.empty_row(name, MODELS[name], dtype, size, options.device) for size in sizes]
    said = {(row["row"], row["dtype"]) for row in rows}
    return [row | {"failed": {"all": why}} for row in empty if (row["row"], dtype) not in said]


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Several commands may write to the same results, one at a time."""
    with (folder / "results.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(options: argparse.Namespace, rows: list[dict]) -> pathlib.Path:
    """With the rows of earlier parts of the same run: the same commit on the same machine, or with --add another one,
    which its rows name."""
    from model_table import MODELS

    environment = results_file.environment(
        *("torch", "transformers", "onnxruntime-gpu", "onnxruntime", "onnxscript"), commit=options.commit
    )
    name = options.table if options.device == "cuda" else f"{options.table}_cpu"
    path = (results_file.RESULTS if options.record else results_file.SCRATCH) / f"{name}.json"
    document = {**environment, "threads": options.threads, "layers": options.layers, "fused": {}, "rows": []}
    if options.device == "cuda":
        import torch

        document |= {"gpu": torch.cuda.get_device_name(), "num_gpus": options.gpus}
    if path.exists():
        before = json.loads(path.read_text())
        alike = ("cpu", "gpu", "layers", "threads", *(() if options.add else ("commit",)))
        if all(before.get(key) == document.get(key) for key in alike):
            if before["commit"] != document["commit"]:
                rows = [row | {"commit": document["commit"]} for row in rows]
            document |= {key: before[key] for key in ("fused", "rows", "exported_by", "commit", "date")}
    new = {(row["row"], row["dtype"]) for row in rows}
    all_rows = [row for row in document["rows"] if (row["row"], row["dtype"]) not in new] + rows
    place = {name: number for number, name in enumerate(MODELS)}
    all_rows.sort(key=lambda r: (r["dtype"], place[r["encoder"]], r["batch_size"] * r["length"], r["length"]))
    document["rows"] = all_rows
    for encoder in options.encoders:
        for how in MODELS[encoder].exports:
            document["fused"][f"{encoder} {how}"] = {
                path.stem.removeprefix(f"{encoder} {how} "): skeletons.fused_operators(path)
                for path in sorted(options.models.glob(f"{encoder} {how} *.onnx"))
            }
    exported = (path for row in rows for path in options.models.glob(f"{row['encoder']} * unfused.onnx"))
    document["exported_by"] = sorted({*document.get("exported_by", []), *skeletons.exporters(exported)})
    return results_file.write(name, document, options.record)


def _options(table: str, description: str) -> argparse.Namespace:
    """The command line's options, with all models and types where none are named."""
    parser = argparse.ArgumentParser(description=description)
    parser.set_defaults(table=table)
    parser.add_argument("--models", type=pathlib.Path, help="folder of the files; they are made where it has none")
    parser.add_argument("--export-only", action="store_true", help="write the files to --models and stop")
    parser.add_argument("--time-only", action="store_true", help="time the files that --models has, and make none")
    parser.add_argument("--encoders", help="some of them, with commas between (default: all)")
    parser.add_argument("--sizes", default="", help="some of them, such as 1x128,8x512 (default: all)")
    parser.add_argument("--dtypes", help="with commas between (default: float16,float32, on the CPU float32)")
    parser.add_argument("--device", choices=encoder_times.PROVIDERS, default="cuda", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="of a run on the CPU (default: %(default)s)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, len(os.sched_getaffinity(0)) // 2),
        help="processes side by side, over all GPUs (default: %(default)s)",
    )
    parser.add_argument("--gpus", type=int, default=1, help="over how many the models are dealt (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=0, help="of each encoder, to try this out; 0: all (%(default)s)")
    parser.add_argument(
        "--compiled", action=argparse.BooleanOptionalAction, default=table == "models",
        help="time what torch.compile makes of the same model, too (on CUDA; default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--add", action="store_true", help="to the rows of an earlier commit, on such a machine")
    parser.add_argument("--rounds", type=int, default=9, help="times each contestant's turn comes (%(default)s)")
    parser.add_argument("--seconds", type=float, default=86400, help="after which no more is timed")
    results_file.add_options(parser)
    parser.add_argument("--export-one", nargs=2, metavar=("ENCODER", "EXPORT"), help=argparse.SUPPRESS)
    parser.add_argument("--time-one", nargs=2, metavar=("ENCODER", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    from model_table import TABLES

    names = list(TABLES[options.table])
    options.encoders = options.encoders.split(",") if options.encoders else names
    options.dtypes = (options.dtypes or ("float32" if options.device == "cpu" else "float16,float32")).split(",")
    if wrong := sorted(set(options.encoders) - set(names)):
        parser.error(f"there is no model {wrong[0]}; there are {', '.join(names)}")
    if options.time_only and not options.models:
        parser.error("--time-only needs --models")
    return options


def main(table: str = "encoders", description: str = __doc__.splitlines()[0]) -> int:
    """The command for one of model_table.TABLES. It starts itself again for each model."""
    options = _options(table, description)
    if options.export_one:
        import encoder_models

        encoder_models.write_files(*options.export_one, options.models, options.layers)
        return 0
    if options.time_one:
        encoder_times.measure(options)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        options.models = options.models or pathlib.Path(temporary)
        if not options.time_only:
            _export_all(options)
        if options.export_only:
            return 0
        rows = _run_all(options)
        if rows:
            with _alone(options.models):
                print(f"written: {_write(options, rows)}")
        return 0 if any(row["contestants"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
