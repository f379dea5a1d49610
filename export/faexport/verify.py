# SPDX-License-Identifier: Apache-2.0
"""Runs the original and the rewritten model on the same inputs in onnxruntime and compares every output.

The rule: the largest difference of a floating-point output may be `RELATIVE_TOLERANCE[dtype]` times the largest
magnitude of the original's output, dtype being the least precise floating-point type in the model. More is allowed only
where the original is shown to be noisier: four times what its own outputs differ by with and without onnxruntime's
optimizations; or, in half precision, an error against the same model in float32 of twice the original's (the rule of
FlashAttention's tests). Other outputs must be equal, unless the original's own two runs differ. Elements that are NaN
in the original are not compared: the operator gives 0 where it divides 0 by 0.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from . import inputs as model_inputs
from . import model_io, ort_session, widen
from .inputs import MaskPattern, Sizes
from .report import OutputDifference, Verification, VerificationRun, VerificationStatus
from .spec import DOMAIN

# In half precision four roundings: unit roundoff is 2^-11 and 2^-8.
RELATIVE_TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 2e-3, "bfloat16": 1.6e-2}
CORE_TOLERANCE = {
    "float16": 2e-2,
    "bfloat16": 5e-2,
}  # where only attention is half precision, as asked (--dtype)
NOISE_FACTOR = 4.0
ROUNDING_FACTOR = 2.0
TOO_NOISY = 0.1  # of the output's magnitude: above it nothing can be said

# Each plan is tried with its own sizes; where dims are fixed only the mask differs.
PLANS = (
    (Sizes(batch=2, length=16, past=5), MaskPattern.RIGHT_PADDED),
    (Sizes(batch=2, length=16, past=5), MaskPattern.LEFT_PADDED),
    (Sizes(batch=3, length=33, past=8), MaskPattern.RANDOM),
    (Sizes(batch=1, length=7, past=12), MaskPattern.ONES),
)
FALLBACK_LENGTHS = (32, 64, 224, 400, 518)  # image sides, audio samples: where the original refuses the plan's length

Step = Callable[[str], None]
Runner = Callable[[ort_session.Job], ort_session.Results]
_BROKEN = "the rewritten model"  # how the sentences begin that make a verification fail


@dataclasses.dataclass(frozen=True)
class InputSet:
    """One set of inputs, and what it is called in messages."""

    label: str
    tensors: Mapping[str, np.ndarray]


@dataclasses.dataclass
class Reference:
    """A model, sets of inputs and its outputs on them: what any number of rewritten models are compared with."""

    path: str
    model: ir.Model
    sets: list[InputSet]
    results: ort_session.Results
    run: Runner
    problem: str = ""  # why there is nothing to compare with

    _plain: ort_session.Results | None = None
    _float32: ort_session.Results | None = None

    def plain_outputs(self, index: int) -> dict[str, np.ndarray]:
        """The outputs without onnxruntime's optimizations, computed once somebody asks; {} where that fails."""
        if self._plain is None:
            tensors = [item.tensors for item in self.sets]
            self._plain = self.run(
                ort_session.Job(self.path, tensors, optimize=False, library=_needs_library(self.model))
            )
        return _outputs_of(self._plain, index)

    def float32_outputs(self, index: int) -> dict[str, np.ndarray]:
        """The outputs of the same model in float32, computed once somebody asks; {} where that fails."""
        if self._float32 is None:
            tensors = [widen.inputs_in_float32(item.tensors) for item in self.sets]
            with tempfile.TemporaryDirectory(prefix="faexport-float32-") as folder:
                path = pathlib.Path(folder) / "model.onnx"
                model_io.save(widen.in_float32(model_io.load(self.path)), path)
                self._float32 = self.run(ort_session.Job(str(path), tensors, library=_needs_library(self.model)))
        return _outputs_of(self._float32, index)


def _outputs_of(results: ort_session.Results, index: int) -> dict[str, np.ndarray]:
    outputs = {} if results.error else results.outputs[index]
    return outputs if isinstance(outputs, dict) else {}


def verify(
    original: os.PathLike[str] | str,
    rewritten: os.PathLike[str] | str,
    *,
    extra_inputs: Sequence[InputSet] = (),
    right_padding: bool = False,
    full_rows: bool = False,
    seed: int = 0,
    on_step: Step = lambda text: None,
) -> Verification:
    """Compares two model files. Never raises for a model that can't be run: then the status is NOT_RUN.

    Args:
        original, rewritten: .onnx files.
        extra_inputs: to run on besides random inputs of several sizes.
        right_padding: masks keep a prefix only, since the rewritten model assumes it.
        full_rows: masks leave each query a key, likewise.
        on_step: told what is being done, for a progress display.
    """
    if missing := ort_session.missing_packages():
        return Verification(VerificationStatus.NOT_RUN, missing)
    on_step("running the original")
    assumed = {"right_padding": right_padding, "full_rows": full_rows}
    reference = make_reference(original, extra_inputs=extra_inputs, seed=seed, **assumed)
    on_step("running the rewritten model")
    return verify_against(reference, rewritten)


def make_reference(
    path: os.PathLike[str] | str,
    *,
    extra_inputs: Sequence[InputSet] = (),
    right_padding: bool = False,
    full_rows: bool = False,
    seed: int = 0,
    run: Runner = ort_session.run,
) -> Reference:
    """Draws inputs and runs the original on them; `run` is ort_session.run or run_here."""
    reference = Reference(os.fspath(path), model_io.load(path), list(extra_inputs), ort_session.Results(), run)
    try:
        reference.sets += _input_sets(reference.model, right_padding, full_rows, seed)
    except model_inputs.UnsupportedInput as error:
        if not extra_inputs:
            reference.problem = f"{error}; give inputs with --inputs file.npz"
            return reference
    reference.results = _run(reference, reference.path, reference.sets, _needs_library(reference.model))
    if not reference.results.error and not _usable(reference.results):
        _try_lengths(reference, right_padding, full_rows, seed)
    if not _usable(reference.results):
        sentences = [outputs for outputs in reference.results.outputs if isinstance(outputs, str)]
        why = reference.results.error or sentences[0]
        reference.problem = f"the original does not run in onnxruntime: {why}; give inputs with --inputs file.npz"
    return reference


def verify_against(
    reference: Reference, rewritten: os.PathLike[str] | str, *, use_library: bool = True
) -> Verification:
    """Compares a rewritten model file with the reference. Without the operator's library (also where `use_library` is
    false) its function in standard operators runs."""
    if reference.problem:
        return Verification(VerificationStatus.NOT_RUN, reference.problem)
    model = model_io.load(rewritten)
    library = _needs_library(model)
    by_fallback = library and not (use_library and ort_session.has_library())
    if by_fallback and not any(function.domain == DOMAIN for function in model.functions.values()):
        return Verification(VerificationStatus.NOT_RUN, "the operator's library is not installed (package faplugin)")
    actual = _run(reference, os.fspath(rewritten), reference.sets, library and not by_fallback)
    if actual.error:
        reason = f"the rewritten model does not run in onnxruntime: {actual.error}"
        return Verification(VerificationStatus.FAILED, reason)
    own, dtype = _least_precise(reference.model), _least_precise(reference.model, model)
    allowed = RELATIVE_TOLERANCE[dtype] if own == dtype else CORE_TOLERANCE[dtype]
    runs = [_compare_run(reference, actual, index, allowed) for index in range(len(reference.sets))]
    return _conclude(runs, by_fallback)


def _conclude(runs: list[VerificationRun], by_fallback: bool) -> Verification:
    compared = [run for run in runs if run.outputs]
    broken = next((run.skipped for run in runs if run.skipped.startswith(_BROKEN)), "")
    if broken or not all(run.ok for run in compared):
        verification = Verification(VerificationStatus.FAILED, broken, tuple(runs))
        worst = verification.worst
        if worst is not None and not worst.ok:
            differs = f"output '{worst.name}' differs by {worst.max_abs_diff:.3g}, allowed is {worst.tolerance:.3g}"
            return dataclasses.replace(verification, reason=differs)
        return verification
    if not compared:
        return Verification(VerificationStatus.NOT_RUN, runs[0].skipped, tuple(runs))
    note = (
        "the operator's library is not installed: its function in standard operators was run instead"
        if by_fallback
        else ""
    )
    return Verification(VerificationStatus.PASSED, note, tuple(runs))


def _input_sets(
    model: ir.Model, right_padding: bool, full_rows: bool, seed: int, length: int | None = None
) -> Sequence[InputSet]:
    specs = model_inputs.input_specs(model)
    masks = any("mask" in spec.name.lower() for spec in specs)
    random = np.random.default_rng(seed)
    # A float16 mask adds -65504, and the CPU adds it in float32: a query without keys gives the softmax of its scores
    # there, but the mean of the values where float16 is added in float16. So no query loses all its keys: of two
    # neighbours one is kept, and the first.
    full_rows = full_rows or _least_precise(model) == "float16"
    sets = []
    for sizes, pattern in PLANS:
        if not model_inputs.is_dynamic(specs) and len(sets) >= (2 if masks else 1):
            break
        if right_padding and pattern in (MaskPattern.LEFT_PADDED, MaskPattern.RANDOM):
            pattern = MaskPattern.RIGHT_PADDED
        if full_rows and pattern is not MaskPattern.ONES:
            pattern = MaskPattern.LAST if pattern is MaskPattern.RIGHT_PADDED else MaskPattern.SCATTERED
        sizes = dataclasses.replace(sizes, length=length) if length else sizes
        bound = model_inputs.bind(specs, sizes)
        label = ", ".join(
            [*(f"{name}={size}" for name, size in bound.items()), *([f"mask {pattern}"] if masks else [])]
        )
        sets.append(InputSet(label or "fixed sizes", model_inputs.draw(specs, bound, pattern, random)))
    return sets


def _try_lengths(reference: Reference, right_padding: bool, full_rows: bool, seed: int) -> None:
    """Replaces the sets by sets of another length, which the original runs on, if there is one."""
    for length in FALLBACK_LENGTHS:
        sets = _input_sets(reference.model, right_padding, full_rows, seed, length)
        results = _run(reference, reference.path, sets, _needs_library(reference.model))
        if _usable(results):
            reference.sets, reference.results = sets, results
            return


def _usable(results: ort_session.Results) -> bool:
    return any(not isinstance(outputs, str) for outputs in results.outputs)


def _run(reference: Reference, path: str, sets: Sequence[InputSet], library: bool) -> ort_session.Results:
    """With onnxruntime's optimizations; without them where these fail: a defect of theirs, not of the model."""
    tensors = [item.tensors for item in sets]
    results = reference.run(ort_session.Job(path, tensors, library=library))
    if not results.error:
        return results
    plain = reference.run(ort_session.Job(path, tensors, optimize=False, library=library))
    return results if plain.error else plain


def _compare_run(reference: Reference, actual: ort_session.Results, index: int, allowed: float) -> VerificationRun:
    """`allowed` is the relative tolerance."""
    item = reference.sets[index]
    shapes = {name: tuple(tensor.shape) for name, tensor in item.tensors.items()}
    expected, got = reference.results.outputs[index], actual.outputs[index]
    if isinstance(expected, str):
        return VerificationRun(shapes, skipped=f"the original does not run on {item.label}: {expected}")
    if isinstance(got, str):
        return VerificationRun(shapes, skipped=f"{_BROKEN} does not run on {item.label}: {got}")
    differences = []
    for name, want in expected.items():
        difference = compare(name, want, got[name], allowed)
        if not difference.ok:
            difference = _beside_noise(reference, index, difference, got[name])
        if difference is None:
            return VerificationRun(shapes, skipped=f"output '{name}' of the original is mostly noise on {item.label}")
        differences.append(difference)
    return VerificationRun(shapes, tuple(differences))


def _beside_noise(
    reference: Reference, index: int, difference: OutputDifference, got: np.ndarray
) -> OutputDifference | None:
    """A difference judged by the original's own noise; None where that drowns everything."""
    name = difference.name
    want, again = reference.results.outputs[index][name], reference.plain_outputs(index).get(name)
    if again is not None:
        own = compare(name, want, again, 0.0).max_abs_diff
        if own > TOO_NOISY * _magnitude(want):
            return None
        difference = _allowed(difference, NOISE_FACTOR * own)
    if difference.ok or want.shape != got.shape or _least_precise(reference.model) not in CORE_TOLERANCE:
        return difference
    exact = reference.float32_outputs(index).get(name)
    if exact is None or exact.shape != want.shape or difference.dtype not in RELATIVE_TOLERANCE:
        return difference
    own = _distance(exact, want)
    if own > TOO_NOISY * _magnitude(want):
        return None
    return _allowed(dataclasses.replace(difference, max_abs_diff=_distance(exact, got)), ROUNDING_FACTOR * own)


def _allowed(difference: OutputDifference, noise: float) -> OutputDifference:
    """The difference where so much noise is allowed as well."""
    tolerance = max(difference.tolerance, noise)
    return dataclasses.replace(difference, tolerance=tolerance, ok=difference.max_abs_diff <= tolerance)


def compare(name: str, want: np.ndarray, got: np.ndarray, allowed: float) -> OutputDifference:
    """The largest difference of one output, which may be `allowed` times its magnitude."""
    want, got = np.asarray(want), np.asarray(got)
    shape, kind = tuple(want.shape), str(want.dtype)
    if want.shape != got.shape or want.dtype != got.dtype:
        return OutputDifference(name, kind, shape, float("inf"), 0.0, False)
    if kind not in RELATIVE_TOLERANCE:
        difference = float(np.count_nonzero(want != got))
        return OutputDifference(name, kind, shape, difference, 0.0, difference == 0)
    tolerance, difference = allowed * _magnitude(want), _distance(want, got)
    return OutputDifference(name, kind, shape, difference, tolerance, difference <= tolerance)


def _distance(want: np.ndarray, got: np.ndarray) -> float:
    """The largest absolute difference where `want` is a number."""
    a, b = want.astype(np.float64), got.astype(np.float64)
    compared = ~np.isnan(a) & ~(a == b)  # equal infinities are equal
    with np.errstate(invalid="ignore"):
        return float(np.abs(a - b)[compared].max(initial=0.0))


def _magnitude(array: np.ndarray) -> float:
    finite = np.abs(np.asarray(array, np.float64))
    return float(finite[np.isfinite(finite)].max(initial=0.0))


def _least_precise(*models: ir.Model) -> str:
    """The coarsest floating-point type of any value, initializer or Cast."""
    found = {"float32"}
    for model in models:
        for graph in (model.graph, *model.functions.values()):
            found |= {value.dtype.name.lower() for value in graph.inputs if value.dtype}
            if isinstance(graph, ir.Graph):
                found |= {value.dtype.name.lower() for value in graph.initializers.values() if value.dtype}
            for node in ir.traversal.RecursiveGraphIterator(graph):
                found |= {value.dtype.name.lower() for value in node.outputs if value.dtype}
                if node.op_type == "Cast":
                    found.add(ir.DataType(node.attributes.get_int("to", 1)).name.lower())
    return max(found & set(RELATIVE_TOLERANCE), key=RELATIVE_TOLERANCE.__getitem__)


def _needs_library(model: ir.Model) -> bool:
    graphs = (model.graph, *model.functions.values())
    return any(node.domain == DOMAIN for graph in graphs for node in ir.traversal.RecursiveGraphIterator(graph))
