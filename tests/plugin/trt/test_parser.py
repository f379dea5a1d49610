# SPDX-License-Identifier: Apache-2.0
"""Rewritten models, node by node as TensorRT's parser would create their plugins, in real registries of TensorRT."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import onnx
import onnx.parser
import pytest
from faexport import pipeline
from faexport.files import model_io

from tests import packages

MODULES = {"11.4": "tensorrt_dispatch_bindings", "10.15": "tensorrt_lean_bindings"}
WALK = pathlib.Path(__file__).with_name("parser_walk.py")

# A decoder's attention as exporters write it: heads expanded, causal by an index comparison, padding by a bool mask.
GQA_DECODER = """
<ir_version: 9, opset_import: ["": 18]>
decoder (float[B, S, 64] hidden, bool[B, 1, 1, S] padding, float[64, 64] wq, float[64, 32] wk, float[64, 32] wv)
=> (float[B, S, 64] out)
<int64[4] heads = {0, 0, 4, 16}, int64[4] kv_heads = {0, 0, 2, 16}, int64[5] expanded = {1, 1, 2, 1, 1},
 int64[4] merged = {0, 4, -1, 16}, int64[3] flat = {0, 0, 64}, int64[1] two = {2}, int64 zero = {0}, int64 one = {1},
 int64[1] minus_two = {-2}, float scale = {0.25}, float blocked = {-inf}, float nothing = {0}>
{
   q0 = MatMul(hidden, wq)
   q1 = Reshape(q0, heads)
   q = Transpose<perm = [0, 2, 1, 3]>(q1)
   k0 = MatMul(hidden, wk)
   k1 = Reshape(k0, kv_heads)
   k2 = Transpose<perm = [0, 2, 1, 3]>(k1)
   k3 = Unsqueeze(k2, two)
   k4 = Tile(k3, expanded)
   k = Reshape(k4, merged)
   v0 = MatMul(hidden, wv)
   v1 = Reshape(v0, kv_heads)
   v2 = Transpose<perm = [0, 2, 1, 3]>(v1)
   v3 = Unsqueeze(v2, two)
   v4 = Tile(v3, expanded)
   v = Reshape(v4, merged)
   shape = Shape(hidden)
   length = Gather<axis = 0>(shape, one)
   positions = Range(zero, length, one)
   rows = Unsqueeze(positions, one)
   causal = LessOrEqual(positions, rows)
   visible = And(causal, padding)
   bias = Where(visible, nothing, blocked)
   kt = Transpose<perm = [0, 1, 3, 2]>(k)
   dots = MatMul(q, kt)
   scaled = Mul(dots, scale)
   scores = Add(scaled, bias)
   weights = Softmax<axis = -1>(scores)
   mixed = MatMul(weights, v)
   back = Transpose<perm = [0, 2, 1, 3]>(mixed)
   out = Reshape(back, flat)
}
"""


def created(model: pathlib.Path, version: str) -> list[dict]:
    """One row for each node of the model, from a real registry of TensorRT."""
    package = f"tensorrt-{version}"
    command = [sys.executable, os.fspath(WALK), MODULES[version], os.fspath(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=packages.python_with(package))
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_rows(rows: list[dict], num_nodes: int) -> None:
    assert len(rows) == num_nodes
    for row in rows:
        assert row["created"], row
        assert row["plugin_outputs"] == row["node_outputs"], row
        assert not row["has_empty_input"], row
        assert row["not_passed"] == [], row


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The demo's model, rewritten."""
    path = tmp_path_factory.mktemp("demo") / "demo.fa.onnx"
    fused, report = pipeline.run(model_io.load(packages.demo_model()), pipeline.Options(target="tensorrt"))
    assert report.num_fused == 12
    model_io.save(fused, path)
    return path


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("decoder") / "decoder.fa.onnx"
    fused, report = pipeline.run(model_io.load(onnx.parser.parse_model(GQA_DECODER)))
    assert report.num_fused == 1, report.sites
    model_io.save(fused, path)
    return path


@pytest.mark.parametrize("version", MODULES)
def test_every_node_of_the_demo_model_is_created(plugin, demo, version):
    check_rows(created(demo, version), 12)


@pytest.mark.parametrize("version", MODULES)
def test_a_grouped_query_decoder_is_created(plugin, decoder, version):
    rows = created(decoder, version)
    check_rows(rows, 1)
    assert "kv_num_heads=2" in rows[0]["id"], "the fields reach the plugin"


def test_the_decoder_runs_in_onnxruntime_too(decoder):
    ort = pytest.importorskip("onnxruntime")
    faplugin = pytest.importorskip("faplugin")
    random = np.random.default_rng(0)
    batch, length = 2, 9
    inputs = {name: random.standard_normal(shape).astype(np.float32) for name, shape in
              {"hidden": (batch, length, 64), "wq": (64, 64), "wk": (64, 32), "wv": (64, 32)}.items()}  # fmt: skip
    inputs["padding"] = np.arange(length)[None, None, None] < np.array([length, 5]).reshape(2, 1, 1, 1)
    options = ort.SessionOptions()
    faplugin.register(options)
    provider = ["CPUExecutionProvider"]
    original = ort.InferenceSession(onnx.parser.parse_model(GQA_DECODER).SerializeToString(), providers=provider)
    rewritten = ort.InferenceSession(os.fspath(decoder), options, providers=provider)
    want, got = (session.run(None, inputs)[0] for session in (original, rewritten))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_node_that_the_operator_refuses_is_refused(plugin, demo, tmp_path):
    model = onnx.load(demo)
    node = next(node for node in model.graph.node if node.op_type == "FlashAttention")
    node.attribute.append(onnx.helper.make_attribute("empty_row", "median"))
    path = tmp_path / "broken.onnx"
    onnx.save(model, path)
    rows = created(path, "11.4")
    assert [row["created"] for row in rows] == [False] + [True] * 11
