# SPDX-License-Identifier: Apache-2.0
"""Attention sinks: one more logit a head, put beside the scores as a column, or added to the sum of a softmax that is
written out. Called by match/softmax_core.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import name_of, producer
from faexport.graph.surgery import Builder
from faexport.sizes.dims import Dim
from faexport.spec import Refusal
from faexport.understand.core.fills import fill_of
from faexport.understand.core.one_more import Logit
from faexport.understand.core.score_chain import Scores, label_axes, letters
from faexport.understand.layout.heads import Link, chain_of
from faexport.understand.layout.views import Atom, merged
from faexport.understand.shapes.analysis import Analysis

Sinks = tuple[ir.Value, tuple[ir.Node, ...], ir.Value | None]


def sinks_of(
    scores: Scores,
    logit: Logit | None,
    heads: Dim,
    a: Analysis,
    before: Callable[[ir.Node], ir.Value | None] = lambda node: None,
) -> Sinks | Refusal | None:
    """The logits as float32 [H], the new nodes that make them so, and the tensor of the graph that holds them, if one
    does; None where the softmax has none. `before` gives what stood in front of a rounding that is to be left out."""
    if logit is not None and scores.sink is not None:
        return Refusal("the softmax has a column beside the scores and one more exponential, too", name_of(logit.node))
    if logit is not None:
        return _added(logit, scores, heads, a)
    return None if scores.sink is None else _column(scores, scores.sink, heads, a, before)


def _added(logit: Logit, scores: Scores, heads: Dim, a: Analysis) -> Sinks | Refusal:
    """A logit that is a number, or a tensor with one for each head, plus the logarithm of a number."""
    why = "what is added to the sum of the exponentials is not one logit for each head"
    refusal = Refusal(why, name_of(logit.node))
    if logit.value is None:
        return _alike(math.log(logit.number), heads, a) or refusal
    axes, shape = label_axes(scores.view, letters(scores.product), scores.shape), a.shape(logit.value)
    if axes is None or "".join(axes) != "BHST" or shape is None or len(shape) > 4 or logit.number != 1:
        return refusal
    padded = (*(Dim.of(1),) * (4 - len(shape)), *shape)
    if padded[1] != heads or any(size != 1 for i, size in enumerate(padded) if i != 1):
        return refusal
    return _as_vector(logit.value, a)


def _alike(number: float, heads: Dim, a: Analysis) -> Sinks | None:
    """The same logit for all heads."""
    if heads.const is None:
        return None
    build = Builder(a.opset)
    return build.constant(np.full(heads.const, number, np.float32)), tuple(build.nodes), None


def _as_vector(value: ir.Value, a: Analysis) -> Sinks:
    build, source = Builder(a.opset), value
    if a.rank(value) != 1:
        value = build.reshape(value, [-1])
    if a.dtype(value) != ir.DataType.FLOAT:
        value = build.add("Cast", [value], ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
    return value, tuple(build.nodes), source


def _column(
    scores: Scores, column: ir.Value, heads: Dim, a: Analysis, before: Callable[[ir.Node], ir.Value | None]
) -> Sinks | Refusal:
    node = producer(column)
    refusal = Refusal("a column beside the scores is not one logit for each head", name_of(node) if node else "")
    shape = a.shape(column)
    if shape is None or (shape and shape[-1] != 1) or "".join(scores.sink_axes) != "BHST":
        return refusal
    number = fill_of(column, a)
    if number is not None or not shape:  # one number, of which a Pad makes a column
        return refusal if number is None else _alike(number, heads, a) or refusal
    for link in reversed(chain_of(column, a, before)):
        if link.scale == 1.0 and _is_one_for_each_head(link, heads, a):
            return _as_vector(link.value, a)
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
