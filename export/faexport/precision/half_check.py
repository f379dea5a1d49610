# SPDX-License-Identifier: Apache-2.0
"""Makes the float16 or bfloat16 form of a rewritten model, and compares it with the float32 original. Called by jobs.py
and the zoo benchmark.

The rule is that of FlashAttention's tests: it may be twice as far from the original as the original is when it is
converted by the same converter, with the nodes in float32 that it needs. Both are run as GPUs compute them, each tensor
rounded to half precision. A float16 file is run as onnxruntime's CPU provider runs it, too; it runs no bfloat16 ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Generator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from faexport.errors import ModelError, first_cause
from faexport.files import model_io, scratch
from faexport.precision import half, half_nodes
from faexport.report.data import HalfOutput, HalfPrecision, VerificationStatus
from faexport.runtimes import ort_session
from faexport.runtimes.ort_session import CannotRun, Job, ModelFailure
from faexport.verify import compare
from faexport.verify.reference import Amount, Outputs, Reference, has_empty, needs_library, open_optimized
from faexport.verify.site_check import ROUNDING_FACTOR, TOO_NOISY


@dataclasses.dataclass
class Half:
    """The model in half precision, and what is said of it."""

    model: ir.Model
    said: HalfPrecision


def make(
    reference: Reference,
    rewritten: os.PathLike[str] | str,
    *,
    keep_io_types: bool = True,
    fallback: bool = True,
    dtype: ir.DataType = ir.DataType.FLOAT16,
) -> Half:
    """Converts a rewritten model file, whose original is the reference's, to FLOAT16 or BFLOAT16.

    Raises ModelError with one sentence where it can't be converted.
    """
    if reference.problem:
        raise ModelError(f"{reference.path}: can't become {_name(dtype)}: {reference.problem}")
    _refuse(reference.path, reference.model, rewritten, dtype)
    model, kept = _converted(rewritten, reference, dtype, keep_io_types=keep_io_types, fallback=fallback)
    there = {node.name for node in model.graph}
    kept = {name: why for name, why in kept.items() if name in there}
    return Half(model, HalfPrecision(keep_io_types, kept, dtype=_name(dtype)))


def refuse(original: os.PathLike[str] | str, rewritten: os.PathLike[str] | str, dtype: ir.DataType) -> None:
    """Raises ModelError with one sentence where the files alone tell that `rewritten` can't become this dtype; nothing
    is run, so that a caller can ask before the models are compared."""
    path = os.fspath(original)
    _refuse(path, model_io.load(original), rewritten, dtype)
    with _as_refusals(rewritten, path, dtype):
        half.prepared(rewritten)


def _refuse(path: str, original: ir.Model, rewritten: os.PathLike[str] | str, dtype: ir.DataType) -> None:
    """Raises ModelError for what shows without preparing the model: its types, its opset. `path`: the original's."""
    if compare.least_precise(original) != "float32":
        raise ModelError(f"{path}: has half precision already; --fp16 and --bf16 are for float32 models")
    opset, least = model_io.load(rewritten).opset_imports.get("", 0), half_nodes.OPSET_OF_BFLOAT16
    if dtype == ir.DataType.BFLOAT16 and opset < least:
        why = f"it has opset {opset}, and that takes {least} or later; add --opset 18"
        raise ModelError(f"{path}: can't become {_name(dtype)}: {why}")


@contextlib.contextmanager
def _as_refusals(rewritten: os.PathLike[str] | str, original: str, dtype: ir.DataType) -> Generator[None, None, None]:
    """Whatever fails is one sentence, a ModelError, that names the file that was given, and not the one between."""
    cannot = f"{original}: can't become {_name(dtype)}"
    try:
        yield
    except (ModelFailure, CannotRun) as error:
        raise ModelError(f"{cannot}: its numbers can't be measured: {error}") from error
    except ModelError as error:
        raise ModelError(str(error).replace(os.fspath(rewritten), original)) from error
    except Exception as error:  # the converter raises whatever it stumbles over
        cause = first_cause(error)
        sentence = f"onnxruntime's converter fails: {type(cause).__name__}: {ort_session.one_line(str(cause))}"
        raise ModelError(f"{cannot}: {sentence}") from error


def _name(dtype: ir.DataType) -> str:
    return dtype.name.lower()


def _converted(
    path: os.PathLike[str] | str, reference: Reference, dtype: ir.DataType, *, keep_io_types: bool, fallback: bool
) -> tuple[ir.Model, dict[str, str]]:
    with _as_refusals(path, reference.path, dtype):
        kept = half_nodes.find(path, reference, dtype)
        model = half.prepared(path)
        return half.convert(model, kept, keep_io_types=keep_io_types, fallback=fallback, dtype=dtype), kept


def check(
    reference: Reference,
    said: HalfPrecision,
    written: os.PathLike[str] | str,
    on_amount: Amount = lambda done, total: None,
) -> HalfPrecision:
    """Compares the written file with the float32 original. Returns `said`, completed; never raises for a model that
    can't be run."""
    dtype = ir.DataType[said.dtype.upper()]
    library, narrow = ort_session.has_library(), None if said.keep_io_types else dtype.numpy()
    if dtype == ir.DataType.BFLOAT16 and not library:
        reason = "bfloat16 is compared with the operator's library alone, which faplugin brings"
        return dataclasses.replace(said, status=VerificationStatus.NOT_RUN, reason=reason)
    with scratch.folder(what="half-") as folder:
        plain, plain_rounded, ours_rounded = (folder / name for name in ("plain", "plain_r", "ours_r"))
        # Each with its measure: the original's own conversion, run in the same way.
        pairs = []
        if dtype == ir.DataType.FLOAT16:
            pairs.append((_Runs(reference, written, narrow, library=library), _Runs(reference, plain, narrow)))
        if library:
            runs = [_Runs(reference, path, narrow, rounded=True) for path in (ours_rounded, plain_rounded)]
            pairs.append((runs[0], runs[1]))
        try:
            with contextlib.suppress(ModelError):
                model, _ = _converted(
                    reference.path, reference, dtype, keep_io_types=said.keep_io_types, fallback=False
                )
                model_io.save(model, plain)
                model_io.save(half.rounding(model, dtype), plain_rounded)
            if library:
                model_io.save(half.rounding(model_io.load(written), dtype), ours_rounded)
            return _compared(reference, said, pairs, on_amount)
        except (ModelFailure, CannotRun) as error:
            reason = f"the {said.dtype} model: {error}"
            return dataclasses.replace(said, status=VerificationStatus.FAILED, reason=reason)
        except (ModelError, OSError) as error:
            return dataclasses.replace(said, status=VerificationStatus.NOT_RUN, reason=str(error))


class _Runs:
    """A model file in half precision, and how the reference's inputs are given to it."""

    def __init__(
        self,
        reference: Reference,
        path: os.PathLike[str] | str,
        narrow: np.dtype | None,
        *,
        library: bool = True,
        rounded: bool = False,
    ):
        self.reference, self.path, self.library, self.rounded = reference, path, library, rounded
        self.narrow = narrow  # of inputs, where they don't stay float32
        self.notes: list[str] = []  # what is to be known of how the model was run

    def outputs(self) -> Generator[Outputs | str]:
        """On each set that the original runs on."""
        if not os.path.exists(self.path):
            yield from [""] * len(self.reference.compared)
            return
        with self._session() as session:
            for index in self.reference.compared:
                yield self.reference.outputs_or_sentence(session, self._given(self.reference.sets[index].tensors))

    def _session(self) -> ort_session.Session | ort_session.SessionHere:
        path, library = os.fspath(self.path), self.library and needs_library(model_io.load(self.path))
        if self.rounded:
            return self.reference.open_session(Job(path, optimize=False, library=library))
        # onnxruntime 1.32 crashes where it joins a float16 Transpose to the float32 product that its CPU provider makes
        # of a float16 one.
        return open_optimized(self.reference, path, library, "the model in half precision", self.notes)

    def _given(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.narrow is None:
            return dict(tensors)
        with np.errstate(over="ignore"):
            given = {n: x.astype(self.narrow) if x.dtype == np.float32 else x for n, x in tensors.items()}
        return {n: x.astype(np.float32) if x.dtype == self.narrow and self.rounded else x for n, x in given.items()}


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
                if isinstance(outputs, str) and not has_empty(reference.sets[index].tensors):
                    sentence = f"the {said.dtype} model does not run on {label}: {outputs}"
                    return dataclasses.replace(said, status=VerificationStatus.FAILED, reason=sentence)
            for way, (outputs, measure) in enumerate(zip(found, measures, strict=True)):
                if isinstance(outputs, str):  # onnxruntime's optimizations write sizes of -1, as model_check.py knows
                    notes[f"not compared on {label}, where there is nothing to compute: {outputs}"] = None
                    continue
                for name in (name for name in want if want[name].size):
                    row = _row(name, want[name], outputs[name], (measure, *measures), said.dtype, label)
                    if isinstance(row, str):
                        notes[row] = None
                        drowned.setdefault((name, way), row)
                        continue
                    compared.add((name, way))
                    if name not in worst or row.badness > worst[name].badness:
                        worst[name] = row
    notes |= dict.fromkeys(note for ours, _ in pairs for note in ours.notes)
    said = dataclasses.replace(said, outputs=tuple(worst.values()), notes=tuple(notes))
    bad = next((row for row in worst.values() if not row.ok), None)
    if bad is not None:
        reason = (
            f"in {said.dtype} output '{bad.name}' differs by {bad.max_abs_diff:.3g}, allowed is {bad.tolerance:.3g}, "
            f"on {bad.inputs}"
        )
        return dataclasses.replace(said, status=VerificationStatus.FAILED, reason=reason)
    if not worst or drowned.keys() - compared:
        reason = next((why for key, why in drowned.items() if key not in compared), "there is nothing to compare")
        return dataclasses.replace(said, status=VerificationStatus.NOT_RUN, reason=reason)
    return dataclasses.replace(said, status=VerificationStatus.PASSED)


def _row(
    name: str, want: np.ndarray, got: np.ndarray, plain: Sequence[Outputs | str], precision: str, label: str
) -> HalfOutput | str:
    """One output on one set of inputs; a sentence where the original's own conversion is no measure there. Of an
    output's magnitude the precision's tolerance is allowed; more only where that conversion is farther away, in one of
    the ways of running it: where scores are large, each way of rounding is another draw of the same noise.

    Args:
        plain: the conversion's outputs, first those of the way in which `got` was computed.
    """
    dtype = str(want.dtype)
    if got.shape != want.shape:
        return HalfOutput(name, dtype, np.inf, 0.0, 0.0, False, label)
    away = _counted if dtype not in compare.RELATIVE_TOLERANCE else compare.distance
    size = compare.magnitude(want) if away is compare.distance else 0.0
    difference = away(want, _rounded(got, want))
    owns = [away(want, _rounded(one[name], want)) if not isinstance(one, str) and name in one else 0.0 for one in plain]
    own = max(owns)
    if owns[0] > TOO_NOISY * size and away is compare.distance and size:
        return f"output '{name}' of the original itself is mostly noise in {precision} on {label}: not compared there"
    tolerance = max(compare.RELATIVE_TOLERANCE[precision] * size, ROUNDING_FACTOR * own)
    return HalfOutput(name, dtype, difference, own, tolerance, difference <= tolerance, label)


def _counted(want: np.ndarray, got: np.ndarray) -> float:
    return float(np.count_nonzero(want != got))


def _rounded(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """What was rounded to half precision in the file may be float32 here."""
    return got.astype(np.float32) if want.dtype == np.float32 else got
