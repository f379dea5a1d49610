# SPDX-License-Identifier: Apache-2.0
"""The command `faexport fuse`, whose name may be left out: the attention of models fused, compared and written.

cli.py adds it. What is slow to import is imported when the command runs.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

import click

from faexport.commands import terminal
from faexport.commands.help_texts import EXAMPLES_OF_FUSE
from faexport.commands.shared_options import (
    FILE,
    PLACE,
    Seconds,
    assume_option,
    assumed,
    gathered,
    html_option,
    json_option,
    models_argument,
    opset_option,
    quiet_option,
    report_option,
    strict_option,
)
from faexport.commands.telling import Telling
from faexport.errors import ModelError, NotVerifiedError
from faexport.files.output import check_input, write_file
from faexport.options import DEVICES, DTYPES, TARGETS, VERIFY_TIMEOUT, Options, contradiction

if TYPE_CHECKING:
    from faexport import jobs


@dataclasses.dataclass(frozen=True)
class Verifying:
    """The options that say how the models are compared."""

    check: bool
    timeout: float
    verify_on: str
    inputs: pathlib.Path | None

    def refuse_contradictions(self, measures: bool) -> None:
        """Raises click.UsageError. `measures`: is a precision wanted, for which the model is run on the inputs?"""
        if not self.check and self.inputs and not measures:
            raise click.UsageError(
                "--no-verify runs nothing, so that --inputs says nothing without --dtype, --fp16 or --bf16; leave one "
                "of the two out"
            )
        if not self.check and (self.timeout != VERIFY_TIMEOUT or self.verify_on != DEVICES[0]):
            raise click.UsageError(
                "--no-verify runs nothing, so that --verify-timeout and --verify-on say nothing; leave them out"
            )


@dataclasses.dataclass(frozen=True)
class Changes:
    """The options that say what is written: those of options.Options, as they are typed."""

    opset: int | None
    assume: tuple[str, ...]
    dtype: str | None
    fp16: bool
    bf16: bool
    keep_io_types: bool
    float32: str | None
    fallback: bool
    target: str
    rest: bool | None

    def refuse_contradictions(self) -> None:
        """Raises click.UsageError where options exclude one another, or one needs another."""
        if why := contradiction(self, self.dtype, _spelled):
            raise click.UsageError(why)

    def options(self) -> Options:
        import onnx_ir as ir

        return dataclasses.replace(
            assumed(self.assume),
            fallback=self.fallback,
            target=self.target,
            rest=self.rest,
            dtype=ir.DataType[DTYPES[self.dtype]] if self.dtype else None,
            float32=self.float32 or "",
            fp16=self.fp16,
            bf16=self.bf16,
            keep_io_types=self.keep_io_types,
            opset=self.opset,
        )


def _spelled(name: str, value: Any) -> str:
    """An option with its value, as it is typed."""
    name = name.replace("_", "-")
    return f"--{name}" if value is True else f"--no-{name}" if value is False else f"--{name} {value}"


@click.command(
    epilog=EXAMPLES_OF_FUSE,
    context_settings=terminal.CONTEXT_SETTINGS,
    short_help="Fuse the attention of MODEL; this name may be left out.",
)
@models_argument
@click.option(
    "--output",
    "-o",
    metavar="FILE",
    type=PLACE,
    help="Where to write: a file, or a folder, which may be new, for several models. Default: beside MODEL, with the "
    "ending .fa.onnx, of a genai folder .fa.",
)
@click.option(
    "--verify/--no-verify", "check", default=True, show_default=True, help="Run both models in onnxruntime and compare."
)
@click.option(
    "--verify-timeout",
    "timeout",
    metavar="SECONDS",
    type=Seconds(0.001),
    default=VERIFY_TIMEOUT,
    show_default=True,
    help="How long loading a model in onnxruntime, and each run, may take.",
)
@click.option(
    "--verify-on",
    type=click.Choice(DEVICES),
    metavar="DEVICE",
    default="cpu",
    show_default=True,
    help="Where onnxruntime runs both models, cpu or cuda.",
)
@click.option(
    "--inputs",
    metavar="FILE",
    type=FILE,
    help="Verify on these inputs as well: an .npz with an array for each input. --dtype fp8 measures its factors on "
    "them.",
)
@click.option("--dry-run", is_flag=True, help="Do everything but write the model.")
@json_option
@report_option
@html_option
@opset_option
@assume_option
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    metavar="DTYPE",
    help="Compute attention in this precision, fp16, bf16 or fp8; the rest of the model keeps its own. fp8 (e4m3, for "
    "the CPU and GPUs of compute capability 9.0) takes the factors of its numbers from --inputs, or those that the "
    "model has.",
)
@click.option(
    "--fp16",
    is_flag=True,
    help="Convert the whole model to float16 where attention in it is fused; nodes that would overflow stay float32.",
)
@click.option(
    "--bf16",
    is_flag=True,
    help="Convert the whole model to bfloat16, for GPUs, where attention in it is fused; nodes that onnxruntime "
    "doesn't run in it stay float32.",
)
@click.option(
    "--keep-io-types/--no-keep-io-types",
    "keep_io_types",
    default=True,
    show_default=True,
    help="With --fp16 or --bf16: inputs and outputs of the model stay float32.",
)
@click.option(
    "--float32",
    type=click.Choice(["tf32", "tf32x3"]),
    metavar="HOW",
    help="How GPUs multiply float32 attention: tf32 (one product, error about 4e-4) or tf32x3 (three, about 5e-7). "
    "Default: as the runtime multiplies float32 matrices.",
)
@click.option(
    "--fallback/--no-fallback",
    default=True,
    show_default=True,
    help="Carry the operator's definition in standard operators, for runtimes without our library.",
)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    metavar="RUNTIME",
    default=TARGETS[0],
    show_default=True,
    help="The runtime to write for: onnxruntime, cuda (onnxruntime on GPUs only, with operators that have no CPU "
    "kernels) or tensorrt.",
)
@click.option(
    "--rest/--no-rest",
    default=None,
    help="Join what stands around attention (GELU, residuals with their normalizations) into operators of onnxruntime "
    "too; with --no-rest one file serves onnxruntime and TensorRT. Default: --rest, for TensorRT --no-rest.",
)
@strict_option
@quiet_option
@gathered(verifying=Verifying, changes=Changes, telling=Telling)
def fuse(
    models: tuple[pathlib.Path, ...],
    output: str | None,
    dry_run: bool,
    verifying: Verifying,
    changes: Changes,
    telling: Telling,
) -> None:
    """Fuse the attention of MODEL and write the result. The name of this command may be left out.

    MODEL may be a folder of onnxruntime-genai: a copy of it is written, with the decoder's attention fused. Of any
    other folder all models are rewritten, and several models or folders may be given."""
    changes.refuse_contradictions()
    verifying.refuse_contradictions(measures=bool(changes.dtype or changes.fp16 or changes.bf16))
    with telling.failing_early(models[0]):
        for path in models:
            if not path.is_dir():
                check_input(path)
        from faexport import jobs
        from faexport.commands import many
        from faexport.runtimes import ort_session

        sources = many.models(models)
        places, folder = many.places(models, sources, output)
        _check_places(sources, [*places, *([folder] if folder is not None else [])], verifying, telling)
        ort_session.check_device(verifying.verify_on)
    options, how = changes.options(), dataclasses.asdict(verifying)
    todo = [
        jobs.Job(source, place, options, dry_run=dry_run, report_file=telling.report_file, **how)
        for source, place in zip(sources, places, strict=True)
    ]
    with many.making(folder):
        if len(todo) > 1:
            _fuse_many(todo, telling)
        else:
            _fuse_one(todo[0], telling)


def _check_places(
    sources: list[pathlib.Path], taken: list[pathlib.Path], verifying: Verifying, telling: Telling
) -> None:
    """Raises ModelError where a report would overwrite what is no report, or an option is for one model and there are
    several. `taken`: what else will be written."""
    if len(sources) > 1:
        for option, value in (("--inputs", verifying.inputs), ("--html", telling.html_file)):
            if value is not None:
                raise ModelError(f"{option} is for one model, and {len(sources)} are given; rewrite them one by one")
    telling.check_places(sources, taken)


def _fuse_one(job: jobs.Job, telling: Telling) -> None:
    from faexport import jobs
    from faexport.report.data import Report

    report = Report(model=str(job.model))
    with telling.failures(report):
        with terminal.progress(telling.quiet) as progress:
            fused = None
            try:
                fused = jobs.run_any(job, report, jobs.Watcher(progress.step, progress.amount))
            except NotVerifiedError as error:
                report.error = str(error)
        telling.tell(report, fused)
    if report.error:
        terminal.print_error(report.error)
        raise click.exceptions.Exit(terminal.EXIT_NOT_VERIFIED)
    telling.exit_if_strict(report)


def _fuse_many(todo: list[jobs.Job], telling: Telling) -> None:
    from faexport.commands import many
    from faexport.report.data import Report

    reports = [Report(model=str(job.model)) for job in todo]
    with many.telling_what_was_written(reports):
        with terminal.progress(telling.quiet) as progress:
            outcomes = many.run(todo, reports, telling.strict, progress)
        if telling.report_file is not None:
            write_file(telling.report_file, f"{many.to_json(outcomes)}\n".encode())
        with terminal.printing():
            if telling.as_json:
                click.echo(many.to_json(outcomes))
            elif not telling.quiet:
                terminal.console().print(many.summary(outcomes))
    many.print_errors(reports)
    raise click.exceptions.Exit(many.exit_code(outcomes))
