# SPDX-License-Identifier: Apache-2.0
"""The measuring programs: the zoo on a folder made here, ONNX's node tests in a small part."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.export import big_model
from tests.export.commands import environment

ROOT = pathlib.Path(__file__).parents[2]
META = {
    "family": "encoder", "exporter": "tests", "attn": "eager", "opset": 17, "dtype": "fp32", "with_cache": False,
    "mode": "nocache", "numerics_ok": True, "peer_type": "bert", "num_heads": 4, "hidden": 64,
}  # fmt: skip


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)


def add_model(root: pathlib.Path, name: str, proto: onnx.ModelProto, blocks: int) -> None:
    folder = root / name
    folder.mkdir()
    onnx.save(proto, folder / "model.onnx")
    tensors = {"hidden_states": np.random.default_rng(0).normal(size=(2, 9, 64)).astype(np.float32)}
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    np.savez(folder / "inputs.npz", **tensors)
    np.savez(folder / "expected.npz", last_hidden_state=session.run(None, tensors)[0])
    (folder / "meta.json").write_text(json.dumps(META | {"name": name, "expected_attention_blocks": blocks}))


@pytest.fixture
def zoo(tmp_path: pathlib.Path) -> pathlib.Path:
    root = tmp_path / "zoo"
    root.mkdir()
    add_model(root, "plain", big_model.encoder(big_model.EncoderSize(2, 4, 16)), 2)
    decoy = big_model.encoder(big_model.EncoderSize(1, 4, 16))
    next(node for node in decoy.graph.node if node.op_type == "Softmax").attribute[0].i = 2  # over the queries
    add_model(root, "decoy", decoy, 0)
    return root


@pytest.mark.slow
def test_the_zoo_counts_verifies_and_explains(zoo: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = run("zoo.py", zoo, "--json", tmp_path / "r.json", "--jobs", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 blocks fused (100.0 %), 0 wrong" in done.stdout
    data = json.loads((tmp_path / "r.json").read_text())
    plain, decoy = sorted(data["results"], key=lambda result: result["name"] != "plain")
    assert plain["ours"]["outcome"] == "right" and plain["ours"]["kinds"] == ["no mask"] * 2
    assert plain["ours"]["runs"] >= 4 and plain["ours"]["torch_error"] < 1e-4
    assert decoy["ours"]["fused"] == 0 and decoy["ours"]["refusals"][0]["reason"]
    assert {"onnxruntime", "onnxscript"} <= plain.keys()


def test_an_empty_zoo_is_bad_input(tmp_path: pathlib.Path) -> None:
    done = run("zoo.py", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "no models" in done.stderr


@pytest.mark.slow
def test_onnx_s_own_tests_are_fused_and_right() -> None:
    done = run("onnx_suite.py", "--filter", "attention_4d_causal")
    assert done.returncode == 0, done.stdout + done.stderr
    right, _, wrong = counts(done.stdout)
    assert right >= 8 and wrong == 0
    assert run("onnx_suite.py", "--filter", "no such test").returncode == 1, "nothing tested is not a success"


def counts(text: str) -> tuple[int, int, int]:
    words = text.splitlines()[-1].replace(",", "").split()
    assert words[1:4] == ["fused", "and", "right"] and words[5] == "refused" and words[7] == "wrong"
    return int(words[0]), int(words[4]), int(words[6])
