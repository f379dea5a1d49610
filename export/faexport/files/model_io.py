# SPDX-License-Identifier: Apache-2.0
"""Reads and writes models: nothing bad gets in, nothing half-written gets out.

Weights in external files stay there (memory-mapped) until they are written; weights inside the file are written one by
one, so that memory stays near the size of the model. What a user can have done wrong is a ModelError: one sentence,
shown as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import mmap
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

import google.protobuf.message
import numpy as np
import onnx
import onnx_ir as ir

from faexport.errors import ModelError, first_cause
from faexport.files import scratch
from faexport.files.graph_checks import check_model, external_tensors
from faexport.files.output import check_input, check_output, final_path, is_model_name, writing
from faexport.files.proto_checks import check_proto
from faexport.files.signals import uninterrupted

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]  # bytes written so far, bytes in all

MAX_PROTOBUF_BYTES = 2**31 - 1
EXTERNAL_THRESHOLD_BYTES = 1024  # smaller tensors stay in the model file, where shape inference sees them
STREAM_THRESHOLD_BYTES = 1 << 16  # smaller tensors are serialized together with the graph

_LOOKS_LIKE = (  # how a file begins
    (rb"version https://git-lfs", "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
    (rb"PK\x03\x04", "a zip archive (a PyTorch checkpoint?); export the model with torch.onnx.export first"),
    (rb"\x1f\x8b", "a gzip archive; unpack it first"),
    (rb"\x89HDF", "an HDF5 file (a Keras model?); convert it with tf2onnx first"),
    (rb"(?s:....)ORTM", "onnxruntime's own format; give the .onnx file that it was made of"),
    (rb"<\s*ir_version", "ONNX's text; onnx.parser.parse_model reads it, and onnx.save writes a model"),
    (rb"<", "a web page or XML; download the file again"),
)


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
    return any(True for _ in external_tensors(model))


def save(
    model: ir.Model, path: PathLike, *, source: PathLike | None = None, progress: Progress | None = None
) -> list[pathlib.Path]:
    """Writes the model to `path`, and to a file beside it what was external or exceeds 2 GB. Returns the files written.

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
    data_name: str  # of the file of weights beside it, if there is one

    @property
    def has_data(self) -> bool:
        """Is there a file of weights?"""
        return self.model_path.with_name(self.data_name).exists()

    def commit(self) -> list[pathlib.Path]:
        """Moves the files and returns where they are now, the model first.

        The file of weights has a name that nothing had before, and comes first: until the graph, which refers to it, is
        moved over the old graph, the old pair is complete, and afterwards the new one is. Then the old file of weights
        goes, unless another model's weights lie in it.
        """
        written = [self.target]
        staged_data, data = self.model_path.with_name(self.data_name), self.target.with_name(self.data_name)
        with writing(self.target), uninterrupted():
            if self.has_data:
                os.rename(staged_data, data)
                written.append(data)
            try:
                os.replace(self.model_path, self.target)
            except OSError:
                if len(written) > 1:
                    data.unlink()
                raise
            for old in _data_files(self.target):
                if old not in written and not _is_referred_to(old, but_by=self.target):
                    with contextlib.suppress(OSError):
                        old.unlink()
        return written


@contextlib.contextmanager
def staged(
    model: ir.Model,
    path: PathLike,
    *,
    source: PathLike | None = None,
    progress: Progress | None = None,
    external: bool = False,
) -> Iterator[Stage]:
    """Writes the model to a temporary folder beside `path`, to be tried before it takes its place. See save.
    `external`: large weights go to a file beside it, wherever they were."""
    check_target(model, path, source)
    target = final_path(pathlib.Path(path))
    external = external or uses_external_data(model) or _weight_bytes(model) > MAX_PROTOBUF_BYTES - (64 << 20)
    with contextlib.ExitStack() as stack:
        with writing(pathlib.Path(path)):
            folder = stack.enter_context(scratch.folder(target.parent))
            stage = Stage(target, folder / target.name, _free_data_name(target))
            if external:
                _write_external(model, stage.model_path, stage.data_name, progress)
            else:
                _write_inline(model, stage.model_path, progress)
        yield stage


def check_target(model: ir.Model, path: PathLike, source: PathLike | None) -> None:
    """Raises ModelError where writing to `path` is bound to fail or would overwrite the input."""
    path = pathlib.Path(path)
    inputs = {tensor.path for tensor in external_tensors(model)}
    inputs |= {os.fspath(source)} if source is not None else set()
    check_output(path, inputs)
    for data in _data_files(final_path(path)):
        if data.is_file():
            check_output(data, inputs)


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name. Raises ModelError."""
    check_input(path)
    if not zipfile.is_zipfile(path):
        raise ModelError(f"{path}: is no .npz file; write it with numpy.savez")
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # a broken archive raises what zipfile, zlib and NumPy's parser raise
        why = str(error) or type(error).__name__
        raise ModelError(f"{path}: can't be read as .npz: {why}; write it with numpy.savez") from error


def _read_proto(path: pathlib.Path) -> onnx.ModelProto:
    check_input(path, "name the .onnx file" if path.is_dir() else "check the path")
    try:
        with path.open("rb") as file:
            head = file.read(64)
            size = os.fstat(file.fileno()).st_size
        if not head:
            raise ModelError(f"{path}: the file is empty; export or copy the model again")
        if size > MAX_PROTOBUF_BYTES:
            raise ModelError(f"{path}: has {size} bytes, and no ONNX file exceeds 2 GB; export with external data")
        return onnx.load(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except google.protobuf.message.DecodeError as error:
        for start, what in _LOOKS_LIKE:
            if re.match(start, head):
                raise ModelError(f"{path}: not an ONNX model but {what}") from error
        text = head.isascii() and b"\x00" not in head and all(byte >= 32 or byte in b"\t\r\n\f" for byte in head)
        what = "a text file, not an ONNX model" if text else "not an ONNX model, or a truncated one"
        raise ModelError(f"{path}: {what}; export or copy the model again") from error


def _from_proto(proto: onnx.ModelProto, name: str, path: pathlib.Path) -> ir.Model:
    check_proto(proto, name)
    try:
        with _silent_serde():  # its warnings are graph_checks.py's errors
            model = ir.from_proto(proto)
    except Exception as error:  # onnx-ir raises many types for malformed protos; all of them are bad input
        raise ModelError(
            f"{name}: malformed model: {_root_cause(error)}; onnx.checker.check_model may tell more"
        ) from error
    for graph in model.graphs():
        ir.external_data.set_base_dir(graph, path.parent)
    check_model(model, name, path)
    return model


def _weight_bytes(model: ir.Model) -> int:
    return sum(
        v.const_value.nbytes
        for graph in model.graphs()
        for v in graph.initializers.values()
        if v.const_value is not None
    )


def _data_files(target: pathlib.Path) -> list[pathlib.Path]:
    """The files of weights beside `target` that belong to it: model.onnx.data, model.onnx.1.data, …"""
    ours = re.compile(re.escape(target.name) + r"(\.[1-9][0-9]*)?\.data")
    return sorted(target.with_name(name) for name in os.listdir(target.parent) if ours.fullmatch(name))


def _is_referred_to(data: pathlib.Path, but_by: pathlib.Path) -> bool:
    """Does another model of this folder (*.onnx) have weights in this file? Its bytes are searched for the entry that
    names the file, as a model may be large. Where a model can't be read, it may."""
    places = [os.fsencode(f"{folder}{data.name}") for folder in ("", "./")]
    entries = [b"\x0a\x08location\x12" + _varint(len(place)) + place for place in places]
    try:
        for path in data.parent.iterdir():
            if not is_model_name(path) or path == but_by or not path.is_file() or not path.stat().st_size:
                continue
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if any(content.find(entry) >= 0 for entry in entries):
                    return True
    except OSError:
        return True
    return False


def _free_data_name(target: pathlib.Path) -> str:
    """`target`.data, or where that is there already (an older model's), with the first number that is free."""
    taken = {path.name for path in _data_files(target)}
    names = (f"{target.name}.{number}.data" for number in itertools.count(1))
    return next(name for name in itertools.chain([f"{target.name}.data"], names) if name not in taken)


def _load_small_tensors(model: ir.Model) -> None:
    """Copies what comes into the model file. onnx_ir would close its mapped data first, which arrays in use forbid."""
    for graph in model.graphs():
        for v in graph.initializers.values():
            tensor = v.const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= EXTERNAL_THRESHOLD_BYTES:
                v.const_value = ir.Tensor(tensor.numpy().copy(), name=tensor.name, dtype=tensor.dtype)


def _write_external(model: ir.Model, path: pathlib.Path, data_name: str, progress: Progress | None) -> None:
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
        external_data=data_name,
        size_threshold_bytes=EXTERNAL_THRESHOLD_BYTES,
        callback=show,
    )
    data = path.with_name(data_name)
    if data.exists() and data.stat().st_size == 0:
        data.unlink()  # all weights were small, and are in the model file


def _write_inline(model: ir.Model, path: pathlib.Path, progress: Progress | None) -> None:
    """One protobuf file, the large initializers one by one at the end of the graph message.

    Serializing it whole takes four times the file in memory. Fields of a message may come in any order (protobuf's
    encoding rules), so readers see nothing unusual.
    """
    large = {
        name: value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes > STREAM_THRESHOLD_BYTES
    }
    with _without_tensors(large) as tensors:
        proto = ir.to_proto(model)
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    records = [(name, tensor, _tensor_proto(name, tensor).ByteSize()) for name, tensor in tensors.items()]
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
def _without_tensors(values: Mapping[str, ir.Value]) -> Iterator[dict[str, ir.TensorProtocol]]:
    """Takes the tensors off the initializers, which onnx-ir then leaves out, and puts them back."""
    tensors = {name: value.const_value for name, value in values.items() if value.const_value is not None}
    try:
        for name in tensors:
            values[name].const_value = None
        with _silent_serde():  # it warns of each initializer without a tensor
            yield tensors
    finally:
        for name, tensor in tensors.items():
            values[name].const_value = tensor


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


def _root_cause(error: BaseException) -> str:
    cause = first_cause(error)
    return (str(cause).splitlines() or [type(cause).__name__])[0][:300]
