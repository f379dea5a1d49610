# SPDX-License-Identifier: Apache-2.0
"""Runs models in onnxruntime, each in a process of its own: some models crash onnxruntime's optimizer, some never end.

Called by model_check.py, engine_run.py and the benchmarks. The operator's library is registered where a caller asks for
it. A model's own complaint about its inputs is a ModelFailure; what has nothing to do with them (no memory, no time, no
onnxruntime) is a CannotRun. Both carry one sentence.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import math
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser

from faexport.errors import ModelError
from faexport.files.signals import uninterrupted
from faexport.runtimes import child_process, operator_library

if TYPE_CHECKING:
    import onnxruntime

Tensors = Mapping[str, np.ndarray]
CUDA = "CUDAExecutionProvider"
NO_GPU = "onnxruntime can't use a GPU here; --verify-on cpu compares on the CPU"
# The kind of an error, e.g. "1 : FAIL : ", and the name of the file, which is a temporary one of ours.
_KIND = re.compile(r"^\d+ : [A-Z_]+ : (?:Load model from .*? failed:)?")
# Where in onnxruntime's source it was raised: a file and a line, and the function's signature.
_SOURCE = re.compile(r"(?:(?<=:)|(?<=\s)|^)/\S+\.(?:h|cc):\d+ \S.*?\)(?: const)? ")
_OUT_OF_MEMORY = re.compile(r"bad_alloc|failed to allocate memory|out of memory|available memory of", re.IGNORECASE)


class ModelFailure(Exception):
    """onnxruntime refuses the model, or refuses to run it on these inputs."""


class CannotRun(Exception):
    """No answer about the model: it took too long, memory ran out, onnxruntime is missing or broken."""


class TookTooLong(CannotRun):
    """Loading or running the model was ended after the time that it may take."""


class Crashed(CannotRun):
    """onnxruntime ended the process that it ran in."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A model and how to run it: on `device`, "cpu" or "cuda". With `external_data`, the model is the serialized file,
    and that is the folder which its external data lies in."""

    model: str | bytes
    inputs: Sequence[Tensors] = ()
    optimize: bool = True  # onnxruntime's graph optimizations
    library: bool = True  # register libfa_ort.so
    external_data: str = ""
    device: str = "cpu"


@dataclasses.dataclass
class Results:
    """For each set of inputs the outputs by name, or a sentence why there are none; `error` where none could be run."""

    outputs: list[dict[str, np.ndarray] | str] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    error: str = ""


def missing_packages() -> str:
    """Why models can't be run here: a sentence, or "" where they can."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: pip install onnxruntime, or onnxruntime-gpu for NVIDIA GPUs"
    return ""


def problem_of(device: str) -> str:
    """Why onnxruntime can't run models on this device, found out on a trivial one, or "": to be said before long work
    that would end so."""
    if device == "cpu" or missing_packages():
        return ""
    trivial = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) {y = Abs(x)}'
    )
    try:
        Session(Job(trivial.SerializeToString(), library=has_library()), device=device).close()
    except (ModelFailure, CannotRun) as error:
        return str(error)
    return ""


def check_device(device: str) -> None:
    """Raises ModelError where onnxruntime can't run models on this device."""
    if why := problem_of(device):
        raise ModelError(why)


def has_library() -> bool:
    """Is the operator's library for onnxruntime there?"""
    try:
        return operator_library.path().exists()
    except ModelError:
        return False


class Session(contextlib.AbstractContextManager):
    """A model loaded in a child process, to be run on any number of inputs.

    Args:
        job: the model; its `inputs` are not looked at.
        timeout: seconds that loading and each run may take; None: any.
        device: where to run, instead of where the job says.
    Raises ModelFailure or CannotRun.
    """

    def __init__(self, job: Job, timeout: float | None = None, device: str = ""):
        self._timeout = timeout
        self._pipe, theirs = multiprocessing.Pipe()
        silent = None if os.environ.get("FAEXPORT_TRACEBACK") else subprocess.DEVNULL
        self._process: subprocess.Popen | None = None
        try:
            with uninterrupted():  # a signal in the middle of it would leave a process that nobody knows
                self._process = subprocess.Popen(
                    child_process.command(__name__, str(theirs.fileno())),
                    env=child_process.environment(),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=silent,
                    stderr=silent,
                )
                theirs.close()
            self._ask(dataclasses.replace(job, inputs=(), device=device or job.device), "loading the model")
        except BaseException:
            self.close()
            raise

    def run(self, tensors: Tensors) -> dict[str, np.ndarray]:
        """The outputs by name. After a CannotRun the session is of no use any more."""
        return self._ask(dict(tensors), "one run")

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._pipe.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, question: Any, what: str) -> Any:
        """Sends a question to the child and waits for what it answers."""
        try:
            self._pipe.send(question)
            if not self._pipe.poll(self._timeout):
                raise TookTooLong(f"{what} took longer than {self._timeout:g} s")
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise self._last_words() from None
        except MemoryError:
            raise CannotRun("there is not enough memory for the outputs") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _last_words(self) -> CannotRun:
        assert self._process is not None  # it was asked
        code = self._process.wait()
        why = child_process.end_of(code)
        if code >= 0:
            return CannotRun(f"{why}; FAEXPORT_TRACEBACK=1 shows what it said")
        return CannotRun(why) if child_process.was_killed(code) else Crashed(why)


class SessionHere(contextlib.AbstractContextManager):
    """As Session, in this process: faster, and a crash is one of this process."""

    def __init__(self, job: Job):
        self._session = _load(job)

    def run(self, tensors: Tensors) -> dict[str, np.ndarray]:
        return _run_session(self._session, tensors)

    def __exit__(self, *exception: object) -> None:
        del self._session


def run(job: Job, timeout: float | None = None) -> Results:
    """Runs the job in a child process; a crash or a timeout becomes Results.error."""
    return run_with(lambda: Session(job, timeout), job)


def run_here(job: Job) -> Results:
    """Runs the job in this process."""
    return run_with(lambda: SessionHere(job), job)


def run_with(open_session: Callable[[], Session | SessionHere], job: Job) -> Results:
    """The outputs on all inputs of the job, in a session that `open_session` opens."""
    results = Results()
    try:
        with open_session() as session:
            for tensors in job.inputs:
                start = time.perf_counter()
                try:
                    results.outputs.append(session.run(tensors))
                except ModelFailure as error:
                    results.outputs.append(str(error))
                results.seconds.append(time.perf_counter() - start)
    except (ModelFailure, CannotRun) as error:
        return Results(error=str(error))
    return results


def _load(job: Job) -> onnxruntime.InferenceSession:
    """A session of the job's model in this process. Raises ModelFailure or CannotRun."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise CannotRun(f"onnxruntime can't be imported: {one_line(str(error))}") from error
    if isinstance(job.model, str) and not _is_utf8(job.model):
        raise CannotRun("its path is not UTF-8, and onnxruntime opens no such file; choose another name")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores may have other work
    if not job.optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if job.external_data:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", job.external_data)
    with _as_failures():
        if job.library:
            import faplugin

            faplugin.register(options)
        if job.device == "cpu":
            return _load_on_cpu(ort, job.model, options)
        return _load_on_gpu(ort, job, options)


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _load_on_cpu(ort: Any, model: str | bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """With the formulas of those operators that have CUDA kernels only."""
    providers = ["CPUExecutionProvider"]
    try:
        return ort.InferenceSession(model, options, providers=providers)
    except Exception as error:
        from faexport.fallback import formulas

        if not formulas.are_missing(str(error)):
            raise
    model, folder = formulas.written_out(model)
    if folder:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return ort.InferenceSession(model, options, providers=providers)


def _load_on_gpu(ort: Any, job: Job, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """With float32 matrices multiplied in float32: products in TF32 differ by more than what is allowed."""
    if CUDA not in ort.get_available_providers():
        raise CannotRun(NO_GPU)
    if job.library and (lacking := operator_library.without_cuda_kernels()):
        raise CannotRun(lacking)
    session = ort.InferenceSession(job.model, options, providers=[(CUDA, {"use_tf32": "0"}), "CPUExecutionProvider"])
    if session.get_providers()[0] != CUDA:  # onnxruntime goes on without it
        raise CannotRun(NO_GPU)
    return session


@contextlib.contextmanager
def _as_failures() -> Iterator[None]:
    """Whatever onnxruntime raises, as one of this module's two exceptions."""
    try:
        yield
    except (ModelFailure, CannotRun):
        raise
    except MemoryError as error:
        raise CannotRun("onnxruntime ran out of memory") from error
    except Exception as error:
        sentence = one_line(str(error))
        if _OUT_OF_MEMORY.search(str(error)):
            raise CannotRun(f"onnxruntime ran out of memory: {sentence}") from error
        raise ModelFailure(sentence) from error


def _run_session(session: onnxruntime.InferenceSession, tensors: Tensors) -> dict[str, np.ndarray]:
    """session.run for all dtypes: its NumPy interface has no bfloat16, OrtValues have."""
    import onnxruntime as ort

    with _as_failures():
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
    """onnxruntime's message without its prefixes and source paths, at most 500 characters."""
    message = " ".join(message.split())
    for prefix in ("[ONNXRuntimeError] : ", "Status Message: "):
        message = message.rpartition(prefix)[2] if prefix in message else message
    message = _SOURCE.sub(" ", _KIND.sub("", message)).strip()
    return message[:500] or "unknown error"


def main() -> None:
    """The child process: reads a Job and then sets of inputs from the pipe named, and answers each."""
    pipe = multiprocessing.connection.Connection(int(sys.argv[1]))
    with contextlib.suppress(OSError):  # where memory runs out, this process is the one to end
        pathlib.Path("/proc/self/oom_score_adj").write_text("1000")
    session: onnxruntime.InferenceSession | None = None
    answer: dict[str, np.ndarray] | Exception | None
    with contextlib.suppress(EOFError, KeyboardInterrupt, ConnectionError):
        while True:
            question = pipe.recv()
            try:
                if session is None:
                    session, answer = _load(question), None
                else:
                    answer = _run_session(session, question)
            except (ModelFailure, CannotRun) as error:
                answer = type(error)(*error.args)  # without its traceback
            except MemoryError:
                answer = CannotRun("onnxruntime ran out of memory")
            pipe.send(answer)
            del question, answer
