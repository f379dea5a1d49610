# SPDX-License-Identifier: Apache-2.0
"""Floor division as exporters write it out is read, however it is spelled, and nothing else is taken for it."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from faexport.sizes import algebra
from faexport.sizes.dims import Dim
from faexport.understand.index.interpreter import Interpreter
from faexport.understand.index.tensor import Unknown, broadcast_index
from faexport.understand.mask.emit import Emitter
from faexport.understand.mask.nodes import Nodes
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.evaluate import evaluate
from faexport.understand.shapes.floor_division import floor_division
from onnx.reference import ReferenceEvaluator

# What is 1 where 1 is subtracted from x / y; `whole` is x / y rounded towards 0.
BY_SIGNS = "a = Sign(x) b = Sign(y) same = Equal(a, b) other = Not(same)"
BELOW_ZERO = "a = Less(x, zero) b = Less(y, zero) other = Xor(a, b)"
RIGHT = {
    "transformers": f"{BY_SIGNS} m = Mod(x, y) some = Cast<to = 9>(m) c = And(other, some)",
    "the other way around": f"{BY_SIGNS} m = Mod(x, y) some = Cast<to = 9>(m) c = And(some, other)",
    "PyTorch's decomposition": f"{BELOW_ZERO} m = Mod<fmod = 1>(x, y) none = Equal(m, zero) some = Not(none) "
    "c = And(some, other)",
    "the remainder's sign": "m = Mod<fmod = 1>(x, y) a = Sign(m) b = Sign(y) same = Equal(a, b) none = Equal(m, zero) "
    "either = Or(same, none) c = Not(either)",
    "two cases": "m = Mod(x, y) up = Greater(m, zero) down = Less(m, zero) a = Less(x, zero) b = Greater(x, zero) "
    "first = And(up, a) second = And(down, b) c = Or(first, second)",
}
WRONG = {
    "no remainder": f"{BY_SIGNS} m = Mod(x, y) some = Cast<to = 9>(m) c = Identity(other)",
    "no signs": f"{BY_SIGNS} m = Mod(x, y) c = Cast<to = 9>(m)",
    "signs alike": f"{BY_SIGNS} m = Mod(x, y) some = Cast<to = 9>(m) c = And(same, some)",
    "either": f"{BY_SIGNS} m = Mod(x, y) some = Cast<to = 9>(m) c = Or(other, some)",
    "another remainder": f"{BY_SIGNS} m = Mod(y, x) some = Cast<to = 9>(m) c = And(other, some)",
    "the sign of another number": "a = Sign(x) b = Sign(z) same = Equal(a, b) other = Not(same) m = Mod(x, y) "
    "some = Cast<to = 9>(m) c = And(other, some)",
    "a remainder of 1": f"{BY_SIGNS} m = Mod(x, y) some = Equal(m, one) c = And(other, some)",
    "the dividend alone": "a = Less(x, zero) m = Mod(x, y) some = Cast<to = 9>(m) c = And(a, some)",
    "a dividend of 1": f"{BY_SIGNS} m = Mod(x, y) some = Cast<to = 9>(m) e = And(other, some) f = Equal(x, one) "
    "c = Or(e, f)",
}


def model_of(condition: str, inputs: str = "int64 x, int64 y, int64 z", end: str = "r = Sub(whole, k)"):
    return onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 20]> main ({inputs}) => (int64 r) {{
        zero = Constant<value_int = 0>() one = Constant<value_int = 1>() {condition}
        whole = Div(x, y) k = Cast<to = 7>(c) {end} }}""")


def is_read(proto: onnx.ModelProto) -> bool:
    model = ir.serde.deserialize_model(proto)
    analysis = Analysis(model)
    assert not analysis.defects
    return floor_division(model.graph[-1], analysis) is not None


def is_right(proto: onnx.ModelProto, z: int) -> bool:
    run = ReferenceEvaluator(proto).run
    numbers = [(x, y) for x in range(-7, 8) for y in range(-4, 5) if x and y]
    return all(run(None, dict(zip("xyz", map(np.int64, (x, y, z)), strict=True)))[0] == x // y for x, y in numbers)


@pytest.mark.parametrize("name", RIGHT)
def test_every_spelling_is_read(name: str) -> None:
    proto = model_of(RIGHT[name])
    assert is_right(proto, 3) and is_read(proto)
    assert not is_read(model_of(RIGHT[name], end="r = Add(whole, k)"))
    assert not is_read(model_of(RIGHT[name], end="r = Sub(k, whole)"))


@pytest.mark.parametrize("name", WRONG)
def test_what_rounds_otherwise_is_not(name: str) -> None:
    proto = model_of(WRONG[name])
    assert not is_right(proto, 3) and not is_read(proto)


def test_floats_and_numbers_without_sign_are_not() -> None:
    for kind in ("float", "uint64"):
        proto = model_of(RIGHT["transformers"], f"{kind} x, {kind} y", "l = CastLike(k, x) r = Sub(whole, l)")
        assert not is_read(proto)


def test_a_known_divisor_has_one_sign() -> None:
    """The exporter then writes the sign as a number."""
    short = (
        "a = Sign(x) same = Equal(a, one) other = Not(same) m = Mod(x, y) some = Cast<to = 9>(m) c = And(other, some)"
    )
    for number, right in ((4, True), (-4, False)):
        assert is_read(model_of(f"y = Constant<value_int = {number}>() {short}", "int64 x")) == right
    assert not is_read(model_of(short))


def sizes_of(condition: str, divisor: str) -> Dim | None:
    """What is known of (3 - n) divided by `divisor`, as a size."""
    text = f"""<ir_version: 8, opset_import: ["" : 20]> main (float[n, d] t) => (int64 r) {{
        zero = Constant<value_int = 0>() one = Constant<value_int = 1>() three = Constant<value_int = 3>()
        s = Shape(t) n = Gather(s, zero) d = Gather(s, one) x = Sub(three, n) y = {divisor} {condition}
        whole = Div(x, y) k = Cast<to = 7>(c) r = Sub(whole, k) }}"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    known = Analysis(model).contents(model.graph.outputs[0])
    return None if known is None else known[0]


@pytest.mark.parametrize("name", WRONG)
def test_sizes_that_are_rounded_otherwise_are_unknown(name: str) -> None:
    assert sizes_of(WRONG[name].replace("Sign(z)", "Sign(n)"), "Identity(d)") is None


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize(
    "divisor", ["Identity(d)", "Neg(d)", "Constant<value_int = 4>()", "Constant<value_int = -4>()"]
)
def test_sizes_are_rounded_down(name: str, divisor: str) -> None:
    size = sizes_of(RIGHT[name], divisor)
    assert size is not None
    symbols = {atom.args[0]: algebra.of_atom(atom) for atom in algebra.atoms(size.expr, "sym")}
    for n in range(9):
        for d in range(1, 6):
            y = {"Identity(d)": d, "Neg(d)": -d}.get(divisor) or int(divisor.split("=")[1][:-3])
            known = {algebra.only_atom(s): {"n": n, "d": d}[name] for name, s in symbols.items()}
            assert evaluate(size.expr, known) == (3 - n) // y


def test_remainders_of_sizes_have_the_sign_that_onnx_says() -> None:
    text = """<ir_version: 8, opset_import: ["" : 20]> main (float[n] t) => (int64 r) {
        three = Constant<value_ints = [3]>() four = Constant<value_ints = [4]>() minus = Constant<value_ints = [-4]>()
        n = Shape(t) x = Sub(three, n) p = Mod(x, four) q = Mod(x, minus) g = Mod<fmod = 1>(n, four)
        open = Mod<fmod = 1>(x, four) unknown = Mod(four, x) r = Identity(p) }"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    analysis = Analysis(model)
    contents = {v.name: analysis.contents(v) for node in model.graph for v in node.outputs}
    assert contents["open"] is None and contents["unknown"] is None
    for n in range(12):
        known = dict.fromkeys(algebra.atoms(Dim.of("n").expr, "sym"), n)
        p, q, g = (evaluate(contents[name][0].expr, known) for name in "pqg")
        assert (p, q, g) == ((3 - n) % 4, (3 - n) % -4, n % 4)


def test_bounds_of_what_is_rounded_down() -> None:
    """-(-n // 4), rounded up, is not below 0."""
    n = algebra.sym("n")
    up = algebra.neg(algebra.floordiv(algebra.neg(n), algebra.const(4)))
    assert algebra.is_nonnegative(up) and not algebra.is_positive(up)
    more = algebra.neg(algebra.floordiv(algebra.neg(algebra.sym("m", 1)), algebra.const(4)))
    assert algebra.is_positive(more)
    assert not algebra.is_nonnegative(algebra.floordiv(algebra.sub(n, algebra.ONE), algebra.const(4)))


def emitter(opset: int) -> tuple[ir.Model, Emitter]:
    text = (
        f"""<ir_version: 8, opset_import: ["" : {opset}]> main (float[n, d] x) => (float[n, d] y) {{ y = Relu(x) }}"""
    )
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    return model, Emitter(Interpreter(Analysis(model)), model.graph, Nodes(opset))


@pytest.mark.parametrize("opset", [10, 17, 20])
def test_quotients_of_sizes_are_written(opset: int) -> None:
    """A mask that is written anew asks for sizes that the model has divided."""
    n, d, three = algebra.sym("n"), algebra.sym("d"), algebra.const(3)
    down = algebra.floordiv(n, three)
    up = algebra.neg(algebra.floordiv(algebra.neg(n), three))
    by_each_other = algebra.floordiv(algebra.sub(n, algebra.const(5)), d)
    for size in (algebra.sub(algebra.mul(down, d), algebra.ONE), algebra.add(up, d), by_each_other):
        model, emit = emitter(opset)
        made = emit.scalar(size)
        model.graph.extend(emit.nodes[made])
        model.graph.outputs.append(made)
        run = ReferenceEvaluator(ir.serde.serialize_model(model)).run
        for shape in ((7, 2), (6, 1), (3, 4), (1, 2), (0, 3)):
            got = run(None, {"x": np.zeros(shape, np.float32)})[1]
            known = dict(zip(map(algebra.only_atom, (n, d)), shape, strict=True))
            assert got.tolist() == [evaluate(size, known)]


def test_a_quotient_below_0_is_not_written_where_there_is_no_mod() -> None:
    up = algebra.floordiv(algebra.neg(algebra.sym("n")), algebra.const(3))
    with pytest.raises(Unknown):
        emitter(9)[1].scalar(up)


def test_an_index_is_below_a_size_that_is_made_of_a_quotient() -> None:
    """WavLM's rows are what its convolutions leave of the samples. The size is older than the index, which is written
    in terms of it, and they cancel only if the index goes first."""
    n = algebra.sym("samples")
    size = algebra.sub(algebra.floordiv(algebra.add(algebra.floordiv(n, algebra.const(5)), algebra.const(3)),
                                        algebra.const(4)), algebra.const(2))  # fmt: skip
    index = algebra.var("i", (size,))
    assert algebra.is_positive(algebra.sub(size, index))
    assert not algebra.is_positive(algebra.sub(algebra.sub(size, algebra.ONE), index))
    assert broadcast_index(index, size) is index
