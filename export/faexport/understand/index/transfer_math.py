# SPDX-License-Identifier: Apache-2.0
"""Transfer functions of the ONNX operators that compute element by element or along an axis.

Registered by decorator; called by the interpreter in interpreter.py. Raising Unknown makes the value opaque.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import onnx_ir as ir

from faexport.sizes import algebra as ia
from faexport.sizes.algebra import Expr, make
from faexport.understand.index import logic as il
from faexport.understand.index.interpreter import Element, Interpreter, transfer
from faexport.understand.index.tensor import Index, Unknown, attribute, kind_of
from faexport.understand.index.transfer_layout import axis_of
from faexport.understand.shapes.floor_division import floor_division


def elementwise(ctx: Interpreter, node: ir.Node, combine: Callable[..., Expr]) -> Element:
    """The broadcast result of `combine` on the elements of all inputs."""
    inputs = ctx.inputs(node)
    return lambda index: combine(*(x.at_right(index) for x in inputs))


# ---------------------------------------------------------------------------------------------- logic


@transfer("And")
def and_(ctx: Interpreter, node: ir.Node) -> Element:
    return elementwise(ctx, node, lambda a, b: il.all_of((a, b)))


@transfer("Or")
def or_(ctx: Interpreter, node: ir.Node) -> Element:
    return elementwise(ctx, node, lambda a, b: il.any_of((a, b)))


@transfer("Xor")
def xor(ctx: Interpreter, node: ir.Node) -> Element:
    return elementwise(ctx, node, lambda a, b: il.choose(a, il.negate(b), b))


@transfer("Not")
def not_(ctx: Interpreter, node: ir.Node) -> Element:
    return elementwise(ctx, node, il.negate)


@transfer("Where")
def where(ctx: Interpreter, node: ir.Node) -> Element:
    return elementwise(ctx, node, il.choose)


@transfer("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal")
def compare(ctx: Interpreter, node: ir.Node) -> Element:
    kind = kind_of(ctx.dtype(node))
    if kind == "bool":
        return elementwise(ctx, node, lambda a, b: il.choose(a, b, il.negate(b)))
    return elementwise(ctx, node, functools.partial(_compare_int if kind == "int" else _compare_float, node.op_type))


def _compare_float(op: str, a: Expr, b: Expr) -> Expr:
    names = {"Less": "lt", "LessOrEqual": "le", "Greater": "lt", "GreaterOrEqual": "le", "Equal": "eq"}
    return il.float_compare(names[op], *((b, a) if op.startswith("Greater") else (a, b)))


def _compare_int(op: str, a: Expr, b: Expr) -> Expr:
    if a.kind != "int" or b.kind != "int":
        raise Unknown
    if op == "Equal":
        return il.eq0(ia.sub(a, b))
    larger = ia.sub(a, b) if op.startswith("Greater") else ia.sub(b, a)
    return il.ge0(larger if op.endswith("OrEqual") else ia.sub(larger, ia.ONE))


@transfer("IsNaN")
def is_nan(ctx: Interpreter, node: ir.Node) -> Element:
    zero = il.floating(0.0, ir.DataType.FLOAT)
    return elementwise(ctx, node, lambda a: il.float_compare("isnan", a, zero))


@transfer("IsInf")
def is_inf(ctx: Interpreter, node: ir.Node) -> Element:
    signs = {math.inf: attribute(node, "detect_positive", 1), -math.inf: attribute(node, "detect_negative", 1)}
    if all(signs.values()):
        zero = il.floating(0.0, ir.DataType.FLOAT)
        return elementwise(ctx, node, lambda a: il.float_compare("isinf", a, zero))
    asked = [il.floating(sign, ir.DataType.FLOAT) for sign, is_asked in signs.items() if is_asked]
    return elementwise(ctx, node, lambda a: il.any_of(il.float_compare("eq", a, infinity) for infinity in asked))


# ---------------------------------------------------------------------------------------------- conversion


@transfer("Cast", "CastLike")
def cast(ctx: Interpreter, node: ir.Node) -> Element:
    x = ctx.input(node, 0)
    to = ctx.dtype(node, 1) if node.op_type == "CastLike" else ir.DataType(attribute(node, "to"))
    return lambda index: convert(x.at(index), to, x.dtype)


def convert(e: Expr, to: ir.DataType, source: ir.DataType | None) -> Expr:
    """An element cast to another type, exactly as it is at run time, or opaque."""
    if to is ir.DataType.BOOL:
        if e.kind == "int":
            return il.negate(il.eq0(e))
        return e if e.kind == "bool" else il.float_compare("ne", e, il.floating(0.0, e_dtype(e)))
    if il.is_float(to):
        return il.cast_float(e, to)
    if e.kind == "bool":
        return il.choose(e, ia.ONE, ia.ZERO)
    if e.kind == "int":
        return e if source is to else _as_integer(e, to, source)
    value = il.float_value(e)
    if value is not None and math.isfinite(value) and _holds(to, int(value)):
        return ia.const(int(value))
    if e.op == "choose":
        return il.choose(e.args[0], convert(e.args[1], to, source), convert(e.args[2], to, source))
    return ia.of_atom(make("opaque_int", (f"to {to.name}", e), "int"))


def e_dtype(e: Expr) -> ir.DataType:
    """The float type of a float expression; FLOAT where it isn't written in it (a zero is the same in all)."""
    return next((a for a in e.args if isinstance(a, ir.DataType)), ir.DataType.FLOAT)


_RANGES = {
    ir.DataType[f"{sign}INT{bits}"]: (0, 2**bits - 1) if sign else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    for sign in ("", "U")
    for bits in (8, 16, 32, 64)
}


def _holds(dtype: ir.DataType, value: int) -> bool:
    low, high = _RANGES.get(dtype, (0, -1))
    return low <= value <= high


def _as_integer(e: Expr, to: ir.DataType, source: ir.DataType | None) -> Expr:
    """An integer in another integer type: the same number where the type holds it, else opaque. Sizes and positions are
    taken to be below 2 ** 31 (docs/masks.md); numbers that a caller gives may be anything."""
    wide, narrow = _RANGES.get(source) if source is not None else None, _RANGES.get(to)
    if narrow is not None and wide is not None and narrow[0] <= wide[0] and wide[1] <= narrow[1]:
        return e
    known = ia.value_of(e)
    if known is not None and _holds(to, known):
        return e
    atom = ia.only_atom(e)
    if atom is not None and atom.op == "choose":
        return il.choose(atom.args[0], _as_integer(atom.args[1], to, source), _as_integer(atom.args[2], to, source))
    if known is None and to in (ir.DataType.INT32, ir.DataType.INT64) and il.is_position(e):
        return e
    return ia.of_atom(make("opaque_int", (f"to {to.name}", e), "int"))


# ---------------------------------------------------------------------------------------------- arithmetic


def _divide(a: Expr, b: Expr) -> Expr:
    """ONNX truncates: that is the floor where nothing is below 0, and where the division is exact (b = 0 would have
    failed at run time)."""
    quotient = ia.floordiv(a, b)
    if (ia.is_nonnegative(a) and ia.is_positive(b)) or a is ia.mul(quotient, b):
        return quotient
    return ia.of_atom(make("opaque_int", ("Div", a, b), "int"))


def _remainder(a: Expr, b: Expr) -> Expr:
    """The remainder that has the divisor's sign."""
    if ia.is_positive(b):
        return ia.modulo(a, b)
    return ia.of_atom(make("opaque_int", ("Mod", a, b), "int"))


def _remainder_of_division(a: Expr, b: Expr) -> Expr:
    """The remainder that has the dividend's sign."""
    if ia.is_nonnegative(a) and ia.is_positive(b):
        return ia.modulo(a, b)
    return ia.of_atom(make("opaque_int", ("fmod", a, b), "int"))


def _rounded_down(a: Expr, b: Expr) -> Expr:
    if ia.is_positive(b):
        return ia.floordiv(a, b)
    if ia.is_positive(ia.neg(b)):
        return ia.floordiv(ia.neg(a), ia.neg(b))
    return ia.of_atom(make("opaque_int", ("rounded down", a, b), "int"))


_INTEGER: dict[str, Callable[..., Expr]] = {
    "Add": ia.add,
    "Sub": ia.sub,
    "Mul": ia.mul,
    "Div": _divide,
    "Mod": _remainder,
    "Neg": ia.neg,
    "Abs": ia.absolute,
}


@transfer("Add", "Sub", "Mul", "Div", "Mod", "Neg", "Abs")
def arithmetic(ctx: Interpreter, node: ir.Node) -> Element:
    op, dtype = node.op_type, ctx.dtype(node)
    if il.is_float(dtype):
        return elementwise(ctx, node, lambda *x: il.float_op(op, dtype, *x))
    if kind_of(dtype) != "int":
        raise Unknown
    divided = floor_division(node, ctx.analysis)
    if divided:
        above, below = map(ctx.tensor, divided)
        return lambda index: _integer(_rounded_down, (above.at_right(index), below.at_right(index)))
    combine = _remainder_of_division if attribute(node, "fmod", 0) else _INTEGER[op]
    whole = elementwise(ctx, node, lambda *x: _integer(combine, x))
    return whole if dtype is ir.DataType.INT64 else lambda index: _unwrapped(whole(index), dtype)


def _unwrapped(e: Expr, dtype: ir.DataType) -> Expr:
    """A result of integers of a narrow type, if it can't wrap around: sizes and positions are below 2 ** 31, an element
    that a caller gives is at most added to or subtracted from a few of them. Raises Unknown."""
    atom, known = ia.only_atom(e), ia.value_of(e)
    if atom is not None and atom.op == "choose":
        for leaf in atom.args[1:]:
            _unwrapped(_as_poly(leaf), dtype)
        return e
    if known is not None and _holds(dtype, known):
        return e
    if dtype is not ir.DataType.INT32:
        raise Unknown
    for monomial, coefficient in e.args if e.op == "poly" else ():
        given = [x for x in monomial if ia.atoms(x, "load")]
        if given and (abs(coefficient) > 1 or len(monomial) > 1):
            raise Unknown
        if not monomial and not _holds(dtype, _MARGIN * coefficient):
            raise Unknown
    return e


_MARGIN = 128  # times a constant: far from the end of a type


def _integer(combine: Callable[..., Expr], args: tuple[Expr, ...]) -> Expr:
    """Integer arithmetic, lifted over a choice so that its condition stays visible."""
    if any(a.kind != "int" for a in args):
        raise Unknown
    bare = [ia.only_atom(a) or a for a in args]
    lifted = il.lift(
        lambda *x: combine(*map(_as_poly, x)), lambda *x: _integer(combine, tuple(map(_as_poly, x))), tuple(bare)
    )
    return _as_poly(lifted)


def _as_poly(e: Expr) -> Expr:
    return e if e.op == "poly" else ia.of_atom(e)


@transfer(
    "Sqrt",
    "Exp",
    "Log",
    "Pow",
    "Reciprocal",
    "Floor",
    "Ceil",
    "Round",
    "Sign",
    "Tanh",
    "Sigmoid",
    "Erf",
    "Sin",
    "Cos",
    "Relu",
    "Softplus",
)
def floats(ctx: Interpreter, node: ir.Node) -> Element:
    op, dtype = node.op_type, ctx.dtype(node)
    if not il.is_float(dtype):
        return elementwise(ctx, node, lambda *x: ia.of_atom(make("opaque_int", (op, *x), "int")))
    return elementwise(
        ctx,
        node,
        lambda *x: il.float_op(op, dtype, *x) if all(a.kind == "float" for a in x) else _mixed(op, dtype, x),
    )


def _mixed(op: str, dtype: ir.DataType, args: tuple[Expr, ...]) -> Expr:
    """Pow of a float by an integer."""
    return il.float_op(op, dtype, *(a if a.kind == "float" else il.cast_float(a, dtype) for a in args))


@transfer("Min", "Max")
def extreme(ctx: Interpreter, node: ir.Node) -> Element:
    op, dtype = node.op_type, ctx.dtype(node)
    inputs = ctx.inputs(node)

    def combine(a: Expr, b: Expr) -> Expr:
        if il.is_float(dtype):
            return il.float_op(op, dtype, a, b)
        return (ia.minimum if op == "Min" else ia.maximum)(a, b)

    def element(index: Index) -> Expr:
        result = inputs[0].at_right(index)
        for x in inputs[1:]:
            result = combine(result, x.at_right(index))
        return result

    return element


@transfer("Clip")
def clip(ctx: Interpreter, node: ir.Node) -> Element:
    x, dtype = ctx.input(node, 0), ctx.dtype(node)
    bounds = [ctx.optional(node, 1), ctx.optional(node, 2)]
    limits = [b.scalar() if b is not None else None for b in bounds]
    for k, name in enumerate(("min", "max")):
        if name in node.attributes:
            limits[k] = il.scalar(attribute(node, name), dtype)

    def element(index: Index) -> Expr:
        e = x.at(index)
        for limit, op in zip(limits, ("Max", "Min"), strict=True):
            if limit is not None and il.is_float(dtype):
                e = il.float_op(op, dtype, e, limit)
            elif limit is not None:
                e = (ia.maximum if op == "Max" else ia.minimum)(e, limit)
        return e

    return element


@transfer("CumSum")
def cumsum(ctx: Interpreter, node: ir.Node) -> Element:
    """The sum of elements that are the same along the axis; else opaque."""
    x, along = ctx.input(node, 0), ctx.input(node, 1)
    place = ia.value_of(along.scalar())
    if x.kind != "int" or place is None:
        raise Unknown
    axis = axis_of(place, x.rank)
    count_from, backward = 0 if attribute(node, "exclusive", 0) else 1, attribute(node, "reverse", 0)

    def element(index: Index) -> Expr:
        summed = x.at(index[:axis] + (ia.var("summed", (x.shape[axis],)),) + index[axis + 1 :])
        if "summed" in ia.variables(summed):
            return il.load(node.outputs[0], index, "int")
        past = ia.sub(ia.sub(x.shape[axis], ia.ONE), index[axis]) if backward else index[axis]
        return ia.mul(summed, ia.add(past, ia.const(count_from)))

    return element
