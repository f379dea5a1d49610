# SPDX-License-Identifier: Apache-2.0
"""The one builder of new nodes of standard ONNX, in the spelling of the model's opset.

Operands and outputs whose layout the operator can't take (understand/), masks (understand/mask/emit.py) and the
stand-in function (fallback/body.py) are made with it. Nodes are made, not inserted; edits.py names and inserts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

FIRST_OPSET = {"Where": 9, "ConstantOfShape": 9, "Expand": 8, "Range": 11, "CumSum": 11, "NonZero": 9, "IsInf": 10}
AXES_AS_INPUT = dict.fromkeys(("Squeeze", "Unsqueeze", "ReduceSum"), 13)
AXES_AS_INPUT |= dict.fromkeys(("ReduceMax", "ReduceMin", "ReduceMean", "ReduceProd"), 18)
NEGATED = {"GreaterOrEqual": "Less", "LessOrEqual": "Greater"}  # not there before opset 12


_ATTRIBUTE_TYPES = {
    int: ir.AttributeType.INT,
    float: ir.AttributeType.FLOAT,
    str: ir.AttributeType.STRING,
    ir.Tensor: ir.AttributeType.TENSOR,
}


def attributes_of(values: Mapping[str, Any]) -> list[ir.Attr]:
    """Attributes of a new node. onnx_ir finds a type by asking protocols, which takes longer than all else about a
    small node; so it is told the common ones."""
    return [
        ir.convenience.convert_attribute(name, value, _ATTRIBUTE_TYPES.get(type(value)))
        for name, value in values.items()
    ]


class Missing(Exception):
    """The model's opset has no operator for what is asked; the text says which."""


class Writer:
    """Writes operators in the spelling of an opset. They are given as opset 18 has them: axes, starts and ends are
    inputs. What becomes of the nodes is the subclass's business."""

    def __init__(self, opset: int):
        self.opset = opset
        self._arrays: dict[ir.Value, np.ndarray] = {}  # of constants

    def _made(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict, dtype: ir.DataType | None
    ) -> ir.Value:
        """The first output of a node with exactly these parts."""
        raise NotImplementedError

    def _unused(self, constant: ir.Value) -> None:
        """A constant was made into an attribute: its node is needed no more, if nothing else reads it."""

    def add(
        self, op_type: str, inputs: Sequence[ir.Value | None] = (), dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        """The first output of a node, with its element type where that is given. Raises Missing."""
        if self.opset < FIRST_OPSET.get(op_type, 1):
            raise Missing(f"needs {op_type}, which opset {self.opset} doesn't have")
        inputs = list(inputs)
        if op_type in NEGATED and self.opset < 12:
            return self.add("Not", [self.add(NEGATED[op_type], inputs)], dtype)
        if op_type == "Shape" and attributes and self.opset < 15:
            bounds = (self.ints([attributes[name]]) for name in ("start", "end"))
            return self.add("Slice", [self.add("Shape", inputs), *bounds, self.ints([0])], dtype)
        if op_type == "Slice" and self.opset < 10:
            if len(inputs) > 4 and set(self._numbers(inputs[4])) != {1}:
                raise Missing(f"needs Slice with steps, which opset {self.opset} doesn't have")
            names = ("starts", "ends", "axes")
            attributes = {name: self._numbers(value) for name, value in zip(names, inputs[1:], strict=False)}
            inputs = inputs[:1]
        if len(inputs) == 2 and self.opset < AXES_AS_INPUT.get(op_type, 0):
            attributes["axes"] = self._numbers(inputs.pop())
        return self._made(op_type, inputs, attributes, dtype)

    def _numbers(self, value: ir.Value | None) -> list[int]:
        """The integers of a constant of ours, which becomes an attribute: its node goes where nothing else reads it."""
        if value is None or value not in self._arrays:
            raise Missing(f"needs a computed axis or bound, which opset {self.opset} doesn't have")
        self._unused(value)
        return self._arrays[value].reshape(-1).tolist()

    def constant(self, array: np.ndarray | Sequence[int]) -> ir.Value:
        """A Constant node; Python's integers are int64."""
        array = np.asarray(array)
        if self.opset < 9 and array.dtype == np.int64:  # Constant then holds floats only
            value = self.add("Cast", [self.constant(array.astype(np.float32))], ir.DataType.INT64, to=7)
        else:
            tensor = ir.Tensor(array)
            value = self.add("Constant", (), value=tensor)
            value.dtype = tensor.dtype
        self._arrays[value] = array
        return value

    def ints(self, values: Sequence[int]) -> ir.Value:
        return self.constant(np.asarray(list(values), np.int64))


class Builder(Writer):
    """Collects nodes in order."""

    def __init__(self, opset: int):
        super().__init__(opset)
        self.nodes: list[ir.Node] = []

    def _made(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict, dtype: ir.DataType | None
    ) -> ir.Value:
        node = self._named(ir.Node("", op_type, inputs, attributes_of(attributes)))
        if dtype is not None:
            node.outputs[0].dtype = dtype
        self.nodes.append(node)
        return node.outputs[0]

    def _named(self, node: ir.Node) -> ir.Node:
        """edits.py names what has no name."""
        return node

    def _unused(self, constant: ir.Value) -> None:
        node = constant.producer()
        if node is not None and node in self.nodes and not constant.uses():
            self.nodes.remove(node)

    def again(self, node: ir.Node, value: ir.Value, place: int = 0) -> ir.Value:
        """The first output of a node like one of the model, which is spelled as the opset has it, with another first
        input, or that at `place`."""
        inputs = [value if i == place else v for i, v in enumerate(node.inputs)]
        self.nodes.append(ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values())))
        made = self.nodes[-1].outputs[0]
        if node.outputs[0].dtype is not None:
            made.dtype = node.outputs[0].dtype
        return made

    def transpose(self, value: ir.Value, perm: Sequence[int]) -> ir.Value:
        return (
            value
            if list(perm) == list(range(len(perm)))
            else self.add("Transpose", [value], value.dtype, perm=list(perm))
        )

    def unsqueeze(self, value: ir.Value, *axes: int) -> ir.Value:
        return self.add("Unsqueeze", [value, self.ints(axes)], value.dtype)

    def squeeze(self, value: ir.Value, axis: int) -> ir.Value:
        return self.add("Squeeze", [value, self.ints([axis])], value.dtype)

    def slice(self, value: ir.Value, start: int, end: int, axis: int = 0) -> ir.Value:
        return self.add("Slice", [value, *(self.ints([k]) for k in (start, end, axis))], value.dtype)

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """0 copies the size of the same axis, -1 is what remains."""
        return self.add("Reshape", [value, self.ints(shape)], value.dtype)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return value if value.dtype == dtype else self.add("Cast", [value], dtype, to=int(dtype))

    def split_axis(self, value: ir.Value, axis: int, rank: int, count: int, outer: bool = False) -> ir.Value:
        """One axis of size N as two, [N / count, count] or [count, N / count], whatever the sizes are: where N / count
        is 0, Reshape copies the 0 that stands in its place."""
        rest = self.add("Div", [self._size(value, axis), self.ints([count])], ir.DataType.INT64)
        before, behind = [0] * axis, [0] * (rank - axis - 1)
        if outer:
            sizes = [self.ints([*before, count]), rest, *([self.ints(behind)] if behind else [])]
        else:
            sizes = [*([self.ints(before)] if before else []), rest, self.ints([count, *behind])]
        return self._reshaped(self.unsqueeze(value, axis if outer else axis + 1), sizes, rank + 1)

    def merge_first_axes(self, value: ir.Value) -> ir.Value:
        """[B, H, S, D] to [B * H, S, D] whatever they are."""
        both = self.add("Mul", [self._size(value, 0), self._size(value, 1)], ir.DataType.INT64)
        return self.squeeze(self._reshaped(value, [both, self.ints([1, 0, 0])]), 1)

    def _merge_two(self, value: ir.Value, rank: int) -> ir.Value:
        """The first two axes as one, for opsets whose Reshape has no `allowzero`: a 0 there copies the size of the same
        axis. So where the second axis has no elements, the Slice leaves none in the first, and the 0 copies a 0."""
        both = self.add("Mul", [self._size(value, 0), self._size(value, 1)], ir.DataType.INT64)
        value = self.add("Slice", [value, self.ints([0]), both, self.ints([0])], value.dtype)
        return self.squeeze(self._reshaped(value, [both, self.ints([1, *(0,) * (rank - 2)])], rank), 1)

    def split_leads(self, value: ir.Value, leads: ir.Value, count: int) -> ir.Value:
        """[B, H, S, D] to [leads, S, D], `count` leading axes whose sizes are an int64 vector. It is for opsets from 11
        on whose Reshape has no `allowzero`: a Gather of the merged axis takes any sizes."""
        sizes = [self.slice(leads, k, k + 1) for k in range(count)]
        place: ir.Value | None = None  # of each element of the leading axes in the merged axis
        for k, size in enumerate(sizes):
            ends = [self.constant(np.array(0)), self.squeeze(size, 0), self.constant(np.array(1))]
            line = self.add("Range", ends, ir.DataType.INT64)
            line = self.unsqueeze(line, *(i for i in range(count) if i != k)) if count > 1 else line
            outer = None if place is None else self.add("Mul", [place, size], ir.DataType.INT64)
            place = line if outer is None else self.add("Add", [outer, line], ir.DataType.INT64)
        assert place is not None
        return self.add("Gather", [self.merge_first_axes(value), place], value.dtype, axis=0)

    def _size(self, value: ir.Value, axis: int) -> ir.Value:
        """int64 [1]."""
        return self.slice(self.add("Shape", [value], ir.DataType.INT64), axis, axis + 1)

    def _reshaped(self, value: ir.Value, sizes: Sequence[ir.Value], rank: int = 4, **attributes: int) -> ir.Value:
        """To sizes that are computed, not left to Reshape: -1 fails for a tensor without elements. The Gather keeps
        onnxruntime from putting -1 in the place of a computed size."""
        target = self.add("Concat", sizes, ir.DataType.INT64, axis=0)
        target = self.add("Gather", [target, self.ints(range(rank))], ir.DataType.INT64, axis=0)
        return self.add("Reshape", [value, target], value.dtype, **attributes)

    def to_four_axes(self, value: ir.Value, shape: Sequence[int | None], heads: int) -> ir.Value:
        """[…, S, D] of a shape, None for a size that isn't constant, to [B, heads, S, D]."""
        rank = len(shape)
        if 11 <= self.opset < 14 and shape.count(None) > 1:
            for left in range(rank, 3, -1):
                value = self._merge_two(value, left)
            return self.split_axis(value, 0, 3, heads)
        sizes = self.add("Shape", [value], ir.DataType.INT64)
        tail = self.slice(sizes, rank - 2, rank)
        if self.opset >= 14:  # allowzero
            leads = self.add("ReduceProd", [self.slice(sizes, 0, rank - 2)], ir.DataType.INT64, keepdims=1)
            outer = self.add("Div", [leads, self.ints([heads])], ir.DataType.INT64)
            return self._reshaped(value, [outer, self.ints([heads]), tail], allowzero=1)
        target = self.add("Concat", [self.ints([-1, heads]), tail], ir.DataType.INT64, axis=0)
        return self.add("Reshape", [value, target], value.dtype)

    def reshape_to(self, value: ir.Value, *sizes: ir.Value) -> ir.Value:
        """To these sizes, int64 vectors, from opset 14 on. NOTE: `allowzero` keeps onnxruntime's optimizer from putting
        -1 in the place of a computed size, too."""
        target = self.add("Concat", sizes, ir.DataType.INT64, axis=0)
        return self.add("Reshape", [value, target], value.dtype, allowzero=1)
