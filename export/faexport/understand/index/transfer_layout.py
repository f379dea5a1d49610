# SPDX-License-Identifier: Apache-2.0
"""Transfer functions of the ONNX operators that move, repeat, cut or make elements without computing with them.

Registered by decorator; called by the interpreter in interpreter.py. Raising Unknown makes the value opaque.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from faexport.understand.index import algebra as ia
from faexport.understand.index import logic as il
from faexport.understand.index.algebra import Expr
from faexport.understand.index.interpreter import Interpreter, transfer
from faexport.understand.index.tensor import Index, Shape, Tensor, Unknown, attribute, from_list, opaque

_HUGE = 1 << 30  # slice ends and sizes beyond this mean "to the end"


def axis_of(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise Unknown
    return axis % rank


def constants(tensor: Tensor) -> list[int]:
    """The elements of a small vector that must be known numbers."""
    values = [ia.value_of(e) for e in tensor.vector()]
    if any(v is None for v in values):
        raise Unknown
    return values


def axes_argument(ctx: Interpreter, node: ir.Node, k: int = 1, name: str = "axes") -> list[int] | None:
    """Axes given as an input (opset 13 on) or as an attribute (before)."""
    given = ctx.optional(node, k)
    if given is not None:
        return constants(given)
    found = attribute(node, name)
    return None if found is None else list(found)


@transfer("Identity", "Dropout")
def identity(ctx: Interpreter, node: ir.Node) -> Tensor:
    return ctx.input(node, 0)


@transfer("Shape")
def shape(ctx: Interpreter, node: ir.Node) -> Tensor:
    sizes = ctx.input(node, 0).shape
    return from_list(list(sizes[slice(attribute(node, "start", 0), attribute(node, "end"))]))


@transfer("Size")
def size(ctx: Interpreter, node: ir.Node) -> Tensor:
    count = ia.product(ctx.input(node, 0).shape)
    return Tensor((), ir.DataType.INT64, lambda _: count)


@transfer("Range")
def range_(ctx: Interpreter, node: ir.Node) -> Tensor:
    start, limit, step = (ctx.input(node, k).at((ia.ZERO,) * ctx.input(node, k).rank) for k in range(3))
    dtype = ctx.dtype(node)
    by = ia.value_of(step) if all(e.kind == "int" for e in (start, limit, step)) else None
    if by is None or by == 0:
        raise Unknown
    span = ia.sub(limit, start) if by > 0 else ia.sub(start, limit)
    length = span if abs(by) == 1 else ia.floordiv(ia.add(span, ia.const(abs(by) - 1)), ia.const(abs(by)))
    return Tensor((ia.maximum(length, ia.ZERO),), dtype, lambda index: ia.add(start, ia.scale(index[0], by)))


@transfer("ConstantOfShape")
def constant_of_shape(ctx: Interpreter, node: ir.Node) -> Tensor:
    sizes = tuple(ctx.input(node, 0).vector())
    found = node.attributes.get("value")
    dtype = ir.DataType.FLOAT if found is None else found.value.dtype
    item = np.float32(0) if found is None else found.value.numpy().flat[0]
    expr = il.scalar(item, dtype)
    return Tensor(sizes, dtype, lambda _: expr)


@transfer("Unsqueeze")
def unsqueeze(ctx: Interpreter, node: ir.Node) -> Tensor:
    x, axes = ctx.input(node, 0), axes_argument(ctx, node)
    rank = x.rank + len(axes)
    new = {axis_of(a, rank) for a in axes}
    old = iter(x.shape)
    sizes = tuple(ia.ONE if k in new else next(old) for k in range(rank))
    return Tensor(sizes, x.dtype, lambda index: x.at(tuple(i for k, i in enumerate(index) if k not in new)))


@transfer("Squeeze")
def squeeze(ctx: Interpreter, node: ir.Node) -> Tensor:
    x, axes = ctx.input(node, 0), axes_argument(ctx, node)
    if axes is None:
        gone = {k for k, s in enumerate(x.shape) if ia.value_of(s) == 1}
        if any(ia.value_of(s) is None for s in x.shape):
            raise Unknown
    else:
        gone = {axis_of(a, x.rank) for a in axes}
    sizes = tuple(s for k, s in enumerate(x.shape) if k not in gone)

    def element(index: Index) -> Expr:
        rest = iter(index)
        return x.at(tuple(ia.ZERO if k in gone else next(rest) for k in range(x.rank)))

    return Tensor(sizes, x.dtype, element)


@transfer("Transpose")
def transpose(ctx: Interpreter, node: ir.Node) -> Tensor:
    x = ctx.input(node, 0)
    perm = list(attribute(node, "perm") or range(x.rank - 1, -1, -1))
    back = [perm.index(k) for k in range(x.rank)]
    return Tensor(tuple(x.shape[p] for p in perm), x.dtype, lambda index: x.at(tuple(index[k] for k in back)))


@transfer("Expand")
def expand(ctx: Interpreter, node: ir.Node) -> Tensor:
    x = ctx.input(node, 0)
    sizes = ctx.broadcast([x.shape, tuple(ctx.input(node, 1).vector())])
    return Tensor(sizes, x.dtype, x.at_right)


@transfer("Tile")
def tile(ctx: Interpreter, node: ir.Node) -> Tensor:
    x, repeats = ctx.input(node, 0), ctx.input(node, 1).vector()
    sizes = tuple(ia.mul(s, r) for s, r in zip(x.shape, repeats, strict=True))

    def element(index: Index) -> Expr:
        once = (ia.value_of(r) == 1 for r in repeats)
        return x.at(tuple(i if o else ia.modulo(i, s) for i, o, s in zip(index, once, x.shape, strict=True)))

    return Tensor(sizes, x.dtype, element)


@transfer("Concat")
def concat(ctx: Interpreter, node: ir.Node) -> Tensor:
    parts = [ctx.input(node, k) for k in range(len(node.inputs))]
    axis = axis_of(attribute(node, "axis"), parts[0].rank)
    starts = [ia.ZERO]
    for part in parts:
        starts.append(ia.add(starts[-1], part.shape[axis]))
    others = ctx.broadcast([p.shape[:axis] + (ia.ONE,) + p.shape[axis + 1 :] for p in parts])

    def element(index: Index) -> Expr:
        at = index[axis]
        where = [il.ge0(ia.sub(ia.sub(starts[k + 1], at), ia.ONE)) for k in range(len(parts))]
        pieces: list[tuple[Expr, Expr]] = []
        for k, part in enumerate(parts):
            if where[k] is il.FALSE:
                continue
            pieces.append((where[k], part.at(index[:axis] + (ia.sub(at, starts[k]),) + index[axis + 1 :])))
            if where[k] is il.TRUE:
                break
        if not pieces:
            raise Unknown
        result = pieces[-1][1]
        for cond, piece in reversed(pieces[:-1]):
            result = il.choose(cond, piece, result)
        return result

    return Tensor(others[:axis] + (starts[-1],) + others[axis + 1 :], parts[0].dtype, element)


@transfer("Pad")
def pad(ctx: Interpreter, node: ir.Node) -> Tensor:
    if attribute(node, "mode", "constant") != "constant":
        raise Unknown
    x, dtype = ctx.input(node, 0), ctx.dtype(node)
    given, axes = ctx.optional(node, 1), axes_argument(ctx, node, 3)
    pads = given.vector() if given is not None else [ia.const(k) for k in attribute(node, "pads")]
    axes = list(range(x.rank)) if axes is None else [axis_of(a, x.rank) for a in axes]
    before, after = (dict(zip(axes, part, strict=True)) for part in (pads[: len(axes)], pads[len(axes) :]))
    value = ctx.optional(node, 2)
    fill = il.scalar(attribute(node, "value", 0.0), dtype) if value is None else value.at((ia.ZERO,) * value.rank)

    def element(index: Index) -> Expr:
        own = tuple(ia.sub(i, before[k]) if k in before else i for k, i in enumerate(index))
        bounds = [il.ge0(e) for k in axes for e in (own[k], ia.sub(ia.sub(x.shape[k], own[k]), ia.ONE))]
        inside = il.all_of(bounds)
        return fill if inside is il.FALSE else il.choose(inside, x.at(own), fill)

    sizes = [ia.add(s, ia.add(before[k], after[k])) if k in before else s for k, s in enumerate(x.shape)]
    return Tensor(tuple(sizes), dtype, element)


@transfer("Split")
def split(ctx: Interpreter, node: ir.Node, which: int = 0) -> Tensor:
    x = ctx.input(node, 0)
    axis = axis_of(attribute(node, "axis", 0), x.rank)
    sizes = axes_argument(ctx, node, 1, "split")
    if sizes is None:
        total, n = ia.value_of(x.shape[axis]), len(node.outputs)
        if total is None:
            raise Unknown
        chunk = -(-total // n)
        sizes = [min(chunk, total - k * chunk) for k in range(n)]
    start = ia.const(sum(sizes[:which]))
    shape_ = x.shape[:axis] + (ia.const(sizes[which]),) + x.shape[axis + 1 :]
    return Tensor(shape_, x.dtype, lambda index: x.at(index[:axis] + (ia.add(index[axis], start),) + index[axis + 1 :]))


@transfer("Slice")
def slice_(ctx: Interpreter, node: ir.Node) -> Tensor:
    x = ctx.input(node, 0)
    if "starts" in node.attributes:
        starts, ends = ([ia.const(k) for k in attribute(node, name)] for name in ("starts", "ends"))
        axes, steps = list(attribute(node, "axes", range(len(starts)))), [1] * len(starts)
    else:
        starts, ends = ctx.input(node, 1).vector(), ctx.input(node, 2).vector()
        axes = constants(ctx.input(node, 3)) if ctx.optional(node, 3) else list(range(len(starts)))
        steps = constants(ctx.input(node, 4)) if ctx.optional(node, 4) else [1] * len(starts)
    first: dict[int, tuple[Expr, int]] = {}
    sizes = list(x.shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = axis_of(axis, x.rank)
        try:
            begin, length = _cut(start, end, step, x.shape[axis])
        except Unknown:  # the rank at least is known
            return opaque(node.outputs[0], _partly_cut(ctx, node.outputs[0], x.shape, axes), x.dtype)
        first[axis], sizes[axis] = (begin, step), length

    def element(index: Index) -> Expr:
        moved = [ia.add(first[k][0], ia.scale(i, first[k][1])) if k in first else i for k, i in enumerate(index)]
        return x.at(tuple(moved))

    return Tensor(tuple(sizes), x.dtype, element)


def _partly_cut(ctx: Interpreter, value: ir.Value, sizes: Shape, axes: list[int]) -> Shape:
    try:
        return ctx.declared_shape(value)
    except Unknown:
        cut = {a % len(sizes) for a in axes}
        return tuple(ctx.size(None, f"{value.name}.{k}") if k in cut else s for k, s in enumerate(sizes))


def _cut(start: Expr, end: Expr, step: int, size_: Expr) -> tuple[Expr, Expr]:
    """(first index, number of elements) of a slice. A start beyond the end needn't be clamped: no element is there."""
    if step < 0:
        if step != -1 or ia.value_of(end) is None or ia.value_of(end) > -_HUGE or _from_end(start, size_) is not None:
            raise Unknown
        return ia.sub(size_, ia.ONE), size_
    begin = _clamped(start, size_)
    length = ia.maximum(ia.sub(_clamped(end, size_), begin), ia.ZERO)
    count = length if step == 1 else ia.floordiv(ia.add(length, ia.const(step - 1)), ia.const(step))
    return start if ia.is_nonnegative(start) else begin, count


def _from_end(start: Expr, size_: Expr) -> Expr | None:
    """None where a backward slice starts at the last element."""
    last = ia.value_of(start)
    return None if start is ia.sub(size_, ia.ONE) or (last is not None and (last == -1 or last >= _HUGE)) else start


def _clamped(bound: Expr, size_: Expr) -> Expr:
    """A start or end as ONNX reads it: from the end where negative, never outside [0, size].

    A bound such as max_length - sequence is taken as non-negative: were it not, the slice would have another length
    than the scores that it meets, and the model wouldn't run."""
    known = ia.value_of(bound)
    if known is not None and known >= _HUGE:
        return size_
    if ia.is_nonnegative(bound):
        return ia.minimum(bound, size_)
    if ia.is_nonnegative(ia.sub(ia.neg(bound), ia.ONE)):
        return ia.maximum(ia.add(bound, size_), ia.ZERO)
    if any(c > 0 for _, c in bound.args) and all(a.op == "sym" for m, _ in bound.args for a in m):
        return bound
    raise Unknown


@transfer("Reshape")
def reshape(ctx: Interpreter, node: ir.Node) -> Tensor:
    x = ctx.input(node, 0)
    sizes = ctx.input(node, 1).vector()
    if not attribute(node, "allowzero", 0):
        sizes = [x.shape[k] if ia.value_of(s) == 0 else s for k, s in enumerate(sizes)]
    unknown = [k for k, s in enumerate(sizes) if ia.value_of(s) == -1]
    if unknown:
        total = ia.product(x.shape)
        rest = ia.product(s for k, s in enumerate(sizes) if k not in unknown)
        sizes[unknown[0]] = ia.floordiv(total, rest)
    same = _same_by_count(x.shape, sizes)
    if same is not None:
        ctx.unequal[same] = None
    return reshaped(node.outputs[0], x, tuple(sizes))


def _same_by_count(old: Sequence[Expr], new: Sequence[Expr]) -> tuple[Expr, Expr] | None:
    """Two sizes, one before and one after a reshape, that must be equal since all others are."""
    left, right = ([s for s in sizes if ia.value_of(s) != 1] for sizes in (old, new))
    for size in list(left):
        if size in right:
            left.remove(size)
            right.remove(size)
    return (left[0], right[0]) if len(left) == len(right) == 1 else None


@transfer("Flatten")
def flatten(ctx: Interpreter, node: ir.Node) -> Tensor:
    x, axis = ctx.input(node, 0), attribute(node, "axis", 1)
    axis += x.rank if axis < 0 else 0
    return reshaped(node.outputs[0], x, (ia.product(x.shape[:axis]), ia.product(x.shape[axis:])))


def reshaped(value: ir.Value, x: Tensor, sizes: Shape) -> Tensor:
    """Elements in row-major order under a new shape: axes are split and merged in the smallest groups of equal
    products."""
    same = _same_by_count(x.shape, sizes)
    groups = _groups(x.shape, tuple(same[0] if same and s is same[1] else s for s in sizes))
    if groups is None:
        return opaque(value, sizes, x.dtype)

    def element(index: Index) -> Expr:
        result: list[Expr] = []
        for old, new in groups:
            result += _regroup([x.shape[k] for k in old], [sizes[k] for k in new], [index[k] for k in new])
        return x.at(tuple(result))

    return Tensor(sizes, x.dtype, element)


def _groups(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]] | None:
    """Runs of old axes and of new axes with the same number of elements, in order."""
    groups, a, b = [], 0, 0
    while a < len(old) or b < len(new):
        left, right = [], []
        p, q = ia.ONE, ia.ONE
        while not (left or right) or p is not q:
            if a < len(old) and (p is q or b >= len(new) or not ia.is_nonnegative(ia.sub(p, q))):
                left, p, a = [*left, a], ia.mul(p, old[a]), a + 1
            elif b < len(new):
                right, q, b = [*right, b], ia.mul(q, new[b]), b + 1
            else:
                return None if p is not q else groups
        groups.append((left, right))
    return groups


def _regroup(old: list[Expr], new: list[Expr], index: list[Expr]) -> list[Expr]:
    if len(old) == len(new) == 1:
        return index
    linear = ia.ZERO
    for s, i in zip(new, index, strict=True):
        linear = ia.add(ia.mul(linear, s), i if ia.value_of(s) != 1 else ia.ZERO)
    result, stride = [], ia.ONE
    for k in range(len(old) - 1, -1, -1):
        part = ia.floordiv(linear, stride)
        outermost = all(ia.value_of(s) == 1 for s in old[:k])
        result.insert(0, ia.ZERO if ia.value_of(old[k]) == 1 else part if outermost else ia.modulo(part, old[k]))
        stride = ia.mul(stride, old[k])
    return result


@transfer("Gather")
def gather(ctx: Interpreter, node: ir.Node) -> Tensor:
    x, indices = ctx.input(node, 0), ctx.input(node, 1)
    axis = axis_of(attribute(node, "axis", 0), x.rank)
    last = axis + indices.rank

    def element(index: Index) -> Expr:
        at = _wrapped(indices.at(index[axis:last]), x.shape[axis])
        return x.at(index[:axis] + (at,) + index[last:]) if at else il.load(node.outputs[0], index, x.kind)

    return Tensor(x.shape[:axis] + indices.shape + x.shape[axis + 1 :], x.dtype, element)


def _wrapped(at: Expr, size_: Expr) -> Expr | None:
    """A gather index as ONNX reads it (negative counts from the end); None where its sign isn't known."""
    if at.kind != "int":
        return None
    if ia.is_nonnegative(at):
        return at
    return ia.add(at, size_) if ia.is_nonnegative(ia.sub(ia.neg(at), ia.ONE)) else None


@transfer("GatherElements")
def gather_elements(ctx: Interpreter, node: ir.Node) -> Tensor:
    x, indices = ctx.input(node, 0), ctx.input(node, 1)
    axis = axis_of(attribute(node, "axis", 0), x.rank)

    def element(index: Index) -> Expr:
        at = _wrapped(indices.at(index), x.shape[axis])
        return x.at(index[:axis] + (at,) + index[axis + 1 :]) if at else il.load(node.outputs[0], index, x.kind)

    return Tensor(indices.shape, x.dtype, element)


@transfer("GatherND")
def gather_nd(ctx: Interpreter, node: ir.Node) -> Tensor:
    x, indices = ctx.input(node, 0), ctx.input(node, 1)
    batch, depth = attribute(node, "batch_dims", 0), ia.value_of(indices.shape[-1])
    if depth is None:
        raise Unknown
    outer = indices.rank - 1

    def element(index: Index) -> Expr:
        found = [_wrapped(indices.at(index[:outer] + (ia.const(k),)), x.shape[batch + k]) for k in range(depth)]
        if any(at is None for at in found):
            return il.load(node.outputs[0], index, x.kind)
        return x.at(index[:batch] + tuple(found) + index[outer:])

    return Tensor(indices.shape[:-1] + x.shape[batch + depth :], x.dtype, element)


@transfer("ScatterND")
def scatter_nd(ctx: Interpreter, node: ir.Node) -> Tensor:
    """An update of whole rows at constant places, as the exporters write `x[k] = y`; else opaque."""
    x, indices, updates = (ctx.input(node, k) for k in range(3))
    if attribute(node, "reduction", "none") != "none" or indices.rank != 2 or ia.value_of(indices.shape[1]) != 1:
        raise Unknown
    rows = ia.value_of(indices.shape[0])
    if rows is None or rows > 8:
        raise Unknown

    def element(index: Index) -> Expr:
        result = x.at(index)
        for k in range(rows):
            row = _wrapped(indices.at((ia.const(k), ia.ZERO)), x.shape[0])
            if row is None:
                return il.load(node.outputs[0], index, x.kind)
            result = il.choose(il.eq0(ia.sub(index[0], row)), updates.at((ia.const(k), *index[1:])), result)
        return result

    return Tensor(x.shape, x.dtype, element)


@transfer("Trilu")
def trilu(ctx: Interpreter, node: ir.Node) -> Tensor:
    x = ctx.input(node, 0)
    k = ctx.optional(node, 1)
    shift = k.at((ia.ZERO,) * k.rank) if k is not None else ia.ZERO
    zero = il.scalar(0, x.dtype)

    def element(index: Index) -> Expr:
        above = ia.sub(ia.sub(index[-1], index[-2]), shift)  # >= 0: on or above the diagonal
        kept = il.ge0(above) if attribute(node, "upper", 1) else il.ge0(ia.neg(above))
        return il.choose(kept, x.at(index), zero)

    return Tensor(x.shape, x.dtype, element)


@transfer("EyeLike")
def eye_like(ctx: Interpreter, node: ir.Node) -> Tensor:
    x, k = ctx.input(node, 0), attribute(node, "k", 0)
    dtype = ir.DataType(attribute(node, "dtype")) if "dtype" in node.attributes else x.dtype
    one, zero = il.scalar(1, dtype), il.scalar(0, dtype)
    return Tensor(
        x.shape, dtype, lambda index: il.choose(il.eq0(ia.sub(ia.sub(index[1], index[0]), ia.const(k))), one, zero)
    )
