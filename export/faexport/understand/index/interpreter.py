# SPDX-License-Identifier: Apache-2.0
"""The interpreter that makes tensors as functions of their indices from the nodes of a graph.

`Interpreter.tensor(value)` gives the shape (sizes as index expressions) and, on demand, the expression of any element.
One transfer function per ONNX operator (transfer_*.py); what none of them understands is opaque: an element is then
`load(value, index)`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence

import onnx_ir as ir

from faexport.understand.index import algebra as ia
from faexport.understand.index.algebra import Expr
from faexport.understand.index.constants import constant_tensor
from faexport.understand.index.tensor import Shape, Tensor, Unknown, opaque

Transfer = Callable[["Interpreter", ir.Node], "Tensor | None"]
_TRANSFERS: dict[str, Transfer] = {}


def transfer(*op_types: str) -> Callable[[Transfer], Transfer]:
    """Registers the transfer function of ONNX operators. It returns the node's first output, or raises Unknown."""

    def register(function: Transfer) -> Transfer:
        for op_type in op_types:
            _TRANSFERS[op_type] = function
        return function

    return register


class Interpreter:
    """Abstract values of one graph, memoised. The graph may not change below it (nodes may be added behind)."""

    def __init__(
        self,
        graph: ir.Graph | ir.Function,
        shapes: Callable[[ir.Value], Sequence[int | str | None] | None] | None = None,
    ):
        self._shapes = shapes or (
            lambda _: None
        )  # a second source of shapes, for values that no transfer function knows
        self.opset = graph.opset_imports.get("", 20)  # the body of an If or Loop doesn't tell: then its reader does
        self._memo: dict[ir.Value, Tensor] = {}
        self._sizes: dict[str, Expr] = {}
        self.unequal: dict[
            tuple[Expr, Expr], None
        ] = {}  # sizes that broadcasting takes for equal, though they look different
        past = {
            d.value
            for v in graph.inputs
            if v.shape is not None and len(v.shape) > 3
            for d in v.shape[1:]
            if isinstance(d, ir.SymbolicDim)
        }
        self._positive = set()
        for v in graph.inputs:
            if v.shape is not None:
                axes = v.shape if len(v.shape) <= 3 else v.shape[:1]
                self._positive |= {d.value for d in axes if isinstance(d, ir.SymbolicDim)} - past

    # ------------------------------------------------------------------------------------------ sizes

    def size(self, dim: int | str | ir.SymbolicDim | None, otherwise: str) -> Expr:
        """A dimension as an expression; `otherwise` names a size that is unknown. An input of rank <= 3 isn't empty:
        if it were, there would be no scores; a dimension of a cache may be 0."""
        if isinstance(dim, int):
            return ia.const(dim)
        name = dim.value if isinstance(dim, ir.SymbolicDim) else dim
        if name is None or name.startswith("?"):
            return self._named(otherwise)
        return self._named(name) if name.isidentifier() else self._parsed(name)

    def _named(self, name: str) -> Expr:
        if name not in self._sizes:
            self._sizes[name] = ia.sym(name, 1 if name in self._positive else 0)
        return self._sizes[name]

    def _parsed(self, text: str) -> Expr:
        """PyTorch writes sizes such as "past + sequence" or "(4*batch)//batch"."""
        try:
            return self._evaluate(ast.parse(text.strip(), mode="eval").body)
        except (SyntaxError, Unknown):
            return self._named(text)

    def _evaluate(self, e: ast.expr) -> Expr:
        if isinstance(e, ast.Name):
            return self._named(e.id)
        if isinstance(e, ast.Constant) and isinstance(e.value, int):
            return ia.const(e.value)
        if isinstance(e, ast.UnaryOp) and isinstance(e.op, ast.USub):
            return ia.neg(self._evaluate(e.operand))
        if isinstance(e, ast.BinOp):
            operators = {ast.Add: ia.add, ast.Sub: ia.sub, ast.Mult: ia.mul, ast.FloorDiv: ia.floordiv}
            if type(e.op) in operators:
                return operators[type(e.op)](self._evaluate(e.left), self._evaluate(e.right))
        if (
            isinstance(e, ast.Call)
            and isinstance(e.func, ast.Name)
            and e.func.id in ("Max", "Min")
            and len(e.args) == 2
        ):
            return (ia.maximum if e.func.id == "Max" else ia.minimum)(*map(self._evaluate, e.args))
        raise Unknown

    def declared_shape(self, value: ir.Value) -> Shape:
        dims = list(value.shape) if value.shape is not None else None
        derived = self._shapes(value) if dims is None or any(not isinstance(d, int) for d in dims) else None
        if dims is None:
            dims = derived
        elif derived is not None and len(derived) == len(
            dims
        ):  # its names are those of the inputs; the file's may be an exporter's own
            dims = [b if b is not None and not isinstance(a, int) else a for a, b in zip(dims, derived, strict=True)]
        if dims is None:
            raise Unknown
        return tuple(self.size(d, f"{value.name}.{k}") for k, d in enumerate(dims))

    def shape(self, value: ir.Value) -> Shape | None:
        """The shape of any value of the model, without a look at its elements where somebody knows it already."""
        dims = self._shapes(value)
        if dims is not None and all(d is not None for d in dims):
            return tuple(self.size(d, "") for d in dims)
        found = self.known(value)
        return None if found is None else found.shape

    # ------------------------------------------------------------------------------------------ values

    def tensor(self, value: ir.Value) -> Tensor:
        """The abstract tensor of `value`. Raises Unknown where not even the rank is known."""
        stack = [value]
        while stack:  # producers first, without recursion: models are deep
            top = stack[-1]
            node = top.producer()
            pending = (
                []
                if node is None or top in self._memo
                else [v for v in node.inputs if v is not None and v not in self._memo]
            )
            if pending and self._wanted(node):
                stack += pending
            else:
                stack.pop()
                if top not in self._memo:
                    self._memo[top] = self._interpret(top)
                    if self._memo[top] is not None and self._memo[top].value is None:
                        self._memo[top].value = top
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
        return node.domain in ("", "ai.onnx") and node.op_type in _TRANSFERS

    def is_opaque(self, value: ir.Value) -> bool:
        """True where the elements of `value` are not derived from anything."""
        found = self.known(value)
        return found is None or found.opaque

    def _interpret(self, value: ir.Value) -> Tensor | None:
        constant = ir.convenience.get_const_tensor(value)
        if constant is not None:
            return constant_tensor(value, constant)
        node = value.producer()
        if node is not None and self._wanted(node):
            try:
                if value is node.outputs[0] or node.op_type == "Split":
                    function = _TRANSFERS[node.op_type]
                    return function(self, node) if node.op_type != "Split" else function(self, node, value.index())
            except (Unknown, RecursionError, ValueError, IndexError):  # also where a node breaks ONNX's rules
                pass
        try:
            return opaque(value, self.declared_shape(value), value.dtype)
        except Unknown:
            return None

    # -------------------------------------------------------------------------------------- help for transfer functions

    def input(self, node: ir.Node, k: int) -> Tensor:
        found = self._memo.get(node.inputs[k]) if k < len(node.inputs) and node.inputs[k] is not None else None
        if found is None:
            raise Unknown
        return found

    def optional(self, node: ir.Node, k: int) -> Tensor | None:
        return self.input(node, k) if k < len(node.inputs) and node.inputs[k] is not None else None

    def broadcast(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of an element-wise result. Two sizes that may differ are taken for equal, as the model must run."""
        rank = max(map(len, shapes))
        result = []
        for k in range(rank):
            sizes = [s[len(s) - rank + k] for s in shapes if len(s) - rank + k >= 0]
            sizes = [s for s in dict.fromkeys(sizes) if ia.value_of(s) != 1]
            for other in sizes[1:]:
                self.unequal[(sizes[0], other)] = None
            fixed = [s for s in sizes if ia.value_of(s) is not None]
            result.append((fixed or sizes or [ia.ONE])[0])
        return tuple(result)

    def dtype(self, node: ir.Node, k: int = 0) -> ir.DataType:
        found = self.input(node, k).dtype
        if found is None:
            raise Unknown
        return found
