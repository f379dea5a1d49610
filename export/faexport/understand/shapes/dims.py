# SPDX-License-Identifier: Apache-2.0
"""Symbolic sizes: integer polynomials over named, non-negative unknowns such as "batch" or "past + sequence".

Used wherever the exporter proves something of a shape. Two sizes are equal when their polynomials are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping

Monomial = tuple[str, ...]  # sorted symbols, with repetition; () is the constant term

_fresh = itertools.count()


def _order(monomial: Monomial) -> tuple[int, Monomial]:
    return len(monomial), monomial


class Dim:
    """An immutable polynomial with integer coefficients."""

    __slots__ = ("_hash", "const", "terms")

    def __init__(self, terms: Mapping[Monomial, int]):
        self.terms = {m: c for m, c in terms.items() if c != 0}
        self._hash: int | None = None
        # The number that this is, or None while it depends on a symbol.
        self.const: int | None = self.terms.get((), None if self.terms else 0) if len(self.terms) <= 1 else None

    @staticmethod
    def of(value: int | str | Dim) -> Dim:
        return value if isinstance(value, Dim) else _atom(value)

    @staticmethod
    def unknown(hint: str = "") -> Dim:
        """A size of which nothing is known; equal only to itself."""
        return Dim.of(f"?{hint}#{next(_fresh)}")

    @property
    def symbols(self) -> set[str]:
        return set(itertools.chain.from_iterable(self.terms))

    def __add__(self, other: int | Dim) -> Dim:
        terms = dict(self.terms)
        for m, c in Dim.of(other).terms.items():
            terms[m] = terms.get(m, 0) + c
        return Dim(terms)

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return Dim({m: -c for m, c in self.terms.items()})

    def __sub__(self, other: int | Dim) -> Dim:
        return self + -Dim.of(other)

    def __rsub__(self, other: int) -> Dim:
        return Dim.of(other) - self

    def __mul__(self, other: int | Dim) -> Dim:
        other = Dim.of(other)
        if other.const == 1 or self.const == 1:
            return self if other.const == 1 else other
        if self.const is not None and other.const is not None:
            return _atom(self.const * other.const)
        terms: dict[Monomial, int] = {}
        for (a, x), (b, y) in itertools.product(self.terms.items(), other.terms.items()):
            m = tuple(sorted(a + b))
            terms[m] = terms.get(m, 0) + x * y
        return Dim(terms)

    __rmul__ = __mul__

    def divide(self, other: int | Dim) -> Dim | None:
        """The exact quotient, or None where there is none (or the divisor is 0)."""
        other = Dim.of(other)
        if not other.terms:
            return None
        if other.const == 1 or self.terms == other.terms:
            return self if other.const == 1 else _atom(1)
        if self.const is not None and other.const is not None:
            return None if self.const % other.const else _atom(self.const // other.const)
        lead = max(other.terms, key=_order)
        rest, quotient = self, Dim.of(0)
        while rest.terms:
            top = max(rest.terms, key=_order)
            symbols = _remove(top, lead)
            if symbols is None or rest.terms[top] % other.terms[lead]:
                return None
            step = Dim({symbols: rest.terms[top] // other.terms[lead]})
            quotient, rest = quotient + step, rest - step * other
        return quotient

    def substitute(self, known: Mapping[str, Dim]) -> Dim:
        """With symbols replaced by what they are known to equal."""
        if not self.symbols & known.keys():
            return self
        total = Dim.of(0)
        for monomial, coefficient in self.terms.items():
            term = Dim.of(coefficient)
            for symbol in monomial:
                term = term * (known[symbol].substitute(known) if symbol in known else Dim.of(symbol))
            total = total + term
        return total

    def __eq__(self, other: object) -> bool:
        if isinstance(other, int):
            return self.const == other
        return self is other or (isinstance(other, Dim) and self.terms == other.terms)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self.terms.items()))
        return self._hash

    def __str__(self) -> str:
        if not self.terms:
            return "0"
        parts = []
        for m, c in sorted(self.terms.items(), key=lambda item: _order(item[0]), reverse=True):
            parts.append("*".join(([str(c)] if c != 1 or not m else []) + list(m)))
        return " + ".join(parts)

    __repr__ = __str__


@functools.lru_cache(maxsize=4096)
def _atom(value: int | str) -> Dim:
    return Dim({(value,): 1}) if isinstance(value, str) else Dim({(): int(value)})


def _remove(monomial: Monomial, part: Monomial) -> Monomial | None:
    left = list(monomial)
    for symbol in part:
        if symbol not in left:
            return None
        left.remove(symbol)
    return tuple(left)


def product(dims: Iterable[int | Dim]) -> Dim:
    return functools.reduce(lambda a, b: a * b, dims, Dim.of(1))


def plain(dim: Dim | None) -> int | str | None:
    """For reports and spec.py: an int, a readable symbolic name, or None where nothing is known."""
    if dim is None:
        return None
    if dim.const is not None:
        return dim.const
    return None if any(s.startswith("?") for s in dim.symbols) else str(dim)
