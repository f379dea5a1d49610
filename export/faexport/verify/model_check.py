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
from faexport.feeds.settings import Assumed, InputSet
from faexport.files import model_io
from faexport.graph.nodes import all_nodes, attribute, op
from faexport.options import VERIFY_TIMEOUT
from faexport.report.data import (
    OutputDifference,
    SiteComparison,
    Skip,
    Verification,
    VerificationRun,
    VerificationStatus,
)
from faexport.runtimes import operator_library, ort_session
from faexport.runtimes.ort_session import CannotRun, ModelFailure
from faexport.spec import DOMAIN, LEFT_OUT
from faexport.understand.layout import view_ops
from faexport.understand.shapes.analysis import Analysis
from faexport.verify import all_keys, compare, side_by_side, site_check
from faexport.verify.reference import (
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
_REWRITTEN = "the rewritten model"
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
    if found.status is VerificationStatus.FAILED and found.any_numbers:
        reason += " (--assume zeros-and-ones: masks hold nothing else)"
    if found.of_output and (node := _draws(original)) is not None:
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
        return Verification(
            VerificationStatus.NOT_RUN, reference.problem, tuple(runs), notes=tuple(reference.all_notes)
        )
    model = model_io.load(rewritten)
    library = needs_library(model)
    by_stand_in = library and not (use_library and ort_session.has_library())
    if by_stand_in and not _carries_stand_in(model):
        return Verification(VerificationStatus.NOT_RUN, operator_library.MISSING)
    notes = _Notes()
    try:
        actual = _run_rewritten(reference, os.fspath(rewritten), library and not by_stand_in, notes, on_amount)
    except ModelFailure as error:
        return Verification(VerificationStatus.FAILED, f"{_REWRITTEN} does not run in onnxruntime: {error}")
    except ort_session.Crashed as error:
        return Verification(VerificationStatus.FAILED, f"{_REWRITTEN}: {error}")
    except CannotRun as error:
        return Verification(VerificationStatus.NOT_RUN, f"{_REWRITTEN} can't be run: {error}{advice(error)}")
    relative = _relative_tolerance(reference.model, model)
    lengths = all_keys.named_by(model)
    runs = [_compare_run(reference, model, lengths, actual, index, relative) for index in range(len(reference.sets))]
    said = [*reference.all_notes, *notes.unoptimized, *notes.plain_runs]
    if by_stand_in:
        said.append("the operator's library is not installed: its function in standard operators was run instead")
    found = _conclude(runs)
    lacking = reference.lacks([index for index, run in enumerate(runs) if run.outputs])
    if found.status is VerificationStatus.PASSED and lacking:
        found = dataclasses.replace(found, status=VerificationStatus.NOT_RUN, reason=lacking)
    lost = "" if reference.unoptimized else "".join(notes.unoptimized)
    return dataclasses.replace(found, notes=tuple(said), lost_optimizations=lost)


@dataclasses.dataclass
class _Notes:
    """Of how a rewritten model was run."""

    unoptimized: list[str] = dataclasses.field(default_factory=list)  # loaded without onnxruntime's optimizations only
    plain_runs: list[str] = dataclasses.field(default_factory=list)  # inputs on which it runs without these only


def _run_rewritten(
    reference: Reference, path: str, library: bool, notes: _Notes, on_amount: Amount
) -> list[Outputs | str]:
    """Its outputs on those sets that the original runs on."""
    found: list[Outputs | str] = [""] * len(reference.sets)
    with open_optimized(reference, path, library, _REWRITTEN, notes.unoptimized) as session:
        for done, index in enumerate(reference.compared):
            on_amount(done, len(reference.compared))
            found[index] = reference.outputs_or_sentence(session, reference.sets[index].tensors)
    _try_plainly(reference, path, library, found, notes.plain_runs)
    return found


def _try_plainly(reference: Reference, path: str, library: bool, found: list[Outputs | str], notes: list[str]) -> None:
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
                    notes.append(
                        f"on {reference.sets[index].label} onnxruntime runs {_REWRITTEN} only without its own graph "
                        f"optimizations; with them: {sentence}"
                    )
    except (ModelFailure, CannotRun):
        return


def _relative_tolerance(original: ir.Model, rewritten: ir.Model) -> float:
    own, dtype = compare.least_precise(original), compare.least_precise(original, rewritten)
    return compare.RELATIVE_TOLERANCE[dtype] if own == dtype else compare.CORE_TOLERANCE[dtype]


def _conclude(runs: list[VerificationRun]) -> Verification:
    found = Verification(VerificationStatus.PASSED, runs=tuple(runs))
    bad = next((run for run in runs if not run.ok), None)
    if bad is not None:
        output = next(output for output in bad.outputs if not output.ok)
        difference = f"differs by {output.max_abs_diff:.3g}, allowed is {output.tolerance:.3g}"
        return _failed(found, f"output '{output.name}' {difference}, on {bad.label}", bad, of_output=True)
    broken = next((run for run in runs if run.skip is Skip.BROKEN), None)
    if broken is not None:
        return _failed(found, broken.skipped, broken)
    if not any(0 not in output.shape for run in runs for output in run.outputs):
        skipped = next((run for run in runs if run.skip is not None), None)
        return dataclasses.replace(
            found,
            status=VerificationStatus.NOT_RUN,
            reason="all outputs are empty" if skipped is None else skipped.skipped,
            of_output=skipped is not None and skipped.skip is Skip.NOISE,
        )
    return found


def _failed(
    found: Verification, reason: str, where: VerificationRun | SiteComparison | InputSet, *, of_output: bool = False
) -> Verification:
    """What was found, as failed. `where`: the inputs that the reason speaks of."""
    return dataclasses.replace(
        found,
        status=VerificationStatus.FAILED,
        reason=reason,
        of_output=of_output,
        any_numbers=where.any_numbers,
    )


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
    for index, sentence in found.failures.items():
        return _failed(result, sentence, reference.sets[indices[index]])
    if found.worst is not None:
        return _failed(result, found.worst.sentence, found.worst)
    if found.problem:
        return dataclasses.replace(
            result, status=VerificationStatus.NOT_RUN, reason=found.problem, of_output=False, any_numbers=False
        )
    if ends.status is VerificationStatus.FAILED:
        return _despite_flips(reference, model, result, complete=not found.left_out)
    excused = {indices[index] for index in found.lost}
    return result if found.left_out else _with_lost_numbers(result, excused)


def _despite_flips(reference: Reference, rewritten: ir.Model, result: Verification, *, complete: bool) -> Verification:
    """Outputs of a quantized model differ, but each site agrees by itself: passed, if nothing else changed."""
    broken = any(run.skip is Skip.BROKEN for run in result.runs)
    if not result.runs or broken or not complete or not is_quantized(reference.model):
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
    return dataclasses.replace(
        result,
        status=VerificationStatus.PASSED,
        reason="",
        of_output=False,
        any_numbers=False,
        notes=(*result.notes, note),
    )


def _leaves_out(rewritten: ir.Model) -> bool:
    """Has it attention that isn't rounded as the original's is?"""
    return any(LEFT_OUT in node.metadata_props for node in all_nodes(rewritten))


def _with_lost_numbers(found: Verification, excused: set[int]) -> Verification:
    """Failed where an output has numbers in place of the original's NaN, though no site gives 0 for such."""
    for index, run in enumerate(found.runs):
        for output in run.outputs:
            if output.num_lost and index not in excused:
                reason = f"output '{output.name}' has {output.num_lost} numbers where the original has NaN"
                return _failed(found, f"{reason}, on {run.label}", run, of_output=True)
    return found


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
    if outputs and isinstance(outputs, str):
        return _skipped(item, Skip.ORIGINAL, f"the original does not run on {item.label}: {outputs}")
    return _skipped(item, Skip.ALONE, f"the original runs on {item.label}")


def _skipped(item: InputSet, skip: Skip, why: str) -> VerificationRun:
    return VerificationRun(item.shapes, skipped=why, label=item.label, skip=skip, any_numbers=item.any_numbers)


def _compare_run(
    reference: Reference,
    rewritten: ir.Model,
    lengths: frozenset[str],
    actual: Sequence[Outputs | str],
    index: int,
    relative: float,
) -> VerificationRun:
    """`lengths`: those where 0 stands for all keys; `relative`: the tolerance."""
    item = reference.sets[index]
    expected, got = reference.outputs[index], actual[index]
    if isinstance(expected, str):
        return _run_of_original(reference, index)
    if isinstance(got, str):
        if sentence := excuse(reference.open_sizes, rewritten, item.tensors):
            return _skipped(item, Skip.OPEN, f"{sentence}, on {item.label}")
        return _skipped(item, Skip.BROKEN, f"{_REWRITTEN} does not run on {item.label}: {got}")
    differences = []
    for name, want in expected.items():
        difference: OutputDifference | None = compare.compare(name, want, got[name], relative)
        if difference is not None and not difference.ok:
            difference = _beside_noise(reference, index, difference, want, got[name], lengths)
        if difference is None:
            return _skipped(item, Skip.NOISE, f"output '{name}' of the original is mostly noise on {item.label}")
        differences.append(dataclasses.replace(difference, num_lost=compare.num_lost(want, got[name])))
    return VerificationRun(item.shapes, tuple(differences), label=item.label, any_numbers=item.any_numbers)


def _beside_noise(
    reference: Reference,
    index: int,
    difference: OutputDifference,
    want: np.ndarray,
    got: np.ndarray,
    lengths: frozenset[str],
) -> OutputDifference | None:
    """A difference judged by the original's own noise; None where that drowns everything."""
    name, quantized = difference.name, is_quantized(reference.model)
    others = [reference.plain_outputs(index), *([reference.moved_outputs(index)] if quantized else [])]
    for again in (outputs[name] for outputs in others if name in outputs):
        own = compare.compare(name, want, again, 0.0).max_abs_diff
        if own > TOO_NOISY * compare.magnitude(want) and not quantized:
            return None
        difference = _allowed(difference, NOISE_FACTOR * own)
    if lengths and not difference.ok:
        difference = _beside_all_keys(difference, want, got, reference.all_keys_outputs(index, lengths))
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


def _beside_all_keys(
    difference: OutputDifference, want: np.ndarray, got: np.ndarray, exact: Outputs
) -> OutputDifference:
    """The difference from the original without what it rounds in rows that see no key (all_keys.py), where that is not
    much."""
    without = exact.get(difference.name)
    if without is None or not without.shape == want.shape == got.shape or not np.issubdtype(want.dtype, np.floating):
        return difference
    if compare.distance(without, want) > TOO_NOISY * compare.magnitude(want):
        return difference
    return _allowed(dataclasses.replace(difference, max_abs_diff=compare.distance(without, got)), 0.0)


def _allowed(difference: OutputDifference, noise: float) -> OutputDifference:
    """The difference where so much noise is allowed as well."""
    tolerance = max(difference.tolerance, noise)
    return dataclasses.replace(difference, tolerance=tolerance, ok=difference.max_abs_diff <= tolerance)


def _carries_stand_in(model: ir.Model) -> bool:
    return any(function.domain == DOMAIN for function in model.functions.values())
