# SPDX-License-Identifier: Apache-2.0
"""Tensors as functions of their indices: the shape as index expressions, and any element on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from faexport.understand.index import algebra as ia
from faexport.understand.index import logic as il
from faexport.understand.index.algebra import Expr

Shape = tuple[Expr, ...]
Index = tuple[Expr, ...]


class Unknown(Exception):
    """A transfer function can't say; the value becomes opaque."""


def kind_of(dtype: ir.DataType | None) -> str:
    if dtype is ir.DataType.BOOL:
        return "bool"
    return "float" if dtype is None or il.is_float(dtype) else "int"


class Tensor:
    """Shape, element type and elements of one value. `at` is memoised: expressions are shared, work is done once."""

    def __init__(self, shape: Shape, dtype: ir.DataType | None, element: Callable[[Index], Expr], opaque: bool = False):
        self.shape, self.dtype, self._element, self.opaque = shape, dtype, element, opaque
        self._memo: dict[Index, Expr] = {}
        self.value: ir.Value | None = None  # what it is the tensor of; set by the interpreter

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
        """The element that broadcasting (from the right) puts at `index` of a tensor of higher rank."""
        return self.at(index[len(index) - self.rank :])

    def vector(self) -> list[Expr]:
        """All elements of a 1-D integer tensor (or a scalar) of known length."""
        length = 1 if self.rank == 0 else ia.value_of(self.shape[0])
        if self.rank > 1 or length is None or length > 64:
            raise Unknown
        items = [self.at((ia.const(k),) * self.rank) for k in range(length)]
        if any(e.kind != "int" for e in items):
            raise Unknown
        return items


def opaque(value: ir.Value, shape: Shape, dtype: ir.DataType | None) -> Tensor:
    kind = kind_of(dtype)
    return Tensor(shape, dtype, lambda index: il.load(value, index, kind), opaque=True)


def from_list(items: Sequence[Expr], dtype: ir.DataType = ir.DataType.INT64) -> Tensor:
    """A 1-D tensor of these elements."""

    def element(index: Index) -> Expr:
        k = ia.value_of(index[0])
        if k is not None:
            return items[k]
        result = items[-1]
        for n in range(len(items) - 2, -1, -1):
            result = il.choose(il.ge0(ia.sub(ia.const(n), index[0])), items[n], result)
        return result

    return Tensor((ia.const(len(items)),), dtype, element)


def attribute(node: ir.Node, name: str, default: object = None) -> object:
    found = node.attributes.get(name)
    if found is None:
        return default
    return found.value.numpy() if found.type is ir.AttributeType.TENSOR else found.value
