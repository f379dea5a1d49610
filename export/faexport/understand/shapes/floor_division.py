# SPDX-License-Identifier: Apache-2.0
"""Division of integers that rounds down, as exporters write it out: ONNX's Div rounds towards 0, so 1 is subtracted
where the division leaves a remainder and the signs of both numbers differ.

Spellings of that condition differ (transformers' exporter compares Signs, PyTorch's decomposition asks which of both
numbers are below 0). So it is not compared with any: whatever it is made of is computed for each case of the two signs
and of the remainder. If it is right in all cases, the quotient is rounded down for all integers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import attribute, op, operand, producer
from faexport.understand.shapes.known import Known

_SIGNED = (ir.DataType.INT32, ir.DataType.INT64)
_MAX_DEPTH = 8  # nodes from the condition to the divided numbers; real files have 6
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "Equal": operator.eq,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
}
_LOGIC: dict[str, Callable[[int, int], int]] = {"And": operator.and_, "Or": operator.or_, "Xor": operator.xor}


class _Unclear(Exception):
    """The condition depends on more than the case."""


def floor_division(node: ir.Node, a: Known) -> tuple[ir.Value, ir.Value] | None:
    """The dividend and the divisor where what this node computes is their quotient, rounded down."""
    division = producer(operand(node, 0))
    if op(node) != "Sub" or division is None or op(division) != "Div" or a.dtype(node.outputs[0]) not in _SIGNED:
        return None
    dividend, divisor = operand(division, 0), operand(division, 1)
    if dividend is None or divisor is None:
        return None
    may_leave = (False,) if _is_exact(dividend, divisor, a) else (False, True)
    try:
        exact = all(
            _Case(dividend, divisor, above, below, remains, a).number(operand(node, 1)) == (remains and above != below)
            for above in _signs(dividend, a)
            for below in _signs(divisor, a)
            if below  # a divisor of 0 is an error when the model runs
            for remains in (may_leave if above else (False,))
        )
    except _Unclear:
        return None
    return (dividend, divisor) if exact else None


def _is_exact(dividend: ir.Value, divisor: ir.Value, a: Known) -> bool:
    """Is it known that the division leaves no remainder? The file may then have the constant 0 in its place."""
    above, below = a.contents(dividend), a.contents(divisor)
    return above is not None and below is not None and all(x.divide(y) is not None for x in above for y in below)


def _signs(value: ir.Value, a: Known) -> list[int]:
    """The signs that an element of `value` may have."""
    constant = a.constant(value)
    return [-1, 0, 1] if constant is None else np.unique(np.sign(constant)).tolist()


class _Case(NamedTuple):
    """What is supposed of two integers: their signs, and whether their division leaves a remainder."""

    dividend: ir.Value
    divisor: ir.Value
    sign_above: int
    sign_below: int
    has_remainder: bool
    a: Known

    def sign(self, value: ir.Value | None, depth: int = 0) -> int:
        """The sign of a value that is computed from the two integers. Raises _Unclear where the case leaves it open."""
        if value is self.dividend:
            return self.sign_above
        if value is self.divisor:
            return self.sign_below
        node = producer(value)
        divided = (self.dividend, self.divisor)
        if node is not None and op(node) == "Mod" and all(map(self._are_same, node.inputs, divided)):
            return self.has_remainder * (self.sign_above if attribute(node, "fmod", 0) else self.sign_below)
        return int(np.sign(self.number(value, depth)))

    def number(self, value: ir.Value | None, depth: int = 0) -> int:
        """The value itself, 1 for true and 0 for false. Raises _Unclear where the case leaves it open."""
        constant, node = _number_of(value, self.a), producer(value)
        if constant is not None:
            return constant
        if node is None or depth >= _MAX_DEPTH:
            raise _Unclear
        kind, inputs, depth = op(node), node.inputs, depth + 1
        if kind == "Sign":
            return self.sign(inputs[0], depth)
        if kind == "Cast" and attribute(node, "to") == ir.DataType.BOOL:
            return abs(self.sign(inputs[0], depth))
        if kind == "Cast" and attribute(node, "to") in _SIGNED:
            return self.number(inputs[0], depth)
        if kind == "Not":
            return 1 - self.number(inputs[0], depth)
        if kind in _LOGIC:
            return _LOGIC[kind](self.number(inputs[0], depth), self.number(inputs[1], depth))
        if kind in _COMPARISONS:  # with 0 signs alone tell
            read = self.sign if 0 in (_number_of(v, self.a) for v in inputs) else self.number
            return int(_COMPARISONS[kind](read(inputs[0], depth), read(inputs[1], depth)))
        raise _Unclear

    def _are_same(self, left: ir.Value | None, right: ir.Value | None) -> bool:
        one, other = self.a.constant(left), self.a.constant(right)
        return left is right or (one is not None and other is not None and np.array_equal(one, other))


def _number_of(value: ir.Value | None, a: Known) -> int | None:
    """The number, where the value is a constant of one element."""
    constant = a.constant(value)
    return int(constant.item()) if constant is not None and constant.size == 1 and constant.dtype.kind in "ib" else None
