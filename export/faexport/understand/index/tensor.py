# SPDX-License-Identifier: Apache-2.0
"""Tensors as functions of their indices: the shape as index expressions, and any element on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from faexport.sizes import algebra as ia
from faexport.sizes.algebra import Expr
from faexport.understand.index import logic as il
from faexport.understand.index.answers import kept

Shape = tuple[Expr, ...]
Index = tuple[Expr, ...]
Element = Callable[[Index], Expr]


class Unknown(Exception):
    """A transfer function can't say; the value becomes opaque."""


def kind_of(dtype: ir.DataType | None) -> str:
    """The kind of the elements' expressions: what is neither boolean nor integer counts as "float", also where no
    arithmetic is known for it (float8, complex numbers, strings)."""
    if dtype is ir.DataType.BOOL:
        return "bool"
    return "int" if dtype is not None and dtype.is_integer() else "float"


def broadcast_index(index: Expr, size: Expr) -> Expr:
    """Where an axis of `size` is read for an index of the axis that it is broadcast to: there, or at 0 if it is 1."""
    if ia.value_of(size) == 1:
        return ia.ZERO
    if ia.value_of(size) is not None or ia.is_nonnegative(ia.sub(ia.sub(size, ia.ONE), index)):
        return index
    one = il.eq0(ia.sub(size, ia.ONE))
    return index if il.assume(index, one) is ia.ZERO else il.choose(one, ia.ZERO, index)


class Tensor:
    """Shape, element type and elements of one value. `at` is memoised: expressions are shared, work is done once."""

    def __init__(
        self,
        shape: Shape,
        dtype: ir.DataType | None,
        element: Callable[[Index], Expr],
        opaque: bool = False,
        value: ir.Value | None = None,
    ):
        self.shape, self.dtype, self._element, self.opaque = shape, dtype, element, opaque
        self._memo: dict[Index, Expr] = {}
        self.value = value  # what it is the tensor of
        self.depth = 0  # of the chain of transfer functions that an element is asked through

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def kind(self) -> str:
        return kind_of(self.dtype)

    def at(self, index: Index) -> Expr:
        """The element at `index`; axes of size 1 ignore theirs."""
        index = tuple(ia.ZERO if ia.value_of(s) == 1 else x for s, x in zip(self.shape, index, strict=True))
        if index not in self._memo:
            with kept():
                self._memo[index] = self._understood(index)
        return self._memo[index]

    def _understood(self, index: Index) -> Expr:
        try:
            result = self._element(index)
            if result.kind == self.kind:
                return result
        except (Unknown, ValueError, IndexError):
            pass
        if self.value is None:
            raise Unknown
        return il.load(self.value, index, self.kind)

    def at_right(self, index: Index) -> Expr:
        """The element that broadcasting (from the right) puts at `index` of a tensor of this rank or a higher one."""
        own = index[len(index) - self.rank :]
        return self.at(tuple(map(broadcast_index, own, self.shape)))

    def scalar(self) -> Expr:
        """The element of a tensor of one element."""
        return self.at((ia.ZERO,) * self.rank)


def opaque(value: ir.Value, shape: Shape, dtype: ir.DataType | None) -> Tensor:
    kind = kind_of(dtype)
    return Tensor(shape, dtype, lambda index: il.load(value, index, kind), opaque=True, value=value)


def from_list(items: Sequence[Expr]) -> Callable[[Index], Expr]:
    """What gives the elements of a 1-D tensor that holds these."""

    def element(index: Index) -> Expr:
        k = ia.value_of(index[0])
        if k is not None:
            return items[k]
        result = items[-1]
        for n in range(len(items) - 2, -1, -1):
            result = il.choose(il.ge0(ia.sub(ia.const(n), index[0])), items[n], result)
        return result

    return element


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    found = node.attributes.get(name)
    if found is None:
        return default
    return found.value.numpy() if found.type is ir.AttributeType.TENSOR else found.value
