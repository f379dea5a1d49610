# SPDX-License-Identifier: Apache-2.0
"""Several models in one call: each is rewritten or told of, one that can't be does not stop the others, the exit code
is that of the worst."""

from __future__ import annotations

import errno
import json
import pathlib
import signal
import time
from typing import NoReturn

import onnx
import pytest
from faexport.runtimes import ort_session

from tests.export import big_model
from tests.export.commands import assert_bad_input, here, started

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
    assert data.keys() == {"models", "exit_code"}
    assert [pathlib.Path(one["model"]).name for one in data["models"]] == ["a.onnx", "b.onnx", "plain.onnx"]
    assert [one["num_fused"] for one in data["models"]] == [1, 2, 0]
    assert sorted(path.name for path in folder.glob("*.fa.onnx")) == ["a.fa.onnx", "b.fa.onnx", "old.fa.onnx"]
    assert all(one["verification"]["status"] == "passed" for one in data["models"][:2])


def test_a_folder_that_is_named_like_a_model_is_none(folder: pathlib.Path) -> None:
    (folder / "a.onnx").rename(folder / "kept")
    (folder / "a.onnx").mkdir()
    done = here(folder, "--json", "--no-verify")
    assert done.returncode == 0, done.stderr
    assert [pathlib.Path(one["model"]).name for one in json.loads(done.stdout)["models"]] == ["b.onnx", "plain.onnx"]
    for name in ("b.onnx", "plain.onnx", "old.fa.onnx"):
        (folder / name).unlink()
    assert_bad_input(here(folder), "without models")


def test_models_may_be_named_in_capitals(folder: pathlib.Path) -> None:
    (folder / "a.onnx").rename(folder / "A.ONNX")
    (folder / "old.fa.onnx").rename(folder / "old.FA.Onnx")
    done = here(folder, "--json", "--no-verify")
    assert done.returncode == 0, done.stderr
    written = [one["output"] for one in json.loads(done.stdout)["models"]]
    assert written == [str(folder / "A.fa.onnx"), str(folder / "b.fa.onnx"), None]


def test_a_folder_that_cannot_be_read(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: pathlib.Path) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(pathlib.Path, "iterdir", refuse)
    assert_bad_input(here(folder), "models: cannot be read: Permission denied")


def test_one_model_named_twice_goes_to_a_folder(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model, into = folder / "a.onnx", tmp_path / "into"
    assert here(model, model, "-o", into, "--no-verify").returncode == 0
    assert [path.name for path in into.iterdir()] == ["a.onnx"]


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


def test_each_finished_model_is_a_line_on_stderr(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (folder / "broken.onnx").write_bytes(b"\xff" * 64)
    done = here(folder, "-o", tmp_path / "fast", "--no-verify", "--json")
    lines = done.stderr.splitlines()
    assert lines[0] == f"1 of 4, a.onnx: wrote {tmp_path / 'fast' / 'a.onnx'}"
    assert lines[2] == "3 of 4, broken.onnx: failed" and lines[3].startswith("4 of 4, plain.onnx: no model was written")
    assert lines[4].startswith("error: ") and len(lines) == 5 and json.loads(done.stdout)["exit_code"] == 2
    full = here(folder, "-o", tmp_path / "fast", "--no-verify", "--quiet", "--report", "/dev/full")
    assert full.returncode == 2 and full.stderr.splitlines()[0] == lines[4]
    assert f"; 2 of 4 models were written ({tmp_path / 'fast' / 'a.onnx'}, " in full.stderr.splitlines()[1]
    quiet = here(folder, "-o", tmp_path / "fast", "--no-verify", "--quiet")
    assert quiet.stderr.splitlines() == lines[4:] and quiet.stdout == ""


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_call_says_what_it_wrote(
    folder: pathlib.Path, tmp_path: pathlib.Path, signal_number: int
) -> None:
    into = tmp_path / "fast"
    with started(folder, "-o", into, "--quiet", heeding=signal_number) as process:
        deadline = time.monotonic() + 60
        while not (into / "a.onnx").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal_number)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and out == b""
    assert errors.decode() == f"error: interrupted: 1 of 3 models was written ({into / 'a.onnx'})\n"
    assert [path.name for path in into.iterdir()] == ["a.onnx"]


def test_the_folder_is_made_where_something_is_written(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    both, into = (folder / "a.onnx", folder / "b.onnx"), tmp_path / "fast"
    before = sorted(tmp_path.rglob("*"))
    assert here(*both, "-o", into, "--no-verify", "--dry-run", "--quiet").returncode == 0
    assert here(folder / "plain.onnx", "-o", f"{into}/").returncode == 0
    assert_bad_input(here(*both, "-o", tmp_path / "new" / "fast"), f"{tmp_path / 'new'} does not exist; create it")
    assert_bad_input(here(*both, "-o", into, "--report", into), "is where the model will be written")
    assert_bad_input(here(folder / "a.onnx", "-o", f"{folder / 'b.onnx'}/"), "is no folder; choose another place")
    assert sorted(tmp_path.rglob("*")) == before, "nothing was written, and the folder is gone"
    assert here(*both, "-o", into, "--no-verify", "--quiet").returncode == 0
    assert sorted(path.name for path in into.iterdir()) == ["a.onnx", "b.onnx"]
    assert here(folder / "a.onnx", "-o", f"{tmp_path / 'one'}/", "--no-verify", "--quiet").returncode == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["a.onnx"]


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
    for into in (tmp_path / "fast", tmp_path / "new"):
        (tmp_path / "fast").mkdir(exist_ok=True)
        assert here(folder, "-o", into, "--no-verify", "--quiet").returncode == 0
        assert [path.name for path in into.iterdir()] == ["a.onnx"]
    assert here(folder, "-o", tmp_path / "c.onnx", "--no-verify", "--quiet").returncode == 0
    assert (tmp_path / "c.onnx").is_file()
    seen = here("inspect", folder, "--json")
    assert seen.returncode == 0 and json.loads(seen.stdout)["model"] == str(folder / "a.onnx")
    (folder / "b.onnx").write_bytes(b"")
    assert_bad_input(here("inspect", folder), "has 2 models; name one of them, such as", "a.onnx")


@pytest.mark.parametrize("command", [(), ("inspect",)], ids=["fuse", "inspect"])
def test_a_name_that_is_not_there_ends_in_json_too(command: tuple[str, ...], tmp_path: pathlib.Path) -> None:
    done = here(*command, tmp_path / "none.onnx", "--json")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert json.loads(done.stdout)["error"] in done.stderr
