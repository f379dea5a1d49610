# SPDX-License-Identifier: Apache-2.0
"""Two finite masks, one after the other: what a row without a visible key gives, without a tensor of S_q x S_kv.

Called by strategies.py where a window (a condition on i and j) hides keys by one number and padding (a condition on b
and j) by another. In a row without a visible key all keys of its window are padding, so which keys share its softmax
is known from i and the padding alone: sums over them are running sums. empty_rows.py writes what depends on the values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from faexport import spec
from faexport.sizes import algebra as ia
from faexport.sizes.algebra import Expr
from faexport.understand.index import logic as il
from faexport.understand.index.tensor import Unknown
from faexport.understand.mask.emit import Emitter
from faexport.understand.mask.magnitudes import ABSORBS, MASKING
from faexport.understand.mask.site import Site
from faexport.understand.mask.terms import Case, rows_see_a_key, visible
from faexport.understand.mask.window import Window, conjuncts, split

MINIMUM_OPSET = 12


@dataclasses.dataclass(frozen=True)
class TwoMasks:
    """A key is visible where it is in the row's window and `padding` (the element of a mask) holds.

    A row without a visible key gives the mean of the values at the keys where `padding` holds, none after the last one
    of its window if `up_to_window`; with `window_too` the keys of its window take part. Where there is no such key it
    gives the mean of its window, or of all values if `else_all`."""

    window: Window
    padding: Expr
    window_too: bool
    up_to_window: bool = False
    else_all: bool = False

    @property
    def mean_in_words(self) -> str:
        if not self.window_too:
            return "the mean of all values that aren't padding"
        others = "before its window" if self.up_to_window else "outside of its window"
        return f"the mean of the values in its window and of those {others} that aren't padding"


def two_masks(site: Site, cases: Sequence[Case]) -> TwoMasks | None:
    """What the cases are of that kind, if they are."""
    soft = [c for c in cases if c.mask is not None and c.mask > -math.inf]
    if not soft or not all(c.exact for c in soft) or site.scores.sinks or any(c.bias for c in cases):
        return None
    seen = visible(cases)
    if rows_see_a_key(site, seen):
        return None
    window, rest = split(site, seen)
    if not window.parts or len(rest) != 1 or ia.variables(rest[0]) not in ({"b", "j"}, {"j"}):
        return None
    if "b" in ia.variables(window.offset) or ia.atoms(window.offset, "load"):
        return None
    inside, padding = il.all_of(window.parts), rest[0]
    highest = max(c.number for c in soft)
    top = il.any_of(c.cond for c in soft if c.mask == highest)
    lower = [c for c in soft if c.mask != highest]
    if any(c.number > highest + MASKING for c in lower):
        return None
    if_kept, if_padding = (_where(top, padding, holds) for holds in (True, False))
    if if_padding is inside:
        if highest > ABSORBS.get(site.scores.dtype, -math.inf) or (lower and not rows_see_a_key(site, inside)):
            return None
        up_to_window = _up_to_window(if_kept, window, inside)
        return None if up_to_window is None else TwoMasks(window, padding, True, up_to_window)
    if if_padding is not il.FALSE or if_kept is not il.negate(inside) or len({c.mask for c in lower}) != 1:
        return None
    left = _where(il.any_of(c.cond for c in lower), padding, False)
    return TwoMasks(window, padding, False, else_all=left is il.TRUE) if left in (il.TRUE, inside) else None


def _where(cond: Expr, padding: Expr, holds: bool) -> Expr:
    """`cond` where `padding` holds, or doesn't."""
    yes, no = (il.TRUE, il.FALSE) if holds else (il.FALSE, il.TRUE)
    return il.rewrite(cond, {padding: yes, il.negate(padding): no})


def _up_to_window(others: Expr, window: Window, inside: Expr) -> bool | None:
    """Are `others`, keys out of the window, all those before it (True), or just all (False)?"""
    if others is il.negate(inside):
        return False
    before = [part for part in conjuncts(inside) if others is il.negate(part)]
    right = [part for part in conjuncts(inside) if part not in before]
    if len(before) == 1 and len(right) == 1 and window.right >= 0 and il.implies(others, right[0]):
        return True
    return None


@dataclasses.dataclass(frozen=True)
class LowerOfTwo:
    """The smaller of two numbers is added to each score (TimesFM): the window's, which is 0 or `fill`, and the element
    of a given tensor [B, S_kv] that may hold anything.

    A key in the window whose given number is above the fill outweighs every key outside of the window. A row that has
    no such key adds the fill itself to all its keys whose given number is not below the fill, whether the window holds
    them or not. All these keys then weigh the same, and the row gives the mean of their values."""

    window: Window
    given: Expr
    fill: float


def lower_of_two(site: Site) -> LowerOfTwo | None:
    """What the terms are of that kind, if they are."""
    terms = site.terms
    if len(terms) != 1 or terms[0].kind is not spec.TermKind.ADD or terms[0].factor != 1 or site.scores.sinks:
        return None
    choice = site.element(terms[0], terms[0].value)
    if choice.op != "choose":
        return None
    parts = [e.args for e in choice.args[1:] if e.op == "fop" and e.args[0] == "Min"]
    if len(parts) != 2 or len({*parts[0][2:]} & {*parts[1][2:]}) != 1:
        return None
    given = next(iter({*parts[0][2:]} & {*parts[1][2:]}))
    others = (il.float_value(next(e for e in args[2:] if e is not given)) for args in parts)
    numbers = [number for number in others if number is not None]
    if len(numbers) != len(parts):
        return None
    inside = choice.args[0] if numbers[0] == 0 else il.negate(choice.args[0])
    window, rest = split(site, inside)
    fill, fixed = min(numbers), not ia.atoms(window.offset, "load")
    absorbs = ABSORBS.get(site.scores.dtype, -math.inf)
    if 0 not in numbers or not -math.inf < fill <= absorbs or rest or not window.parts:
        return None
    small = ia.variables(given) in ({"b", "j"}, {"j"}) and "b" not in ia.variables(window.offset)
    return LowerOfTwo(window, given, fill) if small and fixed else None


def empty_rows(
    emitter: Emitter, site: Site, found: TwoMasks, padding: ir.Value, counted: ir.Value | None = None
) -> spec.EmptyRows:
    """What the operator's output becomes in rows without a visible key; sites with the same masks share the nodes.

    Args:
        padding: bool [B, 1, 1, S_kv], true where the padding's condition holds.
        counted: the same, where other keys than those count.

    Raises Unknown where the ends of a window aren't proven to be keys, or the opset has no integers in Min and Max."""
    if emitter.ctx.opset < MINIMUM_OPSET:
        raise Unknown
    return _Nodes(emitter, site, found).emit(padding, padding if counted is None else counted)


class _Nodes:
    def __init__(self, emitter: Emitter, site: Site, found: TwoMasks):
        self.emitter, self.site, self.found = emitter, site, found

    def emit(self, padding: ir.Value, counted: ir.Value) -> spec.EmptyRows:
        node, constant = self.emitter.node, self.emitter.constant
        zero, one = (constant(np.full((1, 1, 1, 1), k, np.int64)) for k in (0, 1))
        first, last, end = self._ends()
        each = node("Cast", [padding], {"to": int(ir.DataType.INT64)})
        counts = node("CumSum", [each, constant(np.asarray(3, np.int64))])
        until_last = self._total(padding) if last is None else self._at(counts, last)
        seen = until_last
        if first is not None:
            seen = node("Sub", [until_last, self._at(node("Sub", [counts, each]), first)])
        others = until_last if self.found.up_to_window else self._total(counted)
        if self.found.window_too:
            size = ia.add(end if last is None else last, ia.ONE, ia.neg(first or ia.ZERO))
            own = self.emitter.emit(self.site, size)
            total = self._as_float(node("Max", [node("Add", [own, others]), one]))
            output_weight = node("Div", [self._as_float(own), total])
        else:
            total = self._as_float(node("Max", [others, one]))
            output_weight = self._as_float(node("Equal", [others, zero]))
        rows, value_weight = node("Equal", [seen, zero], hint="empty_rows"), node("Reciprocal", [total])
        if not self.found.up_to_window:
            return spec.EmptyRows(rows, output_weight, value_weight, self._as_float(counted))
        assert last is not None  # that window has an end
        before = il.ge0(ia.sub(ia.sub(self._of_first_row(last), self.site.j), ia.ONE))
        keys = None  # in front of the first row's last key
        if before is not il.FALSE:
            keys = self._as_float(node("And", [padding, self.emitter.emit(self.site, before)]))
        rows_of_blocks, blocks = self._blocks(last)
        kept = node("Transpose", [node("Gather", [padding, blocks], {"axis": 3})], {"perm": [0, 1, 3, 4, 2]})
        return spec.EmptyRows(rows, output_weight, value_weight, keys, blocks, kept, rows_of_blocks)

    def _blocks(self, last: Expr) -> tuple[ir.Value, ir.Value]:
        """(S_q, the last key of each row's window in blocks of rows), where that key is some key + i."""
        node, constant = self.emitter.node, self.emitter.constant
        size, width = self.emitter.size(self.site.sizes["S"]), constant([spec.ROW_BLOCK])
        count = node("Div", [node("Add", [size, constant([spec.ROW_BLOCK - 1])]), width])
        rows = self.emitter.arange(node("Mul", [count, width]))
        keys = node("Add", [rows, self.emitter.scalar(self._of_first_row(last))])
        end = node("Sub", [self.emitter.size(self.site.sizes["T"]), constant([1])])
        return size, node("Reshape", [node("Min", [keys, end]), constant([-1, spec.ROW_BLOCK])])

    def _ends(self) -> tuple[Expr | None, Expr | None, Expr]:
        """The first and the last key of row i's window, None where it is open on that side; the last key of all."""
        window, position = self.found.window, ia.add(self.site.i, self.found.window.offset)
        low = ia.sub(position, ia.const(window.left)) if window.left >= 0 else None
        high = ia.add(position, ia.const(window.right)) if window.right >= 0 else None
        ends = [ia.sub(size, ia.ONE) for size in self.site.sizes["T"]]
        if not any(ia.is_nonnegative(end) or ia.is_nonnegative(ia.sub(end, self.site.i)) for end in ends):
            raise Unknown  # there may be rows and no key
        for end in ends:
            starts = low is None or ia.is_nonnegative(ia.sub(end, low))
            stops = high is None or ia.is_nonnegative(high)
            if self.found.up_to_window and high is not None:  # then each row has one key more than the row before it
                stops = stops and ia.is_nonnegative(ia.sub(end, high))
            if starts and stops:
                first = None if low is None else ia.maximum(low, ia.ZERO)
                return first, None if high is None else ia.minimum(high, end), end
        raise Unknown

    def _at(self, keys: ir.Value, key: Expr) -> ir.Value:
        """[B, 1, S_q, 1]: what [B, 1, 1, S_kv] holds at a key for each row."""
        picked = self.emitter.node("Gather", [keys, self._line(key)], {"axis": 3})
        return self.emitter.node("Transpose", [picked], {"perm": [0, 1, 3, 2]})

    def _total(self, keys: ir.Value) -> ir.Value:
        """int64 [B, 1, 1, 1]: how many are true."""
        each = self.emitter.node("Cast", [keys], {"to": int(ir.DataType.INT64)})
        return self.emitter.node("ReduceSum", [each, self.emitter.constant([3])], {"keepdims": 1})

    def _of_first_row(self, key: Expr) -> Expr:
        row = ia.only_atom(self.site.i)
        return key if row is None else il.rewrite(key, {row: ia.ZERO})

    def _line(self, key: Expr) -> ir.Value:
        return self.emitter.node("Reshape", [self.emitter.emit(self.site, key), self.emitter.constant([-1])])

    def _as_float(self, value: ir.Value) -> ir.Value:
        return self.emitter.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
