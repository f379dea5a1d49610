# SPDX-License-Identifier: Apache-2.0
"""The command line: `faexport model.onnx`, `faexport inspect model.onnx` and the commands of build.py.

Exit codes: 0 done (also where nothing is to fuse), 1 not verified and nothing was written, 2 bad input, 3 internal
error, 4 with --strict where a site is left or nothing was fused.
"""

from __future__ import annotations

import contextlib
import enum
import pathlib
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import onnx_ir as ir
import typer

from . import __version__, build, diagnosis, model_io, pipeline, scratch, terminal, verify
from .errors import ModelError
from .graph_checks import external_tensors
from .output import check_input, check_output, final_path, write_file
from .report import Report, Verification, VerificationStatus
from .signals import uninterrupted
from .spec import DOMAIN, OP_TYPE

# NOTE: Typer keeps the line breaks inside all paragraphs but the first.
SUMMARY = (
    "Put flash attention into an ONNX model: find its attention, prove what it computes, fuse it, check the result.\n\n"
    "[bold]faexport model.onnx[/bold] writes model.fa.onnx beside the model. It runs in onnxruntime and TensorRT with "
    "the libraries of the faplugin package, and without them too (slower) unless --no-fallback is given.\n\n"
    "Exit codes: 0 done, or nothing to fuse; 1 not verified, nothing written; 2 bad input; 3 internal error; 4 with "
    "--strict: a site is left, or nothing was fused."
)
EXAMPLES = """[bold]Examples[/bold]

faexport model.onnx                     write model.fa.onnx, verified

faexport inspect model.onnx             only show what would be fused

faexport model.onnx -o fast.onnx        write elsewhere

faexport model.onnx --inputs real.npz   verify on your own inputs as well

faexport model.onnx --dtype fp16        attention in half precision

faexport model.onnx --json --dry-run    a report for programs
"""

app = typer.Typer(
    cls=terminal.DefaultCommandGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXAMPLES,
)


class Assumption(enum.StrEnum):
    RIGHT_PADDING = "right-padding"
    FULL_ROWS = "full-rows"


class CoreDtype(enum.StrEnum):
    FP16 = "fp16"
    BF16 = "bf16"


class Float32(enum.StrEnum):
    TF32 = "tf32"
    TF32X3 = "tf32x3"


_CORE_DTYPES = {CoreDtype.FP16: ir.DataType.FLOAT16, CoreDtype.BF16: ir.DataType.BFLOAT16}


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"faexport {__version__}")
        raise typer.Exit


@app.callback(help=SUMMARY)
def _group(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", help="Print the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass  # the help is SUMMARY


ModelArgument = Annotated[pathlib.Path, typer.Argument(metavar="MODEL", help="The ONNX model.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", metavar="", help="Print the report as JSON instead of tables.")]
ReportOption = Annotated[
    pathlib.Path | None, typer.Option("--report", metavar="FILE", help="Also write the report as JSON to this file.")
]
StrictOption = Annotated[
    bool,
    typer.Option("--strict", metavar="", help="Exit with 4 where a site is left as it is or nothing can be fused."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", metavar="", help="Print nothing but errors.")]
OpsetOption = Annotated[
    int | None, typer.Option("--opset", metavar="N", help="Convert the model to this ONNX opset first.", min=7)
]
AssumeOption = Annotated[
    list[Assumption] | None,
    typer.Option(
        "--assume",
        metavar="WHAT",
        help="What a model can't tell; may be given twice. right-padding: every mask input keeps the first tokens of a "
        "row. full-rows: each query sees a key, or its output is never used.",
    ),
]
DtypeOption = Annotated[
    CoreDtype | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="Compute attention in this precision, fp16 or bf16; the rest of the model keeps its own.",
    ),
]
Float32Option = Annotated[
    Float32 | None,
    typer.Option(
        "--float32",
        metavar="HOW",
        help="How GPUs multiply float32 attention: tf32 (one product, error about 4e-4) or tf32x3 (three, about 5e-7). "
        "Default: as the runtime multiplies float32 matrices.",
    ),
]
FallbackOption = Annotated[
    bool,
    typer.Option(
        "--fallback/--no-fallback",
        metavar="",
        help="Carry the operator's definition in standard ops, for runtimes without our library.",
    ),
]


@app.command()
def fuse(
    model: ModelArgument,
    output: Annotated[
        pathlib.Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write; default: MODEL with the ending .fa.onnx."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--verify/--no-verify", metavar="", help="Run both models in onnxruntime and compare.")
    ] = True,
    timeout: Annotated[
        float,
        typer.Option(
            "--verify-timeout",
            metavar="SECONDS",
            help="How long loading a model in onnxruntime, and each run, may take.",
            min=0.001,
        ),
    ] = verify.DEFAULT_TIMEOUT,
    inputs: Annotated[
        pathlib.Path | None,
        typer.Option(
            "--inputs", metavar="FILE", help="Verify on these inputs as well: an .npz with an array for each input."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", metavar="", help="Do everything but write the model.")] = False,
    as_json: JsonOption = False,
    report_file: ReportOption = None,
    opset: OpsetOption = None,
    assume: AssumeOption = None,
    dtype: DtypeOption = None,
    float32: Float32Option = None,
    fallback: FallbackOption = True,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fuse the attention of MODEL and write the result. The name of this command may be left out."""
    check_input(model)
    target = output or default_target(model)
    _check_report_file(report_file, model, target)
    report = Report(model=str(model))
    with _failures(report, as_json, report_file):
        with terminal.progress(quiet) as progress:
            source = _read(model, report_file, progress)
            model_io.check_target(source, target, model)
            given = _read_inputs(inputs, source) if inputs else []
            progress.step("fusing")
            options = pipeline.Options(
                fallback=fallback,
                dtype=_CORE_DTYPES[dtype] if dtype else None,
                float32=str(float32 or ""),
                opset=opset,
                **_assumed(assume),
            )
            fused = _fuse(source, options, model, report)
            if report.num_fused:
                with _staged(fused, target, model, dry_run, progress) as stage:
                    if check:
                        report.verification = _verify(model, stage, given, options, timeout, progress)
                        report.error = _failure(report.verification, model, target)
                    if not report.error and not dry_run:
                        with uninterrupted():
                            stage.commit()
                            report.output = str(target)
        _show(report, as_json, report_file, quiet)
    if report.error:
        terminal.print_error(report.error)
        raise typer.Exit(terminal.EXIT_NOT_VERIFIED)
    _exit_if_strict(report, strict)


@app.command()
def inspect(
    model: ModelArgument,
    as_json: JsonOption = False,
    report_file: ReportOption = None,
    opset: OpsetOption = None,
    assume: AssumeOption = None,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show the attention sites of MODEL, what can be proven of each, and what would be fused. Writes no model."""
    check_input(model)
    _check_report_file(report_file, model)
    report = Report(model=str(model))
    with _failures(report, as_json, report_file), terminal.progress(quiet) as progress:
        source = _read(model, report_file, progress)
        progress.step("looking for attention")
        _fuse(source, pipeline.Options(opset=opset, **_assumed(assume)), model, report)
        _show(report, as_json, report_file, quiet)
    _exit_if_strict(report, strict)


build.add_commands(app)


def default_target(model: pathlib.Path) -> pathlib.Path:
    """model.onnx -> model.fa.onnx, beside it."""
    stem = model.name.removesuffix(".onnx")
    return model.with_name(f"{stem}.fa.onnx")


def _read(model: pathlib.Path, report_file: pathlib.Path | None, progress: terminal.Progress) -> ir.Model:
    progress.step(f"reading {model.name}")
    source = model_io.load(model)
    if report_file is not None:
        check_output(report_file, [tensor.path for tensor in external_tensors(source)], "--report", streams=True)
    return source


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


def _fuse(source: ir.Model, options: pipeline.Options, path: pathlib.Path, report: Report) -> ir.Model:
    """The rewritten model; fills in the report."""
    fused, found = diagnosis.fuse(source, options, path)
    report.sites, report.nodes_before, report.nodes_after = found.sites, found.nodes_before, found.nodes_after
    report.notes, report.defects = found.notes, found.defects
    return fused


@contextlib.contextmanager
def _staged(
    model: ir.Model, target: pathlib.Path, source: pathlib.Path, dry_run: bool, progress: terminal.Progress
) -> Iterator[model_io.Stage]:
    """The rewritten model in a file: beside the target, or on a dry run in the system's temporary folder."""
    progress.step(f"writing {target.name}")
    with contextlib.ExitStack() as stack:
        if dry_run:
            target = stack.enter_context(scratch.folder(what="dry-")) / target.name
        with diagnosis.blaming(source):
            stage = stack.enter_context(model_io.staged(model, target, source=source, progress=progress.amount))
        yield stage


def _verify(
    model: pathlib.Path,
    stage: model_io.Stage,
    given: list[verify.InputSet],
    options: pipeline.Options,
    timeout: float,
    progress: terminal.Progress,
) -> Verification:
    return verify.verify(
        model,
        stage.model_path,
        extra_inputs=given,
        right_padding=options.assume_right_padding,
        full_rows=options.assume_full_rows,
        timeout=timeout,
        on_step=progress.step,
        on_amount=progress.amount,
    )


def _failure(verification: Verification, model: pathlib.Path, target: pathlib.Path) -> str | None:
    """Why the model can't be written: it was found wrong, or could not be compared."""
    if verification.status is VerificationStatus.FAILED:
        return f"{model}: verification failed: {verification.reason}; {target} was not written"
    if verification.status is VerificationStatus.NOT_RUN:
        return (
            f"{model}: could not be verified: {verification.reason}; {target} was not written (--no-verify would write "
            "it without a comparison)"
        )
    return None


def _exit_if_strict(report: Report, strict: bool) -> None:
    if strict and (report.num_refused or not report.num_fused):
        raise typer.Exit(terminal.EXIT_STRICT)


def _assumed(assume: list[Assumption] | None) -> dict[str, bool]:
    """--assume as arguments of pipeline.Options."""
    return {f"assume_{assumption.name.lower()}": True for assumption in assume or ()}


def _check_report_file(path: pathlib.Path | None, model: pathlib.Path, target: pathlib.Path | None = None) -> None:
    """Before anything is done: the report can be written, and over nothing but an older report."""
    if path is None:
        return
    check_output(path, [model], "--report", streams=True)
    if target is not None and final_path(path) == final_path(target):
        raise ModelError(f"{path}: is where the model will be written; choose another name with --report")
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(1)
        if start not in (b"", b"{"):
            raise ModelError(f"{path}: is there already and no report; choose another name with --report")


def _read_inputs(path: pathlib.Path, model: ir.Model) -> list[verify.InputSet]:
    tensors = model_io.read_arrays(path)
    wanted = {value.name: value for value in model.graph.inputs if not value.is_initializer()}
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ModelError(f"{path}: has no array '{missing[0]}'; the model's inputs are {', '.join(sorted(wanted))}")
    for name, value in wanted.items():
        if wrong := _misfit(tensors[name], value):
            raise ModelError(f"{path}: array '{name}' {wrong}; write it as the model expects it")
    return [verify.InputSet(path.name, {name: tensors[name] for name in wanted})]


def _misfit(array: np.ndarray, value: ir.Value) -> str:
    """Why the model can't take this array for an input, or ""."""
    if value.dtype is not None and array.dtype != value.dtype.numpy():
        return f"is {array.dtype}, the model takes {value.dtype.numpy()}"
    sizes = [None] * array.ndim if value.shape is None else list(value.shape)
    fits = len(sizes) == array.ndim and all(
        not isinstance(size, int) or size == given for size, given in zip(sizes, array.shape, strict=True)
    )
    return "" if fits else f"has the shape {list(array.shape)}, the model takes {value.shape}"


def _show(report: Report, as_json: bool, report_file: pathlib.Path | None, quiet: bool) -> None:
    _write_json(report, as_json, report_file)
    if not as_json and not quiet:
        with terminal.printing():
            screen = terminal.console()
            screen.print(report)
            screen.print(_conclusion(report), markup=False, soft_wrap=True)


def _write_json(report: Report, as_json: bool, report_file: pathlib.Path | None) -> None:
    if report_file is not None:
        write_file(report_file, f"{report.to_json()}\n".encode())
    if as_json:
        with terminal.printing():
            typer.echo(report.to_json())


def _conclusion(report: Report) -> str:
    """The last line: what came out of it."""
    counts = f"{report.num_fused} of {len(report.sites)} attention sites"
    if report.output:
        return f"{counts} fused; wrote {report.output}"
    if report.num_fused:
        return f"{counts} can be fused; no model was written"
    if report.sites:
        return "nothing was fused, so no model was written; the table says why"
    already = report.nodes_before.get(f"{DOMAIN}::{OP_TYPE}", 0)
    if already:
        return f"nothing to fuse: the model already has {already} {OP_TYPE} nodes; no model was written"
    return (
        "nothing to fuse: the model has no attention (no Softmax between two matrix products, no Attention node); "
        "no model was written"
    )


def main() -> None:
    """Runs the command line; called by __main__.py."""
    terminal.run_app(app)
