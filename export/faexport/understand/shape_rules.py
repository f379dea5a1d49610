# SPDX-License-Identifier: Apache-2.0
"""How ops determine the symbolic shapes of their outputs and the contents of integer tensors. Read by shapes.Analysis
only.

A shape rule returns one shape per output or None (nothing known); a content rule the elements of the first output, or
None. An op without rule costs no correctness: its outputs have the file's shape or none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from faexport.understand.dims import Dim, product
from faexport.understand.nodes import attribute, operand

if TYPE_CHECKING:
    from faexport.understand.shapes import Analysis

Shape = tuple[Dim, ...]
ShapeRule = Callable[[ir.Node, "Analysis"], Sequence[Shape | None] | None]
ContentRule = Callable[[ir.Node, "Analysis"], Shape | None]

SHAPE_RULES: dict[str, ShapeRule] = {}
CONTENT_RULES: dict[str, ContentRule] = {}
ONE = Dim.of(1)
SHAPE_OF_FIRST_INPUT = (
    "Identity Cast CastLike Softmax LogSoftmax Relu Gelu Erf Tanh Sigmoid Sqrt Neg Exp Log Abs Not IsNaN IsInf "
    "Reciprocal Floor Ceil Round Sin Cos Clip Trilu CumSum Dropout LeakyRelu Elu Softplus HardSigmoid HardSwish "
    "Swish Sign LayerNormalization RMSNormalization InstanceNormalization BatchNormalization GroupNormalization "
    "LpNormalization ScatterND ScatterElements RotaryEmbedding Mish Selu QuantizeLinear DequantizeLinear "
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
    fixed = [d for d in wide if d.const is not None]
    if fixed:
        return fixed[0]
    return ONE if not wide else wide[0] if len(wide) == 1 else Dim.unknown("broadcast")


def resolve_axis(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def constant_ints(node: ir.Node, a: Analysis, index: int, name: str) -> list[int] | None:
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
    equation = attribute(node, "equation", "").replace(" ", "")
    if "->" not in equation or "." in equation:
        return None
    left, out = equation.split("->")
    sizes: dict[str, Dim] = {}
    for letters, value in zip(left.split(","), node.inputs, strict=True):
        shape = a.shape(value)
        if shape is None or len(shape) != len(letters):
            return None
        for letter, dim in zip(letters, shape, strict=True):
            if letter not in sizes or sizes[letter] == 1:
                sizes[letter] = dim
    return [tuple(sizes[letter] for letter in out)]


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
    return [(Dim.unknown("rank"),)] if shape is None else [(Dim.of(len(_window(node, shape))),)]


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


def split_sizes(node: ir.Node, a: Analysis, size: Dim) -> list[Dim] | None:
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


def slice_of(node: ir.Node, a: Analysis, shape: Shape) -> list[tuple[int, Dim, Dim, int]] | None:
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
    if start.const is not None and start.const < 0:
        start = size + start
    if end.const is not None and end.const < 0:
        end = size + end
    if end.const is not None and (end.const >= 2**31 - 1 or (size.const is not None and end.const > size.const)):
        end = size
    length = end - start
    if any(c < 0 for c in length.terms.values()) or not (_fits(end, size)):
        return None
    if step != 1:
        return None if length.const is None else (start, Dim.of(-(-length.const // step)))
    return start, length


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
    cut = {resolve_axis(x, len(shape)) for x in axes}
    return [tuple(Dim.unknown("slice") if i in cut else d for i, d in enumerate(shape))]


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


def _window(node: ir.Node, shape: Shape) -> Shape:
    return shape[slice(attribute(node, "start", 0), attribute(node, "end"))]


@contents_of("Shape")
def _contents_shape(node, a):
    shape = a.shape(node.inputs[0])
    return None if shape is None else _window(node, shape)


@contents_of("Size")
def _contents_size(node, a):
    shape = a.shape(node.inputs[0])
    return None if shape is None else (product(shape),)


@contents_of("Identity", "Unsqueeze", "Squeeze", "Reshape", "Flatten")
def _contents_same(node, a):
    contents, rank = a.contents(node.inputs[0]), a.rank(node.outputs[0])
    if node.op_type == "Reshape":
        rank = 1 if a.contents(operand(node, 1)) is None else len(a.contents(operand(node, 1)))
    return contents if rank is None or rank <= 1 else None


@contents_of("Cast")
def _contents_cast(node, a):
    integer = attribute(node, "to") in (int(ir.DataType.INT64), int(ir.DataType.INT32))
    return a.contents(node.inputs[0]) if integer else None


@contents_of("Concat")
def _contents_concat(node, a):
    parts = [a.contents(v) for v in node.inputs]
    return None if any(p is None for p in parts) else tuple(itertools.chain.from_iterable(parts))


@contents_of("Gather")
def _contents_gather(node, a):
    data, index = a.contents(node.inputs[0]), a.constant(node.inputs[1])
    if data is None or index is None or index.ndim > 1 or attribute(node, "axis", 0) not in (0, -1):
        return None
    if any(not -len(data) <= i < len(data) for i in index.reshape(-1)):
        return None
    return tuple(data[int(i)] for i in index.reshape(-1))


@contents_of("Slice")
def _contents_slice(node, a):
    data = a.contents(node.inputs[0])
    if data is None:
        return None
    bounds = [constant_ints(node, a, i, n) for i, n in ((1, "starts"), (2, "ends"), (4, "steps"))]
    if bounds[0] is None or bounds[1] is None or len(bounds[0]) != 1:
        return None
    return data[slice(bounds[0][0], bounds[1][0], (bounds[2] or [1])[0])]


@contents_of("Add", "Sub", "Mul", "Div")
def _contents_arithmetic(node, a):
    x, y = (a.contents(v) for v in node.inputs)
    if x is None or y is None or (len(x) != len(y) and 1 not in (len(x), len(y))):
        return None
    count = max(len(x), len(y))
    x, y = (p * count if len(p) == 1 else p for p in (x, y))
    return tuple(_arithmetic(node.op_type, p, q) for p, q in zip(x, y, strict=True))


def _arithmetic(name: str, x: Dim, y: Dim) -> Dim:
    if name != "Div":
        return {"Add": x + y, "Sub": x - y, "Mul": x * y}[name]
    if x.const is not None and y.const:
        return Dim.of(int(x.const / y.const))
    exact = x.divide(y)
    return Dim.of(f"({x})//({y})") if exact is None else exact


@contents_of("Where")
def _contents_where(node, a):
    """The idiom `Where(shape == -1, 1, shape)`: sizes are never negative, so a symbol is never -1."""
    condition, x, y = node.inputs
    test = condition.producer()
    if test is None or test.op_type != "Equal":
        return None
    left, right, yes, no = (a.contents(v) for v in (*test.inputs, x, y))
    if None in (left, right, yes, no) or not len(left) == len(right) == len(yes) == len(no):
        return None
    result = []
    for p, q, if_equal, if_not in zip(left, right, yes, no, strict=True):
        equal = True if p == q else False if _never_equal(p, q) else None
        if equal is None and if_equal != if_not:
            return None
        result.append(if_equal if equal else if_not)
    return tuple(result)


def _never_equal(p: Dim, q: Dim) -> bool:
    difference = p - q
    if difference.const is not None:
        return difference.const != 0
    signs = {c > 0 for c in difference.terms.values()}
    return len(signs) == 1 and difference.terms.get((), 0) != 0


@contents_of("ConstantOfShape")
def _contents_constant_of_shape(node, a):
    length, fill = a.contents(node.inputs[0]), attribute(node, "value")
    if length is None or len(length) != 1 or length[0].const is None or fill is None or length[0].const > 32:
        return None
    if fill.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    return (Dim.of(int(fill.numpy().reshape(-1)[0])),) * length[0].const


@contents_of("ReduceProd")
def _contents_reduce_prod(node, a):
    contents = a.contents(node.inputs[0])
    return None if contents is None else (product(contents),)
