# SPDX-License-Identifier: Apache-2.0
"""Runs a model in onnxruntime, in a process of its own: some models crash onnxruntime's optimizer.

Called by verify.py and benchmarks/zoo.py. The operator's library is registered where faplugin is installed and the
model needs it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import math
import os
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx

if TYPE_CHECKING:
    import onnxruntime

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Job:
    model: str
    inputs: Sequence[Tensors]
    optimize: bool = True  # onnxruntime's graph optimizations
    library: bool = True  # register libfa_ort.so


@dataclasses.dataclass
class Results:
    """For each set of inputs the outputs by name, or a sentence why there are none; `error` where none could be run."""

    outputs: list[dict[str, np.ndarray] | str] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    error: str = ""


def missing_packages() -> str:
    """Why models can't be run here: a sentence, or "" where they can."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed (pip install 'faexport[ort]')"
    return ""


def has_library() -> bool:
    """Is the operator's library for onnxruntime there?"""
    if importlib.util.find_spec("faplugin") is None:
        return False
    import faplugin

    try:
        return pathlib.Path(faplugin.library_path()).exists()
    except (ImportError, FileNotFoundError):
        return False


def run(job: Job, timeout: float | None = None) -> Results:
    """Runs the job in a child process; a crash or a timeout becomes Results.error."""
    # NOTE: onnxruntime's telemetry would tell of the user's model, and leave a file (.ses) in the temporary folder.
    environment = {"ORT_DISABLE_TELEMETRY": "1", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with tempfile.TemporaryDirectory(prefix="faexport-run-") as folder:
        job_file, result_file = pathlib.Path(folder) / "job", pathlib.Path(folder) / "result"
        job_file.write_bytes(pickle.dumps(job))
        call = f"from {__name__} import main; main()"
        command = [sys.executable, "-c", call, os.fspath(job_file), os.fspath(result_file)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            return Results(error=f"onnxruntime took longer than {timeout:.0f} s")
        if result_file.exists():
            return pickle.loads(result_file.read_bytes())
        if done.returncode < 0:
            return Results(error=f"onnxruntime crashed (signal {-done.returncode})")
        return Results(error=one_line(done.stderr.decode(errors="replace").strip().rpartition("\n")[2]))


def run_here(job: Job) -> Results:
    """Runs the job in this process."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not job.optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        if job.library:
            import faplugin

            faplugin.register(options)
        session = ort.InferenceSession(job.model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return Results(error=one_line(str(error)))
    results = Results()
    for tensors in job.inputs:
        start = time.perf_counter()
        try:
            results.outputs.append(_run_session(session, tensors))
        except Exception as error:
            results.outputs.append(one_line(str(error)))
        results.seconds.append(time.perf_counter() - start)
    return results


def _run_session(session: onnxruntime.InferenceSession, tensors: Tensors) -> dict[str, np.ndarray]:
    """session.run for all dtypes: its NumPy interface has no bfloat16, OrtValues have."""
    import onnxruntime as ort

    values = {
        name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), onnx.TensorProto.BFLOAT16)
        if array.dtype == ml_dtypes.bfloat16
        else ort.OrtValue.ortvalue_from_numpy(array)
        for name, array in tensors.items()
    }
    names = [output.name for output in session.get_outputs()]
    outputs = session.run_with_ort_values(names, values)
    return {name: _to_numpy(output) for name, output in zip(names, outputs, strict=True)}


def _to_numpy(value: onnxruntime.OrtValue) -> np.ndarray:
    if not value.is_tensor() or value.data_type() != "tensor(bfloat16)":
        return value.numpy()
    shape = value.shape()
    words = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    return np.frombuffer(words, np.uint16).reshape(shape).view(ml_dtypes.bfloat16).copy()


def one_line(message: str) -> str:
    """onnxruntime's message without its prefixes and source paths, at most 300 characters."""
    message = " ".join(message.split())
    for prefix in ("[ONNXRuntimeError] : ", "Status Message: "):
        message = message.rpartition(prefix)[2] if prefix in message else message
    message = re.sub(r"^/\S+\.(?:h|cc):\d+ [^)]*\) ", "", message)
    return message[:300] or "unknown error"


def main() -> None:
    """The child process: reads a Job from the first file named, writes Results to the second."""
    job_file, result_file = map(pathlib.Path, sys.argv[1:])
    results = run_here(pickle.loads(job_file.read_bytes()))
    partial = result_file.with_suffix(".part")
    partial.write_bytes(pickle.dumps(results))
    partial.rename(result_file)
