# SPDX-License-Identifier: Apache-2.0
"""Proves what the mask of an attention site is, and gives it in the operator's words (spec.Mask).

Called for each site with the terms that the matcher peeled off the scores. What isn't proven stays a bias or a bool
mask; what can't be expressed is a refusal. The proof is by index algebra (index/) and is checked by
evaluation (check.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from faexport import spec
from faexport.graph.nodes import name_of
from faexport.sizes.algebra import Expr
from faexport.sizes.dims import Dim
from faexport.understand.index import (
    transfer_layout,
    transfer_math,  # noqa: F401  (registers the transfer functions)
)
from faexport.understand.index.interpreter import Interpreter
from faexport.understand.index.tensor import Unknown
from faexport.understand.mask.check import Checker
from faexport.understand.mask.draft import INFINITE_ROW, Draft
from faexport.understand.mask.emit import Emitter
from faexport.understand.mask.nodes import Nodes
from faexport.understand.mask.options import MaskOptions
from faexport.understand.mask.site import NotAMask, Site
from faexport.understand.mask.strategies import mask_of
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.limits import at_least_one


class _Shared:
    """What the sites of one graph share whose scores have the same sizes: abstract values and checks already made."""

    def __init__(self, analysis: Analysis, positive: frozenset[Expr], nodes: Nodes, graph: ir.Graph | ir.Function):
        self.ctx = Interpreter(analysis, positive)
        self.emitter = Emitter(self.ctx, graph, nodes)
        self.checker = Checker(self.ctx)
        self.known: dict[tuple, tuple[spec.Mask, tuple[str, ...]]] = {}


class Masks:
    """The proofs of the masks of one model. They hold as long as the graph in front of the sites doesn't change:
    whoever edits a model makes a new analysis, and new proofs."""

    def __init__(self, analysis: Analysis):
        self.analysis = analysis
        self._nodes: dict[ir.Graph | ir.Function, Nodes] = {}
        self._shared: dict[tuple, _Shared] = {}

    def renewed(self, analysis: Analysis) -> Masks:
        """New proofs, for the model as it is now. What was already made for a graph is not made twice."""
        masks = Masks(analysis)
        masks._nodes = self._nodes
        return masks

    def writes_everything(self, node: ir.Node) -> bool:
        """Is a ScatterND known to give its updates, whatever stood there before?"""
        return transfer_layout.writes_everything(node, Interpreter(self.analysis))

    def starts_of_part(self, node: ir.Node) -> tuple[int, ...] | None:
        """Where a ScatterND that writes one box of elements begins, on each of the axes that its indices name."""
        return transfer_layout.starts_written(node, Interpreter(self.analysis))

    def nodes(self, graph: ir.Graph | ir.Function) -> Nodes:
        """Makes the new nodes that sites of a graph share."""
        return self._nodes.setdefault(graph, Nodes(self.analysis.opset))

    def understand(
        self, terms: Sequence[spec.MaskTerm], scores: spec.ScoreShape, options: MaskOptions = MaskOptions()
    ) -> spec.Mask | spec.Refusal:
        """The mask of one site, or why it can't be expressed. New nodes are in Mask.new_nodes (in order, shared between
        the sites of a graph: a node that is in the graph already isn't inserted again)."""
        if not terms:
            return spec.Mask(rows_see_a_key=True)
        names = tuple(name_of(t.node) for t in terms)
        try:
            with self.analysis.without_learnt():  # what is made here is shared by sites
                return self._proven(terms, scores, options, names)
        except NotAMask as reason:
            return spec.Refusal(str(reason), names[-1], reason.kind)
        except Unknown:
            return spec.Refusal(UNKNOWN_SHAPE, names[-1], spec.RefusalKind.UNKNOWN_SIZES)

    def _proven(
        self, terms: Sequence[spec.MaskTerm], scores: spec.ScoreShape, options: MaskOptions, names: tuple[str, ...]
    ) -> spec.Mask | spec.Refusal:
        shared = self._shared_by(scores)
        site = Site(shared.ctx, terms, scores)
        key = _key(site, terms, options)
        if key not in shared.known:
            try:
                shared.known[key] = mask_of(shared.emitter, site, options), names
            except Unknown:
                shared.known[key] = _as_it_stands(Draft(shared.emitter, site, options)), names
        mask, first = shared.known[key]
        if options.check:
            wrong = shared.checker.check(key, site, terms, mask, options)
            if wrong:
                text = f"what was proven of its mask isn't what the mask computes ({wrong}); please report this model"
                return spec.Refusal(text, names[-1], spec.RefusalKind.DEFECT)
        facts = (dataclasses.replace(f, nodes=(*(n for n in f.nodes if n not in first), *names)) for f in mask.facts)
        return dataclasses.replace(mask, facts=tuple(facts))

    def _shared_by(self, scores: spec.ScoreShape) -> _Shared:
        sizes = (scores.batch, scores.heads, scores.seqlen_q, scores.seqlen_kv)
        positive = frozenset(a for d in sizes if isinstance(d, Dim) for a in at_least_one(d.expr))
        key = scores.graph, positive
        if key not in self._shared:
            self._shared[key] = _Shared(self.analysis, positive, self.nodes(scores.graph), scores.graph)
        return self._shared[key]


def _as_it_stands(draft: Draft) -> spec.Mask:
    """One tensor added to the scores is a bias, whatever it is made of. Raises NotAMask of anything else."""
    term, tensors = draft.terms[0], draft.site.tensors
    if len(draft.terms) > 1 or (term.kind, term.factor) != (spec.TermKind.ADD, 1.0) or tensors[term.value].rank == 0:
        raise NotAMask(NOT_UNDERSTOOD)
    try:
        draft.mask.attn_bias = draft.placed(term)
    except Unknown:
        raise NotAMask(NOT_UNDERSTOOD) from None
    names = (name_of(term.node),)
    draft.facts += [
        spec.Fact("bias, broadcast as it is: how it is computed is not understood", names),
        spec.Fact(INFINITE_ROW, names),
    ]
    return draft.finished()


UNKNOWN_SHAPE = "the shape of its mask can't be found out"
NOT_UNDERSTOOD = "how its mask is computed is not understood, and it is not one tensor that is added to the scores"


def _key(site: Site, terms: Sequence[spec.MaskTerm], options: MaskOptions) -> tuple:
    """Sites with the same key have the same mask: layers share one proof, its nodes and its check."""
    parts = [
        (t.kind, t.axes, t.keep_when, t.factor, t.narrowed, site.type_of(t))
        + tuple(site.element(t, v) for v in (t.value, t.fill) if v)
        for t in terms
    ]
    scores = site.scores
    return (*parts, site.index, tuple(site.sizes.values()), scores.dtype, scores.nan_guard, scores.sinks, options)
