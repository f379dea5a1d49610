# SPDX-License-Identifier: Apache-2.0
"""What a model's broadcasts tell of its sizes, in every run in which it doesn't fail: two sizes that meet are equal, or
one of them is 1.

- min(n, 2 or more) is 1 only where n is. So where an axis of size min(n, 128) meets one of size n, the model runs for
  n <= 128 only, and each such minimum is the size itself. GPT-2's and GPT-Neo's buffers of a triangle, of which a Slice
  takes as many rows and columns as there are, say this of their scores.
- 4 * n is never 1. So where an axis of size 4 * n meets one of size 4 * m, n is m. Batched products of batch and heads
  in one axis, which tf2onnx makes of every Einsum, say this of the batch entries of queries, keys, values and masks.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from faexport.sizes.algebra import Expr, atoms, const, divide, is_nonnegative, minimum, of_atom, only_atom, replace, sub
from faexport.understand.shapes.known import Shape


class Limits(Mapping[Expr, Expr]):
    """Minima and other atoms, and what they are in every run in which the model doesn't fail; it is false while nothing
    was learnt.

    NOTE: `replace` asks for one minimum after another, and most of them are not known beforehand. So a minimum is
    worked out when it is asked for, and what iterating gives is the sizes of which something is known."""

    def __init__(self) -> None:
        self._most: dict[Expr, Expr] = {}  # a size, and what it never exceeds
        self._same: dict[Expr, Expr] = {}  # an atom that isn't a minimum, and what it equals
        self._found: dict[Expr, Expr] = {}  # what each atom asked for is; itself where nothing is known

    def learn(self, limits: Mapping[Expr, Expr]) -> None:
        if limits.items() - self._most.items():
            self._most.update(limits)
            self._found.clear()

    def learn_equal(self, a: Expr, b: Expr) -> None:
        """These two sizes are equal."""
        solved = _solved(replace(a, self), replace(b, self))
        if solved is not None:
            self._same.update([solved])
            self._found.clear()

    def __contains__(self, atom: object) -> bool:
        return isinstance(atom, Expr) and (atom in self._same or atom.op == "min") and self[atom] is not of_atom(atom)

    def __getitem__(self, atom: Expr) -> Expr:
        if atom not in self._found:
            if atom in self._same:  # what it equals has no atom whose own equal leads back to it
                self._found[atom] = replace(self._same[atom], self)
            else:
                self._found[atom] = self._least(*(replace(x, self) for x in atom.args))
        return self._found[atom]

    def __iter__(self) -> Iterator[Expr]:
        return iter([*self._most, *self._same])

    def __len__(self) -> int:
        return len(self._most) + len(self._same)

    def _least(self, a: Expr, b: Expr) -> Expr:
        for x, other in ((a, b), (b, a)):
            for size, most in self._most.items():
                if is_nonnegative(sub(size, x)) and is_nonnegative(sub(other, most)):
                    return x
        return minimum(a, b)


def limits_of(shapes: Sequence[Shape | None]) -> dict[Expr, Expr]:
    """Sizes and what they never exceed where tensors of these shapes are broadcast against each other."""
    found: dict[Expr, Expr] = {}
    known = [shape[::-1] for shape in shapes if shape is not None]
    for sizes in itertools.zip_longest(*known):
        met = {d.expr for d in sizes if d is not None}
        for cut in (only_atom(size) for size in met):
            if cut is None or cut.op != "min":
                continue
            for size, most in (cut.args, cut.args[::-1]):
                if size in met and is_nonnegative(sub(most, const(2))):
                    found[size] = most
    return found


def equal_sizes(shapes: Sequence[Shape | None]) -> Iterator[tuple[Expr, Expr]]:
    """Pairs of sizes that are equal where tensors of these shapes are broadcast against each other, as neither can be
    1."""
    for sizes in itertools.zip_longest(*(shape[::-1] for shape in shapes if shape is not None)):
        met = list(dict.fromkeys(d.expr for d in sizes if d is not None and d.const is None and _factor(d.expr) > 1))
        yield from zip(met, met[1:], strict=False)


def _factor(size: Expr) -> int:
    """The largest number that the size is a multiple of."""
    return functools.reduce(math.gcd, (c for _, c in size.args), 0)


def _solved(a: Expr, b: Expr) -> tuple[Expr, Expr] | None:
    """An atom, and what it is where a and b are equal; None where nothing follows. Of two names the older one, which
    may be an input's, stands for both; what is known least is replaced first."""
    factor = const(math.gcd(_factor(a), _factor(b)) or 1)
    sides = divide(a, factor), divide(b, factor)
    found: list[tuple[bool, int, Expr, Expr]] = []
    for size, other in (sides, sides[::-1]):
        atom = only_atom(size) if size is not None else None
        if atom is not None and other is not None and atom.op in ("sym", "meet") and atom not in atoms(other, atom.op):
            found.append((atom.op == "meet" or atom.args[0].startswith("?"), atom.serial, atom, other))
    return max(found, key=lambda x: x[:2])[2:] if found else None


def at_least_one(size: Expr) -> set[Expr]:
    """The atoms that are 1 or more where an axis of this size has an element."""
    if len(size.args) != 1:
        return set()
    found: set[Expr] = set()
    for atom in size.args[0][0]:
        found.add(atom)
        if atom.op in ("meet", "min"):  # 1 or more only where each part is
            found.update(a for x in atom.args for a in at_least_one(x))
    return found
