# SPDX-License-Identifier: Apache-2.0
"""`faexport build` and `faexport run`, with TensorRT-RTX, which builds without a GPU, and with no TensorRT at all."""

from __future__ import annotations

import json
import math
import os
import pathlib
import pty
import re
import subprocess
import sys
import types

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from faexport import cli, pipeline
from faexport.commands import build, engine_run, terminal
from faexport.files import model_io
from faexport.files.model_io import ModelError
from faexport.options import Options
from faexport.report.data import OutputDifference
from faexport.runtimes import engine
from faexport.runtimes.engine import Range, Runtime

from tests import packages
from tests.export.commands import here

RTX = "tensorrt-rtx"
MLP = """
<ir_version: 9, opset_import: ["": 17]>
mlp (float[N, 16] x, float[16, 16] w) => (float[N, 16] y) { a = MatMul(x, w)  b = Relu(a)  y = MatMul(b, w) }
"""
ATTENTION = """
<ir_version: 9, opset_import: ["": 17]>
core (float[B, 2, S, 16] q, float[B, 2, 16, S] k, float[B, 2, S, 16] v) => (float[B, 2, S, 16] y)
<float scale = {0.25}> { a = MatMul(q, k)  b = Mul(a, scale)  c = Softmax<axis = -1>(b)  y = MatMul(c, v) }
"""
ATTENTION_SHAPES = [
    part for option in ("--min", "--opt", "--max") for part in (option, "q:1x2x8x16,k:1x2x16x8,v:1x2x8x16")
]
FOR_ONNXRUNTIME = """
<ir_version: 9, opset_import: ["": 17, "com.microsoft": 1]>
core (float[B, S, 16] x, float[16] w) => (float[B, S, 16] z) {
  y = com.microsoft.BiasGelu(x, w)  z = com.microsoft.SkipLayerNormalization(y, x, w) }
"""
UNSUPPORTED = """
<ir_version: 9, opset_import: ["": 17, "mine": 1]>
odd (float[2, 4] x) => (float[2, 4] z) { [first_strange] y = mine.Strange(x)  [second_strange] z = mine.Stranger(y) }
"""


def write(folder: pathlib.Path, text: str) -> pathlib.Path:
    path = folder / "model.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def run_cli(*args: object, packages_used: tuple[str, ...] = (RTX,), **kwargs) -> subprocess.CompletedProcess[str]:
    environment = {**packages.python_with(*packages_used), "COLUMNS": "200"}
    command = [sys.executable, "-m", "faexport", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **kwargs)


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.slow
def test_the_original_demo_model_becomes_an_engine(tmp_path):
    target = tmp_path / "demo.plan"
    sizes = [part for option in ("--min", "--opt", "--max") for part in (option, "input_image:1x3x224x224")]
    done = run_cli("build", packages.demo_model(), "-o", target, *sizes)
    assert done.returncode == 0, done.stderr
    assert target.read_bytes()[:4] == engine_run.MAGIC[Runtime.TENSORRT_RTX]
    for line in ("engine", "built", "layers", "input_image: 1x3x224x224", "attention is left as it is"):
        assert line in done.stdout
    assert list(tmp_path.iterdir()) == [target]


def test_a_fused_model_becomes_an_engine_of_standard_operators(tmp_path):
    original = model_io.load(write(tmp_path, ATTENTION))
    path = tmp_path / "model.fa.onnx"
    model_io.save(pipeline.run(original)[0], path)
    done = run_cli("build", path, *ATTENTION_SHAPES)
    assert done.returncode == 0, done.stderr
    assert "1 × FlashAttention became standard operators" in done.stdout
    assert path.with_suffix(".plan").read_bytes()[:4] == engine_run.MAGIC[Runtime.TENSORRT_RTX]


def test_a_fused_model_without_its_stand_in_is_refused_up_front(tmp_path):
    original = model_io.load(write(tmp_path, ATTENTION))
    path = tmp_path / "model.fa.onnx"
    model_io.save(pipeline.run(original, Options(fallback=False))[0], path)
    done = run_cli("build", path, *ATTENTION_SHAPES)
    assert_refused(
        done, "no stand-in of standard operators for 1 of its 1 FlashAttention nodes", "the model that it was made from"
    )
    assert not path.with_suffix(".plan").exists()


def test_a_model_written_for_onnxruntime_is_refused_up_front(tmp_path):
    path = tmp_path / "model.fa.onnx"
    onnx.save(onnx.parser.parse_model(FOR_ONNXRUNTIME), path)
    done = run_cli("build", path)
    assert_refused(done, "1 BiasGelu, 1 SkipLayerNormalization", "that it was made from", "--target tensorrt")
    assert list(tmp_path.iterdir()) == [path]


def test_without_any_tensorrt(tmp_path):
    done = run_cli("build", write(tmp_path, MLP), packages_used=())
    assert_refused(done, "no TensorRT is installed", "pip install tensorrt")


def test_a_missing_runtime_is_named(tmp_path):
    path = write(tmp_path, MLP)
    assert_refused(run_cli("build", path, "--runtime", "tensorrt"), "no TensorRT is installed")
    done = run_cli("build", path, "--runtime", "tensorrt-rtx", packages_used=())
    assert_refused(done, "no TensorRT-RTX is installed", "pip install tensorrt-rtx-cu13")


def test_shapes_and_json(tmp_path):
    path = write(tmp_path, MLP)
    shapes = ("--min", "x:1x16", "--opt", "x:8x16", "--max", "x:64x16")
    done = run_cli("build", path, *shapes, "--workspace", 64, "--compute-capability", 8.9, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["profiles"] == [
        {
            "x": {"min": [1, 16], "opt": [8, 16], "max": [64, 16]},
            "w": {"min": [16, 16], "opt": [16, 16], "max": [16, 16]},
        }
    ]
    assert report["compute_capabilities"] == [89]
    assert report["engine_bytes"] == path.with_suffix(".plan").stat().st_size


def test_profiles_from_files(tmp_path):
    path = write(tmp_path, MLP)
    files = []
    for index, most in enumerate((4, 32)):
        files.append(tmp_path / f"profile{index}.json")
        files[-1].write_text(json.dumps({"x": {"min": [1, 16], "opt": [2, 16], "max": [most, 16]}}))
    done = run_cli("build", path, "--profile", files[0], "--profile", files[1], "--compute-capability", 8.6)
    assert done.returncode == 0, done.stderr
    assert "inputs, profile 0" in done.stdout and "x: 1x16 … 2x16 … 32x16" in done.stdout


def test_progress_is_shown_on_a_terminal(tmp_path):
    command = [
        sys.executable,
        "-m",
        "faexport",
        "build",
        os.fspath(write(tmp_path, MLP)),
        "--compute-capability",
        "8.9",
        "--opt",
        "x:2x16",
    ]
    leader, follower = pty.openpty()
    environment = {**packages.python_with(RTX), "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=follower, env=environment) as child:
        os.close(follower)
        shown = bytearray()
        while True:
            try:
                shown += os.read(leader, 4096)
            except OSError:  # the child has closed its end
                break
    assert child.returncode == 0
    assert b"Building engine" in shown and "━".encode() in shown


AS_TENSORRT = (
    "import sys, tensorrt_dispatch_bindings as trt; sys.modules['tensorrt'] = trt\n"  # its registry is the real one
)
PREPARE = """
import pathlib
from faexport.commands import build
from faexport.runtimes import engine
with build.prepared(pathlib.Path(sys.argv[1]), engine.Runtime.TENSORRT, True, build.Bars(True)) as (path, count, notes):
    from faexport.files import model_io
    nodes = [node.op_type for node in model_io.load(path).graph]
    creator = trt.get_plugin_registry().get_creator("FlashAttention", "1", "")
    print(count, nodes.count("FlashAttention"), creator is not None)
print(path.exists(), notes[0])
"""


def prepare(model: pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `build` does for the tensorrt package before it parses."""
    command = [sys.executable, "-c", AS_TENSORRT + PREPARE, os.fspath(model)]
    environment = {**packages.python_with("tensorrt-11.4"), **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_for_tensorrt_the_model_is_fused_and_the_plugin_registered(tmp_path):
    faplugin_trt = pytest.importorskip("faplugin.trt")
    try:
        faplugin_trt.library_path()
    except (ImportError, FileNotFoundError) as error:
        pytest.skip(str(error))
    done = prepare(write(tmp_path, ATTENTION))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "1 1 True"
    assert done.stdout.splitlines()[1].startswith("False 1 of 1 attention sites fused"), (
        "the rewritten file was temporary"
    )


def test_without_the_plugin_the_reason_is_told(tmp_path):
    done = prepare(write(tmp_path, ATTENTION), FAPLUGIN_LIBRARY_DIR=os.fspath(tmp_path))
    assert "ModelError: the TensorRT plugin can't be registered: libfa_trt.so is not in" in done.stderr


@pytest.mark.skipif(engine.has_gpu(), reason="there is a GPU")
def test_tensorrt_without_a_gpu_is_refused_before_any_work(tmp_path):
    (tmp_path / "tensorrt.py").write_text("from tensorrt_dispatch_bindings import *\n")
    environment = packages.python_with("tensorrt-11.4")
    environment["PYTHONPATH"] = os.pathsep.join([os.fspath(tmp_path), environment["PYTHONPATH"]])
    command = [sys.executable, "-m", "faexport", "build", os.fspath(write(tmp_path, ATTENTION))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert_refused(done, "TensorRT's builder needs a GPU")


REFUSALS = {
    "no such file": (["nowhere.onnx"], "no such file"),
    "unknown input": (["{model}", "--opt", "z:1x16"], "no input 'z'; its inputs are x, w"),
    "wrong rank": (["{model}", "--opt", "x:16"], "input 'x': 16 does not fit the model's [N, 16]"),
    "wrong size": (["{model}", "--opt", "x:1x17"], "does not fit"),
    "open sizes": (["{model}"], "which sizes shall the engine serve? The model leaves them open for 'x' ([N, 16])"),
    "others open": (["{model}", "--opt", "w:16x16"], "--min x:1x16 --opt x:8x16 --max x:8x16"),
    "out of order": (["{model}", "--min", "x:4x16", "--opt", "x:2x16"], "not in order"),
    "no shape": (["{model}", "--opt", "x=1x16"], "is not a shape"),
    "unknown GPU": (["{model}", "--compute-capability", "9.0"], "builds for"),
    "no number": (["{model}", "--compute-capability", "hopper"], "expected X.Y"),
    "no digits": (["{model}", "--compute-capability", "².0"], "expected X.Y"),
    "huge size": (["{model}", "--opt", "x:99999999999999999999x16"], "99999999999999999999x16; sizes are from 0 to"),
    "huge workspace": (["{model}", "--opt", "x:1x16", "--workspace", "99999999999999999999"], "--workspace"),
    "timing cache": (["{model}", "--timing-cache", "cache"], "TensorRT-RTX has none"),
    "hardware": (["{model}", "--hardware-compatible"], "--compute-capability"),
    "profile": (["{model}", "--profile", "{model}"], "is not a profile"),
    "no profile": (["{model}", "--profile", "nowhere.json"], "no such file; check the path"),
    "no folder": (["{model}", "--compute-capability", "8.9", "-o", "nowhere/x.plan"], "does not exist"),
}


def test_a_shape_is_told_as_far_as_the_model_tells_it() -> None:
    names = {0: "batch", 1: None}
    tensor = types.SimpleNamespace(name="x", shape=(-1, -1, 16), get_dimension_name=names.get)
    with pytest.raises(
        ModelError, match=re.escape("open for 'x' ([batch, any, 16]); say so for each, e.g. --min x:1x1x16")
    ):
        engine._check_all_are_named({}, [tensor])
    with pytest.raises(ModelError, match=re.escape("2x3x4 does not fit the model's [batch, any, 16]")):
        engine._range(tensor, Range((2, 3, 4), (2, 3, 4), (2, 3, 4)))
    assert engine._range(tensor, None) == Range((-1, -1, 16), (-1, -1, 16), (-1, -1, 16))


@pytest.fixture
def call(monkeypatch, capsys):
    """As run_cli, in this process: faster, for what ends before TensorRT builds anything."""
    monkeypatch.syspath_prepend(os.fspath(packages.folder(RTX)))

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["faexport", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return subprocess.CompletedProcess(args, ended.value.code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("name", REFUSALS)
def test_one_line_for_what_is_wrong(call, tmp_path, monkeypatch, name):
    args, words = REFUSALS[name]
    model = write(tmp_path, MLP)
    monkeypatch.chdir(tmp_path)
    assert_refused(call("build", *(arg.format(model=model) for arg in args)), words)
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize("size", ["Infinity", "1.5", '"16"', "-1", "1e30"])
def test_sizes_of_a_profile_are_whole_numbers(call, tmp_path, size):
    profile = tmp_path / "profile.json"
    profile.write_text(f'{{"x": {{"min": [1, 16], "opt": [1, 16], "max": [{size}, 16]}}}}')
    assert_refused(call("build", write(tmp_path, MLP), "--profile", profile), "profile.json: is not a profile")


def test_parser_errors_name_the_nodes(call, tmp_path):
    done = call("build", write(tmp_path, UNSUPPORTED))
    assert_refused(done, "node 'first_strange' (Strange)", "node 'second_strange' (Stranger)", "Plugin not found")


def test_attention_alone_is_built_unfused_with_a_note(tmp_path):
    done = run_cli(
        "build", write(tmp_path, ATTENTION), "--opt", "q:1x2x8x16", "--opt", "k:1x2x16x8", "--opt", "v:1x2x8x16"
    )
    assert done.returncode == 0, done.stderr
    assert "0 FlashAttention" in done.stdout and ("no GPU here" in done.stdout or engine.has_gpu())


def test_run_refuses_what_is_no_engine(call, tmp_path):
    inputs, plan = tmp_path / "in.npz", tmp_path / "model.plan"
    np.savez(inputs, x=np.zeros((1, 16), np.float32))
    assert_refused(call("run", plan, "--inputs", inputs), "no such file; check the path")
    plan.write_bytes(b"something else")
    assert_refused(call("run", plan, "--inputs", inputs), "is not a TensorRT engine")
    plan.write_bytes(engine_run.MAGIC[Runtime.TENSORRT] + b"...")
    assert_refused(call("run", plan, "--inputs", inputs), "was built by tensorrt", "--runtime tensorrt")
    assert_refused(call("run", plan, "--inputs", plan), "is no .npz file")
    assert_refused(call("run", plan, "--inputs", tmp_path / "none.npz"), "no such file")


@pytest.mark.skipif(engine.has_gpu(), reason="there is a GPU")
def test_run_needs_a_gpu(call, tmp_path):
    inputs, plan = tmp_path / "in.npz", tmp_path / "model.plan"
    np.savez(inputs, x=np.zeros((1, 16), np.float32))
    plan.write_bytes(engine_run.MAGIC[Runtime.TENSORRT_RTX] + b"...")
    assert_refused(call("run", plan, "--inputs", inputs), "needs a GPU")


def test_outputs_are_compared_with_onnxruntime(tmp_path):
    pytest.importorskip("onnxruntime")
    model = write(tmp_path, MLP)
    random = np.random.default_rng(0)
    inputs = {
        "x": random.standard_normal((3, 16)).astype(np.float32),
        "w": random.standard_normal((16, 16)).astype(np.float32),
    }
    right = np.maximum(inputs["x"] @ inputs["w"], 0) @ inputs["w"]
    (same,) = engine_run.compare(model, inputs, {"y": right})
    assert same.ok
    (other,) = engine_run.compare(model, inputs, {"y": right + 0.1})
    assert not other.ok
    with pytest.raises(ModelError, match="no output 'y'"):
        engine_run.compare(model, inputs, {"z": right})


def test_a_difference_without_end_is_no_number_in_json(tmp_path, monkeypatch):
    """JSON has none that is infinite."""
    inputs = tmp_path / "in.npz"
    np.savez(inputs, x=np.zeros(2, np.float32))
    model = write(tmp_path, MLP)
    worst = OutputDifference("y", "float32", (2,), math.inf, 0.0, False)
    monkeypatch.setattr(engine, "find_runtime", lambda wanted: (Runtime.TENSORRT, None))
    monkeypatch.setattr(engine_run, "run", lambda *_: engine_run.Result({"y": np.full(2, np.nan, np.float32)}, 1.0))
    monkeypatch.setattr(engine_run, "compare", lambda *_: [worst])
    done = here("run", tmp_path / "a.plan", "--inputs", inputs, "--model", model, "--json")
    assert done.returncode == 1 and "differs by inf" in done.stderr
    assert json.loads(done.stdout, parse_constant=pytest.fail)["differences"][0]["max_abs_diff"] == "inf"


def test_names_are_no_markup(capsys):
    result = engine_run.Result({"y[/b]": np.zeros((2, 3), np.float32)}, 1.0)
    terminal.console().print(engine_run.table(result, []))
    report = engine.EngineReport("tensorrt", "11", 3, profiles=[{"x[/b]": Range((1,), (2,), (4,))}], notes=["[/b]"])
    build._show(report, pathlib.Path("a[/b].plan"), 1)
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("y[/b]", "x[/b]: 1 … 2 … 4", "a[/b].plan", "note    [/b]"))


def test_outputs_of_any_name_are_written(tmp_path):
    outputs = {name: np.full((2, 3), k, np.float32) for k, name in enumerate(("file", "allow_pickle", "/block/y"))}
    engine_run.write_outputs(tmp_path / "out.npz", outputs)
    with np.load(tmp_path / "out.npz") as written:
        assert sorted(written.files) == sorted(outputs)
        assert all(np.array_equal(written[name], array) for name, array in outputs.items())


def test_parse_shape():
    assert engine.parse_shape("ids:1x128") == ("ids", (1, 128))
    assert engine.parse_shapes("ids:1x128,mask:0:2x2") == [("ids", (1, 128)), ("mask:0", (2, 2))]
    assert engine.parse_shapes("ids:1,128,mask:4") == [("ids", (1, 128)), ("mask", (4,))]
    assert engine.parse_shape("a:0:2,3") == ("a:0", (2, 3))
    for text in ("ids", "ids:", ":1x2", "ids:1x-2", "ids:axb"):
        with pytest.raises(ModelError, match="is not a shape"):
            engine.parse_shape(text)


def test_missing_corners_are_the_nearest_given():
    assert engine.make_profile([], ["x:4"], []) == {"x": Range((4,), (4,), (4,))}
    assert engine.make_profile(["x:1"], [], ["x:8"]) == {"x": Range((1,), (8,), (8,))}
    assert engine.make_profile(["x:1"], ["x:2"], []) == {"x": Range((1,), (2,), (2,))}
    with pytest.raises(ModelError, match="different ranks"):
        engine.make_profile(["x:1"], ["x:2x2"], [])


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "x.plan"
    engine.write_file(target, b"abc")
    assert target.read_bytes() == b"abc" and list(tmp_path.iterdir()) == [target]
    with pytest.raises(ModelError, match="cannot be written: No such file or directory"):
        engine.write_file(tmp_path / "none" / "x.plan", b"abc")


class StandInEngine:
    """Answers like an engine and its context; an execution copies the input to the output on the GPU."""

    shape: tuple[int, ...] = ()
    num_io_tensors = 2

    def __init__(self, trt: types.SimpleNamespace) -> None:
        self.trt, self.addresses = trt, {}

    def create_execution_context(self) -> StandInEngine:
        return self

    def get_tensor_name(self, index: int) -> str:
        return ("x", "y")[index]

    def get_tensor_mode(self, name: str) -> str:
        return self.trt.TensorIOMode.INPUT if name == "x" else "output"

    def get_tensor_dtype(self, name: str) -> str:
        return self.trt.DataType.BF16

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return len(shape) == 2

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def get_tensor_address(self, name: str) -> int:
        return self.addresses[name]

    def execute_async_v3(self, stream: int) -> bool:
        cuda = pytest.importorskip("cuda.bindings.runtime")
        size, kind = int(np.prod(self.shape)) * 2, cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        (error,) = cuda.cudaMemcpyAsync(self.addresses["y"], self.addresses["x"], size, kind, stream)
        return int(error) == 0


@pytest.mark.gpu
def test_memory_goes_to_the_gpu_and_back(tmp_path):
    pytest.importorskip("cuda.bindings.runtime")
    trt = types.SimpleNamespace(
        TensorIOMode=types.SimpleNamespace(INPUT="input"), DataType=types.SimpleNamespace(BF16="bf16")
    )
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    with engine_run.Device() as device:
        result = engine_run.execute(trt, StandInEngine(trt), device, {"x": x})
        with pytest.raises(ModelError, match="outside the engine's profile"):
            engine_run.execute(trt, StandInEngine(trt), device, {"x": x[0]})
        with pytest.raises(ModelError, match="input 'x' is not among"):
            engine_run.execute(trt, StandInEngine(trt), device, {"z": x})
    assert result.outputs["y"].dtype == ml_dtypes.bfloat16
    assert np.array_equal(result.outputs["y"], x.astype(ml_dtypes.bfloat16))
    assert result.milliseconds > 0
