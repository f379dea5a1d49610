# SPDX-License-Identifier: Apache-2.0
"""Computes a value of the original a second time: in float32, or without roundings that the rewritten model leaves out.
Called by side_by_side.py.

The nodes between some tensors and the value are copied to the end of the graph, so that the original's own are still
there beside them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import HALVES, maker, op
from faexport.understand.core.rounding import DEQUANTIZING
from faexport.verify.roundings import rounded_by_itself
from faexport.verify.side_by_side_math import Emit
from faexport.verify.widen import widen_node, widened

BODIES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
DISCRETE = {
    ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8,
    ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64,
}  # fmt: skip
_MOST_NODES = 200
_MOST_BEFORE = 24  # nodes between an operand and the first of its roundings
_BETWEEN = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Cast", "Identity", "Mul", "Div", "Split")
_fresh = itertools.count()

TypeOf = Callable[[ir.Value], ir.DataType | None]


def is_dequantized(value: ir.Value) -> bool:
    """Is it what a DequantizeLinear makes of a tensor that was quantized when the model runs?"""
    node = value.producer()
    return node is not None and op(node) in DEQUANTIZING and _before(node) is not None


def _before(dequantize: ir.Node) -> ir.Value | None:
    """The tensor in front of the QuantizeLinear, where there is one."""
    quantized = dequantize.inputs[0]
    node = quantized.producer() if quantized is not None else None
    return node.inputs[0] if node is not None and node.op_type.endswith("QuantizeLinear") else None


def unrounded_sources(leaves: Iterable[ir.Value]) -> tuple[set[ir.Value], set[ir.Value]]:
    """For operands of a site: the tensors that these are made from by roundings, and by what stands between those, and
    the outputs of the roundings."""
    sources, roundings = set(), set()
    for leaf in leaves:
        source = value = leaf
        for _ in range(_MOST_BEFORE):
            node = value.producer()
            if is_dequantized(value):
                roundings.add(value)
                before = _before(maker(value))
                assert before is not None
                source = value = before
            elif node is None or op(node) not in _BETWEEN or node.inputs[0] is None:
                break
            else:
                computed = [v for v in node.inputs if v is not None and v.producer() is not None]
                value = computed[0] if computed else node.inputs[0]
        sources.add(source)
    return sources, roundings


def recomputed(
    root: ir.Value,
    sources: Iterable[ir.Value],
    emit: Emit,
    type_of: TypeOf,
    *,
    without: Collection[ir.Value] = (),
    zero_for_nan: Collection[ir.Value] = (),
    instead: Mapping[ir.Value, ir.Value] = MappingProxyType({}),
    wide: bool = False,
    rounded: bool = False,
) -> ir.Value | None:
    """The value made from the sources again; None where that can't be.

    Args:
        sources: tensors of the same graph, taken as they are.
        without: outputs of DequantizeLinear, in whose place comes what was quantized.
        zero_for_nan: values in which 0 takes the place of NaN.
        instead: of sources, the tensors that are taken in their place.
        wide: half-precision tensors become float32.
        rounded: half-precision tensors on the way are rounded to it, where onnxruntime would leave that out.
    """
    found: dict[ir.Value, ir.Value] = {}
    for source in sources:
        taken = instead.get(source, source)
        found[source] = emit.cast(taken, ir.DataType.FLOAT) if wide and type_of(source) in HALVES else taken
    stack, changed = [root], _behind(without, root)
    while stack and len(found) <= _MOST_NODES:
        value = stack[-1]
        node = value.producer()
        before = _before(node) if node is not None and value in without else None
        if value in found:
            stack.pop()
        elif before is not None:
            if before in found:
                found[stack.pop()] = found[before]
            else:
                stack.append(before)
        elif node is None or (type_of(value) in DISCRETE and value not in changed):
            stack.pop()
            found[value] = _widened_leaf(value, emit, type_of) if wide else value
        elif waiting := [v for v in node.inputs if v is not None and v not in found]:
            stack += waiting
        else:
            stack.pop()
            if any(a.type in BODIES for a in node.attributes.values()):
                return None
            copy = copied(node, [v if v is None else found[v] for v in node.inputs])
            if wide:
                widen_node(copy)
            emit.graph.append(copy)
            found.update(zip(node.outputs, copy.outputs, strict=True))
            if rounded and value is not root and type_of(value) in HALVES:
                found[value] = rounded_by_itself(found[value], emit)
            if value in zero_for_nan:
                dtype = ir.DataType.FLOAT if wide else type_of(value)
                found[value] = _with_zero_for_nan(found[value], emit, dtype)
    return found.get(root)


def _with_zero_for_nan(value: ir.Value, emit: Emit, dtype: ir.DataType | None) -> ir.Value:
    # NOTE: onnxruntime's CPU provider has no Where of half precision.
    numbers, zero = emit.cast(value, ir.DataType.FLOAT), emit.constant(np.array(0, np.float32))
    replaced = emit("Where", emit("IsNaN", numbers), zero, numbers)
    return replaced if dtype in (None, ir.DataType.FLOAT) else emit.cast(replaced, dtype)


def _behind(values: Collection[ir.Value], end: ir.Value) -> set[ir.Value]:
    """What is computed from any of the values, as far as the end."""
    found: set[ir.Value] = set()
    pending = list(values)
    while pending:
        for use in pending.pop().uses():
            new = [value for value in use.node.outputs if value not in found]
            found.update(new)
            pending += [] if end in use.node.outputs else new
    return found


def _widened_leaf(value: ir.Value, emit: Emit, type_of: TypeOf) -> ir.Value:
    if type_of(value) not in HALVES:
        return value
    if value.const_value is not None:
        return emit.constant(widened(value.const_value))
    return emit.cast(value, ir.DataType.FLOAT)


def copied(node: ir.Node, inputs: list[ir.Value | None]) -> ir.Node:
    """The same node on other inputs, in no graph yet. Its outputs have names that no value has, whatever body it will
    stand in: names that a graph gives by itself may be those of the graphs around it."""
    copy = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        overload=node.overload,
        num_outputs=len(node.outputs),
        name=f"beside_{next(_fresh)} {node.name or node.op_type}",
    )
    for index, output in enumerate(copy.outputs):
        output.name = f"{copy.name} {index}"
    return copy
