# SPDX-License-Identifier: Apache-2.0
"""Makes the float8 form of a rewritten model, whose fusions are verified already, and measures what it is worth. Called
by jobs.py.

A site is held to its own node in float32 on the numbers that were rounded to float8, by the rule for all sites: so no
more than that rounding is lost, on a CPU. How much it loses is measured on the user's inputs, from which the factors
come. The distance of the model's outputs from the original's is told, and not judged: float8 is the user's choice.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from faexport.errors import ModelError
from faexport.fallback.functions import add_fallback, remove_fallback
from faexport.files import model_io, scratch
from faexport.graph.edits import Names, name_node
from faexport.graph.fused import is_fused
from faexport.graph.nodes import all_nodes, dtype_name
from faexport.graph.surgery import Builder
from faexport.precision import float8
from faexport.precision.float8 import Site, Spread
from faexport.report.data import Float8, Float8Output, Float8Site, VerificationStatus
from faexport.runtimes import ort_session
from faexport.runtimes.ort_session import CannotRun, Job, ModelFailure
from faexport.spec import Layout
from faexport.understand.shapes.analysis import Analysis
from faexport.verify import compare
from faexport.verify.reference import Amount, Reference
from faexport.verify.side_by_side_math import Emit, Statistics, statistics

_MEASURES = "--dtype fp8 measures the factors of float8 numbers on your own inputs"
WHERE = "attention in float8 runs on CPUs and on GPUs of compute capability 9.0; on other GPUs the file does not run"
MOST_ERROR = 0.25  # of a site; one that loses more keeps the model's precision


@dataclasses.dataclass
class Prepared:
    """A rewritten model, some of whose attention may be computed in float8."""

    path: str
    model: ir.Model  # without the operator's function in standard operators
    a: Analysis
    sites: list[Site]

    @classmethod
    def read(cls, path: os.PathLike[str] | str) -> Prepared:
        model = model_io.load(path)
        remove_fallback(model)
        a = Analysis(model)
        inner = "it stands in a body of an If, Loop or Scan, or in a function"
        sites = [
            float8.site_of(node, a) if node.graph is model.graph else Site(node, left=inner)
            for node in all_nodes(model)
            if is_fused(node)
        ]
        return cls(os.fspath(path), model, a, sites)

    @property
    def chosen(self) -> list[Site]:
        """Those that can be computed in float8."""
        return [site for site in self.sites if not site.left]

    @property
    def to_measure(self) -> dict[ir.Value, Layout]:
        return {x.value: x.layout for site in self.chosen for x in site.to_measure}


@dataclasses.dataclass
class Made:
    """The model with attention in float8, and what is said of it."""

    model: ir.Model
    said: Float8


def prepare(original: os.PathLike[str] | str, rewritten: os.PathLike[str] | str, num_given: int) -> Prepared:
    """Raises ModelError with one sentence where the files alone tell that nothing can be computed in float8; nothing is
    run, so that a caller can ask before the models are compared. `num_given`: how many sets of inputs the user gave."""
    prepared = Prepared.read(rewritten)
    opset, least = prepared.model.opset_imports.get("", 0), float8.MINIMUM_OPSET
    if opset < least:
        raise ModelError(
            f"{original}: has opset {opset}, and float8 takes {least} or later; --opset {least} converts it"
        )
    if prepared.to_measure and not num_given:
        raise ModelError(f"{original}: {_MEASURES}; --inputs FILE.npz gives some")
    return prepared


def make(reference: Reference, prepared: Prepared, *, num_given: int, fallback: bool) -> Made:
    """Measures the factors and converts each fused node that can be computed in float8.

    Args:
        reference: the original, which ran on the user's inputs first.
        prepared: of a verified file; changed into the result.
        num_given: how many of the reference's sets are the user's.
        fallback: carry the operator's function in standard operators.

    Raises ModelError with one sentence where no node can be converted, or nothing can be measured.
    """
    name = reference.path
    if reference.problem:
        raise ModelError(f"{name}: can't be computed in float8: {reference.problem}")
    given = [index for index in range(num_given) if index in reference.compared]
    if prepared.to_measure and not given:
        raise ModelError(f"{name}: {_MEASURES}; the original does not run on those of --inputs")
    try:
        spreads = _spreads(prepared, reference, given[:1])
        rows = _Comparison(prepared.path, reference, spreads).rows(given or reference.compared)
    except (ModelFailure, CannotRun) as error:
        raise ModelError(f"{name}: can't be computed in float8: its numbers can't be measured: {error}") from error
    said = Float8(tuple(rows.get(site.name) or _left(site) for site in prepared.sites), inputs=_label(reference, given))
    chosen = [row.name for row in said.sites if not row.left]
    if not chosen:
        whys = dict.fromkeys(row.left for row in said.sites)
        raise ModelError(f"{name}: no attention of it is computed in float8: {'; '.join(whys)}")
    float8.convert(prepared.model, [site for site in prepared.chosen if site.name in chosen], spreads, prepared.a)
    if fallback:
        add_fallback(prepared.model)
    return Made(prepared.model, said)


def _left(site: Site) -> Float8Site:
    return Float8Site(site.name, site.left)


def _label(reference: Reference, given: Sequence[int]) -> str:
    return reference.sets[given[0]].label if given else "the inputs of the verification"


def _spreads(prepared: Prepared, reference: Reference, given: Sequence[int]) -> dict[str, Spread]:
    """Of each tensor that has to be measured, by its name."""
    if not prepared.to_measure:
        return {}
    model = model_io.load(prepared.path)
    remove_fallback(model)
    stored = model.graph.initializers.values()
    made = (value for node in model.graph for value in node.outputs)
    values = {value.name: value for value in (*model.graph.inputs, *stored, *made)}
    build, names, measured = Builder(model.opset_imports.get("", 0)), Names(model), []
    for value, layout in prepared.to_measure.items():
        measured.append((value.name or "", float8.measure(build, values[value.name], layout)))
    for node in build.nodes:
        name_node(node, "faexport_measure", names)
    model.graph.extend(build.nodes)
    model.graph.outputs.clear()
    model.graph.outputs.extend(value for _, vectors in measured for value in vectors)
    outputs = _run(model, reference, given)[given[0]]
    return {
        name: Spread(*(outputs[value.name or ""].astype(np.float64) for value in vectors)) for name, vectors in measured
    }


def _run(model: ir.Model, reference: Reference, indices: Sequence[int]) -> dict[int, dict[str, np.ndarray]]:
    """Outputs on these of the reference's sets. Raises ModelFailure where the first of them fails."""
    library = ort_session.has_library()
    if not library and (why := add_fallback(model)):
        raise ModelFailure(f"the operator's library is not installed, and without it {why}")
    wanted, found = {value.name for value in model.graph.inputs}, {}
    with scratch.folder(what="float8-") as folder:
        path = folder / "model.onnx"
        model_io.save(model, path)
        with reference.open_session(Job(os.fspath(path), optimize=False, library=library)) as session:
            for index in indices:
                tensors = {name: x for name, x in reference.sets[index].tensors.items() if name in wanted}
                try:
                    found[index] = session.run(tensors)
                except ModelFailure:
                    if index == indices[0]:
                        raise
    return found


class _Comparison:
    """A rewritten model with each of its sites in float8 beside it, and that in float32 on the rounded numbers."""

    def __init__(self, path: os.PathLike[str] | str, reference: Reference, spreads: dict[str, Spread]):
        own = Prepared.read(path)
        self.model, self.reference, self.a, self.sites = own.model, reference, own.a, own.chosen
        self.names = Names(self.model)
        self.outputs = {site.name: self._beside(site, spreads) for site in self.sites}
        self.model.graph.outputs.clear()
        self.model.graph.outputs.extend(self.outputs.values())

    def _beside(self, site: Site, spreads: dict[str, Spread]) -> ir.Value:
        graph, build = self.model.graph, Builder(self.a.opset)
        dtype = self.a.dtype(site.node.inputs[0])
        assert dtype is not None
        made = float8.quantized(build, site, {x.value: spreads[x.value.name or ""] for x in site.to_measure}, self.a)
        ours, exact = _copy(site.node), _copy(site.node)
        float8.set_operands(ours, made, build, dtype)
        for index, value in enumerate(made.back):
            exact.replace_input_with(index, value)
        for new in [*build.nodes, ours, exact]:
            new.name = None
            name_node(new, f"{site.name}_float8", self.names)
        graph.extend([*build.nodes, ours, exact])
        own = site.node.outputs[0]
        result = statistics(
            Emit(graph, graph), exact.outputs[0], ours.outputs[0], None, [], exact=False, floats=(own, own)
        )
        return result

    def rows(self, measured: Sequence[int]) -> dict[str, Float8Site]:
        """What became of each site. `measured`: the sets on which its error counts."""
        if not self.sites:
            return {}
        others = [index for index in self.reference.compared if index not in measured]
        found = _run(self.model, self.reference, [*measured, *others])
        return {site.name: self._row(site, found, measured) for site in self.sites}

    def _row(self, site: Site, found: dict[int, dict[str, np.ndarray]], measured: Sequence[int]) -> Float8Site:
        read = {i: Statistics.read(outputs[self.outputs[site.name].name or ""]) for i, outputs in found.items()}
        error = max(read[index].unquantized_to_new for index in measured if index in read)
        own = not site.to_measure
        dtype = self.a.dtype(site.node.inputs[0])
        allowed = compare.RELATIVE_TOLERANCE[dtype_name(dtype) or "float32"]
        for index, one in read.items():
            wrong = one.num_broken or one.num_other_sizes or not one.max_abs_diff <= allowed * one.magnitude
            if wrong:
                where = self.reference.sets[index].label
                why = f"it is not what float32 gives for the rounded numbers, by {one.max_abs_diff:.3g} on {where}"
                return Float8Site(site.name, why, own, error)
        lost = f"float8 loses {100 * error:.2g} % of its output there, more than {100 * MOST_ERROR:.0f} %"
        return Float8Site(site.name, "" if error <= MOST_ERROR else lost, own, error)


def _copy(node: ir.Node) -> ir.Node:
    return ir.Node(
        node.domain, node.op_type, list(node.inputs), list(node.attributes.values()), num_outputs=len(node.outputs)
    )


def check(
    reference: Reference,
    said: Float8,
    written: os.PathLike[str] | str,
    *,
    num_given: int,
    on_amount: Amount = lambda done, total: None,
) -> Float8:
    """Runs the written file and tells how far its outputs are from the original's. Returns `said`, completed; never
    raises for a model that can't be run."""
    given = [index for index in range(num_given) if index in reference.compared] or reference.compared
    library = ort_session.has_library()
    worst: dict[str, Float8Output] = {}
    try:
        with reference.open_session(Job(os.fspath(written), library=library)) as session:
            for done, index in enumerate(given):
                on_amount(done, len(given))
                got = reference.outputs_or_sentence(session, reference.sets[index].tensors)
                want = reference.outputs[index]
                assert isinstance(want, dict)
                if isinstance(got, str):
                    return dataclasses.replace(said, status=VerificationStatus.FAILED, reason=got)
                for name, array in want.items():
                    row = _distance(name, array, got[name])
                    if row is None:
                        why = f"output '{name}' has numbers in other places than the original's"
                        return dataclasses.replace(said, status=VerificationStatus.FAILED, reason=why)
                    worst[name] = max(worst.get(name, row), row, key=lambda one: one.error)
    except (ModelFailure, CannotRun) as error:
        return dataclasses.replace(said, status=VerificationStatus.FAILED, reason=f"the float8 model: {error}")
    return dataclasses.replace(said, outputs=tuple(worst.values()), status=VerificationStatus.PASSED)


def _distance(name: str, want: np.ndarray, got: np.ndarray) -> Float8Output | None:
    """None where the shapes differ, or one has a number where the other has none."""
    if want.shape != got.shape:
        return None
    a, b = (array.astype(np.float64) for array in (want, got))
    known = np.isfinite(a)
    if not np.array_equal(known, np.isfinite(b)):
        return None
    difference = (b - a)[known]
    size = float(np.sqrt(np.mean(a[known] ** 2))) if known.any() else 0.0
    rms = float(np.sqrt(np.mean(difference**2))) if known.any() else 0.0
    return Float8Output(name, rms / size if size else rms, float(np.abs(difference).max(initial=0.0)))
