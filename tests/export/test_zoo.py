# SPDX-License-Identifier: Apache-2.0
"""The measuring programs: the zoo on a folder made here, ONNX's node tests in a small part, models without weights."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import types

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
    done = run("onnx_suite.py", "--filter", "causal")
    assert done.returncode == 0, done.stdout + done.stderr
    right, _, wrong = counts(done.stdout)
    assert right >= 8 and wrong == 0
    assert run("onnx_suite.py", "--filter", "no such test").returncode == 1, "nothing tested is not a success"


def counts(text: str) -> tuple[int, int, int]:
    words = text.splitlines()[-1].replace(",", "").split()
    assert words[1:4] == ["fused", "and", "right"] and words[5] == "refused" and words[7] == "wrong"
    return int(words[0]), int(words[4]), int(words[6])


class Weight:
    """As much of a PyTorch tensor as is asked for."""

    def __init__(self, array: np.ndarray) -> None:
        self.numpy, self.numel = lambda: array, lambda: array.size

    def detach(self) -> Weight:
        return self


def test_weights_are_drawn_again_in_whatever_form_a_tool_stored_them(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import skeletons

    recipes = {name: {"shape": [48, 32], "mean": 0.1, "deviation": 2.0} for name in "qkv"}
    drawn = {name: skeletons._drawn(name, recipe) for name, recipe in recipes.items()}
    module = types.SimpleNamespace(named_parameters=lambda: [(name, Weight(array)) for name, array in drawn.items()])
    heads = [array.reshape(48, 4, 8) for array in drawn.values()]
    forms = {
        "plain": drawn["q"],
        "transposed, half": drawn["k"].T.astype(np.float16),
        "side by side": np.concatenate([*drawn.values()], axis=-1),
        "by heads": np.concatenate([part[:, head] for head in range(4) for part in heads], axis=-1),
        "unknown": np.ones((40, 40), np.float32),
    }
    tensors = [onnx.numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in forms.items()]
    graph = onnx.helper.make_graph([], "g", [], [], tensors)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "whole.onnx")
    known = skeletons.Known(module, recipes)
    known.write(tmp_path / "weights.json")
    known.strip(tmp_path / "whole.onnx", tmp_path / "stripped.onnx")
    assert (tmp_path / "stripped.onnx").stat().st_size < 10_000
    restored = skeletons.Weights(tmp_path / "weights.json").restored(tmp_path / "stripped.onnx")
    found = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.ModelProto.FromString(restored).graph.initializer}
    assert found.keys() == forms.keys()
    for name, array in forms.items():
        np.testing.assert_array_equal(found[name], array, name)
