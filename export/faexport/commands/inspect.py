# SPDX-License-Identifier: Apache-2.0
"""The command `faexport inspect`: what is found in a model, and what would be fused.

cli.py adds it. What is slow to import is imported when the command runs.
"""

from __future__ import annotations

import dataclasses
import pathlib

import click

from faexport.commands import terminal
from faexport.commands.help_texts import EXAMPLES_OF_INSPECT
from faexport.commands.shared_options import (
    assume_option,
    assumed,
    gathered,
    html_option,
    json_option,
    model_or_folder_argument,
    opset_option,
    quiet_option,
    report_option,
    strict_option,
)
from faexport.commands.telling import Telling
from faexport.files.output import check_input


@click.command(
    epilog=EXAMPLES_OF_INSPECT,
    context_settings=terminal.CONTEXT_SETTINGS,
    short_help="Show the attention sites of MODEL and what would be fused.",
)
@model_or_folder_argument
@json_option
@report_option
@html_option
@opset_option
@assume_option
@strict_option
@quiet_option
@gathered(telling=Telling)
def inspect(model: pathlib.Path, opset: int | None, assume: tuple[str, ...], telling: Telling) -> None:
    """Show the attention sites of MODEL, what can be proven of each, and what would be fused. Writes no model."""
    with telling.failing_early(model):
        if not model.is_dir():
            check_input(model)
        from faexport import jobs
        from faexport.commands import many

        model = jobs.model_file(many.only_model(model))
        telling.check_places([model], [])
    from faexport.report.data import Report

    report = Report(model=str(model))
    with telling.failures(report), terminal.progress(telling.quiet) as progress:
        source = jobs.read(model, telling.report_file, jobs.Watcher(progress.step, progress.amount))
        progress.step("looking for attention")
        fused = jobs.fuse(source, dataclasses.replace(assumed(assume), opset=opset), model, report)
        telling.tell(report, fused)
    telling.exit_if_strict(report)
