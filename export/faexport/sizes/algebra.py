# SPDX-License-Identifier: Apache-2.0
"""Integer expressions over the indices of a tensor element: what masks are made of.

An expression says what one element of a tensor is, as a function of index variables, symbolic sizes and elements of
other tensors. Integers are polynomials over atoms, in one normal form, so that equal expressions are the same object.
Used by logic.py (conditions) and by the transfer functions. Assumed: no 64-bit overflow; sizes are >= 0.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

_serial = itertools.count()
_interned: weakref.WeakValueDictionary[tuple, Expr] = weakref.WeakValueDictionary()


class Expr:
    """A node of an interned expression: `is` is equality. `kind` is "int", "bool" or "float"."""

    __slots__ = ("__weakref__", "args", "kind", "op", "serial")
    op: str
    args: tuple[Any, ...]  # expressions, and what the operation needs beside them: numbers, names, values of the graph
    kind: str
    serial: int  # the order of creation, by which normal forms are sorted


def make(op: str, args: tuple, kind: str) -> Expr:
    """The one Expr with these parts."""
    key = (op, args, kind)
    found = _interned.get(key)
    if found is None:
        found = object.__new__(Expr)
        found.op, found.args, found.kind, found.serial = op, args, kind, next(_serial)
        _interned[key] = found
    return found


# ---------------------------------------------------------------------------------------------- polynomials

Monomial = tuple[Expr, ...]  # atoms in order of serial; () is the constant


def _poly(terms: dict[Monomial, int]) -> Expr:
    items = [item for item in terms.items() if item[1]]
    if len(items) > 1:
        items.sort(key=lambda item: [a.serial for a in item[0]])
    return make("poly", tuple(items), "int")


@functools.lru_cache(maxsize=1024)
def const(value: int) -> Expr:
    return make("poly", (((), int(value)),) if value else (), "int")


ZERO, ONE = const(0), const(1)


def of_atom(atom: Expr) -> Expr:
    return make("poly", (((atom,), 1),), "int")


def value_of(expr: Expr) -> int | None:
    """The integer that a constant expression is, else None."""
    if not expr.args:
        return 0
    return expr.args[0][1] if len(expr.args) == 1 and not expr.args[0][0] else None


def constant_part(expr: Expr) -> int:
    return next((c for m, c in expr.args if not m), 0)


def add(*exprs: Expr) -> Expr:
    exprs = tuple(e for e in exprs if e.args)  # without zeros
    if len(exprs) <= 1:
        return exprs[0] if exprs else ZERO
    terms: dict[Monomial, int] = {}
    for expr in exprs:
        for m, c in expr.args:
            terms[m] = terms.get(m, 0) + c
    return _poly(terms)


def scale(expr: Expr, factor: int) -> Expr:
    if factor == 1:
        return expr
    return make("poly", tuple((m, c * factor) for m, c in expr.args), "int") if factor else ZERO


def neg(expr: Expr) -> Expr:
    return scale(expr, -1)


def sub(a: Expr, b: Expr) -> Expr:
    if a is b or not b.args:
        return ZERO if a is b else a
    terms = dict(a.args)
    for m, c in b.args:
        terms[m] = terms.get(m, 0) - c
    return _poly(terms)


def _join(a: Monomial, b: Monomial) -> Monomial:
    return tuple(sorted(a + b, key=lambda atom: atom.serial)) if a and b else a or b


def mul(a: Expr, b: Expr) -> Expr:
    for factor, other in ((a, b), (b, a)):
        number = value_of(factor)
        if number is not None:
            return scale(other, number)
    terms: dict[Monomial, int] = {}
    for (m1, c1), (m2, c2) in itertools.product(a.args, b.args):
        m = _join(m1, m2)
        terms[m] = terms.get(m, 0) + c1 * c2
    return _poly(terms)


def product(exprs: Iterable[Expr]) -> Expr:
    return functools.reduce(mul, exprs, ONE)


# ---------------------------------------------------------------------------------------------- atoms


def sym(name: str, at_least: int = 0) -> Expr:
    """A size known by name only, e.g. "sequence"."""
    return of_atom(make("sym", (name, at_least), "int"))


def var(name: str, sizes: Sequence[Expr]) -> Expr:
    """An index: 0 <= index < each of `sizes`. An axis of size 1 has the index 0."""
    if any(value_of(s) == 1 for s in sizes):
        return ZERO
    return of_atom(make("var", (name, tuple(sizes)), "int"))


def only_atom(expr: Expr) -> Expr | None:
    """The atom of an expression that is just that atom, else None."""
    if expr.op == "poly" and len(expr.args) == 1 and expr.args[0][1] == 1 and len(expr.args[0][0]) == 1:
        return expr.args[0][0][0]
    return None


def minimum(a: Expr, b: Expr) -> Expr:
    return _extreme("min", a, b, sub(b, a))


def maximum(a: Expr, b: Expr) -> Expr:
    return _extreme("max", a, b, sub(a, b))


def _extreme(op: str, a: Expr, b: Expr, ahead: Expr) -> Expr:
    """`a` where `ahead` is proven not to be negative, `b` where it is proven not to be positive, else an atom."""
    if is_nonnegative(ahead):
        return a
    if is_nonnegative(neg(ahead)):
        return b
    return of_atom(make(op, tuple(sorted((a, b), key=lambda e: e.serial)), "int"))


def last(count: Expr, whole: Expr) -> Expr:
    """The number of elements of axis[-count:] where the axis has `whole`, count >= 0: all for 0, as -0 is the start."""
    kept = minimum(count, whole)
    if kept is whole or value_of(kept) == 0:
        return whole
    return kept if is_positive(kept) else of_atom(make("last", (kept, whole), "int"))


def absolute(a: Expr) -> Expr:
    if is_nonnegative(a):
        return a
    if is_nonnegative(neg(a)):
        return neg(a)
    if a.args[0][1] < 0:
        a = neg(a)
    return of_atom(make("abs", (a,), "int"))


def meet(a: Expr, b: Expr) -> Expr:
    """The size of an axis where axes of these two sizes are broadcast against each other: they are equal, or one of
    them is 1. This is the one rule of broadcasting, for all runs in which the model doesn't fail."""
    if a is b or value_of(b) == 1:
        return a
    if value_of(a) == 1:
        return b
    sure = [x for x, other in ((a, b), (b, a)) if is_one_with(x, other)]
    if sure:  # where each is 1 with the other they are equal, and the simpler one stands for both
        return min(sure, key=lambda x: bool(atoms(x, "min")))
    known = [n for n in (value_of(a), value_of(b)) if n is not None]
    if known:  # a number above 1, or 0: then the other size is it, or is 1
        return const(min(known) if 0 in known else max(known))
    parts = dict.fromkeys(x for e in (a, b) for x in _met(e))
    return of_atom(make("meet", tuple(sorted(parts, key=lambda e: e.serial)), "int"))


def _met(expr: Expr) -> tuple[Expr, ...]:
    atom = only_atom(expr)
    return atom.args if atom is not None and atom.op == "meet" else (expr,)


def meet_all(sizes: Iterable[Expr]) -> Expr:
    return functools.reduce(meet, sizes, ONE)


def is_one_with(a: Expr, b: Expr) -> bool:
    """Is it proven that b is 1 wherever a is? (Then a is the size of an axis where both meet.)"""
    whole, part = only_atom(a), only_atom(b)
    one = {whole: ONE} if whole is not None else {}
    if whole is not None and whole.op == "min":  # min(x, 2 or more) is 1 only where x is
        for x, other in (whole.args, whole.args[::-1]):
            if is_nonnegative(sub(other, const(2))):
                if x is b:
                    return True
                name = only_atom(x)
                if name is not None:
                    one[name] = ONE
    if part is not None and part.op == "min" and a in part.args:  # min(a, 1 or more) is 1 where a is
        if all(x is a or is_positive(x) for x in part.args):
            return True
    for monomial, coefficient in a.args if len(a.args) == 1 else ():
        if coefficient == 1:  # a product of sizes is 1 only where each of them is
            one.update((atom, ONE) for atom in monomial if atom.op in ("sym", "meet"))
    return bool(one) and replace(b, one) is ONE


def pushed(expr: Expr) -> Expr:
    """The same number with what is added to its one minimum or maximum put into it: 9 - max(0, 9 - n) is min(9, n)."""
    inner = [(m[0], c) for m, c in expr.args if len(m) == 1 and m[0].op in ("min", "max") and abs(c) == 1]
    if len(inner) != 1:
        return expr
    atom, c = inner[0]
    rest = sub(expr, scale(of_atom(atom), c))
    a, b = (pushed(add(rest, scale(pushed(x), c))) for x in atom.args)
    return minimum(a, b) if (atom.op == "min") == (c > 0) else maximum(a, b)


def replace(size: Expr, known: Mapping[Expr, Expr]) -> Expr:
    """A size with atoms replaced as `known` tells, simplified again."""
    if size.op != "poly" or all(a.op == "sym" and a not in known for m, _ in size.args for a in m):
        return size
    total = ZERO
    for monomial, coefficient in size.args:
        factors = (known[a] if a in known else _replace_atom(a, known) for a in monomial)
        total = add(total, product([const(coefficient), *factors]))
    return total


def _replace_atom(atom: Expr, known: Mapping[Expr, Expr]) -> Expr:
    made = SIZE_ATOMS.get(atom.op)
    if made is None:
        return of_atom(atom)
    return made(*(replace(x, known) for x in atom.args))


def divide(a: Expr, b: Expr) -> Expr | None:
    """The exact quotient, or None where there is none (or the divisor is 0)."""
    if not b.args:
        return None
    if b is ONE or a is b:
        return a if b is ONE else ONE
    lead, lead_c = max(b.args, key=_order)
    rest, quotient = a, ZERO
    while rest.args:
        top, top_c = max(rest.args, key=_order)
        left = _without(top, lead)
        if top_c % lead_c or left is None:
            return None
        step = _poly({left: top_c // lead_c})
        quotient, rest = add(quotient, step), sub(rest, mul(step, b))
    return quotient


def _without(product: Monomial, factors: Monomial) -> Monomial | None:
    """The product divided by the factors; None where one of them is not in it."""
    left = list(product)
    for factor in factors:
        if factor not in left:
            return None
        left.remove(factor)
    return tuple(left)


def _order(item: tuple[Monomial, int]) -> tuple[int, list[int]]:
    return len(item[0]), [atom.serial for atom in item[0]]


def _divide_exactly(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """(q, r) with a = q * b + r, by multivariate division on b's leading monomial."""
    lead, lead_c = max(b.args, key=lambda item: (len(item[0]), [-x.serial for x in item[0]]))
    quotient, rest = ZERO, a
    for _ in range(16):
        for m, c in rest.args:
            left = _without(m, lead)
            if c % lead_c == 0 and left is not None:
                step = _poly({left: c // lead_c})
                trial = sub(rest, mul(step, b))
                if len(trial.args) <= len(rest.args) - 1 or len(b.args) == 1:
                    quotient, rest = add(quotient, step), trial
                    break
        else:
            break
    return quotient, rest


def floordiv(a: Expr, b: Expr) -> Expr:
    """Floor division; b > 0 is assumed (a size or a positive constant)."""
    if value_of(b) == 1:
        return a
    if value_of(b) == 0:
        return of_atom(make("floordiv", (a, b), "int"))
    quotient, rest = _divide_exactly(a, b)
    known = value_of(b)
    if known is not None:
        c = constant_part(rest)
        quotient, rest = add(quotient, const(c // known)), add(rest, const(c % known - c))
    if not rest.args or (is_nonnegative(rest) and is_nonnegative(sub(sub(b, ONE), rest))):
        return quotient
    return add(quotient, of_atom(make("floordiv", (rest, b), "int")))


def modulo(a: Expr, b: Expr) -> Expr:
    """a - b * floor(a / b); b > 0 is assumed."""
    return sub(a, mul(b, floordiv(a, b)))


# What makes each kind of atom that sizes are made of, from its arguments.
SIZE_ATOMS: dict[str, Callable[..., Expr]] = {
    "min": minimum,
    "max": maximum,
    "last": last,
    "abs": absolute,
    "floordiv": floordiv,
    "meet": lambda *x: meet_all(x),
}

# ---------------------------------------------------------------------------------------------- bounds


def _upper(atom: Expr) -> Sequence[Expr]:
    """Expressions that `atom` never exceeds."""
    if atom.op == "var":
        return [sub(size, ONE) for size in atom.args[1]]
    if atom.op == "min":
        return atom.args
    if atom.op == "last":
        return atom.args[1:]
    if atom.op == "floordiv":
        known, below_zero = value_of(atom.args[1]), neg(atom.args[0])
        if is_nonnegative(below_zero):  # any quotient of a number below 0 is at most -1 when rounded down
            return [const(-1) if is_positive(below_zero) else ZERO]
        if not known or not is_nonnegative(atom.args[0]):
            return []
        return [const(b // known) for b in map(value_of, _bounds(atom.args[0], 1)) if b is not None]
    if atom.op == "choose":
        yes, no = atom.args[1:]
        return [yes if is_nonnegative(sub(yes, no)) else no] if value_of(sub(yes, no)) is not None else []
    return []


def _lower(atom: Expr) -> Sequence[Expr]:
    """Expressions that `atom` never falls below."""
    if atom.op == "sym":
        return [const(atom.args[1])]
    if atom.op in ("var", "abs"):
        return [ZERO]
    if atom.op == "max":
        return atom.args
    if atom.op == "last":
        return atom.args[:1]
    if atom.op in ("min", "meet"):
        return [ONE] if all(map(is_positive, atom.args)) else [ZERO] if all(map(is_nonnegative, atom.args)) else []
    if atom.op == "floordiv":
        return [ZERO] if is_nonnegative(atom.args[0]) else []
    if atom.op == "choose":
        yes, no = atom.args[1:]
        return [no if is_nonnegative(sub(yes, no)) else yes] if value_of(sub(yes, no)) is not None else []
    return []


def _atom_nonnegative(atom: Expr) -> bool:
    return any(is_nonnegative(bound) for bound in _lower(atom))


def _bounds(expr: Expr, sign: int) -> Iterator[Expr]:
    """Bounds of `expr` after replacing atoms by theirs, in both orders; sign 1: above, -1: below."""
    return itertools.chain.from_iterable(_extremes(expr, sign, 6, newest_first) for newest_first in (True, False))


def _extremes(expr: Expr, sign: int, depth: int, newest_first: bool) -> list[Expr]:
    """Bounds of `expr` after replacing one atom (var, min, max …) at a time by its bound; sign 1: above, -1: below.

    With the newest first: a bound is made of what its atom is made of, all of which is older, and may cancel that, as
    that of the index does in size - 1 - index. With the oldest first, what two atoms have in common may cancel."""
    if depth == 0:
        return [expr]
    places = [(atom.serial, m, c, k) for m, c in expr.args for k, atom in enumerate(m) if atom.op != "sym"]
    for _, m, c, k in sorted(places, key=lambda place: place[0], reverse=newest_first):
        others = m[:k] + m[k + 1 :]
        if all(map(_atom_nonnegative, others)):
            rest, results = add(expr, _poly({m: -c})), []
            for bound in _upper(m[k]) if c * sign > 0 else _lower(m[k]):
                results += _extremes(add(rest, mul(bound, _poly({others: c}))), sign, depth - 1, newest_first)
            return results
    return [expr]


_nonnegative: weakref.WeakKeyDictionary[Expr, bool] = weakref.WeakKeyDictionary()


def is_nonnegative(expr: Expr) -> bool:
    """True where `expr` >= 0 is proven for all indices and sizes; False where it is not proven."""
    known = True if _is_sum_of_sizes(expr) else _nonnegative.get(expr)
    if known is None:
        known = any(map(_sizes_nonnegative, _bounds(expr, -1))) or _in_each_case(expr)
        _nonnegative[expr] = known
    return known


def _is_sum_of_sizes(expr: Expr) -> bool:
    """Is it a sum of products of sizes, which cannot be negative? Most expressions that are asked about are."""
    return all(c >= 0 and all(a.op == "sym" and a.args[1] >= 0 for a in m) for m, c in expr.args)


def _in_each_case(expr: Expr) -> bool:
    """Is it >= 0 whichever argument each minimum and maximum is?"""
    split = [atom for m, _ in expr.args for atom in m if atom.op in ("min", "max")]
    if not split or len(set(split)) > 3:
        return False
    return all(is_nonnegative(replace(expr, {split[0]: x})) for x in split[0].args)


def _sizes_nonnegative(expr: Expr) -> bool:
    """Is a polynomial over sizes >= 0? Each size is written as its least value plus a non-negative rest."""
    shifted = ZERO
    for m, c in expr.args:
        term = const(c)
        for atom in m:
            if atom.op != "sym":
                return False
            term = mul(term, add(of_atom(atom), const(atom.args[1])))
        shifted = add(shifted, term)
    return all(c >= 0 for _, c in shifted.args)


def is_positive(expr: Expr) -> bool:
    return is_nonnegative(sub(expr, ONE))


# ---------------------------------------------------------------------------------------------- walks


def children(expr: Expr) -> list[Expr]:
    if expr.op == "poly":
        return [atom for m, _ in expr.args for atom in m]
    if expr.op == "var":
        return list(expr.args[1])
    flat: list[Expr] = []
    for arg in expr.args:
        if isinstance(arg, Expr):
            flat.append(arg)
        elif isinstance(arg, (tuple, frozenset)):
            flat += [a for a in arg if isinstance(a, Expr)]
    return flat


_variables: weakref.WeakKeyDictionary[Expr, frozenset[str]] = weakref.WeakKeyDictionary()


def variables(expr: Expr) -> frozenset[str]:
    """Names of the index variables that `expr` depends on."""
    known = _variables.get(expr)
    if known is None:
        if expr.op == "var":
            known = frozenset((expr.args[0],))
        else:
            known = frozenset().union(*(variables(c) for c in children(expr)))
        _variables[expr] = known
    return known


def atoms(expr: Expr, op: str) -> set[Expr]:
    """All sub-expressions of `expr` made by `op`."""
    found: set[Expr] = set()
    seen: set[Expr] = set()
    stack = [expr]
    while stack:
        e = stack.pop()
        if e in seen:
            continue
        seen.add(e)
        if e.op == op:
            found.add(e)
        stack += children(e)
    return found
