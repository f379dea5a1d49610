# SPDX-License-Identifier: Apache-2.0
"""Finders of attention sites: one file per source form, each registered with the ops that anchor it.

A matcher looks at one anchor node and returns Candidates with their outcome (an AttentionSpec or a Refusal): one, one
for each product that reads a softmax, or none where the node is no attention at all. It changes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import pkgutil
import traceback
from collections.abc import Callable

import onnx_ir as ir

from faexport.graph.nodes import name_of, op
from faexport.graph.surgery import Missing
from faexport.options import Options
from faexport.spec import AttentionSpec, Candidate, Refusal, RefusalKind
from faexport.understand.mask.proof import Masks
from faexport.understand.shapes.analysis import Analysis


@dataclasses.dataclass(frozen=True)
class Context:
    """What a matcher may ask: the graph that the anchor is in, what is known of the model, the user's options."""

    graph: ir.Graph | ir.Function
    root: ir.Graph | ir.Function  # the main graph or function that `graph` is nested in, or is
    analysis: Analysis
    masks: Masks
    options: Options


Matcher = Callable[[ir.Node, Context], list[Candidate]]


@dataclasses.dataclass(frozen=True)
class Registration:
    source: str
    anchors: frozenset[str]
    match: Matcher
    min_opset: int


Refiner = Callable[[AttentionSpec, Context], AttentionSpec]

MATCHERS: list[Registration] = []
REFINERS: list[Refiner] = []


def matcher(source: str, anchors: tuple[str, ...], min_opset: int = 1) -> Callable[[Matcher], Matcher]:
    """Registers a matcher for nodes of these ops ("domain::name" outside ONNX's own) in models of this opset or a later
    one."""

    def register(function: Matcher) -> Matcher:
        MATCHERS.append(Registration(source, frozenset(anchors), function, min_opset))
        return function

    return register


def refiner(function: Refiner) -> Refiner:
    """Registers what looks at every matcher's spec once more."""
    REFINERS.append(function)
    return function


@functools.cache
def load_matchers() -> None:
    """Imports every file of this folder: each registers what it has."""
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        importlib.import_module(f"{__name__}.{module}")


def find_sites(context: Context) -> list[Candidate]:
    """All sites of the context's graph (bodies nested in it not included), in graph order."""
    load_matchers()
    found = []
    for node in context.graph:
        for entry in MATCHERS:
            if op(node) in entry.anchors and entry.min_opset <= context.analysis.opset:
                candidates = _tried(entry, node, context)
                if candidates:
                    found += candidates
                    break
    return found


def _tried(entry: Registration, node: ir.Node, context: Context) -> list[Candidate]:
    """The matcher's answer. A defect of ours at one site is a refusal, and costs the model no other site."""
    context.analysis.forget()
    try:
        found = entry.match(node, context)
        for candidate in found:
            if isinstance(candidate.outcome, AttentionSpec):
                for refine in REFINERS:
                    candidate.outcome = refine(candidate.outcome, context)
        return found
    except Missing as what:
        return [Candidate(node, context.graph, entry.source, outcome=Refusal(f"fusing it {what}", name_of(node)))]
    except Exception as error:
        if os.environ.get("FAEXPORT_TRACEBACK"):
            traceback.print_exc()
        why = f"our analysis of it failed ({type(error).__name__}: {error}); please report this model"
        return [Candidate(node, context.graph, entry.source, outcome=Refusal(why, name_of(node), RefusalKind.DEFECT))]
