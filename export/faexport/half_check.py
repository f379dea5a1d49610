# SPDX-License-Identifier: Apache-2.0
"""Makes the float16 form of a rewritten model, and compares it with the float32 original. Called by jobs.py and the
zoo benchmark.

The rule is that of FlashAttention's tests: it may be twice as far from the original as the original is when it is
converted by the same converter, with the nodes in float32 that it needs. Both are run as GPUs compute them, each tensor
rounded to float16; ours is run as onnxruntime's CPU provider runs the file, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Generator, Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from . import compare, half, half_nodes, model_io, ort_session
from .errors import ModelError
from .ort_session import CannotRun, Job, ModelFailure
from .reference import Amount, Outputs, Reference, needs_library
from .report import HalfOutput, HalfPrecision, VerificationStatus
from .site_check import ROUNDING_FACTOR, TOO_NOISY

# Of an output's magnitude; more is allowed only where the original's own conversion is farther away.
ALLOWED = compare.RELATIVE_TOLERANCE["float16"]


@dataclasses.dataclass
class Half:
    """The model in float16, and what is said of it."""

    model: ir.Model
    said: HalfPrecision


def make(
    reference: Reference, rewritten: os.PathLike[str] | str, *, keep_io_types: bool = True, fallback: bool = True
) -> Half:
    """Converts a rewritten model file, whose original is the reference's.

    Raises ModelError with one sentence where it can't be converted.
    """
    if reference.problem:
        raise ModelError(f"{reference.path}: can't become float16: {reference.problem}")
    if compare.least_precise(reference.model) != "float32":
        raise ModelError(f"{reference.path}: has half precision already; --fp16 is for float32 models")
    model, kept = _converted(rewritten, reference, keep_io_types=keep_io_types, fallback=fallback)
    there = {node.name for node in model.graph}
    said = HalfPrecision(keep_io_types, {name: why for name, why in kept.items() if name in there})
    return Half(model, said)


def _converted(
    path: os.PathLike[str] | str, reference: Reference, *, keep_io_types: bool, fallback: bool
) -> tuple[ir.Model, dict[str, str]]:
    try:
        kept = half_nodes.find(path, reference)
        model = half.prepared(path)
        return half.convert(model, kept, keep_io_types=keep_io_types, fallback=fallback), kept
    except (ModelFailure, CannotRun) as error:
        raise ModelError(f"{reference.path}: can't become float16: its numbers can't be measured: {error}") from error
    except ModelError:
        raise
    except Exception as error:  # the converter raises whatever it stumbles over
        sentence = f"onnxruntime's converter fails: {type(error).__name__}: {ort_session.one_line(str(error))}"
        raise ModelError(f"{reference.path}: can't become float16: {sentence}") from error


def check(
    reference: Reference,
    said: HalfPrecision,
    written: os.PathLike[str] | str,
    on_amount: Amount = lambda done, total: None,
) -> HalfPrecision:
    """Compares the written float16 file with the float32 original. Returns `said`, completed; never raises for a model
    that can't be run."""
    library, narrow = ort_session.has_library(), not said.keep_io_types
    with tempfile.TemporaryDirectory(prefix="faexport-fp16-") as folder:
        plain, plain_rounded, ours_rounded = (pathlib.Path(folder) / name for name in ("plain", "plain_r", "ours_r"))
        # Each with its measure: the original's own conversion, run in the same way.
        pairs = [(_Runs(reference, written, narrow, library=library), _Runs(reference, plain, narrow))]
        if library:
            runs = [_Runs(reference, path, narrow, rounded=True) for path in (ours_rounded, plain_rounded)]
            pairs.append((runs[0], runs[1]))
        try:
            with contextlib.suppress(ModelError):
                model, _ = _converted(reference.path, reference, keep_io_types=said.keep_io_types, fallback=False)
                model_io.save(model, plain)
                model_io.save(half.rounding(model), plain_rounded)
            if library:
                model_io.save(half.rounding(model_io.load(written)), ours_rounded)
            return _compared(reference, said, pairs, on_amount)
        except (ModelFailure, CannotRun) as error:
            return dataclasses.replace(said, status=VerificationStatus.FAILED, reason=f"the float16 model: {error}")
        except (ModelError, OSError) as error:
            return dataclasses.replace(said, status=VerificationStatus.NOT_RUN, reason=str(error))


class _Runs:
    """A float16 model file, and how the reference's inputs are given to it."""

    def __init__(
        self,
        reference: Reference,
        path: os.PathLike[str] | str,
        narrow: bool,
        *,
        library: bool = True,
        rounded: bool = False,
    ):
        self.reference, self.path, self.library, self.rounded = reference, path, library, rounded
        self.narrow = narrow  # inputs are float16, too

    def outputs(self) -> Generator[Outputs | str]:
        """On each set that the original runs on."""
        if not os.path.exists(self.path):
            yield from [""] * len(self.reference.compared)
            return
        model = model_io.load(self.path)
        job = Job(os.fspath(self.path), optimize=not self.rounded, library=self.library and needs_library(model))
        with self.reference.open_session(job) as session:
            for index in self.reference.compared:
                yield self.reference.outputs_or_sentence(session, self._given(self.reference.sets[index].tensors))

    def _given(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with np.errstate(over="ignore"):
            narrow = {
                n: x.astype(np.float16) if x.dtype == np.float32 and self.narrow else x for n, x in tensors.items()
            }
        return {n: x.astype(np.float32) if x.dtype == np.float16 and self.rounded else x for n, x in narrow.items()}


def _compared(
    reference: Reference,
    said: HalfPrecision,
    pairs: list[tuple[_Runs, _Runs]],
    on_amount: Amount,
) -> HalfPrecision:
    worst: dict[str, HalfOutput] = {}
    notes: dict[str, None] = {}
    compared: set[tuple[str, int]] = set()  # outputs, by the way of running the model
    drowned: dict[tuple[str, int], str] = {}  # those that could not be compared on some set, and why
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(contextlib.closing(runs.outputs())) for pair in pairs for runs in pair]
        for done, (index, *got) in enumerate(zip(reference.compared, *streams, strict=True)):
            on_amount(done, len(reference.compared))
            found, measures = got[::2], got[1::2]
            want, label = reference.outputs[index], reference.sets[index].label
            assert not isinstance(want, str)
            for outputs in found:
                if isinstance(outputs, str):
                    sentence = f"the float16 model does not run on {label}: {outputs}"
                    return dataclasses.replace(said, status=VerificationStatus.FAILED, reason=sentence)
            for way, (outputs, measure) in enumerate(zip(found, measures, strict=True)):
                for name in (name for name in want if want[name].size):
                    row = _row(name, want[name], outputs[name], measure, label)
                    if isinstance(row, str):
                        notes[row] = None
                        drowned.setdefault((name, way), row)
                        continue
                    compared.add((name, way))
                    if name not in worst or row.badness > worst[name].badness:
                        worst[name] = row
    said = dataclasses.replace(said, outputs=tuple(worst.values()), notes=tuple(notes))
    bad = next((row for row in worst.values() if not row.ok), None)
    if bad is not None:
        reason = (
            f"in float16 output '{bad.name}' differs by {bad.max_abs_diff:.3g}, allowed is {bad.tolerance:.3g}, "
            f"on {bad.inputs}"
        )
        return dataclasses.replace(said, status=VerificationStatus.FAILED, reason=reason)
    if not worst or drowned.keys() - compared:
        reason = next((why for key, why in drowned.items() if key not in compared), "there is nothing to compare")
        return dataclasses.replace(said, status=VerificationStatus.NOT_RUN, reason=reason)
    return dataclasses.replace(said, status=VerificationStatus.PASSED)


def _row(name: str, want: np.ndarray, got: np.ndarray, plain: Outputs | str, label: str) -> HalfOutput | str:
    """One output on one set of inputs; a sentence where the original's own conversion is
    no measure there."""
    dtype = str(want.dtype)
    if got.shape != want.shape:
        return HalfOutput(name, dtype, np.inf, 0.0, 0.0, False, label)
    away = _counted if dtype not in compare.RELATIVE_TOLERANCE else compare.distance
    size = compare.magnitude(want) if away is compare.distance else 0.0
    difference = away(want, _rounded(got, want))
    own = away(want, _rounded(plain[name], want)) if not isinstance(plain, str) and name in plain else 0.0
    if own > TOO_NOISY * size and away is compare.distance and size:
        return f"output '{name}' of the original itself is mostly noise in float16 on {label}: not compared there"
    tolerance = max(ALLOWED * size, ROUNDING_FACTOR * own)
    return HalfOutput(name, dtype, difference, own, tolerance, difference <= tolerance, label)


def _counted(want: np.ndarray, got: np.ndarray) -> float:
    return float(np.count_nonzero(want != got))


def _rounded(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """What was rounded to float16 in the file may be float32 here."""
    if got.dtype == ml_dtypes.bfloat16 or want.dtype != np.float32:
        return got
    return got.astype(np.float32)
