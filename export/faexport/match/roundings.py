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

from faexport.graph.nodes import producer
from faexport.match import Context
from faexport.spec import Assumption, Fact, MaskTerm, Refusal, RefusalKind
from faexport.understand.core.rounding import Rounding, rounding_at
from faexport.understand.shapes.analysis import Analysis

CONSENT = "--assume scores-unquantized computes it without"


@dataclasses.dataclass(frozen=True)
class Roundings:
    """Those of one site, by what is rounded."""

    scores: Sequence[Rounding]
    masks: Sequence[Rounding]
    weights: Sequence[Rounding]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the tensors in whose place the operator has what they were before (AttentionSpec.left_out)."""
        return tuple(one.dequantize.outputs[0].name or "" for one in (*self.scores, *self.masks, *self.weights))

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
        for what, roundings in (("scores", self.scores), ("masks", self.masks), ("attention weights", self.weights)):
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
