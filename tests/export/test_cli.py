# SPDX-License-Identifier: Apache-2.0
"""The command line by subprocess: exit codes, what is printed where, what is written and what is not."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from faexport import optimize
from faexport.cli import app
from faexport.errors import ModelError
from faexport.options import Options
from faexport.runtimes import ort_session
from onnx import TensorProto, helper

from tests.export import (
    big_model,
    commands,
    malformed_models,  # noqa: F401 (fills BAD)
)
from tests.export.bad_models import BAD
from tests.export.commands import assert_bad_input, faexport

SIZE = big_model.EncoderSize(2, 4, 16)


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    onnx.save(big_model.encoder(SIZE), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def plain(tmp_path: pathlib.Path) -> pathlib.Path:
    """A model without attention."""
    shape = ["n", 4]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sabotage(folder: pathlib.Path, code: str) -> str:
    """The PYTHONPATH with which Python runs this code, written to a new folder, before anything else."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return f"{folder}:{commands.environment()['PYTHONPATH']}"


def operators(path: pathlib.Path) -> int:
    return sum(node.op_type == "FlashAttention" for node in onnx.load(path).graph.node)


def test_the_bare_form_writes_a_verified_model_beside_the_input(model: pathlib.Path) -> None:
    before = model.read_bytes()
    done = faexport("model.onnx", cwd=model.parent)
    assert done.returncode == 0, done.stderr
    assert names(model.parent) == ["model.fa.onnx", "model.onnx"]
    assert operators(model.with_name("model.fa.onnx")) == SIZE.layers
    assert model.read_bytes() == before
    assert "/encoder/layer.0…1/attention/Softmax" in done.stdout
    assert "last_hidden_state" in done.stdout and "verification passed" in done.stdout
    assert "2 of 2 attention sites fused; wrote model.fa.onnx" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr, "no colours and no progress bar in a pipe"
    assert done.stderr == ""


def test_the_command_s_name_may_be_given_and_options_may_come_first(model: pathlib.Path) -> None:
    assert faexport("fuse", "--no-verify", model).returncode == 0
    assert faexport("--no-verify", "--quiet", model, "-o", model.with_name("b.onnx")).returncode == 0
    assert (model.parent / "b.onnx").read_bytes() == (model.parent / "model.fa.onnx").read_bytes()


def test_the_interface_of_the_model_is_kept(model: pathlib.Path) -> None:
    assert faexport(model, "--no-verify").returncode == 0
    old, new = onnx.load(model), onnx.load(model.with_name("model.fa.onnx"))
    assert list(new.graph.input) == list(old.graph.input)
    assert list(new.graph.output) == list(old.graph.output)
    (added,) = (entry for entry in new.metadata_props if entry not in old.metadata_props)
    assert len(new.metadata_props) == len(old.metadata_props) + 1
    assert added.key == "faexport" and added.value.endswith("fused 2 of 2 attention sites")
    assert (new.producer_name, new.graph.name) == (old.producer_name, old.graph.name)


def test_a_second_run_finds_nothing_to_do(model: pathlib.Path) -> None:
    assert faexport(model, "--no-verify", "--quiet").returncode == 0
    again = faexport(model.with_name("model.fa.onnx"))
    assert again.returncode == 0 and "already has 2 FlashAttention nodes" in again.stdout
    assert names(model.parent) == ["model.fa.onnx", "model.onnx"]


def test_nothing_to_fuse_is_no_error(plain: pathlib.Path) -> None:
    done = faexport(plain)
    assert done.returncode == 0 and "nothing to fuse: the model has no attention" in done.stdout
    assert names(plain.parent) == ["model.onnx"]


def test_a_dry_run_writes_nothing(model: pathlib.Path) -> None:
    done = faexport(model, "--dry-run")
    assert done.returncode == 0 and "verification passed" in done.stdout
    assert "2 of 2 attention sites can be fused; no model was written" in done.stdout
    assert names(model.parent) == ["model.onnx"]


def test_inspect_only_looks(model: pathlib.Path) -> None:
    done = faexport("inspect", model)
    assert done.returncode == 0 and "fused" in done.stdout and "verification" not in done.stdout
    assert names(model.parent) == ["model.onnx"]


def test_json_is_all_that_is_printed(model: pathlib.Path) -> None:
    done = faexport(model, "--json", "--report", model.with_name("r.json"), "--dry-run")
    report = json.loads(done.stdout)
    assert report == json.loads(model.with_name("r.json").read_text())
    assert report["num_fused"] == 2 and report["output"] is None
    assert report["verification"]["status"] == "passed"


def test_the_model_is_converted_to_an_opset_first(model: pathlib.Path) -> None:
    assert faexport(model, "--opset", "21", "--quiet").returncode == 0
    opsets = {entry.domain: entry.version for entry in onnx.load(model.with_name("model.fa.onnx")).opset_import}
    assert opsets[""] == 21
    assert_bad_input(faexport(model, "--opset", "999"), "opset 999 is newer than", "--opset")


def test_quiet_prints_nothing(model: pathlib.Path) -> None:
    done = faexport(model, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_own_inputs_are_compared_too(model: pathlib.Path) -> None:
    np.savez(model.with_name("in.npz"), hidden_states=np.ones((5, 9, SIZE.hidden), np.float32))
    done = faexport(model, "--inputs", model.with_name("in.npz"), "--json")
    runs = json.loads(done.stdout)["verification"]["runs"]
    assert [5, 9, SIZE.hidden] in [run["inputs"]["hidden_states"] for run in runs] and len(runs) > 2


def test_bad_own_inputs_are_bad_input(model: pathlib.Path) -> None:
    np.savez(model.with_name("in.npz"), other=np.ones(3))
    assert_bad_input(faexport(model, "--inputs", model.with_name("in.npz")), "no array 'hidden_states'")
    np.savez(model.with_name("in.npz"), hidden_states=np.ones((5, 9, SIZE.hidden)))
    assert_bad_input(faexport(model, "--inputs", model.with_name("in.npz")), "hidden_states", "float64", "float32")
    np.savez(model.with_name("in.npz"), hidden_states=np.ones((5, 9, 3), np.float32))
    assert_bad_input(faexport(model, "--inputs", model.with_name("in.npz")), "[5, 9, 3]", "[batch,sequence,64]")
    model.with_name("in.npz").write_text("hello")
    assert_bad_input(faexport(model, "--inputs", model.with_name("in.npz")), "in.npz", "numpy.savez")
    np.save(model.with_name("in.npy"), np.ones(3))
    assert_bad_input(faexport(model, "--inputs", model.with_name("in.npy")), "in.npy", "numpy.savez")
    assert_bad_input(faexport(model, "--inputs", model.with_name("no.npz")), "no.npz", "no such file")
    assert names(model.parent) == ["in.npy", "in.npz", "model.onnx"]


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_exits_with_2(kind: str, tmp_path: pathlib.Path) -> None:
    """In one line, and in the report where there is to be one."""
    write, words = BAD[kind]
    write(tmp_path / "model.onnx")
    before = names(tmp_path)
    done = commands.here(tmp_path / "model.onnx", "--report", tmp_path / "r.json")
    assert_bad_input(done, *words)
    left = set(names(tmp_path)) - set(before)
    assert left <= {"r.json"}
    if left:
        assert f"error: {json.loads((tmp_path / 'r.json').read_text())['error']}" == done.stderr.strip()


def test_the_input_can_t_be_the_output(model: pathlib.Path) -> None:
    before = model.read_bytes()
    assert_bad_input(faexport(model, "-o", model), "overwrite the input", "-o")
    assert_bad_input(faexport(model, "-o", model.parent / "no" / "such.onnx"), "does not exist")
    assert_bad_input(faexport(model, "-o", model.parent), "overwrite the input", "-o")
    assert model.read_bytes() == before and names(model.parent) == ["model.onnx"]


def test_the_report_overwrites_neither_model(model: pathlib.Path) -> None:
    before, target = model.read_bytes(), model.with_name("model.fa.onnx")
    assert_bad_input(faexport(model, "--report", model), "overwrite the input", "--report")
    assert_bad_input(faexport(model, "--report", target), "where the model will be written", "--report")
    assert_bad_input(faexport("inspect", model, "--report", model), "overwrite", "--report")
    assert_bad_input(faexport(model, "--report", model.parent / "no" / "r.json"), "does not exist", "--report")
    assert model.read_bytes() == before and names(model.parent) == ["model.onnx"]


def _children(pid: int) -> list[int]:
    """Processes that this one has started: onnxruntime's, while it verifies."""
    with contextlib.suppress(OSError):
        return [int(word) for word in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_leaves_nothing(model: pathlib.Path, signal_number: int) -> None:
    """Interrupted while the written model is verified, in the temporary folder beside its place."""
    scratch = model.parent / "tmp"
    scratch.mkdir()
    with commands.started(model, heeding=signal_number, TMPDIR=os.fspath(scratch)) as process:
        deadline = time.monotonic() + 60
        while not _children(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        children = _children(process.pid)
        process.send_signal(signal_number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == b""
    assert names(model.parent) == ["model.onnx", "tmp"] and names(scratch) == []
    assert not any(pathlib.Path(f"/proc/{child}").exists() for child in children), "onnxruntime's process is gone"


def test_a_misspelt_command_is_told_from_a_missing_model(model: pathlib.Path) -> None:
    done = faexport("inspekt", model)
    assert done.returncode == 2 and "did you mean 'inspect'?" in done.stderr
    assert "did you mean '--help'?" in faexport("help", model).stderr
    assert "did you mean '--version'?" in faexport("version").stderr
    assert_bad_input(faexport(model.with_name("modle.onnx")), "no such file")


WRONG = (
    "--no-such-option x.onnx",
    "x.onnx --dtype fp4",
    "inspect",
    "x.onnx --target tensorrt --rest",
    "x.onnx --target qnn",
    "x.onnx --verify-timeout nan",
    "x.onnx --verify-timeout inf",
    "x.onnx --verify-timeout 1e18",
    "bench x.onnx --timeout nan",
    "bench x.onnx --timeout 1e18",
    "x.onnx --no-verify --verify-on cuda",
    "x.onnx --no-verify --verify-timeout 5",
    "x.onnx --no-verify --inputs x.npz",
    "x.onnx --float32 tf32 --dtype bf16",
)


@pytest.mark.parametrize("arguments", [tuple(text.split()) for text in WRONG])
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    done = faexport(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "no such file" not in done.stderr and done.stderr


@pytest.mark.parametrize("command", ["fuse", "inspect"])
def test_an_empty_name_is_no_folder(command: str, model: pathlib.Path) -> None:
    """It is what a shell makes of a variable that isn't set, and not the folder that we are in."""
    arguments = {"fuse": ([""], ["model.onnx", "-o", ""]), "inspect": ([""],)}
    for given in arguments[command]:
        done = faexport(command, *given, cwd=model.parent)
        assert done.returncode == 2 and "the name is empty" in done.stderr
    assert names(model.parent) == ["model.onnx"]


def test_a_slash_at_the_end_names_a_folder(model: pathlib.Path) -> None:
    """Whether there is such a folder or not. A report is no folder; the model goes into one, which may be the root."""
    done = faexport(model, "--report", f"{model.parent}/new/")
    assert done.returncode == 2 and "new/ is a folder" in done.stderr and len(done.stderr.splitlines()) == 1
    assert names(model.parent) == ["model.onnx"]
    assert commands.here(model, "-o", f"{model.parent}/new/", "--no-verify").returncode == 0
    assert names(model.parent) == ["model.onnx", "new"] and names(model.parent / "new") == ["model.onnx"]
    root = commands.here(model, "-o", "/", "--no-verify", "--dry-run")
    assert root.returncode == 0 or "/model.onnx: cannot be written: no permission" in root.stderr
    assert_bad_input(commands.here("/"), "/: is a folder without")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--fp16", "--bf16"), "--fp16 and --bf16 exclude one another, give one of them;"),
        (
            ("--dtype", "fp16", "--bf16"),
            "--dtype fp16 and --bf16 exclude one another, give one of them; --dtype fp16 is of",
        ),
        (("--dtype", "fp8", "--fp16", "--bf16"), "--dtype fp8 and --fp16 and --bf16 exclude one another"),
    ],
    ids=" ".join,
)
def test_precisions_that_exclude_one_another_are_named(model: pathlib.Path, given: tuple[str, ...], said: str) -> None:
    done = commands.here(model, *given)
    assert_bad_input(done, said)
    assert ("--dtype" in done.stderr) == ("--dtype" in given)


OF_OPTIONS = [
    ({"fp16": True, "bf16": True}, "fp16=True and bf16=True exclude one another"),
    ({"dtype": ir.DataType.FLOAT16, "fp16": True}, "dtype=FLOAT16 and fp16=True exclude one another"),
    ({"dtype": ir.DataType.BFLOAT16, "float32": "tf32"}, "dtype=BFLOAT16 asks for another precision"),
    ({"dtype": ir.DataType.INT8}, "dtype is INT8; expected FLOAT16"),
    ({"keep_io_types": False}, "keep_io_types=False needs fp16=True or bf16=True"),
    ({"rest": True, "target": "tensorrt"}, "which target=tensorrt doesn't run"),
]


@pytest.mark.parametrize(("given", "said"), OF_OPTIONS, ids=[said for _, said in OF_OPTIONS])
def test_who_calls_from_python_is_told_the_same(given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Options(**given)


def test_a_failed_verification_writes_nothing_and_exits_with_1(model: pathlib.Path) -> None:
    """A rewrite that is wrong on purpose: the scale of every operator is doubled before it is verified."""
    path = sabotage(
        model.parent / "saboteur",
        "from faexport import pipeline\n"
        "honest = pipeline.run\n"
        "def run(model, options):\n"
        "    model, report = honest(model, options)\n"
        "    import onnx_ir as ir\n"
        "    for node in model.graph:\n"
        "        if node.op_type == 'FlashAttention':\n"
        "            node.attributes['scale'] = ir.AttrFloat32('scale', 2 * node.attributes.get_float('scale', 0.25))\n"
        "    return model, report\n"
        "pipeline.run = run\n",
    )
    done = faexport(model, "--report", model.with_name("r.json"), PYTHONPATH=path)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ") and "site '/encoder/layer." in done.stderr and "differs by" in done.stderr
    assert "was not written" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert json.loads(model.with_name("r.json").read_text())["verification"]["status"] == "failed"
    assert names(model.parent) == ["model.onnx", "r.json", "saboteur"]


def test_what_could_not_be_compared_is_not_written(model: pathlib.Path) -> None:
    """Too little time; and an operator that onnxruntime doesn't have."""
    done = faexport(model, "--verify-timeout", "0.001", "--json")
    assert done.returncode == 1 and "took longer than 0.001 s; --verify-timeout" in done.stderr
    assert "--no-verify would write it" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    report = json.loads(done.stdout)
    assert report["verification"]["status"] == "not run" and report["output"] is None
    assert report["error"] in done.stderr
    proto = onnx.load(model)
    proto.graph.node.append(helper.make_node("Unheard", [proto.graph.output[0].name], ["more"], domain="some.where"))
    proto.graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, None))
    proto.opset_import.append(helper.make_opsetid("some.where", 1))
    onnx.save(proto, model)
    done = faexport(model)
    assert done.returncode == 1 and "the original does not run in onnxruntime" in done.stderr
    assert "Unheard" in done.stderr and names(model.parent) == ["model.onnx"]
    assert faexport(model, "--no-verify", "--quiet").returncode == 0
    assert names(model.parent) == ["model.fa.onnx", "model.onnx"]


def test_names_in_a_model_steer_no_terminal(model: pathlib.Path) -> None:
    """Neither in the tables of stdout nor in an error."""
    proto, name = onnx.load(model), "soft\x1b[2Jmax\u202e"
    next(node for node in proto.graph.node if node.op_type == "Softmax").name = name
    onnx.save(proto, model)
    done = faexport("inspect", model, COLUMNS="300")
    assert done.returncode == 0 and "soft\\x1b[2Jmax\\u202e" in done.stdout and not {"\x1b", "\u202e"} & {*done.stdout}
    proto.graph.output[0].name = name
    onnx.save(proto, model)
    done = faexport(model)
    assert_bad_input(done, "output 'soft\\x1b[2Jmax\\u202e'")
    assert not {"\x1b", "\u202e"} & {*done.stderr}


HAS_GPU = ort_session.CUDA in onnxruntime.get_available_providers()


@pytest.mark.skipif(HAS_GPU, reason="there is a CUDA provider")
def test_a_gpu_that_is_not_there_compares_nothing(model: pathlib.Path) -> None:
    """That is said before the model is read, which takes long where it is large."""
    sentence = "onnxruntime can't use a GPU here; --verify-on cpu compares on the CPU"
    model.write_bytes(b"no model")
    assert_bad_input(faexport(model, "--verify-on", "cuda"), sentence)
    done = faexport(model, "--verify-on", "cuda", "--json")
    assert done.returncode == 2 and json.loads(done.stdout)["error"] == sentence and names(model.parent) == [model.name]
    with pytest.raises(ModelError, match=sentence.replace("--verify-on cpu", 'verify_on="cpu"')):
        optimize(model, verify_on="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA provider")
@pytest.mark.parametrize("options", [[], ["--fp16"]], ids=str)
def test_models_are_compared_on_a_gpu(model: pathlib.Path, options: list[str]) -> None:
    done = faexport(model, "--verify-on", "cuda", "--json", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["verification"]
    assert found["status"] == "passed" and any("CUDA provider" in note for note in found["notes"])
    assert names(model.parent) == ["model.fa.onnx", "model.onnx"]


OBSTACLES = {
    "without onnxruntime": (
        """import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == 'onnxruntime' else find(name, *more)
""",
        "onnxruntime is not installed",
    ),
    "on a full disk": (  # the sites are compared by a model in the temporary folder
        """import errno, os, tempfile
honest = tempfile.mkdtemp
def folder(suffix=None, prefix=None, dir=None):
    if prefix == 'faexport-sites-':
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return honest(suffix, prefix, dir)
tempfile.mkdtemp = folder
""",
        "No space left on device (TMPDIR",
    ),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_nothing_is_written_and_the_cause_is_named(obstacle: str, model: pathlib.Path) -> None:
    code, cause = OBSTACLES[obstacle]
    done = faexport(model, PYTHONPATH=sabotage(model.parent / "sabotaged", code))
    assert done.returncode == 1 and cause in done.stderr, done.stderr
    assert names(model.parent) == ["model.onnx", "sabotaged"]


def test_strict_tells_of_what_was_left(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert faexport("inspect", model, "--strict").returncode == 0
    proto = onnx.load(model)
    proto.graph.output.append(
        helper.make_tensor_value_info(next(n for n in proto.graph.node if n.op_type == "Softmax").output[0], 1, None)
    )
    onnx.save(proto, model)
    done = faexport(model, "--strict", "--no-verify")
    assert done.returncode == 4 and "1 of 2 attention sites fused" in done.stdout
    assert names(model.parent) == ["model.fa.onnx", "model.onnx"], "what can be fused is written"
    assert faexport(model, "--no-verify").returncode == 0
    assert faexport("inspect", model, "--strict").returncode == 4


def test_strict_tells_that_nothing_was_fused(plain: pathlib.Path) -> None:
    assert faexport(plain, "--strict").returncode == 4


def test_help_teaches_by_examples() -> None:
    done = faexport("--help", COLUMNS="120")
    assert done.returncode == 0
    for word in (
        "Examples",
        "faexport inspect model.onnx",
        "--no-verify",
        "--assume",
        "Exit codes",
        "build",
        "inspect",
    ):
        assert word in done.stdout, word


@pytest.mark.parametrize("command", sorted(app.commands))
def test_help_of_each_command_has_examples(command: str) -> None:
    done = faexport(command, "--help", COLUMNS="120")
    assert done.returncode == 0 and "Examples:" in done.stdout, done.stdout
    assert f"faexport {'model.onnx' if command == 'fuse' else command}" in done.stdout


def test_version() -> None:
    done = faexport("--version")
    assert done.returncode == 0 and done.stdout.startswith("faexport ")


def test_colours_only_on_terminals(model: pathlib.Path) -> None:
    """In a pseudo-terminal there are colours, unless NO_COLOR asks for none."""
    import pty

    def run(**env: str) -> bytes:
        main, side = pty.openpty()
        command = [sys.executable, "-m", "faexport", "inspect", str(model)]
        environment = commands.environment() | {"TERM": "xterm-256color"} | env
        with subprocess.Popen(command, stdout=side, stderr=subprocess.DEVNULL, env=environment) as process:
            os.close(side)
            output = b""
            try:
                while block := os.read(main, 65536):
                    output += block
            except OSError:  # the other end is closed
                pass
        os.close(main)
        assert process.returncode == 0
        return output

    assert b"\x1b[32m" in run()
    assert b"\x1b[32m" not in run(NO_COLOR="1")
