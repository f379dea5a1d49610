# SPDX-License-Identifier: Apache-2.0
"""How large the numbers are that are added to scores: like scores, or like a mask's. Called by terms.py and others."""

from __future__ import annotations

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import FLOATS
from faexport.sizes import algebra as ia
from faexport.sizes.algebra import Expr
from faexport.understand.index import logic as il
from faexport.understand.shapes.constants import tensor_of

# A fill above this is a number like any other; at or below it a softmax weight is 0 beside any usual score.
MASKING = -1e4
_MANTISSA_BITS = {ir.DataType.FLOAT16: 10, ir.DataType.BFLOAT16: 7, ir.DataType.FLOAT: 23, ir.DataType.DOUBLE: 52}
_MOST_VALUES = 32  # in front of a computed bias that are looked at for numbers of a mask
_MOST_NUMBERS = 1 << 20
_BOUNDED = ("Sigmoid", "Tanh", "Softmax", "Normalization")
_MOVING = (
    "Gather",
    "GatherND",
    "GatherElements",
    "Slice",
    "Reshape",
    "Expand",
    "Tile",
    "Trilu",
    "Unsqueeze",
    "Squeeze",
)
_DATA = {"Where": (1, None), **dict.fromkeys(_MOVING, (0, 1))}  # inputs whose numbers the result has
_MIXING = ("MatMul", "Gemm", "Conv", "Einsum", "Reduce")
_FINE = 2.0**14  # beside smaller numbers, float32 keeps 2^-10 of a score
_FINEST = 2.0**10  # … and 2^-14
ABSORBS = {ir.DataType.FLOAT16: -6e4, ir.DataType.FLOAT: -1e30, ir.DataType.BFLOAT16: -1e30, ir.DataType.DOUBLE: -1e30}


def step_beside(number: float, dtype: ir.DataType) -> float:
    """The distance of neighbouring numbers of a float type beside this one: what a sum with it leaves of scores."""
    return 2.0 ** (math.floor(math.log2(abs(number))) - _MANTISSA_BITS[dtype])


def coarse(dtype: ir.DataType) -> float:
    """The number from which on such steps are 1/2 and more."""
    return 2.0 ** (_MANTISSA_BITS[dtype] - 1)


def is_moderate(e: Expr, limit: float = -MASKING) -> bool:
    """Is a bias a number like a score, far from any fill? Not if it has a huge constant in it, or comes from the
    user."""
    numbers = (abs(il.number_of(number)) for number in ia.atoms(e, "float"))
    return all(number < limit for number in numbers) and _are_tables_below(e, limit)


def keeps_scores(e: Expr) -> bool:
    """Do scores keep their last bits beside a bias, or nothing at all? Not beside what comes from the user."""
    numbers = (abs(il.number_of(number)) for number in ia.atoms(e, "float"))
    absorbing = -ABSORBS[ir.DataType.FLOAT]
    return all(n == 0 or 1 / _FINE <= n < _FINE or n >= absorbing for n in numbers) and _are_tables_below(e, _FINE)


def fill_keeps_scores(fill: float) -> bool:
    """The same of a number that is proven to hide keys: a row in which it hides all of them is compared, too. Rounding
    beside 2^10 changes a weight by 1e-4 at most."""
    return -_FINEST < fill or fill <= ABSORBS[ir.DataType.FLOAT]


def _are_tables_below(e: Expr, limit: float) -> bool:
    """Are all float numbers that a bias is read from stored ones, and smaller?"""
    for atom in ia.atoms(e, "load"):
        if atom.kind == "float":
            if atom.args[0].is_graph_input() or not _are_numbers_below(atom.args[0], limit):
                return False
    return True


def _are_numbers_below(value: ir.Value, limit: float) -> bool:
    """Are the stored numbers smaller that a tensor is, or is made of by a few nodes? Behind a softmax, a sigmoid or a
    normalization their size is lost. What the user gives is not, where it comes element by element."""
    pending, seen, given = [value], {value}, {value}
    while pending and len(seen) < _MOST_VALUES:
        value = pending.pop(0)
        constant, node = tensor_of(value), value.producer()
        if constant is not None:
            if constant.size > _MOST_NUMBERS and value not in given:
                continue  # weights
            if constant.dtype in FLOATS and not np.abs(constant.numpy().astype(np.float64)).max(initial=0) < limit:
                return False
        elif node is None:
            if value in given and value.dtype in FLOATS and value.is_graph_input():
                return False
        elif not _standard_op(value).endswith(_BOUNDED):
            first, last = _DATA.get(_standard_op(value), (0, None))
            new = dict.fromkeys(v for v in node.inputs[first:last] if v is not None and v not in seen)
            pending += new
            seen.update(new)
            given.update(new if value in given and not _standard_op(value).startswith(_MIXING) else ())
    return True


def magnitude(e: Expr) -> float:
    """What the absolute value of a float element is proven not to exceed; infinity where nothing is."""
    found = _magnitude(e)
    dtype = e.args[1] if e.op in ("fop", "cast", "float") else None
    fits = found <= (largest(dtype) if dtype is not None else math.inf)
    return found if fits else math.inf  # what overflows on the way, and NaN


def largest(dtype: ir.DataType) -> float:
    """The largest number of a float type."""
    return float(ml_dtypes.finfo(dtype.numpy()).max)


def _magnitude(e: Expr) -> float:
    if e.op == "float":
        return abs(il.number_of(e))
    if e.op == "load":
        return _of_stored(e.args[0])
    if e.op == "choose":
        return max(magnitude(e.args[1]), magnitude(e.args[2]))
    if e.op == "cast":
        return 2.0**63 if e.args[0].kind == "int" else magnitude(e.args[0])
    if e.op != "fop":
        return math.inf
    parts = [magnitude(x) for x in e.args[2:]]
    if e.args[0] in ("Add", "Sub"):
        return sum(parts)
    if e.args[0] == "Mul":
        return math.inf if math.inf in parts else math.prod(parts)
    if e.args[0] in ("Neg", "Abs", "Min", "Max"):
        return max(parts)
    return 1.0 if e.args[0] in ("Tanh", "Sign") else math.inf


def known_range(e: Expr) -> tuple[float, float]:
    """The least and the largest number that a float element may be, as far as the file tells numbers; 0 stands for what
    it does not tell."""
    parts = [known_range(x) for x in e.args if isinstance(x, Expr) and x.kind == "float"]
    if e.op == "float":
        return (il.number_of(e),) * 2 if not math.isnan(il.number_of(e)) else (0.0, 0.0)
    if e.op == "load":
        constant = _table_of(e.args[0])
        numbers = np.zeros(1) if constant is None else constant.numpy().astype(np.float64)
        return float(np.nanmin(numbers, initial=0)), float(np.nanmax(numbers, initial=0))
    if e.op in ("choose", "cast") and parts:
        return min(low for low, _ in parts), max(high for _, high in parts)
    if e.op != "fop" or not parts:
        return 0.0, 0.0
    (low, high), (least, most) = parts[0], parts[-1]
    if e.args[0] in _RANGES:
        return _RANGES[e.args[0]](low, high, least, most)
    if e.args[0] == "Mul":
        corners = [x * y for x in (low, high) for y in (least, most) if x != 0 and y != 0]
        return min(corners, default=0.0), max(corners, default=0.0)
    return 0.0, 0.0


_RANGES: dict[str, Callable[[float, float, float, float], tuple[float, float]]] = {
    "Add": lambda low, high, least, most: (low + least, high + most),
    "Sub": lambda low, high, least, most: (low - most, high - least),
    "Min": lambda low, high, least, most: (min(low, least), min(high, most)),
    "Max": lambda low, high, least, most: (max(low, least), max(high, most)),
    "Neg": lambda low, high, *_: (-high, -low),
}


def may_be_infinite(e: Expr) -> bool:
    """May a float element be -inf?"""
    if e.op == "choose":
        return any(map(may_be_infinite, e.args[1:]))
    if e.op == "fop" and e.args[0] == "Max":
        return all(map(may_be_infinite, e.args[2:]))
    if e.op == "fop" and e.args[0] == "Min":
        return any(map(may_be_infinite, e.args[2:]))
    return magnitude(e) == math.inf


def _of_stored(value: ir.Value) -> float:
    """Of the elements of a constant, or of what is read from one at indices that are made when the model runs."""
    if _standard_op(value) in ("Sigmoid", "Tanh", "Softmax"):
        return 1.0
    constant = _table_of(value)
    return math.inf if constant is None else float(np.abs(constant.numpy().astype(np.float64)).max(initial=0))


def _standard_op(value: ir.Value) -> str:
    """The name of the operator of ONNX that makes the value, or ""."""
    node = value.producer()
    return node.op_type if node is not None and node.domain in ("", "ai.onnx") else ""


def _table_of(value: ir.Value) -> ir.TensorProtocol | None:
    """The constant, or that which a Gather reads."""
    node = value.producer()
    table = node.inputs[0] if node is not None and _standard_op(value) == "Gather" else value
    return None if table is None else tensor_of(table)
