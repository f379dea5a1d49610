# SPDX-License-Identifier: Apache-2.0
"""Makes the nodes of the stand-in function, which may read the attributes of the node that calls it. Used by
body.py and rows.py."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir

from faexport.graph.surgery import Builder

READS_ATTRIBUTES = 13  # the first opset whose body reads the numbers of the calling node


class Ops(Builder):
    """Makes the nodes of a function. `numbers`: the attributes that are fixed."""

    def __init__(self, opset: int, numbers: dict[str, Any] | None = None):
        super().__init__(opset)
        self.numbers = numbers or {}
        self._count = itertools.count()

    def __call__(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.add(op_type, inputs, **attributes)

    def _named(self, node: ir.Node) -> ir.Node:
        node.outputs[0].name = f"v{next(self._count)}"
        return node

    def const(self, value: object, dtype: type = np.int64) -> ir.Value:
        made = self.constant(np.asarray(value, dtype))
        made.type = None  # files of before IR version 10 have no types of values inside of functions
        return made

    def ref(self, name: str, kind: ir.AttributeType) -> ir.Value:
        """An attribute of the calling node: a number, or a vector."""
        if self.opset < READS_ATTRIBUTES:
            dtype = np.float32 if kind is ir.AttributeType.FLOAT else np.int64
            return self.const(self.numbers[name], dtype)
        field = {
            ir.AttributeType.INT: "value_int",
            ir.AttributeType.FLOAT: "value_float",
            ir.AttributeType.INTS: "value_ints",
        }
        node = self._named(ir.Node("", "Constant", [], [ir.RefAttr(field[kind], name, kind)]))
        self.nodes.append(node)
        return node.outputs[0]

    def number(self, name: str) -> ir.Value:
        return self.ref(name, ir.AttributeType.INT)

    def vector(self, scalar: ir.Value) -> ir.Value:
        return self("Reshape", scalar, self.const([1]))

    def size(self, x: ir.Value, axis: int) -> ir.Value:
        """int64 [1]."""
        return self.slice(self("Shape", x), axis, axis + 1)

    def scalar_size(self, x: ir.Value, axis: int) -> ir.Value:
        return self.squeeze(self.size(x, axis), 0)

    def concat(self, *parts: ir.Value, axis: int = 0) -> ir.Value:
        return self("Concat", *parts, axis=axis)

    def resize(self, x: ir.Value, *sizes: ir.Value) -> ir.Value:
        """x with other axes behind axes 0 and 1. The Gather keeps onnxruntime from putting -1 in the place of a
        computed size, which fails for a tensor without elements."""
        target = self.concat(self.const([0, 0]), *sizes)
        return self("Reshape", x, self("Gather", target, self.const(list(range(2 + len(sizes)))), axis=0))

    def reduce(self, op_type: str, x: ir.Value) -> ir.Value:
        """Over the last axis, which stays with size 1."""
        return self(op_type, x, self.const([-1]), keepdims=1)

    def float32(self, x: ir.Value) -> ir.Value:
        return self("Cast", x, to=int(ir.DataType.FLOAT))

    def arange(self, size: ir.Value) -> ir.Value:
        """0, 1 … up to a scalar. Of a fixed number it is a constant: there is no Range before opset 11."""
        known = self._arrays.get(size)
        if known is not None:
            return self.const(np.arange(int(known)))
        return self("Range", self.const(0), size, self.const(1))
