# SPDX-License-Identifier: Apache-2.0
"""Every transfer function against onnx's reference implementation: an element's expression evaluates to the element."""

from __future__ import annotations

import itertools
import math
import operator

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from faexport.sizes import algebra as ia
from faexport.sizes.algebra import Expr
from faexport.understand.index.interpreter import Interpreter
from faexport.understand.mask import proof  # noqa: F401  (registers the transfer functions)
from faexport.understand.shapes.analysis import Analysis
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

EMPTY = Analysis(ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}), ir_version=10))
SIZES = {"B": 2, "S": 5, "T": 3}
INPUTS = {"x": ["B", "S"], "y": ["B", 1, "S"], "flag": ["B", "S"], "f": ["B", "S"], "past": ["B", 2, "T", 4]}
TYPES = {"flag": TensorProto.BOOL, "f": TensorProto.FLOAT, "past": TensorProto.FLOAT}


class Numbers:
    """Evaluates expressions at numbers: index variables, sizes, and elements of arrays."""

    def __init__(self, arrays: dict[ir.Value, np.ndarray], variables: dict[str, int]):
        self.arrays, self.variables = arrays, variables

    def __call__(self, e: Expr) -> float | int | bool:
        if e.op == "poly":
            return sum(c * math.prod(self(a) for a in m) for m, c in e.args)
        return getattr(self, f"_{e.op}")(e)

    def _var(self, e: Expr) -> int:
        return self.variables[e.args[0]]

    def _sym(self, e: Expr) -> int:
        return SIZES[e.args[0]]

    def _load(self, e: Expr) -> float:
        return self.arrays[e.args[0]][tuple(self(i) for i in e.args[1])].item()

    def _min(self, e: Expr) -> int:
        return min(map(self, e.args))

    def _max(self, e: Expr) -> int:
        return max(map(self, e.args))

    def _last(self, e: Expr) -> int:
        return self(e.args[0]) or self(e.args[1])

    def _meet(self, e: Expr) -> int:
        return max(map(self, e.args))

    def _abs(self, e: Expr) -> int:
        return abs(self(e.args[0]))

    def _floordiv(self, e: Expr) -> int:
        return self(e.args[0]) // self(e.args[1])

    def _choose(self, e: Expr) -> float:
        return self(e.args[1] if self(e.args[0]) else e.args[2])

    def _true(self, _: Expr) -> bool:
        return True

    def _false(self, _: Expr) -> bool:
        return False

    def _not(self, e: Expr) -> bool:
        return not self(e.args[0])

    def _and(self, e: Expr) -> bool:
        return all(map(self, e.args))

    def _or(self, e: Expr) -> bool:
        return any(map(self, e.args))

    def _ge0(self, e: Expr) -> bool:
        return self(e.args[0]) >= 0

    def _eq0(self, e: Expr) -> bool:
        return self(e.args[0]) == 0

    def _float(self, e: Expr) -> float:
        return float(e.args[0])

    def _cast(self, e: Expr) -> float:
        return float(self(e.args[0]))

    def _fop(self, e: Expr) -> float:
        function = {
            "Add": np.add,
            "Sub": np.subtract,
            "Mul": np.multiply,
            "Div": np.divide,
            "Max": np.maximum,
            "Neg": np.negative,
        }
        return float(function[e.args[0]](*map(self, e.args[2:])))

    def _fcmp(self, e: Expr) -> bool:
        a, b = self(e.args[1]), self(e.args[2])
        special = {"isnan": math.isnan(a), "isinf": math.isinf(a)}
        return {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, **special}[e.args[0]]

    def _opaque_int(self, e: Expr) -> int:
        args = [self(a) for a in e.args[1:]]
        functions = {"to INT64": int, "Div": lambda a, b: int(a / b), "Mod": operator.mod}
        functions |= {"fmod": math.fmod, "rounded down": operator.floordiv}
        return int(functions[e.args[0]](*args))


# All places of some rows i and columns q, as TorchScript lists them for x[:, q] = …; s is the shape of the part.
PLACES = "n = Shape(x) {'end': 1}; m = Squeeze(n); i = Range(0, m, 1); p = Unsqueeze(i, [1]);"
LISTED = (
    "a = Expand(p, s); b = Expand(q, s); d = Unsqueeze(a, [2]); e = Unsqueeze(b, [2]); c = Concat(d, e) {'axis': 2};"
)

INFINITE = "z = Cast(0) {'to': 1}; a = Less(f, z); b = Log(z); n = Neg(b); c = Where(a, b, n); i = Where(flag, c, f);"

# Each case: lines "result = Op(inputs) {attributes}" over INPUTS and integer constants written as numbers or lists.
CASES = {
    "Identity": "a = Neg(x); r = Identity(a)",
    "Unsqueeze": "r = Unsqueeze(x, [0, -1])",
    "Squeeze": "r = Squeeze(y, [1])",
    "Transpose": "r = Transpose(y) {'perm': [2, 0, 1]}",
    "Expand": "s = Shape(past) {'end': 2}; t = Shape(x) {'start': 1}; u = Concat(s, t) {'axis': 0}; r = Expand(y, u)",
    "Tile": "r = Tile(x, [2, 3])",
    "Pad": "r = Pad(x, [0, 1, 2, 0], 7)",
    "Pad by a size": "t = Shape(past) {'start': 2, 'end': 3}; b = Concat(t, [2]) {'axis': 0}; r = Pad(x, b, 0, [-1])",
    "Concat": "r = Concat(x, x, x) {'axis': 1}",
    "Slice": "r = Slice(x, [1], [4], [1])",
    "Slice from the end": "r = Slice(x, [-2], [9223372036854775807], [1])",
    "Slice by two": "r = Slice(x, [1], [5], [1], [2])",
    "Slice backward": "r = Slice(x, [-1], [-9223372036854775807], [1], [-1])",
    "Reshape merges": "r = Reshape(y, [-1])",
    "Reshape splits": "a = Reshape(x, [-1]); s = Shape(y); r = Reshape(a, s)",
    "Reshape copies": "r = Reshape(y, [0, -1])",
    "Flatten": "r = Flatten(y) {'axis': 2}",
    "Gather": "i = Range(3, 0, -1); r = Gather(x, i) {'axis': 1}",
    "Gather backward": "r = Gather(x, -1) {'axis': 1}",
    "Gather flat": "a = Reshape(x, [-1]); n = Size(x); i = Range(0, n, 1); r = Gather(a, i)",
    "GatherElements": "i = Mul(x, 0); r = GatherElements(x, i) {'axis': 1}",
    "GatherND": "i = Range(0, 2, 1); a = Unsqueeze(i, [1]); r = GatherND(y, a)",
    "ScatterND": "z = Mul(x, 0); s = Slice(z, [0], [1], [0]); r = ScatterND(x, [[1]], s)",
    "ScatterND of all places": f"{PLACES} s = Shape(x); w = Gather(s, 1); q = Range(0, w, 1); {LISTED} "
    "u = Neg(x); r = ScatterND(x, c, u)",
    "ScatterND of a part": f"{PLACES} s = Concat(n, [2]) {{'axis': 0}}; q = Range(1, 3, 1); {LISTED} "
    "z = Neg(x); u = Slice(z, [1], [3], [1]); r = ScatterND(x, c, u)",
    "Slice from a size to the end": "t = Shape(x) {'end': 1}; n = Neg(t); r = Slice(x, n, [9223372036854775807], [1])",
    "Trilu lower": "r = Trilu(past) {'upper': 0}",
    "Trilu upper": "r = Trilu(past, 1)",
    "Range": "n = Size(x); r = Range(2, n, 3)",
    "Range down": "r = Range(7, 0, -2)",
    "Range of floats": "n = Size(x); a = Cast(2) {'to': 1}; b = Cast(n) {'to': 1}; c = Cast(3) {'to': 1}; "
    "r = Range(a, b, c)",
    "ConstantOfShape": "s = Shape(x); r = ConstantOfShape(s)",
    "Shape": "r = Shape(past) {'start': 1}",
    "Size": "r = Size(past)",
    "EyeLike": "r = EyeLike(x) {'k': 1}",
    "Split": "r = Split(past, [1, 3]) {'axis': 3}",
    "And": "a = Greater(x, 1); r = And(a, flag)",
    "Or": "a = Greater(x, 1); r = Or(a, flag)",
    "Xor": "a = Greater(x, 1); r = Xor(a, flag)",
    "Not": "r = Not(flag)",
    "Where": "r = Where(flag, x, 7)",
    "Less": "r = Less(x, y)",
    "LessOrEqual": "r = LessOrEqual(x, y)",
    "Greater": "r = Greater(x, y)",
    "GreaterOrEqual": "r = GreaterOrEqual(x, y)",
    "Equal": "r = Equal(x, y)",
    "Equal of bools": "a = Greater(x, 1); r = Equal(a, flag)",
    "Less of floats": "a = Neg(f); r = Less(f, a)",
    "IsNaN": "r = IsNaN(f)",
    "IsInf": f"{INFINITE} r = IsInf(i)",
    "IsInf above": f"{INFINITE} r = IsInf(i) {{'detect_negative': 0}}",
    "IsInf below": f"{INFINITE} r = IsInf(i) {{'detect_positive': 0}}",
    "IsInf of neither sign": f"{INFINITE} r = IsInf(i) {{'detect_positive': 0, 'detect_negative': 0}}",
    "Cast to bool": "r = Cast(x) {'to': 9}",
    "Cast to float": "a = Cast(x) {'to': 1}; r = Mul(a, f)",
    "Cast of bool": "a = Cast(flag) {'to': 7}; r = Add(a, x)",
    "Cast to a narrow integer": "i = Range(0, 9, 1); a = Cast(i) {'to': 6}; r = Cast(a) {'to': 7}",
    "broadcast of sizes that may be 1": "a = Gather(past, [0]) {'axis': 3}; b = Cast(a) {'to': 7}; r = Add(b, y)",
    "Cast to int": "r = Cast(f) {'to': 7}",
    "CastLike": "r = CastLike(flag, f)",
    "Add": "r = Add(x, y)",
    "Sub": "r = Sub(x, y)",
    "Mul": "r = Mul(x, y)",
    "Div": "i = Range(0, 9, 1); r = Div(i, 4)",
    "Div of any sign": "a = Neg(x); r = Div(a, 2)",
    "Mod": "i = Range(0, 9, 1); r = Mod(i, 4)",
    "Mod of any sign": "a = Sub(x, y); r = Mod(a, 3)",
    "fmod of any sign": "a = Sub(x, y); r = Mod(a, 3) {'fmod': 1}",
    "floor division": "a = Sub(x, y); i = Sign(a); n = Equal(i, 1); o = Not(n); c = Mod(a, 2); e = Cast(c) {'to': 9}; "
    "b = And(o, e); d = Div(a, 2); w = Cast(b) {'to': 7}; r = Sub(d, w)",
    "floor division by a negative number": "i = Less(x, 0); n = Less(-3, 0); o = Xor(i, n); "
    "c = Mod(x, -3) {'fmod': 1}; e = Equal(c, 0); v = Not(e); b = And(o, v); d = Div(x, -3); w = Cast(b) {'to': 7}; "
    "r = Sub(d, w)",
    "floor division by a tensor": "z = Add(y, 1); i = Sign(x); n = Sign(z); o = Equal(i, n); a = Not(o); "
    "c = Mod(x, z); e = Cast(c) {'to': 9}; b = And(a, e); d = Div(x, z); w = Cast(b) {'to': 7}; r = Sub(d, w)",
    "Neg": "r = Neg(x)",
    "Abs": "a = Sub(x, y); r = Abs(a)",
    "Min": "r = Min(x, y)",
    "Max": "r = Max(x, y)",
    "Clip": "r = Clip(x, 1, 2)",
    "CumSum of ones": "s = Shape(x); o = Expand(1, s); r = CumSum(o, 1)",
    "CumSum exclusive": "s = Shape(x); o = Expand(2, s); r = CumSum(o, 1) {'exclusive': 1}",
    "CumSum reverse": "s = Shape(x); o = Expand(2, s); r = CumSum(o, 1) {'reverse': 1}",
    "not (1 - mask)": "a = Cast(x) {'to': 9}; b = Cast(a) {'to': 7}; c = Sub(1, b); r = Cast(c) {'to': 9}",
}


def parse(text: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    nodes, constants = [], []
    for line in text.split("; "):
        output, call = line.split(" = ", 1)
        op_type, rest = call.split("(", 1)
        inner, _, attributes = rest.rpartition(")")
        given = eval(f"[{inner}]", {name: name for name in [*INPUTS, *"rstuaboncziwdevmpq"]})
        names = []
        for item in given:
            if isinstance(item, str):
                names.append(item)
            else:
                names.append(f"c{len(constants)}")
                constants.append(numpy_helper.from_array(np.asarray(item, np.int64), names[-1]))
        outputs = [output, f"{output}_rest"] if op_type == "Split" else [output]
        nodes.append(helper.make_node(op_type, names, outputs, **eval(attributes.strip() or "{}")))
    return nodes, constants


@pytest.mark.parametrize("name", CASES)
def test_elements(name: str) -> None:
    nodes, constants = parse(CASES[name])
    inputs = [helper.make_tensor_value_info(n, TYPES.get(n, TensorProto.INT64), s) for n, s in INPUTS.items()]
    graph = helper.make_graph(nodes, "g", inputs, [onnx.ValueInfoProto(name="r")], constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    random = np.random.default_rng(0)
    feeds = {n: draw(n, [SIZES.get(d, d) for d in shape], random) for n, shape in INPUTS.items()}
    (want,) = ReferenceEvaluator(proto).run(None, feeds)
    model = ir.from_proto(proto)
    tensor = Interpreter(Analysis(model)).tensor(model.graph.outputs[0])
    assert not tensor.opaque
    arrays = {v: feeds[v.name] for v in model.graph.inputs}
    assert tuple(Numbers(arrays, {})(s) for s in tensor.shape) == want.shape
    index = tuple(ia.var(f"i{k}", [s]) for k, s in enumerate(tensor.shape))
    element = tensor.at(index)
    for place in itertools.product(*(range(n) for n in want.shape)):
        got = Numbers(arrays, {f"i{k}": n for k, n in enumerate(place)})(element)
        assert got == pytest.approx(want[place].item(), rel=1e-6), (place, element)


def draw(name: str, shape: list[int], random: np.random.Generator) -> np.ndarray:
    if name == "flag":
        return random.random(shape) < 0.5
    return random.standard_normal(shape).astype(np.float32) if name in TYPES else random.integers(0, 4, shape)


@pytest.mark.parametrize("dtype", (np.bool_, np.float32, np.int64))
@pytest.mark.parametrize(
    "make", (np.tril, np.triu, lambda a: np.triu(np.tril(a, 1), -2), lambda a: np.tril(a, 3), lambda a: 1 - np.tril(a))
)
def test_triangles_and_bands_are_recognised(make, dtype: type) -> None:
    """A buffer becomes a rule of its indices, tested on every element."""
    array = make(np.ones((1, 6, 7))).astype(dtype)
    value = ir.Value(name="buffer", const_value=ir.tensor(array))
    tensor = Interpreter(EMPTY).tensor(value)
    index = (ia.ZERO, ia.var("i1", [ia.const(6)]), ia.var("i2", [ia.const(7)]))
    element = tensor.at(index)
    assert not ia.atoms(element, "load")
    for i, j in itertools.product(range(6), range(7)):
        assert Numbers({}, {"i1": i, "i2": j})(element) == array[0, i, j]


@pytest.mark.parametrize(
    "array",
    (
        np.array([-1, 2**63 - 1, 5]),
        np.array([0, 2**62, -(2**63), -(2**62)]),  # steps of 2**62, if they wrap around
        np.array([0, 2**63 + 4, 1], np.uint64),
        np.array([0.5, -np.inf], ml_dtypes.float8_e5m2),
        np.full(2, 0.5, ml_dtypes.float8_e5m2),
        np.array([1j, 2.0]),
    ),
    ids=lambda array: f"{array.dtype} {array[0]}",
)
def test_arrays_without_a_rule_are_read_by_their_elements(array: np.ndarray) -> None:
    tensor = Interpreter(EMPTY).tensor(ir.Value(name="b", const_value=ir.tensor(array)))
    for index in (ia.var("i", [ia.const(len(array))]), ia.ZERO):
        element = tensor.at((index,))
        is_stored = bool(ia.atoms(element, "load")) or element.op == "load"
        assert is_stored or (array.dtype.kind in "iu" and ia.value_of(element) == array[0])


def test_a_dropout_that_drops_is_not_looked_through() -> None:
    for training in (False, True):
        model = onnx.parser.parse_model(
            '<ir_version: 9, opset_import: ["": 20]> g (float[N] x) => (float[N] r) '
            f"<float ratio = {{0.5}}, bool training = {{{int(training)}}}> {{ r = Dropout (x, ratio, training) }}"
        )
        loaded = ir.from_proto(model)
        assert Interpreter(Analysis(loaded)).tensor(loaded.graph.outputs[0]).opaque is training


def test_a_triangle_with_one_wrong_element_is_not_recognised() -> None:
    array = np.tril(np.ones((6, 6), np.bool_))
    array[2, 5] = True
    tensor = Interpreter(EMPTY).tensor(ir.Value(name="b", const_value=ir.tensor(array)))
    element = tensor.at(tuple(ia.var(f"i{k}", [ia.const(6)]) for k in range(2)))
    assert ia.atoms(element, "load") or element.op == "load"
