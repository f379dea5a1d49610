# SPDX-License-Identifier: Apache-2.0
"""Runs the original and the rewritten model on the same inputs in onnxruntime and compares every output.

The rule: the largest difference of a floating-point output may be `RELATIVE_TOLERANCE[dtype]` times the largest magnitude of the
original's output, dtype being the least precise floating-point type in either model. Where the original itself is noisier (its outputs
with and without onnxruntime's optimizations differ more), four times that noise is allowed. Other outputs must be equal, unless
the original's own two runs differ. Elements that are NaN in the original are not compared: the operator gives 0 where it divides 0 by 0.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from . import inputs as model_inputs
from . import model_io, ort_session
from .inputs import MaskPattern, Sizes
from .report import OutputDifference, Verification, VerificationRun, VerificationStatus
from .spec import DOMAIN

RELATIVE_TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
NOISE_FACTOR = 4.0
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


@dataclasses.dataclass(frozen=True)
class InputSet:
    """One set of inputs, and what it is called in messages."""

    label: str
    tensors: Mapping[str, np.ndarray]


def verify(
    original: os.PathLike[str] | str,
    rewritten: os.PathLike[str] | str,
    *,
    extra_inputs: Sequence[InputSet] = (),
    right_padding: bool = False,
    seed: int = 0,
    on_step: Step = lambda text: None,
) -> Verification:
    """Compares two model files. Never raises for a model that can't be run: then the status is NOT_RUN and the reason says why.

    Args:
        original, rewritten: .onnx files.
        extra_inputs: to run on besides random inputs of several sizes.
        right_padding: masks keep a prefix only, since the rewritten model assumes it.
        on_step: told what is being done, for a progress display.
    """
    if missing := ort_session.missing_packages():
        return Verification(VerificationStatus.NOT_RUN, missing)
    model, new_model = model_io.load(original), model_io.load(rewritten)
    try:
        sets = [*extra_inputs, *_input_sets(model, right_padding, seed)]
    except model_inputs.UnsupportedInput as error:
        if not extra_inputs:
            return Verification(VerificationStatus.NOT_RUN, f"{error}; give inputs with --inputs file.npz")
        sets = list(extra_inputs)
    on_step("running the original")
    reference = _run(original, sets, library=_has_operator(model))
    usable = [index for index, outputs in enumerate(reference.outputs) if not isinstance(outputs, str)]
    if not extra_inputs and not usable and not reference.error:
        on_step("looking for sizes that the original accepts")
        sets, reference = _try_lengths(original, model, right_padding, seed)
        usable = list(range(len(sets)))
    if not usable:
        reason = reference.error or next((o for o in reference.outputs if isinstance(o, str)), "no inputs")
        return Verification(
            VerificationStatus.NOT_RUN,
            f"the original does not run in onnxruntime: {reason}; give inputs with --inputs file.npz",
        )
    on_step("running the rewritten model")
    library = _has_operator(new_model)
    if library and not ort_session.has_library() and not _has_fallback(new_model):
        return Verification(VerificationStatus.NOT_RUN, "the operator's library is not installed (package faplugin)")
    actual = _run(rewritten, sets, library=library and ort_session.has_library())
    if actual.error:
        return Verification(
            VerificationStatus.FAILED, f"the rewritten model does not run in onnxruntime: {actual.error}"
        )
    noise = _Noise(original, sets, _has_operator(model))
    dtype = _least_precise(model, new_model)
    runs = [_compare_run(index, sets[index], reference, actual, dtype, noise) for index in range(len(sets))]
    return _conclude(runs, library and not ort_session.has_library())


def _conclude(runs: list[VerificationRun], by_fallback: bool) -> Verification:
    compared = [run for run in runs if run.outputs]
    if not compared:
        failed = next((run.skipped for run in runs if run.skipped.startswith("the rewritten model")), "")
        status = VerificationStatus.FAILED if failed else VerificationStatus.NOT_RUN
        return Verification(status, failed or runs[0].skipped, tuple(runs))
    broken = next((run.skipped for run in runs if run.skipped.startswith("the rewritten model")), "")
    verification = Verification(VerificationStatus.PASSED, runs=tuple(runs))
    if broken or not all(run.ok for run in compared):
        worst = verification.worst
        reason = (
            broken or f"output '{worst.name}' differs by {worst.max_abs_diff:.3g}, allowed is {worst.tolerance:.3g}"
        )
        return dataclasses.replace(verification, status=VerificationStatus.FAILED, reason=reason)
    note = (
        "the operator's library is not installed: its function in standard operators was run instead"
        if by_fallback
        else ""
    )
    return dataclasses.replace(verification, reason=note)


def _input_sets(model: ir.Model, right_padding: bool, seed: int, length: int | None = None) -> Sequence[InputSet]:
    specs = model_inputs.input_specs(model)
    masks = any("mask" in spec.name.lower() for spec in specs)
    random = np.random.default_rng(seed)
    sets = []
    for sizes, pattern in PLANS:
        if not model_inputs.is_dynamic(specs) and len(sets) >= (2 if masks else 1):
            break
        if right_padding and pattern in (MaskPattern.LEFT_PADDED, MaskPattern.RANDOM):
            pattern = MaskPattern.RIGHT_PADDED
        sizes = dataclasses.replace(sizes, length=length) if length else sizes
        bound = model_inputs.bind(specs, sizes)
        label = ", ".join(
            [*(f"{name}={size}" for name, size in bound.items()), *([f"mask {pattern}"] if masks else [])]
        )
        sets.append(InputSet(label or "fixed sizes", model_inputs.draw(specs, bound, pattern, random)))
    return sets


def _try_lengths(
    path: os.PathLike[str] | str, model: ir.Model, right_padding: bool, seed: int
) -> tuple[list[InputSet], ort_session.Results]:
    """Sets of another length, which the original runs; no set where it runs none."""
    for length in FALLBACK_LENGTHS:
        sets = _input_sets(model, right_padding, seed, length)
        results = _run(path, sets, library=_has_operator(model))
        good = [index for index, outputs in enumerate(results.outputs) if not isinstance(outputs, str)]
        if good:
            results.outputs = [results.outputs[index] for index in good]
            return [sets[index] for index in good], results
    return [], results


def _run(path: os.PathLike[str] | str, sets: Sequence[InputSet], library: bool) -> ort_session.Results:
    """With onnxruntime's optimizations; without them where these fail, which is onnxruntime's defect and not the model's."""
    tensors = [item.tensors for item in sets]
    results = ort_session.run(ort_session.Job(os.fspath(path), tensors, library=library))
    if not results.error:
        return results
    plain = ort_session.run(ort_session.Job(os.fspath(path), tensors, optimize=False, library=library))
    return results if plain.error else plain


class _Noise:
    """Outputs of the original without onnxruntime's optimizations, computed once somebody asks."""

    def __init__(self, path: os.PathLike[str] | str, sets: Sequence[InputSet], library: bool) -> None:
        self._job = ort_session.Job(os.fspath(path), [item.tensors for item in sets], optimize=False, library=library)
        self._results: ort_session.Results | None = None

    def outputs(self, index: int) -> dict[str, np.ndarray]:
        self._results = self._results or ort_session.run(self._job)
        outputs = self._results.outputs[index] if not self._results.error else {}
        return outputs if isinstance(outputs, dict) else {}


def _compare_run(
    index: int, item: InputSet, reference: ort_session.Results, actual: ort_session.Results, dtype: str, noise: _Noise
) -> VerificationRun:
    shapes = {name: tuple(tensor.shape) for name, tensor in item.tensors.items()}
    expected, got = reference.outputs[index], actual.outputs[index]
    if isinstance(expected, str):
        return VerificationRun(shapes, skipped=f"the original does not run on {item.label}: {expected}")
    if isinstance(got, str):
        return VerificationRun(shapes, skipped=f"the rewritten model does not run on {item.label}: {got}")
    differences = []
    for name, want in expected.items():
        difference = compare(name, want, got[name], dtype)
        if not difference.ok and (again := noise.outputs(index).get(name)) is not None:
            difference = _allow_noise(difference, compare(name, want, again, dtype), want)
            if difference is None:
                return VerificationRun(
                    shapes, skipped=f"output '{name}' of the original is not repeatable on {item.label}"
                )
        differences.append(difference)
    return VerificationRun(shapes, tuple(differences))


def _allow_noise(difference: OutputDifference, own: OutputDifference, want: np.ndarray) -> OutputDifference | None:
    """The difference judged by the original's own noise; None where that drowns everything."""
    if own.max_abs_diff > TOO_NOISY * _magnitude(want):
        return None
    tolerance = max(difference.tolerance, NOISE_FACTOR * own.max_abs_diff)
    return dataclasses.replace(difference, tolerance=tolerance, ok=difference.max_abs_diff <= tolerance)


def compare(name: str, want: np.ndarray, got: np.ndarray, dtype: str) -> OutputDifference:
    """The largest difference of one output against the tolerance of `dtype` (a key of RELATIVE_TOLERANCE)."""
    want, got = np.asarray(want), np.asarray(got)
    shape, kind = tuple(want.shape), str(want.dtype)
    if want.shape != got.shape or want.dtype != got.dtype:
        return OutputDifference(name, kind, shape, float("inf"), 0.0, False)
    if kind not in RELATIVE_TOLERANCE:
        difference = float(np.count_nonzero(want != got))
        return OutputDifference(name, kind, shape, difference, 0.0, difference == 0)
    tolerance = RELATIVE_TOLERANCE[dtype] * _magnitude(want)
    a, b = want.astype(np.float64), got.astype(np.float64)
    compared = ~np.isnan(a) & ~(a == b)  # equal infinities are equal
    with np.errstate(invalid="ignore"):
        difference = float(np.abs(a - b)[compared].max(initial=0.0))
    return OutputDifference(name, kind, shape, difference, tolerance, difference <= tolerance)


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


def _has_operator(model: ir.Model) -> bool:
    graphs = (model.graph, *model.functions.values())
    return any(node.domain == DOMAIN for graph in graphs for node in ir.traversal.RecursiveGraphIterator(graph))


def _has_fallback(model: ir.Model) -> bool:
    return any(function.domain == DOMAIN for function in model.functions.values())
