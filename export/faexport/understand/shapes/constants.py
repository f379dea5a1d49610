# SPDX-License-Identifier: Apache-2.0
"""The one place that says what is constant, and evaluates small constant subgraphs with NumPy, as the constant folding
of onnxruntime would.

An initializer that is also an input of the model is no constant: a caller may give another one. Only tensors of at most
MAX_ELEMENTS are computed; the graph is not changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import attribute, op, operand

MAX_ELEMENTS = 1 << 16

Arrays = Sequence[np.ndarray | None]  # of a node's inputs; None for an optional one that is left out
Fold = Callable[[ir.Node, Sequence[Any]], np.ndarray]  # of arrays, likewise; called where those that must be there are
FOLD: dict[str, Fold] = {}


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node, whatever its size; else None."""
    if value is None or value.is_graph_input():
        return None
    tensor, node = value.const_value, value.producer()
    if tensor is None and node is not None:
        tensor = _of_node(node) if op(node) == "Constant" else None
    return None if tensor is None or tensor.dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED) else tensor


def _of_node(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a Constant node, in whichever attribute it stands."""
    tensor = attribute(node, "value")
    for name, dtype in _IN_ATTRIBUTES.items():
        if tensor is None and name in node.attributes:
            tensor = ir.tensor(np.array(attribute(node, name), dtype))
    return tensor


_IN_ATTRIBUTES = {"value_float": np.float32, "value_int": np.int64, "value_floats": np.float32, "value_ints": np.int64}


def _register(*names: str) -> Callable[[Fold], Fold]:
    def add(function: Fold) -> Fold:
        FOLD.update(dict.fromkeys(names, function))
        return function

    return add


_BINARY: dict[str, Callable[..., np.ndarray]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Equal": np.equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "And": np.logical_and,
    "Or": np.logical_or,
    "Xor": np.logical_xor,
}
_UNARY: dict[str, Callable[..., np.ndarray]] = {
    "Sqrt": np.sqrt,
    "Neg": np.negative,
    "Exp": np.exp,
    "Log": np.log,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Abs": np.abs,
    "Reciprocal": np.reciprocal,
    "Not": np.logical_not,
    "Identity": np.asarray,
    "IsNaN": np.isnan,
}
BROADCAST = {*_BINARY, "Pow", "Div", "Mod", "Where", "Min", "Max"}


def _on_operands(function: Callable[..., np.ndarray], count: int) -> Fold:
    return lambda node, x: function(*x[:count])


for _table, _count in ((_BINARY, 2), (_UNARY, 1)):
    FOLD.update({name: _on_operands(function, _count) for name, function in _table.items()})


@_register("Pow")
def _pow(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    return np.power(x[0], x[1]).astype(x[0].dtype)  # the exponent may be of another type


@_register("Div")
def _div(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    if np.issubdtype(x[0].dtype, np.integer):
        return (np.sign(x[0]) * np.sign(x[1]) * (abs(x[0]) // abs(x[1]))).astype(x[0].dtype)
    return x[0] / x[1]


@_register("Cast")
def _cast(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    return _converted(x[0], ir.DataType(attribute(node, "to")).numpy())


@_register("CastLike")
def _cast_like(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    return _converted(x[0], x[1].dtype)


def _converted(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Integers wrap around, as they do in runtimes; a float outside of the integer type has no defined value. Texts
    are not computed."""
    if dtype == np.object_:
        raise ValueError("a cast to text")
    if np.issubdtype(dtype, np.integer) and not np.issubdtype(x.dtype, np.integer) and x.dtype != np.bool_:
        limits, wide = np.iinfo(dtype), x.astype(np.float64)
        if not ((wide > float(limits.min) - 1) & (wide < float(limits.max))).all():
            raise ValueError("a float is outside of the integers that it is cast to")
    return x.astype(dtype)


@_register("Mod")
def _mod(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    return (np.fmod if attribute(node, "fmod", 0) else np.mod)(x[0], x[1])


@_register("Where")
def _where(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    return np.where(x[0], x[1], x[2])


@_register("Min")
def _min(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    return np.minimum.reduce(np.broadcast_arrays(*x))


@_register("Max")
def _max(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    return np.maximum.reduce(np.broadcast_arrays(*x))


@_register("Unsqueeze")
def _unsqueeze(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    axes = attribute(node, "axes") if len(x) < 2 or x[1] is None else x[1].reshape(-1).tolist()
    return np.expand_dims(x[0], tuple(axes))


@_register("Squeeze")
def _squeeze(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    axes = attribute(node, "axes") if len(x) < 2 or x[1] is None else x[1].reshape(-1).tolist()
    return np.squeeze(x[0], None if axes is None else tuple(axes))


@_register("Reshape")
def _reshape(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    shape = [
        x[0].shape[i] if d == 0 and not attribute(node, "allowzero", 0) else d for i, d in enumerate(x[1].tolist())
    ]
    return x[0].reshape(shape)


@_register("Transpose")
def _transpose(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    return np.transpose(x[0], attribute(node, "perm"))


@_register("Concat")
def _concat(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    return np.concatenate(x, axis=attribute(node, "axis"))


@_register("Gather")
def _gather(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    return np.take(x[0], x[1], axis=attribute(node, "axis", 0))


@_register("Expand")
def _expand(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    return np.broadcast_to(x[0], np.broadcast_shapes(x[0].shape, tuple(x[1].tolist())))


@_register("Tile")
def _tile(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    return np.tile(x[0], tuple(x[1].tolist()))


@_register("ConstantOfShape")
def _constant_of_shape(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    fill = attribute(node, "value")
    fill = np.zeros(1, np.float32) if fill is None else fill.numpy()
    return np.full(tuple(x[0].tolist()), fill.reshape(-1)[0], fill.dtype)


@_register("Range")
def _range(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    return np.arange(x[0].item(), x[1].item(), x[2].item(), dtype=x[0].dtype)


@_register("Trilu")
def _trilu(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    k = 0 if len(x) < 2 or x[1] is None else int(x[1].item())
    return np.triu(x[0], k) if attribute(node, "upper", 1) else np.tril(x[0], k)


@_register("Slice")
def _slice(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    def ints(index: int, name: str, default: list[int]) -> list[int]:
        found = x[index] if len(x) > index else None
        if found is not None:
            return found.reshape(-1).tolist()
        return attribute(node, name, default)

    starts, ends = ints(1, "starts", []), ints(2, "ends", [])
    axes = ints(3, "axes", list(range(len(starts))))
    steps = ints(4, "steps", [1] * len(starts))
    index = [slice(None)] * x[0].ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = slice(start, None if step < 0 and end < -x[0].shape[axis] else end, step)
    return x[0][tuple(index)]


@_register("DequantizeLinear", "com.microsoft::DequantizeLinear")
def _dequantize_linear(node: ir.Node, x: Sequence[Any]) -> np.ndarray:
    numbers, scale, zero = (*x, None)[:3]
    if attribute(node, "block_size", 0) or attribute(node, "output_dtype", 0) or scale.ndim > 1:
        raise ValueError("scales of blocks, or a result of another type")
    wide = numbers.astype(np.float32)
    along = [1] * wide.ndim
    if scale.ndim == 1 and scale.size > 1:
        along[attribute(node, "axis", 1)] = scale.size
    factor, offset = (0 if v is None else v.astype(np.float32).reshape(along) for v in (scale, zero))
    return ((wide - offset) * factor).reshape(numbers.shape).astype(scale.dtype)


def _num_elements(node: ir.Node, x: Arrays) -> float:
    """How many the result has, of operators that make more than they are given; known before anything is computed."""
    given = [v for v in x if v is not None]
    if op(node) == "Range":
        start, limit, delta = (float(v.reshape(-1)[0]) for v in given)
        return 0 if delta == 0 else (limit - start) / delta  # NumPy refuses a step of 0
    if op(node) == "Tile":
        return math.prod(map(float, [given[0].size, *given[1].reshape(-1)]))
    if op(node) in ("Expand", "ConstantOfShape"):
        return math.prod(map(float, given[-1].reshape(-1)))
    if op(node) in BROADCAST:
        return math.prod(map(float, np.broadcast_shapes(*(v.shape for v in given))))
    return 0


def fold(node: ir.Node, inputs: Arrays, most: int = MAX_ELEMENTS) -> np.ndarray | None:
    """The first output of `node` for constant inputs, or None where the op isn't known, fails or yields too much."""
    function = FOLD.get(op(node))
    if function is None or any(x is None and operand(node, i) is not None for i, x in enumerate(inputs)):
        return None
    try:
        if _num_elements(node, inputs) > most:
            return None
        with np.errstate(all="ignore"):
            result = np.asarray(function(node, inputs))
    except (ValueError, IndexError, TypeError, KeyError, ArithmeticError, np.exceptions.AxisError):
        return None
    return result if result.size <= most else None
