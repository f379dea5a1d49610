# SPDX-License-Identifier: Apache-2.0
"""Expressions that grow evenly with an index. Used to read windows, lengths and slopes off a mask."""

from __future__ import annotations

from faexport.sizes import algebra as ia
from faexport.sizes.algebra import Expr


def linear_in(expr: Expr, name: str) -> tuple[int, Expr] | None:
    """(coefficient, rest) with expr = coefficient * name + rest, the rest free of `name`; None where it isn't so."""
    coefficient, rest = 0, expr
    for m, c in expr.args:
        if len(m) == 1 and m[0].op == "var" and m[0].args[0] == name:
            coefficient += c
            rest = ia.sub(rest, ia.scale(ia.of_atom(m[0]), c))
    return None if name in ia.variables(rest) else (coefficient, rest)
