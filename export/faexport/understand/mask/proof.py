# SPDX-License-Identifier: Apache-2.0
"""Proves what the mask of an attention site is, and gives it in the operator's words (spec.Mask).

Called for each site with the terms that the matcher peeled off the scores. What isn't proven stays a bias or a bool
mask; what can't be expressed is a refusal. The proof is by index algebra (index/) and is checked by
evaluation (check.py).
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence

import onnx_ir as ir

from faexport import spec
from faexport.nodes import name_of
from faexport.understand.index import transfer_layout, transfer_math  # noqa: F401  (registers the transfer functions)
from faexport.understand.index.interpreter import Interpreter
from faexport.understand.index.tensor import Unknown
from faexport.understand.mask.builder import MaskBuilder
from faexport.understand.mask.check import Checker
from faexport.understand.mask.emit import Emitter
from faexport.understand.mask.options import MaskOptions
from faexport.understand.mask.terms import (
    NotAMask,
    Site,
)


class GraphMasks:
    """What is shared by the sites of one graph: abstract values, new nodes, checks already made."""

    def __init__(self, graph: ir.Graph | ir.Function, shapes: Shapes | None):
        self.ctx = Interpreter(graph, shapes)
        self.emitter = Emitter(self.ctx, graph)
        self.checker = Checker(self.ctx)
        self.known: dict[tuple, tuple[spec.Mask, tuple[str, ...]]] = {}


UNKNOWN_SHAPE = "the shape of its mask can't be found out"
Shapes = Callable[[ir.Value], Sequence[int | str | None] | None]
_graphs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def graph_masks(graph: ir.Graph | ir.Function, shapes: Shapes | None = None) -> GraphMasks:
    if graph not in _graphs:
        _graphs[graph] = GraphMasks(graph, shapes)
    return _graphs[graph]


def understand_mask(
    terms: Sequence[spec.MaskTerm],
    scores: spec.ScoreShape,
    options: MaskOptions = MaskOptions(),
    shapes: Shapes | None = None,
) -> spec.Mask | spec.Refusal:
    """The mask of one site, or why it can't be expressed. New nodes are in Mask.new_nodes (in order, shared between
    the sites of a graph: a node that is in the graph already isn't inserted again). `shapes` is a second source of
    shapes."""
    if not terms:
        return spec.Mask(rows_see_a_key=True)
    shared = graph_masks(scores.graph, shapes)
    names = tuple(name_of(t.node) for t in terms)
    try:
        site = Site(shared.ctx, terms, scores)
        key = _key(site, terms, options)
        if key not in shared.known:
            shared.known[key] = MaskBuilder(shared.emitter, site, terms, options).build(), names
    except NotAMask as reason:
        return spec.Refusal(str(reason), names[-1])
    except (Unknown, RecursionError):
        return _as_it_stands(terms) or spec.Refusal(UNKNOWN_SHAPE, names[-1])
    mask, first = shared.known[key]
    if options.check:
        wrong = shared.checker.check(key, site, terms, mask, options)
        if wrong:
            text = f"what was proven of its mask isn't what the mask computes ({wrong}); please report this model"
            return spec.Refusal(text, names[-1])
    facts = (spec.Fact(f.text, (*(n for n in f.nodes if n not in first), *names)) for f in mask.facts)
    return dataclasses.replace(mask, facts=tuple(facts))


def _as_it_stands(terms: Sequence[spec.MaskTerm]) -> spec.Mask | None:
    """One tensor added to scores [B, H, S_q, S_kv] is a bias, whatever it is made of."""
    term = terms[0]
    if len(terms) > 1 or (term.kind, term.axes, term.factor) != (spec.TermKind.ADD, "BHST", 1.0):
        return None
    fact = spec.Fact("bias, broadcast as it is: how it is computed is not understood", (name_of(term.node),))
    return spec.Mask(attn_bias=term.value, facts=(fact,))


def _key(site: Site, terms: Sequence[spec.MaskTerm], options: MaskOptions) -> tuple:
    """Sites with the same key have the same mask: layers share one proof, its nodes and its check."""
    parts = [
        (t.kind, t.axes, t.keep_when, t.factor, *(site.element(t, v) for v in (t.value, t.fill) if v)) for t in terms
    ]
    scores = site.scores
    return (*parts, site.index, tuple(site.sizes.values()), scores.dtype, scores.nan_guard, scores.sinks, options)
