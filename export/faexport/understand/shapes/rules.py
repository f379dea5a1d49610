# SPDX-License-Identifier: Apache-2.0
"""How ops determine the symbolic shapes of their outputs and the contents of integer tensors. Read by analysis.Analysis
only.

A shape rule returns one shape per output or None (nothing known); a content rule the elements of the first output (or
a list, for every output) or None. An op without rule costs no correctness: its outputs have the file's shape or none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import onnx_ir as ir

from faexport.errors import InvalidNodeError
from faexport.graph.nodes import attribute, operand, producer
from faexport.sizes import algebra
from faexport.sizes.dims import Dim, product
from faexport.understand.shapes.einsum import einsum_equation
from faexport.understand.shapes.known import Contents, Known, Shape, Shapes

ShapeRule = Callable[[ir.Node, Known], Shapes]
ContentRule = Callable[[ir.Node, Known], Contents]

SHAPE_RULES: dict[str, ShapeRule] = {}
CONTENT_RULES: dict[str, ContentRule] = {}
ONE = Dim.of(1)
MAX_RANK = 64  # as NumPy's; where a file says more, nothing is known
_HUGE = 10**9  # slice ends from here on mean "to the end": tf2onnx writes this number, PyTorch larger ones
SHAPE_OF_FIRST_INPUT = (
    "Identity Cast CastLike Softmax LogSoftmax Relu Gelu Erf Tanh Sigmoid Sqrt Neg Exp Log Abs Not IsNaN IsInf "
    "Reciprocal Floor Ceil Round Sin Cos Clip Trilu CumSum EyeLike Dropout LeakyRelu Elu Softplus HardSigmoid "
    "HardSwish Swish Sign LayerNormalization RMSNormalization InstanceNormalization BatchNormalization "
    "GroupNormalization TensorScatter "
    "LpNormalization ScatterND ScatterElements Scatter ReverseSequence RotaryEmbedding Mish Selu Celu Shrink "
    "ThresholdedRelu Softsign Hardmax LRN MeanVarianceNormalization CumProd BitwiseNot QuantizeLinear DequantizeLinear "
    "Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh "
    "com.microsoft::Gelu com.microsoft::FastGelu com.microsoft::QuickGelu com.microsoft::BiasGelu "
    "com.microsoft::RotaryEmbedding SimplifiedLayerNormalization com.microsoft::QuantizeLinear "
    "com.microsoft::DequantizeLinear trt::TRT_FP8QuantizeLinear trt::TRT_FP8DequantizeLinear "
    "com.microsoft::GroupNorm com.microsoft::BiasAdd "
).split()
BROADCASTING = (
    "Add Sub Mul Div Pow Mod Equal Less LessOrEqual Greater GreaterOrEqual And Or Xor Where Max Min Mean Sum "
    "PRelu BitShift BitwiseAnd BitwiseOr BitwiseXor "
).split()


def shape_of(*names: str) -> Callable[[ShapeRule], ShapeRule]:
    def register(function: ShapeRule) -> ShapeRule:
        SHAPE_RULES.update(dict.fromkeys(names, function))
        return function

    return register


def contents_of(*names: str) -> Callable[[ContentRule], ContentRule]:
    def register(function: ContentRule) -> ContentRule:
        CONTENT_RULES.update(dict.fromkeys(names, function))
        return function

    return register


def broadcast(shapes: Sequence[Shape | None]) -> Shape | None:
    """The shape that ONNX's broadcast gives, None where one of these isn't known."""
    known = [s for s in shapes if s is not None]
    return broadcast_known(known) if len(known) == len(shapes) else None


def broadcast_known(shapes: Sequence[Shape]) -> Shape:
    """ONNX's broadcast: two sizes that meet are equal, or one of them is 1."""
    rank = max(map(len, shapes), default=0)
    padded = [(ONE,) * (rank - len(s)) + s for s in shapes]
    return tuple(functools.reduce(_meet, (s[i] for s in padded), ONE) for i in range(rank))


def _meet(x: Dim, y: Dim) -> Dim:
    met = x.meet(y)
    if met in (x, y) or met.const is not None:
        return met
    for larger, other in ((x, y), (y, x)):
        # One that never exceeds the other is it, or 1. (Or it is 0 where the other is 1: then there are no elements.)
        if (larger - other).is_at_least(0):
            return other if larger.beside(other) == other else larger
    return met


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


def reduced_axes(node: ir.Node, a: Known, rank: int) -> list[int] | None:
    """The axes, not negative, that a reduction of a tensor of this rank reduces; None where they aren't known."""
    axes = constant_ints(node, a, 1, "axes")
    if axes is None and operand(node, 1) is not None:
        return None
    if not axes:
        return [] if attribute(node, "noop_with_empty_axes", 0) else list(range(rank))
    return sorted(resolve_axis(x, rank) for x in axes)


@shape_of(*SHAPE_OF_FIRST_INPUT)
def _same(node: ir.Node, a: Known) -> Shapes:
    return [a.shape(node.inputs[0])] if node.inputs else None


@shape_of(*BROADCASTING)
def _elementwise(node: ir.Node, a: Known) -> Shapes:
    return [broadcast([a.shape(v) for v in node.inputs])]


@shape_of("Constant")
def _constant(node: ir.Node, a: Known) -> Shapes:
    tensor = attribute(node, "value")
    if tensor is not None:
        return [tuple(Dim.of(int(d)) for d in tensor.shape)]
    array = a.constant(node.outputs[0])
    return None if array is None else [tuple(map(Dim.of, array.shape))]


def matmul_shape(x: Shape | None, y: Shape | None) -> Shape | None:
    """The shape of the product of two tensors of these shapes."""
    if x is None or y is None or len(x) < 1 or len(y) < 1:
        return None
    if len(x) == 1 or len(y) == 1:
        return () if len(x) == len(y) else y[:-2] + y[-1:] if len(x) == 1 else x[:-1]
    return (*broadcast_known([x[:-2], y[:-2]]), x[-2], y[-1])


@shape_of("MatMul", "MatMulInteger", "com.microsoft::DynamicQuantizeMatMul", "com.microsoft::MatMulIntegerToFloat")
def _matmul(node: ir.Node, a: Known) -> Shapes:
    return [matmul_shape(a.shape(node.inputs[0]), a.shape(node.inputs[1]))]


@shape_of("Gemm")
def _gemm(node: ir.Node, a: Known) -> Shapes:
    x, y = a.shape(node.inputs[0]), a.shape(node.inputs[1])
    if x is None or y is None or len(x) != 2 or len(y) != 2:
        return None
    return [(x[1 if attribute(node, "transA", 0) else 0], y[0 if attribute(node, "transB", 0) else 1])]


@shape_of("Einsum")
def _einsum(node: ir.Node, a: Known) -> Shapes:
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
            sizes[letter] = sizes[letter].meet(dim) if letter in sizes else dim
    return [tuple(sizes[letter] if letter in sizes else Dim.unknown("einsum") for letter in out)]


@shape_of("Transpose")
def _transpose(node: ir.Node, a: Known) -> Shapes:
    shape = a.shape(node.inputs[0])
    perm = attribute(node, "perm")
    if shape is None:
        return [tuple(Dim.unknown("transpose") for _ in perm)] if perm else None
    perm = perm or range(len(shape))[::-1]
    if sorted(perm) != list(range(len(shape))):
        raise InvalidNodeError(f"perm is {list(perm)}, its input has {len(shape)} axes")
    return [tuple(shape[i] for i in perm)]


@shape_of("Reshape")
def _reshape(node: ir.Node, a: Known) -> Shapes:
    target = a.contents(operand(node, 1)) if len(node.inputs) > 1 else tuple(map(Dim.of, attribute(node, "shape", ())))
    if target is None:
        length = a.shape(operand(node, 1))
        rank = length[0].const if length is not None and len(length) == 1 else None
        return None if rank is None or rank > MAX_RANK else [tuple(Dim.unknown("reshape") for _ in range(rank))]
    source = a.shape(node.inputs[0])
    copies = not attribute(node, "allowzero", 0)
    dims: list[Dim | None] = []
    for i, d in enumerate(target):
        if d == 0 and copies:
            dims.append(source[i] if source is not None and i < len(source) else Dim.unknown("reshape"))
        else:
            dims.append(None if d == -1 else d)
    known = [d for d in dims if d is not None]
    if len(dims) - len(known) > 1:
        return None  # no runtime takes two sizes of -1
    if len(known) < len(dims):
        rest = Dim.unknown("reshape") if source is None else quotient(product(source), product(known))
        known.insert(dims.index(None), rest)
    return [tuple(known if source is None else same_count(source, known))]


def same_count(old: Sequence[Dim], new: Sequence[Dim]) -> list[Dim]:
    """The sizes after a reshape. Where just one differs from those before it, it equals the one that it took the place
    of (or there are no elements), also where some of the others were one axis before."""
    left, right = list(old), list(new)
    for size in new:
        if size in left:
            left.remove(size)
            right.remove(size)
    if product(d for d in left if d.const is not None) == product(d for d in right if d.const is not None):
        left, right = ([d for d in sizes if d.const is None] for sizes in (left, right))
    left, right = ([d for d in sizes if d != 1] for sizes in (left, right))
    if len(left) == len(right) == 1:
        return [left[0] if d == right[0] else d for d in new]
    return _instead_of_maximum(list(old), list(new))


def _instead_of_maximum(old: list[Dim], new: list[Dim]) -> list[Dim]:
    """The larger of two batches, as tf2onnx writes the batch of an Einsum, is what they are beside the other sizes."""
    for k, size in enumerate(new):
        atom = algebra.only_atom(size.expr)
        if atom is not None and atom.op == "max":
            whole = product(old).divide(product(new[:k] + new[k + 1 :]))
            return new if whole is None else [*new[:k], whole, *new[k + 1 :]]
    return new


@shape_of("Flatten")
def _flatten(node: ir.Node, a: Known) -> Shapes:
    shape = a.shape(node.inputs[0])
    if shape is None:
        return [(Dim.unknown("flatten"), Dim.unknown("flatten"))]
    axis = resolve_axis(attribute(node, "axis", 1), len(shape))
    return [(product(shape[:axis]), product(shape[axis:]))]


@shape_of("Unsqueeze")
def _unsqueeze(node: ir.Node, a: Known) -> Shapes:
    shape, axes = a.shape(node.inputs[0]), constant_ints(node, a, 1, "axes")
    if shape is None or axes is None:
        return None
    rank = len(shape) + len(axes)
    if rank > MAX_RANK:
        return None
    new = {resolve_axis(x, rank) for x in axes}
    if len(new & set(range(rank))) != len(axes):
        raise InvalidNodeError(f"axes are {list(axes)}, its output has {rank} axes")
    rest = iter(shape)
    return [tuple(ONE if i in new else next(rest) for i in range(rank))]


@shape_of("Squeeze")
def _squeeze(node: ir.Node, a: Known) -> Shapes:
    shape, axes = a.shape(node.inputs[0]), constant_ints(node, a, 1, "axes")
    if shape is None or (axes is None and any(d.const is None for d in shape)):
        return None
    gone = (
        {resolve_axis(x, len(shape)) for x in axes} if axes is not None else {i for i, d in enumerate(shape) if d == 1}
    )
    return [tuple(d for i, d in enumerate(shape) if i not in gone)]


@shape_of("Expand")
def _expand(node: ir.Node, a: Known) -> Shapes:
    target = a.contents(operand(node, 1))
    shape = a.shape(node.inputs[0])
    return None if target is None or shape is None else [broadcast([shape, target])]


@shape_of("Tile")
def _tile(node: ir.Node, a: Known) -> Shapes:
    shape, repeats = a.shape(node.inputs[0]), a.contents(operand(node, 1))
    if shape is None or repeats is None or len(repeats) != len(shape):
        return None if shape is None else [tuple(Dim.unknown("tile") for _ in shape)]
    return [tuple(d * r for d, r in zip(shape, repeats, strict=True))]


@shape_of("ConstantOfShape")
def _constant_of_shape(node: ir.Node, a: Known) -> Shapes:
    return [a.contents(node.inputs[0])]


def quotient(total: Dim, part: Dim) -> Dim:
    """total / part, rounded down; part is above 0, or the model fails."""
    exact = total.divide(part)
    return exact if exact is not None else Dim(algebra.floordiv(total.expr, part.expr))


def _whole_number(value: ir.Value | None, a: Known) -> Shape | None:
    """The contents of an integer, also where it is held as float32, as TensorFlow counts positions. NOTE: float32
    counts to 2^24, and no axis of positions is longer."""
    number, node = a.scalar(value), producer(value) if value is not None else None
    if number is not None and number.is_integer():
        return (Dim.of(int(number)),)
    is_cast = node is not None and node.op_type == "Cast" and a.dtype(value) in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
    return a.contents(node.inputs[0] if node is not None and is_cast else value)


@shape_of("Range")
def _range(node: ir.Node, a: Known) -> Shapes:
    start, limit, step = (_whole_number(v, a) for v in node.inputs)
    by = step[0].const if step else None
    if not start or not limit or not by:
        return [(Dim.unknown("range"),)]
    span = limit[0] - start[0] if by > 0 else start[0] - limit[0]
    return [(quotient(span + (abs(by) - 1), Dim.of(abs(by))).maximum(0),)]


@shape_of("OneHot")
def _one_hot(node: ir.Node, a: Known) -> Shapes:
    shape, depth = a.shape(node.inputs[0]), a.contents(node.inputs[1])
    if shape is None:
        return None
    place = resolve_axis(attribute(node, "axis", -1), len(shape) + 1)
    return [(*shape[:place], depth[0] if depth else Dim.unknown("depth"), *shape[place:])]


@shape_of("Shape")
def _shape(node: ir.Node, a: Known) -> Shapes:
    shape = a.shape(node.inputs[0])
    return [(Dim.unknown("rank"),)] if shape is None else [(Dim.of(len(shape_window(node, shape))),)]


@shape_of("Size")
def _size(node: ir.Node, a: Known) -> Shapes:
    return [()]


@shape_of("Concat", "com.microsoft::QLinearConcat")
def _concat(node: ir.Node, a: Known) -> Shapes:
    given = node.inputs if node.op_type == "Concat" else node.inputs[2::3]  # each with a scale and a zero point
    shapes = [a.shape(v) for v in given]
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
def _split(node: ir.Node, a: Known) -> Shapes:
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
        most = -(-size.const // count)
        return [Dim.of(min(most, size.const - i * most)) for i in range(count)]
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
    axes = [resolve_axis(axis, len(shape)) for axis in axes or range(len(starts))]
    is_possible = set(axes) <= set(range(len(shape))) and len({len(x) for x in (starts, ends, axes, steps)}) == 1
    if not is_possible:
        return None
    result = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        piece = _slice_axis(start, end, shape[axis], step)
        if piece is None:
            return None
        result.append((axis, *piece, step))
    return result


def _slice_axis(start: Dim, end: Dim, size: Dim, step: int) -> tuple[Dim, Dim] | None:
    """(first index, number of elements): ONNX counts negative bounds from the end and keeps both inside the axis."""
    if step < 0:
        whole = start.const is not None and (start == -1 or start.const >= _HUGE)
        whole = whole or start == size - 1
        return (size - 1, size) if step == -1 and whole and end.const is not None and end.const <= -_HUGE else None
    begin, stop = _clamped(start, size), _clamped(end, size)
    if begin is None and step == 1 and stop == size and (-start).is_at_least(0):
        length = size.last(-start)
        return size - length, length
    if begin is None or stop is None:
        return None
    length = Dim(algebra.pushed((stop - begin).expr)).maximum(0)
    # A start beyond the end needn't be kept inside: no element is there.
    begin = start if start.is_at_least(0) else begin
    return begin, length if step == 1 else quotient(length + (step - 1), Dim.of(step))


def _clamped(bound: Dim, size: Dim) -> Dim | None:
    """A start or end as ONNX reads it; None where its sign isn't known."""
    if bound.const is not None and bound.const >= _HUGE:
        return size
    if bound.is_at_least(0):
        return bound.minimum(size)
    return (bound + size).maximum(0) if (-bound - 1).is_at_least(0) else None


@shape_of("Slice")
def _slice(node: ir.Node, a: Known) -> Shapes:
    shape = a.shape(node.inputs[0])
    if shape is None:
        return None
    dims = list(shape)
    pieces = slice_of(node, a, shape)
    if pieces is not None:
        for axis, _, size, _ in pieces:
            dims[axis] = size
        return [tuple(dims)]
    axes = constant_ints(node, a, 3, "axes")
    changed = range(len(shape)) if axes is None else {resolve_axis(axis, len(shape)) for axis in axes}
    return [tuple(Dim.unknown("slice") if axis in changed else d for axis, d in enumerate(dims))]


@shape_of("Gather")
def _gather(node: ir.Node, a: Known) -> Shapes:
    shape, index = a.shape(node.inputs[0]), a.shape(node.inputs[1])
    if shape is None or index is None:
        return None
    axis = resolve_axis(attribute(node, "axis", 0), len(shape))
    return [shape[:axis] + index + shape[axis + 1 :]]


@shape_of("GatherElements")
def _gather_elements(node: ir.Node, a: Known) -> Shapes:
    return [a.shape(node.inputs[1])]


@shape_of("GatherND")
def _gather_nd(node: ir.Node, a: Known) -> Shapes:
    shape, index = a.shape(node.inputs[0]), a.shape(node.inputs[1])
    depth = index[-1].const if index else None
    if shape is None or not index or depth is None:
        return None
    return [index[:-1] + shape[attribute(node, "batch_dims", 0) + depth :]]


def shape_window(node: ir.Node, shape: Shape) -> Shape:
    return shape[slice(attribute(node, "start", 0), attribute(node, "end"))]
