# SPDX-License-Identifier: Apache-2.0
"""The command line: `faexport model.onnx`, `faexport inspect model.onnx` and the commands of build.py.

Exit codes: 0 done (also where nothing is to fuse), 1 not verified and nothing was written, 2 bad input, 3 internal
error, 4 with --strict where a site is left or nothing was fused. What does the work is imported when a command runs, so
that help, completion and wrong usage don't wait for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from faexport.commands import bench, build, deploy, terminal
from faexport.commands.help_texts import EXAMPLES, EXAMPLES_OF_FUSE, EXAMPLES_OF_INSPECT, SUMMARY
from faexport.commands.shared_options import (
    FILE,
    PLACE,
    Seconds,
    assume_option,
    html_option,
    json_option,
    model_or_folder_argument,
    models_argument,
    opset_option,
    quiet_option,
    report_option,
    strict_option,
)
from faexport.errors import ModelError, NotVerifiedError
from faexport.files.output import check_input, check_report, final_path, write_file
from faexport.options import DEVICES, DTYPES, TARGETS, VERIFY_TIMEOUT, Options

if TYPE_CHECKING:
    import onnx_ir as ir

    from faexport import jobs
    from faexport.report.data import Report


def _show_version(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from faexport.version import version

        click.echo(f"faexport {version()}")
        context.exit()


@click.group(
    cls=terminal.DefaultCommandGroup,
    help=SUMMARY,
    epilog=EXAMPLES,
    context_settings=terminal.CONTEXT_SETTINGS,
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Print the version and exit.",
)
@click.option(
    "--completion",
    type=click.Choice(terminal.SHELLS),
    metavar="SHELL",
    is_eager=True,
    expose_value=False,
    callback=terminal.show_completion,
    help="Print a script that makes this shell (bash, zsh, fish) complete names and options.",
)
def app() -> None:
    pass  # the help is SUMMARY


@app.command(
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
def fuse(
    models: tuple[pathlib.Path, ...],
    output: str | None,
    check: bool,
    timeout: float,
    verify_on: str,
    inputs: pathlib.Path | None,
    dry_run: bool,
    as_json: bool,
    report_file: pathlib.Path | None,
    html_file: pathlib.Path | None,
    opset: int | None,
    assume: tuple[str, ...],
    dtype: str | None,
    fp16: bool,
    bf16: bool,
    keep_io_types: bool,
    float32: str | None,
    fallback: bool,
    target: str,
    rest: bool | None,
    strict: bool,
    quiet: bool,
) -> None:
    """Fuse the attention of MODEL and write the result. The name of this command may be left out.

    MODEL may be a folder of onnxruntime-genai: a copy of it is written, with the decoder's attention fused. Of any
    other folder all models are rewritten, and several models or folders may be given."""
    _check_precision(dtype, fp16, bf16, keep_io_types, float32)
    if not check and (timeout != VERIFY_TIMEOUT or verify_on != DEVICES[0]):
        raise click.UsageError(
            "--no-verify runs nothing, so that --verify-timeout and --verify-on say nothing; leave them out"
        )
    if rest and target == "tensorrt":
        raise click.UsageError(f"--rest writes operators of onnxruntime, which {target} doesn't run")
    with _failing_early(models[0], as_json):
        for path in models:
            if not path.is_dir():
                check_input(path)
    import onnx_ir as ir

    from faexport import jobs
    from faexport.commands import many

    options = dataclasses.replace(
        _assuming(assume),
        fallback=fallback,
        target=target,
        rest=rest,
        dtype=ir.DataType[DTYPES[dtype]] if dtype else None,
        float32=float32 or "",
        fp16=fp16,
        bf16=bf16,
        keep_io_types=keep_io_types,
        opset=opset,
    )
    with _failing_early(models[0], as_json):
        sources = many.models(models)
        places, folder = many.places(models, sources, output)
        _check_reports(sources, places, folder, inputs, report_file, html_file)
    todo = [
        jobs.Job(source, place, options, check, timeout, inputs, dry_run, report_file, verify_on)
        for source, place in zip(sources, places, strict=True)
    ]
    with many.making(folder):
        if len(todo) > 1:
            _fuse_many(todo, as_json, report_file, strict, quiet)
        else:
            _fuse_one(todo[0], as_json, html_file, strict, quiet)


def _check_precision(dtype: str | None, fp16: bool, bf16: bool, keep_io_types: bool, float32: str | None) -> None:
    """Raises click.UsageError where options exclude one another, or one needs another."""
    given = [name for name, is_given in ((f"--dtype {dtype}", dtype), ("--fp16", fp16), ("--bf16", bf16)) if is_given]
    if len(given) > 1:
        why = "; --dtype is of attention alone, the others of the whole model" if dtype else ""
        raise click.UsageError(f"{' and '.join(given)} exclude one another, give one of them{why}")
    if not keep_io_types and not (fp16 or bf16):
        raise click.UsageError("--no-keep-io-types needs --fp16 or --bf16")
    if float32 and dtype in ("fp16", "bf16"):
        raise click.UsageError(
            f"--float32 is of attention in float32, and --dtype {dtype} asks for another precision; give one of them"
        )


def _check_reports(
    sources: list[pathlib.Path],
    places: list[pathlib.Path],
    folder: pathlib.Path | None,
    inputs: pathlib.Path | None,
    report_file: pathlib.Path | None,
    html_file: pathlib.Path | None,
) -> None:
    """Raises ModelError where a report would overwrite what is no report, or an option is for one model and there are
    several."""
    if len(sources) > 1:
        for option, value in (("--inputs", inputs), ("--html", html_file)):
            if value is not None:
                raise ModelError(f"{option} is for one model, and {len(sources)} are given; rewrite them one by one")
    taken = [*places, *([folder] if folder is not None else [])]
    check_report(report_file, sources, "--report", taken)
    check_report(html_file, sources, "--html", taken)
    if report_file is not None and html_file is not None and final_path(report_file) == final_path(html_file):
        raise ModelError(f"{html_file}: is where --report is written; choose another name with --html")


def _fuse_one(job: jobs.Job, as_json: bool, html_file: pathlib.Path | None, strict: bool, quiet: bool) -> None:
    from faexport import jobs
    from faexport.report.data import Report

    report = Report(model=str(job.model))
    with _failures(report, as_json, job.report_file):
        with terminal.progress(quiet) as progress:
            fused = None
            try:
                fused = jobs.run_any(job, report, jobs.Watcher(progress.step, progress.amount))
            except NotVerifiedError as error:
                report.error = str(error)
        _write_html(report, html_file, fused)
        _show(report, as_json, job.report_file, quiet)
    if report.error:
        terminal.print_error(report.error)
        raise click.exceptions.Exit(terminal.EXIT_NOT_VERIFIED)
    _exit_if_strict(report, strict)


def _fuse_many(
    todo: list[jobs.Job], as_json: bool, report_file: pathlib.Path | None, strict: bool, quiet: bool
) -> None:
    from faexport.commands import many
    from faexport.report.data import Report

    reports = [Report(model=str(job.model)) for job in todo]
    with many.telling_what_was_written(reports):
        with terminal.progress(quiet) as progress:
            outcomes = many.run(todo, reports, strict, progress)
        if report_file is not None:
            write_file(report_file, f"{many.to_json(outcomes)}\n".encode())
        with terminal.printing():
            if as_json:
                click.echo(many.to_json(outcomes))
            elif not quiet:
                terminal.console().print(many.summary(outcomes))
    many.print_errors(reports)
    raise click.exceptions.Exit(many.exit_code(outcomes))


@app.command(
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
def inspect(
    model: pathlib.Path,
    as_json: bool,
    report_file: pathlib.Path | None,
    html_file: pathlib.Path | None,
    opset: int | None,
    assume: tuple[str, ...],
    strict: bool,
    quiet: bool,
) -> None:
    """Show the attention sites of MODEL, what can be proven of each, and what would be fused. Writes no model."""
    with _failing_early(model, as_json):
        if not model.is_dir():
            check_input(model)
        from faexport import jobs
        from faexport.commands import many

        model = jobs.model_file(many.only_model(model))
        check_report(report_file, [model], "--report")
        check_report(html_file, [model], "--html")
    from faexport.report.data import Report

    report = Report(model=str(model))
    with _failures(report, as_json, report_file), terminal.progress(quiet) as progress:
        source = jobs.read(model, report_file, jobs.Watcher(progress.step, progress.amount))
        progress.step("looking for attention")
        fused = jobs.fuse(source, dataclasses.replace(_assuming(assume), opset=opset), model, report)
        _write_html(report, html_file, fused)
        _show(report, as_json, report_file, quiet)
    _exit_if_strict(report, strict)


app.add_command(bench.bench)
app.add_command(deploy.deploy)
build.add_commands(app)


@contextlib.contextmanager
def _failing_early(model: pathlib.Path, as_json: bool) -> Iterator[None]:
    """Bad input ends in JSON too where JSON was asked for. For what is found before the model is opened."""
    try:
        yield
    except ModelError as error:
        from faexport.report.data import Report

        _write_json(Report(model=str(model), error=str(error)), as_json, None)
        raise


@contextlib.contextmanager
def _failures(report: Report, as_json: bool, report_file: pathlib.Path | None) -> Iterator[None]:
    """Bad input, and a defect of ours, end in JSON too where JSON was asked for; once the model was written, whatever
    stops us afterwards says so."""
    try:
        yield
    except KeyboardInterrupt:
        if report.output:
            terminal.print_error(f"interrupted; {report.output} was written before that")
        raise
    except Exception as error:
        if report.output:
            raise ModelError(f"{error}; {report.output} was written before that") from error
        report.error = str(error) if isinstance(error, ModelError) else terminal.internal_error(error)
        with contextlib.suppress(ModelError):
            _write_json(report, as_json, report_file)
        raise


def _exit_if_strict(report: Report, strict: bool) -> None:
    if strict and (report.num_refused or not report.num_fused):
        raise click.exceptions.Exit(terminal.EXIT_STRICT)


def _assuming(assume: tuple[str, ...]) -> Options:
    """The defaults, with what --assume names."""
    return Options(
        assume_right_padding="right-padding" in assume,
        assume_full_rows="full-rows" in assume,
        assume_zeros_and_ones="zeros-and-ones" in assume,
        assume_scores_unquantized="scores-unquantized" in assume,
    )


def _write_html(report: Report, path: pathlib.Path | None, fused: ir.Model | None) -> None:
    """The report as a page, with drawings where something was fused."""
    if path is None:
        return
    from faexport.files import model_io
    from faexport.report import blocks, html_page

    drawn = blocks.find_blocks(model_io.load(str(report.model)), fused) if fused is not None else {}
    write_file(path, html_page.page(report, drawn).encode())


def _show(report: Report, as_json: bool, report_file: pathlib.Path | None, quiet: bool) -> None:
    _write_json(report, as_json, report_file)
    if not as_json and not quiet:
        from faexport.report.terminal_view import view

        with terminal.printing():
            screen = terminal.console()
            for part in view(report):
                screen.print(part)
            screen.print(_conclusion(report), markup=False, soft_wrap=True)


def _write_json(report: Report, as_json: bool, report_file: pathlib.Path | None) -> None:
    if report_file is not None:
        write_file(report_file, f"{report.to_json()}\n".encode())
    if as_json:
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


def main() -> None:
    """Runs the command line; called by __main__.py."""
    terminal.run_app(app)
