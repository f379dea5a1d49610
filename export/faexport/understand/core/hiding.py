# SPDX-License-Identifier: Apache-2.0
"""Exponentials that become 0 in front of their sum: their scores are hidden by a bool mask. Called by
match/softmax_core.py."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import name_of
from faexport.graph.surgery import Builder
from faexport.spec import MaskTerm, Refusal, RefusalKind, TermKind
from faexport.understand.core.factors import is_gate
from faexport.understand.core.score_chain import Scores, label_axes, letters
from faexport.understand.core.softmax import Hiding, Softmax
from faexport.understand.shapes.analysis import Analysis

NOT_A_MASK = (
    "before they are summed the exponentials are multiplied by a tensor that may hold other numbers than 0 and 1 "
    "(--assume zeros-and-ones: masks hold nothing else)"
)


def with_hidden(scores: Scores, softmax: Softmax, assumed: bool, a: Analysis) -> Scores | Refusal:
    """The scores, where a mask hides those whose exponentials become 0. With `assumed`, masks hold 0 and 1 only."""
    hiding = softmax.hiding
    if hiding is None:
        return scores
    axes = label_axes(scores.view, letters(scores.product), scores.shape)
    if axes is None or scores.sink is not None:
        return Refusal("a mask meets the exponentials in a shape that is not understood", name_of(hiding.node))
    if not is_mask(hiding.value, a) and (not assumed or a.is_static(hiding.value)):
        return Refusal(NOT_A_MASK, name_of(hiding.node), RefusalKind.FACTOR)
    dims = tuple(scores.view.shape)
    term = MaskTerm(
        TermKind.HIDDEN, _as_condition(hiding, a), hiding.node, "".join(axes), dims, keep_when=hiding.keep_when
    )
    return dataclasses.replace(scores, terms=[*scores.terms, term], nodes=[*scores.nodes, hiding.node])


def _as_condition(hiding: Hiding, a: Analysis) -> ir.Value:
    """The bool tensor that the exponentials are kept or hidden by, by a node that is not in the graph yet."""
    value = hiding.value
    if a.dtype(value) == ir.DataType.BOOL or a.is_static(value):
        return value
    made = Builder(a.opset).add("Cast", [value], ir.DataType.BOOL, to=int(ir.DataType.BOOL))
    made.name = f"{hiding.node.outputs[0].name}_faexport_kept"
    a.define_broadcast(made, value)
    return made


def is_mask(value: ir.Value, a: Analysis) -> bool:
    """Does the tensor hold nothing but 0 and 1? Of a constant each element is looked at."""
    if a.is_static(value):
        array = a.constant(value)
        return array is not None and bool(np.isin(array, (0, 1)).all())
    return is_gate(value, a)
