# SPDX-License-Identifier: Apache-2.0
"""Folders of onnxruntime-genai: a copy is rewritten and complete, the folder that was given stays as it was."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

import faexport
import onnx
import pytest
from faexport.runtimes import genai, operator_library, ort_session

from tests.export import model_cache
from tests.export.commands import assert_bad_input, here
from tests.export.grouped import Form, model_of

needs_library = pytest.mark.skipif(not ort_session.has_library(), reason="the operator's library was not built")


def make(path: pathlib.Path, form: Form | None = None, **decoder: Any) -> pathlib.Path:
    """A folder with a decoder whose weights lie in a file of their own, and other files."""
    (path / "adapters").mkdir(parents=True)
    model = model_of(form or Form(rotary=True, mask=True))
    onnx.save(model, path / "decoder.onnx", save_as_external_data=True, location="decoder.weights", size_threshold=64)
    options = {"log_id": "onnxruntime-genai", "provider_options": []}
    given = {"filename": "decoder.onnx", "session_options": options, **decoder}
    (path / "genai_config.json").write_text(json.dumps({"model": {"decoder": given, "type": "llama"}, "search": {}}))
    (path / "tokenizer.json").write_text("{}")
    (path / "adapters/one.bin").write_bytes(b"one")
    return path


def content(folder: pathlib.Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@needs_library
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_copy_has_all_that_genai_needs(tmp_path: pathlib.Path, slash: str) -> None:
    given = make(tmp_path / "model")
    before = content(given)
    done = here(f"{given}{slash}", "--json")
    assert done.returncode == 0, done.stderr
    assert content(given) == before
    copy, report = tmp_path / "model.fa", json.loads(done.stdout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.fa"]
    assert report["output"] == str(copy) and report["verification"]["status"] == "passed"
    written = {record["path"] for record in report["provenance"]["files_written"]}
    assert str(copy / "decoder.onnx") in written and all(pathlib.Path(path).exists() for path in written)
    fused, original = onnx.load(copy / "decoder.onnx"), onnx.load(given / "decoder.onnx")
    assert [node.op_type for node in fused.graph.node if node.domain] == ["FlashAttention"]
    assert (fused.graph.input, fused.graph.output) == (original.graph.input, original.graph.output)
    config, old = (json.loads((folder / "genai_config.json").read_text()) for folder in (copy, given))
    assert config["model"]["decoder"]["session_options"].pop("custom_ops_library") == "libfa_ort.so"
    assert config == old
    assert (copy / "libfa_ort.so").stat().st_size > 10_000
    same = ("tokenizer.json", "adapters/one.bin")
    assert {name: content(copy)[name] for name in same} == {name: before[name] for name in same}
    assert "decoder.weights" not in content(copy), "the original's weights, which nothing reads any more"


def test_a_copy_is_called_as_its_folder_was_given(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real/model").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/model")
    monkeypatch.chdir(tmp_path / "real/model")
    for given in (".", "../model/..", "../../link"):  # whose names aren't in what is given
        resolved = pathlib.Path(given).resolve()
        assert genai.default_target(pathlib.Path(given)) == resolved.with_name(f"{resolved.name}.fa")
    assert genai.default_target(pathlib.Path("some/model/")) == pathlib.Path("some/model.fa")


@needs_library
def test_a_folder_of_links_is_copied_as_files(tmp_path: pathlib.Path) -> None:
    given = make(tmp_path / "model")
    model_cache.link(given, tmp_path / "blobs")
    done = here(given, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verification"]["status"] == "passed"
    names = ["adapters/one.bin", "decoder.onnx", "decoder.onnx.data", "genai_config.json", "libfa_ort.so"]
    assert sorted(content(tmp_path / "model.fa")) == [*names, "tokenizer.json"]
    assert not any(path.is_symlink() for path in (tmp_path / "model.fa").rglob("*"))


@needs_library
def test_the_copy_s_place_can_be_chosen(tmp_path: pathlib.Path) -> None:
    given = make(tmp_path / "model")
    assert here(given, "-o", tmp_path / "other/", "--no-verify", "-q").returncode == 0
    assert (tmp_path / "other/decoder.onnx").exists()
    assert_bad_input(here(given, "-o", tmp_path / "other"), "is there already")
    assert_bad_input(here(given, "-o", given / "inside"), "or in it")
    assert_bad_input(here(given, "-o", tmp_path / "no/where"), "does not exist")


@needs_library
def test_from_python(tmp_path: pathlib.Path) -> None:
    report = faexport.optimize(make(tmp_path / "model"), verify=False)
    assert report.output == str(tmp_path / "model.fa") and (tmp_path / "model.fa/decoder.onnx").exists()
    assert not any("CPUs only" in note for note in report.notes)
    with pytest.raises(faexport.ModelError, match="is there already"):
        faexport.optimize(tmp_path / "model")


@needs_library
def test_a_folder_for_cuda_needs_a_library_with_its_kernels(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"provider_options": [{"cuda": {"enable_cuda_graph": "0"}}]}
    given = make(tmp_path / "model", session_options=options)
    monkeypatch.setattr(operator_library, "has_cuda_kernels", lambda: False)
    assert_bad_input(here(given, "--no-verify"), "runs on CUDA", "built without CUDA kernels")
    assert here("inspect", given, "-q").returncode == 0
    monkeypatch.setattr(operator_library, "has_cuda_kernels", lambda: True)
    assert here(given, "--no-verify", "-q").returncode == 0
    config = json.loads((tmp_path / "model.fa/genai_config.json").read_text())
    expected = {**options, "custom_ops_library": "libfa_ort.so"}
    assert config["model"]["decoder"]["session_options"] == expected


@needs_library
def test_nothing_is_written_where_nothing_is_to_be(tmp_path: pathlib.Path) -> None:
    given = make(tmp_path / "model")
    assert here(given, "--dry-run", "-q").returncode == 0
    assert here("inspect", given, "--strict", "-q").returncode == 0
    refused = make(tmp_path / "refused", Form(mask=True, attributes=(("causal", 0),)))
    assert here(refused, "--strict", "-q").returncode == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "refused"]


@needs_library
def test_a_decoder_that_cannot_be_verified_leaves_no_copy(tmp_path: pathlib.Path) -> None:
    """onnxruntime's CPU kernel has no norm, so there is nothing to compare with."""
    given = make(tmp_path / "model", Form(mask=True, packed=False, norm=True))
    done = here(given)
    assert done.returncode == 1 and "model.fa was not written" in done.stderr.replace("/decoder.onnx", "")
    assert ".faexport" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("decoder", "what"),
    [
        ({"session_options": {"provider_options": [{"cuda": {}}, {"qnn": {}}]}}, "runs on qnn, for which"),
        ({"session_options": {"custom_ops_library": "other.so"}}, "other.so"),
        ({"session_options": {"custom_ops_library": "libfa_ort.so"}}, "is rewritten already"),
        ({"filename": "missing.onnx"}, "missing.onnx: no such file"),
        ({"filename": "../model/decoder.onnx"}, "outside of the folder, ../model/decoder.onnx; move"),
        ({"filename": "/etc/hosts"}, "outside of the folder, /etc/hosts; move"),
        ({"pipeline": [{}]}, "no single file"),
        ({"filename": None}, "no single file"),
        ({"session_options": []}, "can't be read as a configuration"),
    ],
)
def test_what_cannot_be_rewritten_is_said(tmp_path: pathlib.Path, decoder: dict[str, Any], what: str) -> None:
    assert_bad_input(here(make(tmp_path / "model", **decoder)), what)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_folders_are_told_apart(tmp_path: pathlib.Path) -> None:
    assert_bad_input(here(tmp_path), "without genai_config.json")
    (tmp_path / "genai_config.json").write_text("{")
    assert_bad_input(here(tmp_path), "can't be read")
