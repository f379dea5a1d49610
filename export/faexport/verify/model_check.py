# SPDX-License-Identifier: Apache-2.0
"""Runs the original and the rewritten model on the same inputs in onnxruntime and compares every output, and compares
each fused site by itself on what the original feeds it.

compare.py has the rule for tensors. An output may differ by more only where the original is shown to be noisier: four
times what its own outputs differ by with and without onnxruntime's optimizations; or, in half precision, twice the
original's error against the same model in float32 (the rule of FlashAttention's tests). In a quantized model a rounding
that flips moves the outputs by more than any rule allows; there the sites decide, together with the proof that all
other nodes are the original's. A model is verified only if it was compared in more than one setting, or on the user's
own inputs.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from faexport.feeds.open_sizes import excuse
from faexport.feeds.settings import ANY_NUMBERS, Assumed, InputSet
from faexport.files import model_io
from faexport.graph.nodes import all_nodes, attribute, op
from faexport.options import VERIFY_TIMEOUT
from faexport.report.data import OutputDifference, Verification, VerificationRun, VerificationStatus
from faexport.runtimes import operator_library, ort_session
from faexport.runtimes.ort_session import CannotRun, ModelFailure
from faexport.spec import DOMAIN, LEFT_OUT
from faexport.understand.layout import view_ops
from faexport.understand.shapes.analysis import Analysis
from faexport.verify import compare, side_by_side, site_check
from faexport.verify.reference import (
    ONLY_UNOPTIMIZED,
    ORIGINAL,
    Amount,
    Opener,
    Outputs,
    Reference,
    advice,
    has_empty,
    make_reference,
    needs_library,
    open_optimized,
)

NOISE_FACTOR = 4.0
LEAVES_OUT = (
    "sites that leave roundings of the original out are compared, by the rule for all sites, with the original's own "
    "nodes without these roundings"
)
ROUNDING_FACTOR = site_check.ROUNDING_FACTOR
TOO_NOISY = site_check.TOO_NOISY  # of the output's magnitude: above it nothing can be said

Step = Callable[[str], None]
_open_session = functools.partial(ort_session.Session, timeout=VERIFY_TIMEOUT)
_BROKEN = "the rewritten model"  # how the sentences begin that make a verification fail
_OUTPUT = "output '"  # how those begin that speak of an output of the model
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}


def verify(
    original: os.PathLike[str] | str,
    rewritten: os.PathLike[str] | str,
    *,
    extra_inputs: Sequence[InputSet] = (),
    assumed: Assumed | None = None,
    open_session: Opener = _open_session,
    reference: Reference | None = None,
    on_step: Step = lambda text: None,
    on_amount: Amount = lambda done, total: None,
) -> Verification:
    """Compares two model files. Never raises for a model that can't be run: then the status is NOT_RUN.

    Args:
        original, rewritten: .onnx files.
        extra_inputs: to run on besides random inputs of several sizes.
        assumed: what the random inputs keep to, since the rewritten model assumes it.
        open_session: how models are run; by default in child processes that are ended after VERIFY_TIMEOUT.
        reference: of the original, where the caller has it already; then what is above plays no part.
        on_step, on_amount: told what is being done and how much of it is, for a progress display.
    """
    if missing := ort_session.missing_packages():
        return Verification(VerificationStatus.NOT_RUN, missing)
    if reference is None:
        on_step("running the original")
        reference = make_reference(
            original,
            extra_inputs=extra_inputs,
            assumed=assumed,
            open_session=open_session,
            on_amount=on_amount,
        )
    on_step("running the rewritten model")
    ends = verify_against(reference, rewritten, on_amount=on_amount)
    on_step("comparing each site by itself")
    return _with_advice(with_sites(reference, rewritten, ends, on_amount), reference.model)


def _with_advice(found: Verification, original: ir.Model) -> Verification:
    """A failure on masks that hold any numbers tells how to say that they don't; one of an output, that the original
    draws random numbers where it does."""
    reason = found.reason
    if found.status is VerificationStatus.FAILED and ANY_NUMBERS in reason:
        reason += " (--assume zeros-and-ones: masks hold nothing else)"
    if reason.startswith(_OUTPUT) and (node := _draws(original)) is not None:
        reason += (
            f"; the model draws random numbers ({node.op_type} '{node.name}'), so no two runs of it agree: where it "
            "should not, call model.eval() before exporting"
        )
    return dataclasses.replace(found, reason=reason)


def _draws(model: ir.Model) -> ir.Node | None:
    """A node that gives other numbers in each run, or None."""
    analysis = Analysis(model)
    for node in all_nodes(model):
        if op(node) in _RANDOM or (op(node) == "Dropout" and view_ops.is_training(node, analysis)):
            return node
    return None


def verify_against(
    reference: Reference,
    rewritten: os.PathLike[str] | str,
    *,
    use_library: bool = True,
    on_amount: Amount = lambda done, total: None,
) -> Verification:
    """Compares the outputs of a rewritten model file with the reference's. Without the operator's library (also where
    `use_library` is false) its function in standard operators runs."""
    if reference.problem:
        runs = [_run_of_original(reference, index) for index in range(len(reference.sets))]
        return Verification(VerificationStatus.NOT_RUN, reference.problem, tuple(runs), notes=tuple(reference.notes))
    model = model_io.load(rewritten)
    library = needs_library(model)
    by_stand_in = library and not (use_library and ort_session.has_library())
    if by_stand_in and not _carries_stand_in(model):
        return Verification(VerificationStatus.NOT_RUN, operator_library.MISSING)
    try:
        actual = _run_rewritten(reference, os.fspath(rewritten), library and not by_stand_in, on_amount)
    except ModelFailure as error:
        return Verification(VerificationStatus.FAILED, f"{_BROKEN} does not run in onnxruntime: {error}")
    except ort_session.Crashed as error:
        return Verification(VerificationStatus.FAILED, f"{_BROKEN}: {error}")
    except CannotRun as error:
        return Verification(VerificationStatus.NOT_RUN, f"{_BROKEN} can't be run: {error}{advice(str(error))}")
    relative = _relative_tolerance(reference.model, model)
    runs = [_compare_run(reference, model, actual, index, relative) for index in range(len(reference.sets))]
    notes = list(reference.notes)
    if by_stand_in:
        notes.append("the operator's library is not installed: its function in standard operators was run instead")
    found = _conclude(runs)
    lacking = reference.lacks([index for index, run in enumerate(runs) if run.outputs])
    if found.status is VerificationStatus.PASSED and lacking:
        found = dataclasses.replace(found, status=VerificationStatus.NOT_RUN, reason=lacking)
    return dataclasses.replace(found, notes=tuple(notes))


def _run_rewritten(reference: Reference, path: str, library: bool, on_amount: Amount) -> list[Outputs | str]:
    """Its outputs on those sets that the original runs on."""
    found: list[Outputs | str] = [""] * len(reference.sets)
    with open_optimized(reference, path, library, _BROKEN, reference.notes) as session:
        for done, index in enumerate(reference.compared):
            on_amount(done, len(reference.compared))
            found[index] = reference.outputs_or_sentence(session, reference.sets[index].tensors)
    _try_plainly(reference, path, library, found)
    return found


def _try_plainly(reference: Reference, path: str, library: bool, found: list[Outputs | str]) -> None:
    """Empty inputs on which the model fails are tried without onnxruntime's optimizations: some of these write sizes of
    -1, which are open where there are no elements. What then runs counts, and a note says so."""
    failed = [i for i in reference.compared if isinstance(found[i], str) and has_empty(reference.sets[i].tensors)]
    if not failed:
        return
    try:
        with reference.open_session(ort_session.Job(path, optimize=False, library=library)) as session:
            for index in failed:
                outputs, sentence = reference.outputs_or_sentence(session, reference.sets[index].tensors), found[index]
                if isinstance(outputs, dict):
                    found[index] = outputs
                    reference.notes.append(
                        f"on {reference.sets[index].label} onnxruntime runs {_BROKEN} only without its own graph "
                        f"optimizations; with them: {sentence}"
                    )
    except (ModelFailure, CannotRun):
        return


def _relative_tolerance(original: ir.Model, rewritten: ir.Model) -> float:
    own, dtype = compare.least_precise(original), compare.least_precise(original, rewritten)
    return compare.RELATIVE_TOLERANCE[dtype] if own == dtype else compare.CORE_TOLERANCE[dtype]


def _conclude(runs: list[VerificationRun]) -> Verification:
    compared = [run for run in runs if any(0 not in output.shape for output in run.outputs)]
    broken = next((run.skipped for run in runs if run.skipped.startswith(_BROKEN)), "")
    bad = next((run for run in runs if not run.ok), None)
    if broken or bad is not None:
        if bad is not None:
            output = next(output for output in bad.outputs if not output.ok)
            broken = (
                f"{_OUTPUT}{output.name}' differs by {output.max_abs_diff:.3g}, allowed is {output.tolerance:.3g}, "
                f"on {bad.label}"
            )
        return Verification(VerificationStatus.FAILED, broken, tuple(runs))
    if not compared:
        sentence = next((run.skipped for run in runs if run.skipped), "all outputs are empty")
        return Verification(VerificationStatus.NOT_RUN, sentence, tuple(runs))
    return Verification(VerificationStatus.PASSED, "", tuple(runs))


# ---------------------------------------------------------------------------------------------- sites


def with_sites(
    reference: Reference,
    rewritten: os.PathLike[str] | str,
    ends: Verification,
    on_amount: Amount = lambda done, total: None,
) -> Verification:
    """The verification of the outputs (verify_against's), completed by that of the sites."""
    if ends.status is VerificationStatus.NOT_RUN:
        return ends
    model = model_io.load(rewritten)
    indices = reference.compared
    found = site_check.check(
        reference.path,
        model,
        [reference.sets[index] for index in indices],
        library=ort_session.has_library(),
        allowed=_relative_tolerance(reference.model, model),
        twins=compare.least_precise(reference.model, model) in compare.CORE_TOLERANCE,
        open_session=reference.open_session,
        open_sizes=reference.open_sizes,
        on_amount=on_amount,
    )
    notes = [*ends.notes, *found.left_out[:8], *([LEAVES_OUT] if _leaves_out(model) else [])]
    result = dataclasses.replace(ends, sites=tuple(found.rows), notes=tuple(notes))
    faults = [*found.failures, *([found.worst.sentence] if found.worst is not None else [])]
    if faults:
        return dataclasses.replace(result, status=VerificationStatus.FAILED, reason=faults[0])
    if found.problem:
        reason = found.problem + advice(found.problem)
        return dataclasses.replace(result, status=VerificationStatus.NOT_RUN, reason=reason)
    if ends.status is VerificationStatus.FAILED:
        return _despite_flips(reference, model, result, complete=not found.left_out)
    lost = {indices[index] for index in found.lost}
    if not found.left_out and (sentence := _lost_numbers(ends.runs, lost)):
        return dataclasses.replace(result, status=VerificationStatus.FAILED, reason=sentence)
    return result


def _despite_flips(reference: Reference, rewritten: ir.Model, result: Verification, *, complete: bool) -> Verification:
    """Outputs of a quantized model differ, but each site agrees by itself: passed, if nothing else changed."""
    broken = result.reason.startswith(_BROKEN) or any(run.skipped.startswith(_BROKEN) for run in result.runs)
    if broken or not complete or not is_quantized(reference.model):
        return result
    old = reference.model.graph.initializers
    for name, value in rewritten.graph.initializers.items():
        if name not in old:
            continue
        before, after = old[name].const_value, value.const_value
        if before is None or after is None or not side_by_side.same_tensor(after, before):
            return result
    left_out = "what is left out of it counts, and later " if _leaves_out(rewritten) else ""
    note = (
        f"{result.reason}: {left_out}roundings of the quantization flip. Each site agrees by itself on what the "
        "original feeds it, and all other nodes are the original's"
    )
    return dataclasses.replace(result, status=VerificationStatus.PASSED, reason="", notes=(*result.notes, note))


def lost_optimizations(found: Verification) -> str:
    """The note that onnxruntime's own optimizations fail on the rewritten model, though not on the original; or ""."""
    said = [ONLY_UNOPTIMIZED.format(model) for model in (ORIGINAL, _BROKEN)]
    of_both = [next((note for note in found.notes if note.startswith(words)), "") for words in said]
    return "" if of_both[0] else of_both[1]


def _leaves_out(rewritten: ir.Model) -> bool:
    """Has it attention that isn't rounded as the original's is?"""
    return any(LEFT_OUT in node.metadata_props for node in all_nodes(rewritten))


def _lost_numbers(runs: Sequence[VerificationRun], excused: set[int]) -> str:
    """A sentence where an output has numbers in place of the original's NaN, though no site gives 0 for such."""
    for index, run in enumerate(runs):
        for output in run.outputs:
            if output.num_lost and index not in excused:
                return (
                    f"{_OUTPUT}{output.name}' has {output.num_lost} numbers where the original has NaN, on {run.label}"
                )
    return ""


def is_quantized(model: ir.Model) -> bool:
    """Does it round activations to few bits, so that a tiny difference may become a large one?"""
    return any(
        node.op_type in _ROUNDS
        or node.op_type.startswith("QLinear")
        or attribute(node, "k_quant_type", "NONE") != "NONE"
        for node in all_nodes(model)
    )


_ROUNDS = {  # DequantizeLinear: onnxruntime may quantize the activations beside quantized weights
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger",
    "ConvInteger", "QAttention", "MatMulIntegerToFloat", "QGemm", "MatMulNBits", "DynamicQuantizeLSTM",
    "QEmbedLayerNormalization",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- outputs


def _run_of_original(reference: Reference, index: int) -> VerificationRun:
    """What became of a set where nothing is compared."""
    item, outputs = reference.sets[index], reference.outputs[index]
    why = f"the original does not run on {item.label}: {outputs}" if outputs and isinstance(outputs, str) else ""
    return VerificationRun(item.shapes, skipped=why or "not compared: the original runs on it", label=item.label)


def _compare_run(
    reference: Reference, rewritten: ir.Model, actual: Sequence[Outputs | str], index: int, relative: float
) -> VerificationRun:
    """`relative` is the tolerance."""
    item = reference.sets[index]
    expected, got = reference.outputs[index], actual[index]
    if isinstance(expected, str):
        return _run_of_original(reference, index)
    shapes = item.shapes
    if isinstance(got, str):
        if sentence := excuse(reference.open_sizes, rewritten, item.tensors):
            return VerificationRun(shapes, skipped=f"{sentence}, on {item.label}", label=item.label)
        return VerificationRun(shapes, skipped=f"{_BROKEN} does not run on {item.label}: {got}", label=item.label)
    differences = []
    for name, want in expected.items():
        difference: OutputDifference | None = compare.compare(name, want, got[name], relative)
        if difference is not None and not difference.ok:
            difference = _beside_noise(reference, index, difference, want, got[name])
        if difference is None:
            sentence = f"{_OUTPUT}{name}' of the original is mostly noise on {item.label}"
            return VerificationRun(shapes, skipped=sentence, label=item.label)
        differences.append(dataclasses.replace(difference, num_lost=compare.num_lost(want, got[name])))
    return VerificationRun(shapes, tuple(differences), label=item.label)


def _beside_noise(
    reference: Reference, index: int, difference: OutputDifference, want: np.ndarray, got: np.ndarray
) -> OutputDifference | None:
    """A difference judged by the original's own noise; None where that drowns everything."""
    name, quantized = difference.name, is_quantized(reference.model)
    others = [reference.plain_outputs(index), *([reference.moved_outputs(index)] if quantized else [])]
    for again in (outputs[name] for outputs in others if name in outputs):
        own = compare.compare(name, want, again, 0.0).max_abs_diff
        if own > TOO_NOISY * compare.magnitude(want) and not quantized:
            return None
        difference = _allowed(difference, NOISE_FACTOR * own)
    half = compare.least_precise(reference.model) in compare.CORE_TOLERANCE
    if difference.ok or want.shape != got.shape or not half:
        return difference
    exact = reference.float32_outputs(index).get(name)
    if exact is None or exact.shape != want.shape or difference.dtype not in compare.RELATIVE_TOLERANCE:
        return difference
    own, ours = compare.distance(exact, want), compare.distance(exact, got)
    most = TOO_NOISY * compare.magnitude(want)
    rounded = compare.distance(exact, reference.rounded_outputs(index).get(name, want))
    own = max(own, rounded if rounded <= most else 0.0)  # numbers that roundings drown are no measure
    noisy = own > most and not quantized
    if noisy and ours > difference.tolerance:
        return None
    return _allowed(dataclasses.replace(difference, max_abs_diff=ours), 0.0 if noisy else ROUNDING_FACTOR * own)


def _allowed(difference: OutputDifference, noise: float) -> OutputDifference:
    """The difference where so much noise is allowed as well."""
    tolerance = max(difference.tolerance, noise)
    return dataclasses.replace(difference, tolerance=tolerance, ok=difference.max_abs_diff <= tolerance)


def _carries_stand_in(model: ir.Model) -> bool:
    return any(function.domain == DOMAIN for function in model.functions.values())
