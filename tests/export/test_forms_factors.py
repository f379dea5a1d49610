# SPDX-License-Identifier: Apache-2.0
"""Scores that are multiplied, divided or negated: by constants, by numbers made at run time (one for all, one a head,
one a row, one a key), before and after masks and softcap. Weights and outputs that are multiplied."""

from __future__ import annotations

import faexport
import numpy as np
import pytest
from faexport.spec import Assumption

from tests.export.compared import run
from tests.export.form_text import PRODUCT, QKV, Form, checks_of, draw

END = "p = Softmax<axis = -1>(x) y = MatMul(p, v)"
LATE = "p = Softmax<axis = -1>(s) w = Mul(p, g) y = MatMul(w, v)"

CLEARED = "zero = Constant<value = float {0}>() p = Softmax<axis = -1>(s)"
LAST = "y = MatMul(w, v)"
MASKED_ROWS = """zero = Constant<value = float {0}>() low = Constant<value = float {-1e9}>() s1 = Where(m, s, low)
    x = Where(other, low, s1) p = Softmax<axis = -1>(x) w = Where(m, p, zero)"""


def factor(shape: str, body: str = "x = Mul(s, g)", kind: str = "float", **more: object) -> Form:
    """Scores `s` and a factor `g` of this shape, which the nodes in `body` make the softmax's input `x` of."""
    return Form(f"{QKV}, {kind}[{shape}] g".replace("[]", ""), f"{PRODUCT} {body} {END}", **more)


def late(shape: str, **more: object) -> Form:
    """Weights that are multiplied by `g` after the softmax."""
    return Form(f"{QKV}, float[{shape}] g".replace("[]", ""), f"{PRODUCT} {LATE}", **more)


RIGHT = {
    "more heads by the factor": Form(
        "float[B, 1, T, 8] q, float[B, 1, S, 8] k, float[B, 1, S, 8] v, float[1, 2, 1, 1] g",
        f"{PRODUCT} x = Mul(s, g) {END}",
    ),
    "negated": Form(QKV, f"{PRODUCT} x = Neg(s) {END}"),
    "negated twice": Form(QKV, f"{PRODUCT} n = Neg(s) c = Constant<value = float {{-0.5}}>() x = Mul(n, c) {END}"),
    "negated and causal": Form(
        QKV.replace("S", "T"),
        f"""{PRODUCT} n = Neg(s)
        size = Shape<start = 2>(s) true = ConstantOfShape<value = bool[1] {{1}}>(size)
        one = Constant<value = int64 {{1}}>() ahead = Trilu<upper = 1>(true, one)
        low = Constant<value = float {{-inf}}>() x = Where(ahead, low, n) {END}""",
        frozenset({"causal"}),
    ),
    "one number": factor(""),
    "one number on the left": factor("", "x = Mul(g, s)"),
    "one number of rank 1": factor("1"),
    "one number of rank 4": factor("1, 1, 1, 1"),
    "a divisor": factor("", "e = Exp(g) x = Div(s, e)"),
    "one a head": factor("1, 3, 1, 1"),
    "one a head of rank 3": factor("3, 1, 1"),
    "one a head, divided": factor("3, 1, 1", "e = Exp(g) x = Div(s, e)"),
    "one a batch entry": factor("B, 1, 1, 1"),
    "one a row": factor("B, 1, T, 1"),
    "one a row of each head": factor("B, 3, T, 1"),
    "one a row, shared": factor("T, 1"),
    "one a key": factor("B, 1, 1, S"),
    "one a key, shared": factor("S"),
    "two factors": factor("T, 1", "a = Mul(s, g) b = ReduceMax(g) x = Mul(a, b)"),
    "rows and keys": factor("B, 1, 1, S", "a = Mul(s, g) r = ReduceMean<axes = [3]>(q) x = Mul(a, r)"),
    "a factor and then a bias": Form(
        f"{QKV}, float[3, 1, 1] g, float[T, S] b", f"{PRODUCT} a = Mul(s, g) x = Add(a, b) {END}"
    ),
    "a factor and then a softcap": factor(
        "3, 1, 1", "a = Mul(s, g) c = Constant<value = float {5.0}>() d = Div(a, c) t = Tanh(d) x = Mul(t, c)"
    ),
    "a factor, transposed scores": Form(
        f"{QKV}, float[B, 1, 1, T] g",
        """qt = Transpose<perm = [0, 1, 3, 2]>(q) s = MatMul(k, qt) f = Mul(s, g) p = Softmax<axis = -2>(f)
        w = Transpose<perm = [0, 1, 3, 2]>(p) y = MatMul(w, v)""",
        opset=13,
    ),
    "a factor that an Einsum's scores meet": Form(
        "float[B, T, 3, 8] q, float[B, S, 3, 8] k, float[B, S, 3, 8] v, float[3, 1, 1] g",
        """s = Einsum<equation = "bthd,bshd->bhts">(q, k) x = Mul(s, g) p = Softmax<axis = -1>(x)
        y = Einsum<equation = "bhts,bshd->bthd">(p, v)""",
        gone=frozenset({"Softmax", "Einsum"}),
        empty=False,
    ),
    "a factor for each head of a bmm": Form(
        "float[N, T, 8] q, float[N, S, 8] k, float[N, S, 8] v, float[N, 1, 1] g",
        """kt = Transpose<perm = [0, 2, 1]>(k) s = MatMul(q, kt) x = Mul(s, g) p = Softmax<axis = -1>(x)
        y = MatMul(p, v)""",
    ),
    "a factor of groups of heads": Form(
        "float[B, 2, 3, T, 8] q, float[B, 2, 1, S, 8] k, float[B, 2, 1, S, 8] v, float[2, 3, 1, 1] g",
        f"kt = Transpose<perm = [0, 1, 2, 4, 3]>(k) s = MatMul(q, kt) x = Mul(s, g) {END}",
        frozenset({"3 query heads on 1 kv heads"}),
    ),
    "a factor of keys and groups of heads": Form(
        "float[B, 2, 3, T, 8] q, float[B, 2, 1, S, 8] k, float[B, 2, 1, S, 8] v, float[2, 3, 1, S] g",
        f"kt = Transpose<perm = [0, 1, 2, 4, 3]>(k) s = MatMul(q, kt) x = Mul(s, g) {END}",
    ),
    "groups of heads, and values of any size": Form(
        "float[B, 2, 3, T, 8] q, float[B, 2, 1, S, 8] k, float[B, 2, 1, S, D] v",
        f"kt = Transpose<perm = [0, 1, 2, 4, 3]>(k) x = MatMul(q, kt) {END}",
    ),
    "a gate of a mask": factor(
        "B, 1, 1, S",
        """f = Cast<to = 1>(g) one = Constant<value = float {1.0}>() i = Sub(one, f)
        c = Constant<value = float {-1.0e9}>() a = Mul(i, c) b = Mul(s, f) x = Add(b, a)""",
        kind="bool",
        facts=frozenset({"padding mask [B, 1, 1, S_kv]"}),
    ),
    "a gate of rows and keys": factor(
        "B, 1, T, S",
        """f = Cast<to = 1>(g) one = Constant<value = float {1.0}>() i = Sub(one, f)
        c = Constant<value = float {-1.0e9}>() a = Mul(i, c) b = Mul(s, f) x = Add(b, a)""",
        kind="bool",
    ),
    "a gate of floats": factor(
        "B, 1, 1, S",
        """one = Constant<value = float {1.0}>() i = Sub(one, g) c = Constant<value = float {-1.0e9}>()
        a = Mul(i, c) b = Mul(s, g) x = Add(b, a)""",
    ),
    "a factor after a bias": Form(
        f"{QKV}, float[3, 1, 1] g, float[T, S] b", f"{PRODUCT} a = Add(s, b) x = Mul(a, g) {END}"
    ),
    "weights times a number for each key": late("B, 1, 1, S"),
    "weights times a number for each head": late("3, 1, 1"),
    "weights times one number": late(""),
    "weights times a number for each row": late("B, 1, T, 1"),
    "weights times a number for each row, shared": late("T, 1"),
    "weights times a number for each row of a head": late("3, T, 1"),
    "weights in float16 times a number for each row": Form(
        QKV.replace("float", "float16") + ", float16[T, 1] g", f"{PRODUCT} {LATE}", type="float16"
    ),
    "weights times numbers for rows and for keys": Form(
        f"{QKV}, float[B, 1, T, 1] g, float[B, 1, 1, S] h",
        f"{PRODUCT} p = Softmax<axis = -1>(s) w0 = Mul(p, g) w = Mul(h, w0) y = MatMul(w, v)",
    ),
    "rows of weights set to 0": Form(f"{QKV}, bool[B, 1, T, 1] m", f"{PRODUCT} {CLEARED} w = Where(m, p, zero) {LAST}"),
    "other rows of weights set to 0": Form(
        f"{QKV}, bool[B, 1, T, 1] m", f"{PRODUCT} {CLEARED} w = Where(m, zero, p) {LAST}"
    ),
    "rows of weights set to 0 by a product": Form(
        f"{QKV}, bool[T, 1] m", f"{PRODUCT} {CLEARED} f = Cast<to = 1>(m) w = Mul(f, p) {LAST}"
    ),
    "rows of weights set to 0 twice by the same mask": Form(
        f"{QKV}, bool[T, 1] m",
        f"{PRODUCT} {CLEARED} w0 = Where(m, p, zero) f = Cast<to = 1>(m) w = Mul(w0, f) {LAST}",
    ),
    "rows of weights set to 0 beside others that are masked too": Form(
        f"{QKV}, bool[M, 1] m, bool[M, 1, T, 1] other", f"{PRODUCT} {MASKED_ROWS} {LAST}"
    ),
    "rows of weights set to 0, and keys hidden": Form(
        f"{QKV}, bool[B, 1, T, 1] m, bool[B, 1, 1, S] keys",
        f"""{PRODUCT} low = Constant<value = float {{-1e9}}>() x = Where(keys, s, low)
        {CLEARED.replace("(s)", "(x)")} w = Where(m, p, zero) {LAST}""",
        frozenset({"padding mask [B, 1, 1, S_kv]"}),
    ),
    "weights times a mask of keys": Form(
        f"{QKV}, bool[B, 1, 1, S] m",
        f"{PRODUCT} g = Cast<to = 1>(m) {LATE}",
    ),
    "float16": Form(
        QKV.replace("float", "float16") + ", float16[3, 1, 1] g", f"{PRODUCT} x = Mul(s, g) {END}", type="float16"
    ),
}

WRONG = {
    "a mask's numbers as a factor": Form(
        f"{QKV}, bool[B, 1, 1, S] m",
        f"""{PRODUCT} low = Constant<value_float = -3.4e38>() one = Constant<value_float = 1.0>()
        g = Where(m, one, low) x = Mul(s, g) {END}""",
        reason="or by a number above 2^64",
    ),
    "a factor of rows and keys": factor("T, S", reason="multiplied by a tensor of rows and keys"),
    "divided by a number for each key": factor("S", "x = Div(s, g)", reason="divided by a tensor of keys"),
    "a factor that is 0 in float32": Form(
        QKV,
        f"""c = Constant<value = float {{1.0e-18}}>() qs = Mul(q, c) kt = Transpose<perm = [0, 1, 3, 2]>(k)
        ks = Mul(kt, c) s = MatMul(qs, ks) x = Mul(s, c) {END}""",
        reason="is no number of float32 other than 0",
    ),
    "a factor that is made up for, after the scores are gone": Form(
        QKV,
        f"""{PRODUCT} c = Constant<value = float {{1.0e-30}}>() d = Constant<value = float {{1.0e+30}}>()
        a = Mul(s, c) b = Mul(a, c) e = Mul(b, d) x = Mul(e, d) {END}""",
        reason="may leave their type",
    ),
    "a factor of another rank": Form(
        f"{QKV}, float[2, 1, 1, 1, 1] g",
        f"{PRODUCT} x = Mul(s, g) p = Softmax<axis = -1>(x) y = MatMul(p, v)",
        reason="multiplied",
    ),
    "a number divided by the scores": factor("", "x = Div(g, s)", reason="the scores pass through Div"),
    "a factor after a replaced score": Form(
        f"{QKV}, float[3, 1, 1] g, bool[B, 1, 1, S] m",
        f"{PRODUCT} c = Constant<value = float {{-1.0e9}}>() a = Where(m, s, c) x = Mul(a, g) {END}",
        reason="multiplied",
    ),
    "a factor after a softcap": factor(
        "3, 1, 1",
        "c = Constant<value = float {5.0}>() d = Div(s, c) t = Tanh(d) a = Mul(t, c) x = Mul(a, g)",
        reason="multiplied",
    ),
    "an infinite factor": Form(
        QKV, f"{PRODUCT} c = Constant<value = float {{-inf}}>() x = Mul(s, c) {END}", reason="by infinity or NaN"
    ),
    "a divisor of 0": Form(
        QKV, f"{PRODUCT} c = Constant<value = float[1] {{0.0}}>() x = Div(s, c) {END}", reason="by infinity or NaN"
    ),
    "weights times infinity": Form(
        QKV,
        f"{PRODUCT} p = Softmax<axis = -1>(s) c = Constant<value = float {{inf}}>() w = Mul(p, c) y = MatMul(w, v)",
        reason="by infinity or NaN",
    ),
    "a softcap made at run time": factor("", "d = Div(s, g) t = Tanh(d) x = Mul(t, g)", reason="softcap"),
    "a gate that is squared scores": Form(QKV, f"{PRODUCT} x = Mul(s, s) {END}", reason="multipl"),
    "weights times rows and keys": late("T, S", reason="after the softmax"),
    "weights in float32 times a number for each row, values in float16": Form(
        QKV.replace("float", "float16") + ", float[T, 1] g",
        f"""{PRODUCT} wide = Cast<to = 1>(s) p = Softmax<axis = -1>(wide) w0 = Mul(p, g) w = Cast<to = 10>(w0)
        {LAST}""",
        type="float16",
        reason="in another type than the output",
    ),
    "weights times numbers of rows, and a guard against what no softmax gives": Form(
        f"{QKV}, float[T, 1] g",
        f"{PRODUCT} {CLEARED} w0 = Mul(p, g) below = Less(w0, zero) w = Where(below, zero, w0) {LAST}",
        reason="used twice: also by Less",
    ),
    "weights times numbers of rows, and a guard against NaN": Form(
        f"{QKV}, float[T, 1] g",
        f"{PRODUCT} {CLEARED} w0 = Mul(p, g) odd = IsNaN(w0) w = Where(odd, zero, w0) {LAST}",
        reason="used twice: also by IsNaN",
    ),
    "weights times infinity in one row": Form(
        QKV.replace("T", "2"),
        f"{PRODUCT} {CLEARED} g = Constant<value = float[2, 1] {{1.0, inf}}>() w = Mul(p, g) {LAST}",
        reason="by infinity or NaN",
    ),
    "rows of weights set to 0 by a mask of more rows, which a Shape reads": Form(
        f"{QKV}, bool[M, 1] m",
        f"""{PRODUCT} {CLEARED} w = Where(m, p, zero) rows = Shape<start = 2, end = 3>(w) n = Cast<to = 1>(rows)
        y0 = MatMul(w, v) y = Mul(y0, n)""",
        reason="than the scores",
    ),
    "weights times rows, and turned": Form(
        f"{QKV}, float[T, 1] g",
        f"""{PRODUCT} p = Softmax<axis = -1>(s) w = Mul(p, g) y = Einsum<equation = "bhij,bhjd->bihd">(w, v)""",
        reason="turns its axes",
        empty=False,
    ),
    "rows of weights set to 0 beside others that are masked too, and turned": Form(
        f"{QKV}, bool[M, 1] m, bool[M, 1, T, 1] other",
        f"""{PRODUCT} {MASKED_ROWS} y = Einsum<equation = "bhij,bhjd->bihd">(w, v)""",
        reason="set to 0 in some of the rows",
        empty=False,
    ),
    "rows of weights set to 0, and turned": Form(
        f"{QKV}, bool[T, 1] m",
        f"""{PRODUCT} {CLEARED} w = Where(m, p, zero) y = Einsum<equation = "bhij,bhjd->bihd">(w, v)""",
        reason="aren't masked before it",
        empty=False,
    ),
    "weights times numbers of more batch entries": Form(
        "float[1, 3, T, 8] q, float[1, 3, S, 8] k, float[1, 3, S, 8] v, float[2, 1, 1, 1] g",
        f"{PRODUCT} {LATE}",
        reason="after the softmax",
    ),
}

test_fused_and_right = checks_of(RIGHT)
test_near_misses = checks_of(WRONG)


@pytest.mark.parametrize("value", [0.0, -2.0])
def test_a_factor_that_is_no_usual_number(value: float, library: str) -> None:
    """0 makes all weights equal, a negative one turns them around."""
    model = RIGHT["one number"].model()
    fused, report = faexport.fuse(model)
    assert report.num_fused == 1
    inputs = draw(model, {"B": 2, "T": 3, "S": 6}, np.random.default_rng(1)) | {"g": np.array(value, np.float32)}
    want, got = run(model, inputs)[0], run(fused, inputs, library)[0]
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("kind", ["float", "float16"])
def test_that_a_factor_of_half_precision_overflows_nowhere_is_assumed(kind: str) -> None:
    """float16 ends at 65504: there the queries times their factor may be infinite where the scores are numbers."""
    block = Form(f"{QKV}, float[1] g".replace("float", kind), f"{PRODUCT} x = Mul(s, g) {END}", type=kind)
    _, report = faexport.fuse(block.model())
    (fact,) = report.sites[0].facts
    limit = ", where their product stays below 65504 (assumed)" if kind == "float16" else ""
    assert str(fact) == f"a factor of the scores, multiplied to the queries{limit}"
    assert isinstance(fact, Assumption) is (kind == "float16")
