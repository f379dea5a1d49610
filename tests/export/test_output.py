# SPDX-License-Identifier: Apache-2.0
"""Where results go: special files are never replaced, inputs never overwritten, and a run that is killed leaves the old
pair of files or the new one, and no folder that stays."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import threading
import time
import types

import numpy as np
import onnx
import pytest
from faexport.errors import ModelError
from faexport.files import model_io, output, scratch
from faexport.files.signals import uninterrupted

from tests.export import commands
from tests.export.bad_models import small
from tests.export.commands import assert_bad_input, here

UNVERIFIED = ("--no-verify", "--quiet")


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "model.onnx"
    onnx.save(small(), path)
    return path


def external(path: pathlib.Path, seed: int, location: str = "weights.bin") -> onnx.ModelProto:
    """Writes a model with all its weights in a file beside it."""
    proto = small()
    random = np.random.default_rng(seed)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = random.standard_normal(tuple(tensor.dims)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, path, save_as_external_data=True, location=location, size_threshold=0)
    return onnx.load(path)


def names(folder: pathlib.Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def weights(proto: onnx.ModelProto) -> dict[str, bytes]:
    return {t.name: onnx.numpy_helper.to_array(t).tobytes() for t in proto.graph.initializer}


# ----------------------------------------------------------------------------------------------------- special files


def test_a_link_is_followed(model: pathlib.Path) -> None:
    (model.parent / "real").mkdir()
    for name in ("old.onnx", "not_there_yet.onnx"):
        link, real = model.with_name(f"link to {name}"), model.parent / "real" / name
        if name == "old.onnx":
            real.write_bytes(b"old")
        link.symlink_to(real)
        assert here(model, "-o", link, *UNVERIFIED).returncode == 0
        assert link.is_symlink() and onnx.load(real).graph.node
    assert names(model.parent / "real") == ["not_there_yet.onnx", "old.onnx"]


def test_a_folder_gets_a_file_of_the_model_s_name(model: pathlib.Path) -> None:
    place = model.with_name("out.onnx")
    place.mkdir()
    assert here(model, "-o", place, *UNVERIFIED).returncode == 0
    assert names(place) == [model.name]


@pytest.mark.parametrize("kind", ["device", "pipe", "link to a device", "link to itself", "socket"])
def test_what_is_no_file_is_refused(model: pathlib.Path, kind: str) -> None:
    import socket

    target = model.with_name("out.onnx")
    if kind == "device":
        target = pathlib.Path("/dev/null")
    elif kind == "pipe":
        os.mkfifo(target)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.fspath(target))
    else:
        target.symlink_to("/dev/null" if kind == "link to a device" else target.name)
    before = os.lstat(target)
    assert_bad_input(here(model, "-o", target), "-o")
    after = os.lstat(target)
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_bad_places_are_told_before_any_work(model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_io.onnx, "load", lambda *args, **kwargs: pytest.fail("the model was read"))
    for place in (model.parent, model.parent / "no" / "r.json", model.parent / ("r" * 300), model, model / "r.json"):
        assert_bad_input(here(model, "--report", place), "--report")
        assert_bad_input(here("inspect", model, "--report", place), "--report")


def test_a_folder_that_takes_no_files(model: pathlib.Path) -> None:
    """Whoever runs this: nobody may write in /proc."""
    assert_bad_input(here(model, "-o", "/proc/model.onnx", "--no-verify"), "/proc/model.onnx", "cannot be written")
    assert_bad_input(here(model, "--report", "/proc/r.json", "--no-verify"), "/proc/r.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(model: pathlib.Path) -> None:
    closed = model.parent / "closed"
    closed.mkdir(mode=0o500)
    assert_bad_input(here(model, "-o", closed / "out.onnx"), "no permission")


def test_a_file_system_that_is_read_only_is_called_so(model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A root who reads "no permission" looks in the wrong place."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ModelError, match=r"cannot be written: no permission; choose"):
        output.check_output(model, [])
    monkeypatch.setattr(os, "statvfs", lambda _: types.SimpleNamespace(f_flag=os.ST_RDONLY))
    with pytest.raises(ModelError, match=r"cannot be written: the file system is read-only; choose"):
        output.check_output(model, [])


def test_an_error_names_the_place_as_it_was_given(model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model_io, "_write_inline", full)
    monkeypatch.chdir(model.parent)
    with pytest.raises(ModelError, match=r"^out\.onnx: cannot be written: No space left on device; free some space"):
        model_io.save(model_io.load(model), "out.onnx")


def test_the_input_is_known_by_any_name(model: pathlib.Path) -> None:
    hard, soft = model.with_name("hard.onnx"), model.with_name("soft.onnx")
    os.link(model, hard)
    soft.symlink_to(model)
    before = model.read_bytes()
    for name in (hard, soft, model.parent / "." / "model.onnx"):
        assert_bad_input(here(model, "-o", name), "overwrite the input")
        assert_bad_input(here(model, "--report", name), "--report")
        assert_bad_input(here(name, "-o", model), "overwrite the input")
    assert model.read_bytes() == before


@pytest.mark.parametrize("name", ["out.onnx.data", "out.onnx.7.data"])
def test_weights_of_the_input_are_no_output(tmp_path: pathlib.Path, name: str) -> None:
    """Neither as the model, nor as the file of its weights, nor as one that would be removed, nor as the report."""
    path = tmp_path / "model.onnx"
    external(path, 0, name)
    before = (tmp_path / name).read_bytes()
    assert_bad_input(here(path, "-o", tmp_path / "out.onnx"), "overwrite the input")
    assert_bad_input(here(path, "-o", tmp_path / name), "overwrite the input")
    assert_bad_input(here(path, "--report", tmp_path / name), "--report")
    assert (tmp_path / name).read_bytes() == before


def test_a_report_goes_through_a_pipe(model: pathlib.Path) -> None:
    pipe = model.with_name("pipe")
    os.mkfifo(pipe)
    assert_bad_input(here("inspect", model, "--quiet", "--report", pipe), "nobody reads")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    time.sleep(0.2)
    assert here("inspect", model, "--quiet", "--report", pipe).returncode == 0
    reader.join(10)
    assert json.loads(read[0])["num_fused"] == 1
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert here("inspect", model, "--quiet", "--report", "/dev/null").returncode == 0


def test_a_report_replaces_reports_only(model: pathlib.Path) -> None:
    report, notes = model.with_name("r.json"), model.with_name("notes.txt")
    notes.write_text("my notes")
    assert_bad_input(here("inspect", model, "--report", notes), "is not a report")
    assert notes.read_text() == "my notes"
    for _ in range(2):
        assert here("inspect", model, "--quiet", "--report", report).returncode == 0
    assert names(model.parent) == ["model.onnx", "notes.txt", "r.json"]


def test_one_report_does_not_replace_the_other(model: pathlib.Path) -> None:
    file = model.with_name("report")
    assert_bad_input(here(model, "--report", file, "--html", file), "is where --report is written", "--html")
    assert_bad_input(here(model, "-o", "-"), "no name of a file", "-o")


def test_json_on_failure_too(model: pathlib.Path) -> None:
    model.write_text("hello")
    for command in ([], ["inspect"]):
        done = here(*command, model, "--json")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        data = json.loads(done.stdout)
        assert f"error: {data['error']}" == done.stderr.strip() and data["output"] is None and data["sites"] == []


def test_a_full_disk(model: pathlib.Path) -> None:
    done = commands.on_a_full_disk(model, *UNVERIFIED)
    assert_bad_input(done, "cannot be written", "File too large")
    assert names(model.parent) == ["model.onnx"]


def test_what_can_t_be_printed_is_told(model: pathlib.Path) -> None:
    """A full disk behind stdout, and a reader that goes away: the model is there all the same, and that is said."""
    command = [sys.executable, "-m", "faexport", os.fspath(model), "--no-verify"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=commands.environment(), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "No space left" in done.stderr and "model.fa.onnx was written" in done.stderr
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, env=commands.environment(), stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    assert onnx.load(model.with_name("model.fa.onnx"))


def test_names_of_any_alphabet(model: pathlib.Path) -> None:
    """Also where the terminal's encoding lacks them, and where they are no text at all."""
    for name in ("模型 é.onnx", os.fsdecode(b"\xff.onnx")):
        path = model.rename(model.with_name(name))
        done = commands.faexport("inspect", path, PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
        assert done.returncode == 0, done.stderr
        done = here(path, "--no-verify")
        assert done.returncode == 0, done.stderr
        model = path


def test_a_name_that_onnxruntime_does_not_open_is_said(model: pathlib.Path) -> None:
    """The models then can't be compared, and the sentence is not that of onnxruntime's binding to Python."""
    odd = os.fsdecode(b"\xff.onnx")
    done = here(model, "-o", model.with_name(odd))
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "the rewritten model can't be run: its path is not UTF-8" in done.stderr
    done = here(model.rename(model.with_name(odd)))
    assert done.returncode == 1 and "the original can't be run: its path is not UTF-8" in done.stderr, done.stderr


# ---------------------------------------------------------------------------------------------------------- the commit


def save(path: pathlib.Path, target: pathlib.Path) -> None:
    model_io.save(model_io.load(path), target, source=path)


def test_a_second_pair_has_another_file_of_weights(tmp_path: pathlib.Path) -> None:
    sources = [tmp_path / "in" / f"{k}.onnx" for k in range(4)]
    sources[0].parent.mkdir()
    wanted = [weights(external(path, k, f"{k}.bin")) for k, path in enumerate(sources)]
    out = tmp_path / "out"
    out.mkdir()
    expected = ["m.onnx.data", "m.onnx.1.data", "m.onnx.data", "m.onnx.1.data"]
    for path, want, data in zip(sources, wanted, expected, strict=True):
        save(path, out / "m.onnx")
        assert names(out) == sorted(["m.onnx", data])
        assert weights(onnx.load(out / "m.onnx")) == want
    onnx.save(small(), tmp_path / "inline.onnx")
    save(tmp_path / "inline.onnx", out / "m.onnx")
    assert names(out) == ["m.onnx"]


def test_other_files_stay(tmp_path: pathlib.Path) -> None:
    external(tmp_path / "a.onnx", 0)
    others = ["m.onnx.x.data", "m.onnx.01.data", "xm.onnx.data", "m.onnx.data.bak", "mxonnx.data"]
    for name in others:
        (tmp_path / name).write_text("mine")
    save(tmp_path / "a.onnx", tmp_path / "m.onnx")
    assert all((tmp_path / name).read_text() == "mine" for name in others)


@pytest.mark.parametrize(("prefix", "other"), [("", "other.onnx"), ("./", "other.onnx"), ("", "OTHER.ONNX")])
def test_weights_of_another_model_stay(prefix: str, other: str, tmp_path: pathlib.Path) -> None:
    """Also where their file has the name that ours would have, and in later runs."""
    want = weights(external(tmp_path / other, 0, f"{prefix}m.onnx.data"))
    external(tmp_path / "a.onnx", 1, "xm.onnx.data")  # ends like the other's
    for data in ("m.onnx.1.data", "m.onnx.2.data"):
        save(tmp_path / "a.onnx", tmp_path / "m.onnx")
        assert names(tmp_path) == sorted(["a.onnx", "xm.onnx.data", other, "m.onnx.data", "m.onnx", data]), (
            "the older file of ours goes, the other model's stays"
        )
        assert weights(onnx.load(tmp_path / other)) == want


STEPS = ("rename", "replace", "unlink")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_leaves_the_old_pair_or_the_new_one(
    tmp_path: pathlib.Path, step: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends at once, before or after each step of the commit; the next run leaves no trace of it."""
    old, new = tmp_path / "old.onnx", tmp_path / "new.onnx"
    pairs = [weights(external(path, k, f"{k}.bin")) for k, path in enumerate((old, new))]
    out = tmp_path / "out"
    out.mkdir()
    save(old, out / "m.onnx")
    child = os.fork()
    if child == 0:
        try:
            real, place = (getattr(os, step), os) if step != "unlink" else (pathlib.Path.unlink, pathlib.Path)

            def die(*args: object, **kwargs: object) -> None:
                if pathlib.Path(args[-1]).parent == out:
                    if after:
                        real(*args, **kwargs)
                    os._exit(42)
                real(*args, **kwargs)

            setattr(place, step, die)
            save(new, out / "m.onnx")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    found = weights(onnx.load(out / "m.onnx"))
    assert found == (pairs[1] if step == "unlink" or (step == "replace" and after) else pairs[0])
    save(new, out / "m.onnx")
    assert weights(onnx.load(out / "m.onnx")) == pairs[1]
    assert len(names(out)) == 2, names(out)


def test_a_failed_move_takes_the_weights_back(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    external(tmp_path / "a.onnx", 0)
    before = names(tmp_path)

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ModelError, match="Permission denied"):
        save(tmp_path / "a.onnx", tmp_path / "m.onnx")
    assert names(tmp_path) == before


def test_a_signal_takes_effect_behind_the_steps_that_belong_together() -> None:
    before, done = signal.signal(signal.SIGINT, signal.default_int_handler), []  # a shell's background jobs ignore it
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            with uninterrupted():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
                done.append("first")
            done.append("second")
    assert done == ["first", "second"]
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


SIGNALLED = """
import os, signal, sys
from faexport import cli
from faexport.commands.telling import Telling
from faexport.files import model_io
when = sys.argv.pop(1)
commit, show = model_io.Stage.commit, Telling.tell
def signalled_commit(stage):
    if when == "during":
        os.kill(os.getpid(), signal.SIGTERM)
    return commit(stage)
def signalled_show(*args):
    if when == "after":
        os.kill(os.getpid(), signal.SIGTERM)
    show(*args)
model_io.Stage.commit, Telling.tell = signalled_commit, signalled_show
cli.main()
"""


@pytest.mark.parametrize("when", ["during", "after"])
def test_an_interrupt_once_the_model_is_written_says_so(model: pathlib.Path, when: str) -> None:
    command = [sys.executable, "-c", SIGNALLED, when, os.fspath(model), *UNVERIFIED]
    done = subprocess.run(command, env=commands.environment(), capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == f"error: interrupted; {model.with_name('model.fa.onnx')} was written before that\n"
    assert names(model.parent) == ["model.fa.onnx", "model.onnx"]


# ---------------------------------------------------------------------------------------------------------- leftovers


def test_folders_of_killed_runs_go_and_others_stay(tmp_path: pathlib.Path) -> None:
    child = os.fork()
    if child == 0:
        with scratch.folder(tmp_path) as folder:
            (folder / "half a model").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = names(tmp_path)
    (tmp_path / ".faexport-unlocked").mkdir()  # about to be locked, or of another program
    (tmp_path / ".faexport-of-another").mkdir()
    (tmp_path / ".faexport-of-another" / "file").write_text("x")
    os.utime(tmp_path / ".faexport-of-another", (0, 0))
    (tmp_path / ".faexport-link").symlink_to(tmp_path / ".faexport-of-another")
    with scratch.folder(tmp_path) as alive:
        assert left not in names(tmp_path)
        with scratch.folder(tmp_path):
            assert alive.is_dir()
    assert names(tmp_path) == [".faexport-link", ".faexport-of-another", ".faexport-unlocked"]
    os.utime(tmp_path / ".faexport-unlocked", (0, 0))
    scratch.remove_stale(tmp_path, ".faexport-")
    assert names(tmp_path) == [".faexport-link", ".faexport-of-another"]


INTERRUPTED_BEFORE_THE_REMOVAL = """
import contextlib, pathlib, sys
from faexport.files import scratch
held = scratch.uninterrupted
with contextlib.suppress(KeyboardInterrupt):
    with scratch.folder(pathlib.Path(sys.argv[1])) as folder:
        (folder / "half a model").write_text("x")
        def interrupted():
            scratch.uninterrupted = held
            raise KeyboardInterrupt
        scratch.uninterrupted = interrupted
assert folder.exists()
"""


def test_a_folder_goes_where_the_removal_was_interrupted_before_it_began(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED_BEFORE_THE_REMOVAL, os.fspath(tmp_path)]
    subprocess.run(command, env=commands.environment(), check=True)
    assert names(tmp_path) == []


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    output.write_file(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", fail)
    with pytest.raises(ModelError, match="free some space"):
        output.write_file(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["r.json"]
