# SPDX-License-Identifier: Apache-2.0
"""What a user sees of long work where stderr is no terminal: a line now and then, on stderr alone."""

from __future__ import annotations

import json
import pathlib
import re
import time

import onnx
import pytest
from faexport.commands import build, terminal

from tests.export import site_graphs
from tests.export.commands import here


@pytest.fixture
def model(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A model, whose rewriting takes longer than a user is left without a word."""
    monkeypatch.setattr(terminal, "FIRST_LINE", 0.05)
    onnx.save(site_graphs.build(site_graphs.Form()), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("options", [(), ("--json",)], ids=str)
def test_long_work_is_told_now_and_then(model: pathlib.Path, options: tuple[str, ...]) -> None:
    done = here(model, *options, progress=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and 1 <= len(lines) <= 12  # each wait is twice as long as the one before
    assert all(re.fullmatch(r"[a-z][\w ./-]*( \(\d+ %\))?: \d+ s since the start", line) for line in lines), lines
    assert any("model" in line or "site" in line or "fusing" in line or "original" in line for line in lines)
    assert "since the start" not in done.stdout and (not options or json.loads(done.stdout)["num_fused"] == 1)


def test_quiet_tells_nothing(model: pathlib.Path) -> None:
    done = here(model, "--quiet", progress=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_engine_that_is_built_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(terminal, "FIRST_LINE", 0.01)
    for quiet in (False, True):
        with build.Bars(quiet) as bars:
            bars.say("building")
            bars.start("tactics", None, 4)
            bars.step("tactics", 1)
            for _ in range(500):
                told = capsys.readouterr().err
                if told or quiet:
                    break
                time.sleep(0.01)
        assert bool(told) is not quiet and (quiet or told.startswith("building, tactics (25 %): 0 s since the start"))
