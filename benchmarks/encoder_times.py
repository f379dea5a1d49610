# SPDX-License-Identifier: Apache-2.0
"""Times the files of one model and dtype, in a process of its own that encoders.py starts: loads all of them, waits for
its turn (dealing.py), and says a line of JSON for each size."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import dealing
import numpy as np
import results_file
import skeletons

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
CALLS = 10  # that the host's time is taken of
LOADING_THREADS = 4  # of a process; what they do is done before times are taken
COMPILED = "compiled, sdpa"
SHORT = 16  # tokens
MOST_ELEMENTS = 2**31 - 1  # of a tensor that onnxruntime's CUDA kernels count; with more they fail, or are wrong


def sizes_of(model, options: argparse.Namespace) -> list[tuple[int, int]]:
    """Those that are asked for: batch size, length."""
    sizes = model.cpu_sizes if options.device == "cpu" else model.sizes
    wanted = options.sizes.split(",") if options.sizes else []
    return [size for size in sizes if not wanted or f"{size[0]}x{size[1]}" in wanted]


def empty_row(name: str, model, dtype: str, size: tuple[int, int], device: str) -> dict:
    """A row of the results without a contestant."""
    row = {"encoder": name, "row": f"{model.name} b{size[0]} s{size[1]}", "dtype": dtype, "contestants": {}}
    return row | {"device": device, "batch_size": size[0], "length": size[1], "failed": {}}


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
    how.intra_op_num_threads = LOADING_THREADS
    # No more memory is taken than a run asks for, so that what it took can be told.
    settings = {"user_compute_stream": str(options.stream), "arena_extend_strategy": "kSameAsRequested"}
    chosen = [(PROVIDERS["cuda"], settings), PROVIDERS["cpu"]]
    made = weights.session(path, how, chosen)
    if made.get_providers()[0] != PROVIDERS["cuda"]:
        raise RuntimeError("onnxruntime has no CUDA provider here")
    return made


def _sessions(weights: skeletons.Weights, options: argparse.Namespace) -> tuple[dict, dict[str, str], str]:
    """Loads all files of a model and dtype, several at a time. Returns the sessions, the sentences of those that can't
    be loaded, and how long each took, as a text."""
    from encoder_models import FILES
    from model_table import MODELS

    name, dtype = options.time_one
    wanted = [(f"{file}, {how}", how, file) for how in MODELS[name].exports for file in FILES]
    seconds = {}

    def load(one: tuple[str, str, str]):
        title, how, file = one
        if not (options.models / f"{name} {how} {dtype} {file}.onnx").exists():
            said = options.models / f"{name} {how}.json"
            failed = json.loads(said.read_text())["failed"] if said.exists() else {}
            return failed.get(f"{dtype} {file}", "was not made")
        start = time.monotonic()
        try:
            return _session(options.models / f"{name} {how} {dtype} {file}.onnx", weights, options)
        except Exception as error:
            return _sentence(error)
        finally:
            seconds[title] = time.monotonic() - start

    with concurrent.futures.ThreadPoolExecutor(1 if options.device == "cpu" else LOADING_THREADS) as pool:
        loaded = dict(zip([title for title, *_ in wanted], pool.map(load, wanted), strict=True))
    made = {title: one for title, one in loaded.items() if not isinstance(one, str)}
    failed = {title: one for title, one in loaded.items() if isinstance(one, str)}
    return made, failed, ", ".join(f"{title} {took:.1f}" for title, took in seconds.items())


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
    for produced in made.get_outputs():
        binding.bind_output(produced.name, device)
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
        for produced in made.get_outputs():
            binding.bind_output(produced.name, "cpu")
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


def measure(options: argparse.Namespace) -> None:
    """All sizes of one model and dtype."""
    import torch
    from model_table import MODELS

    name, _ = options.time_one
    model = MODELS[name]
    if options.device == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # onnxruntime takes one from outside only where it isn't the default
        options.stream = torch.cuda.current_stream().cuda_stream
    steps = _Steps()
    weights = skeletons.Weights(options.models / f"{name}.weights.json")
    weights.draw(LOADING_THREADS)
    steps.add("weights drawn")
    references = _References(name, model.exports, lambda path: _session(path, weights, options), options.models)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # onnxruntime lets other threads go on while it loads
        loading = pool.submit(_sessions, weights, options)
        compiled, why = _compiled_or_sentence(weights, options)
        steps.add("compiled")
        made, failed, seconds = loading.result()
        steps.add(f"sessions loaded ({seconds})")
    made |= {COMPILED: compiled} if compiled else {}
    failed |= {COMPILED: why} if why else {}
    references.load_first()  # the others only where it does not run
    steps.add("reference loaded")
    print(dealing.READY, flush=True)
    sys.stdin.readline()
    steps.add("its turn")
    _measure_sizes(model, made, references, failed, options, steps)


class _Steps:
    """Says how long each step took, on standard output for whoever watches."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def add(self, what: str) -> None:
        now = time.monotonic()
        print(f"{what}: {now - self._last:.1f} s", flush=True)
        self._last = now


def _compiled_or_sentence(weights: skeletons.Weights, options: argparse.Namespace):
    """The model through torch.compile where that is asked for, and why it is not there; on CUDA alone."""
    if not options.compiled or options.device != "cuda":
        return None, ""
    try:
        return _compiled(weights, options), ""
    except Exception as error:
        return None, _sentence(error)


def _compiled(weights: skeletons.Weights, options: argparse.Namespace):
    """Compiled while others load, for the sizes that it will be timed at."""
    import model_torch
    import torch
    from model_table import MODELS

    name, dtype = options.time_one
    model = MODELS[name]
    made = model_torch.Compiled(model, weights, options.layers, dtype)
    for size in model.sizes:
        with contextlib.suppress(Exception):  # it will fail again when its turn comes, and be written down
            made.bound({n: x.numpy() for n, x in model.inputs(*size).items()})[0](0)
    torch.cuda.empty_cache()  # what a run takes is measured later
    return made


class _References:
    """The float32 files that results are compared with: an original, or where none can be right or has the memory to
    run, faexport's of it. One that failed is given up, with the memory that it took."""

    def __init__(self, name: str, exports: Sequence[str], load: Callable[[pathlib.Path], object], folder: pathlib.Path):
        kinds = (f"{how} float32 {file}" for file in ("unfused", "ours") for how in exports)
        paths = {kind: folder / f"{name} {kind}.onnx" for kind in kinds}
        self._paths = {kind: path for kind, path in paths.items() if path.exists()}
        self._load, self._loaded = load, {}

    def load_first(self) -> None:
        for kind in list(self._paths)[:1]:
            self._loaded[kind] = self._load(self._paths[kind])

    def expected(self, tensors: dict[str, np.ndarray], device: str, has_scores: bool) -> tuple[str, np.ndarray]:
        """Which file ran, and its output; has_scores: it may be one that makes all scores. Raises the last one's
        error."""
        for kind, path in self._paths.items():
            if not has_scores and skeletons.holds_scores(path):
                continue
            try:
                if kind not in self._loaded:
                    self._loaded[kind] = self._load(path)
                return kind, self._output(kind, tensors, device)
            except Exception:
                self._loaded.pop(kind, None)
                if kind == list(self._paths)[-1]:
                    raise
        raise ValueError("there is no float32 file to compare with")

    def _output(self, kind: str, tensors: dict[str, np.ndarray], device: str) -> np.ndarray:
        call, output, release = _bound(self._loaded[kind], tensors, device)
        call(0)
        found = output()
        if device == "cuda":
            release()
        return found


def _measure_sizes(
    model, made: dict, references: _References, failed: dict[str, str], options: argparse.Namespace, steps: _Steps
) -> None:
    import torch

    name, dtype = options.time_one
    short = {n: x.numpy() for n, x in model.inputs(1, SHORT).items()} if model.is_text else None
    for size in sizes_of(model, options):
        torch.manual_seed(0)
        tensors = {n: x.numpy() for n, x in model.inputs(*size).items()}
        row = empty_row(name, model, dtype, size, options.device) | {"failed": dict(failed)}
        few_scores = options.device == "cpu" or model.num_scores(*size) <= MOST_ELEMENTS
        counted = made if few_scores else _without_scores(made, row, options)
        try:
            row["compared_with"], expected = references.expected(tensors, options.device, few_scores)
            used = tensors["attention_mask"].astype(bool) if model.is_text else ...
            together = functools.partial(
                _measure_together, tensors=tensors, expected=expected[used], used=used, row=row
            )
            for contestant in together(counted, options=options, short=short):
                alone = {contestant: made[contestant]}  # there may be room for one alone
                row["failed"].update(together(alone, options=options, short=short))
        except Exception as error:
            row["failed"]["all"] = _sentence(error)
        print(json.dumps(row), flush=True)
        steps.add(f"timed at {size[0]} x {size[1]}")


def _without_scores(made: dict, row: dict, options: argparse.Namespace) -> dict:
    """The contestants but those that make more scores than onnxruntime counts, whose reason the row gets."""
    name, dtype = options.time_one
    files = {title: title.partition(", ") for title in made if title != COMPILED}
    paths = {title: options.models / f"{name} {how} {dtype} {file}.onnx" for title, (file, _, how) in files.items()}
    given_up = {title for title, path in paths.items() if skeletons.holds_scores(path)}
    row["failed"] |= dict.fromkeys(given_up, f"it has more than {MOST_ELEMENTS} scores, which onnxruntime can't count")
    return {title: one for title, one in made.items() if title not in given_up}


def _measure_together(
    made: dict, tensors: dict, short: dict | None, expected: np.ndarray, used, row: dict, options: argparse.Namespace
) -> dict[str, str]:
    """Times these sessions in turn, adds them to the row, and gives back the memory that they took. Returns the
    sentences of those that failed.

    Args:
        short: inputs that each session can run on, if there are any.
        used: which part of an output is `expected`.
    """
    calls, found, releases, failed = {}, {}, {}, {}
    for contestant, session in made.items():
        try:
            before = _memory_taken(options.device)
            calls[contestant], output, release = _bound(session, tensors, options.device)
            calls[contestant](0)
            difference = _difference(expected, output()[used])
            taken = _memory_taken(options.device) - before
            found[contestant] = {"difference": difference, "memory_mb": taken / 1e6}
            releases[contestant] = release
        except Exception as error:
            calls.pop(contestant, None)
            failed[contestant] = _sentence(error)
        if contestant in failed and options.device == "cuda":
            _give_back(session, None, short)
    try:
        times = _times(calls, options) if calls else {}
        row["contestants"] |= {title: times[title] | found[title] for title in calls}
        if options.device == "cuda":
            _add_shares(row["contestants"], calls)
    except Exception as error:  # each ran once, but there is no room for all
        failed |= dict.fromkeys(calls, _sentence(error))
        for title in calls:
            row["contestants"].pop(title, None)
    for contestant, release in releases.items() if options.device == "cuda" else ():
        _give_back(made[contestant], release, short)
    return failed


def _give_back(session, release: Callable[[], None] | None, short: dict[str, np.ndarray] | None) -> None:
    """The memory that a session took, by one more run, on short inputs where the last ones found no room."""
    with contextlib.suppress(Exception):
        if release is not None:
            release()
            return
    with contextlib.suppress(Exception):
        if short is not None:
            _bound(session, short, "cuda")[2]()


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
