# SPDX-License-Identifier: Apache-2.0
"""model_io: what comes in is checked, what goes out is complete, what is not attention stays as it was."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import faexport
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from faexport.files import model_io

from tests.export import (
    big_model,
    commands,
    malformed_models,  # noqa: F401 (fills BAD)
    model_cache,
)
from tests.export.bad_models import BAD, small

SLOW_MODEL = big_model.EncoderSize(layers=48, heads=12, head_dim=56)  # 1.04 GB
MAX_MEMORY = 2.5  # times the file
MAX_SECONDS = 20.0


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_clear_line(kind: str, tmp_path: pathlib.Path) -> None:
    write, words = BAD[kind]
    path = tmp_path / "model.onnx"
    write(path)
    with pytest.raises(ValueError) as error:
        faexport.fuse(path)
    assert error.type is model_io.ModelError
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert ";" in message, "says what to do"
    for word in words:
        assert word in message, message


def _without_weights(proto: onnx.ModelProto) -> tuple[bytes, dict[str, bytes]]:
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor).tobytes() for tensor in proto.graph.initializer}
    proto.graph.ClearField("initializer")
    proto.graph.ClearField("value_info")
    return proto.SerializeToString(deterministic=True), weights


def test_a_round_trip_changes_nothing(tmp_path: pathlib.Path) -> None:
    original = big_model.encoder(
        big_model.EncoderSize(2, 4, 40)
    )  # some tensors above the streaming threshold, some below
    sizes = sorted(len(tensor.raw_data) for tensor in original.graph.initializer)
    assert sizes[0] < model_io.STREAM_THRESHOLD_BYTES < sizes[-1]
    onnx.save(original, tmp_path / "model.onnx")
    files = model_io.save(model_io.load(tmp_path / "model.onnx"), tmp_path / "copy.onnx")
    assert files == [tmp_path / "copy.onnx"]
    assert _without_weights(onnx.load(tmp_path / "copy.onnx")) == _without_weights(original)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.onnx", "model.onnx"]


def test_external_data_stays_external(tmp_path: pathlib.Path) -> None:
    original = small()
    path = tmp_path / "model.onnx"
    onnx.save(original, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    before = (tmp_path / "weights.bin").read_bytes()
    model = model_io.load(path)
    assert model_io.uses_external_data(model)
    (tmp_path / "out").mkdir()
    files = model_io.save(model, tmp_path / "out" / "copy.onnx", source=path)
    assert [file.name for file in files] == ["copy.onnx", "copy.onnx.data"]
    assert _without_weights(onnx.load(tmp_path / "out" / "copy.onnx"))[1] == _without_weights(small())[1]
    assert (tmp_path / "weights.bin").read_bytes() == before


def test_there_is_no_file_of_weights_without_any(tmp_path: pathlib.Path) -> None:
    """Small weights come into the model file, wherever they were."""
    graph = "g (float[8] x) => (float[8] y) <float one = {1.0}> { y = Add(x, one) }"
    given = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {graph}')
    given.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.float32(1.0), "one"))  # bytes may be external
    path = tmp_path / "model.onnx"
    onnx.save(given, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = model_io.load(path)
    assert model_io.uses_external_data(model)
    assert [file.name for file in model_io.save(model, tmp_path / "copy.onnx")] == ["copy.onnx"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy.onnx", "model.onnx", "weights.bin"]


def test_small_external_weights_may_be_in_use(tmp_path: pathlib.Path) -> None:
    onnx.save(small(), tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = model_io.load(tmp_path / "model.onnx")
    arrays = [v.const_value.numpy() for v in model.graph.initializers.values()]
    model_io.save(model, tmp_path / "copy.onnx")
    assert _without_weights(onnx.load(tmp_path / "copy.onnx"))[1] == _without_weights(small())[1] and arrays


def in_a_cache(model: onnx.ModelProto, place: pathlib.Path, size_threshold: int = 0) -> pathlib.Path:
    """The path of the model, with its weights in a file of their own."""
    snapshot = place / "snapshot"
    snapshot.mkdir()
    path = snapshot / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=size_threshold)
    model_cache.link(snapshot, place / "blobs")
    return path


def test_a_linked_model_of_a_cache_is_read(tmp_path: pathlib.Path) -> None:
    read = model_io.load(in_a_cache(small(), tmp_path)).graph.initializers
    for weights in small().graph.initializer:
        assert np.array_equal(read[weights.name].const_value.numpy(), onnx.numpy_helper.to_array(weights))


def test_a_linked_model_of_a_cache_is_rewritten_and_measured(tmp_path: pathlib.Path) -> None:
    path = in_a_cache(big_model.encoder(big_model.EncoderSize(1, 4, 16)), tmp_path, size_threshold=1024)
    done = commands.here(path, "-o", f"{tmp_path / 'out'}/", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["verification"]["status"] == "passed" and said["verification"]["sites"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["model.onnx", "model.onnx.data"]
    done = commands.here("bench", path, "--shape", "hidden_states:1x8x64", "--runs", "5", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr


def test_hard_links_are_refused(tmp_path: pathlib.Path) -> None:
    """onnx-ir does not read them: they may lead anywhere."""
    onnx.save(small(), tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    os.link(tmp_path / "weights.bin", tmp_path / "again.bin")
    with pytest.raises(model_io.ModelError, match=r"'weights.bin', which has 2 names \(hard links\).*; copy it"):
        model_io.load(tmp_path / "model.onnx")


@pytest.mark.parametrize("name", ["model.onnx", "./model.onnx", "link.onnx"])
def test_the_input_is_never_overwritten(name: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(small(), path)
    (tmp_path / "link.onnx").symlink_to(path)
    before = path.read_bytes()
    with pytest.raises(model_io.ModelError, match="overwrite the input"):
        model_io.save(model_io.load(path), tmp_path / name, source=path)
    assert path.read_bytes() == before


def test_the_input_s_weights_are_never_overwritten(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(small(), path, save_as_external_data=True, location="copy.onnx.data", size_threshold=0)
    with pytest.raises(model_io.ModelError, match="overwrite the input"):
        model_io.save(model_io.load(path), tmp_path / "copy.onnx", source=path)


@pytest.mark.parametrize("external", [False, True])
def test_a_failed_write_leaves_nothing(external: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(small(), path, save_as_external_data=external, location="w.bin", size_threshold=0)
    model = model_io.load(path)
    before = sorted(tmp_path.iterdir())

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ir, "save", fail)
    monkeypatch.setattr(model_io, "_write_record", fail)
    monkeypatch.setattr(model_io, "STREAM_THRESHOLD_BYTES", 0)
    with pytest.raises(model_io.ModelError, match="No space left on device"):
        model_io.save(model, tmp_path / "copy.onnx")
    assert sorted(tmp_path.iterdir()) == before


def test_an_uncommitted_stage_leaves_nothing(tmp_path: pathlib.Path) -> None:
    with model_io.staged(model_io.load(small()), tmp_path / "copy.onnx") as stage:
        assert onnx.load(stage.model_path).graph.node
        assert not (tmp_path / "copy.onnx").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_memory_is_read() -> None:
    proto = small()
    assert len(model_io.load(proto).graph) == len(proto.graph.node)


def test_values_of_types_other_than_tensors_survive(tmp_path: pathlib.Path) -> None:
    sequence = onnx.helper.make_tensor_sequence_value_info("parts", onnx.TensorProto.FLOAT, ["n"])
    output = onnx.helper.make_tensor_value_info("all", onnx.TensorProto.FLOAT, ["m"])
    node = onnx.helper.make_node("ConcatFromSequence", ["parts"], ["all"], axis=0)
    graph = onnx.helper.make_graph([node], "g", [sequence], [output], doc_string="kept")
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    model_io.save(model_io.load(model), tmp_path / "copy.onnx")
    assert onnx.load(tmp_path / "copy.onnx").graph == model.graph


# CPU time, not the clock's: it says the same on a busy machine. VmHWM, not ru_maxrss: that one is
# inherited from the process which started this one.
MEASURE = """
import json, resource, sys
from faexport.cli import app
app([*sys.argv[1:]], standalone_mode=False)
used = resource.getrusage(resource.RUSAGE_SELF)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"seconds": used.ru_utime + used.ru_stime, "bytes": int(peak.split()[1]) * 1024}), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
def test_a_gigabyte_takes_twenty_seconds_and_little_memory(external: bool, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(big_model.encoder(SLOW_MODEL), path, save_as_external_data=external, location="model.data")
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size > 10**9
    command = [sys.executable, "-c", MEASURE, str(path), "--no-verify", "--json", "--report", str(tmp_path / "r.json")]
    done = subprocess.run(command, env=commands.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stderr.strip().splitlines()[-1])
    print(f"{size / 1e9:.2f} GB: {measured['seconds']:.1f} s, {measured['bytes'] / size:.2f} times the file in memory")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["num_fused"] == SLOW_MODEL.layers and report["num_refused"] == 0
    assert measured["bytes"] <= MAX_MEMORY * size
    assert measured["seconds"] <= MAX_SECONDS
    fused = onnx.load(tmp_path / "model.fa.onnx", load_external_data=False)
    assert sum(node.op_type == "FlashAttention" for node in fused.graph.node) == SLOW_MODEL.layers
    assert (tmp_path / "model.fa.onnx.data").exists() == external


@pytest.mark.slow
def test_a_model_above_two_gigabytes_is_written_with_external_data(tmp_path: pathlib.Path) -> None:
    """No protobuf can hold it. The weight is a sparse file, which takes no room on the disk."""
    rows = 2**20
    data = tmp_path / "weights.bin"
    with data.open("wb") as file:
        file.truncate(rows * 640 * 4)
    model = small()
    weight = onnx.TensorProto(name="huge", data_type=onnx.TensorProto.FLOAT, dims=[rows, 640])
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weights.bin")
    model.graph.initializer.append(weight)
    onnx.save(model, tmp_path / "model.onnx")
    files = model_io.save(model_io.load(tmp_path / "model.onnx"), tmp_path / "copy.onnx")
    assert files[1].stat().st_size > 2**31
    back = model_io.load(files[0])
    assert back.graph.initializers["huge"].const_value.nbytes == rows * 640 * 4
    os.unlink(files[1])


def test_weights_are_equal_after_streaming(tmp_path: pathlib.Path) -> None:
    model = model_io.load(big_model.encoder(big_model.EncoderSize(1, 4, 40)))
    seen = []
    model_io.save(model, tmp_path / "m.onnx", progress=lambda done, total: seen.append(done / total))
    assert seen == sorted(seen) and seen[-1] == 1.0
    for name, value in model_io.load(tmp_path / "m.onnx").graph.initializers.items():
        np.testing.assert_array_equal(value.const_value.numpy(), model.graph.initializers[name].const_value.numpy())
