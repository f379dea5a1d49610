# SPDX-License-Identifier: Apache-2.0
"""Attention sinks: one more logit a head, put beside the scores as a column. Called by match/softmax_core.py."""

from __future__ import annotations

import onnx_ir as ir

from faexport.nodes import name_of, producer
from faexport.spec import Refusal
from faexport.surgery import Builder
from faexport.understand.core.score_chain import Scores
from faexport.understand.layout.heads import Link, chain_of
from faexport.understand.layout.views import Atom, merged
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.dims import Dim


def sinks_of(scores: Scores, heads: Dim, a: Analysis) -> tuple[ir.Value, tuple[ir.Node, ...]] | Refusal:
    """The logits as float32 [H] and the new nodes that make them so."""
    assert scores.sink is not None
    node = producer(scores.sink)
    refusal = Refusal("a column beside the scores is not one logit for each head", name_of(node) if node else "")
    shape = a.shape(scores.sink)
    if shape is None or shape[-1] != 1 or "".join(scores.sink_axes) != "BHST":
        return refusal
    for link in reversed(chain_of(scores.sink, a)):
        if link.scale == 1.0 and _is_one_for_each_head(link, heads, a):
            build = Builder(a.opset)
            value = link.value
            if a.rank(value) != 1:
                value = build.reshape(value, [-1])
            if a.dtype(value) != ir.DataType.FLOAT:
                value = build.add("Cast", [value], ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
            return value, tuple(build.nodes)
    return refusal


def _is_one_for_each_head(link: Link, heads: Dim, a: Analysis) -> bool:
    """Does the tensor hold H numbers, and is the column their repetition over batch and rows?"""
    shape = a.known_shape(link.value)
    wide = [i for i, d in enumerate(shape) if d != 1]
    own = merged(link.view.axes[1])
    if heads == 1:
        return not wide and not own
    return (
        len(wide) == 1
        and own == (Atom(wide[0], Dim.of(1), heads),)
        and all(x.axis is None for i, axis in enumerate(link.view.axes) if i != 1 for x in axis)
    )
