# SPDX-License-Identifier: Apache-2.0
"""Splits a mask condition into what the operator has a name for (windows, lengths) and the rest.

Called by draft.py, strategies.py and empty_rows.py with the condition under which key j is visible to query row i. A
part `j <= i + right` bounds the window on the right, `j >= i - left` on the left; a part that bounds j by something of
the batch entry alone is a length.
"""

from __future__ import annotations

import dataclasses

from faexport.sizes import algebra as ia
from faexport.sizes.algebra import Expr
from faexport.understand.index import logic as il
from faexport.understand.index.linear import linear_in
from faexport.understand.mask.site import Site


@dataclasses.dataclass
class Window:
    """Row i stands at `offset` + i and sees `left` keys before and `right` keys after itself (-1: all)."""

    left: int = -1
    right: int = -1
    offset: Expr = ia.ZERO
    parts: tuple[Expr, ...] = ()  # the conditions it was read from


def conjuncts(cond: Expr) -> list[Expr]:
    if cond is il.TRUE:
        return []
    return list(cond.args) if cond.op == "and" else [cond]


def split(site: Site, cond: Expr) -> tuple[Window, list[Expr]]:
    """(window, the parts that it doesn't say). The window is open on both sides where no diagonal bounds it."""
    right: list[tuple[Expr, Expr]] = []  # (how far j may be beyond i, the condition)
    left: list[tuple[Expr, Expr]] = []  # (how far before)
    rest: list[Expr] = []
    for part in conjuncts(cond):
        bound = _diagonal(part) or _last_keys(site, part)
        if bound is None:
            rest.append(part)
        else:
            (right if bound[0] > 0 else left).append((bound[1], part))
    window = _choose(site, right, left)
    return window, rest + [p for _, p in right + left if p not in window.parts]


def _diagonal(part: Expr) -> tuple[int, Expr] | None:
    """(1, r) for j <= i + r; (-1, l) for j >= i - l, where r and l don't depend on i, j, h."""
    if part.op != "ge0":
        return None
    in_j = linear_in(part.args[0], "j")
    in_i = linear_in(in_j[1], "i") if in_j is not None else None
    if in_j is None or in_i is None or abs(in_j[0]) != 1 or in_i[0] != -in_j[0] or ia.variables(in_i[1]) - {"b"}:
        return None
    return in_i[0], in_i[1]


def _last_keys(site: Site, part: Expr) -> tuple[int, Expr] | None:
    """(-1, l) for j >= -l where the query has one row: a window of that row, as a decoder's step has it."""
    linear = linear_in(part.args[0], "j") if part.op == "ge0" else None
    if linear is None or linear[0] != 1 or ia.variables(linear[1]) - {"b"}:
        return None
    return (-1, linear[1]) if any(ia.value_of(rows) == 1 for rows in site.sizes["S"]) else None


def _choose(site: Site, right: list[tuple[Expr, Expr]], left: list[tuple[Expr, Expr]]) -> Window:
    """The window of the first bound on each side (bounds that imply each other are already one), if they fit
    together."""
    if not right and not left:
        return Window()
    if not right:
        reach, part = left[0]
        known = ia.value_of(reach)
        if known is not None and known >= 0:
            return Window(left=known, offset=ia.ZERO, parts=(part,))
        offset = ia.sub(ia.const(max(ia.constant_part(reach), 0)), reach)
        return Window(left=max(ia.constant_part(reach), 0), offset=offset, parts=(part,))
    reach, part = right[0]
    ahead = _ahead(site, reach)
    window = Window(right=ahead, offset=ia.sub(reach, ia.const(ahead)), parts=(part,))
    for before, other in left[:1]:
        behind = ia.value_of(ia.add(before, window.offset))
        if (
            behind is not None and behind < 0 <= ahead + behind
        ):  # all keys are ahead: move the position to the first of them
            window.offset, window.right, behind = ia.sub(window.offset, ia.const(behind)), ahead + behind, 0
        if behind is not None and behind >= 0:
            window.left, window.parts = behind, (part, other)
    return window


def _ahead(site: Site, reach: Expr) -> int:
    """How much of `reach` is looking ahead, the rest being the position of row 0. Bottom-right positions are
    preferred."""
    for corner in corners(site):
        ahead = ia.value_of(ia.sub(reach, corner))
        if ahead is not None and ahead >= 0:
            return ahead
    return max(ia.constant_part(reach), 0)


def corners(site: Site) -> list[Expr]:
    """S_kv - S_q, in the ways in which it can be written."""
    return [ia.sub(t, s) for t in site.sizes["T"] for s in site.sizes["S"]]


def length_of(part: Expr) -> Expr | None:
    """n for a condition j < n where n is a number of the batch entry alone, else None."""
    linear = linear_in(part.args[0], "j") if part.op == "ge0" else None
    if linear is None or linear[0] != -1 or ia.variables(linear[1]) - {"b"}:
        return None
    return ia.add(linear[1], ia.ONE)
