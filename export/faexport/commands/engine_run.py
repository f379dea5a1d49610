# SPDX-License-Identifier: Apache-2.0
"""Runs a TensorRT engine on arrays, and compares its outputs with onnxruntime's. Called by build.py's `faexport run`.

Device memory comes from CUDA's own Python package (cuda-bindings, extra `trt`). Errors are ModelErrors: one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import pathlib
import types
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import rich.markup
import rich.table

from faexport.errors import ModelError
from faexport.files import model_io
from faexport.files.output import check_input, write_file
from faexport.report.data import OutputDifference
from faexport.runtimes import engine, ort_session
from faexport.runtimes.engine import Runtime
from faexport.verify import compare as comparison

MAGIC = {Runtime.TENSORRT: b"ftrt", Runtime.TENSORRT_RTX: b"vtrt"}  # first bytes of an engine file


@dataclasses.dataclass
class Result:
    outputs: dict[str, np.ndarray]
    milliseconds: float  # of one execution after a first one, on the GPU


def write_outputs(path: pathlib.Path, outputs: Mapping[str, np.ndarray]) -> None:
    """As an .npz file. numpy.savez would take some names of outputs ("file") for its own arguments."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in outputs.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array)
    write_file(path, buffer.getvalue())


def read_engine(path: pathlib.Path, runtime: Runtime) -> bytes:
    """The file's content, if it looks like an engine of this runtime. Raises ModelError."""
    check_input(path)
    content = path.read_bytes()
    for kind, magic in MAGIC.items():
        if content.startswith(magic) and kind is not runtime:
            raise ModelError(f"{path}: was built by {kind}, but {runtime} is to run it: pass --runtime {kind}")
    if not content.startswith(MAGIC[runtime]):
        raise ModelError(f"{path}: is not a TensorRT engine; faexport build makes one")
    return content


def run(runtime: Runtime, trt: types.ModuleType, path: pathlib.Path, inputs: Mapping[str, np.ndarray]) -> Result:
    """Executes the engine twice, the second time timed. Raises ModelError."""
    content = read_engine(path, runtime)
    if not engine.has_gpu():
        raise ModelError(f"{path}: an engine needs a GPU to run, and there is none here")
    if runtime is Runtime.TENSORRT:
        _register_plugin()
    logger = trt.Logger(trt.Logger.ERROR)
    loaded = trt.Runtime(logger).deserialize_cuda_engine(content)
    if loaded is None:
        raise ModelError(
            f"{path}: can't be loaded: built by another TensorRT, for another GPU, or its plugin is missing"
        )
    with Device() as device:
        return execute(trt, loaded, device, inputs)


def _register_plugin() -> None:
    """Engines without our plugin run without it: where it is missing, loading the engine says so."""
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        import faplugin.trt

        faplugin.trt.register()


def execute(trt: types.ModuleType, loaded: Any, device: Device, inputs: Mapping[str, np.ndarray]) -> Result:
    """Executes a loaded engine on `inputs`, converted to the engine's types. Raises ModelError."""
    context = loaded.create_execution_context()
    names = [loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)]
    for name in names:
        if loaded.get_tensor_mode(name) != trt.TensorIOMode.INPUT:
            continue
        if name not in inputs:
            raise ModelError(f"the engine's input '{name}' is not among the given: {', '.join(inputs) or 'none'}")
        array = np.ascontiguousarray(inputs[name], _dtype(trt, loaded.get_tensor_dtype(name)))
        if not context.set_input_shape(name, array.shape):
            raise ModelError(
                f"input '{name}' has the shape {engine.shape_text(array.shape)}, outside the engine's profile"
            )
        context.set_tensor_address(name, device.upload(array))
    arrays = {}
    for name in names:
        if loaded.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            continue
        shape = tuple(context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise ModelError(f"the shape of output '{name}' depends on data, which run doesn't support")
        arrays[name] = np.empty(shape, _dtype(trt, loaded.get_tensor_dtype(name)))
        context.set_tensor_address(name, device.allocate(arrays[name].nbytes))
    milliseconds = device.timed(context.execute_async_v3)
    return Result(
        {name: device.download(context.get_tensor_address(name), array) for name, array in arrays.items()}, milliseconds
    )


def _dtype(trt: types.ModuleType, kind: Any) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if kind == trt.DataType.BF16 else np.dtype(trt.nptype(kind))


class Device:
    """Memory and a stream of the current GPU, freed at the end of a with block."""

    def __enter__(self) -> Device:
        try:
            self._cuda = importlib.import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise ModelError("running an engine needs CUDA's Python package: pip install cuda-bindings") from error
        self._pointers: list[int] = []
        self._stream = self._call("cudaStreamCreate")
        return self

    def __exit__(self, *exception: object) -> None:
        for pointer in self._pointers:
            self._cuda.cudaFree(pointer)
        self._cuda.cudaStreamDestroy(self._stream)

    def _call(self, function: str, *args: Any) -> Any:
        error, *results = getattr(self._cuda, function)(*args)
        if int(error) != 0:
            raise ModelError(f"{function} failed: {error.name}")
        return results[0] if results else None

    def allocate(self, num_bytes: int) -> int:
        self._pointers.append(int(self._call("cudaMalloc", max(num_bytes, 1))))
        return self._pointers[-1]

    def upload(self, array: np.ndarray) -> int:
        pointer = self.allocate(array.nbytes)
        self._call(
            "cudaMemcpy", pointer, array.ctypes.data, array.nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        )
        return pointer

    def download(self, pointer: int, array: np.ndarray) -> np.ndarray:
        self._call(
            "cudaMemcpy", array.ctypes.data, pointer, array.nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        )
        return array

    def timed(self, enqueue: Any) -> float:
        """Enqueues twice on the stream; milliseconds of the second."""
        events = [self._call("cudaEventCreate") for _ in range(2)]
        try:
            for event in events:
                if not enqueue(int(self._stream)):
                    raise ModelError("TensorRT could not execute the engine; its log above says why")
                self._call("cudaEventRecord", event, self._stream)
            self._call("cudaStreamSynchronize", self._stream)
            return float(self._call("cudaEventElapsedTime", *events))
        finally:
            for event in events:
                self._cuda.cudaEventDestroy(event)


def compare(
    model: pathlib.Path, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
) -> list[OutputDifference]:
    """The engine's outputs against those of `model` in onnxruntime, by compare.py's tolerances. Raises ModelError."""
    if missing := ort_session.missing_packages():
        raise ModelError(f"--model: {missing}")
    loaded = model_io.load(model)
    names = {value.name for value in loaded.graph.inputs}
    wanted = {name: array for name, array in inputs.items() if name in names}
    job = ort_session.Job(os.fspath(model), [wanted], library=ort_session.has_library())
    results = ort_session.run(job)
    reference = results.outputs[0] if results.outputs else results.error
    if not isinstance(reference, dict):
        raise ModelError(f"{model}: does not run in onnxruntime: {reference}")
    if absent := sorted(reference.keys() - outputs.keys()):
        raise ModelError(f"the engine has no output '{absent[0]}', which {model} has")
    coarsest = max(
        (str(array.dtype) for array in (*inputs.values(), *outputs.values())),
        key=lambda name: comparison.RELATIVE_TOLERANCE.get(name, 0),
    )
    allowed = comparison.CORE_TOLERANCE.get(coarsest, comparison.RELATIVE_TOLERANCE["float32"])
    return [comparison.compare(name, want, outputs[name], allowed) for name, want in reference.items()]


def table(result: Result, differences: Sequence[OutputDifference]) -> rich.table.Table:
    """Outputs, and how far they are from onnxruntime's where that is known."""
    shown = rich.table.Table(title=f"one execution: {result.milliseconds:.3f} ms", title_justify="left")
    for column in ("output", "dtype", "shape", *(("difference", "allowed") if differences else ())):
        shown.add_column(column)
    found = {item.name: item for item in differences}
    for name, array in result.outputs.items():
        item = found.get(name)
        judged = (f"{item.max_abs_diff:.3g}", f"{item.tolerance:.3g}") if item else ()
        shown.add_row(rich.markup.escape(name), str(array.dtype), engine.shape_text(array.shape), *judged)
    return shown
