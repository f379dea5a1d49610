# SPDX-License-Identifier: Apache-2.0
"""Transfer functions of the ONNX operators that move, repeat, cut or make elements without computing with them.

Registered by decorator; called by the interpreter in interpreter.py. Raising Unknown makes the value opaque.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import operand
from faexport.sizes import algebra as ia
from faexport.sizes.algebra import Expr
from faexport.understand.index import logic as il
from faexport.understand.index.interpreter import Element, Interpreter, transfer
from faexport.understand.index.tensor import Index, Shape, Tensor, Unknown, attribute, from_list
from faexport.understand.shapes.rules import constant_ints, slice_of, split_sizes


def axis_of(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise Unknown
    return axis % rank


def axes_argument(ctx: Interpreter, node: ir.Node, k: int = 1) -> list[int] | None:
    """Axes given as an input (opset 13 on) or as an attribute (before); None where absent."""
    found = constant_ints(node, ctx.analysis, k, "axes")
    if found is None and operand(node, k) is not None:
        raise Unknown
    return found


@transfer("Identity")
def identity(ctx: Interpreter, node: ir.Node) -> Element:
    return ctx.input(node, 0).at


@transfer("Dropout")
def dropout(ctx: Interpreter, node: ir.Node) -> Element:
    training = ctx.optional(node, 2)
    if training is not None and training.scalar() is not il.FALSE:
        raise Unknown
    return ctx.input(node, 0).at


@transfer("Shape")
def shape(ctx: Interpreter, node: ir.Node) -> Element:
    sizes = ctx.input(node, 0).shape
    return from_list(list(sizes[slice(attribute(node, "start", 0), attribute(node, "end"))]))


@transfer("Size")
def size(ctx: Interpreter, node: ir.Node) -> Element:
    count = ia.product(ctx.input(node, 0).shape)
    return lambda _: count


@transfer("Range")
def range_(ctx: Interpreter, node: ir.Node) -> Element:
    start, _, step = (ctx.input(node, k).scalar() for k in range(3))
    by = ia.value_of(step) if start.kind == step.kind == "int" else None
    if by is not None and by != 0:
        return lambda index: ia.add(start, ia.scale(index[0], by))
    first, stride = (il.float_value(x) if x.kind == "float" else None for x in (start, step))
    if first is None or not stride or not (first.is_integer() and stride.is_integer()):
        raise Unknown
    dtype = ctx.dtype(node)
    return lambda index: il.cast_float(ia.add(ia.const(int(first)), ia.scale(index[0], int(stride))), dtype)


@transfer("ConstantOfShape")
def constant_of_shape(ctx: Interpreter, node: ir.Node) -> Element:
    found = node.attributes.get("value")
    dtype = ir.DataType.FLOAT if found is None else found.value.dtype
    item = np.float32(0) if found is None else found.value.numpy().flat[0]
    expr = il.scalar(item, dtype)
    return lambda _: expr


@transfer("Unsqueeze")
def unsqueeze(ctx: Interpreter, node: ir.Node) -> Element:
    x, axes = ctx.input(node, 0), axes_argument(ctx, node)
    if axes is None:
        raise Unknown
    new = {axis_of(a, x.rank + len(axes)) for a in axes}
    return lambda index: x.at(tuple(i for k, i in enumerate(index) if k not in new))


@transfer("Squeeze")
def squeeze(ctx: Interpreter, node: ir.Node) -> Element:
    x, axes = ctx.input(node, 0), axes_argument(ctx, node)
    if axes is None and any(ia.value_of(s) is None for s in x.shape):
        raise Unknown
    gone = {axis_of(a, x.rank) for a in axes or ()}
    if axes is None:
        gone = {k for k, s in enumerate(x.shape) if ia.value_of(s) == 1}

    def element(index: Index) -> Expr:
        rest = iter(index)
        return x.at(tuple(ia.ZERO if k in gone else next(rest) for k in range(x.rank)))

    return element


@transfer("Transpose")
def transpose(ctx: Interpreter, node: ir.Node) -> Element:
    x = ctx.input(node, 0)
    perm = list(attribute(node, "perm") or range(x.rank - 1, -1, -1))
    back = [perm.index(k) for k in range(x.rank)]
    return lambda index: x.at(tuple(index[k] for k in back))


@transfer("Expand")
def expand(ctx: Interpreter, node: ir.Node) -> Element:
    x, rank = ctx.input(node, 0), len(ctx.output_shape(node))
    if rank < x.rank:  # the target may be shorter than the tensor
        raise Unknown
    return x.at_right


@transfer("Tile")
def tile(ctx: Interpreter, node: ir.Node) -> Element:
    x, repeats = ctx.input(node, 0), ctx.contents(operand(node, 1))

    def element(index: Index) -> Expr:
        once = (ia.value_of(r) == 1 for r in repeats)
        return x.at(tuple(i if o else ia.modulo(i, s) for i, o, s in zip(index, once, x.shape, strict=True)))

    return element


@transfer("Concat")
def concat(ctx: Interpreter, node: ir.Node) -> Element:
    parts = ctx.inputs(node)
    axis = axis_of(attribute(node, "axis"), parts[0].rank)
    starts = [ia.ZERO]
    for part in parts:
        starts.append(ia.add(starts[-1], part.shape[axis]))

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

    return element


@transfer("Pad")
def pad(ctx: Interpreter, node: ir.Node) -> Element:
    if attribute(node, "mode", "constant") != "constant":
        raise Unknown
    x, dtype = ctx.input(node, 0), ctx.dtype(node)
    axes = axes_argument(ctx, node, 3)
    given = operand(node, 1)
    pads = ctx.contents(given) if given is not None else [ia.const(k) for k in attribute(node, "pads")]
    axes = list(range(x.rank)) if axes is None else [axis_of(a, x.rank) for a in axes]
    before = dict(zip(axes, pads[: len(axes)], strict=True))
    value = ctx.optional(node, 2)
    fill = il.scalar(attribute(node, "value", 0.0), dtype) if value is None else value.scalar()

    def element(index: Index) -> Expr:
        own = tuple(ia.sub(i, before[k]) if k in before else i for k, i in enumerate(index))
        bounds = [il.ge0(e) for k in axes for e in (own[k], ia.sub(ia.sub(x.shape[k], own[k]), ia.ONE))]
        inside = il.all_of(bounds)
        return fill if inside is il.FALSE else il.choose(inside, x.at(own), fill)

    return element


@transfer("Split")
def split(ctx: Interpreter, node: ir.Node, which: int = 0) -> Element:
    x, whole = ctx.input(node, 0), ctx.analysis.shape(node.inputs[0])
    axis = axis_of(attribute(node, "axis", 0), x.rank)
    sizes = split_sizes(node, ctx.analysis, whole[axis]) if whole is not None else None
    if sizes is None:
        raise Unknown
    start = ia.add(*map(ctx.size, sizes[:which]))
    return lambda index: x.at(index[:axis] + (ia.add(index[axis], start),) + index[axis + 1 :])


@transfer("Slice")
def slice_(ctx: Interpreter, node: ir.Node) -> Element:
    x, whole = ctx.input(node, 0), ctx.analysis.shape(node.inputs[0])
    pieces = slice_of(node, ctx.analysis, whole) if whole is not None else None
    if pieces is None:
        raise Unknown
    first = {axis: (ctx.size(start), step) for axis, start, _, step in pieces}

    def element(index: Index) -> Expr:
        moved = [ia.add(first[k][0], ia.scale(i, first[k][1])) if k in first else i for k, i in enumerate(index)]
        return x.at(tuple(moved))

    return element


@transfer("Reshape", "Flatten")
def reshape(ctx: Interpreter, node: ir.Node) -> Element:
    """Elements in row-major order under a new shape: axes are split and merged in the smallest groups of equal
    products."""
    x, sizes = ctx.input(node, 0), ctx.output_shape(node)
    same = _same_by_count(x.shape, sizes)
    groups = _groups(x.shape, tuple(same[0] if same and s is same[1] else s for s in sizes))
    if groups is None:
        raise Unknown

    def element(index: Index) -> Expr:
        result: list[Expr] = []
        for old, new in groups:
            result += _regroup([x.shape[k] for k in old], [sizes[k] for k in new], [index[k] for k in new])
        return x.at(tuple(result))

    return element


def _same_by_count(old: Shape, new: Shape) -> tuple[Expr, Expr] | None:
    """Two sizes, one before and one after a reshape, that are equal since the number of elements is (or there are
    none)."""
    before, after = ia.product(old), ia.product(new)
    if before is after:
        return None
    pairs = ((x, y) for x in old for y in new if ia.mul(before, y) is ia.mul(after, x))
    return next(pairs, None)


def _groups(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]] | None:
    """Runs of old axes and of new axes with the same number of elements, in order."""
    groups: list[tuple[list[int], list[int]]] = []
    a, b = 0, 0
    while a < len(old) or b < len(new):
        left: list[int] = []
        right: list[int] = []
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
    result: list[Expr] = []
    stride = ia.ONE
    for k in range(len(old) - 1, -1, -1):
        part = ia.floordiv(linear, stride)
        outermost = all(ia.value_of(s) == 1 for s in old[:k])
        result.insert(0, ia.ZERO if ia.value_of(old[k]) == 1 else part if outermost else ia.modulo(part, old[k]))
        stride = ia.mul(stride, old[k])
    return result


@transfer("Gather")
def gather(ctx: Interpreter, node: ir.Node) -> Element:
    x, indices = ctx.input(node, 0), ctx.input(node, 1)
    axis = axis_of(attribute(node, "axis", 0), x.rank)
    last = axis + indices.rank

    def element(index: Index) -> Expr:
        at = _wrapped(indices.at(index[axis:last]), x.shape[axis])
        return x.at(index[:axis] + (at,) + index[last:]) if at else il.load(node.outputs[0], index, x.kind)

    return element


def _wrapped(at: Expr, size_: Expr) -> Expr | None:
    """A gather index as ONNX reads it (negative counts from the end); None where its sign isn't known."""
    if at.kind != "int":
        return None
    if ia.is_nonnegative(at):
        return at
    return ia.add(at, size_) if ia.is_nonnegative(ia.sub(ia.neg(at), ia.ONE)) else None


@transfer("GatherElements")
def gather_elements(ctx: Interpreter, node: ir.Node) -> Element:
    x, indices = ctx.input(node, 0), ctx.input(node, 1)
    axis = axis_of(attribute(node, "axis", 0), x.rank)

    def element(index: Index) -> Expr:
        at = _wrapped(indices.at(index), x.shape[axis])
        return x.at(index[:axis] + (at,) + index[axis + 1 :]) if at else il.load(node.outputs[0], index, x.kind)

    return element


@transfer("GatherND")
def gather_nd(ctx: Interpreter, node: ir.Node) -> Element:
    x, indices = ctx.input(node, 0), ctx.input(node, 1)
    batch, depth = attribute(node, "batch_dims", 0), ia.value_of(indices.shape[-1])
    if depth is None:
        raise Unknown
    outer = indices.rank - 1

    def element(index: Index) -> Expr:
        read = (_wrapped(indices.at(index[:outer] + (ia.const(k),)), x.shape[batch + k]) for k in range(depth))
        found = [at for at in read if at is not None]
        if len(found) < depth:
            return il.load(node.outputs[0], index, x.kind)
        return x.at(index[:batch] + tuple(found) + index[outer:])

    return element


@transfer("ScatterND")
def scatter_nd(ctx: Interpreter, node: ir.Node) -> Element:
    """An update of whole rows at constant places, as the exporters write `x[k] = y`, or of a part that is cut out along
    some axes, `x[:, a : a + n] = y`, of which TorchScript lists all places; else opaque."""
    x, indices, updates = (ctx.input(node, k) for k in range(3))
    depth = ia.value_of(indices.shape[-1])
    if attribute(node, "reduction", "none") != "none" or depth is None:
        raise Unknown
    starts = _starts_of_part(indices, depth) if indices.rank == depth + 1 else None
    if starts is not None:
        return _with_part(x, updates, starts)
    rows = ia.value_of(indices.shape[0])
    if indices.rank != 2 or depth != 1 or rows is None or rows > 8:
        raise Unknown

    def element(index: Index) -> Expr:
        result = x.at(index)
        for k in range(rows):
            row = _wrapped(indices.at((ia.const(k), ia.ZERO)), x.shape[0])
            if row is None:
                return il.load(node.outputs[0], index, x.kind)
            result = il.choose(il.eq0(ia.sub(index[0], row)), updates.at((ia.const(k), *index[1:])), result)
        return result

    return element


def writes_everything(node: ir.Node, ctx: Interpreter) -> bool:
    """Does a ScatterND write every element anew, each at its own place, so that it gives its updates? That is how
    TorchScript writes `x[:, :, 0:] = y`."""
    x, indices, updates = (ctx.known(value) if value is not None else None for value in node.inputs[:3])
    if x is None or indices is None or updates is None or attribute(node, "reduction", "none") != "none":
        return False
    if indices.rank != x.rank + 1 or ia.value_of(indices.shape[-1]) != x.rank or updates.shape != x.shape:
        return False
    starts = _starts_of_part(indices, x.rank)
    return starts is not None and all(start is ia.ZERO for start in starts)


def starts_written(node: ir.Node, ctx: Interpreter) -> tuple[int, ...] | None:
    """Where the elements that a ScatterND writes anew, one box of them, begin: numbers for the first axes."""
    x, indices = (ctx.known(value) if value is not None else None for value in node.inputs[:2])
    depth = None if indices is None or not indices.shape else ia.value_of(indices.shape[-1])
    if x is None or indices is None or depth is None or attribute(node, "reduction", "none") != "none":
        return None
    starts = _starts_of_part(indices, depth) if indices.rank == depth + 1 else None
    numbers = tuple(ia.value_of(start) for start in starts or ())
    return None if starts is None or None in numbers else tuple(n for n in numbers if n is not None)


def _starts_of_part(indices: Tensor, depth: int) -> Index | None:
    """Where the element at u has the place u + start, for all u, the start; None where that isn't so."""
    at = tuple(ia.var(f"updated {axis}", (size,)) for axis, size in enumerate(indices.shape[:-1]))
    places = [indices.at((*at, ia.const(k))) for k in range(depth)]
    if any(place.kind != "int" for place in places):
        return None
    starts = tuple(ia.sub(place, u) for place, u in zip(places, at, strict=True))
    is_start = (not ia.variables(x) and not ia.atoms(x, "load") and ia.is_nonnegative(x) for x in starts)
    return starts if all(is_start) else None


def _with_part(x: Tensor, updates: Tensor, starts: Index) -> Element:
    """`x` with the updates from these places on."""

    def element(index: Index) -> Expr:
        own = tuple(ia.sub(i, start) for i, start in zip(index, starts, strict=False))
        inside = il.TRUE
        for i, start, size, whole in zip(own, starts, updates.shape, x.shape, strict=False):
            if start is not ia.ZERO or size is not whole:
                inside = il.all_of([inside, il.ge0(i), il.ge0(ia.sub(ia.sub(size, ia.ONE), i))])
        new = updates.at((*own, *index[len(own) :]))
        return new if inside is il.TRUE else il.choose(inside, new, x.at(index))

    return element


@transfer("Trilu")
def trilu(ctx: Interpreter, node: ir.Node) -> Element:
    x = ctx.input(node, 0)
    k = ctx.optional(node, 1)
    shift = k.scalar() if k is not None else ia.ZERO
    zero = il.scalar(0, ctx.dtype(node))

    def element(index: Index) -> Expr:
        above = ia.sub(ia.sub(index[-1], index[-2]), shift)  # >= 0: on or above the diagonal
        kept = il.ge0(above) if attribute(node, "upper", 1) else il.ge0(ia.neg(above))
        return il.choose(kept, x.at(index), zero)

    return element


@transfer("EyeLike")
def eye_like(ctx: Interpreter, node: ir.Node) -> Element:
    k, dtype = attribute(node, "k", 0), ctx.analysis.dtype(node.outputs[0])
    if dtype is None:
        raise Unknown
    one, zero = il.scalar(1, dtype), il.scalar(0, dtype)
    return lambda index: il.choose(il.eq0(ia.sub(ia.sub(index[1], index[0]), ia.const(k))), one, zero)
