# SPDX-License-Identifier: Apache-2.0
"""Fuses a model of a file, and tells bad input from a defect of ours where our analysis raised something unexpected.

A model that onnxruntime refuses to load and onnx.checker finds invalid is bad input, whatever it did to us; else the
defect is ours. Both are native code, which malformed models may crash, so they run in a process of their own.
"""

from __future__ import annotations

import contextlib
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from faexport import pipeline
from faexport.errors import ModelError
from faexport.graph.normalize import ConversionError
from faexport.options import Options
from faexport.report.data import Report
from faexport.runtimes import child_process, ort_session

TIMEOUT_SECONDS = 60.0


def fuse(model: ir.Model, options: Options, path: pathlib.Path) -> tuple[ir.Model, Report]:
    """pipeline.run on the model that was read from `path`. Raises ModelError where the model or an option is to blame;
    any other exception is a defect of ours."""
    if options.opset is not None and (fault := fault_of(path)):  # the converters are native code
        raise _malformed(path, fault)
    with blaming(path):
        try:
            fused, report = pipeline.run(model, options)
        except ConversionError as error:
            raise ModelError(f"{path}: {error}; choose another --opset, or leave it out") from error
    defective = any(site.refusal is not None and site.refusal.defect for site in report.sites)
    suspect = defective or report.defects or report.invalid_nodes
    if suspect and (fault := fault_of(path)):
        raise _malformed(path, fault)
    return fused, report


@contextlib.contextmanager
def blaming(path: pathlib.Path) -> Iterator[None]:
    """Makes an unexpected exception of the body a ModelError where the model of `path` is to blame for it."""
    try:
        yield
    except (ModelError, MemoryError, OSError):
        raise
    except Exception as error:
        if fault := fault_of(path):
            raise _malformed(path, fault) from error
        raise


def _malformed(path: pathlib.Path, fault: str) -> ModelError:
    return ModelError(f"{path}: malformed model: {fault}; export it again")


def fault_of(model: pathlib.Path) -> str:
    """What is wrong with the file, in the checkers' words, or "" where they find nothing, or come to no end."""
    try:
        done = child_process.run(__name__, model, TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return ""
    if child_process.was_killed(done.returncode):
        return ""
    if done.returncode < 0:
        return f"the checkers of onnx and onnxruntime crash on it (signal {-done.returncode})"
    return done.stdout.decode(errors="replace").strip()


def main() -> None:
    """The child process: prints the fault of the model that it is given."""
    path = sys.argv[1]
    print(_refusal_of_onnxruntime(path) and _refusal_of_checker(path))


def _refusal_of_onnxruntime(path: str) -> str:
    """ "unknown" where onnxruntime isn't installed: then the checker decides alone."""
    try:
        import onnxruntime
    except ImportError:
        return "unknown"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # pybind11 gives each of its errors a type of its own
        return ort_session.one_line(str(error))
    return ""


def _refusal_of_checker(path: str) -> str:
    try:
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:  # ValidationError, InferenceError, and what protobuf raises
        return " ".join(str(error).split())[:300]
    return ""
