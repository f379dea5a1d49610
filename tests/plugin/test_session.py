# SPDX-License-Identifier: Apache-2.0
"""faplugin.session: one call makes a session with the library and the options that were asked for."""

from __future__ import annotations

import pathlib
import warnings

import faexport
import faplugin
import numpy as np
import onnx
import onnxruntime
import pytest
from faexport.runtimes import operator_library
from faplugin._library import CUDA

from tests.export import big_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("session") / "model.onnx"
    fused, report = faexport.fuse(big_model.encoder(big_model.EncoderSize(1, 4, 16)))
    assert report.num_fused == 1
    onnx.save(fused, path)
    return path


def test_it_runs_a_fused_model(model: pathlib.Path) -> None:
    session = faplugin.session(model, providers=["CPUExecutionProvider"], num_threads=1)
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert session.get_session_options().intra_op_num_threads == 1
    tensors = {session.get_inputs()[0].name: np.ones((2, 5, 64), np.float32)}
    assert np.isfinite(session.run(None, tensors)[0]).all()


def test_by_default_the_providers_are_those_of_this_onnxruntime(model: pathlib.Path) -> None:
    assert faplugin.session(str(model)).get_providers()[-1] == "CPUExecutionProvider"


def test_own_options_are_kept(model: pathlib.Path) -> None:
    options = onnxruntime.SessionOptions()
    options.enable_profiling = False
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = faplugin.session(model, options=options, providers=[("CPUExecutionProvider", {})])
    assert session.get_session_options().graph_optimization_level == options.graph_optimization_level


def test_options_may_be_registered_again(model: pathlib.Path) -> None:
    options = onnxruntime.SessionOptions()
    faplugin.register(options)
    faplugin.register(options)
    for _ in range(2):
        assert faplugin.session(model, options=options, providers=["CPUExecutionProvider"]).get_inputs()


def test_what_cannot_be_is_said(model: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="cuda_graph needs CUDAExecutionProvider; the providers are CPUExec"):
        faplugin.session(model, providers=["CPUExecutionProvider"], cuda_graph=True)
    with pytest.raises(ValueError, match="num_threads is 0; give 1 or more"):
        faplugin.session(model, num_threads=0)
    for arguments, sentence in (
        ({"path": 3}, "path is 3; expected that of an .onnx file"),
        ({"num_threads": "2"}, "num_threads is '2'; expected a whole number"),
        (
            {"providers": "CPUExecutionProvider"},
            "providers is 'CPUExecutionProvider'; expected a list of names, or of pair",
        ),
        ({"providers": [("CPUExecutionProvider",)]}, "providers is .*; expected a list of names, or of pairs"),
        ({"options": {}}, "session_options is {}; expected onnxruntime.SessionOptions"),
    ):
        with pytest.raises(TypeError, match=f"^{sentence}"):
            faplugin.session(**{"path": model, **arguments})
    with pytest.raises(TypeError, match="^session_options is None; expected"):
        faplugin.register(None)


@pytest.mark.skipif(operator_library.has_cuda_kernels(), reason="the library has CUDA kernels")
def test_a_library_without_cuda_kernels_warns_where_onnxruntime_has_cuda(
    model: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention would run on the CPU without a word."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *given, providers: None)
    for call in (lambda: faplugin.session(model), lambda: faplugin.register(onnxruntime.SessionOptions())):
        with pytest.warns(UserWarning, match="built without CUDA kernels.*; install the wheel") as found:
            call()
        assert found[0].filename == __file__
    with warnings.catch_warnings(action="error"):
        faplugin.session(model, providers=["CPUExecutionProvider"])
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
        faplugin.register(onnxruntime.SessionOptions())
        faplugin.session(model)


def test_a_cuda_graph_is_asked_of_the_provider(model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *given, providers: asked.extend(providers))
    own = ("CUDAExecutionProvider", {"use_tf32": "0"})
    faplugin.session(model, providers=[own, "CPUExecutionProvider"], cuda_graph=True)
    assert asked == [
        ("CUDAExecutionProvider", {"use_tf32": "0", "enable_cuda_graph": "1"}),
        ("CPUExecutionProvider", {}),
    ]
    assert own[1] == {"use_tf32": "0"}
