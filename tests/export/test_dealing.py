# SPDX-License-Identifier: Apache-2.0
"""benchmarks/dealing.py: processes that load together and have a GPU for themselves one after the other."""

from __future__ import annotations

import pathlib
import sys
import time

import pytest

from tests.pages import ROOT

CHILD = """
import pathlib, sys, time
log = pathlib.Path(sys.argv[1])
def say(what):
    with log.open("a") as file:
        file.write(what + " " + sys.argv[2] + "\\n")
say("loaded")
print("loading took a while")
print("ready", flush=True)
sys.stdin.readline()
say("begins")
time.sleep(0.1)
if sys.argv[2] == "broken":
    raise ValueError("no such row")
print("row of", sys.argv[2], flush=True)
say("ends")
"""


@pytest.fixture
def dealing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import dealing

    return dealing


def _run(dealing, tmp_path: pathlib.Path, names: list[str], *, jobs: int, seconds: float = 60, code: str = CHILD):
    """What the processes did, what they said, and what became of each."""
    log, lines, ends = tmp_path / "log", [], {}
    tasks = [dealing.Task(name, [sys.executable, "-c", code, log, name], 1) for name in names]
    where = dealing.hosts(0)
    dealing.run(
        tasks, where, jobs, seconds, lambda task, line: lines.append(line), lambda t, w: ends.update({t.name: w})
    )
    return log.read_text().splitlines() if log.exists() else [], lines, ends


def test_all_load_before_one_takes_times_alone(dealing, tmp_path: pathlib.Path) -> None:
    done, said, ends = _run(dealing, tmp_path, ["a", "b", "c"], jobs=3)
    assert sorted(done[:3]) == ["loaded a", "loaded b", "loaded c"]
    assert done[3:] == [f"{what} {name}" for name in "abc" for what in ("begins", "ends")]
    assert [line for line in said if line.startswith("row")] == ["row of a", "row of b", "row of c"]
    assert ends == {"a": "", "b": "", "c": ""}


def test_no_more_load_than_may(dealing, tmp_path: pathlib.Path) -> None:
    done, _, _ = _run(dealing, tmp_path, ["a", "b"], jobs=1)
    assert done == [f"{what} {name}" for name in "ab" for what in ("loaded", "begins", "ends")]


def test_one_that_breaks_is_told_and_the_others_go_on(dealing, tmp_path: pathlib.Path) -> None:
    _, said, ends = _run(dealing, tmp_path, ["broken", "b"], jobs=2)
    assert ends["broken"].startswith("the process ended with 1") and "no such row" in ends["broken"]
    assert ends["b"] == "" and "row of b" in said


def test_when_the_time_is_up_all_end(dealing, tmp_path: pathlib.Path) -> None:
    start = time.monotonic()
    _, _, ends = _run(dealing, tmp_path, ["a", "b"], jobs=2, seconds=0.5, code="import time; time.sleep(60)")
    assert time.monotonic() - start < 30
    assert ends == {"a": dealing.TIME_IS_UP, "b": dealing.TIME_IS_UP}


def test_an_exception_ends_what_still_runs(dealing) -> None:
    def said(task, line: str) -> None:
        raise RuntimeError("nobody listens")

    codes = {"talks": "print('a line')", "sleeps": "import time; time.sleep(60)"}
    tasks = [dealing.Task(name, [sys.executable, "-c", code], 1) for name, code in codes.items()]
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="nobody listens"):
        dealing.run(tasks, 2 * dealing.hosts(0), 1, 60, said, lambda task, why: None)
    assert time.monotonic() - start < 30


def test_the_costliest_are_dealt_first(dealing) -> None:
    tasks = [dealing.Task(name, [], cost) for name, cost in (("a", 1), ("b", 5), ("c", 3), ("d", 2))]
    dealt = dealing.deal(tasks, 2)
    assert [[task.name for task in one] for one in dealt] == [["b", "a"], ["c", "d"]]


def test_gpus_are_those_that_may_be_used(dealing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert [host.gpu for host in dealing.hosts(2)] == ["2", "3"]
    assert dealing.hosts(2)[0].cores and dealing.hosts(1)[0].gpu == "2"
    with pytest.raises(ValueError, match="3 GPUs are wanted, CUDA_VISIBLE_DEVICES has 2"):
        dealing.hosts(3)
