# SPDX-License-Identifier: Apache-2.0
"""How ops determine the symbolic shapes of their outputs and the contents of integer tensors. Read by analysis.Analysis
only.

A shape rule returns one shape per output or None (nothing known); a content rule the elements of the first output (or
a list, for every output) or None. An op without rule costs no correctness: its outputs have the file's shape or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from faexport.nodes import attribute, operand
from faexport.understand.shapes.dims import Dim, product
from faexport.understand.shapes.einsum import einsum_equation
from faexport.understand.shapes.known import Known, Shape

ShapeRule = Callable[[ir.Node, Known], Sequence[Shape | None] | None]
ContentRule = Callable[[ir.Node, Known], Shape | list[Shape] | None]

SHAPE_RULES: dict[str, ShapeRule] = {}
CONTENT_RULES: dict[str, ContentRule] = {}
ONE = Dim.of(1)
SHAPE_OF_FIRST_INPUT = (
    "Identity Cast CastLike Softmax LogSoftmax Relu Gelu Erf Tanh Sigmoid Sqrt Neg Exp Log Abs Not IsNaN IsInf "
    "Reciprocal Floor Ceil Round Sin Cos Clip Trilu CumSum Dropout LeakyRelu Elu Softplus HardSigmoid HardSwish "
    "Swish Sign LayerNormalization RMSNormalization InstanceNormalization BatchNormalization GroupNormalization "
    "LpNormalization ScatterND ScatterElements TensorScatter RotaryEmbedding Mish Selu QuantizeLinear DequantizeLinear "
    "com.microsoft::Gelu com.microsoft::FastGelu com.microsoft::QuickGelu com.microsoft::BiasGelu "
    "com.microsoft::RotaryEmbedding SimplifiedLayerNormalization "
).split()
BROADCASTING = (
    "Add Sub Mul Div Pow Mod Equal Less LessOrEqual Greater GreaterOrEqual And Or Xor Where Max Min Mean Sum "
    "PRelu BitwiseAnd BitwiseOr "
).split()


def shape_of(*names: str):
    return lambda function: SHAPE_RULES.update(dict.fromkeys(names, function)) or function


def contents_of(*names: str):
    return lambda function: CONTENT_RULES.update(dict.fromkeys(names, function)) or function


def broadcast(shapes: Sequence[Shape | None]) -> Shape | None:
    """NumPy's broadcast. Where two different symbols meet, neither is trusted: one of them may be 1."""
    if any(s is None for s in shapes):
        return None
    rank = max(map(len, shapes), default=0)
    padded = [(ONE,) * (rank - len(s)) + s for s in shapes]
    return tuple(_broadcast_axis([s[i] for s in padded]) for i in range(rank))


def _broadcast_axis(dims: Sequence[Dim]) -> Dim:
    wide = [d for d in dict.fromkeys(dims) if d != 1]
    wide = [d for d in wide if not any(_is_up_to(d, other) for other in wide)]
    fixed = [d for d in wide if d.const is not None]
    if fixed:
        return fixed[0]
    return ONE if not wide else wide[0] if len(wide) == 1 else Dim.unknown("broadcast")


_UP_TO = "?up_to("


def _up_to(length: Dim, start: Dim, size: Dim) -> Dim:
    """`length` elements from `start` on, but no more than the axis of `size` has: of a table of positions, say. Where
    it meets an axis of `length`, the sum has that size: it is either as long or 1."""
    return Dim.of(f"{_UP_TO}{length})[{start}:{size}]")


def is_bound(dim: Dim) -> bool:
    """Is it a size of which an upper bound is known?"""
    return any(s.startswith(_UP_TO) for s in dim.symbols)


def _is_up_to(dim: Dim, length: Dim) -> bool:
    return len(dim.symbols) == 1 and str(dim).startswith(f"{_UP_TO}{length})[")


def resolve_axis(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def constant_ints(node: ir.Node, a: Known, index: int, name: str) -> list[int] | None:
    """Integers given by a constant input or, in old opsets, by an attribute; None where absent or not constant."""
    value = operand(node, index)
    if value is None:
        given = attribute(node, name)
        return list(given) if given is not None else None
    array = a.constant(value)
    return None if array is None else [int(x) for x in array.reshape(-1)]


@shape_of(*SHAPE_OF_FIRST_INPUT)
def _same(node, a):
    return [a.shape(node.inputs[0])] if node.inputs else None


@shape_of(*BROADCASTING)
def _elementwise(node, a):
    return [broadcast([a.shape(v) for v in node.inputs])]


@shape_of("Constant")
def _constant(node, a):
    tensor = attribute(node, "value")
    if tensor is not None:
        return [tuple(Dim.of(int(d)) for d in tensor.shape)]
    array = a.constant(node.outputs[0])
    return None if array is None else [tuple(map(Dim.of, array.shape))]


@shape_of("MatMul")
def _matmul(node, a):
    x, y = (a.shape(v) for v in node.inputs)
    if x is None or y is None or len(x) < 1 or len(y) < 1:
        return None
    if len(x) == 1 or len(y) == 1:
        return [y[:-2] + y[-1:] if len(x) == 1 else x[:-1]] if len(x) != len(y) else [()]
    lead = broadcast([x[:-2], y[:-2]])
    return None if lead is None else [(*lead, x[-2], y[-1])]


@shape_of("Gemm")
def _gemm(node, a):
    x, y = a.shape(node.inputs[0]), a.shape(node.inputs[1])
    if x is None or y is None or len(x) != 2 or len(y) != 2:
        return None
    return [(x[1 if attribute(node, "transA", 0) else 0], y[0 if attribute(node, "transB", 0) else 1])]


@shape_of("Einsum")
def _einsum(node, a):
    equation = einsum_equation(node, a)
    if equation is None:
        return None
    left, out = equation.split("->")
    sizes: dict[str, Dim] = {}
    for letters, value in zip(left.split(","), node.inputs, strict=True):
        shape = a.shape(value)
        if shape is None:
            continue
        if len(shape) != len(letters):
            return None
        for letter, dim in zip(letters, shape, strict=True):
            if letter not in sizes or sizes[letter] == 1:
                sizes[letter] = dim
    return [tuple(sizes[letter] if letter in sizes else Dim.unknown("einsum") for letter in out)]


@shape_of("Transpose")
def _transpose(node, a):
    shape = a.shape(node.inputs[0])
    perm = attribute(node, "perm")
    if shape is None:
        return [tuple(Dim.unknown("transpose") for _ in perm)] if perm else None
    perm = perm or range(len(shape))[::-1]
    return [tuple(shape[i] for i in perm)]


@shape_of("Reshape")
def _reshape(node, a):
    target = a.contents(operand(node, 1)) if len(node.inputs) > 1 else tuple(map(Dim.of, attribute(node, "shape", ())))
    if target is None:
        length = a.shape(operand(node, 1))
        rank = length[0].const if length is not None and len(length) == 1 else None
        return None if rank is None else [tuple(Dim.unknown("reshape") for _ in range(rank))]
    source = a.shape(node.inputs[0])
    copies = not attribute(node, "allowzero", 0)
    dims: list[Dim | None] = []
    for i, d in enumerate(target):
        if d == 0 and copies:
            dims.append(source[i] if source is not None and i < len(source) else Dim.unknown("reshape"))
        else:
            dims.append(None if d == -1 else d)
    if None in dims:
        rest = product(d for d in dims if d is not None)
        size = None if source is None else product(source).divide(rest)
        dims[dims.index(None)] = Dim.unknown("reshape") if size is None else size
    return [tuple(dims)]


@shape_of("Flatten")
def _flatten(node, a):
    shape = a.shape(node.inputs[0])
    if shape is None:
        return [(Dim.unknown("flatten"), Dim.unknown("flatten"))]
    axis = resolve_axis(attribute(node, "axis", 1), len(shape))
    return [(product(shape[:axis]), product(shape[axis:]))]


@shape_of("Unsqueeze")
def _unsqueeze(node, a):
    shape, axes = a.shape(node.inputs[0]), constant_ints(node, a, 1, "axes")
    if shape is None or axes is None:
        return None
    rank = len(shape) + len(axes)
    new = {resolve_axis(x, rank) for x in axes}
    rest = iter(shape)
    return [tuple(ONE if i in new else next(rest) for i in range(rank))]


@shape_of("Squeeze")
def _squeeze(node, a):
    shape, axes = a.shape(node.inputs[0]), constant_ints(node, a, 1, "axes")
    if shape is None or (axes is None and any(d.const is None for d in shape)):
        return None
    gone = (
        {resolve_axis(x, len(shape)) for x in axes} if axes is not None else {i for i, d in enumerate(shape) if d == 1}
    )
    return [tuple(d for i, d in enumerate(shape) if i not in gone)]


@shape_of("Expand")
def _expand(node, a):
    target = a.contents(operand(node, 1))
    shape = a.shape(node.inputs[0])
    return None if target is None or shape is None else [broadcast([shape, target])]


@shape_of("Tile")
def _tile(node, a):
    shape, repeats = a.shape(node.inputs[0]), a.contents(operand(node, 1))
    if shape is None or repeats is None or len(repeats) != len(shape):
        return None if shape is None else [tuple(Dim.unknown("tile") for _ in shape)]
    return [tuple(d * r for d, r in zip(shape, repeats, strict=True))]


@shape_of("ConstantOfShape")
def _constant_of_shape(node, a):
    return [a.contents(node.inputs[0])]


@shape_of("Range")
def _range(node, a):
    start, limit, step = (a.contents(v) for v in node.inputs)
    if start and limit and step and step[0] == 1:
        return [(limit[0] - start[0],)]
    return [(Dim.unknown("range"),)]


@shape_of("Shape")
def _shape(node, a):
    shape = a.shape(node.inputs[0])
    return [(Dim.unknown("rank"),)] if shape is None else [(Dim.of(len(shape_window(node, shape))),)]


@shape_of("Size")
def _size(node, a):
    return [()]


@shape_of("Concat")
def _concat(node, a):
    shapes = [a.shape(v) for v in node.inputs]
    known = next((s for s in shapes if s is not None), None)
    if known is None:
        return None
    axis = resolve_axis(attribute(node, "axis", 0), len(known))
    total = Dim.of(0)
    for s in shapes:
        total = total + (s[axis] if s is not None and len(s) == len(known) else Dim.unknown("concat"))
    rows = [next((s[i] for s in shapes if s is not None and s[i].const is not None), d) for i, d in enumerate(known)]
    return [tuple(total if i == axis else d for i, d in enumerate(rows))]


@shape_of("Split")
def _split(node, a):
    shape = a.shape(node.inputs[0])
    if shape is None:
        return None
    axis = resolve_axis(attribute(node, "axis", 0), len(shape))
    sizes = split_sizes(node, a, shape[axis])
    return [
        shape[:axis] + (Dim.unknown("split") if sizes is None else sizes[i],) + shape[axis + 1 :]
        for i in range(len(node.outputs))
    ]


def split_sizes(node: ir.Node, a: Known, size: Dim) -> list[Dim] | None:
    """The sizes of the parts of a Split, as far as they are constant."""
    given = constant_ints(node, a, 1, "split")
    if given is not None:
        return [Dim.of(x) for x in given]
    if operand(node, 1) is not None:
        return None
    count = len(node.outputs)
    if size.const is not None and size.const % count:
        part = -(-size.const // count)
        return [Dim.of(min(part, size.const - i * part)) for i in range(count)]
    part = size.divide(count)
    return None if part is None else [part] * count


def slice_of(node: ir.Node, a: Known, shape: Shape) -> list[tuple[int, Dim, Dim, int]] | None:
    """(axis, start, size, step) of a Slice, sizes exact; None where a bound isn't understood."""
    starts, ends = a.contents(operand(node, 1)), a.contents(operand(node, 2))
    if len(node.inputs) == 1:
        starts, ends = (tuple(map(Dim.of, attribute(node, n, ()))) for n in ("starts", "ends"))
    if starts is None or ends is None:
        return None
    axes = constant_ints(node, a, 3, "axes")
    steps = constant_ints(node, a, 4, "steps") or [1] * len(starts)
    if axes is None and operand(node, 3) is not None:
        return None
    result = []
    for start, end, axis, step in zip(starts, ends, axes or range(len(starts)), steps, strict=True):
        axis = resolve_axis(axis, len(shape))
        piece = _slice_axis(start, end, shape[axis], step)
        if piece is None:
            return None
        result.append((axis, *piece, step))
    return result


def _slice_axis(start: Dim, end: Dim, size: Dim, step: int) -> tuple[Dim, Dim] | None:
    if step < 1:
        return None
    start, end = (size + x if _is_negative(x) else x for x in (start, end))
    if end.const is not None and (end.const >= 2**31 - 1 or (size.const is not None and end.const > size.const)):
        end = size
    length = end - start
    if any(c < 0 for c in length.terms.values()) or not (_fits(end, size)):
        return None
    if step != 1:
        return None if length.const is None else (start, Dim.of(-(-length.const // step)))
    return start, length


def _is_negative(bound: Dim) -> bool:
    """Does it count from the axis's end? (As -n does, be n a constant or a symbol.)"""
    return bool(bound.terms) and all(c < 0 for c in bound.terms.values())


def _fits(end: Dim, size: Dim) -> bool:
    """Is end <= size for every value of the (non-negative) symbols?"""
    return all(c >= 0 for c in (size - end).terms.values())


@shape_of("Slice")
def _slice(node, a):
    shape = a.shape(node.inputs[0])
    if shape is None:
        return None
    pieces = slice_of(node, a, shape)
    if pieces is not None:
        dims = list(shape)
        for axis, _, size, _ in pieces:
            dims[axis] = size
        return [tuple(dims)]
    axes = constant_ints(node, a, 3, "axes")
    if axes is None:
        axes = range(len(shape))
    cut = {resolve_axis(x, len(shape)): i for i, x in enumerate(axes)}
    return [tuple(_cut(node, a, cut[i], d) if i in cut else d for i, d in enumerate(shape))]


def _cut(node: ir.Node, a: Known, index: int, size: Dim) -> Dim:
    """What the Slice leaves of an axis of `size`, its `index`-th."""
    bounds = [a.contents(operand(node, i)) for i in (1, 2)]
    steps = constant_ints(node, a, 4, "steps") or [1]
    if any(b is None or index >= len(b) for b in bounds) or steps[min(index, len(steps) - 1)] != 1:
        return Dim.unknown("slice")
    start, end = (b[index] for b in bounds)
    length = end - start
    if any(c < 0 for d in (start, length) for c in d.terms.values()):
        return Dim.unknown("slice")
    return _up_to(length, start, size)


@shape_of("Gather")
def _gather(node, a):
    shape, index = a.shape(node.inputs[0]), a.shape(node.inputs[1])
    if shape is None or index is None:
        return None
    axis = resolve_axis(attribute(node, "axis", 0), len(shape))
    return [shape[:axis] + index + shape[axis + 1 :]]


@shape_of("GatherElements")
def _gather_elements(node, a):
    return [a.shape(node.inputs[1])]


@shape_of("GatherND")
def _gather_nd(node, a):
    shape, index = a.shape(node.inputs[0]), a.shape(node.inputs[1])
    depth = index[-1].const if index else None
    if shape is None or depth is None:
        return None
    return [index[:-1] + shape[attribute(node, "batch_dims", 0) + depth :]]


def shape_window(node: ir.Node, shape: Shape) -> Shape:
    return shape[slice(attribute(node, "start", 0), attribute(node, "end"))]
