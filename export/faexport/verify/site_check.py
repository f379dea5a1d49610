# SPDX-License-Identifier: Apache-2.0
"""Compares each fused site by itself, on the tensors that the original model feeds it. Called by model_check.py.

side_by_side.py makes the model, onnxruntime runs it (without its optimizations, so that the original's nodes compute
what they say), and this judges what comes out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence

import onnx_ir as ir

from faexport.feeds.open_sizes import OpenSizes, excuse
from faexport.feeds.settings import InputSet
from faexport.files import model_io, scratch
from faexport.files.graph_checks import external_tensors
from faexport.graph.normalize import convert_opset, inline_functions
from faexport.report.data import SiteComparison
from faexport.runtimes import ort_session
from faexport.runtimes.ort_session import CannotRun, Job, ModelFailure
from faexport.spec import DOMAIN
from faexport.verify import side_by_side
from faexport.verify.reference import Opener, advice
from faexport.verify.side_by_side import Point
from faexport.verify.side_by_side_math import Statistics
from faexport.write.dequantize import DEQUANTIZED, expand

ROUNDING_FACTOR = 2.0  # times as far from the same in float32 as the original is: the rule of FlashAttention's tests
# Of the magnitude: an original that is so far from itself in float32 says nothing, and its error allows none of ours.
TOO_NOISY = 0.1
# Of the numbers of a quantized cache so many times the relative tolerance may be neighbours of the original's, since a
# rounding in front of it may move a number over a boundary; rounding in another direction moves half of them.
FLIPS, MOST_FLIPS = 32, 0.25


@dataclasses.dataclass
class SiteCheck:
    """What became of it. `rows` has one comparison a value, that of the set where it came out worst."""

    rows: list[SiteComparison] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)  # what could not be compared by itself, and why
    lost: set[int] = dataclasses.field(default_factory=set)  # sets with elements that are NaN in the original only
    # Of the rewritten nodes, where the original runs: on which set, and a sentence.
    failures: dict[int, str] = dataclasses.field(default_factory=dict)
    problem: str = ""  # why nothing could be compared: no memory, no time, no room on the disk
    compared: set[int] = dataclasses.field(default_factory=set)  # sets

    @property
    def worst(self) -> SiteComparison | None:
        """The comparison that failed, if one did."""
        return next((row for row in self.rows if not row.ok), None)


def check(
    original: os.PathLike[str] | str,
    rewritten: ir.Model,
    sets: Sequence[InputSet],
    *,
    library: bool,
    allowed: float,
    twins: bool,
    open_session: Opener,
    open_sizes: OpenSizes,
    on_amount: Callable[[int, int], None] = lambda done, total: None,
) -> SiteCheck:
    """Compares everything that the rewritten model computes otherwise.

    Args:
        original: the .onnx file.
        sets: inputs that the original runs on.
        library: the operator's library is there; where the model carries the stand-in function, that is compared too.
        allowed: the relative tolerance.
        twins: judge by the same in float32 as well (side_by_side.build).
        open_sizes: of the original.
    """
    stand_in = any(function.domain == DOMAIN for function in rewritten.functions.values())
    checker = _Checker(original, rewritten, sets, allowed, open_session, on_amount, twins)
    result, failed = checker.attempt(library, stand_in)
    if failed and library and stand_in:
        # One of them failed, and took the other's results with it.
        result, failed = SiteCheck(), {}
        for kinds in ((True, False), (False, True)):
            part, part_failed = checker.attempt(*kinds)
            _add(result, part)
            failed |= part_failed
    open_ones = {index: why for index in failed if (why := excuse(open_sizes, rewritten, sets[index].tensors))}
    running = checker.original_runs_on([index for index in failed if index not in open_ones])
    for index, sentence in failed.items():
        if index in open_ones:
            result.left_out.append(f"{open_ones[index]}, on {sets[index].label}")
        elif index in running:
            result.failures[index] = sentence
        else:
            how = checker.conversion or "without onnxruntime's optimizations"
            result.left_out.append(f"{how} the original does not run on {sets[index].label}")
    return result


def _add(result: SiteCheck, part: SiteCheck) -> None:
    result.rows += part.rows
    result.left_out += [sentence for sentence in part.left_out if sentence not in result.left_out]
    result.problem = result.problem or part.problem
    result.lost |= part.lost
    result.compared |= part.compared


class _Checker:
    def __init__(
        self,
        original: os.PathLike[str] | str,
        rewritten: ir.Model,
        sets: Sequence[InputSet],
        allowed: float,
        open_session: Opener,
        on_amount: Callable[[int, int], None],
        twins: bool,
    ):
        self.original, self.rewritten, self.sets = original, rewritten, sets
        self.allowed, self.open_session, self.on_amount = allowed, open_session, on_amount
        self.twins = twins
        self.conversion = ""  # how the original was converted, where it was

    def attempt(self, library: bool, stand_in: bool) -> tuple[SiteCheck, dict[int, str]]:
        """The comparisons, and for each set that the model of both fails on a sentence."""
        beside = self._build(library, stand_in, twins=self.twins)
        result = SiteCheck(left_out=beside.left_out)
        failed: dict[int, str] = {}
        if not beside.points:
            return result, failed
        try:
            try:
                self._run(beside, library, result, failed)
            except ModelFailure:  # perhaps an operator that onnxruntime has no float32 kernel for
                if not self.twins:
                    raise
                beside = self._build(library, stand_in, twins=False)
                self._run(beside, library, result, failed)
        except (ModelFailure, ort_session.Crashed) as error:
            result.left_out.append(f"no site could be compared by itself: {error}")
        except CannotRun as error:
            result.problem = f"the sites can't be compared by themselves: {error}{advice(error)}"
        except OSError as error:
            where = f"the temporary folder {tempfile.gettempdir()}: {error.strerror} (TMPDIR chooses another)"
            result.problem = f"the sites can't be compared by themselves in {where}"
        return result, failed

    def original_runs_on(self, indices: Sequence[int]) -> set[int]:
        """The sets on which what the sites are compared with runs, too: the original without onnxruntime's
        optimizations and, where it was converted, as onnx's converter writes it. That may be for fewer sizes: a Softmax
        of opset 12 becomes one between a Flatten and a Reshape to sizes of which 0 means another."""
        todo, found = list(indices), set[int]()
        if not todo:
            return found
        with scratch.folder(what="sites-") as folder:
            while todo:
                before = len(todo)
                try:
                    with self.open_session(self._old_job(folder)) as session:
                        while todo:
                            index = todo.pop(0)
                            with contextlib.suppress(ModelFailure):
                                session.run(self.sets[index].tensors)
                                found.add(index)
                except (ModelFailure, CannotRun):
                    if len(todo) == before:  # it doesn't load
                        return found
        return found

    def _old_job(self, folder: pathlib.Path) -> Job:
        if self.conversion:
            return self._job(self._old(), folder, library=False)
        return Job(os.fspath(self.original), optimize=False, library=False)

    def _old(self) -> ir.Model:
        """The original, converted to the rewritten model's opset."""
        old = model_io.load(self.original)
        opset = self.rewritten.opset_imports.get("", 0)
        if old.opset_imports.get("", opset) == opset:
            return old
        self.conversion = f"converted to opset {opset}"
        return convert_opset(old, opset)

    def _build(self, library: bool, stand_in: bool, *, twins: bool) -> side_by_side.SideBySide:
        old = inline_functions(self._old())
        if names := json.loads(self.rewritten.metadata_props.get(DEQUANTIZED, "[]")):
            expand(old, only=names)
        return side_by_side.build(old, self.rewritten, library=library, stand_in=stand_in, twins=twins)

    def _run(self, beside: side_by_side.SideBySide, library: bool, result: SiteCheck, failed: dict[int, str]) -> None:
        """Raises ModelFailure where onnxruntime can't load the model, CannotRun where it can't go on."""
        names = {value.name for value in beside.model.graph.inputs}
        worst: dict[str, SiteComparison] = {}
        with scratch.folder(what="sites-") as folder:
            job = self._job(beside.model, folder, library)
            with self.open_session(job) as session:
                for index, item in enumerate(self.sets):
                    self.on_amount(index, len(self.sets))
                    try:
                        outputs = session.run({n: t for n, t in item.tensors.items() if n in names})
                    except ModelFailure as error:
                        failed[index] = f"the fused attention does not run on {item.label}: {error}"
                        continue
                    result.compared.add(index)
                    for point in beside.points:
                        found = Statistics.read(outputs[point.output])
                        if found.num_lost:
                            result.lost.add(index)
                        row = judge(point, found, self.allowed, item)
                        before = worst.get(point.output)
                        worst[point.output] = row if before is None else _worse(before, row)
        result.rows += [row for row in worst.values() if row.num_sets]
        result.left_out += [f"'{row.value}' is never a number" for row in worst.values() if not row.num_sets]

    def _job(self, model: ir.Model, folder: pathlib.Path, library: bool) -> Job:
        weights = next(external_tensors(model), None)
        if weights is not None:
            content, home = ir.to_proto(model).SerializeToString(), os.path.abspath(weights.base_dir)
            return Job(content, optimize=False, library=library, external_data=home)
        path = folder / "model.onnx"
        try:
            model_io.save(model, path)
        except model_io.ModelError as error:
            raise CannotRun(f"{error} (TMPDIR chooses another folder)") from error
        return Job(os.fspath(path), optimize=False, library=library)


def judge(point: Point, found: Statistics, allowed: float, item: InputSet) -> SiteComparison:
    """One comparison, on one set of inputs. `allowed` is the relative tolerance."""
    difference, tolerance = found.max_abs_diff, allowed * found.magnitude
    errors, most = (found.twin_to_old, found.twin_to_rounded), TOO_NOISY * found.magnitude
    if difference > tolerance and point.all_keys:
        difference = found.twin_to_new if 0 < found.twin_to_old <= most else difference
    elif difference > tolerance and any(errors):
        own = [error for error in errors if error <= most]
        difference = found.twin_to_new
        tolerance = max([tolerance, *(ROUNDING_FACTOR * error for error in own)])
    fault = ""
    near = found.num_rounded > 0 and found.rounded_to_new <= allowed * found.magnitude
    if near and not found.num_unlike_rounded and not found.num_other_sizes:
        # It is what the file says, whatever the CPU makes of that without some of its roundings.
        difference = min(difference, found.rounded_to_new)
    elif found.num_other_sizes:
        fault = "has another shape"
    elif found.num_broken and not point.dtype.startswith(("float", "bfloat")):
        fault = f"differs in {found.num_broken:.0f} elements"
    elif found.num_flipped > min(FLIPS * allowed, MOST_FLIPS) * found.num_numbers:
        fault = f"differs by one in {found.num_flipped:.0f} of {found.num_numbers:.0f} elements of a quantized cache"
    elif found.num_broken:
        fault = (
            f"is NaN or infinite in {found.num_broken:.0f} elements where the original is not, or the other way round"
        )
    elif found.num_lost_to_numbers and not found.num_bad_inputs:
        fault = f"is a number in {found.num_lost_to_numbers:.0f} elements where the original is NaN"
    elif not difference <= tolerance:
        fault = f"differs by {difference:.3g}, allowed is {tolerance:.3g}"
    ours, original = (found.unquantized_to_new, found.unquantized_to_old) if point.quantized else (None, None)
    return SiteComparison(
        point.site, point.value, point.dtype, point.by_stand_in, difference, tolerance, int(found.num_numbers > 0),
        item.label, fault, ours, original, item.any_numbers,
    )  # fmt: skip


def _worse(a: SiteComparison, b: SiteComparison) -> SiteComparison:
    """The worse of two comparisons of one value, over the sets of both."""
    worse = max(a, b, key=lambda row: (not row.ok, row.share))
    farther = max(a, b, key=lambda row: row.quantization_error or 0)
    return dataclasses.replace(
        worse,
        num_sets=a.num_sets + b.num_sets,
        quantization_error=farther.quantization_error,
        original_quantization_error=farther.original_quantization_error,
    )
