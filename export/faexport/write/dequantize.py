# SPDX-License-Identifier: Apache-2.0
"""Operators on quantized numbers inside of attention, as pairs of QuantizeLinear and DequantizeLinear around the same
on floats: what onnxruntime's quantizer writes as QLinearMatMul, QLinearSoftmax, QLinearAdd, QLinearMul and
MatMulInteger. Called by pipeline.py where a user agreed to leave such roundings out, and by site_check.py for the
original.

Both say the same, up to the last step of the rounding. Names of new tensors are made from the old ones', so that the
same nodes of two models get the same names. What is not fused in the end is put back as it was.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Sequence

import onnx_ir as ir

from faexport.graph.edits import remove_dead
from faexport.graph.nodes import attribute, graphs_of, live_users, op, operand, producer
from faexport.spec import Candidate, Refusal
from faexport.understand.layout.products import QUANTIZED
from faexport.understand.shapes.analysis import Analysis

_ELEMENTWISE = {"com.microsoft::QLinearAdd": "Add", "com.microsoft::QLinearMul": "Mul"}
_SOFTMAX = "com.microsoft::QLinearSoftmax"
_PRODUCTS = ("QLinearMatMul", "com.microsoft::QLinearMatMul")
DEQUANTIZED = "faexport.dequantized"  # entry of a rewritten model's metadata: names of expanded outputs, as JSON
_MOST_NODES = 24  # between a product and its softmax
_AXIS_OF_KEYS = 13  # of opsets: from there on a softmax has one axis


@dataclasses.dataclass
class Expanded:
    """One operator that was replaced."""

    old: ir.Node  # its last node, in no graph
    main: ir.Node  # the operator on floats
    new: list[ir.Node]  # all that came in its place
    output: ir.Value  # in the place of the old node's
    name: str  # of that

    inputs: list[ir.Value | None]  # the old node's, which has none meanwhile

    def settle(self) -> bool:
        """Puts the old node back, if the new ones are still there; else forgets it, with what only it read. Is it
        back?"""
        graph, old = self.main.graph, self.old.outputs[0]
        if graph is None:
            remove_dead([value.producer() for value in self.inputs if value is not None])
            return False
        for index, value in enumerate(self.inputs):
            self.old.replace_input_with(index, value)
        graph.insert_before(self.main, self.old)
        old.name, self.output.name = self.name, f"{self.name}_restored"
        ir.convenience.replace_all_uses_with(self.output, old, replace_graph_outputs=True)
        remove_dead([self.output.producer()])
        return True


def expand(model: ir.Model, only: Collection[str] | None = None) -> list[Expanded]:
    """Replaces the operators of all blocks that may be attention, in place; with `only`, those whose outputs have these
    names."""
    a = Analysis(model)
    found: dict[ir.Node, None] = {}
    for graph, _ in graphs_of(model):
        for node in graph:
            if only is not None:
                if node.outputs and node.outputs[0].name in only:
                    found[node] = None
            elif op(node) in ("Softmax", _SOFTMAX):
                found |= dict.fromkeys(_around(node, a))
    made = [_replaced(node, a) for node in found]
    return [one for one in made if one is not None]


def settle(model: ir.Model, expanded: Sequence[Expanded], candidates: Iterable[Candidate]) -> None:
    """Puts back what was not fused, notes in the model's metadata what was, and gives refusals that speak of new nodes
    the names of the old ones."""
    gone = [one.name for one in reversed(expanded) if not one.settle()]
    if gone:
        model.metadata_props[DEQUANTIZED] = json.dumps(gone)
    names = {node.name: one.old.name for one in expanded for node in one.new}
    for candidate in candidates:
        if isinstance(candidate.outcome, Refusal) and (name := names.get(candidate.outcome.node)):
            candidate.outcome = dataclasses.replace(candidate.outcome, node=name)


def _around(softmax: ir.Node, a: Analysis) -> list[ir.Node]:
    """What works on quantized numbers on the way from a product to a softmax, and from there to the next product, the
    products among them; nothing where there are none."""
    before, behind = _chain(softmax, a, up=True), _chain(softmax, a, up=False)
    if not before or not behind:
        return []
    found = [*before, softmax, *behind]
    return [node for node in found if op(node) in (*_ELEMENTWISE, *_PRODUCTS, _SOFTMAX) or _is_scaled(node)]


def _chain(softmax: ir.Node, a: Analysis, *, up: bool) -> list[ir.Node]:
    """The nodes from next to the softmax to a product of two computed tensors, this one last; [] where none is
    there."""
    found: list[ir.Node] = []
    pending = _next(softmax, up)
    while pending and len(found) < _MOST_NODES:
        node = pending.pop(0)
        if node in found:
            continue
        found.append(node)
        multiplied = QUANTIZED.get(op(node), (0, 1))
        is_product = op(node) in (*_PRODUCTS, "MatMul") or _is_scaled(node)
        if is_product:
            source = _integer_product(node) or node
            if not any(a.is_static(operand(source, i)) for i in multiplied):
                return found
            continue
        pending += _next(node, up)
    return []


def _next(node: ir.Node, up: bool) -> list[ir.Node]:
    if not up:
        return live_users(node.outputs[0])
    indices = (0, 3) if op(node) in _ELEMENTWISE else (0, 1) if op(node) in ("Add", "Mul", "Div") else (0,)
    indices = (1, 2) if op(node) == "Where" else indices
    return [before for i in indices if (before := producer(operand(node, i))) is not None]


def _integer_product(node: ir.Node) -> ir.Node | None:
    """The MatMulInteger that a Mul gives its scale, through a Cast."""
    cast = producer(operand(node, 0)) if op(node) == "Mul" else None
    before = producer(operand(cast, 0)) if cast is not None and op(cast) == "Cast" else None
    return before if op(before) == "MatMulInteger" else None


def _is_scaled(node: ir.Node) -> bool:
    return _integer_product(node) is not None


def _replaced(node: ir.Node, a: Analysis) -> Expanded | None:
    name = op(node)
    if name in _PRODUCTS:
        return _written(node, "MatMul", ((0, 1, 2), (3, 4, 5)), (6, 7), {}, a)
    if name in _ELEMENTWISE:
        return _written(node, _ELEMENTWISE[name], ((0, 1, 2), (3, 4, 5)), (6, 7), {}, a)
    if name == _SOFTMAX and attribute(node, "opset", 0) >= _AXIS_OF_KEYS:
        return _written(node, "Softmax", ((0, 1, 2),), (3, 4), {"axis": attribute(node, "axis", -1)}, a)
    return _product_of_integers(node, a) if _is_scaled(node) else None


def _written(
    node: ir.Node,
    op_type: str,
    tensors: tuple[tuple[int, int, int], ...],
    result: tuple[int, int],
    attributes: dict,
    a: Analysis,
) -> Expanded | None:
    """DequantizeLinear for each tensor, the operator, and QuantizeLinear behind it. `tensors`: places among the inputs
    of a tensor, its scale and its zero point; `result`: of the output's scale and zero point."""
    scales = [operand(node, i) for i in (*(t[1] for t in tensors), result[0])]
    if any(a.rank(scale) != 0 for scale in scales):
        return None
    name = node.outputs[0].name or ""
    dtype = a.dtype(scales[-1])
    nodes = [
        _dequantize([operand(node, i) for i in places], f"{name}_in{k}", dtype) for k, places in enumerate(tensors)
    ]
    main = _node(op_type, [n.outputs[0] for n in nodes], f"{name}_float", dtype, attributes)
    last = _node("QuantizeLinear", [main.outputs[0], *(operand(node, i) for i in result)], "", a.dtype(node.outputs[0]))
    return _put(node, [*nodes, main, last], main)


def _product_of_integers(node: ir.Node, a: Analysis) -> Expanded | None:
    """MatMulInteger, Cast, and Mul with the product of the scales of two DynamicQuantizeLinear."""
    product, scale = _integer_product(node), producer(operand(node, 1))
    if product is None or scale is None or op(scale) != "Mul":
        return None
    nodes: list[ir.Node] = []
    for k in (0, 1):
        made = producer(operand(product, k))
        if made is None or op(made) != "DynamicQuantizeLinear":
            return None
        numbers, factor, zero = made.outputs
        if factor is not operand(scale, k) or zero is not operand(product, 2 + k):
            return None
        nodes.append(_dequantize([numbers, factor, zero], f"{node.outputs[0].name}_in{k}", ir.DataType.FLOAT))
    main = _node("MatMul", [n.outputs[0] for n in nodes], "", ir.DataType.FLOAT)
    return _put(node, [*nodes, main], main)


def _dequantize(inputs: list[ir.Value | None], name: str, dtype: ir.DataType | None) -> ir.Node:
    return _node("DequantizeLinear", inputs, name, dtype)


def _node(
    op_type: str, inputs: list[ir.Value | None], name: str, dtype: ir.DataType | None, attributes: dict | None = None
) -> ir.Node:
    while inputs and inputs[-1] is None:
        inputs.pop()
    made = ir.node(op_type, inputs, attributes or None, name=f"{name}_{op_type}" if name else None)
    made.outputs[0].name = name or None
    if dtype is not None:
        made.outputs[0].dtype = dtype
    return made


def _put(old: ir.Node, new: list[ir.Node], main: ir.Node) -> Expanded:
    graph, value, output = old.graph, old.outputs[0], new[-1].outputs[0]
    assert graph is not None
    graph.insert_before(old, new)
    name = value.name or ""
    output.shape, output.type = value.shape, value.type or output.type
    value.name, output.name, new[-1].name = f"{name}_old", name, f"{name}_{new[-1].op_type}"
    ir.convenience.replace_all_uses_with(value, output, replace_graph_outputs=True)
    graph.remove(old)
    main.name, inputs = old.name, list(old.inputs)
    for index in range(len(inputs)):
        old.replace_input_with(index, None)
    return Expanded(old, main, new, output, name, inputs)
