# SPDX-License-Identifier: Apache-2.0
"""New nodes of standard ONNX for operands and outputs whose layout the operator can't take as it is.

Nodes are made, not inserted; rewrite.py names and inserts them. Integers that ops take as inputs become Constant nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir


class Builder:
    """Collects nodes in order."""

    def __init__(self, opset: int):
        self.opset = opset
        self.nodes: list[ir.Node] = []

    def add(
        self, op_type: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None = None, **attributes
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes or None)
        if dtype is not None:
            node.outputs[0].dtype = dtype
        self.nodes.append(node)
        return node.outputs[0]

    def ints(self, values: Sequence[int]) -> ir.Value:
        return self.add("Constant", (), ir.DataType.INT64, value=ir.tensor(list(values), ir.DataType.INT64))

    def transpose(self, value: ir.Value, perm: Sequence[int]) -> ir.Value:
        return (
            value
            if list(perm) == list(range(len(perm)))
            else self.add("Transpose", [value], value.dtype, perm=list(perm))
        )

    def unsqueeze(self, value: ir.Value, axis: int) -> ir.Value:
        if self.opset < 13:
            return self.add("Unsqueeze", [value], value.dtype, axes=[axis])
        return self.add("Unsqueeze", [value, self.ints([axis])], value.dtype)

    def squeeze(self, value: ir.Value, axis: int) -> ir.Value:
        if self.opset < 13:
            return self.add("Squeeze", [value], value.dtype, axes=[axis])
        return self.add("Squeeze", [value, self.ints([axis])], value.dtype)

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """0 copies the size of the same axis, -1 is what remains."""
        return self.add("Reshape", [value, self.ints(shape)], value.dtype)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return value if value.dtype == dtype else self.add("Cast", [value], dtype, to=int(dtype))

    def split_first_axis(self, value: ir.Value, inner: int) -> ir.Value:
        """[N, S, D] to [N / inner, inner, S, D] whatever S and D are."""
        return self.reshape(self.unsqueeze(value, 1), [-1, inner, 0, 0])

    def merge_first_axes(self, value: ir.Value) -> ir.Value:
        """[B, H, S, D] to [B * H, S, D] whatever they are."""
        return self.squeeze(self.reshape(value, [-1, 1, 0, 0]), 1)

    def to_four_axes(self, value: ir.Value, rank: int, heads: int) -> ir.Value:
        """[…, S, D] of `rank` axes to [B, heads, S, D]."""
        shape = self.add("Shape", [value], ir.DataType.INT64)
        tail = self.add("Slice", [shape, self.ints([rank - 2]), self.ints([rank]), self.ints([0])], ir.DataType.INT64)
        target = self.add("Concat", [self.ints([-1, heads]), tail], ir.DataType.INT64, axis=0)
        return self.add("Reshape", [value, target], value.dtype)
