# SPDX-License-Identifier: Apache-2.0
"""The interpreter that makes tensors as functions of their indices from the nodes of a graph.

Shapes, element types and constants are those of shapes.Analysis. `Interpreter.tensor(value)` adds, on demand, the
expression of any element: by one transfer function per ONNX operator (transfer_*.py). What none of them understands is
opaque: an element is then `load(value, index)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as ir

from faexport.graph.nodes import ONNX_DOMAINS, operand
from faexport.sizes import algebra as ia
from faexport.sizes.algebra import Expr
from faexport.sizes.dims import Dim
from faexport.understand.index.constants import constant_tensor
from faexport.understand.index.tensor import Element, Tensor, Unknown, opaque
from faexport.understand.shapes.analysis import Analysis

Transfer = Callable[..., Element]  # of an Interpreter and a node; that of Split also takes which output is asked for
# Transfer functions that an element is asked through at most, each within the one behind it. Masks of real models take
# a few dozen; a value behind more counts as one that nothing is known of, so that chains of any length are followed.
MAX_DEPTH = 100
_OF_SHAPES = ("Shape", "Size")  # no element of their input is asked for, as of the hidden states of a deep layer
_TRANSFERS: dict[str, Transfer] = {}


def transfer(*op_types: str) -> Callable[[Transfer], Transfer]:
    """Registers the transfer function of ONNX operators. It returns what gives an element of the node's first output at
    an index, or raises Unknown."""

    def register(function: Transfer) -> Transfer:
        _TRANSFERS.update(dict.fromkeys(op_types, function))
        return function

    return register


class Interpreter:
    """Abstract values of one graph, memoised. The graph may not change below it (nodes may be added behind).

    `positive` are atoms of sizes that are at least 1 wherever the answers are used: those of the scores' own axes,
    since without a score there is nothing to say."""

    def __init__(self, analysis: Analysis, positive: Iterable[Expr] = ()):
        self.analysis = analysis
        self._positive = {a: ia.sym(a.args[0], 1) for a in positive if a.op == "sym"}
        known = dict(self._positive)
        for atom in positive:
            if atom.op == "max" and ia.ZERO in atom.args:
                self._positive[atom] = ia.maximum(
                    ia.ONE, *(ia.replace(x, known) for x in atom.args if x is not ia.ZERO)
                )
        self._memo: dict[ir.Value, Tensor | None] = {}

    @property
    def opset(self) -> int:
        return self.analysis.opset

    def size(self, dim: Dim) -> Expr:
        """A size as an index expression."""
        return ia.replace(dim.expr, self._positive)

    def shape(self, value: ir.Value) -> tuple[Expr, ...] | None:
        """The shape of any value of the model, without a look at its elements."""
        shape = self.analysis.shape(value)
        return None if shape is None else tuple(map(self.size, shape))

    # ------------------------------------------------------------------------------------------ values

    def tensor(self, value: ir.Value) -> Tensor:
        """The abstract tensor of `value`. Raises Unknown where not even the rank is known."""
        stack = [value]
        while stack:  # producers first, without recursion: models are deep
            top = stack[-1]
            node = top.producer()
            pending = []
            if node is not None and top not in self._memo and self._wanted(node):
                pending = [v for v in node.inputs if v is not None and v not in self._memo]
            if pending:
                stack += pending
            else:
                stack.pop()
                if top not in self._memo:
                    self._memo[top] = self._interpret(top)
        result = self._memo[value]
        if result is None:
            raise Unknown
        return result

    def known(self, value: ir.Value) -> Tensor | None:
        """As tensor(), with None for what can't be known."""
        try:
            return self.tensor(value)
        except Unknown:
            return None

    @staticmethod
    def _wanted(node: ir.Node) -> bool:
        return node.domain in ONNX_DOMAINS and node.op_type in _TRANSFERS

    def is_opaque(self, value: ir.Value) -> bool:
        """True where the elements of `value` are not derived from anything."""
        found = self.known(value)
        return found is None or found.opaque

    def _interpret(self, value: ir.Value) -> Tensor | None:
        shape, dtype, node = self.shape(value), self.analysis.dtype(value), value.producer()
        constant = self.analysis.tensor(value)
        if constant is not None:
            return constant_tensor(value, constant)
        if shape is None:
            return None
        if node is not None and self._wanted(node) and (value is node.outputs[0] or node.op_type == "Split"):
            try:
                function = _TRANSFERS[node.op_type]
                element = function(self, node) if node.op_type != "Split" else function(self, node, value.index())
                made = Tensor(shape, dtype, element, value=value)
                asked = () if node.op_type in _OF_SHAPES else node.inputs
                below = (self._memo.get(v) for v in asked if v is not None)
                made.depth = 1 + max((tensor.depth for tensor in below if tensor is not None), default=0)
                if made.depth <= MAX_DEPTH:
                    return made
            except (Unknown, ValueError, IndexError):  # also where a node breaks ONNX's rules
                pass
        return opaque(value, shape, dtype)

    # -------------------------------------------------------------------------------------- help for transfer functions

    def input(self, node: ir.Node, k: int) -> Tensor:
        value = operand(node, k)
        found = self._memo.get(value) if value is not None else None
        if found is None:
            raise Unknown
        return found

    def optional(self, node: ir.Node, k: int) -> Tensor | None:
        return self.input(node, k) if operand(node, k) is not None else None

    def inputs(self, node: ir.Node) -> list[Tensor]:
        return [self.input(node, k) for k in range(len(node.inputs))]

    def output_shape(self, node: ir.Node) -> tuple[Expr, ...]:
        found = self.shape(node.outputs[0])
        if found is None:
            raise Unknown
        return found

    def contents(self, value: ir.Value | None) -> list[Expr]:
        """The elements of a small integer vector that sizes are computed from."""
        found = self.analysis.contents(value)
        if found is None:
            raise Unknown
        return [self.size(d) for d in found]

    def dtype(self, node: ir.Node, k: int = 0) -> ir.DataType:
        found = self.input(node, k).dtype
        if found is None:
            raise Unknown
        return found
