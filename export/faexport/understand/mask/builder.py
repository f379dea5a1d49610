# SPDX-License-Identifier: Apache-2.0
"""Turns the mask terms of one attention site into the operator's words: window, lengths, bool mask, bias, slopes.

Called by proof.py, once for sites with the same terms. Each condition is an expression over (b, h, i, j); new nodes are
made by emit.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from faexport import spec
from faexport.nodes import name_of
from faexport.understand.index import algebra as ia
from faexport.understand.index import logic as il
from faexport.understand.index.algebra import Expr
from faexport.understand.index.tensor import Unknown
from faexport.understand.mask.alibi import in_words, slopes_of
from faexport.understand.mask.emit import Emitter
from faexport.understand.mask.empty_rows import TwoMasks, empty_rows, lower_of_two, two_masks
from faexport.understand.mask.options import MaskOptions
from faexport.understand.mask.terms import (
    ABSORBS,
    Case,
    NotAMask,
    Site,
    cases_of,
    is_moderate,
    leaves,
    rows_see_a_key,
    summands,
    visible,
    zeros_and_ones,
)
from faexport.understand.mask.window import Window, corners, length_of, split
from faexport.understand.mask.words import axes_of, kind_of, window_text

_LOWEST = float(np.finfo(np.float32).min)
_BOTH_MASKS = (
    "a float mask is added to scores that another mask replaced by a number: rows of padding only would come out "
    "differently (--assume full-rows or right-padding rules them out)"
)


def _is_count(atom: Expr) -> bool:
    """Is a load an element of a running sum along the last axis?"""
    node = atom.args[0].producer()
    if node is None or node.op_type != "CumSum" or any(node.attributes.get_int(n, 0) for n in ("exclusive", "reverse")):
        return False
    axis = ir.convenience.get_const_tensor(node.inputs[1])
    return axis is not None and int(axis.numpy().reshape(-1)[0]) in (-1, len(atom.args[1]) - 1)


class MaskBuilder:
    """Turns the cases of one site into a spec.Mask."""

    def __init__(self, emitter: Emitter, site: Site, terms: Sequence[spec.MaskTerm], options: MaskOptions):
        self.emitter, self.site, self.terms, self.options = emitter, site, terms, options
        self.mask = spec.Mask()
        self.padding: Expr | None = (
            None  # the element of a padding mask that is assumed to be 1 wherever a key is visible
        )
        self.facts: list[spec.Fact] = []

    def build(self) -> spec.Mask:
        cases = cases_of(self.site, self.terms)
        soft = any(c.mask is not None and c.mask > -math.inf for c in cases)
        kept = self.options.assume_full_rows or self._first_key_is_kept(cases)
        if soft and not kept and not self._moderate():
            if not self._with_zeros_and_ones():
                self._as_they_are()
            return self._finished()
        if soft and not kept and self._two_masks(cases):
            return self._finished()
        if not soft and self._lower_of_two():
            return self._finished()
        seen, bias = self._decide(cases)
        window = self._visibility(seen, only_window=len(bias) == len(cases) and any(c.mask is not None for c in cases))
        self._bias(bias, window)
        return self._finished()

    def _finished(self) -> spec.Mask:
        mask = self.mask
        needed = dict.fromkeys(n for v in mask.values for n in self.emitter.nodes.get(v, ()))
        mask.new_nodes, mask.facts = tuple(needed), tuple(self.facts)
        for value, dtype in ((mask.attn_mask, ir.DataType.BOOL), (mask.attn_bias, self.site.scores.dtype)):
            made_here = value is not None and value.producer() is not None and value.producer().graph is None
            if made_here and value.dtype is None:
                value.dtype = dtype
        return mask

    def _moderate(self) -> bool:
        """Are all biases numbers like scores? Beside one that is itself a mask, a finite fill isn't sure to mask."""
        added = [t for t in self.terms if t.kind is spec.TermKind.ADD]
        found = (e for t in added for _, leaf in leaves(self.site.element(t, t.value)) for e in summands(leaf))
        return all(is_moderate(e) for e in found if e.op != "float")

    def _first_key_is_kept(self, cases: list[Case]) -> bool:
        """With right padding assumed: is key 0 visible in every row, and without a huge bias?"""
        if not self.options.assume_right_padding or ia.only_atom(self.site.j) is None:
            return False
        first = {ia.only_atom(self.site.j): ia.ZERO}
        moved = [
            (il.rewrite(c.cond, first), [il.rewrite(e, first) for e, _ in c.bias]) for c in cases if c.mask is None
        ]
        for _, bias in moved:
            for e in bias:
                ones = {a: ia.ONE for a in ia.atoms(e, "load") if a.kind == "int" and a.args[0].is_graph_input()}
                if not is_moderate(il.rewrite(e, ones)):
                    return False
        return il.any_of(cond for cond, _ in moved) is il.TRUE

    # ------------------------------------------------------------------------------------------ two masks

    def _with_zeros_and_ones(self) -> bool:
        """Is it two masks if the integers that the model makes a float mask of are 0 and 1?"""
        self.site.known = zeros_and_ones(self.site, self.terms)
        names = sorted({ia.only_atom(cast.args[0]).args[0].name or "?" for cast in self.site.known})
        try:
            if names and self._moderate() and self._two_masks(cases_of(self.site, self.terms)):
                self.fact(f"{', '.join(names)} holds zeros and ones (assumed)")
                return True
        except NotAMask:
            pass
        self.site.known = {}
        return False

    def _two_masks(self, cases: list[Case]) -> bool:
        """Writes down a window and a padding mask, one after the other, if the cases are that."""
        found = two_masks(self.site, cases)
        if found is None:
            return False
        mask, zero, fill = self.mask, *(il.floating(x, ir.DataType.FLOAT) for x in (0.0, _LOWEST))
        bias = il.choose(found.padding, zero, fill)
        try:
            padding, added = self._value(found.padding), self._value(bias)
            rows = empty_rows(self.emitter, self.site, found, padding)
        except Unknown:
            return False
        if not self._position(found.window):
            return False
        mask.empty_rows, mask.window_left, mask.window_right = rows, found.window.left, found.window.right
        self.fact(window_text(found.window), *found.window.parts)
        if not found.else_all:  # the operator then gives the mean over the window, where all of it is padding
            mask.attn_bias, added.dtype = added, ir.DataType.FLOAT
            mask.rows_see_a_key = rows_see_a_key(self.site, il.all_of(found.window.parts))
            self.fact(f"{kind_of(found.padding)} mask {axes_of(bias)}, as a bias", found.padding)
        else:
            mask.attn_mask, mask.empty_row = padding, spec.EmptyRow.MEAN
            self.fact(f"{kind_of(found.padding)} mask {axes_of(found.padding)}", found.padding)
        text = f"a row that sees no key gives {found.mean_in_words}, written behind the operator"
        self.fact(text + self._in_half())
        return True

    def _lower_of_two(self) -> bool:
        """Writes down the lower of a window's mask and a given one, if the terms are that."""
        found = lower_of_two(self.site, self.terms)
        if found is None:
            return False
        node, (zero, fill) = self.emitter.node, (self._number(x) for x in (0.0, found.fill))
        try:
            given = self._value(found.given)
            above, counted = node("Greater", [given, fill]), node("GreaterOrEqual", [given, fill])
            rows = None
            if not self.options.assume_full_rows:
                rows = empty_rows(self.emitter, self.site, TwoMasks(found.window, il.TRUE, False), above, counted)
        except Unknown:
            return False
        if not self._position(found.window):
            return False
        mask, window = self.mask, found.window
        mask.empty_rows, mask.window_left, mask.window_right = rows, window.left, window.right
        mask.attn_bias = node("Min", [given, zero])
        self.fact(window_text(window), *window.parts)
        self.fact(f"bias {axes_of(found.given)}", found.given)
        if rows is not None:
            self.fact("a row that sees no key gives the mean of all values above -inf, written behind the operator")
        return True

    def _number(self, value: float) -> ir.Value:
        return self.emitter.constant(np.full((1, 1, 1, 1), value, self.site.scores.dtype.numpy()))

    # ------------------------------------------------------------------------------------- float masks of any values

    def _as_they_are(self) -> None:
        """The sum of all terms as a bias. A score replaced by a number that absorbs any score had that number added."""
        parts = []
        for term in self.terms:
            if term.kind is spec.TermKind.ADD:
                parts.append((self._placed(term), term.factor))
            elif term.kind is spec.TermKind.WHERE and not parts:  # after an addition it would undo that
                fill = self.site.element(term, term.fill)
                if fill.op != "float" or not il.float_value(fill) <= -1e30:
                    raise NotAMask(_BOTH_MASKS)
                kept = self.site.element(term, term.value)
                kept = kept if term.keep_when else il.negate(kept)
                zero = il.floating(0.0, self.site.scores.dtype)
                parts.append((self._value(il.choose(kept, zero, fill)), term.factor))
            else:
                raise NotAMask(_BOTH_MASKS)
        self._sum(parts)
        self.fact("a finite mask beside a float mask: both stay a bias")

    def _placed(self, term: spec.MaskTerm) -> ir.Value:
        """A term's value, broadcast against [B, H, S_q, S_kv]."""
        if term.axes == "BHST":
            return term.value
        return self.emitter.emit(self.site, il.load(term.value, self.site.place(term, term.value), "float"))

    def _sum(self, parts: Sequence[tuple[ir.Value, float]]) -> None:
        """attn_bias is the sum of these values times their factors."""
        total = None
        for factor in dict.fromkeys(factor for _, factor in parts):  # what overflows does so before it is scaled
            group = [value for value, f in parts if f == factor]
            value = group[0]
            for other in group[1:]:
                value = self.emitter.node("Add", [value, other])
            if factor != 1:
                number = self.emitter.constant(np.asarray(factor, self.site.scores.dtype.numpy()))
                value = self.emitter.node("Mul", [value, number])
            total = value if total is None else self.emitter.node("Add", [total, value])
        self.mask.attn_bias = total

    def fact(self, text: str, *exprs: Expr) -> None:
        """Records a fact and the nodes that compute the expressions it was read from."""
        names = []
        for expr in exprs:
            for wanted in (expr, il.negate(expr)) if expr.kind == "bool" else (expr,):
                found = self._own_producer(wanted) or self.emitter.source(self.site, wanted)
                if found is not None:
                    names.append(name_of(found))
                    break
        self.facts.append(spec.Fact(text, tuple(dict.fromkeys([*names, *(name_of(t.node) for t in self.terms)]))))

    def _own_producer(self, expr: Expr) -> ir.Node | None:
        """The node of a term that is this expression and nothing else: no search through what it is made of."""
        own = (t for t in self.terms if t.kind is spec.TermKind.ADD and self.site.element(t, t.value) is expr)
        return next((t.value.producer() for t in own), None)

    # ------------------------------------------------------------------------------------------ which cases are masked

    def _decide(self, cases: list[Case]) -> tuple[Expr, list[Case]]:
        """(the condition of being visible, the cases that make up the bias)."""
        kept = [c for c in cases if c.mask is None]
        hard = [c for c in cases if c.mask == -math.inf]
        soft = [c for c in cases if c.mask is not None and c.mask > -math.inf]
        seen = visible(cases)
        sure = rows_see_a_key(self.site, seen)
        self.mask.rows_see_a_key = sure and self._moderate()
        if soft and not sure and self.options.assume_full_rows:
            self.fact("every row sees a key (assumed)")
            return seen, kept
        if not soft or sure or self.site.scores.sinks:  # with a sink such a row gives 0, whatever the fill
            if not sure:
                self._note_empty_rows()
            return seen, kept
        same = len({(c.mask, c.replaced) for c in soft}) == 1 and all(c.exact for c in soft) and not hard
        if same:
            self.mask.empty_row = spec.EmptyRow.MEAN
            self._note_mean(soft[0])
            return seen, kept
        deepest = self._deepest(soft, cases)
        if deepest:
            hidden = [dataclasses.replace(c, mask=-math.inf, bias=()) if c in deepest else c for c in cases]
            return self._decide(hidden)
        if any(c.replaced and not c.exact for c in soft) or any(c.replaced and c.mask > -1e30 for c in soft):
            raise NotAMask(
                "its mask gives rows without a visible key a softmax of other numbers (--assume full-rows rules them "
                "out)"
            )
        self.fact(
            f"rows that may see no key would give another softmax without the {soft[0].mask:g} added: it stays a bias "
            "(--assume full-rows rules them out)"
        )
        written = il.negate(il.any_of(c.cond for c in hard)), il.any_of(c.cond for c in cases if c not in hard)
        return max(written, key=lambda left: len(split(self.site, left)[0].parts)), cases

    def _deepest(self, soft: list[Case], cases: list[Case]) -> list[Case]:
        """Masks that weigh nothing beside another one, if each row has a key that they don't hide."""
        deepest = [c for c in soft if c.mask <= ABSORBS[ir.DataType.FLOAT]]
        others = [c for c in soft if c not in deepest]
        if not others or min(c.mask for c in others) < -1e8:
            return []
        left = il.any_of(c.cond for c in cases if c.mask is None or c in others)
        return deepest if rows_see_a_key(self.site, left) else []

    def _note_empty_rows(self) -> None:
        zeroed = (spec.TermKind.ZERO, spec.TermKind.EMPTY_ROW)
        if not self.site.scores.nan_guard and not any(t.kind in zeroed for t in self.terms):
            self.fact("a row that sees no key gives 0 (NaN before)")

    def _note_mean(self, case: Case) -> None:
        text = f"a row that sees no key gives the mean of all values, as the fill {case.mask:g} does"
        self.fact(text if case.replaced else text + self._in_half())

    def _in_half(self) -> str:
        half = self.site.scores.dtype is ir.DataType.FLOAT16
        return " (exact in float16 while such scores are below 16)" if half else ""

    # -------------------------------------------------------------------------------------- windows, lengths, bool mask

    def _visibility(self, seen: Expr, only_window: bool) -> Window:
        """Window, lengths and bool mask for the condition `seen`; with `only_window` the bias says the rest."""
        mask = self.mask
        window, rest = split(self.site, seen)
        if window.parts and not self._position(window):
            window, rest = Window(), [*window.parts, *rest]
        mask.window_left, mask.window_right = window.left, window.right
        if window.parts:
            self.fact(window_text(window), *window.parts)
        if only_window:
            return window
        rest = self._lengths(rest)
        if rest:
            whole = il.all_of(rest)
            mask.attn_mask = self._value(whole)
            self.fact(f"{kind_of(whole)} mask {axes_of(whole)}", *rest)
        elif seen is il.TRUE and any(t.kind is not spec.TermKind.ADD for t in self.terms):
            self.fact("its mask lets every key through")
        return window

    def _position(self, window: Window) -> bool:
        """Writes down where row 0 stands; False where that can't be said."""
        mask = self.mask
        if ia.value_of(window.offset) == 0:
            mask.alignment = spec.Alignment.TOP_LEFT
        elif any(window.offset is corner for corner in corners(self.site)):
            mask.alignment = spec.Alignment.BOTTOM_RIGHT
        else:
            try:
                mask.query_offset = self._offset(window.offset)
            except Unknown:
                return False
        return True

    def _offset(self, offset: Expr) -> ir.Value:
        if "b" not in ia.variables(offset) and not ia.atoms(offset, "load"):
            return self.emitter.scalar(offset)
        value = self.emitter.emit(self.site, offset)
        return self.emitter.node("Reshape", [value, self.emitter.constant([-1])], hint="query_offset")

    def _lengths(self, parts: list[Expr]) -> list[Expr]:
        """Takes out what says "j < a number of this batch entry"."""
        for part in parts:
            length = length_of(part)
            text = "key lengths"
            if length is None and self.options.assume_right_padding and self._is_padding(part):
                text = "key lengths (right padding assumed)"
            elif length is None:
                continue
            try:
                value = self.emitter.emit(self.site, length) if length is not None else self._count(part)
            except Unknown:
                continue
            if length is not None and "b" not in ia.variables(length):
                value = self.emitter.node("Expand", [value, self._batch_shape()])
            self.mask.kv_lengths = self.emitter.node("Reshape", [value, self.emitter.constant([-1])], hint="kv_lengths")
            self.padding = next(iter(ia.atoms(part, "load"))) if length is None else None
            if self.mask.query_offset is None and self.mask.alignment is spec.Alignment.ONNX:
                self.mask.alignment = spec.Alignment.TOP_LEFT
            if self.mask.alignment is spec.Alignment.BOTTOM_RIGHT:  # would be counted from the length
                self.mask.query_offset = self.emitter.size(corners(self.site))
            self.fact(text, part)
            return [p for p in parts if p is not part]
        return parts

    def _batch_shape(self) -> ir.Value:
        one = self.emitter.constant([1])
        return self.emitter.node("Concat", [self.emitter.size(self.site.sizes["B"]), one, one, one], {"axis": 0})

    @staticmethod
    def _is_padding(part: Expr) -> bool:
        """Is it a condition on one graph input's element [b, j]?"""
        loads = ia.atoms(part, "load")
        return ia.variables(part) == {"b", "j"} and len(loads) == 1 and next(iter(loads)).args[0].is_graph_input()

    def _count(self, part: Expr) -> ir.Value:
        ones = self.emitter.node("Cast", [self._value(part)], {"to": int(ir.DataType.INT64)})
        axes = self.emitter.constant([1, 2, 3])
        return self.emitter.node("ReduceSum", [ones, axes], {"keepdims": 0})

    def _value(self, expr: Expr) -> ir.Value:
        """A value for an expression: new nodes where they are few, else one of the graph's own."""
        found = None
        if not self._is_plain(expr):
            found = self.emitter.find(self.site, expr)
        return found if found is not None else self.emitter.emit(self.site, expr)

    def _is_plain(self, e: Expr) -> bool:
        """A padding mask read from the input that holds it."""
        inner = e.args[0] if e.op == "not" else e
        atom = ia.only_atom(inner.args[0]) if inner.op == "eq0" else inner
        if atom is None or atom.op != "load" or (e.op != "not" and e.op != "load"):
            return False
        sizes = self.site.ctx.tensor(atom.args[0]).shape
        places = {x: k for k, x in enumerate(self.site.index)}
        return all(
            x in places and s in self.site.sizes["BHST"[places[x]]] for x, s in zip(atom.args[1], sizes, strict=True)
        )

    # ------------------------------------------------------------------------------------------ bias

    def _bias(self, cases: list[Case], window: Window) -> None:
        parts = {c.bias for c in cases if c.mask is None}
        soft = [c for c in cases if c.mask is not None]
        if len(parts) == 1 and not soft:
            self._kept_bias(parts.pop(), window)
            return
        expr = il.floating(0.0, self.site.scores.dtype)
        for case in cases:
            expr = il.choose(case.cond, self._added(case), expr)
        expr = il.assume(expr, il.all_of(window.parts)) if window.parts else expr
        self.mask.attn_bias = self._value(expr)
        self.fact(f"bias {axes_of(expr)}", expr)

    def _added(self, case: Case) -> Expr:
        """What a case adds to its scores; beside a hugely negative number the rest vanishes."""
        dtype = self.site.scores.dtype
        if case.mask is None:
            return self._sum_of(case.bias)
        fill = il.floating(case.mask, dtype)
        return fill if case.mask <= -1e30 else il.float_op("Add", dtype, self._sum_of(case.bias), fill)

    def _sum_of(self, bias: tuple[tuple[Expr, float], ...]) -> Expr:
        dtype = self.site.scores.dtype
        total = il.floating(0.0, dtype)
        for e, factor in bias:
            scaled = il.float_op("Mul", dtype, e, il.floating(factor, dtype)) if factor != 1 else e
            total = il.float_op("Add", dtype, total, scaled)
        return total

    def _kept_bias(self, bias: tuple[tuple[Expr, float], ...], window: Window) -> None:
        # Softmax doesn't see what is the same for a whole row, unless there is a sink.
        sinks = self.site.scores.sinks
        moving = tuple(p for p in bias if sinks or "j" in ia.variables(p[0]) or not is_moderate(p[0]))
        for k, part in enumerate(moving):
            slopes = slopes_of(self.site, ((self._where_visible(part[0]), part[1]),), window)
            if slopes is not None:
                self.mask.alibi_slopes = self.emitter.constant(slopes)
                if self.mask.alignment is spec.Alignment.ONNX:
                    self.mask.alignment = spec.Alignment.TOP_LEFT
                self.fact(in_words(slopes), part[0])
                moving = moving[:k] + moving[k + 1 :]
                break
        if not moving:
            return
        self._sum([(self._bias_value(expr), factor) for expr, factor in moving])
        for expr, factor in moving:
            slopes = self._counted_slopes(expr, factor, window)
            more = "" if slopes is None else f": {in_words(slopes)}, times positions counted from a mask"
            self.fact(f"bias {axes_of(expr)}{more}", expr)

    def _counted_slopes(self, expr: Expr, factor: float, window: Window) -> np.ndarray | None:
        """ALiBi's slopes where the positions are a running sum of a mask: with holes in it they aren't the keys'."""
        for atom in ia.atoms(expr, "load"):
            padding = ia.only_atom(self._summed(atom)) if _is_count(atom) else None
            if padding is not None:
                return slopes_of(self.site, ((self._beside_ones(expr, padding), factor),), window)
        return None

    def _summed(self, count: Expr) -> Expr:
        """The element whose running sum a load is."""
        return self.site.ctx.tensor(count.args[0].producer().inputs[0]).at(count.args[1])

    def _where_visible(self, expr: Expr) -> Expr:
        """`expr` at visible keys, with right padding assumed."""
        return expr if self.padding is None else self._beside_ones(expr, self.padding)

    def _beside_ones(self, expr: Expr, padding: Expr) -> Expr:
        """`expr` where an element of a mask is 1, and its running sum j + 1."""
        known = {padding: ia.ONE}
        for atom in ia.atoms(expr, "load"):
            if _is_count(atom) and self._summed(atom) is ia.of_atom(padding):
                known[atom] = ia.add(self.site.j, ia.ONE)
        return il.rewrite(expr, known)

    def _bias_value(self, expr: Expr) -> ir.Value:
        """The term's own value where it is that and nothing but that, else as for any expression."""
        for term in self.terms:
            if term.kind is spec.TermKind.ADD and self.site.element(term, term.value) is expr:
                if term.axes == "BHST":
                    return term.value
                found = self.emitter.find(self.site, expr)
                whole = il.load(term.value, self.site.place(term, term.value), "float")
                return found if found is not None else self.emitter.emit(self.site, whole)
        return self._value(expr)
