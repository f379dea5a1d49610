# SPDX-License-Identifier: Apache-2.0
"""Masks and biases as they are: every term stays a value of the graph, brought to the shape [B, H, S, T].

What understand_mask (mask.py) does not prove ends here. Called by match/softmax_core.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from faexport.spec import EmptyRow, Mask, MaskTerm, Refusal, ScoreShape, TermKind
from faexport.understand.dims import plain
from faexport.understand.mask import UNKNOWN_SHAPE, MaskOptions, understand_mask
from faexport.understand.nodes import name_of
from faexport.understand.surgery import Builder

if TYPE_CHECKING:
    from faexport.match import Context


def understand(terms: Sequence[MaskTerm], scores: ScoreShape, context: Context) -> Mask | Refusal:
    """What understand_mask proves; where it can't even find the shape of a mask, the terms as they are."""

    def shape_of(value: ir.Value) -> list[int | str | None] | None:
        shape = context.analysis.shape(value)
        return None if shape is None else [plain(d) for d in shape]

    options = MaskOptions(context.options.assume_right_padding)
    found = understand_mask(terms, scores, options, shape_of)
    if isinstance(found, Refusal) and found.reason == UNKNOWN_SHAPE:
        """The mask as understand_mask proves it."""

    def shapes(value: ir.Value) -> list[int | str | None] | None:
        found = context.analysis.shape(value)
        return None if found is None else [plain(d) for d in found]

    return understand_mask(terms, scores, MaskOptions(context.options.assume_right_padding), shapes)
    return found


def keep_as_bias(terms: Sequence[MaskTerm], scores: ScoreShape, context: Context) -> Mask | Refusal:
    """The sum of all terms as attn_bias; a Where becomes Where(condition, 0, fill) if its fill is hugely negative."""
    a = context.analysis
    build = Builder(a.opset)
    if len(terms) == 1 and terms[0].kind == TermKind.BOOL:
        return Mask(attn_mask=terms[0].value)
    total: ir.Value | None = None
    for term in terms:
        if term.kind in (TermKind.CLAMP, TermKind.ZERO):
            continue
        value = _as_bias(build, term, a)
        if value is None:
            return Refusal("the mask is not understood", name_of(term.node))
        value = _to_four_axes(build, value, term, scores, a)
        if value is None:
            return Refusal("the mask's shape is not understood", name_of(term.node))
        total = value if total is None else build.add("Add", [total, value])
    zero = scores.nan_guard or any(t.kind == TermKind.ZERO for t in terms)
    return Mask(attn_bias=total, new_nodes=tuple(build.nodes), empty_row=EmptyRow.ZERO if zero else EmptyRow.MEAN)


def _as_bias(build: Builder, term: MaskTerm, a) -> ir.Value | None:
    dtype = a.dtype(term.value if term.kind == TermKind.ADD else term.fill)
    if dtype is None or term.kind not in (TermKind.ADD, TermKind.WHERE):
        return None
    if term.kind == TermKind.ADD:
        return (
            term.value
            if term.factor == 1.0
            else build.add("Mul", [term.value, _scalar(build, term.factor, dtype)], dtype)
        )
    fill = a.scalar(term.fill)
    if fill is None or fill * term.factor > -1e4:
        return None
    zero, low = _scalar(build, 0.0, dtype), _scalar(build, max(fill * term.factor, -3e38), dtype)
    return build.add("Where", [term.value, *((zero, low) if term.keep_when else (low, zero))], dtype)


def _scalar(build: Builder, number: float, dtype: ir.DataType) -> ir.Value:
    return build.add("Constant", (), dtype, value=ir.tensor(np.array(number, dtype.numpy())))


def _to_four_axes(build: Builder, value: ir.Value, term: MaskTerm, scores: ScoreShape, a) -> ir.Value | None:
    shape = a.shape(term.value)
    if term.axes == "BHST" or (shape is not None and len(shape) <= 2 and term.axes.endswith("ST")):
        return value
    if term.axes != "NST" or shape is None or scores.heads is None:
        return None
    if shape[0] == 1 or scores.heads == 1:
        return build.unsqueeze(value, 1)
    return build.split_first_axis(value, scores.heads)
