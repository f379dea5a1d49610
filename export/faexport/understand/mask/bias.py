# SPDX-License-Identifier: Apache-2.0
"""Writes what is added to scores that are kept: ALiBi slopes where it is that, else a bias in the smallest shape.

Called by strategies.py with the draft of a mask whose window is already written.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from faexport import spec
from faexport.sizes import algebra as ia
from faexport.sizes.algebra import Expr
from faexport.understand.index import logic as il
from faexport.understand.mask.alibi import in_words, slopes_of
from faexport.understand.mask.draft import Draft
from faexport.understand.mask.magnitudes import is_moderate
from faexport.understand.mask.terms import Case, sum_of
from faexport.understand.mask.window import Window
from faexport.understand.mask.words import axes_of
from faexport.understand.shapes.constants import tensor_of


def write_bias(draft: Draft, cases: list[Case], window: Window) -> None:
    """Adds to the draft what these cases add to their scores."""
    parts = {c.bias for c in cases if c.mask is None}
    soft = [c for c in cases if c.mask is not None]
    if len(parts) == 1 and not soft:
        _kept_bias(draft, parts.pop(), window)
        return
    expr = il.floating(0.0, draft.site.scores.dtype)
    for case in cases:
        expr = il.choose(case.cond, _added(draft, case), expr)
    expr = il.assume(expr, il.all_of(window.parts)) if window.parts else expr
    draft.mask.attn_bias = draft.value(expr)
    draft.fact(f"bias {axes_of(expr)}", expr)
    draft.note_infinite(e for case in cases for e, _ in case.bias)


def _added(draft: Draft, case: Case) -> Expr:
    """What a case adds to its scores; beside a hugely negative number the rest vanishes."""
    dtype = draft.site.scores.dtype
    if case.mask is None:
        return sum_of(case.bias, dtype)
    fill = il.floating(case.mask, dtype)
    return fill if case.mask <= -1e30 else il.float_op("Add", dtype, sum_of(case.bias, dtype), fill)


def _kept_bias(draft: Draft, bias: tuple[tuple[Expr, float], ...], window: Window) -> None:
    # Softmax doesn't see what is the same for a whole row, unless there is a sink.
    sinks = draft.site.scores.sinks
    moving = tuple(p for p in bias if sinks or "j" in ia.variables(p[0]) or not is_moderate(p[0]))
    for k, part in enumerate(moving):
        slopes = slopes_of(draft.site, ((_where_visible(draft, part[0]), part[1]),), window)
        if slopes is not None:
            draft.mask.alibi_slopes = draft.emitter.constant(slopes)
            if draft.mask.alignment is spec.Alignment.ONNX:
                draft.mask.alignment = spec.Alignment.TOP_LEFT
            draft.fact(in_words(slopes), part[0])
            moving = moving[:k] + moving[k + 1 :]
            break
    if not moving:
        return
    draft.sum([(_bias_value(draft, expr), factor) for expr, factor in moving])
    draft.assume_order(bias)
    draft.note_infinite(e for e, _ in moving)
    for expr, factor in moving:
        slopes = _counted_slopes(draft, expr, factor, window)
        more = "" if slopes is None else f": {in_words(slopes)}, times positions counted from a mask"
        draft.fact(f"bias {axes_of(expr)}{more}", expr)


def _counted_slopes(draft: Draft, expr: Expr, factor: float, window: Window) -> np.ndarray | None:
    """ALiBi's slopes where the positions are a running sum of a mask: with holes in it they aren't the keys'."""
    for atom in ia.atoms(expr, "load"):
        padding = ia.only_atom(_summed(draft, atom)) if _is_count(atom) else None
        if padding is not None:
            return slopes_of(draft.site, ((_beside_ones(draft, expr, padding), factor),), window)
    return None


def _summed(draft: Draft, count: Expr) -> Expr:
    """The element whose running sum a load is."""
    return draft.site.ctx.tensor(count.args[0].producer().inputs[0]).at(count.args[1])


def _where_visible(draft: Draft, expr: Expr) -> Expr:
    """`expr` at visible keys, with right padding assumed."""
    return expr if draft.padding is None else _beside_ones(draft, expr, draft.padding)


def _beside_ones(draft: Draft, expr: Expr, padding: Expr) -> Expr:
    """`expr` where an element of a mask is 1, and its running sum up to key j is j + 1."""
    known = {padding: ia.ONE}
    for atom in ia.atoms(expr, "load"):
        if _is_count(atom) and _summed(draft, atom) is ia.of_atom(padding):
            known[atom] = ia.add(atom.args[1][-1], ia.ONE)
    return il.rewrite(expr, known)


def _bias_value(draft: Draft, expr: Expr) -> ir.Value:
    """A value for an added expression. A term that adds just this expression gives its own tensor, which costs no new
    node; any other expression is searched for in the graph, or written."""
    for term in draft.terms:
        if term.kind is spec.TermKind.ADD and draft.site.element(term, term.value) is expr:
            if term.axes == "BHST":
                return draft.placed(term)
            found = draft.emitter.find(draft.site, expr)
            whole = il.load(term.value, draft.site.place(term, term.value), "float")
            return found if found is not None else draft.emitter.emit(draft.site, whole)
    return draft.value(expr)


def _is_count(atom: Expr) -> bool:
    """Is a load an element of a running sum along the last axis?"""
    node = atom.args[0].producer()
    if node is None or node.op_type != "CumSum" or any(node.attributes.get_int(n, 0) for n in ("exclusive", "reverse")):
        return False
    axis = tensor_of(node.inputs[1])
    return axis is not None and int(axis.numpy().reshape(-1)[0]) in (-1, len(atom.args[1]) - 1)
