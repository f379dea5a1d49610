# SPDX-License-Identifier: Apache-2.0
"""The command `faexport bench`: original against fused model in onnxruntime on a GPU or the CPU, at sizes that count.

cli.py adds it. Each measurement runs in a process of its own (bench_child.py), the two models in turn; what is slow to
import is imported when the command runs.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from faexport.commands import terminal
from faexport.commands.bench_data import CLEARLY, Measured, Row, Timing, bench_label
from faexport.commands.shared_options import (
    FILE,
    Seconds,
    gathered,
    html_option,
    json_option,
    model_argument,
    quiet_option,
)
from faexport.errors import ModelError
from faexport.files import scratch
from faexport.files.output import check_input, check_report, write_file
from faexport.options import Options
from faexport.runtimes.engine import declared, parse_shapes, shape_text

if TYPE_CHECKING:
    import onnx_ir as ir

    from faexport.feeds.inputs import Drawing, InputSpec, Sizes
    from faexport.report.blocks import Block
    from faexport.report.data import Report

LENGTHS = (64, 128, 256, 512, 1024, 2048)
BATCHES = (1, 2, 4, 8, 16)  # where the model has one length
SLOW = 5.0  # seconds of one run of the original, above which the ladder ends
EXAMPLES = """\b
Examples:
  faexport bench model.onnx                          a ladder of lengths
  faexport bench model.onnx --shape input_ids:8x512  one size
  faexport bench model.onnx --padded                 padded batches
  faexport bench model.onnx --device cpu             not on the GPU
  faexport bench model.onnx --json --svg b.svg       for programs, a picture
"""


@dataclasses.dataclass(frozen=True)
class Limits:
    """How to measure: where ("cpu" or "cuda"; "": where this onnxruntime can), runs of each model at each size,
    onnxruntime's threads (0: as it chooses), and the seconds that the measurements of one size may take, each."""

    device: str = "cpu"
    runs: int = 20
    threads: int = 0
    timeout: float = 300.0

    def ask(self, kind: str, models: Sequence[str], tensors: dict[str, Any]) -> Any:
        """The answer of a process of its own. Raises ModelError."""
        from faexport.commands.bench_child import Question, measure

        question = Question(kind, tuple(models), tensors, self.runs, threads=self.threads, device=self.device)
        return measure(question, self.timeout)


@click.command(
    epilog=EXAMPLES, context_settings=terminal.CONTEXT_SETTINGS, short_help="Time MODEL against its fused form."
)
@model_argument
@click.option(
    "--shape",
    "shapes",
    metavar="NAME:SHAPE",
    multiple=True,
    help="A size to measure at: the shape of an input, e.g. ids:8x512, or of several, e.g. ids:8x1,mask:8x513; the "
    "others follow. May be repeated, for more sizes.",
)
@click.option(
    "--padded",
    is_flag=True,
    help="Give every entry of a batch but the first a random length, and pad it on the right.",
)
@click.option(
    "--runs",
    metavar="N",
    type=click.IntRange(min=5),
    default=20,
    show_default=True,
    help="Runs of each model at each size.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    metavar="DEVICE",
    callback=lambda context, option, device: device or "",
    help="Where to run, cpu or cuda; default: cuda where this onnxruntime has it.",
)
@click.option(
    "--threads",
    metavar="N",
    type=click.IntRange(min=0),
    default=0,
    help="Threads of onnxruntime on the CPU; default: as many as it chooses.",
)
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=Seconds(1),
    default=300.0,
    show_default=True,
    help="How long each measurement of a size may take.",
)
@click.option("--svg", metavar="FILE", type=FILE, help="Also draw time and memory against length to this file.")
@html_option
@json_option
@quiet_option
@gathered(limits=Limits)
@terminal.errors_as_json
def bench(
    model: pathlib.Path,
    shapes: tuple[str, ...],
    padded: bool,
    limits: Limits,
    svg: pathlib.Path | None,
    html_file: pathlib.Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Time MODEL against its fused form in onnxruntime: median of runs in turn, memory, and on the CPU the share of
    what is rewritten in the time. On a GPU inputs and outputs stay there, and a run ends when the GPU has. The inputs
    are random; verify with `faexport MODEL`."""
    from faexport.commands import bench_view

    check_input(model)
    check_report(svg, [model], "--svg")
    check_report(html_file, [model], "--html")
    with terminal.progress(quiet) as progress:
        limits = dataclasses.replace(limits, device=limits.device or default_device())
        found = measure(
            model, shapes, limits, progress.step, padded, lambda row: progress.finished(bench_view.line(row))
        )
    rows, sentence = found.rows, conclusion(found.rows)
    picture = bench_view.picture(rows, model.name)
    if svg is not None:
        write_file(svg, picture.encode())
    if html_file is not None:
        from faexport.report import html_page

        found.report.model = str(model)
        text = html_page.page(found.report, found.blocks, html_page.bench(picture, [*found.notes, sentence]))
        write_file(html_file, text.encode())
    if as_json:
        data = {"model": str(model), "device": limits.device, "padded": padded, "rows": [_as_data(row) for row in rows]}
        data |= {"notes": found.notes, "conclusion": sentence}
        with terminal.printing():
            click.echo(json.dumps(data, indent=2))
    elif not quiet:
        with terminal.printing():
            screen = terminal.console()
            screen.print(bench_view.table(rows))
            for line in [*found.notes, sentence]:
                screen.print(line, markup=False)


def default_device() -> str:
    from faexport.runtimes import ort_session

    if missing := ort_session.missing_packages():
        raise ModelError(missing)
    import onnxruntime

    return "cuda" if ort_session.CUDA in onnxruntime.get_available_providers() else "cpu"


@dataclasses.dataclass
class Result:
    """The rows, what there is to say of them, and what was compared: the fusion's report, and by site the blocks that
    its page draws."""

    rows: list[Row]
    notes: list[str]
    report: Report
    blocks: dict[str, tuple[Block, Block]]


def measure(
    model: pathlib.Path,
    shapes: Sequence[str] = (),
    limits: Limits = Limits(),
    on_step: Callable[[str], None] = lambda text: None,
    padded: bool = False,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Result:
    """`padded`: all entries of a batch but the first have random lengths. `on_row` gets each row once it is measured.
    Raises ModelError."""
    from faexport import pipeline
    from faexport.commands.bench_child import NO_GPU
    from faexport.feeds import inputs
    from faexport.files import model_io
    from faexport.report import blocks
    from faexport.spec import DOMAIN, OP_TYPE

    _check_that_it_can_be_measured(limits)
    original = model_io.load(model)
    specs = inputs.input_specs(original)
    for text in shapes:  # what is wrong with them is said before the work begins
        _check_shapes(specs, dict(parse_shapes(text)), original)
    drawing = _drawing(specs, padded)
    on_step("fusing")
    fused, report = pipeline.run(model_io.load(model), Options())
    if not report.num_fused and report.nodes_before.get(f"{DOMAIN}::{OP_TYPE}"):
        raise ModelError(f"{model}: is fused already; give the model that it was made from")
    if not report.num_fused:
        raise ModelError(f"{model}: nothing is fused, so there is nothing to compare; faexport inspect says why")
    pairs = blocks.find_blocks(original, fused)
    attention = {box.name for pair in pairs.values() for block in pair for box in block.boxes if box.op_type}
    result = Result([], [], report, pairs)
    with scratch.folder(what="bench-") as folder:
        path = folder / "fused.onnx"
        model_io.save(fused, path, source=model)
        both = (str(model.absolute()), str(path))
        for tensors in _settings(_related(specs, original, model), shapes, drawing):
            label = bench_label(_sizes(tensors))
            on_step(f"measuring {label}")
            try:
                row = _measured(both, tensors, limits, attention)
            except ModelError as error:
                if not result.rows:
                    hint = "" if str(error) == NO_GPU else _hint(_sizes(tensors))
                    raise ModelError(f"{model}: can't be measured at {label}: {error}{hint}") from error
                result.notes.append(f"not measured at {label}: {error}")
                break
            result.rows.append(row)
            on_row(row)
            if not shapes and row.original.seconds.median > SLOW:
                result.notes.append(f"the ladder ends where a run takes more than {SLOW:g} s; --shape goes on")
                break
    return result


def _check_that_it_can_be_measured(limits: Limits) -> None:
    """Raises ModelError where the packages, the library or the device are missing."""
    from faexport.commands.bench_child import NO_GPU
    from faexport.runtimes import operator_library, ort_session

    if missing := ort_session.missing_packages():
        raise ModelError(missing)
    if limits.device == "cuda" and default_device() != "cuda":
        raise ModelError(NO_GPU)
    operator_library.path()  # without it there is nothing to compare
    if limits.device == "cuda" and (lacking := operator_library.without_cuda_kernels()):
        raise ModelError(f"{lacking}; or --device cpu measures on the CPU")
    if ort_session.problem_of(limits.device) == ort_session.NO_GPU:  # a provider without its driver
        raise ModelError(NO_GPU)


def _sizes(tensors: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: list(array.shape) for name, array in tensors.items()}


def _measured(both: tuple[str, str], tensors: dict[str, Any], limits: Limits, attention: set[str]) -> Row:
    """Both models on these inputs. `attention`: the names of the nodes that are rewritten. Raises ModelError."""
    times = limits.ask("times", both, tensors)
    rest = [_rest(limits, one, tensors, attention) for one in both]
    return Row(_sizes(tensors), *(Measured(_timing(t), *other) for t, other in zip(times, rest, strict=True)))


def _hint(sizes: Mapping[str, Sequence[int]]) -> str:
    """How to give sizes, where those of several inputs may not fit one another."""
    texts = [f"{name}:{shape_text(tuple(shape))}" for name, shape in list(sizes.items())[:2]]
    return f"; if these sizes don't fit one another, give several: --shape {','.join(texts)}" if texts[1:] else ""


def _rest(limits: Limits, model: str, tensors: dict[str, Any], attention: set[str]) -> tuple[int | None, float | None]:
    """Memory of one run of one model, and the share of its nodes' time that those of what is rewritten take."""
    used = limits.ask("memory", [model], tensors)
    if limits.device != "cpu":
        return used, None
    nodes = limits.ask("nodes", [model], tensors)
    total = sum(taken for _, taken in nodes.values())
    inside = sum(taken for name, (op_type, taken) in nodes.items() if name in attention or op_type == "FlashAttention")
    return used, inside / total if total else None


def _drawing(specs: Sequence[InputSpec], padded: bool) -> Drawing:
    """Raises ModelError where the model has no input that tells which entries are shorter."""
    from faexport.feeds.inputs import Drawing, MaskPattern, Role

    told_by = {Role.MASK, Role.WEIGHT, Role.VALID_KEYS, Role.LAST_KEY, Role.LENGTHS}
    if padded and not any(spec.role in told_by for spec in specs):
        names = ", ".join(spec.name for spec in specs)
        raise ModelError(f"--padded: the model has no mask and no lengths; its inputs are {names}")
    return Drawing(MaskPattern.RIGHT_PADDED if padded else MaskPattern.ONES)


def _settings(specs: Sequence[InputSpec], shapes: Sequence[str], drawing: Drawing) -> Iterator[dict[str, Any]]:
    """Inputs for each size: those asked for, else a ladder."""
    import numpy as np

    from faexport.feeds import inputs

    def drawn(sizes: inputs.Sizes, given: dict[str, int]) -> dict[str, Any]:
        bound = inputs.bind(specs, sizes, given)
        try:
            return inputs.draw(specs, bound, drawing, np.random.default_rng(0))
        except inputs.UnsupportedInput as error:
            raise ModelError(str(error)) from error

    if shapes:
        for text in shapes:
            yield _asked(specs, dict(parse_shapes(text)), drawn)
    else:
        for sizes in _ladder(specs):
            yield drawn(sizes, {})


def _ladder(specs: Sequence[InputSpec]) -> list[Sizes]:
    """Several lengths; several batches where the model has one length; or the one size that it has."""
    from faexport.feeds import inputs

    lengths = [inputs.Sizes(batch=1, length=length, past=length) for length in LENGTHS]
    batches = [inputs.Sizes(batch=batch, length=LENGTHS[0], past=LENGTHS[0]) for batch in BATCHES]
    for tried in (lengths, batches):
        if any(inputs.bind(specs, sizes) != inputs.bind(specs, tried[0]) for sizes in tried):
            return tried
    return lengths[:1]


def _related(specs: list[InputSpec], original: ir.Model, path: pathlib.Path) -> list[InputSpec]:
    """The inputs with sizes that belong together, where the model runs with such; else as the file has them."""
    from faexport.feeds import inputs, relations
    from faexport.runtimes import ort_session
    from faexport.verify.reference import needs_library, outputs_or_sentence

    if len(inputs.symbols(specs)) < 2:
        return specs
    try:
        with ort_session.Session(ort_session.Job(str(path), library=needs_library(original))) as session:
            found = relations.fitting(specs, original, lambda x: isinstance(outputs_or_sentence(session, x), dict))
    except (ort_session.ModelFailure, ort_session.CannotRun):
        return specs
    return found or specs


def _check_shapes(specs: Sequence[InputSpec], asked: Mapping[str, Sequence[int]], model: ir.Model) -> None:
    """Raises ModelError where one of the shapes does not fit its input."""
    for name, shape in asked.items():
        spec = next((spec for spec in specs if spec.name == name), None)
        if spec is None:
            names = ", ".join(s.name for s in specs)
            raise ModelError(f"--shape: the model has no input '{name}'; its inputs are {names}")
        fits = len(shape) == len(spec.dims)
        if not fits or any(isinstance(dim, int) and dim != size for dim, size in zip(spec.dims, shape, strict=True)):
            own = next((value.shape for value in model.graph.inputs if value.name == name and value.shape), ())
            dims = declared(dim if isinstance(dim, int) else dim.value for dim in own)
            raise ModelError(f"--shape {name}: {shape_text(tuple(shape))} does not fit the model's {dims}")


def _asked(
    specs: Sequence[InputSpec], asked: Mapping[str, Sequence[int]], drawn: Callable[[Sizes, dict[str, int]], Any]
) -> Any:
    """Inputs of these shapes, and others that fit them. Raises ModelError where there are none."""
    from faexport.feeds import inputs, relations

    shape = next(iter(asked.values()))
    batch, length = shape[0] if shape else 1, shape[1] if len(shape) > 1 else 128
    tensors = drawn(inputs.Sizes(batch=batch, length=length, past=length), relations.solve(asked, specs))
    for name, wanted in asked.items():
        if tuple(wanted) != tensors[name].shape:
            texts = {spec.name: declared(d if isinstance(d, int) else d.value for d in spec.dims) for spec in specs}
            given = ",".join(f"{name}:{shape_text(tuple(shape))}" for name, shape in asked.items())
            raise ModelError(
                f"--shape {given}: '{name}' would be {shape_text(tensors[name].shape)}, since the model has "
                f"{', '.join(f'{name} {texts[name]}' for name in asked)}; name the shapes of more inputs, or others"
            )
    return tensors


def _timing(seconds: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(seconds, n=4)
    return Timing(median, low, high, len(seconds))


def conclusion(rows: Sequence[Row]) -> str:
    """Where it starts to pay, or that it does not, and why."""
    gaining = [row for row in rows if row.gained]
    if not gaining:
        where = "this size" if len(rows) == 1 else "these sizes"
        shares = [row.original.rewritten for row in rows if row.original.rewritten is not None]
        why = f", where what is rewritten takes up to {max(shares):.0%} of the original's time" if shares else ""
        return (
            f"no time is gained at {where}{why}; less than the spread of the runs, or than {CLEARLY - 1:.0%}, "
            "counts as even"
        )
    best = max(gaining, key=lambda row: row.times_as_fast)
    gain = f"{best.times_as_fast:.2f} times as fast at {bench_label(best.sizes)}"
    paying = len(rows)
    while paying and rows[paying - 1].gained:
        paying -= 1
    if paying == len(rows):
        return f"{gain}, and nothing is gained at {bench_label(rows[-1].sizes)}"
    return f"it pays from {bench_label(rows[paying].sizes)} on: {gain}" if paying else gain


def _as_data(row: Row) -> dict[str, Any]:
    return {**dataclasses.asdict(row), "times_as_fast": row.times_as_fast, "gained": row.gained}
