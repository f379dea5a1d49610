# SPDX-License-Identifier: Apache-2.0
"""faexport as a library: one call from a file to a file, and what the report says of where the result comes from."""

from __future__ import annotations

import hashlib
import pathlib
import re
import signal
import subprocess
import sys

import faexport
import numpy as np
import onnx
import pytest
from faexport import diagnosis
from faexport.commands import bench_child
from faexport.errors import ModelError
from faexport.runtimes import child_process

from tests.export import big_model
from tests.export.commands import environment

PAGE = pathlib.Path(__file__).parents[2] / "docs/faexport.md"
SIZE = big_model.EncoderSize(2, 4, 16)


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    onnx.save(big_model.encoder(SIZE), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def sha256(path: str | pathlib.Path) -> str:
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def test_one_call_fuses_verifies_and_writes(model: pathlib.Path) -> None:
    report = faexport.optimize(model)
    assert report.output == str(model.with_name("model.fa.onnx")) and report.num_fused == SIZE.layers
    assert report.verification.status == "passed" and report.error is None
    origin = report.provenance
    assert set(origin.seconds) == {"read", "fuse", "write", "verify"} and min(origin.seconds.values()) >= 0
    for records, path in ((origin.files_read, model), (origin.files_written, report.output)):
        (record,) = records
        assert (record.path, record.sha256) == (str(path), sha256(path))
        assert record.bytes == pathlib.Path(path).stat().st_size
    assert origin.versions["onnx"] == onnx.__version__ and origin.options["fallback"] is True


def test_the_model_says_what_rewrote_it(model: pathlib.Path) -> None:
    options = faexport.Options(fallback=False, float32="tf32")
    report = faexport.optimize(model, model.with_name("out.onnx"), options, verify=False)
    assert report.verification is None
    metadata = {entry.key: entry.value for entry in onnx.load(report.output).metadata_props}
    assert re.fullmatch(
        r"faexport \S+ fused 2 of 2 attention sites with fallback=False, float32=tf32", metadata["faexport"]
    )


def test_weights_in_files_of_their_own_are_listed(model: pathlib.Path) -> None:
    onnx.save(onnx.load(model), model, save_as_external_data=True, location="model.data", size_threshold=1024)
    report = faexport.optimize(model, verify=False)
    for records in (report.provenance.files_read, report.provenance.files_written):
        graph, weights = records
        assert weights.path.endswith(".data") and weights.bytes > graph.bytes
        assert weights.sha256 == sha256(weights.path)


def test_a_dry_run_and_bad_input(model: pathlib.Path) -> None:
    report = faexport.optimize(model, dry_run=True)
    assert report.output is None and report.num_fused == 2 and report.provenance.files_written == []
    with pytest.raises(faexport.ModelError, match="no such file"):
        faexport.optimize(model.with_name("nowhere.onnx"))
    np.savez(model.with_name("in.npz"), other=np.ones(3))
    with pytest.raises(faexport.ModelError, match="no array 'hidden_states'"):
        faexport.optimize(model, inputs=model.with_name("in.npz"))
    assert sorted(path.name for path in model.parent.iterdir()) == ["in.npz", "model.onnx"]


def test_what_could_not_be_compared_is_an_exception_with_the_report(model: pathlib.Path) -> None:
    with pytest.raises(faexport.NotVerifiedError, match="took longer") as caught:
        faexport.optimize(model, timeout=0.001)
    assert caught.value.report.verification.status == "not run" and caught.value.report.error == str(caught.value)
    assert not model.with_name("model.fa.onnx").exists()


def test_modules_in_the_working_directory_are_not_imported(model: pathlib.Path, monkeypatch) -> None:
    """It may be the folder of a model that somebody else made."""
    model.with_name("onnxruntime.py").write_text("print('imported')")
    monkeypatch.chdir(model.parent)
    assert faexport.optimize(model).verification.status == "passed"
    assert diagnosis.fault_of(model) == ""


@pytest.mark.parametrize(
    ("number", "fault", "sentence"),
    [
        (signal.SIGKILL, "", "onnxruntime's process was killed, as the system does when memory runs out"),
        (
            signal.SIGSEGV,
            "the checkers of onnx and onnxruntime crash on it (signal 11)",
            "onnxruntime crashed (signal 11)",
        ),
    ],
)
def test_a_process_that_the_system_ends_says_nothing_of_the_model(
    number: int, fault: str, sentence: str, model: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killing = [sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(number)})"]
    monkeypatch.setattr(child_process, "command", lambda module, *arguments: killing)
    assert diagnosis.fault_of(model) == fault
    with pytest.raises(ModelError, match=re.escape(sentence)):
        bench_child.measure(bench_child.Question("times", (), {}), timeout=60)


def test_documented_modules_are_found_without_an_import_of_their_own() -> None:
    code = "import faexport; print(faexport.schema.register.__name__, faexport.model_io.save.__name__)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["register", "save"]


def test_behind_pytorch_s_exporter_as_documented(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    (code,) = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)

    class Block(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    shapes = {"x": {2: torch.export.Dim("length", min=2, max=64)}}
    names = {"model": Block().eval(), "inputs": (torch.randn(1, 2, 8, 16),), "shapes": shapes}
    exec(code, {"torch": torch, "faexport": faexport, **names})
    assert (tmp_path / "model.fa.onnx").exists()
