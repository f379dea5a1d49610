# SPDX-License-Identifier: Apache-2.0
"""How what came out of a command is told: on the terminal, as JSON, as a page, and by the exit code. Used by fuse.py
and inspect.py."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from faexport.commands import terminal
from faexport.errors import ModelError
from faexport.files.output import check_report, final_path, write_file

if TYPE_CHECKING:
    import onnx_ir as ir

    from faexport.report.data import Report


@dataclasses.dataclass(frozen=True)
class Telling:
    """The options that say how it is told."""

    as_json: bool
    report_file: pathlib.Path | None
    html_file: pathlib.Path | None
    strict: bool
    quiet: bool

    def check_places(self, sources: Sequence[pathlib.Path], taken: Sequence[pathlib.Path]) -> None:
        """Raises ModelError where a report would overwrite what is no report, or what else is written (`taken`)."""
        report, page = self.report_file, self.html_file
        check_report(report, sources, "--report", taken)
        check_report(page, sources, "--html", taken)
        if report is not None and page is not None and final_path(report) == final_path(page):
            raise ModelError(f"{page}: is where --report is written; choose another name with --html")

    @contextlib.contextmanager
    def failing_early(self, model: pathlib.Path) -> Iterator[None]:
        """Bad input ends in JSON too where JSON was asked for. For what is found before the model is opened."""
        try:
            yield
        except ModelError as error:
            from faexport.report.data import Report

            self._print_json(Report(model=str(model), error=str(error)))
            raise

    @contextlib.contextmanager
    def failures(self, report: Report) -> Iterator[None]:
        """Bad input, and a defect of ours, end in JSON too where JSON was asked for; once the model was written,
        whatever stops us afterwards says so."""
        try:
            yield
        except KeyboardInterrupt:
            if report.output:
                terminal.print_error(f"interrupted; {report.output} was written before that")
            raise
        except Exception as error:
            if report.output:
                raise ModelError(f"{error}; {report.output} was written before that") from error
            report.error = str(error) if isinstance(error, ModelError) else terminal.unexpected(error)[0]
            with contextlib.suppress(ModelError):
                self._write_json(report)
                self._print_json(report)
            raise

    def tell(self, report: Report, fused: ir.Model | None) -> None:
        """Writes and shows the report; `fused`: the rewritten model, if there is one."""
        self._write_page(report, fused)
        self._write_json(report)
        self._print_json(report)
        if not self.as_json and not self.quiet:
            from faexport.report.terminal_view import view

            with terminal.printing():
                screen = terminal.console()
                for part in view(report):
                    screen.print(part)
                screen.print(_conclusion(report), markup=False, soft_wrap=True)

    def exit_if_strict(self, report: Report) -> None:
        if self.strict and (report.num_refused or not report.num_fused):
            raise click.exceptions.Exit(terminal.EXIT_STRICT)

    def _write_page(self, report: Report, fused: ir.Model | None) -> None:
        """The report as a page, with drawings where something was fused."""
        if self.html_file is None:
            return
        from faexport.files import model_io
        from faexport.report import blocks, html_page

        drawn = blocks.find_blocks(model_io.load(str(report.model)), fused) if fused is not None else {}
        write_file(self.html_file, html_page.page(report, drawn).encode())

    def _write_json(self, report: Report) -> None:
        if self.report_file is not None:
            write_file(self.report_file, f"{report.to_json()}\n".encode())

    def _print_json(self, report: Report) -> None:
        if self.as_json:
            with terminal.printing():
                click.echo(report.to_json())


def _conclusion(report: Report) -> str:
    """The last line: what came out of it."""
    counts = f"{report.num_fused} of {len(report.sites)} attention sites"
    if report.output:
        return f"{counts} fused; wrote {report.output}"
    if report.num_fused:
        return f"{counts} can be fused; no model was written"
    if report.sites:
        return "nothing was fused, so no model was written; the table says why"
    from faexport.spec import DOMAIN, OP_TYPE

    already = report.nodes_before.get(f"{DOMAIN}::{OP_TYPE}", 0)
    if already:
        nodes = f"{already} {OP_TYPE} node{'s' * (already > 1)}"
        return f"nothing to fuse: the model already has {nodes}; no model was written"
    return (
        "nothing to fuse: the model has no attention (no Softmax between two matrix products, no Attention node); "
        "no model was written"
    )
