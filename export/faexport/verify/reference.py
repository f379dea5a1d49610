# SPDX-License-Identifier: Apache-2.0
"""The original model, what it is run on, and what comes out: the measure of any number of rewritten models. Called by
model_check.py and the zoo benchmark."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from faexport.feeds import decoders, relations, settings
from faexport.feeds import inputs as model_inputs
from faexport.feeds.open_sizes import OpenSizes
from faexport.feeds.settings import Assumed, InputSet
from faexport.files import model_io, scratch
from faexport.graph.nodes import all_nodes
from faexport.runtimes import ort_session
from faexport.runtimes.ort_session import CannotRun, Job, ModelFailure, TookTooLong
from faexport.spec import DOMAIN
from faexport.verify import all_keys, compare, roundings, widen

PATIENCE = 60.0  # seconds after which no more settings are tried on the original
GIVE_INPUTS = "give inputs with --inputs file.npz"
FIXED_LENGTH = (
    "the original runs at length {}, which its nodes ask for, and at none of the other lengths that were tried, though "
    "its inputs are declared open: PyTorch's older exporter fixes some sizes so; dynamo=True leaves them open"
)
TRACED = (
    ", of the sizes that it was exported with: they may be fixed in its nodes though its inputs are declared open, as "
    "PyTorch's older exporter does it (dynamo=True leaves them open)"
)
FIT_TOGETHER = f"Where the sizes of its inputs don't fit one another, {relations.NAME_THEM}"
PERTURBATION = 1e-7  # by which inputs are moved to see how much the original moves

Amount = Callable[[int, int], None]
Opener = Callable[[Job], ort_session.Session | ort_session.SessionHere]
Outputs = dict[str, np.ndarray]


@dataclasses.dataclass
class Reference:
    """A model, sets of inputs and its outputs on them: what any number of rewritten models are compared with."""

    path: str
    model: ir.Model
    open_session: Opener
    sets: list[InputSet] = dataclasses.field(default_factory=list)
    outputs: list[Outputs | str] = dataclasses.field(default_factory=list)  # of each set, or why there are none
    problem: str = ""  # why there is nothing to compare with
    loads: bool = True  # onnxruntime loads it
    notes: list[str] = dataclasses.field(default_factory=list)
    # The note that onnxruntime loads it only without its own optimizations, where that is so.
    unoptimized: list[str] = dataclasses.field(default_factory=list)

    # The inputs, with sizes that belong together; none where no values can be drawn for one of them.
    specs: Sequence[model_inputs.InputSpec] = ()
    num_given: int = 0  # sets, the first ones, that are the caller's
    decoder: decoders.Decoder | None = None  # what belongs together of the inputs and outputs of one

    _plain: list[Outputs | str] | None = None
    _float32: list[Outputs | str] | None = None
    _rounded: list[Outputs | str] | None = None
    _moved: list[Outputs | str] | None = None
    _all_keys: dict[frozenset[str], list[Outputs | str]] = dataclasses.field(default_factory=dict)  # by lengths

    @property
    def all_notes(self) -> list[str]:
        return [*self.unoptimized, *self.notes]

    @functools.cached_property
    def open_sizes(self) -> OpenSizes:
        return OpenSizes(self.model)

    def run(self, job: Job) -> ort_session.Results:
        """Runs any job in the way that the reference was run."""
        return ort_session.run_with(lambda: self.open_session(job), job)

    def outputs_or_sentence(
        self, session: ort_session.Session | ort_session.SessionHere, tensors: ort_session.Tensors
    ) -> Outputs | str:
        """What a model of this kind gives, with 0 where nothing is said of an element, or why it gives nothing."""
        found = outputs_or_sentence(session, tensors)
        return found if isinstance(found, str) or self.decoder is None else self.decoder.settled(found, tensors)

    @property
    def compared(self) -> list[int]:
        """The sets that it runs on."""
        return [index for index, outputs in enumerate(self.outputs) if isinstance(outputs, dict)]

    @property
    def num_telling(self) -> int:
        """Sets on which it gives something: empty outputs agree with any."""
        return sum(any(x.size for x in outputs.values()) for outputs in self.outputs if isinstance(outputs, dict))

    def lacks(self, compared: Sequence[int]) -> str:
        """A sentence where the model has caches, and none of these sets is a step on a filled one. The caller's own
        sets are enough."""
        if not any(spec.is_past for spec in self.specs) or any(index < self.num_given for index in compared):
            return ""
        if any(relations.is_full(self.specs, self.sets[index].tensors) for index in compared):
            return ""
        on = f": {'; '.join(self.sets[index].label for index in compared[:3])}" if compared else ""
        refused = self.refused([i for i, item in enumerate(self.sets) if relations.is_full(self.specs, item.tensors)])
        return (
            "no step was compared that has rows in the caches, new rows and more than one batch entry "
            f"({len(compared)} of {len(self.sets)} settings were compared{on}){refused}. {FIT_TOGETHER}"
        )

    def refused(self, indices: Sequence[int]) -> str:
        """The first of these sets that it does not run on, and why: the end of a sentence, or ""."""
        failed = ((self.sets[i].label, why) for i in indices if isinstance(why := self.outputs[i], str))
        return next((f"; the original refuses {label}: {why}" for label, why in failed), "")

    def plain_outputs(self, index: int) -> Outputs:
        """The outputs without onnxruntime's optimizations, computed once somebody asks; {} where that fails."""
        if self._plain is None:
            self._plain = self._again(self.path, [item.tensors for item in self.sets], optimize=False)
        return _or_nothing(self._plain, index)

    def moved_outputs(self, index: int) -> Outputs:
        """The outputs with the floating-point inputs moved by PERTURBATION; {} where that fails."""
        if self._moved is None:
            self._moved = self._again(self.path, [_moved(item.tensors) for item in self.sets])
        return _or_nothing(self._moved, index)

    def float32_outputs(self, index: int) -> Outputs:
        """The outputs of the same model in float32, computed once somebody asks; {} where that fails."""
        if self._float32 is None:
            tensors = [widen.inputs_in_float32(item.tensors) for item in self.sets]
            self._float32 = self._changed(widen.in_float32, tensors, "in float32")
        return _or_nothing(self._float32, index)

    def rounded_outputs(self, index: int) -> Outputs:
        """The outputs with each tensor rounded as the model says, where onnxruntime would leave roundings out
        (roundings.py), computed once somebody asks; {} where that fails."""
        if self._rounded is None:
            tensors = [item.tensors for item in self.sets]
            self._rounded = self._changed(roundings.round_all, tensors, "with all of its roundings", optimize=False)
        return _or_nothing(self._rounded, index)

    def all_keys_outputs(self, index: int, lengths: frozenset[str]) -> Outputs:
        """The outputs where a length of 0 hides no key (all_keys.py), computed once somebody asks; {} where that
        fails."""
        if lengths not in self._all_keys:
            tensors = [item.tensors for item in self.sets]
            change = functools.partial(all_keys.with_all_keys, names=lengths)
            self._all_keys[lengths] = self._changed(change, tensors, "with all keys where a length is 0")
        return _or_nothing(self._all_keys[lengths], index)

    def _changed(
        self,
        change: Callable[[ir.Model], ir.Model],
        tensors: Sequence[ort_session.Tensors],
        how: str,
        optimize: bool = True,
    ) -> list[Outputs | str]:
        """The outputs of the model that `change` makes of this one."""
        try:
            with scratch.folder(what="changed-") as folder:
                path = folder / "model.onnx"
                model_io.save(change(model_io.load(self.path)), path)
                return self._again(os.fspath(path), tensors, optimize)
        except (model_io.ModelError, OSError) as error:
            self.notes.append(f"the model could not be tried {how}: {error}")
            return []

    def _again(self, path: str, tensors: Sequence[ort_session.Tensors], optimize: bool = True) -> list[Outputs | str]:
        """Outputs on those sets that it runs on."""
        found: list[Outputs | str] = [""] * len(tensors)
        try:
            with self.open_session(Job(path, optimize=optimize, library=needs_library(self.model))) as session:
                for index in self.compared:
                    found[index] = self.outputs_or_sentence(session, tensors[index])
        except (ModelFailure, CannotRun):
            pass
        return found


def _or_nothing(found: list[Outputs | str], index: int) -> Outputs:
    outputs = found[index] if index < len(found) else ""
    return outputs if isinstance(outputs, dict) else {}


def _moved(tensors: ort_session.Tensors) -> Outputs:
    """Each element of a floating-point tensor up or down by PERTURBATION of itself."""
    random = np.random.default_rng(0)
    return {
        name: (array * (1 + PERTURBATION * random.choice((-1, 1), array.shape))).astype(array.dtype)
        if array.dtype in (np.float32, np.float64)
        else array
        for name, array in tensors.items()
    }


def make_reference(
    path: os.PathLike[str] | str,
    *,
    extra_inputs: Sequence[InputSet] = (),
    given_must_run: bool = False,
    assumed: Assumed | None = None,
    open_session: Opener = ort_session.Session,
    on_amount: Amount = lambda done, total: None,
) -> Reference:
    """Draws inputs and runs the original on them, and on `extra_inputs` first.

    Args:
        given_must_run: that it does not run on `extra_inputs` is a problem: a user who gave them believes that they are
            compared.
        assumed: what the drawn inputs keep to.
        open_session: ort_session.Session, or SessionHere.
        on_amount: told how many runs are done, of how many.
    """
    path, assumed = os.fspath(path), assumed or Assumed()
    model = model_io.load(path)
    decoder = decoders.read(model)
    reference = Reference(path, model, open_session, num_given=len(extra_inputs), decoder=decoder)
    random = np.random.default_rng(0)
    unsupported = ""
    try:
        reference.specs = relations.with_channels(model_inputs.input_specs(model), model)
        steps = list(decoders.steps(decoder, reference.specs, random)) if decoder else []
    except model_inputs.UnsupportedInput as error:
        reference.specs, steps, unsupported = [], [], str(error)
    if not unsupported or extra_inputs:
        try:
            _run_original(reference, [*extra_inputs, *steps], on_amount)
            if given_must_run:
                reference.problem = reference.problem or _refuses_given(reference)
            if reference.specs and not decoder and not reference.problem:
                _run_drawn(reference, assumed, random, on_amount)
        except model_inputs.UnsupportedInput as error:
            unsupported = str(error)
        except CannotRun as error:
            reference.problem = f"the original can't be run: {error}{advice(error)}"
    if unsupported and not extra_inputs:
        reference.problem = f"{unsupported}; {GIVE_INPUTS}"
    reference.problem = reference.problem or _tells_too_little(reference)
    return reference


def _refuses_given(reference: Reference) -> str:
    """A sentence where it does not run on inputs that the caller gave."""
    if not reference.loads:
        return ""
    for item, outputs in zip(reference.sets[: reference.num_given], reference.outputs, strict=False):
        if isinstance(outputs, str):
            return f"the original does not run on {item.label}: {outputs}; give inputs that it runs on"
    return ""


def _tells_too_little(reference: Reference) -> str:
    """A sentence where the original ran on too few sets to compare anything with it."""
    if not reference.compared:
        sentence = next((why for why in reference.outputs if isinstance(why, str)), "")
        advised = f"; {GIVE_INPUTS}" if reference.loads else ""  # what does not load does not run on any inputs
        advised += TRACED if advised and model_inputs.symbols(reference.specs) else ""
        return f"the original does not run in onnxruntime: {sentence}{advised}"
    if not reference.num_given and reference.num_telling < 2:
        label = reference.sets[reference.compared[0]].label
        refused = reference.refused(range(len(reference.sets)))
        return f"the original runs in one setting only ({label}), which shows too little{refused}. {FIT_TOGETHER}"
    return ""


def _run_drawn(reference: Reference, asked: Assumed, random: np.random.Generator, on_amount: Amount) -> None:
    """Runs the original on what settings.py draws, with sizes that belong together drawn so. `asked`: what the drawn
    inputs keep to, as the user said. Raises CannotRun, UnsupportedInput."""
    plain, model = reference.specs, reference.model
    # A float16 mask adds -65504, and the CPU adds it in float32: a query without keys gives the softmax of its scores
    # there, but the mean of the values where float16 is added in float16. So no query loses all its keys: of two
    # neighbours one is kept, and the first.
    full_rows = asked.full_rows or compare.least_precise(model) == "float16"
    assumed = dataclasses.replace(asked, full_rows=full_rows)
    has_past = any(spec.is_past for spec in plain)
    specs = relations.from_graph(plain, model) if has_past else list(plain)
    before = len(reference.sets)
    _run_original(reference, settings.plans(specs, assumed, random), on_amount)
    if not _has_step(reference, before) if has_past else not reference.compared[reference.num_given :]:
        found = _related(reference)
        if found is not None and found != specs:
            specs = found
            del reference.sets[before:], reference.outputs[before:]
            _run_original(reference, settings.plans(specs, assumed, random), on_amount)
    reference.specs = specs
    if not reference.compared[reference.num_given :]:
        length = _try_lengths(reference, specs, assumed, random)
        specs = relations.of_length(specs, length) if length else specs
    doubts = list(settings.doubts(specs, assumed, random, any_numbers=asked.any_numbers))
    if specs != list(plain):  # that these sizes belong together is doubted, too
        tried = [item.shapes for item in doubts]
        others = settings.doubts(plain, assumed, random, any_numbers=asked.any_numbers)
        doubts += [item for item in others if item.shapes not in tried]
    _run_original(reference, doubts, on_amount, doubts=True)
    if reference.compared[reference.num_given :] and reference.num_telling < 2:
        _try_lengths(reference, specs, assumed, random)


def _has_step(reference: Reference, start: int) -> bool:
    full = (relations.is_full(reference.specs, reference.sets[i].tensors) for i in reference.compared if i >= start)
    return any(full)


def _related(reference: Reference) -> list[model_inputs.InputSpec] | None:
    """The inputs with their sizes related so that the original runs, where that can be found."""
    try:
        with _open_original(reference) as session:
            return relations.fitting(
                reference.specs,
                reference.model,
                lambda tensors: isinstance(outputs_or_sentence(session, tensors), dict),
            )
    except (ModelFailure, CannotRun):
        return None


def advice(error: CannotRun) -> str:
    """What to do about it, as the end of a sentence, or ""."""
    return "; --verify-timeout SECONDS allows more" if isinstance(error, TookTooLong) else ""


def _run_original(reference: Reference, sets: Sequence[InputSet], on_amount: Amount, *, doubts: bool = False) -> None:
    """Runs the original on more sets, and keeps what comes out. Raises CannotRun.

    After a crash on one set it goes on with the next. `doubts` end once PATIENCE is over.
    """
    start, todo, running = time.monotonic(), list(sets), False
    while todo:
        try:
            with _open_original(reference) as session:
                while todo:
                    on_amount(len(sets) - len(todo), len(sets))
                    if doubts and time.monotonic() - start > PATIENCE:
                        reference.notes.append(f"{len(todo)} more settings were not tried after {PATIENCE:.0f} s")
                        return
                    reference.sets.append(todo.pop(0))
                    reference.outputs.append("")
                    running = True
                    reference.outputs[-1] = reference.outputs_or_sentence(session, reference.sets[-1].tensors)
                    if sentence := _depends_on_padding(reference, session):
                        reference.problem = sentence
                        return
                    running = False
        except ModelFailure as error:
            reference.loads = False
            reference.sets += todo
            reference.outputs += [str(error)] * len(todo)
            return
        except CannotRun as error:
            if not running or not (doubts or isinstance(error, ort_session.Crashed)):
                raise
            reference.outputs[-1], running = str(error), False
            if not isinstance(error, ort_session.Crashed):
                reference.notes.append(f"{len(todo)} more settings were not tried: {error}")
                return


def _depends_on_padding(reference: Reference, session: ort_session.Session | ort_session.SessionHere) -> str:
    """A sentence where what is left out of the comparison of the last set moves what is compared: then it counts, in
    this run or in a later one that reads the cache."""
    item, outputs = reference.sets[-1], reference.outputs[-1]
    if item.other_padding is None or isinstance(outputs, str):
        return ""
    again = reference.outputs_or_sentence(session, item.other_padding)
    relative = compare.RELATIVE_TOLERANCE[compare.least_precise(reference.model)]
    for name, want in outputs.items():
        if isinstance(again, str) or not compare.compare(name, want, again[name], relative).ok:
            return (
                f"output '{name}' of the original depends on padding, or on rows of a cache that hold nothing yet, on "
                f"{item.label}: what is computed there is open"
            )
    return ""


def open_optimized(
    reference: Reference, path: str, library: bool, what: str, notes: list[str]
) -> ort_session.Session | ort_session.SessionHere:
    """With onnxruntime's optimizations; without them where these fail: a defect of theirs, not of the model, of which a
    note is added to `notes`. `what`: what it calls the model."""
    try:
        return reference.open_session(Job(path, library=library))
    except (ModelFailure, ort_session.Crashed) as first:
        try:
            session = reference.open_session(Job(path, optimize=False, library=library))
        except (ModelFailure, ort_session.Crashed):
            raise first from None
        note = (
            f"onnxruntime loads {what} only without its own graph optimizations (graph_optimization_level = "
            f"ORT_DISABLE_ALL); with them: {first}"
        )
        notes += [note] if note not in notes else []
        return session


def _open_original(reference: Reference) -> ort_session.Session | ort_session.SessionHere:
    library = needs_library(reference.model)
    return open_optimized(reference, reference.path, library, "the original", reference.unoptimized)


def has_empty(tensors: ort_session.Tensors) -> bool:
    return any(tensor.size == 0 for tensor in tensors.values())


def outputs_or_sentence(
    session: ort_session.Session | ort_session.SessionHere, tensors: ort_session.Tensors
) -> Outputs | str:
    try:
        return session.run(tensors)
    except ModelFailure as error:
        return str(error)


def _try_lengths(
    reference: Reference, specs: Sequence[model_inputs.InputSpec], assumed: Assumed, random: np.random.Generator
) -> int:
    """Adds the first plans of another length that the original runs on, if there are any. Where it is one that its
    nodes ask for, a note says so, and the length is the result; else 0."""
    tried = [item.shapes for item in reference.sets]
    fixed = relations.fixed_sizes(reference.model)
    for length in (*settings.FALLBACK_LENGTHS, *fixed):
        sets = [item for item in settings.plans(specs, assumed, random, length) if item.shapes not in tried]
        before = len(reference.sets)
        _run_original(reference, sets, lambda done, total: None)
        if any(index >= before for index in reference.compared):
            reference.notes += [FIXED_LENGTH.format(length)] if length in fixed else []
            return length if length in fixed else 0
        del reference.sets[before:], reference.outputs[before:]
    return 0


def needs_library(model: ir.Model) -> bool:
    return any(node.domain == DOMAIN for node in all_nodes(model))
