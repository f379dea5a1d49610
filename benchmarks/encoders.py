# SPDX-License-Identifier: Apache-2.0
"""Times whole encoders in onnxruntime, by exporter and by tool: BERT, MiniLM, DistilBERT, ViT, CLIP text, Whisper, T5.

First the files (encoder_models.py), where --models has none: `--export-only` stops there. They are graphs without their
weights, which are drawn again when a file is loaded (skeletons.py), so the folder may go to another machine. Then the
times, on CUDA with bound inputs and outputs or on the CPU; results are compared with the float32 original's. Each
encoder runs in a process of its own: they load at the same time, and are timed one after the other. What fails is
written down. Rows go into the results as they come, and rows of an earlier part of the same run (--encoders) stay, so
that the whole may be split over several commands.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import fcntl
import functools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import results_file
import skeletons

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
CALLS = 10  # that the host's time is taken of
COMPILED = "compiled, sdpa"


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


def _session(path: pathlib.Path, weights: skeletons.Weights, options: argparse.Namespace):
    """`options.stream` is CUDA's, so that PyTorch's events time the session."""
    import onnxruntime as ort

    how = ort.SessionOptions()
    how.log_severity_level = 3
    if path.stem.endswith(" ours"):
        import faplugin

        faplugin.register(how)
    if options.device == "cpu":
        how.intra_op_num_threads = options.threads
        return weights.session(path, how, [PROVIDERS["cpu"]])
    # No more memory is taken than a run asks for, so that what it took can be told.
    settings = {"user_compute_stream": str(options.stream), "arena_extend_strategy": "kSameAsRequested"}
    chosen = [(PROVIDERS["cuda"], settings), PROVIDERS["cpu"]]
    made = weights.session(path, how, chosen)
    if made.get_providers()[0] != PROVIDERS["cuda"]:
        raise RuntimeError("onnxruntime has no CUDA provider here")
    return made


def _sessions(weights: skeletons.Weights, options: argparse.Namespace) -> tuple[dict, dict[str, str]]:
    """Of all files of a model and dtype, and the sentences of those that can't be loaded; several at a time."""
    from encoder_models import FILES
    from model_table import MODELS

    name, dtype = options.time_one
    wanted = [(f"{file}, {how}", how, file) for how in MODELS[name].exports for file in FILES]

    def load(one: tuple[str, str, str]):
        _, how, file = one
        if not (options.models / f"{name} {how} {dtype} {file}.onnx").exists():
            said = options.models / f"{name} {how}.json"
            failed = json.loads(said.read_text())["failed"] if said.exists() else {}
            return failed.get(f"{dtype} {file}", "was not made")
        try:
            return _session(options.models / f"{name} {how} {dtype} {file}.onnx", weights, options)
        except Exception as error:
            return _sentence(error)

    with concurrent.futures.ThreadPoolExecutor(1 if options.device == "cpu" else 4) as pool:
        loaded = dict(zip([title for title, *_ in wanted], pool.map(load, wanted), strict=True))
    made = {title: one for title, one in loaded.items() if not isinstance(one, str)}
    return made, {title: one for title, one in loaded.items() if isinstance(one, str)}


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _bound(
    made, tensors: dict[str, np.ndarray], device: str
) -> tuple[Callable[[int], None], Callable[[], np.ndarray], Callable[[], None]]:
    """One run on bound inputs, which waits for nothing on CUDA; the output of the last one in float32; and what gives
    back the memory that runs took."""
    import onnxruntime as ort

    if not isinstance(made, ort.InferenceSession):
        return made.bound(tensors)
    binding = made.io_binding()
    for wanted in made.get_inputs():
        array = tensors[wanted.name]
        array = array.astype(np.float16) if wanted.type == "tensor(float16)" else array
        binding.bind_ortvalue_input(
            wanted.name, ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0)
        )
    for output in made.get_outputs():
        binding.bind_output(output.name, device)
    how, releasing = ort.RunOptions(), ort.RunOptions()
    if device == "cuda":
        how.add_run_config_entry("disable_synchronize_execution_providers", "1")
        releasing.add_run_config_entry("memory.enable_memory_arena_shrinkage", "gpu:0")

    def output() -> np.ndarray:
        if device == "cuda":
            import torch

            torch.cuda.synchronize()
        return binding.copy_outputs_to_cpu()[0].astype(np.float32)

    def release() -> None:
        """By one more run: onnxruntime gives memory back at the end of one."""
        binding.clear_binding_outputs()
        for output in made.get_outputs():
            binding.bind_output(output.name, "cpu")
        made.run_with_iobinding(binding, releasing)

    return lambda _: made.run_with_iobinding(binding, how), output, release


def _difference(want: np.ndarray, got: np.ndarray) -> float | None:
    """Relative, in the 2-norm; None where it is no number."""
    found = float(np.linalg.norm((want - got).ravel()) / np.linalg.norm(want.ravel()))
    return found if math.isfinite(found) else None


def _times(calls: dict[str, Callable[[int], None]], options: argparse.Namespace) -> dict[str, dict]:
    """On CUDA the GPU's time, the host's time to enqueue a run, and both until the result is there."""
    if options.device == "cpu":
        turns = {name: functools.partial(call, 0) for name, call in calls.items()}
        seconds = results_file.time_in_turn(turns, options.rounds)
        return {name: _spread([1e3 * x for x in found]) for name, found in seconds.items()}
    import gpu_timer
    import torch

    found, _ = gpu_timer.in_turn(calls, 1, options.rounds, capture=False)
    rows = {name: gpu_timer.summary(times) for name, times in found.items()}
    host: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(CALLS):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            call(0)
            enqueued = time.perf_counter()
            torch.cuda.synchronize()
            host[name].append((enqueued - start, time.perf_counter() - start))
    for name, pairs in host.items():
        enqueue, latency = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
        rows[name] |= {"host_ms": enqueue, "latency_ms": latency}
    return rows


def _spread(times: list[float]) -> dict[str, float]:
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return {"median_ms": median, "q1_ms": lower, "q3_ms": upper, "min_ms": min(times), "max_ms": max(times)}


@contextlib.contextmanager
def _turn(folder: pathlib.Path, alone: bool, what: str = "turn") -> Iterator[None]:
    """Several processes may load files at the same time; one may take times while none does."""
    with (folder / f"{what}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def _measure(options: argparse.Namespace) -> None:
    """All sizes of one model and dtype; a line of JSON for each, on stdout."""
    import torch
    from model_table import MODELS

    name, dtype = options.time_one
    model = MODELS[name]
    if options.device == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # onnxruntime takes one from outside only where it isn't the default
        options.stream = torch.cuda.current_stream().cuda_stream
    with _turn(options.models, alone=False):
        weights = skeletons.Weights(options.models / f"{name}.weights.json")
        made, failed = _sessions(weights, options)
        if options.compiled and options.device == "cuda":
            try:
                made[COMPILED] = _compiled(weights, options)
            except Exception as error:
                failed[COMPILED] = _sentence(error)
        kinds = (f"{how} float32 {file}" for file in ("unfused", "ours") for how in model.exports)
        references = [kind for kind in kinds if (options.models / f"{name} {kind}.onnx").exists()]
        load = functools.cache(lambda kind: _session(options.models / f"{name} {kind}.onnx", weights, options))
        for kind in references[:1]:  # the others only where it does not run
            load(kind)
    with _turn(options.models, alone=True):
        _await_memory(options.device)
        _measure_sizes(model, made, (references, load), failed, options)


def _await_memory(device: str) -> None:
    """Returns when the process whose turn was before has given back its memory."""
    before = -1
    while device == "cuda" and (taken := _memory_taken(device)) != before:
        before = taken
        time.sleep(1)


def _compiled(weights: skeletons.Weights, options: argparse.Namespace):
    """Compiled while others load, for the sizes that it will be timed at."""
    import model_torch
    from model_table import MODELS

    name, dtype = options.time_one
    model = MODELS[name]
    made = model_torch.Compiled(model, weights, options.layers, dtype)
    for size in model.sizes:
        with contextlib.suppress(Exception):  # it will fail again when its turn comes, and be written down
            made.bound({n: x.numpy() for n, x in model.inputs(*size).items()})[0](0)
    return made


References = tuple[list[str], Callable]  # float32 files, and what loads one


def _expected(references: References, tensors: dict[str, np.ndarray], device: str) -> tuple[str, np.ndarray]:
    """Which float32 file results are compared with, and its output: an original, or where none has the memory to run,
    faexport's of it. Raises the last one's error."""
    kinds, load = references
    for kind in kinds:
        try:
            call, output, release = _bound(load(kind), tensors, device)
            call(0)
            found = output()
            if device == "cuda":
                release()
            return kind, found
        except Exception:
            if kind == kinds[-1]:
                raise
    raise ValueError("there is no float32 file to compare with")


def _measure_sizes(
    model, made: dict, references: References, failed: dict[str, str], options: argparse.Namespace
) -> None:
    import torch

    name, dtype = options.time_one
    for batch_size, length in model.cpu_sizes if options.device == "cpu" else model.sizes:
        if options.sizes and f"{batch_size}x{length}" not in options.sizes.split(","):
            continue
        torch.manual_seed(0)
        tensors = {n: x.numpy() for n, x in model.inputs(batch_size, length).items()}
        row = {"encoder": name, "row": f"{model.name} b{batch_size} s{length}", "dtype": dtype, "contestants": {}}
        row |= {"device": options.device, "batch_size": batch_size, "length": length, "failed": dict(failed)}
        try:
            row["compared_with"], expected = _expected(references, tensors, options.device)
            used = tensors["attention_mask"].astype(bool) if model.is_text else ...
            said = _measure_together(made, tensors, expected[used], used, row, options)
            for contestant in said:  # there may be room for one alone
                alone = {contestant: made[contestant]}
                row["failed"].update(_measure_together(alone, tensors, expected[used], used, row, options))
        except Exception as error:
            row["failed"]["all"] = _sentence(error)
        print(json.dumps(row), flush=True)


def _measure_together(made: dict, tensors: dict, expected: np.ndarray, used, row: dict, options) -> dict[str, str]:
    """Times these sessions in turn, adds them to the row, and gives back the memory that they took. Returns the
    sentences of those that failed. `used`: which part of an output is `expected`."""
    calls, found, releases, failed = {}, {}, [], {}
    for contestant, session in made.items():
        try:
            before = _memory_taken(options.device)
            calls[contestant], output, release = _bound(session, tensors, options.device)
            calls[contestant](0)
            difference = _difference(expected, output()[used])
            taken = _memory_taken(options.device) - before
            found[contestant] = {"difference": difference, "memory_mb": taken / 1e6}
            releases.append(release)
        except Exception as error:
            calls.pop(contestant, None)
            failed[contestant] = _sentence(error)
    if calls:
        times = _times(calls, options)
        row["contestants"] |= {title: times[title] | one for title, one in found.items()}
        if options.device == "cuda":
            _add_shares(row["contestants"], calls)
    for release in releases if options.device == "cuda" else ():
        release()
    return failed


def _add_shares(contestants: dict[str, dict], calls: dict[str, Callable[[int], None]]) -> None:
    import model_torch

    for title, call in calls.items():
        if title.startswith("ours"):
            contestants[title]["share_of_operator"] = model_torch.share_of_operator(call)


def _memory_taken(device: str) -> int:
    """Bytes of the GPU's memory, of all that run on it; one process alone takes times."""
    if device == "cpu":
        return 0
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free


def _show(row: dict) -> None:
    print(f"\n{row['device']} {row['dtype']} {row['row']}: milliseconds, difference from the float32 original")
    for name, found in sorted(row["contestants"].items(), key=lambda item: item[1]["median_ms"]):
        host = f"  host {found['host_ms']:.3f}  latency {found['latency_ms']:.3f}" if "host_ms" in found else ""
        away = "not a number" if found["difference"] is None else f"{found['difference']:.1e}"
        print(f"  {name:<22} {found['median_ms']:9.3f} ({found['q1_ms']:.3f} to {found['q3_ms']:.3f}){host}  {away}")
    for name, why in row["failed"].items():
        print(f"  {name:<22} failed: {why}", flush=True)


def _run_all(options: argparse.Namespace) -> list[dict]:
    end, rows = time.monotonic() + options.seconds, []

    def run(one: tuple[str, str]) -> tuple[str, str, int]:
        command = [sys.executable, __file__, "--models", options.models, "--device", options.device]
        command += ["--threads", str(options.threads), "--rounds", str(options.rounds), "--sizes", options.sizes]
        command += ["--layers", str(options.layers), "--compiled" if options.compiled else "--no-compiled"]
        environment = os.environ | ({"OMP_NUM_THREADS": "4"} if options.device == "cuda" else {})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
        process = subprocess.Popen([*command, "--time-one", *one], **pipes)
        try:
            return *process.communicate(timeout=max(1, end - time.monotonic())), process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            return *process.communicate(), process.returncode

    todo = [(name, dtype) for dtype in options.dtypes for name in options.encoders]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        running = {pool.submit(run, one): one for one in todo}
        for done in concurrent.futures.as_completed(running):
            out, err, code = done.result()
            for line in out.splitlines():
                if line.startswith('{"encoder"'):
                    rows.append(json.loads(line))
                    _show(rows[-1])
            if code:
                print(*running[done], f"ended with {code}: {' '.join(err.split())[-300:]}", flush=True)
            if rows:
                with _turn(options.models, alone=True, what="results"):
                    _write(options, rows)
    return rows


def _write(options: argparse.Namespace, rows: list[dict]) -> pathlib.Path:
    """With the rows of earlier parts of the same run: the same commit on the same machine."""
    from model_table import MODELS

    environment = results_file.environment(
        *("torch", "transformers", "onnxruntime-gpu", "onnxruntime", "onnxscript"), commit=options.commit
    )
    name = options.table if options.device == "cuda" else f"{options.table}_cpu"
    path = (results_file.RESULTS if options.record else results_file.SCRATCH) / f"{name}.json"
    document = {**environment, "threads": options.threads, "layers": options.layers, "fused": {}, "rows": []}
    if options.device == "cuda":
        import torch

        document["gpu"] = torch.cuda.get_device_name()
    if path.exists():
        before = json.loads(path.read_text())
        if all(before.get(key) == document.get(key) for key in ("commit", "cpu", "gpu", "layers", "threads")):
            document |= {key: before[key] for key in ("fused", "rows", "exported_by")}
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


def main(table: str = "encoders", description: str = __doc__.splitlines()[0]) -> int:
    """The command for one of model_table.TABLES. It starts itself again for each model."""
    parser = argparse.ArgumentParser(description=description)
    parser.set_defaults(table=table)
    parser.add_argument("--models", type=pathlib.Path, help="folder of the files; they are made where it has none")
    parser.add_argument("--export-only", action="store_true", help="write the files to --models and stop")
    parser.add_argument("--time-only", action="store_true", help="time the files that --models has, and make none")
    parser.add_argument("--encoders", help="some of them, with commas between (default: all)")
    parser.add_argument("--sizes", default="", help="some of them, such as 1x128,8x512 (default: all)")
    parser.add_argument("--dtypes", help="with commas between (default: float16,float32, on the CPU float32)")
    parser.add_argument("--device", choices=PROVIDERS, default="cuda", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="of a run on the CPU (default: %(default)s)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, len(os.sched_getaffinity(0)) // 2),
        help="processes side by side (default: %(default)s)",
    )
    parser.add_argument("--layers", type=int, default=0, help="of each encoder, to try this out; 0: all (%(default)s)")
    parser.add_argument(
        "--compiled", action=argparse.BooleanOptionalAction, default=table == "models",
        help="time what torch.compile makes of the same model, too (on CUDA; default: %(default)s)",
    )  # fmt: skip
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
    if options.export_one:
        import encoder_models

        encoder_models.write_files(*options.export_one, options.models, options.layers)
        return 0
    if options.time_one:
        _measure(options)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        options.models = options.models or pathlib.Path(temporary)
        if not options.time_only:
            _export_all(options)
        if options.export_only:
            return 0
        rows = _run_all(options)
        if rows:
            with _turn(options.models, alone=True, what="results"):
                print(f"written: {_write(options, rows)}")
        return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
