# SPDX-License-Identifier: Apache-2.0
"""Sizes in numbers. Used by the check of masks on random data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from faexport.sizes.algebra import Expr

_OPERATIONS: dict[str, Callable[..., int]] = {
    "min": min,
    "max": max,
    "last": lambda count, whole: count or whole,
    "abs": abs,
    "floordiv": lambda a, b: a // b,
}


def evaluate(expr: Expr, sizes: Mapping[Expr, int]) -> int:
    """The number that a size is, given the numbers of its symbols. KeyError where something else is in it."""
    total = 0
    for m, c in expr.args:
        for atom in m:
            c *= _evaluate_atom(atom, sizes)
        total += c
    return total


def _evaluate_atom(atom: Expr, sizes: Mapping[Expr, int]) -> int:
    if atom in sizes:
        return sizes[atom]
    if atom.op == "meet":
        met = {evaluate(a, sizes) for a in atom.args} - {1} or {1}
        if len(met) > 1:
            raise KeyError(atom)  # such a model doesn't run
        return met.pop()
    if atom.op in _OPERATIONS:
        return _OPERATIONS[atom.op](*(evaluate(a, sizes) for a in atom.args))
    return sizes[atom]
