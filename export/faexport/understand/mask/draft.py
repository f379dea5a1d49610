# SPDX-License-Identifier: Apache-2.0
"""The mask of one site while it is put into the operator's words: position, window, lengths, bool mask, sums of biases.

A strategy (strategies.py) that finds that a site is not its own drops its draft; nothing else is changed by it. Each
condition is an expression over (b, h, i, j); new nodes are made by emit.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from faexport import spec
from faexport.graph.nodes import name_of, producer
from faexport.sizes import algebra as ia
from faexport.sizes.algebra import Expr
from faexport.understand.index import logic as il
from faexport.understand.index.tensor import Unknown, broadcast_index
from faexport.understand.mask.emit import Emitter
from faexport.understand.mask.magnitudes import MASKING, coarse, is_moderate, may_be_infinite
from faexport.understand.mask.options import MaskOptions
from faexport.understand.mask.site import Site
from faexport.understand.mask.window import Window, corners, length_of, split
from faexport.understand.mask.words import axes_of, kind_of, window_text

INFINITE_ROW = "a row whose bias is -inf at every key gives 0 (NaN before)"


class Draft:
    """A spec.Mask in the making, and the facts that it stands on."""

    def __init__(self, emitter: Emitter, site: Site, options: MaskOptions):
        self.emitter, self.site, self.options = emitter, site, options
        self.terms: Sequence[spec.MaskTerm] = site.terms
        self.mask = spec.Mask()
        # The element of a padding mask that is assumed to be 1 wherever a key is visible.
        self.padding: Expr | None = None
        self.facts: list[spec.Fact] = []

    def finished(self) -> spec.Mask:
        mask = self.mask
        needed = dict.fromkeys(n for v in mask.values for n in self.emitter.nodes.get(v, ()))
        mask.new_nodes, mask.facts = tuple(needed), tuple(self.facts)
        for value, dtype in ((mask.attn_mask, ir.DataType.BOOL), (mask.attn_bias, self.site.scores.dtype)):
            node = producer(value)
            if value is not None and node is not None and node.graph is None and value.dtype is None:
                value.dtype = dtype
        return mask

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

    def assume(self, text: str) -> None:
        """Records what is not proven."""
        self.facts.append(spec.Assumption(text, tuple(name_of(t.node) for t in self.terms)))

    def assume_absorbed_in_half(self) -> None:
        """-65504 absorbs a score of less than half its last place, where a runtime adds in float16 at all."""
        if self.site.scores.dtype is ir.DataType.FLOAT16:
            self.assume("hidden scores are below 16 and added to their fill in float16")

    def assume_order(self, parts: Sequence[tuple[Expr, float]]) -> None:
        """Beside large numbers of a float mask sums are rounded coarsely. Where every key of a row has such a number,
        what is left of its scores is alike only if they are added up as in the graph, and in its type."""
        half = self.site.half
        if all(is_moderate(e, -MASKING if half is None else coarse(half)) for e, _ in parts):
            return
        text = "where a float mask hides every key of a row, nothing depends on what rounding leaves of their scores"
        if half is not None or len(parts) > 1 or parts[0][1] != 1:
            self.assume(text)

    def note_infinite(self, added: Iterable[Expr]) -> None:
        """The operator takes a bias of -inf for a key that is hidden."""
        if not self.gives_zero() and any(may_be_infinite(e) for e in added):
            self.fact(INFINITE_ROW)

    def gives_zero(self) -> bool:
        """Does the graph itself make 0 of a row without a visible key?"""
        zeroed = (spec.TermKind.ZERO, spec.TermKind.EMPTY_ROW)
        scores = self.site.scores
        return scores.nan_guard or scores.sinks or any(t.kind in zeroed for t in self.terms)

    # -------------------------------------------------------------------------------------- windows, lengths, bool mask

    def visibility(self, seen: Expr, only_window: bool) -> Window:
        """Window, lengths and bool mask for the condition `seen`; with `only_window` the bias says the rest."""
        mask = self.mask
        window, rest = split(self.site, seen)
        if window.parts and not self.position(window):
            window, rest = Window(), [*window.parts, *rest]
        mask.window_left, mask.window_right = window.left, window.right
        if window.parts:
            self.fact(window_text(window), *window.parts)
        if only_window:
            return window
        rest = self.lengths(rest)
        if rest:
            whole = il.all_of(rest)
            mask.attn_mask = self.value(whole)
            self.fact(f"{kind_of(whole)} mask {axes_of(whole)}", *rest)
        elif seen is il.TRUE and any(t.kind is not spec.TermKind.ADD for t in self.terms):
            self.fact("its mask lets every key through")
        return window

    def position(self, window: Window) -> bool:
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

    def lengths(self, parts: list[Expr]) -> list[Expr]:
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
            if not self._has_every("B", part):  # one length, or perhaps one, for all entries
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

    def _is_padding(self, part: Expr) -> bool:
        """Is it a condition on one graph input's element [b, j]?"""
        loads = ia.atoms(part, "load")
        if ia.variables(part) != {"b", "j"} or len(loads) != 1:
            return False
        value, index = next(iter(loads)).args
        return value.is_graph_input() and index[-1] is self.site.j

    def _count(self, part: Expr) -> ir.Value:
        ones = self.emitter.node("Cast", [self.value(part)], {"to": int(ir.DataType.INT64)})
        return self.emitter.node("ReduceSum", [ones, self.emitter.constant([1, 2, 3])], {"keepdims": 1})

    def value(self, expr: Expr) -> ir.Value:
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
        return all(self._is_own_axis(x, size) for x, size in zip(atom.args[1], sizes, strict=True))

    def _is_own_axis(self, x: Expr, size: Expr) -> bool:
        """Is `x` how an axis of `size` is read that is one of the scores', or is broadcast to it?"""
        whole = self.site.simplified(size)
        return any(
            x is broadcast_index(own, whole) and self.site.is_broadcast(letter, size)
            for letter, own in zip("BHST", self.site.index, strict=True)
        )

    def _has_every(self, letter: str, expr: Expr) -> bool:
        """Is it sure that a value for `expr` has all elements along the scores' axis B, H, S or T?"""
        own = self.site.index["BHST".index(letter)]
        return any(
            x is own and self.site.simplified(size) in self.site.sizes[letter]
            for atom in ia.atoms(expr, "load")
            for x, size in zip(atom.args[1], self.site.ctx.tensor(atom.args[0]).shape, strict=True)
        )

    def of_every_key(self, expr: Expr) -> ir.Value:
        """A value for `expr` that has an element for each key, where one for all of them would do elsewhere."""
        value = self.value(expr)
        if self._has_every("T", expr):
            return value
        one = self.emitter.constant([1])
        shape = self.emitter.node("Concat", [one, one, one, self.emitter.size(self.site.sizes["T"])], {"axis": 0})
        return self.emitter.node("Expand", [value, shape])

    # ------------------------------------------------------------------------------------------ sums of biases

    def number(self, value: float) -> ir.Value:
        return self.emitter.constant(np.full((1, 1, 1, 1), value, self.site.scores.dtype.numpy()))

    def placed(self, term: spec.MaskTerm) -> ir.Value:
        """A term's value, broadcast against [B, H, S_q, S_kv]."""
        if term.axes == "BHST":
            return self.emitter.with_axes(self.site, term.value)
        return self.emitter.emit(self.site, il.load(term.value, self.site.place(term, term.value), "float"))

    def sum(self, parts: Sequence[tuple[ir.Value, float]]) -> None:
        """attn_bias is the sum of these values times their factors."""
        self.mask.attn_bias = self.total(parts)

    def total(self, parts: Sequence[tuple[ir.Value, float]]) -> ir.Value:
        """The sum of these values (at least one) times their factors."""
        total: ir.Value | None = None
        for factor in dict.fromkeys(factor for _, factor in parts):  # what overflows does so before it is scaled
            group = [value for value, f in parts if f == factor]
            value = group[0]
            for other in group[1:]:
                value = self.emitter.node("Add", [value, other])
            if factor != 1:
                number = self.emitter.constant(np.asarray(factor, self.site.scores.dtype.numpy()))
                value = self.emitter.node("Mul", [value, number])
            total = value if total is None else self.emitter.node("Add", [total, value])
        assert total is not None
        return total
