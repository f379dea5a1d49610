# SPDX-License-Identifier: Apache-2.0
"""Conditions and floats over index expressions: comparisons, and/or/not, choices, rounding arithmetic.

Everything is simplified as it is built: comparisons that hold for all indices become TRUE, a choice knows its own
condition inside its branches, arithmetic on a choice of constants becomes a choice of constants. Used by the transfer
functions and the mask facts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import ml_dtypes
import numpy as np
import onnx_ir as ir

from faexport.sizes import algebra as ia
from faexport.sizes.algebra import Expr, make
from faexport.understand.index.answers import kept, remembered
from faexport.understand.shapes.constants import tensor_of

TRUE, FALSE = make("true", (), "bool"), make("false", (), "bool")
_MAX_CHOICES = 64  # a lifted operation with more leaves than this stays as it is

# ---------------------------------------------------------------------------------------------- and, or, not


@remembered
def negate(a: Expr) -> Expr:
    if a is TRUE:
        return FALSE
    if a is FALSE:
        return TRUE
    if a.op == "not":
        return a.args[0]
    if a.op == "ge0":
        return ge0(ia.sub(ia.neg(a.args[0]), ia.ONE))
    if a.op == "and":
        return any_of(negate(x) for x in a.args)
    if a.op == "or":
        return all_of(negate(x) for x in a.args)
    return make("not", (a,), "bool")


@remembered
def implies(a: Expr, b: Expr) -> bool:
    """True where a ⇒ b is proven."""
    if a is b or a is FALSE or b is TRUE:
        return True
    if a.op == "ge0" and b.op == "ge0":
        return ia.is_nonnegative(ia.sub(b.args[0], a.args[0]))
    if a.op == "eq0" and b.op == "ge0":
        return ia.is_nonnegative(ia.sub(b.args[0], a.args[0])) or ia.is_nonnegative(ia.add(b.args[0], a.args[0]))
    if b.op == "or":
        return any(implies(a, x) for x in b.args)
    if a.op == "and":
        return any(implies(x, b) for x in a.args)
    if b.op == "and":
        return all(implies(a, x) for x in b.args)
    return False


def _flatten(op: str, items: Iterable[Expr]) -> list[Expr]:
    flat: dict[Expr, None] = {}
    for item in items:
        for x in item.args if item.op == op else (item,):
            flat[x] = None
    return list(flat)


def all_of(items: Iterable[Expr]) -> Expr:
    parts = _flatten("and", items)
    for _ in range(4):  # until nothing changes; each round resolves one level of "or"
        before = list(parts)
        parts = [x for k, x in enumerate(parts) if not _redundant(x, k, parts, implies)]
        units = [x for x in parts if x.op != "or"]
        parts = _flatten(
            "and",
            (
                any_of(y for y in x.args if not any(implies(u, negate(y)) for u in units)) if x.op == "or" else x
                for x in parts
            ),
        )
        if FALSE in parts or any(implies(x, negate(y)) for x in units for y in units if x is not y):
            return FALSE
        if parts == before:
            break
    parts = [x for x in parts if x is not TRUE]
    if len(parts) < 2:
        return parts[0] if parts else TRUE
    return make("and", tuple(sorted(parts, key=lambda e: e.serial)), "bool")


def any_of(items: Iterable[Expr]) -> Expr:
    parts = [x for x in _flatten("or", items) if x is not FALSE]
    if TRUE in parts or any(
        implies(negate(x), y) for x in parts if x.op not in ("and", "or") for y in parts if y is not x
    ):
        return TRUE
    parts = [x for k, x in enumerate(parts) if not _redundant(x, k, parts, lambda a, b: implies(b, a))]
    if len(parts) < 2:
        return parts[0] if parts else FALSE
    parts = _beside_sizes(parts)
    if len(parts) < 2:
        return parts[0]
    common = [x for x in _flatten("and", parts[:1]) if all(x in _flatten("and", [p]) for p in parts[1:])]
    if common:  # (a and b) or (a and c) is a and (b or c)
        return all_of([*common, any_of(all_of(x for x in _flatten("and", [p]) if x not in common) for p in parts)])
    return make("or", tuple(sorted(parts, key=lambda e: e.serial)), "bool")


def _beside_sizes(parts: list[Expr]) -> list[Expr]:
    """Alternatives beside a condition on sizes alone, as broadcasting makes them: "a or (not a and b)" is "a or b", and
    a may go where b holds whenever it does."""
    for sizes in [x for x in parts if x.op in ("ge0", "eq0", "not") and not ia.variables(x)]:
        others = [assume(x, negate(sizes)) for x in parts if x is not sizes]
        if TRUE in others:
            return [TRUE]
        others = [x for x in others if x is not FALSE]
        parts = others if any(assume(x, sizes) is TRUE for x in others) else [sizes, *others]
    return list(dict.fromkeys(parts))


def _redundant(x: Expr, k: int, parts: list[Expr], stronger: Callable[[Expr, Expr], bool]) -> bool:
    """Is x made superfluous by another part (of two that imply each other the first stays)?"""
    return any(n != k and stronger(y, x) and not (stronger(x, y) and k < n) for n, y in enumerate(parts))


# ---------------------------------------------------------------------------------------------- integer comparisons


def _choice_in(poly: Expr) -> Expr | None:
    return next((atom for m, _ in poly.args for atom in m if atom.op == "choose"), None)


def _with(poly: Expr, atom: Expr, value: Expr) -> Expr:
    """`poly` with the atom replaced (at the top level of its monomials)."""
    total = ia.ZERO
    for m, c in poly.args:
        total = ia.add(total, ia.product([ia.const(c), *(value if a is atom else ia.of_atom(a) for a in m)]))
    return total


def _content(expr: Expr) -> int:
    """The greatest common divisor of the coefficients, the constant left out."""
    return math.gcd(*(c for m, c in expr.args if m)) if any(m for m, _ in expr.args) else 0


def ge0(p: Expr) -> Expr:
    """p >= 0."""
    if ia.is_nonnegative(p):
        return TRUE
    if ia.is_nonnegative(ia.sub(ia.neg(p), ia.ONE)):
        return FALSE
    choice = _choice_in(p)
    if choice is not None:
        cond, yes, no = choice.args
        return choose(cond, ge0(_with(p, choice, yes)), ge0(_with(p, choice, no)))
    for m, c in p.args:
        if len(m) == 1 and m[0].op == "abs" and abs(c) == 1:
            inner = m[0].args[0]
            both = tuple(ge0(_with(p, m[0], a)) for a in (inner, ia.neg(inner)))
            return all_of(both) if c < 0 else any_of(both)
        if len(m) == 1 and m[0].op in ("min", "max") and abs(c) == 1:
            both = tuple(ge0(_with(p, m[0], a)) for a in m[0].args)
            return all_of(both) if (m[0].op == "min") == (c > 0) else any_of(both)
    g = _content(p)
    if g > 1:
        p = ia.add(*(make("poly", ((m, c // g),), "int") for m, c in p.args if m), ia.const(ia.constant_part(p) // g))
    return make("ge0", (p,), "bool")


def eq0(p: Expr) -> Expr:
    """p == 0."""
    if not p.args:
        return TRUE
    if ia.is_positive(p) or ia.is_positive(ia.neg(p)):
        return FALSE
    choice = _choice_in(p)
    if choice is not None:
        cond, yes, no = choice.args
        return choose(cond, eq0(_with(p, choice, yes)), eq0(_with(p, choice, no)))
    if p.args[-1][1] < 0:
        p = ia.neg(p)
    if len(p.args) == 1 and len(p.args[0][0]) > 1:  # a product is 0 where a factor is
        return any_of(eq0(ia.of_atom(a)) for a in set(p.args[0][0]))
    if len(p.args) == 1:
        p = ia.of_atom(p.args[0][0][0])
    if ia.is_nonnegative(p):
        return ge0(ia.neg(p))
    simpler = _without_minimum(p)
    return make("eq0", (p,), "bool") if simpler is None else eq0(simpler)


def _without_minimum(p: Expr) -> Expr | None:
    """What is 0 where min(x, y) - c is, y being above c: x - c."""
    for m, c in p.args:
        if len(m) == 1 and m[0].op == "min" and abs(c) == 1:
            for x, other in (m[0].args, m[0].args[::-1]):
                rest = ia.scale(_with(p, m[0], other), c)  # other - c
                if ia.is_positive(rest):
                    return _with(p, m[0], x)
    return None


# ---------------------------------------------------------------------------------------------- choices


@remembered
def choose(cond: Expr, yes: Expr, no: Expr) -> Expr:
    """`yes` where `cond` holds, else `no`."""
    if cond is TRUE or yes is no:
        return yes
    if cond is FALSE:
        return no
    opposite = negate(cond)
    if assume(no, cond) is yes:  # then `no` is right on both sides
        return no
    if assume(yes, opposite) is no:
        return yes
    yes, no = assume(yes, cond), assume(no, opposite)
    if yes is no:
        return yes
    if yes.kind == "bool":
        return any_of((all_of((cond, yes)), all_of((negate(cond), no))))
    if cond.op == "not":
        cond, yes, no = cond.args[0], no, yes
    atom = make("choose", (cond, yes, no), yes.kind)
    return ia.of_atom(atom) if yes.kind == "int" else atom


@remembered
def assume(expr: Expr, cond: Expr) -> Expr:
    """`expr` simplified where `cond` is known to hold."""
    if expr.op in ("true", "false", "float") or (expr.op == "poly" and ia.value_of(expr) is not None):
        return expr
    known: dict[Expr, Expr] = {}
    for fact in cond.args if cond.op == "and" else (cond,):
        known[fact] = TRUE
        known[negate(fact)] = FALSE
        zero = _vanishing(fact)
        if zero is not None:
            known.update(zero)
    return rewrite(expr, known)


def _vanishing(fact: Expr) -> dict[Expr, Expr] | None:
    """What a fact of the form "… is 0" replaces: {atom: value}."""
    if fact.op == "not" and fact.args[0].op == "fcmp" and fact.args[0].args[0] == "ne":
        a, b = fact.args[0].args[1:]
        return {a: b} if b.op == "float" else None
    if fact.op == "fcmp" and fact.args[0] == "eq" and fact.args[2].op == "float":
        return {fact.args[1]: fact.args[2]}
    poly = fact.args[0] if fact.op == "eq0" else None
    if fact.op == "ge0" and ia.is_nonnegative(ia.neg(fact.args[0])):
        poly = fact.args[0]
    if poly is None:
        return None
    for kinds in (("var", "load"), ("sym", "meet")):
        for m, c in poly.args:
            if len(m) == 1 and abs(c) == 1 and m[0].op in kinds:
                rest = ia.sub(poly, make("poly", ((m, c),), "int"))
                return {m[0]: ia.scale(rest, -c)}
    return None


def rewrite(expr: Expr, known: dict[Expr, Expr]) -> Expr:
    """`expr` with sub-expressions replaced as `known` tells, simplified again."""
    memo: dict[Expr, Expr] = {}

    def go(e: Expr) -> Expr:
        if e in known:
            return known[e]
        if e not in memo:
            is_changed = any(not _is_same(part, go(part)) for part in ia.children(e))
            memo[e] = _rebuild(e, go) if is_changed else e
        return memo[e]

    with kept():
        return go(expr)


def _is_same(before: Expr, after: Expr) -> bool:
    """Was a part left as it is? An integer's atom may have become the polynomial that is just that atom."""
    return after is before or (before.kind == "int" and before.op != "poly" and after is ia.of_atom(before))


def _rebuild(e: Expr, go: Callable[[Expr], Expr]) -> Expr:
    """`e` made anew from its rewritten parts."""
    if e.op == "poly":
        total = ia.ZERO
        for m, c in e.args:
            factors = [go(a) for a in m]
            total = ia.add(total, ia.product([ia.const(c), *(f if f.op == "poly" else ia.of_atom(f) for f in factors)]))
        return total
    parts: dict[str, Callable[..., Expr]] = ia.SIZE_ATOMS | {"ge0": ge0, "eq0": eq0, "not": negate}
    if e.op in parts:
        return parts[e.op](*(go(a) for a in e.args))
    if e.op == "var":  # an axis that turns out to have size 1 has the index 0
        return ia.ZERO if any(go(size) is ia.ONE for size in e.args[1]) else e
    if e.op in ("and", "or"):
        return (all_of if e.op == "and" else any_of)([go(a) for a in e.args])
    if e.op == "choose":
        return choose(*(go(a) for a in e.args))
    if e.op == "load":
        return load(e.args[0], tuple(go(i) for i in e.args[1]), e.kind)
    if e.op == "cast":
        return cast_float(go(e.args[0]), e.args[1])
    if e.op == "fop":
        return float_op(e.args[0], e.args[1], *(go(a) for a in e.args[2:]))
    if e.op == "fcmp":
        return float_compare(e.args[0], go(e.args[1]), go(e.args[2]))
    if e.op == "opaque_int":
        return make("opaque_int", (e.args[0], *(go(a) for a in e.args[1:])), "int")
    return e


def load(value: ir.Value, index: tuple[Expr, ...], kind: str) -> Expr:
    """The element of a tensor of the graph at `index`; a number where tensor and index are constant."""
    at = [k for x in index if (k := ia.value_of(x)) is not None]
    constant = tensor_of(value) if len(at) == len(index) else None
    if constant is not None and (kind != "float" or is_float(constant.dtype)):
        if all(0 <= k < n for k, n in zip(at, constant.shape.numpy(), strict=True)):
            return scalar(constant.numpy()[tuple(at)], constant.dtype)
    atom = make("load", (value, index), kind)
    return ia.of_atom(atom) if kind == "int" else atom


def scalar(item: np.generic | float, dtype: ir.DataType) -> Expr:
    """A constant element. Raises ValueError where none is known for the type (float8, complex numbers, strings)."""
    if dtype is ir.DataType.BOOL:
        return TRUE if item else FALSE
    if is_float(dtype):
        return floating(float(item), dtype)
    if not dtype.is_integer():
        raise ValueError(f"no expression stands for a number of type {dtype.name}")
    return ia.const(int(item))


# ---------------------------------------------------------------------------------------------- floats

_NUMPY = {
    ir.DataType.FLOAT: np.float32,
    ir.DataType.DOUBLE: np.float64,
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
}


def is_float(dtype: ir.DataType | None) -> bool:
    return dtype in _NUMPY


def floating(value: float, dtype: ir.DataType) -> Expr:
    """A float constant, rounded to `dtype`; the sign of zero is dropped."""
    with np.errstate(over="ignore"):
        rounded = float(np.asarray(value).astype(_NUMPY[dtype]))
    return make("float", ("nan" if math.isnan(rounded) else rounded + 0.0, dtype), "float")


def float_value(e: Expr) -> float | None:
    return float(e.args[0]) if e.op == "float" else None


def number_of(e: Expr) -> float:
    """The number that a float expression is which is known to be one."""
    return float(e.args[0])


def cast_float(e: Expr, dtype: ir.DataType) -> Expr:
    """An int, bool or float expression converted to a float type."""
    if e.kind == "bool":
        return choose(e, floating(1.0, dtype), floating(0.0, dtype))
    if e.kind == "int":
        known = ia.value_of(e)
        if known is not None:
            return floating(known, dtype)
        atom = ia.only_atom(e)
        if atom is not None and atom.op == "choose":
            return choose(atom.args[0], cast_float(atom.args[1], dtype), cast_float(atom.args[2], dtype))
        return make("cast", (e, dtype), "float")
    if e.op == "float":
        return floating(e.args[0] if e.args[0] != "nan" else math.nan, dtype)
    if e.op == "choose":
        return choose(e.args[0], cast_float(e.args[1], dtype), cast_float(e.args[2], dtype))
    return make("cast", (e, dtype), "float")


_FOLD: dict[str, Callable] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Neg": np.negative,
    "Abs": np.abs, "Exp": np.exp, "Log": np.log, "Sqrt": np.sqrt, "Pow": np.power, "Min": np.minimum,
    "Max": np.maximum, "Floor": np.floor, "Ceil": np.ceil,
    "Reciprocal": np.reciprocal, "Tanh": np.tanh, "Sign": np.sign, "Round": np.round,
}  # fmt: skip


def float_op(name: str, dtype: ir.DataType, *args: Expr) -> Expr:
    """The ONNX operator `name` on float elements, folded and lifted over choices where that stays small."""
    if all(a.op == "float" for a in args) and name in _FOLD:
        with np.errstate(all="ignore"):
            return floating(float(_FOLD[name](*(_NUMPY[dtype](a.args[0]) for a in args))), dtype)
    if len(args) == 2:
        a, b = (float_value(x) for x in args)
        if (name in ("Mul", "Div") and b == 1) or (name in ("Add", "Sub") and b == 0):
            return args[0]
        if (name == "Mul" and a == 1) or (name == "Add" and a == 0):
            return args[1]
    exact = _whole_numbers(name, dtype, args)
    if exact is not None:
        return exact
    return lift(
        lambda *leaves: make("fop", (name, dtype, *leaves), "float"), lambda *x: float_op(name, dtype, *x), args
    )


_WHOLE: dict[str, Callable[..., Expr]] = {
    "Add": ia.add, "Sub": ia.sub, "Neg": ia.neg, "Abs": ia.absolute, "Min": ia.minimum, "Max": ia.maximum,
    "Floor": lambda a: a, "Ceil": lambda a: a, "Round": lambda a: a,
}  # fmt: skip
_EXACT = (ir.DataType.FLOAT, ir.DataType.DOUBLE)  # positions (below 2 ** 24) convert without rounding


def _whole_numbers(name: str, dtype: ir.DataType, args: tuple[Expr, ...]) -> Expr | None:
    """The operator on positions that were converted to floats before, as the same one on integers."""
    if name not in _WHOLE or dtype not in _EXACT:
        return None
    whole = [position for a in args if (position := _as_position(a)) is not None]
    if len(whole) != len(args) or all(a.op == "float" for a in args):
        return None
    return cast_float(_WHOLE[name](*whole), dtype)


def _as_position(e: Expr, beside: Expr | None = None) -> Expr | None:
    """The integer that a float expression made of indices and sizes stands for; None where numbers of the user's may
    be too large for it, as they aren't `beside` a small whole number that they are compared with."""
    if e.op == "float" and e.args[0] != "nan" and abs(e.args[0]) < 1 << 20 and float(e.args[0]).is_integer():
        return ia.const(int(e.args[0]))
    if e.op != "cast" or e.args[0].kind != "int":
        return None
    small = beside is not None and beside.op == "float" and is_float(e.args[1]) and -64 <= number_of(beside) <= 64
    return e.args[0] if small or (e.args[1] in _EXACT and is_position(e.args[0])) else None


def is_position(e: Expr) -> bool:
    """Is an integer made of indices and sizes alone? Such a number is small (docs/masks.md)."""
    return not ia.atoms(e, "load") and not ia.atoms(e, "opaque_int")


def lift(whole: Callable[..., Expr], part: Callable[..., Expr], args: tuple[Expr, ...]) -> Expr:
    """part(args) for each way the choices among args can fall; `whole` where there is no choice or there are too
    many."""
    k = next((k for k, a in enumerate(args) if a.op == "choose"), None)
    if k is None or math.prod(_num_leaves(a) for a in args) > _MAX_CHOICES:
        return whole(*args)
    cond, yes, no = args[k].args
    branches = []
    for leaf, known in ((yes, cond), (no, negate(cond))):
        branches.append(
            part(*(leaf if n == k else assume(a, known) if a.op == "choose" else a for n, a in enumerate(args)))
        )
    return choose(cond, *branches)


def _num_leaves(e: Expr) -> int:
    return _num_leaves(e.args[1]) + _num_leaves(e.args[2]) if e.op == "choose" else 1


_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "isnan": lambda a, b: a != a, "isinf": lambda a, b: math.isinf(a),
}  # fmt: skip


def float_compare(op: str, a: Expr, b: Expr) -> Expr:
    """a op b for floats (op: eq, ne, lt, le; isnan and isinf look at a only)."""
    if a.op == "float" and b.op == "float":
        return TRUE if _COMPARE[op](float(a.args[0]), float(b.args[0])) else FALSE
    if op in ("isnan", "isinf") and a.op == "cast" and a.args[0].kind == "int" and a.args[1] is ir.DataType.FLOAT:
        return FALSE
    exact = _compare_integers(op, a, b)
    if exact is not None:
        return exact
    return lift(lambda x, y: make("fcmp", (op, x, y), "bool"), lambda x, y: float_compare(op, x, y), (a, b))


def _compare_integers(op: str, a: Expr, b: Expr) -> Expr | None:
    """`integer as float` (or `c - integer as float`) beside a small whole number, or positions: exact as integers."""
    left, right = _as_position(a, b), _as_position(b, a)
    if op in ("lt", "le") and left is not None and right is not None:
        return ge0(ia.sub(right, ia.add(left, ia.ONE) if op == "lt" else left))
    if op not in ("eq", "ne") or b.op != "float" or not float(b.args[0]).is_integer() or abs(b.args[0]) > 64:
        return None
    target = int(b.args[0])
    if a.op == "fop" and a.args[0] == "Sub" and a.args[2].op == "float" and float(a.args[2].args[0]).is_integer():
        target, a = int(a.args[2].args[0]) - target, a.args[3]
    if a.op != "cast" or a.args[0].kind != "int" or abs(target) > 64:
        return None
    equal = eq0(ia.sub(a.args[0], ia.const(target)))
    return equal if op == "eq" else negate(equal)
