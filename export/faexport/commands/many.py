# SPDX-License-Identifier: Apache-2.0
"""Several models in one call: which files are meant, each rewritten by itself, and one summary. Called by the
commands.

A model that can't be rewritten does not stop the others; the exit code is that of the worst.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import rich.markup
import rich.table

from faexport import jobs
from faexport.commands import terminal
from faexport.errors import ModelError, NotVerifiedError
from faexport.files.output import OWN_SUFFIX, SUFFIX, closed, final_path, is_model_name, writing
from faexport.files.signals import uninterrupted
from faexport.report.data import Report
from faexport.runtimes import genai

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
    """The files that are meant, and the folders of genai. A folder means the files of models in it, but those that
    faexport wrote there (.fa.onnx). Raises ModelError where a folder has none."""
    found: list[pathlib.Path] = []
    for path in paths:
        if not path.is_dir() or (path / genai.CONFIG).is_file():
            found.append(path)
            continue
        try:
            files = sorted(path.iterdir())
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}; check the path") from error
        named = (file for file in files if is_model_name(file) and not is_model_name(file, OWN_SUFFIX))
        inside = [file for file in named if not file.is_dir()]  # some tools name folders so, too
        if not inside:
            raise ModelError(
                f"{path}: is a folder without {genai.CONFIG} and without models (*{SUFFIX}); name a model, or a folder "
                "that has some"
            )
        found += inside
    return list(dict.fromkeys(found))


def only_model(path: pathlib.Path) -> pathlib.Path:
    """`path`, or the one model that a folder holds. Raises ModelError where a folder holds none or several."""
    found = models([path])
    if len(found) > 1:
        raise ModelError(f"{path}: has {len(found)} models; name one of them, such as {found[0]}")
    return found[0]


def places(
    given: Sequence[pathlib.Path], sources: Sequence[pathlib.Path], output: str | None
) -> tuple[list[pathlib.Path], pathlib.Path | None]:
    """Where each of `sources`, which models(given) found, goes, and the folder for them that `output` (-o) names, which
    may not be there yet. It names one for several models and for those of a folder, and where it is one or ends with a
    slash; else it is the name of the file, or of the copy of a folder of genai. Raises ModelError."""
    if output is None:
        return _targets(sources, None), None
    ends_with_slash = output.endswith(("/", os.sep))
    is_file_name = is_model_name(output) and not os.path.isdir(output)
    if len(sources) == 1:
        is_copy = sources[0].is_dir()
        means_several = len(given) > 1 or given[0].is_dir()  # the same one twice, too
        names_folder = ends_with_slash or os.path.isdir(output) or (means_several and not is_file_name)
        if is_copy or not names_folder:
            return [pathlib.Path(output)], None
    elif is_file_name:
        raise ModelError(f"{output}: is no folder; -o names the folder for all where several models are given")
    folder = pathlib.Path(output)
    _check_folder(folder)
    return _targets(sources, folder), folder


def _check_folder(folder: pathlib.Path) -> None:
    """Raises ModelError where it is none and can't be made."""
    if os.path.isdir(folder):
        return
    if os.path.lexists(folder):
        raise ModelError(f"{folder}: is no folder; choose another place with -o")
    if not os.path.isdir(folder.parent):
        raise ModelError(f"{folder}: the folder {folder.parent} does not exist; create it or choose another with -o")
    if why := closed(folder.parent, os.W_OK | os.X_OK):
        raise ModelError(f"{folder}: can't be made: {why}; choose another place with -o")


@contextlib.contextmanager
def making(folder: pathlib.Path | None) -> Iterator[None]:
    """Makes the folder for the body, unless it is there, and removes it if nothing was written to it. Raises
    ModelError."""
    made = False
    try:
        if folder is not None and not folder.is_dir():
            with writing(folder), uninterrupted():
                folder.mkdir()
                made = True
        yield
    finally:
        if folder is not None and made:
            with contextlib.suppress(OSError):  # something is in it
                folder.rmdir()


def _targets(sources: Sequence[pathlib.Path], folder: pathlib.Path | None) -> list[pathlib.Path]:
    """Where each goes: beside its source, or under its name into `folder`. Raises ModelError where two would meet."""
    own_names = [os.path.basename(os.path.abspath(source)) for source in sources]  # not those that links lead to
    targets = [
        jobs.target_of(source) if folder is None else folder / name
        for source, name in zip(sources, own_names, strict=True)
    ]
    taken: dict[pathlib.Path, pathlib.Path] = {}
    for source, target in zip(sources, targets, strict=True):
        other = taken.setdefault(final_path(target), source)
        if other != source:
            raise ModelError(f"{target}: both {other} and {source} would be written there; rewrite them one by one")
    return targets


def run(
    todo: Sequence[jobs.Job], reports: Sequence[Report], strict: bool, progress: terminal.Progress
) -> list[Outcome]:
    """Does one job after the other, and fills in its report. A job's model may be a folder of genai."""
    outcomes = []
    for number, (job, report) in enumerate(zip(todo, reports, strict=True), 1):
        which = f"{number} of {len(todo)}, {job.model.name}"
        outcomes.append(_one(job, report, strict, jobs.Watcher(_saying(which, progress), progress.amount)))
        progress.finished(f"{which}: {'failed' if report.error else _result(report)}")
    return outcomes


@contextlib.contextmanager
def telling_what_was_written(reports: Sequence[Report]) -> Iterator[None]:
    """Where the body is interrupted, or fails, stderr tells what went wrong and what was written before that."""
    try:
        yield
    except KeyboardInterrupt:
        print_errors(reports)
        if written := _written(reports):
            terminal.print_error(f"interrupted: {written}")
        raise
    except ModelError as error:
        print_errors(reports)
        if written := _written(reports):
            raise ModelError(f"{error}; {written} before that") from error
        raise


def _written(reports: Sequence[Report]) -> str:
    """Which models were written; "" where none was."""
    paths = [report.output for report in reports if report.output]
    verb = "was" if len(paths) == 1 else "were"
    return f"{len(paths)} of {len(reports)} models {verb} written ({', '.join(paths)})" if paths else ""


def print_errors(reports: Iterable[Report]) -> None:
    for report in reports:
        if report.error:
            terminal.print_error(report.error)


def _saying(which: str, progress: terminal.Progress) -> Callable[[str], None]:
    return lambda text: progress.step(f"{which}: {text}")


def _one(job: jobs.Job, report: Report, strict: bool, watcher: jobs.Watcher) -> Outcome:
    try:
        jobs.run_any(job, report, watcher)
    except NotVerifiedError as error:
        report.error, code = str(error), terminal.EXIT_NOT_VERIFIED
    except ModelError as error:
        report.error, code = str(error), terminal.EXIT_BAD_INPUT
    except Exception as error:
        if os.environ.get("FAEXPORT_TRACEBACK"):
            raise
        report.error, code = terminal.unexpected(error)
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
        said = report.error or _result(report)
        colour = "red" if report.error else "green" if report.output else "yellow"
        cells = (str(report.model), f"{report.num_fused} of {len(report.sites)}", checked)
        table.add_row(*map(rich.markup.escape, cells), f"[{colour}]{rich.markup.escape(said)}[/{colour}]")
    return table


def _result(report: Report) -> str:
    """What was written, or why nothing was, though nothing is wrong."""
    if report.output:
        return f"wrote {report.output}"
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
