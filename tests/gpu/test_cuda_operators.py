# SPDX-License-Identifier: Apache-2.0
"""onnxruntime's operators that have CUDA kernels only compute there what faexport writes them for."""

from __future__ import annotations

import pathlib

import faexport
import onnx
import pytest

from tests.export.test_cuda_operators import ALL, SILU, TURNED, model, written

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("active", [False, True])
def test_a_block_is_verified_on_cuda(tmp_path: pathlib.Path, fp16: bool, active: bool) -> None:
    """By the kernels themselves, each by itself too, where on a CPU their formulas run."""
    path = tmp_path / "block.onnx"
    onnx.save(model((TURNED, SILU)) if active else model(), path)
    options = faexport.Options(target="cuda", fp16=fp16)
    report = faexport.optimize(path, tmp_path / "made.onnx", options, verify_on="cuda")
    assert report.verification.status == "passed", report.verification.reason
    assert written(onnx.load(report.output)) == ALL, report.notes
    assert not any("formulas" in note for note in report.verification.notes)
