# SPDX-License-Identifier: Apache-2.0
"""What a model's broadcasts tell of sizes that are cut off: where an axis of size min(n, 128) meets one of size n, the
model runs for n <= 128 only, and each such minimum is the size itself.

For two sizes that meet are equal, or one of them is 1; and min(n, 2 or more) is 1 only where n is. GPT-2's and
GPT-Neo's buffers of a triangle, of which a Slice takes as many rows and columns as there are, say this of their scores.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from faexport.sizes.algebra import Expr, const, is_nonnegative, minimum, of_atom, only_atom, replace, sub
from faexport.understand.shapes.known import Shape


class Limits(Mapping[Expr, Expr]):
    """Minima, and what they are in every run in which the model doesn't fail; it is false while nothing was learnt.

    NOTE: `replace` asks for one minimum after another, and most of them are not known beforehand. So a minimum is
    worked out when it is asked for, and what iterating gives is the sizes that have a limit."""

    def __init__(self) -> None:
        self._most: dict[Expr, Expr] = {}  # a size, and what it never exceeds
        self._found: dict[Expr, Expr] = {}  # what each minimum asked for is; itself where nothing is known

    def learn(self, limits: Mapping[Expr, Expr]) -> None:
        if limits.items() - self._most.items():
            self._most.update(limits)
            self._found.clear()

    def __contains__(self, atom: object) -> bool:
        return isinstance(atom, Expr) and atom.op == "min" and self[atom] is not of_atom(atom)

    def __getitem__(self, atom: Expr) -> Expr:
        if atom not in self._found:
            self._found[atom] = self._least(*(replace(x, self) for x in atom.args))
        return self._found[atom]

    def __iter__(self) -> Iterator[Expr]:
        return iter(self._most)

    def __len__(self) -> int:
        return len(self._most)

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
