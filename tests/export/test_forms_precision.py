# SPDX-License-Identifier: Apache-2.0
"""Masks in another precision than queries and keys: their numbers are those of the type in which they meet the scores.
And sizes that stand in front of heads, or are their number, and may be 0."""

from __future__ import annotations

import faexport
import pytest
from faexport.spec import Assumption

from tests.export.form_text import PRODUCT, Form, checks_of

HALF = "float16[B, 3, T, 8] q, float16[B, 3, S, 8] k, float16[B, 3, S, 8] v"
SINGLE = "x = Cast<to = 1>(s)"
END = "p = Softmax<axis = -1>(m) h = Cast<to = 10>(p) y = MatMul(h, v)"
KEEP = "bool[B, 1, 1, S] keep"
OF_NUMBERS = """i = Constant<value_float = 1.0>() one = Cast<to = 10>(i)
u = Constant<value_float = -10000.0>() low = Cast<to = 10>(u)
f = Cast<to = 10>(n) d = Sub(one, f) b = Mul(d, low) x = Add(s, b) p = Softmax<axis = -1>(x) y = MatMul(p, v)"""
FIVE_AXES = "float[A, B, 3, T, 8] q, float[A, B, 3, S, 8] k, float[A, B, 3, S, 8] v, bool[A, 1, 1, 1, S] keep"
HEADS = "float[B, H, T, 8] q, float[B, H, S, 8] k, float[B, H, S, 8] v"


def half(body: str, low: float, **more: object) -> Form:
    """Scores in float16, that are cast to float32 in front of `body`."""
    fill = f"low = Constant<value_float = {low}>() zero = Constant<value_float = 0.0>()"
    return Form(f"{HALF}, {KEEP}", f"{PRODUCT} {SINGLE} {fill} {body} {END}", type="float16", **more)


def several(body: str, inputs: str = "", **more: object) -> Form:
    """Masks `a` in float16 and `b` in float32, by -60000 and -3.4e38 or 0. `body` makes the softmax's input `m` of the
    scores `s`, in float32."""
    return Form(
        f"{HALF}, {KEEP}, bool[1, 1, T, S] other{inputs}",
        f"""{PRODUCT} low = Constant<value_float = -3.4e38>() zero = Constant<value_float = 0.0>()
        u = Constant<value_float = -60000.0>() low16 = Cast<to = 10>(u) zero16 = Cast<to = 10>(zero)
        n = Constant<value_float = -inf>() none16 = Cast<to = 10>(n) two = Constant<value_float = 2.0>()
        a = Where(keep, zero16, low16) b = Where(other, zero, low) {body} {END}""",
        type="float16",
        **more,
    )


BIAS = ", float16[1, 3, T, S] bias"
RIGHT = {
    "a number that a Cast makes infinite": half(
        "e = Where(keep, x, low) h16 = Cast<to = 10>(e) m = Cast<to = 1>(h16)", -1e9
    ),
    "a bias in float16, and then a mask in float32": several(
        "c = Add(s, bias) x = Cast<to = 1>(c) m = Where(keep, x, low)", BIAS
    ),
    "-inf in float16, and then a number in float32": several(
        "c = Where(other, s, none16) x = Cast<to = 1>(c) m = Where(keep, x, low)"
    ),
    "-inf in float16, and then a clamp in float32": several(
        "c = Where(keep, s, none16) x = Cast<to = 1>(c) m = Max(x, low)",
        facts=frozenset({"a row that sees no key gives the mean of all values, as the fill -3.4e+38 does"}),
    ),
    "a bias in float16, and then one in float32": several("c = Add(s, bias) x = Cast<to = 1>(c) m = Add(x, b)", BIAS),
    "a bias in float16 that is multiplied in float32": several(
        "c = Add(s, bias) x = Cast<to = 1>(c) m = Mul(x, two)", BIAS
    ),
    "put in place, beyond float16": half("m = Where(keep, x, low)", -1.0e9),
    "put in place, the lowest float32": half("m = Where(keep, x, low)", -3.4028235e38),
    "added, beyond float16": half("a = Where(keep, zero, low) m = Add(x, a)", -1.0e9),
    "added, the lowest float32": half("a = Where(keep, zero, low) m = Add(x, a)", -3.4028235e38),
    "heads in two axes, the inner batch 0": Form(
        FIVE_AXES,
        """kt = Transpose<perm = [0, 1, 2, 4, 3]>(k) s = MatMul(q, kt) low = Constant<value_float = -1.0e9>()
        m = Where(keep, s, low) p = Softmax<axis = -1>(m) y = MatMul(p, v)""",
    ),
    "0 heads": Form(HEADS, f"{PRODUCT} p = Softmax<axis = -1>(s) y = MatMul(p, v)"),
    "heads of 0 columns": Form(
        "float[B, 3, T, D] q, float[B, 3, S, D] k, float[B, 3, S, D] v",
        f"{PRODUCT} p = Softmax<axis = -1>(s) y = MatMul(p, v)",
    ),
}

GUARD = """e = Cast<to = 10>(x32) w = Softmax<axis = -1>(e) n = IsNaN(w) none = Constant<value_float = 0.0>()
    zeros = Cast<to = 10>(none) h = Where(n, zeros, w) y = MatMul(h, v)"""
RIGHT["a causal number that a Cast makes infinite, and zeros in the place of NaN"] = Form(
    HALF,
    f"""{PRODUCT} {SINGLE} low = Constant<value_float = -1.0e9>() size = Shape<start = 2>(s)
    true = ConstantOfShape<value = bool[1] {{1}}>(size) one = Constant<value = int64 {{1}}>()
    ahead = Trilu<upper = 1>(true, one) x32 = Where(ahead, low, x) {GUARD}""",
    facts=frozenset({"causal"}),
    type="float16",
)
NARROWER = "-60000 hides keys in float16, and then its scores are masked or multiplied in float32"
WRONG = {
    "a bias that is cast to float16 in front of a clamp": Form(
        f"float[B, 3, T, 8] q, float[B, 3, S, 8] k, float[B, 3, S, 8] v, float[1, 3, T, S] bias, {KEEP}",
        f"""{PRODUCT} lowest = Constant<value_float = -3.4028235e38>() far = Abs(bias) b = Mul(far, lowest)
        a = Where(keep, s, lowest) c = Add(a, b) h = Cast<to = 10>(c) w = Cast<to = 1>(h) x = Max(w, lowest)
        p = Softmax<axis = -1>(x) y = MatMul(p, v)""",
        reason="its scores are clamped behind a Cast to float16",
    ),
    "a number in float16 that is multiplied in float32": several(
        "c = Where(keep, s, low16) x = Cast<to = 1>(c) m = Mul(x, two)", reason=NARROWER
    ),
    "a number added in float16, multiplied in float32": several(
        "c = Add(s, a) x = Cast<to = 1>(c) m = Mul(x, two)", reason=NARROWER
    ),
    "a number in float16, and then one in float32": several(
        "c = Add(s, a) x = Cast<to = 1>(c) m = Add(x, b)", reason=NARROWER
    ),
    "a number above all scores in float16": several(
        "c = Sub(s, a) m = Cast<to = 1>(c)", reason="60000 is added to its scores in float16, which leaves nothing"
    ),
    "a number that a Cast makes infinite, and zeros in the place of NaN": Form(
        f"{HALF}, {KEEP}",
        f"{PRODUCT} {SINGLE} low = Constant<value_float = -1.0e9>() x32 = Where(keep, x, low) {GUARD}",
        type="float16",
        reason="-1e+09 hides keys, and a Cast to float16 makes -inf of it behind that",
    ),
    "a bias of float64": Form(
        f"{HALF}, double[1, 3, T, S] bias",
        f"{PRODUCT} x = Cast<to = 11>(s) c = Add(x, bias) m = Cast<to = 1>(c) {END}",
        type="float16",
        reason="what is added to its scores is float64",
    ),
    "a number that a factor makes infinite, and then a divisor": Form(
        f"float[B, 3, T, 8] q, float[B, 3, S, 8] k, float[B, 3, S, 8] v, {KEEP}",
        f"""{PRODUCT} low = Constant<value_float = -2.0e38>() x = Where(keep, s, low)
        two = Constant<value_float = 2.0>() four = Constant<value_float = 4.0>() c = Mul(x, two) d = Div(c, four)
        w = Softmax<axis = -1>(d) n = IsNaN(w) zero = Constant<value_float = 0.0>() p = Where(n, zero, w)
        y = MatMul(p, v)""",
        reason="may leave its type, as its scores are multiplied and then divided again",
    ),
}

test_fused_and_right = checks_of(RIGHT)
test_near_misses = checks_of(WRONG)


def test_what_float16_leaves_of_scores_is_told() -> None:
    """In float16 nothing is left of a score beside -65504. The operator adds in float32, where something is."""
    form = Form(
        f"{HALF}, {KEEP}, bool[1, 1, T, S] other",
        f"""{PRODUCT} u = Constant<value_float = -65504.0>() low = Cast<to = 10>(u) z = Constant<value_float = 0.0>()
        zero = Cast<to = 10>(z) a = Where(keep, zero, low) b = Where(other, zero, low) c = Add(s, a) m = Add(c, b)
        p = Softmax<axis = -1>(m) y = MatMul(p, v)""",
        type="float16",
    )
    _, report = faexport.fuse(form.model())
    told = [fact for fact in report.sites[0].facts if isinstance(fact, Assumption)]
    assert any("rounded to steps of 32 beside -65504 where a runtime adds in float16" in str(x) for x in told)


@pytest.mark.parametrize("heads", range(1, 6))
def test_float16_masks_of_numbers(heads: int) -> None:
    """What a row of padding gives depends on how a runtime adds in float16: that is no defect of the proof."""
    inputs = f"{HALF}, int64[B, 1, 1, S] n".replace("3", str(heads))
    _, report = faexport.fuse(Form(inputs, f"{PRODUCT} {OF_NUMBERS}", type="float16").model())
    assert report.num_fused == 1, report.sites[0].refusal


SINGLE_PAIR = "float[B, 3, T, 8] q, float[B, 3, S, 8] k, float16[B, 3, S, 8] v"
IN_FLOAT16 = "x16 = Identity(s) f = Cast<to = 10>(low) z = Cast<to = 10>(zero) a = Where(keep, z, f) m = Add(x16, a)"
CAST_BEHIND = "a = Where(keep, zero, low) c = Add(s, a) m = Cast<to = 10>(c)"


@pytest.mark.parametrize("fill, step", ((-600.0, ""), (-5000.0, ""), (-9000.0, ""), (-10000.0, "8"), (-65504.0, "32")))
@pytest.mark.parametrize("inputs, body", ((HALF, IN_FLOAT16), (SINGLE_PAIR, CAST_BEHIND)))
def test_what_float16_leaves_of_scores_beside_less_deep_numbers_is_told(
    fill: float, step: str, inputs: str, body: str
) -> None:
    """Be they added in float16, or cast to it behind the addition."""
    if fill == -65504.0 and inputs == HALF:
        return  # the mean of the values, as where it is put in place
    form = Form(
        f"{inputs}, {KEEP}",
        f"""{PRODUCT} low = Constant<value_float = {fill}>() zero = Constant<value_float = 0.0>() {body}
        p = Softmax<axis = -1>(m) y = MatMul(p, v)""",
        type="float16",
    )
    _, report = faexport.fuse(form.model())
    assert report.num_fused == 1, report.sites[0].refusal
    told = [str(fact) for fact in report.sites[0].facts if isinstance(fact, Assumption)]
    wanted = f"rounded to steps of {step} beside {fill:g}" if step else "nothing depends on what rounding leaves"
    assert any(wanted in text for text in told), told


def test_that_a_sum_with_65504_is_absorbed_is_told_in_front_of_a_clamp_too() -> None:
    form = Form(
        f"{HALF}, {KEEP}",
        f"""{PRODUCT} low = Constant<value_float = -65504.0>() zero = Constant<value_float = 0.0>()
        f = Cast<to = 10>(low) z = Cast<to = 10>(zero) a = Where(keep, z, f) c = Add(s, a) m = Max(c, f)
        p = Softmax<axis = -1>(m) y = MatMul(p, v)""",
        type="float16",
    )
    _, report = faexport.fuse(form.model())
    told = [str(fact) for fact in report.sites[0].facts if isinstance(fact, Assumption)]
    assert any("added to their fill in float16" in text for text in told), told


def test_float16_leaves_enough_of_scores_beside_usual_numbers() -> None:
    form = Form(
        f"{HALF}, {KEEP}",
        f"""{PRODUCT} low = Constant<value_float = -100.0>() zero = Constant<value_float = 0.0>() {IN_FLOAT16}
        p = Softmax<axis = -1>(m) y = MatMul(p, v)""",
        type="float16",
    )
    _, report = faexport.fuse(form.model())
    assert not [fact for fact in report.sites[0].facts if isinstance(fact, Assumption)]
