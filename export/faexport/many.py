# SPDX-License-Identifier: Apache-2.0
"""Several models in one call: which files are meant, each rewritten by itself, and one summary. Called by cli.py.

A model that can't be rewritten does not stop the others; the exit code is that of the worst.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import rich.markup
import rich.table

from . import genai, jobs, terminal
from .errors import ModelError, NotVerifiedError
from .output import final_path
from .report import Report

SUFFIX, OWN_SUFFIX = ".onnx", ".fa.onnx"
# Of the whole call: the first of these that the code of one model is.
WORST_FIRST = (
    terminal.EXIT_INTERNAL_ERROR,
    terminal.EXIT_BAD_INPUT,
    terminal.EXIT_NOT_VERIFIED,
    terminal.EXIT_STRICT,
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one model: its report, whose `error` says what went wrong, and its exit code."""

    report: Report
    code: int


def models(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """The files that are meant, and the folders of genai. A folder means the models in it, but those that faexport
    wrote there (.fa.onnx). Raises ModelError where a folder has none."""
    found: list[pathlib.Path] = []
    for path in paths:
        if not path.is_dir() or (path / genai.CONFIG).is_file():
            found.append(path)
            continue
        inside = sorted(file for file in path.glob(f"*{SUFFIX}") if not file.name.endswith(OWN_SUFFIX))
        if not inside:
            raise ModelError(f"{path}: is a folder without {genai.CONFIG} and without models (*{SUFFIX})")
        found += inside
    return list(dict.fromkeys(found))


def only_model(path: pathlib.Path) -> pathlib.Path:
    """`path`, or the one model that a folder holds. Raises ModelError where a folder holds none or several."""
    found = models([path])
    if len(found) > 1:
        raise ModelError(f"{path}: has {len(found)} models; name one of them, such as {found[0]}")
    return found[0]


def targets(sources: Sequence[pathlib.Path], folder: pathlib.Path | None) -> list[pathlib.Path]:
    """Where each goes: beside its source, or under its name into `folder`. Raises ModelError where two would meet."""
    if folder is not None and not folder.is_dir():
        raise ModelError(f"{folder}: is no folder; for several models -o names the folder for all, create it first")
    made: dict[pathlib.Path, pathlib.Path] = {}
    for source in sources:
        target = jobs.target_of(source) if folder is None else folder / source.resolve().name
        other = made.setdefault(final_path(target), source)
        if other != source:
            raise ModelError(f"{target}: both {other} and {source} would be written there; rewrite them one by one")
    return list(made)


def run(todo: Sequence[jobs.Job], strict: bool, progress: terminal.Progress) -> list[Outcome]:
    """Does one job after the other. A job's model may be a folder of genai."""
    outcomes = []
    for number, job in enumerate(todo, 1):
        which = f"{number} of {len(todo)}, {job.model.name}"
        outcomes.append(_one(job, strict, jobs.Watcher(_saying(which, progress), progress.amount)))
    return outcomes


def _saying(which: str, progress: terminal.Progress) -> Callable[[str], None]:
    return lambda text: progress.step(f"{which}: {text}")


def _one(job: jobs.Job, strict: bool, watcher: jobs.Watcher) -> Outcome:
    report = Report(model=str(job.model))
    try:
        jobs.run_any(job, report, watcher)
    except NotVerifiedError as error:
        report.error, code = str(error), terminal.EXIT_NOT_VERIFIED
    except ModelError as error:
        report.error, code = str(error), terminal.EXIT_BAD_INPUT
    except Exception as error:
        if os.environ.get("FAEXPORT_TRACEBACK"):
            raise
        report.error, code = terminal.internal_error(error), terminal.EXIT_INTERNAL_ERROR
    else:
        code = terminal.EXIT_STRICT if strict and (report.num_refused or not report.num_fused) else 0
    return Outcome(report, code)


def exit_code(outcomes: Iterable[Outcome]) -> int:
    codes = {outcome.code for outcome in outcomes}
    return next((code for code in WORST_FIRST if code in codes), 0)


def to_json(outcomes: Sequence[Outcome]) -> str:
    """{"models": one report each, "exit_code": …}."""
    reports: list[dict[str, Any]] = [json.loads(outcome.report.to_json()) for outcome in outcomes]
    return json.dumps({"models": reports, "exit_code": exit_code(outcomes)}, indent=2)


def summary(outcomes: Sequence[Outcome]) -> rich.table.Table:
    """One row a model."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading, how in _COLUMNS:
        table.add_column(heading, **how)
    for outcome in outcomes:
        report = outcome.report
        checked = report.verification.status.value if report.verification is not None else "-"
        said = report.error or (f"wrote {report.output}" if report.output else _why_not(report))
        colour = "red" if report.error else "green" if report.output else "yellow"
        cells = (str(report.model), f"{report.num_fused} of {len(report.sites)}", checked)
        table.add_row(*map(rich.markup.escape, cells), f"[{colour}]{rich.markup.escape(said)}[/{colour}]")
    return table


def _why_not(report: Report) -> str:
    """Why no model was written, though nothing is wrong."""
    if report.num_fused:
        return "no model was written"
    refused = next((str(site.refusal) for site in report.sites if site.refusal), "there is no attention to fuse")
    return f"no model was written: {refused}"


_COLUMNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("model", {"overflow": "fold"}),
    ("fused", {"justify": "right", "no_wrap": True}),
    ("verified", {"no_wrap": True}),
    ("result", {"overflow": "fold"}),
)
