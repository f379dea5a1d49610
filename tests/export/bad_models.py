# SPDX-License-Identifier: Apache-2.0
"""Every kind of bad input, each with words that its error must have. Used by test_io.py and test_cli.py."""

from __future__ import annotations

import gzip
import os
import pathlib
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.export import big_model

Writer = Callable[[pathlib.Path], None]
BAD: dict[str, tuple[Writer, tuple[str, ...]]] = {}


def bad(*words: str) -> Callable[[Writer], Writer]:
    def add(write: Writer) -> Writer:
        assert write.__name__ not in BAD
        BAD[write.__name__] = (write, words)
        return write

    return add


def small() -> onnx.ModelProto:
    return big_model.encoder(big_model.EncoderSize(1, 2, 8))


@bad("empty")
def empty(path: pathlib.Path) -> None:
    path.write_bytes(b"")


@bad("truncated")
def truncated(path: pathlib.Path) -> None:
    data = small().SerializeToString()
    path.write_bytes(data[: len(data) // 2])


@bad("not a complete ONNX model")
def truncated_between_fields(path: pathlib.Path) -> None:
    model = small()
    model.ClearField("opset_import")
    path.write_bytes(model.SerializeToString())


@bad("text file")
def text(path: pathlib.Path) -> None:
    path.write_text("This is a list of groceries:\n- bread\n- milk\n" * 10)


@bad("Git LFS", "git lfs pull")
def git_lfs(path: pathlib.Path) -> None:
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 90868376\n")


@bad("gzip archive", "unpack")
def compressed(path: pathlib.Path) -> None:
    path.write_bytes(gzip.compress(small().SerializeToString()))


@bad("ONNX's text", "onnx.parser")
def printed(path: pathlib.Path) -> None:
    path.write_text(onnx.printer.to_text(small()))


@bad("onnxruntime's own format", ".onnx file")
def runtime_format(path: pathlib.Path) -> None:
    path.write_bytes(b"\x14\x00\x00\x00ORTM\x0c\x00\x10\x00" + bytes(range(256)))


@bad("a device")
def endless(path: pathlib.Path) -> None:
    path.symlink_to("/dev/zero")


@bad("a pipe")
def pipe(path: pathlib.Path) -> None:
    os.mkfifo(path)


@bad("2 GB")
def huge(path: pathlib.Path) -> None:
    with path.open("wb") as file:
        file.write(b"\x08\x09")
        file.truncate(1 << 32)  # takes no room on the disk


@bad("cannot be read")
def link_to_itself(path: pathlib.Path) -> None:
    path.symlink_to(path.name)


@bad("zip archive", "torch.onnx.export")
def checkpoint(path: pathlib.Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(range(256)))


@bad("not an ONNX model")
def noise(path: pathlib.Path) -> None:
    path.write_bytes(b"\xff" + np.random.default_rng(0).bytes(4096))


@bad("no such file")
def absent(path: pathlib.Path) -> None:
    assert not path.exists()


@bad("folder")
def folder(path: pathlib.Path) -> None:
    path.mkdir()


def _external(path: pathlib.Path, data: str) -> None:
    onnx.save(small(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = data
    onnx.save(model, path)


@bad("weights.bin", "does not exist")
def external_missing(path: pathlib.Path) -> None:
    _external(path, "weights.bin")
    (path.parent / "weights.bin").unlink()


@bad("truncated", "weights.bin")
def external_truncated(path: pathlib.Path) -> None:
    _external(path, "weights.bin")
    data = path.parent / "weights.bin"
    data.write_bytes(data.read_bytes()[:100])


@bad("outside the model's folder")
def external_above(path: pathlib.Path) -> None:
    (path.parent / "inner").mkdir()
    _external(path, "inner/../../weights.bin")


@bad("outside the model's folder")
def external_absolute(path: pathlib.Path) -> None:
    _external(path, "weights.bin")
    _external(path, str(path.parent / "weights.bin"))


@bad("outside the model's folder")
def external_by_link(path: pathlib.Path) -> None:
    _external(path, "weights.bin")
    other = path.parent.parent / f"{path.parent.name}-other"
    other.mkdir()
    (path.parent / "weights.bin").rename(other / "weights.bin")
    (path.parent / "weights.bin").symlink_to(other / "weights.bin")


@bad("IR version 99", "update onnx")
def too_new(path: pathlib.Path) -> None:
    model = small()
    model.ir_version = 99
    path.write_bytes(model.SerializeToString())


@bad("opset 999", "update onnx")
def too_new_opset(path: pathlib.Path) -> None:
    model = small()
    model.opset_import[0].version = 999
    path.write_bytes(model.SerializeToString())


@bad("/encoder/layer.0/attention/Div", "nobody", "nothing produces")
def dangling(path: pathlib.Path) -> None:
    model = small()
    node = next(node for node in model.graph.node if node.op_type == "Div")
    node.input[0] = "nobody"
    path.write_bytes(model.SerializeToString())


def attention(query: list, key: list, **heads: int) -> onnx.ModelProto:
    shapes = {"query": query, "key": key, "value": key}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    node = helper.make_node("Attention", list(shapes), ["output"], name="attention", **heads)
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", inputs, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


@bad("attention", "5 query heads", "2 key and value heads")
def heads_of_4d(path: pathlib.Path) -> None:
    onnx.save(attention(["B", 5, "S", 8], ["B", 2, "T", 8]), path)


@bad("attention", "6 query heads", "4 key and value heads")
def heads_of_3d(path: pathlib.Path) -> None:
    onnx.save(attention(["B", "S", 48], ["B", "T", 32], q_num_heads=6, kv_num_heads=4), path)


@bad("attention", "query is 50 wide", "4 heads")
def width_of_3d(path: pathlib.Path) -> None:
    onnx.save(attention(["B", "S", 50], ["B", "T", 48], q_num_heads=4, kv_num_heads=4), path)


@bad("sparse initializer")
def sparse(path: pathlib.Path) -> None:
    model = small()
    values = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("indices", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))
    path.write_bytes(model.SerializeToString())
