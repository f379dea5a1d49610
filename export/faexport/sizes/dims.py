# SPDX-License-Identifier: Apache-2.0
"""Symbolic sizes: integer expressions (algebra.py) with the operators of Python, and the names that files give them.

Used wherever the exporter proves something of a shape. Two sizes are equal when their expressions are the same.
"""

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping

from faexport.sizes import algebra
from faexport.sizes.algebra import Expr
from faexport.sizes.printing import to_text

_fresh = itertools.count()


class Dim:
    """An immutable size, or a number computed from sizes."""

    __slots__ = ("const", "expr")

    def __init__(self, expr: Expr):
        self.expr = expr
        # The number that this is, or None while it depends on a symbol.
        self.const: int | None = algebra.value_of(expr)

    @staticmethod
    def of(value: int | str | Expr | Dim) -> Dim:
        """A number, a symbol of this name, or an expression."""
        if isinstance(value, Dim):
            return value
        return Dim(value) if isinstance(value, Expr) else _atom(value)

    @staticmethod
    def unknown(hint: str = "") -> Dim:
        """A size of which nothing is known; equal only to itself."""
        return Dim(algebra.sym(f"?{hint}#{next(_fresh)}"))

    @property
    def symbols(self) -> set[str]:
        return {atom.args[0] for atom in algebra.atoms(self.expr, "sym")}

    @property
    def is_known(self) -> bool:
        """Is it made of sizes that the file names, and of nothing else?"""
        return not any(s.startswith("?") for s in self.symbols)

    def __add__(self, other: int | Dim) -> Dim:
        return Dim(algebra.add(self.expr, Dim.of(other).expr))

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return Dim(algebra.neg(self.expr))

    def __sub__(self, other: int | Dim) -> Dim:
        return Dim(algebra.sub(self.expr, Dim.of(other).expr))

    def __rsub__(self, other: int) -> Dim:
        return Dim.of(other) - self

    def __mul__(self, other: int | Dim) -> Dim:
        return Dim(algebra.mul(self.expr, Dim.of(other).expr))

    __rmul__ = __mul__

    def divide(self, other: int | Dim) -> Dim | None:
        """The exact quotient, or None where there is none (or the divisor is 0)."""
        quotient = algebra.divide(self.expr, Dim.of(other).expr)
        return None if quotient is None else Dim(quotient)

    def meet(self, other: int | Dim) -> Dim:
        """The size of an axis where axes of these two sizes are broadcast against each other."""
        return Dim(algebra.meet(self.expr, Dim.of(other).expr))

    def beside(self, size: Dim) -> Dim:
        """What it is where that is the size of an axis, too, which is never negative: max(0, n - 2) is n - 2 beside
        n - 2. Only of an atom and a number something is concluded."""
        number = algebra.const(algebra.constant_part(size.expr))
        atom = algebra.only_atom(algebra.sub(size.expr, number))
        if atom is None:
            return self
        least = algebra.make("sym", ("", 0), "int")  # a name that no file gives
        moved = algebra.replace(self.expr, {atom: algebra.sub(algebra.of_atom(least), number)})
        return Dim(algebra.replace(moved, {least: size.expr}))

    def minimum(self, other: int | Dim) -> Dim:
        return Dim(algebra.minimum(self.expr, Dim.of(other).expr))

    def maximum(self, other: int | Dim) -> Dim:
        return Dim(algebra.maximum(self.expr, Dim.of(other).expr))

    def last(self, count: Dim) -> Dim:
        """How many elements axis[-count:] takes of an axis of this size, count >= 0."""
        return Dim(algebra.last(count.expr, self.expr))

    def is_at_least(self, other: int | Dim) -> bool:
        """Is it proven that this is never below `other`?"""
        return algebra.is_nonnegative(algebra.sub(self.expr, Dim.of(other).expr))

    def substitute(self, known: Mapping[Expr, Expr]) -> Dim:
        """With atoms replaced by what they are known to equal."""
        replaced = algebra.replace(self.expr, known)
        return self if replaced is self.expr else Dim(replaced)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Dim):
            return self.expr is other.expr
        return isinstance(other, int) and self.const == other

    def __hash__(self) -> int:
        return hash(self.expr)

    def __str__(self) -> str:
        return to_text(self.expr)

    __repr__ = __str__


@functools.lru_cache(maxsize=4096)
def _atom(value: int | str) -> Dim:
    return Dim(algebra.sym(value)) if isinstance(value, str) else Dim(algebra.const(int(value)))


def is_name(text: str | None) -> bool:
    """Does a file's text for a size name it, so that sizes of the same text are equal? Some exporters call every
    unknown size "?"."""
    return text is not None and (text.isdigit() or any(map(str.isalpha, text)))


@functools.lru_cache(maxsize=4096)
def named(text: str) -> Dim:
    """A size as a file names it. PyTorch's exporters write expressions of other names, "past + sequence" or
    "(4*batch)//batch"; what can't be read so is a symbol."""
    if text.isidentifier():
        return Dim.of(text)
    try:
        return Dim(_read(ast.parse(text.strip(), mode="eval").body))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Dim.of(text)


def _read(e: ast.expr) -> Expr:
    operators: dict[type[ast.operator], Callable[[Expr, Expr], Expr]] = {
        ast.Add: algebra.add,
        ast.Sub: algebra.sub,
        ast.Mult: algebra.mul,
        ast.FloorDiv: algebra.floordiv,
    }
    functions = {
        "Max": algebra.maximum,
        "Min": algebra.minimum,
        "Mod": algebra.modulo,  # of SymPy and of PyTorch, both with the sign of the divisor, which is a size
        "PythonMod": algebra.modulo,
    }
    if isinstance(e, ast.Name):
        return algebra.sym(e.id)
    if isinstance(e, ast.Constant) and isinstance(e.value, int) and not isinstance(e.value, bool):
        return algebra.const(e.value)
    if isinstance(e, ast.UnaryOp) and isinstance(e.op, ast.USub):
        return algebra.neg(_read(e.operand))
    if isinstance(e, ast.BinOp) and type(e.op) in operators:
        return operators[type(e.op)](_read(e.left), _read(e.right))
    if isinstance(e, ast.Call) and isinstance(e.func, ast.Name) and e.func.id in functions:
        if len(e.args) == 2 or (e.func.id in ("Max", "Min") and len(e.args) > 2):
            return functools.reduce(functions[e.func.id], map(_read, e.args))
    raise ValueError(f"{ast.dump(e)} is no size")


def is_expression(text: str | None) -> bool:
    """Is it a name, or made of names as `named` reads them? What a broken file holds may be too large to compute with,
    and names may have any characters."""
    if text is None or not is_name(text):
        return False
    return text.isidentifier() or named(text) != Dim.of(text)


def product(dims: Iterable[int | Dim]) -> Dim:
    return functools.reduce(lambda a, b: a * b, dims, Dim.of(1))


def plain(dim: Dim | None) -> int | str | None:
    """For reports: an int, a readable symbolic name, or None where nothing is known."""
    if dim is None or dim.const is not None:
        return None if dim is None else dim.const
    return str(dim) if dim.is_known else None
