# SPDX-License-Identifier: Apache-2.0
"""Models that call faplugin.torch, exported by both of PyTorch's exporters, in onnxruntime; skipped without it."""

from __future__ import annotations

import json
import pathlib
import warnings

import faplugin
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
from faplugin import torch as fatorch  # noqa: E402

from tests.export.commands import faexport  # noqa: E402


class Block(torch.nn.Module):
    """Self-attention with grouped heads. kind: one of KINDS."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.project = torch.nn.Linear(32, (4 + 2 + 2) * 8)
        self.out = torch.nn.Linear(32, 32)

    def forward(self, x, extra):
        batch, rows, _ = x.shape
        heads = self.project(x).view(batch, rows, 8, 8)
        q, k, v = heads.split((4, 2, 2), 2)
        if self.kind == "causal":
            y = fatorch.flash_attn_func(q, k, v, causal=True)
        elif self.kind == "window":
            y = fatorch.flash_attn_func(q, k, v, window_size=(3, 2), softcap=5.0)
        elif self.kind == "padding":
            y = fatorch.attend(q, k, v, mask=extra[:, None, None, :] != 0)
        elif self.kind == "bias":
            y = fatorch.attend(q, k, v, bias=extra[:, None, None, :].float(), causal=True)
        elif self.kind == "cache":
            y = fatorch.flash_attn_with_kvcache(q, k, v, cache_seqlens=extra.sum(1, dtype=torch.int32), causal=True)
        else:
            y = fatorch.flash_attn_varlen_func(q[0], k[0], v[0], extra[0], extra[0], rows, rows, causal=True)[None]
        return self.out(y.reshape(batch, rows, 32))


KINDS = ("causal", "window", "padding", "bias", "cache", "varlen")


def inputs_of(kind: str, batch: int, rows: int) -> tuple:
    x = torch.randn(batch, rows, 32)
    if kind == "varlen":
        return x[:1], torch.tensor([[0, rows // 3, rows]], dtype=torch.int32)
    extra = torch.ones(batch, rows, dtype=torch.int32)
    extra[-1, rows // 2 :] = 0
    return x, extra


def export(kind: str, dynamo: bool, path: pathlib.Path) -> torch.nn.Module:
    torch.manual_seed(0)
    model, inputs = Block(kind).eval(), inputs_of(kind, 2, 10)
    sizes = {1: "rows"} if kind == "varlen" else {0: "batch", 1: "rows"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            dims = {axis: torch.export.Dim(name, min=2, max=4096) for axis, name in sizes.items()}
            shapes = {"x": dims, "extra": None if kind == "varlen" else dims}
            torch.onnx.export(model, inputs, path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        else:
            axes = {"x": sizes} | ({} if kind == "varlen" else {"extra": sizes})
            names = ["x", "extra"]
            torch.onnx.export(model, inputs, path, dynamo=False, input_names=names, dynamic_axes=axes, opset_version=17)
    return model


def test_a_trace_warns_of_nothing_in_our_code(tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = Block("causal").eval()
        torch.onnx.export(model, inputs_of("causal", 2, 10), tmp_path / "m.onnx", dynamo=False, opset_version=17)
    ours = str(pathlib.Path(fatorch.__file__).parent)
    traced = [one for one in said if issubclass(one.category, torch.jit.TracerWarning)]
    assert not [str(one.message) for one in traced if one.filename.startswith(ours)]
    assert not [str(one.message) for one in traced if "Python float" in str(one.message)]  # the scale was a tensor


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("kind", KINDS)
def test_export_has_the_node_and_runs(kind, dynamo, tmp_path):
    path = tmp_path / "model.onnx"
    model = export(kind, dynamo, path)
    nodes = [(node.domain, node.op_type) for node in onnx.load(path).graph.node]
    assert nodes.count(("faexport", "FlashAttention")) == 1
    assert "Softmax" not in {op for _, op in nodes}, "nothing else computes attention"
    session = faplugin.session(path)
    for batch, rows in ((2, 10), (3, 17)):
        inputs = inputs_of(kind, batch, rows)
        given = {name: tensor.numpy() for name, tensor in zip(("x", "extra"), inputs, strict=True)}
        (output,) = session.run(None, {value.name: given[value.name] for value in session.get_inputs()})
        torch.testing.assert_close(torch.from_numpy(output), model(*inputs).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_inspect_finds_nothing_left_to_do(dynamo, tmp_path):
    path = tmp_path / "model.onnx"
    export("causal", dynamo, path)
    done = faexport("inspect", path, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["num_fused"], report["num_refused"], report["sites"]) == (0, 0, [])
    assert report["nodes_after"]["faexport::FlashAttention"] == 1


def test_the_log_sum_exp_is_refused_in_an_export(tmp_path):
    class Model(torch.nn.Module):
        def forward(self, x):
            return fatorch.flash_attn_func(x, x, x, return_attn_probs=True)[1]

    with pytest.raises(Exception, match="log-sum-exp is wanted during an ONNX export"):
        torch.onnx.export(Model(), (torch.zeros(1, 2, 2, 4),), tmp_path / "m.onnx", dynamo=False, opset_version=17)
