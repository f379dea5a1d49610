# SPDX-License-Identifier: Apache-2.0
"""Reads and writes models: nothing bad gets in, nothing half-written gets out.

Weights in external files stay there (memory-mapped) until they are written; weights inside the file are written one by
one, so that memory stays near the size of the model. What a user can have done wrong is a ModelError: one sentence,
shown as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

import google.protobuf.message
import numpy as np
import onnx
import onnx_ir as ir

from .validate import contradiction

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]  # bytes written so far, bytes in all

MAX_PROTOBUF_BYTES = 2**31 - 1
EXTERNAL_THRESHOLD_BYTES = 1024  # smaller tensors stay in the model file, where shape inference sees them
STREAM_THRESHOLD_BYTES = 1 << 16  # smaller tensors are serialized together with the graph

_LOOKS_LIKE = (
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint?); export the model with torch.onnx.export first"),
    (b"\x89HDF", "an HDF5 file (a Keras model?); convert it with tf2onnx first"),
    (b"ORTM", "onnxruntime's own format"),
    (b"<", "a web page or XML; download the file again"),
)


class ModelError(ValueError):
    """Bad input or a failed write. The text is one line: where, what, and what to do about it."""


def load(source: PathLike | onnx.ModelProto | ir.Model) -> ir.Model:
    """The model as onnx-ir, checked for what would make every later step fail. Raises ModelError.

    External data of a path must lie in the folder of the model file; of a ModelProto, in the working directory.
    """
    if isinstance(source, ir.Model):
        return source
    if isinstance(source, onnx.ModelProto):
        return _from_proto(source, "the model", pathlib.Path())
    path = pathlib.Path(source)
    proto = _read_proto(path)
    return _from_proto(proto, str(path), path)


def uses_external_data(model: ir.Model) -> bool:
    """Does any weight lie in a file of its own?"""
    return any(True for _ in _external_tensors(model))


def save(
    model: ir.Model, path: PathLike, *, source: PathLike | None = None, progress: Progress | None = None
) -> list[pathlib.Path]:
    """Writes the model to `path`, and to `path`.data what was external or exceeds 2 GB. Returns the files written.

    `source` is the file that the model came from, which is never overwritten, nor are the files its weights lie in.
    The model is unchanged. Raises ModelError.
    """
    with staged(model, path, source=source, progress=progress) as stage:
        return stage.commit()


@dataclasses.dataclass
class Stage:
    """A model written beside its place, under `model_path`; commit() moves it there, else it is deleted."""

    target: pathlib.Path
    model_path: pathlib.Path

    def commit(self) -> list[pathlib.Path]:
        """Moves the files and returns where they are now. The model comes last: it is complete once it is there."""
        written = []
        with _writing(self.target):
            for staged_file in (_data_path(self.model_path), self.model_path):
                if staged_file.exists():
                    written.append(self.target.with_name(staged_file.name))
                    os.replace(staged_file, written[-1])
        return written[::-1]


@contextlib.contextmanager
def staged(
    model: ir.Model, path: PathLike, *, source: PathLike | None = None, progress: Progress | None = None
) -> Iterator[Stage]:
    """Writes the model to a temporary folder beside `path`, to be tried before it takes its place. See save."""
    path = pathlib.Path(path)
    check_target(model, path, source)
    external = uses_external_data(model) or _weight_bytes(model) > MAX_PROTOBUF_BYTES - (64 << 20)
    with contextlib.ExitStack() as stack:
        with _writing(path):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".faexport-", dir=path.parent))
            stage = Stage(path, pathlib.Path(folder) / path.name)
            (_write_external if external else _write_inline)(model, stage.model_path, progress)
        yield stage


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = "free some space" if error.errno == errno.ENOSPC else "choose another place with -o"
        raise ModelError(f"{path}: cannot be written: {error.strerror or error}; {advice}") from error


def check_target(model: ir.Model, path: PathLike, source: PathLike | None) -> None:
    """Raises ModelError where writing to `path` is bound to fail or would overwrite the input."""
    path = pathlib.Path(path)
    inputs = {tensor.path for tensor in _external_tensors(model)}
    inputs |= {os.fspath(source)} if source is not None else set()
    check_output(path, inputs)
    check_output(_data_path(path), inputs)


def check_output(path: pathlib.Path, inputs: Iterable[PathLike], option: str = "-o") -> None:
    """Raises ModelError where `path`, which `option` chooses, can't be a new file or is one of `inputs`."""
    if path.is_dir():
        raise ModelError(f"{path}: is a folder; give the name of a file with {option}")
    if not path.parent.is_dir():
        raise ModelError(
            f"{path}: the folder {path.parent} does not exist; create it or choose another place with {option}"
        )
    if any(_same_file(path, name) for name in inputs):
        raise ModelError(f"{path}: would overwrite the input; choose another name with {option}")


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name. Raises ModelError."""
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file; check the path") from error
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:  # TypeError: one array, no .npz
        raise ModelError(f"{path}: can't be read as .npz: {error}; write it with numpy.savez") from error


def _read_proto(path: pathlib.Path) -> onnx.ModelProto:
    try:
        with path.open("rb") as file:
            head = file.read(64)
        if not head:
            raise ModelError(f"{path}: the file is empty; export or copy the model again")
        return onnx.load(path, format="protobuf", load_external_data=False)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise ModelError(f"{path}: is a folder; name the .onnx file in it") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except google.protobuf.message.DecodeError as error:
        for start, what in _LOOKS_LIKE:
            if head.startswith(start):
                raise ModelError(f"{path}: not an ONNX model but {what}") from error
        text = head.isascii() and b"\x00" not in head and all(byte >= 32 or byte in b"\t\r\n\f" for byte in head)
        what = "a text file, not an ONNX model" if text else "not an ONNX model, or a truncated one"
        raise ModelError(f"{path}: {what}; export or copy the model again") from error


def _from_proto(proto: onnx.ModelProto, name: str, path: pathlib.Path) -> ir.Model:
    _check_proto(proto, name)
    try:
        with _silent_serde():  # its warnings are _check_nodes' errors
            model = ir.from_proto(proto)
    except Exception as error:  # onnx-ir raises many types for malformed protos; all of them are bad input
        raise ModelError(
            f"{name}: malformed model: {_root_cause(error)}; onnx.checker.check_model may tell more"
        ) from error
    for graph in model.graphs():
        ir.external_data.set_base_dir(graph, path.parent)
    _check_external_data(model, name, path)
    _check_nodes(model, name)
    return model


def _check_proto(proto: onnx.ModelProto, name: str) -> None:
    if not proto.HasField("graph") or not proto.ir_version or not proto.opset_import:
        missing = "graph" if not proto.HasField("graph") else "IR version" if not proto.ir_version else "opset_import"
        raise ModelError(
            f"{name}: not a complete ONNX model (no {missing}), perhaps truncated; export or copy the model again"
        )
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{name}: IR version {proto.ir_version} is newer than {onnx.IR_VERSION}, the newest that "
            f"onnx {onnx.__version__} knows; update onnx (pip install -U onnx) or export for an older version"
        )
    newest = onnx.defs.onnx_opset_version()
    opset = max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset > newest:
        raise ModelError(
            f"{name}: opset {opset} is newer than {newest}, the newest that onnx {onnx.__version__} knows; "
            "update onnx (pip install -U onnx) or export for an older opset"
        )
    if proto.graph.sparse_initializer:
        sparse = proto.graph.sparse_initializer[0].values.name
        raise ModelError(f"{name}: the sparse initializer '{sparse}' is not supported; make it dense")


def _check_external_data(model: ir.Model, name: str, path: pathlib.Path) -> None:
    """Each file exists in the model's folder and is long enough."""
    # A model cache may keep symbolic links to files of another folder: the folder that the model really lies in counts
    # too.
    folders = {path.parent.resolve(), path.resolve().parent}
    for tensor in _external_tensors(model):
        what = f"{name}: weight '{tensor.name}' lies in the external file '{tensor.location}'"
        file = pathlib.Path(tensor.path)
        if os.path.isabs(tensor.location) or not any(file.resolve().is_relative_to(folder) for folder in folders):
            raise ModelError(
                f"{what}, outside the model's folder; move the file beside the model and save its location as relative"
            )
        if not file.is_file():
            raise ModelError(f"{what}, which does not exist; copy it beside the model")
        end = (tensor.offset or 0) + max(tensor.length or 0, tensor.nbytes)
        if file.stat().st_size < end:
            raise ModelError(
                f"{what}, which is truncated ({file.stat().st_size} bytes instead of {end} or more); copy it again"
            )


def _check_nodes(model: ir.Model, name: str) -> None:
    """Each value that a node reads is made by something; head counts of attention operators fit their tensors."""
    for graph in (model.graph, *model.functions.values()):
        for node in ir.traversal.RecursiveGraphIterator(graph):
            where = f"node '{node.name or node.outputs[0].name}' ({node.op_type})"
            if wrong := contradiction(node):
                raise ModelError(f"{name}: {where}: {wrong}; export the model again")
            for value in node.inputs:
                if value is not None and not (value.producer() or value.is_graph_input() or value.is_initializer()):
                    raise ModelError(
                        f"{name}: {where} reads '{value.name}', which nothing produces; export the model again"
                    )


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for graph in model.graphs():
        yield from (v.const_value for v in graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor))
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    yield attribute.value


def _weight_bytes(model: ir.Model) -> int:
    return sum(
        v.const_value.nbytes
        for graph in model.graphs()
        for v in graph.initializers.values()
        if v.const_value is not None
    )


def _data_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.data")


def _load_small_tensors(model: ir.Model) -> None:
    """Copies what comes into the model file. onnx_ir would close its mapped data first, which arrays in use forbid."""
    for graph in model.graphs():
        for v in graph.initializers.values():
            tensor = v.const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= EXTERNAL_THRESHOLD_BYTES:
                v.const_value = ir.Tensor(tensor.numpy().copy(), name=tensor.name, dtype=tensor.dtype)


def _write_external(model: ir.Model, path: pathlib.Path, progress: Progress | None) -> None:
    _load_small_tensors(model)
    total = _weight_bytes(model)
    written = 0

    def show(tensor: ir.TensorProtocol, _: ir.external_data.CallbackInfo) -> None:
        nonlocal written
        written += tensor.nbytes
        if progress:
            progress(written, total)

    ir.save(
        model,
        path,
        format="protobuf",
        external_data=_data_path(path).name,
        size_threshold_bytes=EXTERNAL_THRESHOLD_BYTES,
        callback=show,
    )


def _write_inline(model: ir.Model, path: pathlib.Path, progress: Progress | None) -> None:
    """One protobuf file, the large initializers one by one at the end of the graph message.

    Serializing it whole takes four times the file in memory. Fields of a message may come in any order (protobuf's
    encoding rules), so readers see nothing unusual.
    """
    values = [v for v in model.graph.initializers.values() if v.const_value is not None]
    large = [v for v in values if v.const_value.nbytes > STREAM_THRESHOLD_BYTES]
    with _without_tensors(large) as tensors:
        proto = ir.to_proto(model)
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    records = [
        (value.name, tensor, _tensor_proto(value.name, tensor).ByteSize())
        for value, tensor in zip(large, tensors, strict=True)
    ]
    tag = _field_tag(onnx.GraphProto, "initializer")
    total = len(graph) + sum(len(tag) + len(_varint(size)) + size for *_, size in records)
    with path.open("wb") as file:
        file.write(proto.SerializeToString(deterministic=True))
        file.write(_field_tag(onnx.ModelProto, "graph") + _varint(total) + graph)
        start = file.tell()
        for name, tensor, size in records:
            _write_record(file, tag, _tensor_proto(name, tensor).SerializeToString(deterministic=True), size)
            if progress:
                progress(file.tell() - start, total - len(graph))


@contextlib.contextmanager
def _without_tensors(values: list[ir.Value]) -> Iterator[list[ir.TensorProtocol]]:
    """Takes the tensors off the initializers, which onnx-ir then leaves out, and puts them back."""
    tensors = [value.const_value for value in values]
    try:
        for value in values:
            value.const_value = None
        with _silent_serde():  # it warns of each initializer without a tensor
            yield tensors
    finally:
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = tensor


@contextlib.contextmanager
def _silent_serde() -> Iterator[None]:
    logger = ir.serde.logger
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _tensor_proto(name: str, tensor: ir.TensorProtocol) -> onnx.TensorProto:
    proto = ir.serde.serialize_tensor(tensor)
    proto.name = name
    return proto


def _write_record(file: BinaryIO, tag: bytes, data: bytes, size: int) -> None:
    assert len(data) == size, "a tensor changed while it was written"
    file.write(tag)
    file.write(_varint(size))
    file.write(data)


def _field_tag(message: type[google.protobuf.message.Message], field: str) -> bytes:
    """The key of a length-delimited field (wire type 2)."""
    return _varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | 2)


def _varint(number: int) -> bytes:
    """Protobuf's base-128 encoding, least significant group first."""
    groups = bytearray()
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


def _same_file(a: PathLike, b: PathLike) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return os.path.abspath(a) == os.path.abspath(b)


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
