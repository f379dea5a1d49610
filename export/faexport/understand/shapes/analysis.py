# SPDX-License-Identifier: Apache-2.0
"""What is known of every value of a model: symbolic shape, contents of small integer tensors, constants.

Made once per model by pipeline.py and read by everything that proves: the only shape inference, and the only place that
knows constants. Own derivation comes first, the file's own shape information fills what it leaves open; unknown sizes
are symbols that equal only themselves. The graph is not changed.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from faexport.errors import InvalidNodeError
from faexport.graph.nodes import always_runs, attribute, name_of, op, operand, own_graphs, producer, subgraphs
from faexport.sizes.algebra import Expr, atoms, only_atom
from faexport.sizes.dims import Dim, is_name, named
from faexport.spec import DOMAIN, OP_TYPE
from faexport.understand.shapes import (  # noqa: F401 (some only register their rules)
    constants,
    rules_attention,
    rules_contents,
    rules_layers,
    rules_operator,
)
from faexport.understand.shapes.known import Shape
from faexport.understand.shapes.limits import Limits, equal_sizes, limits_of
from faexport.understand.shapes.rules import BROADCASTING, CONTENT_RULES, SHAPE_RULES, broadcast
from faexport.understand.shapes.rules_operator import output_dtype

MAX_CONTENTS = 32  # elements of an integer tensor whose contents are followed symbolically

_BOOL_OPS = ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor", "Not", "IsNaN", "IsInf")
DTYPE_OF = (
    dict.fromkeys(_BOOL_OPS, ir.DataType.BOOL)
    | dict.fromkeys(("Shape", "Size", "NonZero", "ArgMax", "ArgMin"), ir.DataType.INT64)
    | dict.fromkeys(("MatMulInteger", "ConvInteger"), ir.DataType.INT32)
)
# The input whose element type the output has, where it is not the first.
TYPED_BY = {"Where": 1, "CastLike": 1, "DequantizeLinear": 1, "OneHot": 2, "com.microsoft::DequantizeLinear": 1}
TYPED_BY["trt::TRT_FP8DequantizeLinear"] = 1
TYPED_BY |= {"QLinearMatMul": 7, "com.microsoft::QLinearMatMul": 7, "com.microsoft::QAttention": 3}
TYPED_BY |= {"com.microsoft::QLinearAdd": 7, "com.microsoft::QLinearMul": 7, "com.microsoft::QLinearSoftmax": 4}
TYPED_BY["com.microsoft::QLinearConcat"] = 1
# The attribute that says the type where it is not that input's.
SAYS_TYPE = dict.fromkeys(("EyeLike", "Bernoulli", "RandomNormalLike", "RandomUniformLike"), "dtype")
SAYS_TYPE["DequantizeLinear"] = "output_dtype"
# Operators all of whose outputs have that type; of others it is known of the first output only.
ALL_TYPED = {"Split", "Attention", "If", "com.microsoft::Attention", "com.microsoft::GroupQueryAttention"}
ALL_TYPED |= {"com.microsoft::MultiHeadAttention", "faexport::FlashAttention"}
# The fourth output, too: the sum that was normalized. The second and third are float32.
SKIPS = {"com.microsoft::SkipLayerNormalization", "com.microsoft::SkipSimplifiedLayerNormalization"}
TYPED_BY |= {"com.microsoft::EmbedLayerNormalization": 2, "com.microsoft::MatMulIntegerToFloat": 2}


class Analysis:
    """Shapes and contents of all values of a model, computed node by node in graph order."""

    def __init__(self, model: ir.Model):
        self.opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))
        self._shapes: dict[ir.Value, Shape | None] = {}
        self._contents: dict[ir.Value, tuple[Dim, ...]] = {}
        self._constants: dict[ir.Value, np.ndarray | None] = {}
        self._dtypes: dict[ir.Value, ir.DataType | None] = {}
        self._static: dict[ir.Value, bool] = {}
        self.invalid_nodes: list[str] = []  # that ONNX's rules don't allow, and why
        self.defects: list[str] = []  # nodes whose rules failed, and how
        self._learnt: dict[Expr, Expr] = {}  # what sizes are at the site that is being looked at
        self._names: dict[Expr, Expr] = {}  # sizes that the file has names of its own for
        self._limits = Limits()  # what sizes are wherever the model runs
        graphs = own_graphs(model)
        inputs = (self.shape(v) or () for graph in graphs for v in graph.inputs)
        self._results = set(model.graph.outputs)
        self._main = model.graph
        self._given = {atom for shape in inputs for d in shape for atom in atoms(d.expr, "sym")}
        for graph in graphs:
            self._visit(graph)

    def extend(self, model: ir.Model) -> None:
        """Looks at the nodes that were put into the model since this was made; what is known of the others stays."""
        self.forget()
        for graph in own_graphs(model):
            self._visit(graph, new_only=True)

    def shape(self, value: ir.Value | None) -> Shape | None:
        """Symbolic sizes of the axes, or None where the rank is unknown."""
        if value is None:
            return None
        if value not in self._shapes:
            self._shapes[value] = self._declared(value)
        shape = self._shapes[value]
        return None if shape is None else self.simplified(shape)

    def known_shape(self, value: ir.Value) -> Shape:
        """The sizes of a value whose rank is known."""
        shape = self.shape(value)
        assert shape is not None
        return shape

    def simplified(self, sizes: Shape) -> Shape:
        """With what was learnt put in, of the whole model and of the site that is being looked at."""
        if self._limits:
            sizes = tuple(d.substitute(self._limits) for d in sizes)
        return tuple(d.substitute(self._learnt) for d in sizes) if self._learnt else sizes

    def learn(self, value: ir.Value, sizes: Shape) -> None:
        """Until `forget`: `value` has these sizes. For a caller who has shown it of the site that it looks at; what
        broadcasting left open, or nothing was known of, then has a name. Not that of what the value meets later on."""
        for own, size in zip(self.shape(value) or (), sizes, strict=False):
            atom = only_atom(own.expr)
            if atom is None:
                continue
            is_open = atom.op == "meet" or (atom.op == "sym" and atom.args[0].startswith("?"))
            if is_open and own.meet(size) != size and atom not in atoms(size.expr, atom.op):
                self._learnt[atom] = size.expr

    def forget(self) -> None:
        """Drops what was learnt: another site is looked at."""
        self._learnt = {}

    @contextlib.contextmanager
    def without_learnt(self) -> Iterator[None]:
        """Inside, answers hold for every site, not just for the one that is being looked at."""
        kept, self._learnt = self._learnt, {}
        try:
            yield
        finally:
            self._learnt = kept

    def leaves(self, size: Dim, whole: Dim) -> bool:
        """Is it known that an axis of `whole` keeps its size where one of `size` is broadcast against it?"""
        return size == 1 or self.simplified((size.meet(whole),)) == self.simplified((whole,))

    def define(self, value: ir.Value, shape: Shape | None) -> None:
        """The shape of a value that isn't in the graph yet. What becomes a mask has the sizes that were not learnt: its
        proof asks again whether the scores keep theirs beside it."""
        self._shapes[value] = shape

    def define_broadcast(self, value: ir.Value, *sources: ir.Value) -> None:
        """The same of a value that is made of these, element by element."""
        with self.without_learnt():
            self.define(value, broadcast([self.shape(source) for source in sources]))

    def rank(self, value: ir.Value | None) -> int | None:
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """Element type, or None where neither the file nor the nodes in front tell."""
        if value is None or value.dtype is not None:
            return None if value is None else value.dtype
        if value not in self._dtypes:
            self._dtypes[value] = self._derive_dtype(value)
        return self._dtypes[value]

    def contents(self, value: ir.Value | None) -> tuple[Dim, ...] | None:
        """Symbolic contents of an integer tensor of rank 0 or 1 (one Dim for a scalar)."""
        if value is None:
            return None
        if value not in self._contents:
            array = self.constant(value)
            if (
                array is None
                or array.ndim > 1
                or array.size > MAX_CONTENTS
                or not np.issubdtype(array.dtype, np.integer)
            ):
                return None
            self._contents[value] = tuple(Dim.of(int(x)) for x in array.reshape(-1))
        return self.simplified(self._contents[value])

    def constant(self, value: ir.Value | None) -> np.ndarray | None:
        """The tensor where it is constant and small, whatever chain of nodes computes it; else None."""
        if value is None:
            return None
        if value not in self._constants:
            self._constants[value] = self._fold(value)
        return self._constants[value]

    @staticmethod
    def tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
        """The tensor of an initializer that no caller can replace, or of a Constant node, whatever its size."""
        return constants.tensor_of(value)

    def scalar(self, value: ir.Value | None) -> float | None:
        """The number where the value is a constant of one element (of any rank)."""
        array = self.constant(value)
        return (
            float(array.reshape(-1)[0]) if array is not None and array.size == 1 and array.dtype != np.bool_ else None
        )

    def is_static(self, value: ir.Value | None) -> bool:
        """Does the value depend on no input of the model? (A weight, or computed from weights alone.)"""
        if value is None:
            return True
        return self._static.get(value, constants.tensor_of(value) is not None)

    def _is_static_node(self, node: ir.Node) -> bool:
        if node.op_type.startswith("Random") or any(True for _ in subgraphs(node)):
            return False
        return all(self.is_static(v) for v in node.inputs)

    def _fold(self, value: ir.Value) -> np.ndarray | None:
        tensor = constants.tensor_of(value)
        if tensor is not None:
            return tensor.numpy() if tensor.size <= constants.MAX_ELEMENTS else None
        node = producer(value)
        contents = self._contents.get(value)
        numbers = [d.const for d in contents or () if d.const is not None]
        if contents is not None and len(numbers) == len(contents):
            if any(abs(number) >= 1 << 63 for number in numbers):
                return None  # runtimes compute on, modulo 2^64
            dtype = self.dtype(value)
            array = np.array(numbers, np.int64 if dtype is None else dtype.numpy())
            return array.reshape(()) if self.rank(value) == 0 else array
        if node is None or node.outputs[0] is not value or op(node) not in constants.FOLD:
            return None
        arrays: list[np.ndarray | None] = []
        for v in node.inputs:
            arrays.append(self.constant(v))
            if v is not None and arrays[-1] is None:
                return None
        return constants.fold(node, arrays)

    def _visit(self, graph: ir.Graph | ir.Function, new_only: bool = False) -> None:
        """Producers first, so that whatever is asked of a value finds the answers about those in front of it."""
        for node in graph:
            for body in subgraphs(node):
                self._visit(body, new_only)
            if new_only and all(value in self._shapes for value in node.outputs):
                continue
            try:
                shapes = self._rules(node)
            except Exception as error:  # a node that breaks ONNX's rules, or a defect of ours: it costs this node only
                self._note_failure(node, error)
                shapes = None
                self._dtypes.update((value, self._dtypes.get(value)) for value in node.outputs)
            for i, value in enumerate(node.outputs):
                self._static[value] = self._is_static_node(node)
                inferred = shapes[i] if shapes is not None and i < len(shapes) else None
                self._shapes[value] = self._merge(inferred, value)
                if self.rank(value) not in (0, 1) or not self._holds(value):
                    self._contents.pop(value, None)
            if op(node) in constants.FOLD and node.outputs:
                self.constant(node.outputs[0])

    def _note_failure(self, node: ir.Node, error: Exception) -> None:
        where = f"node '{name_of(node)}' ({op(node)})"
        if isinstance(error, InvalidNodeError):
            self.invalid_nodes.append(f"{where}: {error}")
            return
        if os.environ.get("FAEXPORT_TRACEBACK"):
            traceback.print_exc()
        self.defects.append(f"{where}: {type(error).__name__}: {error}")

    def _holds(self, value: ir.Value) -> bool:
        """Can a value's type hold the numbers among its contents? Else they wrap around, as constants.py computes."""
        dtype, contents = self.dtype(value), self._contents.get(value, ())
        if dtype is None or not np.issubdtype(dtype.numpy(), np.integer):
            return not contents
        limits = np.iinfo(dtype.numpy())
        return all(d.const is None or limits.min <= d.const <= limits.max for d in contents)

    def _rules(self, node: ir.Node) -> Sequence[Shape | None] | None:
        """Notes types and contents of a node's outputs; returns their shapes."""
        for value in node.outputs:
            self.dtype(value)
        rule = CONTENT_RULES.get(op(node))
        contents = rule(node, self) if rule else None
        known = contents if isinstance(contents, list) else [contents]
        for value, elements in zip(node.outputs, known, strict=False):
            if elements is not None and len(elements) <= MAX_CONTENTS:
                self._contents[value] = elements
        if node.graph is self._main:
            self._learn_limits(node)
        shape_rule = SHAPE_RULES.get(op(node))
        return shape_rule(node, self) if shape_rule else None

    def _learn_limits(self, node: ir.Node) -> None:
        """What a node tells of sizes by failing with others."""
        met = [self.shape(v) for v in node.inputs] if op(node) in BROADCASTING or op(node) == "MatMul" else []
        if op(node) == "MatMul":
            met = [shape[:-2] for shape in met if shape is not None]
        limits, equal = limits_of(met), list(equal_sizes(met))
        if (limits or equal) and always_runs(node):
            self._limits.learn(limits)
            for pair in equal:
                self._limits.learn_equal(*pair)

    def _derive_dtype(self, value: ir.Value) -> ir.DataType | None:
        node = producer(value)
        if node is None:
            tensor = constants.tensor_of(value)
            return tensor.dtype if tensor is not None else None
        kind = op(node)
        if kind == "Cast":
            return ir.DataType(attribute(node, "to"))
        if said := attribute(node, SAYS_TYPE.get(kind, "")):
            return ir.DataType(said)
        if kind in DTYPE_OF:
            return DTYPE_OF[kind]
        if kind == "If":
            return self.dtype(attribute(node, "then_branch").outputs[node.outputs.index(value)])
        if kind in ("Loop", "Scan"):
            return None
        if kind == "Constant":
            tensor = constants.tensor_of(value)
            return None if tensor is None else tensor.dtype
        if kind == "ConstantOfShape":
            tensor = attribute(node, "value")
            return ir.DataType.FLOAT if tensor is None else tensor.dtype
        if kind == "DynamicQuantizeLinear":
            return ir.DataType.FLOAT if value is node.outputs[1] else ir.DataType.UINT8
        if kind in ("QuantizeLinear", "com.microsoft::QuantizeLinear"):
            stated = attribute(node, "output_dtype") or ir.DataType.UINT8
            return self.dtype(operand(node, 2)) or ir.DataType(stated)
        if kind == "trt::TRT_FP8QuantizeLinear":
            return ir.DataType.FLOAT8E4M3FN
        is_sum = kind in SKIPS and value is node.outputs[-1] and len(node.outputs) == 4
        if value is not node.outputs[0] and kind not in ALL_TYPED and not is_sum:
            return None
        if kind == f"{DOMAIN}::{OP_TYPE}":
            query = self.dtype(operand(node, 0))
            return None if query is None else output_dtype(query, attribute(node, "output_dtype") or "")
        return self.dtype(operand(node, TYPED_BY.get(kind, 0)))

    def _declared(self, value: ir.Value) -> Shape | None:
        if value.shape is None:
            tensor = constants.tensor_of(value)
            return None if tensor is None else tuple(Dim.of(d) for d in tensor.shape.numpy())
        declared = (self._declared_dim(value, i, d) for i, d in enumerate(value.shape))
        return tuple(d.substitute(self._names) if self._names else d for d in declared)

    @staticmethod
    def _declared_dim(value: ir.Value, axis: int, dim: int | ir.SymbolicDim) -> Dim:
        if isinstance(dim, int):
            return Dim.of(dim)
        return named(str(dim.value)) if is_name(dim.value) else Dim.unknown(f"{value.name}.{axis}")

    def _merge(self, inferred: Shape | None, value: ir.Value) -> Shape | None:
        """The derived shape, with sizes that only the file knows; a file that contradicts the derivation is not
        believed."""
        if inferred is None:
            return self._declared(value)
        declared = self._declared(value)
        if value.shape is None or declared is None or len(declared) != len(inferred):
            return inferred
        if declared == inferred:
            return inferred
        for dim, known in zip(inferred, declared, strict=True):
            self._note_name(known, dim)
        # Runtimes plan memory by what a file says of values inside; of its outputs a wrong word does no harm.
        inside = value not in self._results
        pairs = zip(inferred, declared, strict=True)
        return tuple(known if _says_more(known, dim, inside) else dim for dim, known in pairs)

    def _note_name(self, declared: Dim, inferred: Dim) -> None:
        """Where the file has a name of its own for a size that is derived, it means that size everywhere."""
        atom = only_atom(declared.expr)
        if atom is None or not inferred.is_known or declared == inferred or atom in self._given:
            return
        if atom not in atoms(inferred.expr, atom.op):
            self._names.setdefault(atom, inferred.expr)


def _says_more(declared: Dim, inferred: Dim, inside: bool) -> bool:
    """Is the file's size better than the derived one? Only where the derivation knows nothing of it, or, of a value
    `inside` of the model, leaves open which of two sizes that meet it is."""
    if inferred.const is not None or not (declared.const is not None or declared.is_known):
        return False
    atom = only_atom(inferred.expr)
    is_open = inside and atom is not None and atom.op == "meet" and declared.expr in atom.args
    return is_open or all(s.startswith("?") for s in inferred.symbols)
