# SPDX-License-Identifier: Apache-2.0
"""Which roundings between the two products of a quantized site the operator may leave out, and what is said of it. Used
by match/softmax_core.py.

The operator computes scores and weights in one pass and never rounds them to a few bits. Weights in float8 are left to
it: what it does is nearer to the model before it was quantized. Anything coarser, and float8 with a scale that cuts
weights off, may have changed what a model does, so a user has to agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from faexport.graph.nodes import given, producer
from faexport.match import Context
from faexport.sizes.dims import Dim
from faexport.spec import Assumption, Fact, MaskTerm, Refusal, RefusalKind
from faexport.understand.core import rounding
from faexport.understand.core.rounding import Rounding, rounding_at
from faexport.understand.core.score_chain import Scores
from faexport.understand.core.sinks import Sinks, sinks_of
from faexport.understand.shapes.analysis import Analysis

CONSENT = f"{rounding.CONSENT} computes it without"


@dataclasses.dataclass(frozen=True)
class Roundings:
    """Those of one site, by what is rounded."""

    scores: Sequence[Rounding]
    masks: Sequence[Rounding]
    weights: Sequence[Rounding]
    sinks: Sequence[Rounding] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the tensors in whose place the operator has what they were before (AttentionSpec.left_out)."""
        return tuple(one.dequantize.outputs[0].name or "" for one in self.all)

    @property
    def all(self) -> tuple[Rounding, ...]:
        return (*self.scores, *self.masks, *self.sinks, *self.weights)

    def refusal(self, context: Context) -> Refusal | None:
        """Why the site has to stay as it is, if it does."""
        if context.options.assume_scores_unquantized:
            return None
        coarse = [one for one in self.weights if self.scores or not one.holds_weights]
        for what, roundings in (("scores", self.scores), ("attention weights", coarse)):
            for one in roundings:
                why = f"the {what} are quantized inside the block (QuantizeLinear to {one.dtype.name.lower()})"
                return Refusal(f"{why}: {CONSENT}", one.names[0], RefusalKind.QUANTIZED)
        return None

    def facts(self) -> list[Fact]:
        """One sentence for each rounding that is left out."""
        found: list[Fact] = []
        kinds = {"scores": self.scores, "masks": self.masks, "sinks": self.sinks, "attention weights": self.weights}
        for what, roundings in kinds.items():
            for one in roundings:
                text = f"the {what} are not rounded to {one.dtype.name.lower()} as the original does"
                if what == "attention weights" and one.holds_weights:
                    found.append(Fact(text, one.names))
                else:
                    found.append(Assumption(f"{text}, as was asked", one.names))
        return found


def between(nodes: Sequence[ir.Node], a: Analysis) -> list[Rounding]:
    """The roundings among these nodes, in their order."""
    found = [(node, rounding_at(node, a)) for node in nodes]
    return [one for node, one in found if one is not None and node is one.dequantize]


def why_unread(why: str, consent_may_help: bool, context: Context) -> str:
    """Why operators on quantized numbers are left: with what may help, or where the user has agreed to that, why it
    didn't."""
    if not consent_may_help:
        return why
    if context.options.assume_scores_unquantized:
        return f"{why}, and not all around it is read as operators on floats"
    return f"{why}; see {rounding.CONSENT}"


def sinks_in_front(
    scores: Scores, heads: Dim, unread: Refusal, context: Context
) -> tuple[list[Rounding], Sinks | Refusal]:
    """The roundings of a column of sinks that is not read as it is (`unread`), and the sinks in front of them."""
    a, found = context.analysis, sinks_of(scores, None, heads, context.analysis, lambda node: _before(node, context))
    if found is None or isinstance(found, Refusal) or scores.sink is None or found[2] is None:
        return [], unread
    left_out = _up_to(scores.sink, found[2], a)
    if not context.options.assume_scores_unquantized:
        why = f"the sinks are quantized inside the block: {CONSENT}"
        return left_out, Refusal(why, left_out[0].names[0], RefusalKind.QUANTIZED)
    return left_out, found


def _before(node: ir.Node, context: Context) -> ir.Value | None:
    """What stood in front of a rounding that the node ends."""
    one = rounding_at(node, context.analysis)
    return one.quantize.inputs[0] if one is not None and one.dequantize is node else None


def _up_to(value: ir.Value, source: ir.Value, a: Analysis) -> list[Rounding]:
    """The roundings among the nodes that rearrange `source` to `value`."""
    found = []
    while value is not source and (node := producer(value)) is not None:
        one = rounding_at(node, a)
        found += [one] if one is not None else []
        value = given(one.quantize if one is not None else node, 0)
    return found


def unrounded(terms: Sequence[MaskTerm], context: Context) -> tuple[list[MaskTerm], list[Rounding]]:
    """The terms with what stood in front of their roundings, where the user agreed to that, and these."""
    found, left_out = [], []
    for term in terms:
        one = rounding_at(producer(term.value), context.analysis)
        if one is not None and one.quantize.inputs[0] is not None and context.options.assume_scores_unquantized:
            term = dataclasses.replace(term, value=one.quantize.inputs[0])
            left_out.append(one)
        found.append(term)
    return found, left_out
