# SPDX-License-Identifier: Apache-2.0
"""How large the numbers are that are added to scores: like scores, or like a mask's. Called by terms.py and others."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import onnx_ir as ir

from faexport.sizes import algebra as ia
from faexport.sizes.algebra import Expr
from faexport.understand.index import logic as il
from faexport.understand.shapes.constants import tensor_of

# A fill above this is a number like any other; at or below it a softmax weight is 0 beside any usual score.
MASKING = -1e4
_FINE = 2.0**14  # beside smaller numbers, float32 keeps 2^-10 of a score
_FINEST = 2.0**10  # … and 2^-14
ABSORBS = {ir.DataType.FLOAT16: -6e4, ir.DataType.FLOAT: -1e30, ir.DataType.BFLOAT16: -1e30, ir.DataType.DOUBLE: -1e30}


def is_moderate(e: Expr) -> bool:
    """Is a bias a number like a score, far from any fill? Not if it has a huge constant in it, or comes from the
    user."""
    numbers = (abs(il.number_of(number)) for number in ia.atoms(e, "float"))
    return all(number < -MASKING for number in numbers) and _are_tables_below(e, -MASKING)


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
            constant = tensor_of(atom.args[0])
            if atom.args[0].is_graph_input():
                return False
            if constant is not None and not np.abs(constant.numpy().astype(np.float64)).max(initial=0) < limit:
                return False
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
    node = value.producer()
    name = node.op_type if node is not None and node.domain in ("", "ai.onnx") else ""
    if name in ("Sigmoid", "Tanh", "Softmax"):
        return 1.0
    table = node.inputs[0] if node is not None and name == "Gather" else value
    constant = None if table is None else tensor_of(table)
    return math.inf if constant is None else float(np.abs(constant.numpy().astype(np.float64)).max(initial=0))
