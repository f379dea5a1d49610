# SPDX-License-Identifier: Apache-2.0
"""Several models in one call: each is rewritten or told of, one that can't be does not stop the others, the exit code
is that of the worst."""

from __future__ import annotations

import json
import pathlib

import onnx
import pytest
from faexport import ort_session

from tests.export import big_model
from tests.export.commands import assert_bad_input, here

pytestmark = pytest.mark.skipif(not ort_session.has_library(), reason="the operator's library was not built")


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Two models with attention, one without, one that faexport wrote before, and what is no model."""
    place = tmp_path / "models"
    place.mkdir()
    for name, layers in (("b", 2), ("a", 1)):
        onnx.save(big_model.encoder(big_model.EncoderSize(layers, 2, 8)), place / f"{name}.onnx")
    plain = "g (float[N] x) => (float[N] y) { y = Relu (x) }"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {plain}'), place / "plain.onnx")
    (place / "old.fa.onnx").write_bytes(b"not read")
    (place / "config.json").write_text("{}")
    return place


def test_a_folder_is_all_of_its_models(folder: pathlib.Path) -> None:
    done = here(folder, "--json")
    data = json.loads(done.stdout)
    assert done.returncode == data["exit_code"] == 0
    assert [pathlib.Path(one["model"]).name for one in data["models"]] == ["a.onnx", "b.onnx", "plain.onnx"]
    assert [one["num_fused"] for one in data["models"]] == [1, 2, 0]
    assert sorted(path.name for path in folder.glob("*.fa.onnx")) == ["a.fa.onnx", "b.fa.onnx", "old.fa.onnx"]
    assert all(one["verification"]["status"] == "passed" for one in data["models"][:2])


def test_the_summary_names_each_and_the_worst_decides(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")  # names of temporary folders are long
    (folder / "broken.onnx").write_bytes(b"\xff" * 64)
    into = tmp_path / "fast"
    into.mkdir()
    report = tmp_path / "report.json"
    done = here(folder, "-o", into, "--no-verify", "--report", report)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "broken.onnx" in done.stderr
    assert sorted(path.name for path in into.iterdir()) == ["a.onnx", "b.onnx"]
    for said in ("1 of 1", "2 of 2", "0 of 0", "no model was written", "broken.onnx"):
        assert said in done.stdout
    data = json.loads(report.read_text())
    assert data["exit_code"] == 2 and data["models"][2]["error"].startswith(str(folder / "broken.onnx"))
    assert here(folder / "a.onnx", folder / "plain.onnx", "-o", into, "--no-verify", "--strict").returncode == 4


def test_wrong_usage_is_told_before_anything_is_done(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    both = (folder / "a.onnx", folder / "b.onnx")
    assert_bad_input(here(*both, "-o", tmp_path / "c.onnx"), "-o names the folder for all")
    assert_bad_input(here(*both, "--html", tmp_path / "c.html"), "--html is for one model, and 2 are given")
    assert_bad_input(here(*both, "--report", folder / "b.onnx"), "would overwrite the input")
    assert_bad_input(here(folder / "a.onnx", folder / "c.onnx"), "c.onnx: no such file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.onnx").write_bytes((folder / "a.onnx").read_bytes())
    clash = here(folder / "a.onnx", tmp_path / "other" / "a.onnx", "-o", tmp_path)
    assert_bad_input(clash, "would be written there; rewrite them one by one")
    (tmp_path / "empty").mkdir()
    assert_bad_input(here(tmp_path / "empty"), "without genai_config.json and without models (*.onnx)")
    assert not (folder / "a.fa.onnx").exists() and not (tmp_path / "a.onnx").exists()


def test_a_folder_of_one_model_is_that_model(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for name in ("b.onnx", "plain.onnx"):
        (folder / name).unlink()
    into = tmp_path / "fast"
    into.mkdir()
    assert here(folder, "-o", into, "--no-verify", "--quiet").returncode == 0
    assert [path.name for path in into.iterdir()] == ["a.onnx"]
    seen = here("inspect", folder, "--json")
    assert seen.returncode == 0 and json.loads(seen.stdout)["model"] == str(folder / "a.onnx")
    (folder / "b.onnx").write_bytes(b"")
    assert_bad_input(here("inspect", folder), "has 2 models; name one of them, such as", "a.onnx")


@pytest.mark.parametrize("command", [(), ("inspect",)], ids=["fuse", "inspect"])
def test_a_name_that_is_not_there_ends_in_json_too(command: tuple[str, ...], tmp_path: pathlib.Path) -> None:
    done = here(*command, tmp_path / "none.onnx", "--json")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert json.loads(done.stdout)["error"] in done.stderr
