# SPDX-License-Identifier: Apache-2.0
"""From a file to a file in one call: read, fuse, write beside the target, verify, move there. Called by the commands,
and by whoever uses faexport as a library."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from faexport import diagnosis
from faexport.errors import ModelError, NotVerifiedError
from faexport.fallback import formulas
from faexport.feeds.settings import Assumed, InputSet
from faexport.files import model_io, scratch
from faexport.files.graph_checks import external_tensors
from faexport.files.output import check_input, check_output, default_target
from faexport.files.signals import uninterrupted
from faexport.options import DEVICES, VERIFY_TIMEOUT, Options, as_in_python, named_as_in_python
from faexport.report import provenance
from faexport.report.data import Report, Verification, VerificationStatus, count_nodes
from faexport.runtimes import genai, ort_session
from faexport.verify import model_check as verification
from faexport.verify.reference import Reference, make_reference

if TYPE_CHECKING:
    from faexport.precision import float8_check


@dataclasses.dataclass(frozen=True)
class Watcher:
    """Is told what is being done, and how much of it; by default nobody is."""

    step: Callable[[str], None] = lambda text: None
    amount: Callable[[float, float], None] = lambda done, total: None


@dataclasses.dataclass(frozen=True)
class Job:
    """One model to optimize, and how."""

    model: pathlib.Path
    target: pathlib.Path
    options: Options = Options()
    check: bool = True  # compare the models; where that fails, nothing is written
    timeout: float = VERIFY_TIMEOUT  # seconds that loading a model, and each run, may take
    inputs: pathlib.Path | None = None  # an .npz with an array for each input, to compare on as well
    dry_run: bool = False  # do everything but write the model
    report_file: pathlib.Path | None = None  # written by the caller afterwards: it may not be a file of weights
    verify_on: str = "cpu"  # one of options.DEVICES: where both models are run


def run(job: Job, report: Report, watcher: Watcher = Watcher()) -> ir.Model:
    """Does the job and returns the rewritten model. Fills in the report as it goes, so that it tells how far it came
    where an exception ends it. Where verification fails with what was joined around attention, and nobody asked for
    that, the model is made once more without.

    Raises:
        ModelError: bad input, or a file that can't be written. One sentence.
        NotVerifiedError: the rewritten model differs, or could not be compared; nothing was written.
    """
    try:
        return _run(job, report, watcher)
    except NotVerifiedError:
        found = (report.verification, report.half_precision)
        reasons = [one.reason for one in found if one is not None and one.status is VerificationStatus.FAILED]
        reasons += [report.verification.lost_optimizations] if report.verification is not None else []
        if not _may_join_nothing(job.options) or not any(reasons):
            raise
        reason = next(filter(None, reasons))
        why = f"nothing is joined around attention, since verification fails with that: {reason}"
    vars(report).update(vars(Report(model=report.model)))
    options = dataclasses.replace(job.options, rest=False)
    fused = _run(dataclasses.replace(job, options=options), report, watcher)
    report.notes.append(why)
    return fused


def _may_join_nothing(options: Options) -> bool:
    """Is something joined around attention that nobody asked for?"""
    return options.rest is None and options.joins_rest


def _run(job: Job, report: Report, watcher: Watcher) -> ir.Model:
    report.provenance = origin = provenance.begin(job.options)
    with origin.timed("read"):
        source = read(job.model, job.report_file, watcher)
        model_io.check_target(source, job.target, job.model)
        given = read_inputs(job.inputs, source) if job.inputs else []
        origin.files_read = provenance.records([job.model, *(tensor.path for tensor in external_tensors(source))])
    with origin.timed("fuse"):
        watcher.step("fusing")
        fused = fuse(source, job.options, job.model, report)
    if not report.num_fused:
        return fused
    provenance.stamp(fused, report, job.options)
    with contextlib.ExitStack() as stack:
        with origin.timed("write"):
            stage = stack.enter_context(_staged(fused, job, watcher))
        prepared = _prepare_precision(job, stage, len(given))
        with origin.timed("verify"):
            measures = job.options.half or job.options.float8
            reference = _reference(job, given, watcher) if job.check or measures else None
            if job.check:
                report.verification = _verify(job, stage, reference, watcher)
                if why := _failure(report.verification, job):
                    raise NotVerifiedError(why)
                if _may_join_nothing(job.options) and (why := report.verification.lost_optimizations):
                    raise NotVerifiedError(why)
        if job.options.half:
            with origin.timed("bf16" if job.options.bf16 else "fp16"):
                fused, stage = _in_half(job, stage, reference, report, stack, watcher)
        if job.options.float8:
            with origin.timed("float8"):
                fused, stage = _in_float8(job, prepared, reference, len(given), report, stack, watcher)
        if not job.dry_run:
            with uninterrupted():
                written = stage.commit()
                report.output = str(job.target)
            origin.files_written = provenance.records(written)
    return fused


def run_any(job: Job, report: Report, watcher: Watcher = Watcher()) -> ir.Model:
    """run() where the job's model is a file, run_folder() where it is a folder of onnxruntime-genai."""
    if not job.model.is_dir():
        check_input(job.model)
        return run(job, report, watcher)
    folder = genai.read(job.model)
    report.model = str(folder.decoder)
    return run_folder(folder, dataclasses.replace(job, model=folder.decoder), report, watcher)


def model_file(path: pathlib.Path) -> pathlib.Path:
    """The file to read: the path itself, or the decoder of a folder of onnxruntime-genai. Raises ModelError."""
    if path.is_dir():
        return genai.read(path).decoder
    check_input(path)
    return path


def target_of(model: pathlib.Path) -> pathlib.Path:
    """Where a model, or a folder of onnxruntime-genai, is written where nothing else is said."""
    return genai.default_target(model) if model.is_dir() else default_target(model)


def run_folder(folder: genai.Folder, job: Job, report: Report, watcher: Watcher = Watcher()) -> ir.Model:
    """The same for the decoder of a folder of onnxruntime-genai; `job` has the decoder's file and the folder to write.
    What else is in the folder is copied, and the operator's library comes beside the decoder. Raises as run() does."""
    genai.check_target(folder, job.target)
    if job.dry_run:
        with scratch.folder(what="dry-") as place:
            return run(dataclasses.replace(job, target=place / job.target.name), report, watcher)
    place = job.target
    try:
        with genai.copied(folder, job.target, watcher.step) as place:
            fused = run(dataclasses.replace(job, target=place), report, watcher)
    except (ModelError, NotVerifiedError) as error:
        raise type(error)(str(error).replace(str(place), str(job.target))) from error
    finally:
        report.output = str(job.target) if report.output and job.target.exists() else None
    if report.output:
        assert report.provenance is not None
        decoder = job.target / folder.decoder.relative_to(folder.path)
        weights = external_tensors(model_io.load(decoder))
        report.provenance.files_written = provenance.records([decoder, *(tensor.path for tensor in weights)])
    return fused


def optimize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    options: Options | None = None,
    *,
    verify: bool = True,
    inputs: str | os.PathLike[str] | None = None,
    timeout: float = VERIFY_TIMEOUT,
    dry_run: bool = False,
    verify_on: str = "cpu",
) -> Report:
    """Fuses the attention of an .onnx file, compares both models in onnxruntime, and writes the result.

    Args:
        model: the file to read, or a folder of onnxruntime-genai, which is copied; neither is ever changed.
        out: where to write: a file, or a folder that is there, in which a file gets the model's name; by default beside
            the model, with the ending .fa.onnx, of a folder .fa.
        options: what to fuse, and how.
        verify: compare the models, and write nothing where they differ.
        inputs: an .npz with an array for each input, to compare on besides random ones.
        timeout: seconds that loading a model in onnxruntime, and each run, may take.
        dry_run: do everything but write the model.
        verify_on: where both models are run, "cpu" or "cuda".

    Returns:
        The report. Its `output` is the path written, or None where there was nothing to fuse.

    Raises:
        ModelError: the model can't be used, or the result can't be written. One sentence, and nothing was written.
        NotVerifiedError: the models differ, or could not be compared; nothing was written. Its `report` tells more.
        TypeError, ValueError: an argument is none of what is expected.
    """
    if verify_on not in DEVICES:
        raise ValueError(f"verify_on is '{verify_on}'; expected {' or '.join(DEVICES)}")
    if not timeout > 0:
        raise ValueError(f"timeout is {timeout}; expected seconds, more than 0")
    if options is not None and not isinstance(options, Options):
        raise TypeError(f"options is of type {type(options).__name__}; expected faexport.Options")
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"model is of type {type(model).__name__}; expected a path (fuse() takes a model in memory)")
    source = pathlib.Path(model)
    own = pathlib.Path(inputs) if inputs is not None else None
    report = Report(model=str(source))
    with named_as_in_python():
        try:
            job = Job(
                source,
                _chosen_target(source, out),
                options or Options(),
                verify,
                timeout,
                own,
                dry_run,
                verify_on=verify_on,
            )
            if job.check or job.options.half or job.options.float8:
                ort_session.check_device(verify_on)
            run_any(job, report)
        except NotVerifiedError as error:
            report.error = as_in_python(str(error))
            error.report = report
            raise
    return report


def _chosen_target(source: pathlib.Path, out: str | os.PathLike[str] | None) -> pathlib.Path:
    """The file to write, or the copy of a folder of genai. Raises ModelError."""
    if out is None:
        return target_of(source)
    if source.is_dir():
        return pathlib.Path(out)
    if os.path.isdir(out):
        return pathlib.Path(out) / source.name
    if os.fspath(out).endswith(os.sep):
        raise ModelError(f"{out}: this folder does not exist; create it or choose another place with -o")
    return pathlib.Path(out)


def read(path: pathlib.Path, report_file: pathlib.Path | None, watcher: Watcher) -> ir.Model:
    """The model. Raises ModelError where it can't be used, or where the report would overwrite its weights."""
    watcher.step(f"reading {path.name}")
    source = model_io.load(path)
    if report_file is not None:
        check_output(report_file, [tensor.path for tensor in external_tensors(source)], "--report", streams=True)
    return source


def fuse(source: ir.Model, options: Options, path: pathlib.Path, report: Report) -> ir.Model:
    """The rewritten model; fills in what the report says of its sites and nodes."""
    fused, found = diagnosis.fuse(source, options, path)
    report.sites, report.nodes_before, report.nodes_after = found.sites, found.nodes_before, found.nodes_after
    report.notes, report.joined = found.notes, found.joined
    report.defects, report.invalid_nodes = found.defects, found.invalid_nodes
    return fused


@contextlib.contextmanager
def _staged(model: ir.Model, job: Job, watcher: Watcher, external: bool = False) -> Iterator[model_io.Stage]:
    """The rewritten model in a file: beside the target, or on a dry run in the system's temporary folder. `external`:
    with its weights in another one."""
    watcher.step(f"writing {job.target.name}")
    with contextlib.ExitStack() as stack:
        target = job.target
        if job.dry_run:
            target = stack.enter_context(scratch.folder(what="dry-")) / target.name
        with diagnosis.blaming(job.model):
            stage = stack.enter_context(
                model_io.staged(model, target, source=job.model, progress=watcher.amount, external=external)
            )
        yield stage


def _reference(job: Job, given: list[InputSet], watcher: Watcher) -> Reference | None:
    """The original and what it gives; None without onnxruntime."""
    if ort_session.missing_packages():
        return None
    watcher.step("running the original")
    chosen = job.options
    reference = make_reference(
        job.model,
        extra_inputs=given,
        given_must_run=True,
        assumed=Assumed(chosen.assume_right_padding, chosen.assume_full_rows, chosen.assume_zeros_and_ones),
        open_session=functools.partial(ort_session.Session, timeout=job.timeout, device=job.verify_on),
        on_amount=watcher.amount,
    )
    if job.verify_on != "cpu" and not reference.problem:
        reference.notes.append("both models were run by onnxruntime's CUDA provider, float32 without TF32")
    return reference


def _verify(job: Job, stage: model_io.Stage, reference: Reference | None, watcher: Watcher) -> Verification:
    found = verification.verify(
        job.model, stage.model_path, reference=reference, on_step=watcher.step, on_amount=watcher.amount
    )
    said = formulas.note(model_io.load(stage.model_path)) if job.verify_on == "cpu" else ""
    return dataclasses.replace(found, notes=(*found.notes, said)) if said else found


def _prepare_precision(job: Job, stage: model_io.Stage, num_given: int) -> float8_check.Prepared | None:
    """Raises ModelError where the model can't get the precision that was asked for: before the models are compared,
    which takes long. Without onnxruntime nothing is compared, and that is what is said then. What is made of the model
    for float8, where that was asked for."""
    if ort_session.missing_packages():
        return None
    if job.options.half:
        from faexport.precision import half_check

        half_check.refuse(job.model, stage.model_path, ir.DataType[job.options.half])
    if job.options.float8:
        from faexport.precision import float8_check

        return float8_check.prepare(job.model, stage.model_path, num_given)
    return None


def _in_half(
    job: Job,
    stage: model_io.Stage,
    reference: Reference | None,
    report: Report,
    stack: contextlib.ExitStack,
    watcher: Watcher,
) -> tuple[ir.Model, model_io.Stage]:
    """The staged model in half precision, staged as well, and what the report says of it. Raises as run() does."""
    from faexport.precision import half_check

    dtype = ir.DataType[job.options.half]
    name = dtype.name.lower()
    if reference is None:
        raise ModelError(f"{job.model}: can't become {name}: {ort_session.missing_packages()}")
    watcher.step(f"converting to {name}")
    made = half_check.make(
        reference,
        stage.model_path,
        keep_io_types=job.options.keep_io_types,
        fallback=job.options.fallback,
        dtype=dtype,
    )
    report.half_precision, report.nodes_after = made.said, count_nodes(made.model)
    stage = stack.enter_context(_staged(made.model, job, watcher, external=stage.has_data))
    if job.check:
        watcher.step(f"comparing {name} with the original")
        report.half_precision = said = half_check.check(reference, made.said, stage.model_path, watcher.amount)
        if said.status is not VerificationStatus.PASSED:
            why = "verification failed" if said.status is VerificationStatus.FAILED else "could not be verified"
            raise NotVerifiedError(f"{job.model}: {why}: {said.reason}; {job.target} was not written")
    return made.model, stage


def _in_float8(
    job: Job,
    prepared: float8_check.Prepared | None,
    reference: Reference | None,
    num_given: int,
    report: Report,
    stack: contextlib.ExitStack,
    watcher: Watcher,
) -> tuple[ir.Model, model_io.Stage]:
    """The staged model with attention in float8, staged as well, and what the report says of it. Raises as run()
    does."""
    from faexport.precision import float8_check

    if reference is None or prepared is None:
        raise ModelError(f"{job.model}: can't be computed in float8: {ort_session.missing_packages()}")
    watcher.step("measuring the factors of float8 numbers")
    made = float8_check.make(reference, prepared, num_given=num_given, fallback=job.options.fallback)
    report.float8, report.nodes_after = made.said, count_nodes(made.model)
    report.notes.append(float8_check.WHERE)
    stage = stack.enter_context(_staged(made.model, job, watcher))
    if job.check:
        watcher.step("comparing float8 with the original")
        report.float8 = said = float8_check.check(
            reference, made.said, stage.model_path, num_given=num_given, on_amount=watcher.amount
        )
        if said.status is not VerificationStatus.PASSED:
            raise NotVerifiedError(f"{job.model}: verification failed: {said.reason}; {job.target} was not written")
    return made.model, stage


def _failure(found: Verification, job: Job) -> str | None:
    """Why the model can't be written: it was found wrong, or could not be compared."""
    if found.status is VerificationStatus.FAILED:
        return f"{job.model}: verification failed: {found.reason}; {job.target} was not written"
    if found.status is VerificationStatus.NOT_RUN:
        return (
            f"{job.model}: could not be verified: {found.reason}; {job.target} was not written (--no-verify "
            "would write it without a comparison)"
        )
    return None


def read_inputs(path: pathlib.Path, model: ir.Model) -> list[InputSet]:
    """A user's own inputs. Raises ModelError where an array is missing or does not fit the model."""
    tensors = model_io.read_arrays(path)
    wanted = {value.name: value for value in model.graph.inputs if value.name and not value.is_initializer()}
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ModelError(f"{path}: has no array '{missing[0]}'; the model's inputs are {', '.join(sorted(wanted))}")
    for name, value in wanted.items():
        if wrong := _misfit(tensors[name], value):
            raise ModelError(f"{path}: array '{name}' {wrong}; write it as the model expects it")
    return [InputSet(path.name, {name: tensors[name] for name in wanted})]


def _misfit(array: np.ndarray, value: ir.Value) -> str:
    """Why the model can't take this array for an input, or ""."""
    if value.dtype is not None and array.dtype != value.dtype.numpy():
        return f"is {array.dtype}, the model takes {value.dtype.numpy()}"
    sizes = [None] * array.ndim if value.shape is None else list(value.shape)
    fits = len(sizes) == array.ndim and all(
        not isinstance(size, int) or size == given for size, given in zip(sizes, array.shape, strict=True)
    )
    return "" if fits else f"has the shape {list(array.shape)}, the model takes {value.shape}"
