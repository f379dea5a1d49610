# SPDX-License-Identifier: Apache-2.0
"""Triton model repositories: the files, and the configuration parsed by Triton's own model_config.proto."""

from __future__ import annotations

import importlib.util
import pathlib
import types

import onnx
import onnx_ir as ir
import pytest
from faexport.files import model_io
from faexport.runtimes import operator_library, ort_session, triton
from google.protobuf import text_format

from tests import packages
from tests.export import big_model
from tests.export.commands import assert_bad_input, here, on_a_full_disk

MIXED = """
<ir_version: 9, opset_import: ["": 17]>
mixed (int64[B, S] ids, float16[B] weight, bool[1] flag) => (float16[B] y) { y = Identity(weight) }
"""


@pytest.fixture(scope="session")
def proto() -> types.ModuleType:
    path = packages.folder("triton") / "tritonclient/grpc/model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(proto: types.ModuleType, text: str):
    return text_format.Parse(text, proto.ModelConfig())


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    onnx.save(big_model.encoder(big_model.EncoderSize(1, 4, 16)), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.skipif(not ort_session.has_library(), reason="the operator's library was not built")
def test_a_fused_model_s_repository_has_all_that_the_server_needs(
    model: pathlib.Path, proto, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert here(model, "--no-verify", "-q").returncode == 0
    monkeypatch.setattr(operator_library, "has_cuda_kernels", lambda: True)
    fused, repository = model.with_name("model.fa.onnx"), model.parent / "repository"
    done = here("deploy", fused, "--triton", f"{repository}/", "--mounted-at", "/models", "--instances", "2", "--gpu")
    assert done.returncode == 0 and "--model-repository=/models" in done.stdout, done.stderr
    config = parsed(proto, (repository / "model.fa/config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("model.fa", "onnxruntime", 8)
    assert list(config.model_operations.op_library_filename) == ["/models/model.fa/libfa_ort.so"]
    assert (config.instance_group[0].count, config.instance_group[0].kind) == (2, proto.ModelInstanceGroup.KIND_GPU)
    assert config.HasField("dynamic_batching")
    (given,), (result,) = config.input, config.output
    assert (given.name, given.data_type, list(given.dims)) == ("hidden_states", proto.TYPE_FP32, [-1, 64])
    assert (result.name, list(result.dims)) == ("last_hidden_state", [-1, 64])
    assert (repository / "model.fa/libfa_ort.so").stat().st_size > 10_000
    assert onnx.load(repository / "model.fa/1/model.onnx").graph == onnx.load(fused).graph
    assert_bad_input(here("deploy", fused, "--triton", repository), "is there already")
    monkeypatch.setattr(operator_library, "has_cuda_kernels", lambda: False)
    done = here("deploy", fused, "--triton", model.parent / "other", "--gpu")
    assert_bad_input(done, "--gpu: ", "was built without CUDA kernels; install the wheel faplugin_cu13-")
    assert not (model.parent / "other").exists()


def test_a_model_without_our_operator_needs_no_library(model: pathlib.Path, proto) -> None:
    repository = model.parent / "repository"
    assert here("deploy", model, "--triton", repository, "--name", "plain", "--max-batch", "0").returncode == 0
    config = parsed(proto, (repository / "plain/config.pbtxt").read_text())
    assert config.max_batch_size == 0 and list(config.input[0].dims) == [-1, -1, 64]
    assert not config.HasField("dynamic_batching") and not config.model_operations.op_library_filename
    assert sorted(path.name for path in (repository / "plain").iterdir()) == ["1", "config.pbtxt"]


def test_weights_in_a_file_of_their_own_come_along(model: pathlib.Path) -> None:
    onnx.save(onnx.load(model), model, save_as_external_data=True, location="w.data", size_threshold=1024)
    assert here("deploy", model, "--triton", model.parent / "r").returncode == 0
    copied = model.parent / "r/model/1/model.onnx"
    assert onnx.load(copied).graph.initializer[0].name == onnx.load(model).graph.initializer[0].name
    assert len(list(copied.parent.iterdir())) == 2


def test_scalars_types_and_names(proto) -> None:
    model = model_io.load(onnx.parser.parse_model(MIXED))
    model.graph.inputs[1].name = 'we"ight'
    model.graph.inputs[2].shape = ir.Shape([])
    config = parsed(proto, triton.config(model, triton.Serving("m")))
    assert config.max_batch_size == 0, "a scalar has no axis for a batch"
    assert [(one.name, list(one.dims)) for one in config.input] == [("ids", [-1, -1]), ('we"ight', [-1]), ("flag", [1])]
    assert config.input[2].HasField("reshape") and not config.input[2].reshape.shape
    assert [one.data_type for one in config.input] == [proto.TYPE_INT64, proto.TYPE_FP16, proto.TYPE_BOOL]
    for data_type in triton.TYPES.values():
        assert data_type in proto.DataType.keys()


FAULTS = {
    "a (float[4, S] x) => (float[4, S] y) { y = Identity(x) }": "axis 0 of 'x' has the fixed size 4",
    "a (float[B, 2] x, float[S] z) => (float[B, 2] y) { y = Add(x, z) }": "axis 0 is not the same size everywhere",
    "a (float[] x) => (float[] y) { y = Identity(x) }": "'x' has no axis for a batch",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_batch_that_can_t_be_served_is_one_line(text: str, tmp_path: pathlib.Path) -> None:
    onnx.save(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 17]> {text}'), tmp_path / "m.onnx")
    done = here("deploy", tmp_path / "m.onnx", "--triton", tmp_path / "r", "--max-batch", "4")
    assert_bad_input(done, FAULTS[text], "--max-batch 0")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("option", ["--max-batch", "--instances"])
def test_numbers_that_triton_does_not_hold_are_refused(model: pathlib.Path, option: str) -> None:
    assert_bad_input(here("deploy", model, "--triton", model.parent / "r", option, str(2**31)), option)
    assert not (model.parent / "r").exists()


def test_what_triton_has_no_type_for_is_one_line(tmp_path: pathlib.Path) -> None:
    text = '<ir_version: 9, opset_import: ["": 19]> a (float8e4m3fn[B] x) => (float8e4m3fn[B] y) { y = Identity(x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    assert_bad_input(
        here("deploy", tmp_path / "m.onnx", "--triton", tmp_path / "r"), "input 'x' is of type float8e4m3fn"
    )
    assert_bad_input(here("deploy", tmp_path / "m.onnx", "--triton", tmp_path / "r", "--name", "a/b"), "--name a/b")


def test_nothing_is_left_of_what_could_not_be_written(model: pathlib.Path) -> None:
    for repository in ("r", "new/deep/r"):
        assert_bad_input(on_a_full_disk("deploy", model, "--triton", model.parent / repository), "cannot be written")
        assert [path.name for path in model.parent.iterdir()] == ["model.onnx"]
    (model.parent / "there").mkdir()  # by somebody else
    assert_bad_input(on_a_full_disk("deploy", model, "--triton", model.parent / "there"), "cannot be written")
    assert not list((model.parent / "there").iterdir())
    assert here("deploy", model, "--triton", model.parent / "r").returncode == 0
