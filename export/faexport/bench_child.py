# SPDX-License-Identifier: Apache-2.0
"""What is measured in a process of its own: times of models in turn, the memory of one run, the time of each node.

bench.py starts it as `measure(Question)`; the answer comes back as JSON on stdout. onnxruntime and the operator's
library are loaded here only, so that one measurement can't disturb the next, and a crash is a sentence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import pickle
import subprocess
import sys
import time
from typing import Any

from . import ort_session, scratch
from .errors import ModelError

WARMUPS = 2
LEAST_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Question:
    """`kind`: "times" of all models in turn, "memory" or "nodes" of the first."""

    kind: str
    models: tuple[str, ...]
    inputs: dict[str, Any]  # arrays by name
    rounds: int = 20
    seconds: float = 10.0  # no round is begun after so long, once there are enough
    threads: int = 0  # 0: onnxruntime's default


def measure(question: Question, timeout: float) -> Any:
    """The answer of a child process. Raises ModelError with what onnxruntime said."""
    environment = {"ORT_DISABLE_TELEMETRY": "1", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with scratch.folder(what="bench-") as folder:
        path = folder / "question"
        path.write_bytes(pickle.dumps(question))
        command = [sys.executable, "-c", f"from {__name__} import main; main()", os.fspath(path)]
        try:
            done = subprocess.run(
                command, env=environment, cwd=folder, capture_output=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ModelError(f"a measurement took longer than {timeout:g} s; --timeout allows more") from error
    if done.returncode:
        raise ModelError(f"onnxruntime ended with {done.returncode}, as it does when memory runs out")
    answer = json.loads(done.stdout.decode().rpartition("\n")[2])
    if isinstance(answer, dict) and "error" in answer:
        raise ModelError(answer["error"])
    return answer


def main() -> None:
    question: Question = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
    answer: Any
    try:
        answer = {"times": _times, "memory": _memory, "nodes": _nodes}[question.kind](question)
    except Exception as error:  # pybind11 gives each of onnxruntime's errors a type of its own
        answer = {"error": ort_session.one_line(str(error))}
    sys.stdout.write(f"\n{json.dumps(answer)}")


def _session(model: str, threads: int, profile: bool = False) -> Any:
    import faplugin
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # two sessions share the cores
    if profile:  # node by node, as the file has them
        options.enable_profiling = True
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    faplugin.register(options)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _times(question: Question) -> list[list[float]]:
    """Seconds of each run of each model; in every second round in the opposite order."""
    sessions = [_session(model, question.threads) for model in question.models]
    values = _values(question.inputs)
    for session in sessions:
        for _ in range(WARMUPS):
            session.run_with_ort_values(None, values)
    found: list[list[float]] = [[] for _ in sessions]
    begin = time.perf_counter()
    for number in range(question.rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - begin > question.seconds:
            break
        order = list(enumerate(sessions))
        for index, session in order if number % 2 == 0 else reversed(order):
            start = time.perf_counter()
            session.run_with_ort_values(None, values)
            found[index].append(time.perf_counter() - start)
    return found


def _memory(question: Question) -> int | None:
    """Bytes that one run takes above what the loaded model and its inputs take; None where the system can't tell."""
    session = _session(question.models[0], question.threads)
    values = _values(question.inputs)
    before = _status("VmRSS")
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        return None
    session.run_with_ort_values(None, values)
    return max(0, _status("VmHWM") - before)


def _nodes(question: Question) -> dict[str, list[Any]]:
    """By name of a node: its operator, and the microseconds of its fastest run."""
    session = _session(question.models[0], question.threads, profile=True)
    values = _values(question.inputs)
    for _ in range(WARMUPS + 1):
        session.run_with_ort_values(None, values)
    found: dict[str, list[Any]] = {}
    for event in json.loads(pathlib.Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name, op_type = event["name"].removesuffix("_kernel_time"), event["args"].get("op_name", "")
            known = found.setdefault(name, [op_type, event["dur"]])
            known[1] = min(known[1], event["dur"])
    return found


def _values(inputs: dict[str, Any]) -> dict[str, Any]:
    import onnxruntime as ort

    return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}


def _status(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    with contextlib.suppress(StopIteration):
        return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
    return 0
