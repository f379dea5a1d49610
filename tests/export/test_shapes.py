# SPDX-License-Identifier: Apache-2.0
"""What the analysis concludes of shapes, where no site of the other tests shows it."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from faexport.sizes import algebra
from faexport.sizes.dims import named
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.evaluate import evaluate
from onnx.reference import ReferenceEvaluator

BEHIND_A_TABLE = """<ir_version: 8, opset_import: ["" : 17, "other" : 1]>
main (float[b, s, 8] x, float[128, 8] table) => (float[b, s, 8] y) {
    zero = Constant <value_ints = [0]> ()
    length = Shape <start = 1, end = 2> (x)
    positions = Slice (table, zero, length, zero)
    sum = Add (x, positions)
    own = other.Unknown (sum)
    y = Relu (own)
}"""


def test_a_size_that_the_file_calls_a_minimum_is_the_derived_one() -> None:
    """PyTorch's exporter calls it so behind a table of positions; other tensors have the size's own name."""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(BEHIND_A_TABLE))
    values = {value.name: value for node in model.graph for value in node.outputs}
    for name in ("sum", "own"):
        values[name].shape = ir.Shape(["b", "Min(128, s)", 8])
    analysis = Analysis(model)
    for name in ("sum", "own"):
        assert [str(size) for size in analysis.shape(values[name])] == ["b", "s", "8"], name


TWO_UNKNOWN_SIZES = """<ir_version: 8, opset_import: ["" : 17]>
main (float[b, s, 8] x) => (float[m, n] y) {
    target = Constant <value_ints = [-1, -1]> ()
    z = Reshape (x, target)
    y = Relu (z)
}"""


def test_a_reshape_to_two_unknown_sizes_has_no_shape() -> None:
    """No runtime takes it, so nothing is derived; that is no defect of the analysis."""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(TWO_UNKNOWN_SIZES))
    analysis = Analysis(model)
    assert analysis.shape(model.graph.node(1).outputs[0]) is None
    assert not analysis.defects


def types_of_results(text: str) -> dict[str | None, ir.DataType | None]:
    """What the analysis knows of the type of each node's results."""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    analysis = Analysis(model)
    return {value.name: analysis.dtype(value) for node in model.graph for value in node.outputs}


RESIDUALS = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
main (float16[b, s, 8] x, float16[8] weight) => (float16[b, s, 8] y) {
    normed, m, v, sum = com.microsoft.SkipLayerNormalization (x, x, weight)
    rms, n, w, more = com.microsoft.SkipSimplifiedLayerNormalization (normed, sum, weight)
    y = Add (rms, more)
}"""


def test_the_sum_beside_a_norm_has_the_type_of_what_is_added() -> None:
    """Models of onnxruntime-genai may say no type of values inside."""
    values = types_of_results(RESIDUALS)
    assert values["sum"] == values["more"] == values["normed"] == ir.DataType.FLOAT16
    assert values["m"] is None  # float32, which nobody asks for


SAID = """<ir_version: 11, opset_import: ["" : 23]>
main (float[2] x, int8[2] n, float scale) => (float16[2] y) {
    read = DequantizeLinear <output_dtype = 10> (n, scale)  plain = DequantizeLinear (n, scale)
    drawn = RandomNormalLike <dtype = 10> (x)  like = RandomUniformLike (x)  coin = Bernoulli <dtype = 10> (x)
    y = Add (read, drawn)
}"""


def test_the_type_that_an_attribute_says_comes_before_that_of_an_input() -> None:
    types = types_of_results(SAID)
    half, single = ir.DataType.FLOAT16, ir.DataType.FLOAT
    assert types == {"read": half, "plain": single, "drawn": half, "like": single, "coin": half, "y": half}


CONSTANTS = """<ir_version: 8, opset_import: ["" : 17]>
main (float[5, 5] x) => (int64[n] y) {
    zero = Constant <value_int = 0> ()  one = Constant <value_int = 1> ()  axis = Constant <value_ints = [1]> ()
    pair = Constant <value_ints = [0, 1]> ()  column_of_5 = Constant <value_ints = [5, 1]> ()
    sizes = Shape (x)  rows = Gather (sizes, zero)  line = Range (zero, rows, one)
    column = Unsqueeze (line, axis)  square = Sub (column, line)  back = Squeeze (column, axis)
    again = Identity (column)  shaped = Reshape (line, column_of_5)  product = Mul (column, line)  minus = Neg (square)
    twos = Add (one, one)  halves = Div (square, twos)  least = Min (column, line)
    both = Concat <axis = 1> (column, column)
    scalar = Squeeze (axis)  boxed = Unsqueeze (scalar, pair)
    keep = LessOrEqual (line, column)  wide = Where (keep, column, line)
    large = Constant <value = int32[2] {65536, 7}> ()  wrapped = Mul (large, large)  negative = Neg (large)
    huge = Constant <value_ints = [4294967296, 4294967303]> ()  cut = Cast <to = 6> (huge)  like = CastLike (huge, cut)
    byte = Constant <value = uint8[2] {3, 255}> ()  two = Constant <value = uint8[2] {5, 2}> ()
    tenths = Constant <value_floats = [0.1, 0.5]> ()  power = Pow (tenths, pair)
    under = Sub (byte, two)  over = Add (byte, two)  times = Mul (byte, two)
    y = Identity (line)
}"""


def test_what_is_constant_is_what_the_nodes_compute() -> None:
    """Its shape and type too, also where the file tells neither."""
    proto = onnx.parser.parse_model(CONSTANTS)
    names = [name for node in proto.graph.node for name in node.output]
    outputs = ReferenceEvaluator(proto.graph, opsets={"": 17}).run(names, {"x": np.zeros((5, 5), np.float32)})
    model = ir.from_proto(proto)
    analysis = Analysis(model)
    values = {value.name: value for node in model.graph for value in node.outputs}
    for name, expected in zip(names, outputs, strict=True):
        found = analysis.constant(values[name])
        assert found is not None, name
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
        np.testing.assert_array_equal(found, expected, err_msg=name)


QUOTIENTS = """<ir_version: 8, opset_import: ["" : 17]>
main () => (int64[3] y) {
    odd = Constant <value_ints = [9007199254740993, -9007199254740993, -7]> ()
    divisor = Constant <value_ints = [1, 1, 2]> ()  y = Div (odd, divisor)
}"""


def test_quotients_of_integers_are_exact() -> None:
    """Written down, as the reference of onnx before 1.21 divides integers as float64."""
    model = ir.from_proto(onnx.parser.parse_model(QUOTIENTS))
    assert list(Analysis(model).constant(model.graph.outputs[0])) == [9007199254740993, -9007199254740993, -3]


NO_STEP = """<ir_version: 8, opset_import: ["" : 17]>
main () => (int64[n] y) {
    zero = Constant <value_int = 0> ()  one = Constant <value_int = 1> ()  y = Range (zero, one, zero)
}"""


def test_a_range_that_never_ends_is_no_constant() -> None:
    """No runtime takes it: it is the model's fault, and no defect of the analysis."""
    model = ir.from_proto(onnx.parser.parse_model(NO_STEP))
    assert Analysis(model).constant(model.graph.outputs[0]) is None


RESIZING = {
    "a pool": "y = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (x)",
    "a pool with gaps": "y = MaxPool <kernel_shape = [2, 3], dilations = [3, 1], strides = [1, 2]> (x)",
    "a mean": "y = AveragePool <kernel_shape = [2, 2], strides = [2, 2], pads = [0, 1, 1, 0]> (x)",
    "a pool that rounds up what is even": "y = MaxPool <kernel_shape = [1, 2], strides = [1, 4], ceil_mode = 1> (x)",
    "sizes": "n = Constant <value_ints = [2, 3, 5, 4]> () y = Resize (x, , , n)",
    "scales": "s = Constant <value_floats = [1.0, 1.0, 0.3, 1.7]> () y = Resize (x, , s)",
    "scales that are inexact": "s = Constant <value_floats = [1.0, 1.0, 0.36363637, 0.7]> () y = Resize (x, , s)",
}


@pytest.mark.parametrize("name", RESIZING)
def test_pools_and_resizes_have_the_sizes_that_onnxruntime_gives_them(name: str) -> None:
    header = '<ir_version: 8, opset_import: ["" : 17]> main (float[2, 3, 11, 10] x) => (float[a, b, c, d] y)'
    proto = onnx.parser.parse_model(f"{header} {{ {RESIZING[name]} }}")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.zeros((2, 3, 11, 10), np.float32)})
    model = ir.serde.deserialize_model(proto)
    assert [size.const for size in Analysis(model).shape(model.graph.outputs[0])] == list(y.shape)


@pytest.mark.parametrize(("axis", "sizes"), [(-1, "b 3 5*s"), (2, "b 3 5*s"), (0, "5*s b 3"), (-2, "b 5*s 3")])
def test_one_hot_puts_an_axis_in(axis: int, sizes: str) -> None:
    body = f"""n = Shape <start = 0, end = 1> (x) five = Constant <value_ints = [5]> () depth = Mul (n, five)
    values = Constant <value_floats = [0.0, 1.0]> () y = OneHot <axis = {axis}> (ids, depth, values)"""
    header = '<ir_version: 8, opset_import: ["" : 17]> main (int64[b, 3] ids, float[s] x) => (float[l, m, n] y)'
    model = ir.serde.deserialize_model(onnx.parser.parse_model(f"{header} {{ {body} }}"))
    result = Analysis(model).shape(model.graph.node(4).outputs[0])
    assert result is not None and " ".join(map(str, result)) == sizes


def test_resizing_keeps_the_sizes_that_it_does_not_change() -> None:
    body = "s = Constant <value_floats = [1.0, 1.0, 2.0, 1.5]> () y = Resize (x, , s)"
    header = '<ir_version: 8, opset_import: ["" : 17]> main (float[b, 3, h, w] x) => (float[b, 3, m, n] y)'
    model = ir.serde.deserialize_model(onnx.parser.parse_model(f"{header} {{ {body} }}"))
    sizes = [str(size) for size in Analysis(model).shape(model.graph.node(1).outputs[0])]
    assert sizes == ["b", "3", "2*h", "n"]


@pytest.mark.parametrize("end, size", [(10**9, "s"), (2**63 - 1, "s"), (10**6, "min(s, 1000000)")])
def test_the_end_of_a_slice_that_goes_to_the_end(end: int, size: str) -> None:
    """tf2onnx writes 10^9."""
    body = f"zero = Constant <value_ints = [0]> () end = Constant <value_ints = [{end}]> () y = Slice (x, zero, end)"
    header = '<ir_version: 8, opset_import: ["" : 17]> main (float[s, 3] x) => (float[t, 3] y)'
    model = ir.serde.deserialize_model(onnx.parser.parse_model(f"{header} {{ {body} }}"))
    assert str(Analysis(model).known_shape(model.graph.node(2).outputs[0])[0]) == size


CUT_OFF = """six = Constant <value_ints = [6]> () zero = Constant <value_ints = [0]> ()
    axis = Constant <value_ints = [1]> () minus = Constant <value_ints = [-1]> ()
    size = Shape <start = 1, end = 2> (x) other = Shape <start = 1, end = 2> (z)
    scalar = Squeeze (size) limit = Squeeze (LIMIT) least = Min (scalar, limit) cut = Reshape (least, minus)
    sum = Add (size, other) part = Slice (table, zero, size, axis) apart = Slice (table, zero, sum, axis)
    from = Slice (x, zero, cut, axis)"""


def the_cut_off_size(body: str, limit: str = "six", table: int = 6) -> str:
    """What the analysis calls the second size of `from`, which was cut off at a number."""
    inputs = f"float[b, s] x, float[b, t] z, float[b, {table}] table, bool c"
    text = f'<ir_version: 8, opset_import: ["" : 17]> main ({inputs}) => (float[m, n] y, float[p, q] w) {{'
    text += f" one = Constant <value_ints = [1]> () {CUT_OFF.replace('LIMIT', limit)} w = Identity (from) {body} }}"
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    analysis = Analysis(model)
    assert not analysis.defects
    (node,) = (node for node in model.graph if node.outputs[0].name == "from")
    return str(analysis.known_shape(node.outputs[0])[1])


def test_a_size_that_meets_itself_cut_off_is_not_cut_off() -> None:
    """The model doesn't run with more: its 6 columns meet more than 6, and neither is 1."""
    assert the_cut_off_size("y = Add (x, part)") == "s"
    assert the_cut_off_size("y = Where (c, part, x)") == "s"
    assert the_cut_off_size("more = Concat <axis = 1> (x, z) y = Add (more, apart)") == "s", "s + t is at most 6"


@pytest.mark.parametrize(
    "body, limit, table",
    [
        ("y = Add (z, part)", "six", 6),  # another size
        ("y = Neg (part)", "six", 6),  # they don't meet
        ("part1 = Add (x, part) y = Neg (z)", "six", 6),  # nobody asks for the sum: runtimes leave it out
        ("y = Add (x, part)", "one", 1),  # a size of 1 meets any other
        ("y = Add (x, part)", "six", 7),  # at most 7 of 7 columns, and cut off at 6
        ("y = If (c) <then_branch = t () => (float[m, n] a) { a = Add (x, part) }, "
         "else_branch = e () => (float[m, n] a) { a = Neg (x) }>", "six", 6),  # some runs only
    ],
)  # fmt: skip
def test_otherwise_it_stays_cut_off(body: str, limit: str, table: int) -> None:
    assert the_cut_off_size(body, limit, table).startswith("min(")


@pytest.mark.parametrize(
    "text, equal", [("n", True), ("Dynamic.0", True), ("7", True), ("?", False), ("-1", False), ("", False)]
)
def test_texts_that_name_a_size(text: str, equal: bool) -> None:
    header = '<ir_version: 8, opset_import: ["" : 17]> main (float[a, b] x) => (float[c, d] y)'
    proto = onnx.parser.parse_model(f"{header} {{ y = Neg (x) }}")
    for dim in proto.graph.input[0].type.tensor_type.shape.dim:
        dim.dim_param = text
    model = ir.serde.deserialize_model(proto)
    rows, columns = Analysis(model).known_shape(model.graph.inputs[0])
    assert (rows == columns) is equal


def sizes_of_what_meets(node: str, result: str = "Neg (z)") -> list[str]:
    """The first sizes of x [2 * n], z [m] four or six times, and w, once `node` had them meet."""
    text = f"""<ir_version: 8, opset_import: ["" : 17]> main (float[n, 2, s] x, float[m, 4, s] z, float[m, 6, s] w)
    => (float[a, b, c] y, float[d, e, f] out) {{ three = Constant <value_ints = [3]> () minus = Constant
    <value_ints = [-1]> () one = Constant <value_ints = [1]> () last = Shape <start = 2, end = 3> (x)
    flat = Concat <axis = 0> (minus, one, last) two = Reshape (x, flat) four = Reshape (z, flat)
    six = Reshape (w, flat) row = Transpose <perm = [0, 2, 1]> (four) {node} out = {result} y = Neg (x) }}"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    analysis = Analysis(model)
    assert not analysis.defects
    values = {value.name: value for node in model.graph for value in node.outputs}
    return [str(analysis.known_shape(values[name])[0]) for name in ("two", "four", "six")]


def test_multiples_that_meet_are_equal() -> None:
    """Neither is 1. The older name, which is an input's, stands for both."""
    assert sizes_of_what_meets("t = Add (two, four)", "Neg (t)") == ["4*m", "4*m", "6*m"], "n is 2 * m"
    assert sizes_of_what_meets("t = MatMul (row, two)", "Neg (t)") == ["4*m", "4*m", "6*m"]
    assert sizes_of_what_meets("u = Add (two, four) t = Mul (u, two)", "Neg (t)") == ["4*m", "4*m", "6*m"]


@pytest.mark.parametrize(
    "node, result",
    [
        ("t = Add (two, four)", "Neg (z)"),  # nobody asks for the sum
        ("t = Add (x, z)", "Neg (z)"),  # n and m, one of which may be 1
        ("t = Concat <axis = 0> (two, four)", "Neg (t)"),  # they don't meet
    ],
)
def test_otherwise_they_are_not(node: str, result: str) -> None:
    assert sizes_of_what_meets(node, result) == ["2*n", "4*m", "6*m"]


# As PyTorch's exporter calls what is padded to a multiple of 4.
ROUNDED_UP = "((n//2)) + (Mod(4 - (Mod((n//2), 4)), 4))"


def test_names_with_remainders_are_read() -> None:
    padded = named(ROUNDED_UP)
    windows = named(f"({ROUNDED_UP})//4")
    assert windows * 4 == padded and named(f"({ROUNDED_UP})//(({ROUNDED_UP})//4)") == 4
    assert named(f"PythonMod(-2, {ROUNDED_UP})").is_known
    for n in range(40):
        known = dict.fromkeys(algebra.atoms(padded.expr, "sym"), n)
        assert evaluate(padded.expr, known) == -(-(n // 2) // 4) * 4


@pytest.mark.parametrize(
    "node",
    [
        "y = Transpose <perm = [0, 1, 2]> (x)",
        "y = Transpose <perm = [0]> (x)",
        "y = Unsqueeze (x, five)",
        "y = Unsqueeze (x, twice)",
        "y = Slice (x, two, five)",
        "y = Slice (x, five, five, five)",
        "y = Slice (x, five, five, none, twice)",
    ],
)
def test_a_node_that_is_impossible_is_no_defect_of_ours(node: str) -> None:
    """onnxruntime loads a file with such a node where it can't infer the shapes in front of it."""
    text = f"""<ir_version: 8, opset_import: ["" : 17]> main (float[b, s] x) => (float y)
    <int64[1] five = {{5}}, int64[2] two = {{0, 0}}, int64[2] twice = {{1, 1}}> {{ {node} }}""".replace(", none", ", ")
    analysis = Analysis(ir.serde.deserialize_model(onnx.parser.parse_model(text)))
    assert not analysis.defects
    assert len(analysis.invalid_nodes) == ("Slice" not in node)


TURNED_WIDTHS = """<ir_version: 8, opset_import: ["" : 17]>
main (float[b, s, 8] x) => (float[b, m, 8] y) {
    size = Shape <start = 1, end = 2> (x)
    four = Constant <value_ints = [4]> ()
    part = Mod (size, four)
    lacking = Sub (four, part)
    zero = Constant <value_ints = [0]> ()
    widths = Concat <axis = 0> (zero, zero, zero, lacking, zero, zero)
    two = Constant <value_ints = [-1, 2]> ()
    pairs = Reshape (widths, two)
    last = Constant <value_ints = [-1]> ()
    least = Constant <value_ints = [-9223372036854775807]> ()
    turned = Slice (pairs, last, least, zero, last)
    apart = Transpose <perm = [1, 0]> (turned)
    flat = Reshape (apart, last)
    y = Pad (x, flat)
}"""


def test_the_widths_of_a_pad_are_followed_as_torchscript_turns_them() -> None:
    """From the last axis to the first, begin and end of each: the order of PyTorch's F.pad."""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(TURNED_WIDTHS))
    shape = Analysis(model).shape(model.graph.outputs[0])
    assert [str(size) for size in shape] == ["b", "4*floordiv(s, 4) + 4", "8"]
    session = onnxruntime.InferenceSession(onnx.parser.parse_model(TURNED_WIDTHS).SerializeToString())
    for rows in (1, 4, 6):
        (got,) = session.run(None, {"x": np.zeros((2, rows, 8), np.float32)})
        assert got.shape == (2, rows // 4 * 4 + 4, 8)


ONE_LESS = """<ir_version: 8, opset_import: ["" : 17]>
main (float[n] x) => (float y) {
    one = Constant <value_ints = [1]> () minus = Constant <value_ints = [-2]> () shape = Shape (x)
    eight = Constant <value_ints = [8]> () quotient = Div (shape, eight) size = Sub (quotient, one)
    zeros = ConstantOfShape <value = float[1] {0.0}> (size) long = ConstantOfShape <value = float[1] {0.0}> (quotient)
    zero = Constant <value_ints = [0]> () end = Constant <value_ints = [-1]> () cut = Slice (long, zero, end)
    y = Add (zeros, cut)
}"""


def test_a_size_that_meets_what_it_is_unless_negative_is_that() -> None:
    """What a convolution for positions makes too long and cuts off is as long as what it is added to, as in Wav2Vec2:
    n // 8 - 1 and max(0, n // 8 - 1) are two sizes only where the first is below 0, which no size is."""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(ONE_LESS))
    analysis = Analysis(model)
    shapes = {v.name: analysis.shape(v) for node in model.graph for v in node.outputs}
    assert str(shapes["zeros"][0]) == str(shapes["y"][0]) == "floordiv(n, 8) - 1"
    assert str(shapes["cut"][0]) != str(shapes["y"][0])


def test_beside_a_size_nothing_else_is_taken_for_it() -> None:
    n, m = named("n"), named("m")
    assert (n - 2).maximum(0).beside(n - 2) == n - 2
    assert (n - 3).maximum(0).beside(n - 2) == (n - 3).maximum(0)
    assert (m - 2).maximum(0).beside(n - 2) == (m - 2).maximum(0)
    assert (n - 2).maximum(0).beside(2 * n) == (n - 2).maximum(0)


SAME_SHAPE = """Scatter ReverseSequence Celu Shrink ThresholdedRelu Softsign Hardmax LRN MeanVarianceNormalization
    CumProd BitwiseNot BitwiseXor BitShift Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh""".split()


@pytest.mark.parametrize("name", SAME_SHAPE)
def test_operators_that_keep_the_shape(name: str) -> None:
    """Masks and biases may be made by any of them."""
    second = ", one" if name in ("BitShift", "BitwiseXor") else ", one, one" if name == "Scatter" else ""
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
        main (float[b, 1, s, 8] x, float[1, 1, 1, 1] one) => (float[b, 1, s, 8] z) {{
            y = {name}(x{second}) z = Relu(y) }}"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    assert [str(size) for size in Analysis(model).shape(model.graph.node(0).outputs[0])] == ["b", "1", "s", "8"]


@pytest.mark.parametrize(
    ("attributes", "axes", "shape"),
    [
        ("", "", "1 1 1"),
        ("keepdims = 0", ", none", ""),
        ("noop_with_empty_axes = 1", "", "b s 8"),
        ("noop_with_empty_axes = 1, keepdims = 0", ", none", "b s 8"),
        ("noop_with_empty_axes = 1, keepdims = 0", ", last", "b s"),
    ],
)
def test_a_reduction_without_axes_is_of_all_or_of_none(attributes: str, axes: str, shape: str) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
        main (float[b, s, 8] x) => (float[m] z) <int64[0] none = {{}}, int64[1] last = {{-1}}> {{
            y = ReduceSum <{attributes or "keepdims = 1"}> (x{axes}) z = Relu(y) }}"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    found = Analysis(model).shape(model.graph.node(0).outputs[0])
    assert " ".join(map(str, found)) == shape
    got = ReferenceEvaluator(onnx.parser.parse_model(text)).run(None, {"x": np.ones((2, 3, 8), np.float32)})[0]
    assert got.shape == tuple({"b": 2, "s": 3}.get(size) or int(size) for size in shape.split())


@pytest.mark.parametrize(("attribute", "contents"), [("keepdims = 0", "8*b*s"), ("noop_with_empty_axes = 1", None)])
def test_a_product_of_sizes_is_followed(attribute: str, contents: str | None) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
        main (float[b, s, 8] x) => (int64[m] z) {{
            sizes = Shape(x) y = ReduceProd <{attribute}> (sizes) z = Identity(y) }}"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    found = Analysis(model).contents(model.graph.node(1).outputs[0])
    assert (found and " ".join(map(str, found))) == contents
