# SPDX-License-Identifier: Apache-2.0
"""What is measured in a process of its own: times of models in turn, the memory of one run, the time of each node.

bench.py starts it as `measure(Question)`; the answer comes back as JSON on stdout. onnxruntime and the operator's
library are loaded here only, so that one measurement can't disturb the next, and a crash is a sentence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from faexport.errors import ModelError
from faexport.files import scratch
from faexport.runtimes import child_process, ort_session

WARMUPS = {"cpu": 2, "cuda": 10}  # a GPU's clocks and libraries need more until a run is like the next
LEAST_ROUNDS = 5
NO_GPU = "onnxruntime can't use a GPU here; --device cpu measures on the CPU"


@dataclasses.dataclass(frozen=True)
class Question:
    """`kind`: "times" of all models in turn, "memory" or "nodes" of the first."""

    kind: str
    models: tuple[str, ...]
    inputs: dict[str, Any]  # arrays by name
    rounds: int = 20
    seconds: float = 10.0  # no round is begun after so long, once there are enough
    threads: int = 0  # 0: onnxruntime's default
    device: str = "cpu"  # or "cuda"


def measure(question: Question, timeout: float) -> Any:
    """The answer of a child process. Raises ModelError with what onnxruntime said."""
    with scratch.folder(what="bench-") as folder:
        path = folder / "question"
        path.write_bytes(pickle.dumps(question))
        try:
            done = child_process.run(__name__, path, timeout, cwd=folder)
        except subprocess.TimeoutExpired as error:
            raise ModelError(f"a measurement took longer than {timeout:g} s; --timeout allows more") from error
    if done.returncode:
        raise ModelError(child_process.end_of(done.returncode))
    answer = json.loads(done.stdout.decode().rpartition("\n")[2])
    if isinstance(answer, dict) and "error" in answer:
        raise ModelError(answer["error"])
    return answer


def main() -> None:
    question: Question = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
    answer: Any
    try:
        answer = {"times": _times, "memory": _memory, "nodes": _nodes}[question.kind](question)
    except ModelError as error:
        answer = {"error": str(error)}
    except Exception as error:  # pybind11 gives each of onnxruntime's errors a type of its own
        answer = {"error": f"onnxruntime says: {ort_session.one_line(str(error))}"}
    sys.stdout.write(f"\n{json.dumps(answer)}")


def _times(question: Question) -> list[list[float]]:
    """Seconds of each run of each model; in every second round in the opposite order."""
    runs = [_run(_session(question, model), question) for model in question.models]
    for run in runs:
        for _ in range(WARMUPS[question.device]):
            run()
    found: list[list[float]] = [[] for _ in runs]
    begin = time.perf_counter()
    for number in range(question.rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - begin > question.seconds:
            break
        order = list(enumerate(runs))
        for index, run in order if number % 2 == 0 else reversed(order):
            start = time.perf_counter()
            run()
            found[index].append(time.perf_counter() - start)
    return found


def _memory(question: Question) -> int | None:
    """Bytes that one run takes above what the loaded model and its inputs take; None where the system can't tell."""
    run = _run(_session(question, question.models[0]), question)
    if question.device == "cuda":
        before = _gpu_bytes_free()
        run()
        after = _gpu_bytes_free()  # onnxruntime keeps what it allocated
        return None if before is None or after is None else max(0, before - after)
    before = _status("VmRSS")
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        return None
    run()
    return max(0, _status("VmHWM") - before)


def _nodes(question: Question) -> dict[str, list[Any]]:
    """By name of a node: its operator, and the microseconds of its fastest run. On the CPU only: what onnxruntime gives
    for a GPU's nodes are the times of their launches."""
    session = _session(question, question.models[0], profile=True)
    run = _run(session, question)
    for _ in range(WARMUPS[question.device] + 1):
        run()
    found: dict[str, list[Any]] = {}
    for event in json.loads(pathlib.Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name, op_type = event["name"].removesuffix("_kernel_time"), event["args"].get("op_name", "")
            known = found.setdefault(name, [op_type, event["dur"]])
            known[1] = min(known[1], event["dur"])
    return found


def _session(question: Question, model: str, profile: bool = False) -> Any:
    import faplugin
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = question.threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # two sessions share the cores
    if profile:  # node by node, as the file has them
        options.enable_profiling = True
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    faplugin.register(options)
    if question.device == "cpu":
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    exact = {"arena_extend_strategy": "kSameAsRequested"} if question.kind == "memory" else {}
    session = ort.InferenceSession(model, options, providers=[(ort_session.CUDA, exact), "CPUExecutionProvider"])
    if session.get_providers()[0] != ort_session.CUDA:
        raise ModelError(NO_GPU)
    return session


def _run(session: Any, question: Question) -> Callable[[], object]:
    """One run on the inputs. On a GPU inputs and outputs lie in its memory, and the run ends when the GPU has ended."""
    import onnxruntime as ort

    place = (question.device, 0)
    values = {name: ort.OrtValue.ortvalue_from_numpy(array, *place) for name, array in question.inputs.items()}
    if question.device == "cpu":
        return lambda: session.run_with_ort_values(None, values)
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, *place)
    return lambda: session.run_with_iobinding(binding)


def _gpu_bytes_free() -> int | None:
    """Of the GPU's memory; None where the package that asks for it is not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    error, free, _ = runtime.cudaMemGetInfo()
    return int(free) if int(error) == 0 else None


def _status(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    with contextlib.suppress(StopIteration):
        return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
    return 0
