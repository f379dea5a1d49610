# SPDX-License-Identifier: Apache-2.0
"""The nodes that compare two tensors inside a model, and the reading of what they put out. Called by side_by_side.py
and site_check.py.

A comparison is one float32 vector, so that tensors of any size cost no memory outside of the runtime.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import attribute, operand

_FLOAT = ir.DataType.FLOAT
_fresh = itertools.count()


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What one comparison says; the fields are the elements of the vector, in this order."""

    max_abs_diff: float  # where both are numbers
    magnitude: float  # of the original's largest number
    num_broken: float  # numbers that are none in the other, or infinities that are not the same
    num_lost: float  # NaN in the original, not in the other
    num_lost_to_numbers: float  # of these: not 0 in the other
    num_numbers: float
    num_bad_inputs: float  # NaN or +inf in what both read
    num_other_sizes: float  # axes of another size
    # Largest differences from the same in float32, or where it attends all keys (all_keys.py), 0 without a twin
    twin_to_old: float
    twin_to_new: float
    # Distances from the same without quantization, of its root mean square: of the original and of ours
    unquantized_to_old: float
    unquantized_to_new: float
    num_flipped: float  # numbers of a quantized cache that are neighbours of the original's
    # Of the original with all of its roundings, where those are half precision's:
    twin_to_rounded: float
    rounded_to_new: float
    num_unlike_rounded: float  # no numbers, or other infinities, on one side alone; NaN there and 0 in ours is alike
    num_rounded: float  # numbers; 0 where it isn't there

    @classmethod
    def read(cls, array: np.ndarray) -> Statistics:
        """Of the vector, or of those of all iterations of a loop: the largest of each."""
        rows = array.reshape(-1, NUM_STATISTICS)
        return cls(*map(float, rows.max(axis=0))) if len(rows) else cls(*[0.0] * NUM_STATISTICS)


NUM_STATISTICS = len(dataclasses.fields(Statistics))


class Emit:
    """Appends nodes to a graph; constants become initializers of the main graph."""

    def __init__(self, graph: ir.Graph, main: ir.Graph):
        self.graph, self.main = graph, main

    def __call__(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        self.graph.append(node)
        self.name(node)
        return node.outputs[0]

    @staticmethod
    def name(node: ir.Node) -> None:
        node.name = f"faexport_check_{node.op_type}_{next(_fresh)}"
        node.outputs[0].name = f"{node.name}_output"

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self("Cast", value, to=int(dtype))

    def constant(self, tensor: ir.TensorProtocol | np.ndarray) -> ir.Value:
        name = f"faexport_check_constant_{next(_fresh)}"
        tensor = ir.tensor(tensor, name=name) if isinstance(tensor, np.ndarray) else tensor
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.main.register_initializer(value)
        return value

    def count(self, flags: ir.Value) -> ir.Value:
        """How many elements of a bool tensor are true: a float32 scalar."""
        return self("ReduceSum", self.padded(self.cast(flags, _FLOAT)), keepdims=0)

    def largest(self, numbers: ir.Value) -> ir.Value:
        """Of numbers >= 0; 0 where there are none."""
        return self("ReduceMax", self.padded(numbers), keepdims=0)

    def padded(self, numbers: ir.Value) -> ir.Value:
        """As a vector with one more element, 0: never empty."""
        flat = self("Reshape", numbers, self.constant(np.array([-1], np.int64)))
        return self("Concat", flat, self.constant(np.zeros(1, np.float32)), axis=0)

    def count_bad(self, value: ir.Value) -> ir.Value:
        """How many elements are NaN or +inf."""
        infinity = self.constant(np.array(np.inf, np.float32))
        return self.count(self("Not", self("Less", self.cast(value, _FLOAT), infinity)))

    def count_no_divisor(self, value: ir.Value) -> ir.Value:
        """How many elements a number can't be divided by: NaN, infinite or 0."""
        number, infinity = self.cast(value, _FLOAT), self.constant(np.array(np.inf, np.float32))
        fit = self("And", self("Less", self("Abs", number), infinity), self("Cast", number, to=int(ir.DataType.BOOL)))
        return self.count(self("Not", fit))


def settled(
    emit: Emit, old: ir.Value, new: ir.Value, twin: ir.Value | None
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """The three with 0 wherever GroupQueryAttention, which made `old`, says nothing of an element (decoders.py): rows
    of a cache that hold no key yet, and rows of a query beyond its length. Others stay as they are."""
    node = old.producer()
    if node is None or node.op_type != "GroupQueryAttention":
        return old, new, twin
    column = emit.constant(np.array([-1, 1]))
    last, chunks = operand(node, 5), operand(node, 16)
    if last is None:
        return old, new, twin
    zero, one = (emit.constant(np.array(n)) for n in (0, 1))
    used = emit("Add", emit("Reshape", emit.cast(last, ir.DataType.INT64), column), one)
    axis = 1 if old.index() == 0 else 2
    rows = emit("Gather", emit("Shape", old), emit.constant(np.array(axis)), axis=0)
    if axis == 1 and chunks is not None:
        used = emit("Min", used, emit("Reshape", emit.cast(chunks, ir.DataType.INT64), column))
    if axis == 2 and attribute(node, "sliding_window_cache", 0):
        used = _rows_of_ring(emit, used, rows, attribute(node, "local_window_size", -1))
    there = emit("Less", emit("Range", zero, rows, one), used)
    shape = {1: [0, -1, 1], 2: [0, 1, -1, 1]}[axis]
    there = emit("Reshape", there, emit.constant(np.array(shape)))
    nothing = emit.constant(np.array(0, np.float32))

    def kept(value: ir.Value) -> ir.Value:
        return emit("Where", there, emit.cast(value, _FLOAT), nothing)

    return kept(old), kept(new), None if twin is None else kept(twin)


def _rows_of_ring(emit: Emit, keys: ir.Value, capacity: ir.Value, window: int) -> ir.Value:
    """How many of so many keys a cache keeps (docs/operator.md, "Windows")."""
    zero, one = (emit.constant(np.array(n)) for n in (0, 1))
    group = emit("Sub", capacity, emit.constant(np.array(window - 1)))
    over = emit("Max", emit("Sub", keys, capacity), zero)
    times = emit("Div", emit("Sub", emit("Add", over, group), one), group)
    return emit("Sub", keys, emit("Mul", group, times))


def bits_of(value: ir.Value) -> int:
    """Of a number of the quantized cache that a node gives on; 0 where the value is none."""
    node, bits = value.producer(), {ir.DataType.INT8: 8, ir.DataType.UINT8: 4, ir.DataType.FLOAT8E4M3FN: 8}
    is_cache = (
        node is not None and node.op_type in ("GroupQueryAttention", "PagedAttention") and value.index() in (1, 2)
    )
    return bits.get(value.dtype, 0) if is_cache and value.dtype is not None else 0


def _apart(emit: Emit, a: ir.Value, b: ir.Value, bits: int) -> ir.Value:
    """How far two int64 tensors of quantized numbers are apart. A byte of two numbers is as far as the farther one."""
    if bits == 8:
        return emit("Abs", emit("Sub", a, b))
    sixteen = emit.constant(np.array(16))
    high = [emit("Div", x, sixteen) for x in (a, b)]
    low = [emit("Sub", x, emit("Mul", y, sixteen)) for x, y in zip((a, b), high, strict=True)]
    return emit("Max", *(emit("Abs", emit("Sub", *pair)) for pair in (high, low)))


def _are_neighbours(emit: Emit, a: ir.Value, b: ir.Value, sizes: Sequence[ir.Value]) -> ir.Value:
    """Which numbers of e4m3, given as float32, are one step apart: 2^-9 where there is no leading 1, else between 1/16
    and 1/9 of the larger one. Two steps are 1/8 of it at least."""
    apart = emit("Abs", emit("Sub", a, b))
    limit = emit("Mul", emit("Max", *sizes), emit.constant(np.array(0.124, np.float32)))
    least = emit.constant(np.array(2.0**-9, np.float32))
    unequal = emit("Greater", apart, emit.constant(np.array(0, np.float32)))
    return emit("And", unequal, emit("Not", emit("Greater", apart, emit("Max", limit, least))))


def statistics(
    emit: Emit,
    old: ir.Value,
    new: ir.Value,
    twin: ir.Value | None,
    num_bad: Sequence[ir.Value],
    *,
    rounded: ir.Value | None = None,
    nan: ir.Value | None = None,
    exact: bool,
    bits: int = 0,
    floats: tuple[ir.Value, ir.Value] | None = None,
) -> ir.Value:
    """Appends the comparison of `new` with `old`; the vector that Statistics.read takes.

    Args:
        twin: `old` in float32.
        num_bad: counts for each tensor that they are made from.
        rounded: `old` with all of its roundings (roundings.py), given with a twin.
        nan: the original's own value where `old` isn't quite that; it tells which elements are NaN in the original.
        exact: integers or bools; they are compared as they are.
        bits: of the numbers of a quantized cache (bits_of), where neighbours are counted by themselves.
        floats: the same without quantization, in float32, and the original's own.
    """
    # NOTE: onnxruntime has no Shape of float8 tensors, so it is asked for that of the numbers that are compared.
    a, b = (emit.cast(v, ir.DataType.INT64 if exact else _FLOAT) for v in (old, new))
    other_sizes = emit("Not", emit("Equal", emit("Shape", a), emit("Shape", b)))
    found = {"num_other_sizes": emit.count(other_sizes)}
    if exact:
        return _vector(emit, found | _of_integers(emit, a, b, bits))
    found |= _of_floats(emit, a, b, twin, bits)
    if twin is not None and rounded is not None:
        found |= _of_rounded(emit, emit.cast(rounded, _FLOAT), b, emit.cast(twin, _FLOAT))
    if nan is not None and nan is not old:
        lost = emit("And", emit("IsNaN", emit.cast(nan, _FLOAT)), emit("Not", emit("IsNaN", b)))
        found["num_lost"] = emit.count(lost)
    if num_bad:
        found["num_bad_inputs"] = emit("Sum", *num_bad)
    if floats is not None:
        distances = _distances(emit, floats[0], (floats[1], b))
        found["unquantized_to_old"], found["unquantized_to_new"] = distances
    return _vector(emit, found)


def _of_integers(emit: Emit, a: ir.Value, b: ir.Value, bits: int) -> dict[str, ir.Value]:
    """The fields of Statistics that two int64 tensors differ in."""
    equal = emit("Equal", a, b)
    unequal = emit("Not", equal)
    found = {"num_numbers": emit.count(emit("Equal", equal, equal))}
    if bits:
        neighbours = emit("Equal", _apart(emit, a, b, bits), emit.constant(np.array(1)))
        unequal, found["num_flipped"] = emit("Xor", unequal, neighbours), emit.count(neighbours)
    return found | {"num_broken": emit.count(unequal)}


def _of_floats(emit: Emit, a: ir.Value, b: ir.Value, twin: ir.Value | None, bits: int) -> dict[str, ir.Value]:
    """The fields of Statistics that two float32 tensors, the original's first, differ in."""
    infinity, zero = (emit.constant(np.array(x, np.float32)) for x in (np.inf, 0))
    size_a, size_b = emit("Abs", a), emit("Abs", b)
    number_a, number_b = emit("Less", size_a, infinity), emit("Less", size_b, infinity)
    nan_a, nan_b = emit("IsNaN", a), emit("IsNaN", b)

    def difference(x: ir.Value, y: ir.Value, where: ir.Value) -> ir.Value:
        return emit.largest(emit("Where", where, emit("Abs", emit("Sub", x, y)), zero))

    both, found = emit("And", number_a, number_b), {}
    if bits:
        neighbours = _are_neighbours(emit, a, b, (size_a, size_b))
        both, found["num_flipped"] = emit("And", both, emit("Not", neighbours)), emit.count(neighbours)
    infinite_a = emit("And", emit("Not", number_a), emit("Not", nan_a))
    unequal = emit("Or", nan_b, emit("Or", emit("Less", a, b), emit("Greater", a, b)))
    broken = emit("Or", emit("And", infinite_a, unequal), emit("And", number_a, emit("Not", number_b)))
    lost = emit("And", nan_a, emit("Not", nan_b))
    found |= {
        "max_abs_diff": difference(a, b, both),
        "magnitude": emit.largest(emit("Where", number_a, size_a, zero)),
        "num_broken": emit.count(broken),
        "num_lost": emit.count(lost),
        "num_lost_to_numbers": emit.count(emit("And", lost, emit("Greater", size_b, zero))),
        "num_numbers": emit.count(number_a),
    }
    if twin is not None:
        exact = emit.cast(twin, _FLOAT)
        known = emit("And", both, emit("Less", emit("Abs", exact), infinity))
        found |= {"twin_to_old": difference(exact, a, known), "twin_to_new": difference(exact, b, known)}
    return found


def _of_rounded(emit: Emit, rounded: ir.Value, new: ir.Value, twin: ir.Value) -> dict[str, ir.Value]:
    """The fields of Statistics about the original with all of its roundings."""
    infinity, zero = (emit.constant(np.array(x, np.float32)) for x in (np.inf, 0))
    numbers = [emit("Less", emit("Abs", value), infinity) for value in (rounded, new, twin)]

    def difference(other: ir.Value, is_number: ir.Value) -> ir.Value:
        apart = emit("Abs", emit("Sub", rounded, other))
        return emit.largest(emit("Where", emit("And", numbers[0], is_number), apart, zero))

    unlike = emit("Xor", numbers[0], numbers[1])
    hidden = emit("And", emit("IsNaN", rounded), emit("Equal", new, zero))
    other_infinity = emit("Or", emit("Less", rounded, new), emit("Greater", rounded, new))
    neither = emit("And", emit("Not", emit("Or", *numbers[:2])), other_infinity)
    return {
        "twin_to_rounded": difference(twin, numbers[2]),
        "rounded_to_new": difference(new, numbers[1]),
        "num_unlike_rounded": emit.count(emit("And", emit("Or", unlike, neither), emit("Not", hidden))),
        "num_rounded": emit.count(numbers[0]),
    }


def _distances(emit: Emit, exact: ir.Value, others: Sequence[ir.Value]) -> list[ir.Value]:
    """Of each of the others from the first: the root mean square of the differences, of that of the first. What is no
    number in any of them doesn't count."""
    infinity, zero = (emit.constant(np.array(x, np.float32)) for x in (np.inf, 0))
    values = [emit.cast(value, _FLOAT) for value in (exact, *others)]
    known = emit("Less", emit("Sum", *(emit("Abs", value) for value in values)), infinity)

    def square(value: ir.Value) -> ir.Value:
        kept = emit("Where", known, value, zero)
        return emit("ReduceSum", emit.padded(emit("Mul", kept, kept)), keepdims=0)

    whole = emit("Max", square(values[0]), emit.constant(np.array(1e-30, np.float32)))
    return [emit("Sqrt", emit("Div", square(emit("Sub", value, values[0])), whole)) for value in values[1:]]


def _vector(emit: Emit, found: dict[str, ir.Value]) -> ir.Value:
    """The fields of Statistics, in their order; 0 for what was not found."""
    shape, zero = emit.constant(np.array([1], np.int64)), emit.constant(np.array(0, np.float32))
    scalars = [found.get(field.name, zero) for field in dataclasses.fields(Statistics)]
    vector = emit("Concat", *(emit("Reshape", scalar, shape) for scalar in scalars), axis=0)
    vector.type = ir.TensorType(_FLOAT)
    return vector
