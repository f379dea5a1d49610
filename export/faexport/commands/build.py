# SPDX-License-Identifier: Apache-2.0
"""The commands `faexport build` (an ONNX model into a TensorRT engine) and `faexport run` (an engine on given inputs).

cli.py adds them. engine.py builds, engine_run.py runs. What is slow to import is imported when a command runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import operator
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from faexport.commands import terminal
from faexport.commands.shared_options import FILE, gathered, json_option, model_argument, quiet_option
from faexport.errors import ModelError
from faexport.files import scratch
from faexport.files.output import check_input, check_output, write_file
from faexport.options import Options
from faexport.runtimes import engine
from faexport.runtimes.engine import EngineReport, Range, Runtime, shape_text

if TYPE_CHECKING:
    import onnx_ir as ir

BUILD_EXAMPLES = """\b
Examples:
  faexport build model.onnx                          fused, to model.plan
  faexport build model.onnx --min ids:1x1 --opt ids:1x128 --max ids:8x512
  faexport build model.onnx --runtime tensorrt-rtx   not fused: no plugins
"""
RUN_EXAMPLES = """\b
Examples:
  faexport run model.plan --inputs in.npz                      print outputs
  faexport run model.plan --inputs in.npz --model model.onnx   compare
"""
KNOWN_TO_TENSORRT = ("Gelu",)  # of the operators that around/joins.py writes: its parser looks at names alone
runtime_option = click.option(
    "--runtime",
    type=click.Choice([kind.value for kind in Runtime]),
    metavar="NAME",
    help="Which TensorRT, tensorrt or tensorrt-rtx; default: the first of them that is installed.",
)


@dataclasses.dataclass(frozen=True)
class Building:
    """The options that say what the engine is to be: those of engine.Options, as they are typed."""

    least: tuple[str, ...]
    best: tuple[str, ...]
    most: tuple[str, ...]
    profile: tuple[pathlib.Path, ...]
    workspace: int | None
    timing_cache: pathlib.Path | None
    version_compatible: bool
    hardware_compatible: bool
    compute_capability: tuple[str, ...]

    def options(self, on_log: Callable[[str], None]) -> engine.Options:
        """Raises ModelError."""
        asked = self.least or self.best or self.most
        profiles = [engine.make_profile(self.least, self.best, self.most)] if asked else []
        return engine.Options(
            profiles=profiles + [_read_profile(path) for path in self.profile],
            workspace_bytes=None if self.workspace is None else self.workspace << 20,
            timing_cache=self.timing_cache,
            version_compatible=self.version_compatible,
            hardware_compatible=self.hardware_compatible,
            compute_capabilities=[_compute_capability(text) for text in self.compute_capability],
            on_log=on_log,
        )


@click.command(
    epilog=BUILD_EXAMPLES,
    context_settings=terminal.CONTEXT_SETTINGS,
    short_help="Build a TensorRT engine from MODEL.",
)
@model_argument
@click.option("--output", "-o", metavar="FILE", type=FILE, help="Where to write; default: MODEL with the ending .plan.")
@runtime_option
@click.option(
    "--min",
    "least",
    metavar="NAME:SHAPE",
    multiple=True,
    help="Smallest shape of an input, e.g. ids:1x1, or of several: ids:1x1,mask:1x1. May be repeated.",
)
@click.option("--opt", "best", metavar="NAME:SHAPE", multiple=True, help="Shape to tune for. May be repeated.")
@click.option("--max", "most", metavar="NAME:SHAPE", multiple=True, help="Largest shape. May be repeated.")
@click.option(
    "--profile",
    metavar="FILE",
    type=FILE,
    multiple=True,
    help='More shapes, as JSON: {"ids": {"min": [1, 1], "opt": [1, 128], "max": [8, 512]}}. May be repeated.',
)
@click.option(
    "--workspace",
    metavar="MIB",
    type=click.IntRange(min=0, max=1 << 40),
    help="Most scratch memory that the engine may take, in MiB.",
)
@click.option(
    "--timing-cache",
    metavar="FILE",
    type=FILE,
    help="File of kernel timings: read where it is there, and written afterwards.",
)
@click.option("--version-compatible", is_flag=True, help="The engine runs in later minor versions of TensorRT too.")
@click.option(
    "--hardware-compatible", is_flag=True, help="The engine runs on every GPU from Ampere on, not only this kind."
)
@click.option(
    "--compute-capability", metavar="X.Y", multiple=True, help="For TensorRT-RTX: a GPU to build for. May be repeated."
)
@click.option("--fuse/--no-fuse", default=True, show_default=True, help="Put flash attention into the model first.")
@json_option
@click.option("--verbose", "-v", is_flag=True, help="Show TensorRT's log on stderr.")
@quiet_option
@gathered(building=Building)
@terminal.errors_as_json
def build(
    model: pathlib.Path,
    output: pathlib.Path | None,
    runtime: str | None,
    building: Building,
    fuse: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Build a TensorRT engine from MODEL, its attention fused first. Tensors keep the model's types."""
    kind, module = engine.find_runtime(Runtime(runtime) if runtime else None)
    check_input(model)
    target = output or model.with_suffix(".plan")
    check_output(target, [model])
    if building.timing_cache is not None:
        check_output(building.timing_cache, [model, target], "--timing-cache")
    log = terminal.console(stderr=True)
    options = building.options(
        (lambda line: log.print(line, markup=False, soft_wrap=True)) if verbose else lambda line: None
    )
    with Bars(quiet) as bars:
        bars.say("starting TensorRT")
        builder = engine.EngineBuilder(kind, module, options)
        with prepared(model, kind, fuse, bars) as (path, num_nodes, notes):
            bars.say("parsing")
            builder.parse(path)
            bars.say("building")
            content, report = builder.build(bars)
        write_file(target, content)
    report.notes[:0] = notes
    if as_json and not quiet:
        data = {"model": str(model), "output": str(target), "num_plugin_nodes": num_nodes, **dataclasses.asdict(report)}
        click.echo(json.dumps(data, indent=2))
    elif not quiet:
        _show(report, target, num_nodes)


@contextlib.contextmanager
def prepared(
    model: pathlib.Path, kind: Runtime, fuse: bool, bars: Bars
) -> Iterator[tuple[pathlib.Path, int, list[str]]]:
    """The file to parse, how many of our nodes it has, what there is to say; the plugin is registered."""
    from faexport import pipeline
    from faexport.fallback import stand_in_copy
    from faexport.files import model_io
    from faexport.spec import OP_TYPE

    bars.say(f"reading {model.name}")
    loaded = model_io.load(model)
    num_nodes = count_operators(loaded)
    _refuse_operators_of_onnxruntime(model, loaded)
    with contextlib.ExitStack() as stack:
        if kind is Runtime.TENSORRT_RTX:
            notes = ["TensorRT-RTX takes no plugins: attention is left as it is"] if fuse else []
            if num_nodes:
                notes = [f"TensorRT-RTX takes no plugins: {num_nodes} × {OP_TYPE} became standard operators"]
                path = stack.enter_context(scratch.folder(what="build-")) / "model.onnx"
                stand_in_copy.inline(loaded, model)
                model_io.save(loaded, path, source=model)
                model = path
            yield model, 0, notes
            return
        notes = []
        if fuse and not num_nodes:
            bars.say("fusing")
            fused, fused_report = pipeline.run(loaded, Options(target="tensorrt", fallback=False))
            num_nodes = fused_report.num_fused
            notes.append(f"{num_nodes} of {len(fused_report.sites)} attention sites fused; faexport inspect tells more")
            if num_nodes:
                path = stack.enter_context(scratch.folder(what="build-")) / "model.onnx"
                model_io.save(fused, path, source=model)
                model = path
        if num_nodes:
            _register_plugin()
        yield model, num_nodes, notes


def _register_plugin() -> None:
    try:
        import faplugin.trt

        faplugin.trt.register()
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(f"the TensorRT plugin can't be registered: {error}") from error


def count_operators(model: ir.Model) -> int:
    """How many nodes of ours a model has, in all its graphs."""
    from faexport.graph.fused import is_fused
    from faexport.graph.nodes import all_nodes

    return sum(map(is_fused, all_nodes(model)))


def _refuse_operators_of_onnxruntime(path: pathlib.Path, model: ir.Model) -> None:
    """Raises ModelError where a file was written for onnxruntime."""
    from faexport.around.joins import counts

    if found := {name: number for name, number in counts(model).items() if name not in KNOWN_TO_TENSORRT}:
        names = ", ".join(f"{number} {name}" for name, number in sorted(found.items()))
        raise ModelError(
            f"{path}: was written for onnxruntime: it has {names}, which TensorRT doesn't know; build the model that "
            "it was made from, or write it again with faexport --target tensorrt"
        )


def _compute_capability(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,3}\.[0-9]", text):
        raise ModelError(f"--compute-capability {text}: expected X.Y, e.g. 8.9")
    return int(text.replace(".", ""))


def _read_profile(path: pathlib.Path) -> engine.Profile:
    check_input(path)
    try:
        content = json.loads(path.read_text("utf-8"))
        return {
            name: engine.check_range(
                name, Range(*(tuple(map(operator.index, corners[key])) for key in ("min", "opt", "max")))
            )
            for name, corners in content.items()
        }
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        example = '{"ids": {"min": [1, 1], "opt": [1, 128], "max": [8, 512]}}'
        raise ModelError(f"{path}: is not a profile ({type(error).__name__}: {error}); expected {example}") from error


class Bars(engine.Monitor, contextlib.AbstractContextManager):
    """TensorRT's phases as progress bars, one below the other; where stderr is no terminal, as a line now and then."""

    def __init__(self, quiet: bool) -> None:
        import rich.progress

        screen = terminal.console(stderr=True)
        columns = (
            rich.progress.SpinnerColumn(),
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
        )
        self._bars = rich.progress.Progress(
            *columns, console=screen, transient=True, disable=quiet or not screen.is_terminal
        )
        self._shown, self._quiet = contextlib.ExitStack(), quiet
        self._tasks: dict[str, Any] = {}
        self._depths: dict[str, int] = {}
        self._said = self._bars.add_task("", total=None)

    def __enter__(self) -> Bars:
        self._shown.enter_context(terminal.shown(self._bars, self._quiet))
        return self

    def __exit__(self, *exception: object) -> None:
        self._shown.close()

    def say(self, text: str) -> None:
        self._bars.update(self._said, description=text)

    def start(self, phase: str, parent: str | None, num_steps: int) -> None:
        self._depths[phase] = self._depths.get(parent or "", 0) + 1
        self._tasks[phase] = self._bars.add_task("  " * self._depths[phase] + phase, total=num_steps)

    def step(self, phase: str, step: int) -> bool:
        self._bars.update(self._tasks[phase], completed=step)
        return True

    def finish(self, phase: str) -> None:
        self._bars.remove_task(self._tasks.pop(phase))


def _show(report: EngineReport, target: pathlib.Path, num_nodes: int) -> None:
    import rich.markup
    import rich.table

    from faexport.spec import OP_TYPE

    table = rich.table.Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = [
        ("engine", f"{target} ({_size_text(report.engine_bytes)})"),
        ("built", f"in {report.seconds:.1f} s by {report.runtime} {report.version}"),
        ("layers", f"{report.num_layers}, of which {num_nodes} {OP_TYPE}"),
    ]
    for index, profile in enumerate(report.profiles):
        for name, given in profile.items():
            corners = dict.fromkeys(shape_text(corner) for corner in dataclasses.astuple(given))
            label = "inputs" if len(report.profiles) == 1 else f"inputs, profile {index}"
            rows.append((label, f"{name}: {' … '.join(corners)}"))
    rows += [("note", note) for note in report.notes]
    for label, text in rows:
        table.add_row(label, rich.markup.escape(text))
    terminal.console().print(table)


def _size_text(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.1f} KiB"


@click.command(
    epilog=RUN_EXAMPLES,
    context_settings=terminal.CONTEXT_SETTINGS,
    short_help="Run an engine on inputs from a file.",
)
@click.argument("engine_file", metavar="ENGINE", type=FILE)
@click.option("--inputs", metavar="FILE", type=FILE, required=True, help="An .npz with an array for each input.")
@click.option("--output", "-o", metavar="FILE", type=FILE, help="Write the outputs to this .npz.")
@click.option("--model", metavar="MODEL", type=FILE, help="The ONNX model, to compare with onnxruntime.")
@runtime_option
@json_option
@quiet_option
@terminal.errors_as_json
def run(
    engine_file: pathlib.Path,
    inputs: pathlib.Path,
    output: pathlib.Path | None,
    model: pathlib.Path | None,
    runtime: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run ENGINE on inputs from a file; with --model, compare with onnxruntime (exit code 1 where they differ)."""
    from faexport.commands import engine_run
    from faexport.files import model_io
    from faexport.report.data import json_text

    tensors = model_io.read_arrays(inputs)
    if output is not None:
        check_output(output, [engine_file, inputs, *([model] if model else [])])
    kind, module = engine.find_runtime(Runtime(runtime) if runtime else None)
    result = engine_run.run(kind, module, engine_file, tensors)
    if output is not None:
        engine_run.write_outputs(output, result.outputs)
    differences = engine_run.compare(model, tensors, result.outputs) if model else []
    if as_json and not quiet:
        outputs = {name: {"dtype": str(array.dtype), "shape": array.shape} for name, array in result.outputs.items()}
        report = {"milliseconds": result.milliseconds, "outputs": outputs}
        click.echo(json_text({**report, "differences": [dataclasses.asdict(item) for item in differences]}))
    elif not quiet:
        terminal.console().print(engine_run.table(result, differences))
    if any(not item.ok for item in differences):
        worst = next(item for item in differences if not item.ok)
        terminal.print_error(
            f"{engine_file}: output '{worst.name}' differs by {worst.max_abs_diff:.3g}; allowed: {worst.tolerance:.3g}"
        )
        raise click.exceptions.Exit(terminal.EXIT_NOT_VERIFIED)
