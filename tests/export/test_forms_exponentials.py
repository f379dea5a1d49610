# SPDX-License-Identifier: Apache-2.0
"""Softmaxes written out whose exponentials are hidden by a mask, or have one more beside them in their sum; columns
beside the scores that are the same number for all heads."""

from __future__ import annotations

import pathlib

import faexport
import onnx
import pytest
from faexport.report.data import VerificationStatus

from tests.export.form_text import PRODUCT, QKV, Form, checks_of

LAST = "last = Constant<value = int64[1] {-1}>()"
BEHIND_MAX = "x = ReduceMax<axes = [-1]>(s) d = Sub(s, x) e = Exp(d) t0 = ReduceSum(e, last)"
DIVIDED = "p = Div(e, t) y = MatMul(p, v)"
LATE = "o = MatMul(e, v) y = Div(o, t)"
GONE = frozenset({"Exp", "Div", "Softmax"})
SINKS = frozenset({"attention sinks"})
PADDING = frozenset({"padding mask [B, 1, 1, S_kv]"})
MASK = "bool[B, 1, 1, S] m"
GATE = "w = Cast<to = 1>(m)"
LOGITS = "h = Constant<value = float[1, 3, 1, 1] {0.5, -1.0, 2.0}>()"


def form(body: str, more: str = "", **words: object) -> Form:
    inputs = f"{QKV}, {more}" if more else QKV
    return Form(inputs, f"{PRODUCT} {LAST} {body}", **{"gone": GONE, **words})


def number(value: float, name: str = "c") -> str:
    return f"{name} = Constant<value = float {{{value!r}}}>()"


def column(body: str, more: str = "", **words: object) -> Form:
    """A column beside the scores, dropped behind the softmax: `body` makes x of s."""
    return form(
        f"""start = Constant<value = int64[1] {{0}}>() end = Constant<value = int64[1] {{-1}}>() {body}
        a = Softmax<axis = -1>(x) p = Slice(a, start, end, last) y = MatMul(p, v)""",
        more,
        **words,
    )


HIDDEN = {
    "times a mask": form(f"{GATE} f = Exp(s) e = Mul(f, w) t = ReduceSum(e, last) {DIVIDED}", MASK, facts=PADDING),
    "a mask times them": form(f"{GATE} f = Exp(s) e = Mul(w, f) t = ReduceSum(e, last) {DIVIDED}", MASK, facts=PADDING),
    "behind a maximum": form(
        f"""{GATE} x = ReduceMax<axes = [-1]>(s) d = Sub(s, x) f = Exp(d) e = Mul(f, w) t = ReduceSum(e, last)
        {DIVIDED}""",
        MASK,
        facts=PADDING,
    ),
    "divided late": form(f"{GATE} f = Exp(s) e = Mul(f, w) t = ReduceSum(e, last) {LATE}", MASK, facts=PADDING),
    "replaced by 0": form(
        f"{number(0.0)} f = Exp(s) e = Where(m, f, c) t = ReduceSum(e, last) {DIVIDED}", MASK, facts=PADDING
    ),
    "replaced by 0 where it is true": form(
        f"{number(0.0)} f = Exp(s) e = Where(m, c, f) t = ReduceSum(e, last) {DIVIDED}", MASK, facts=PADDING
    ),
    "1 minus a mask": form(
        f"{GATE} {number(1.0)} n = Sub(c, w) f = Exp(s) e = Mul(f, n) t = ReduceSum(e, last) {DIVIDED}",
        MASK,
        facts=PADDING,
    ),
    "a triangle": form(
        f"""z = Shape(s) lead = Constant<value = int64[2] {{2, 3}}>() n = Gather(z, lead)
        ones = ConstantOfShape<value = float[1] {{1.0}}>(n) w = Trilu<upper = 0>(ones) f = Exp(s) e = Mul(f, w)
        t = ReduceSum(e, last) {DIVIDED}""",
        facts=frozenset({"causal"}),
    ),
    "a mask beside a sink": form(
        f"{GATE} {number(1.0)} f = Exp(s) e = Mul(f, w) t0 = ReduceSum(e, last) t = Add(t0, c) {DIVIDED}",
        MASK,
        facts=PADDING | SINKS,
    ),
}
ONE_MORE = {
    "1 beside the sum": form(f"{number(1.0)} e = Exp(s) t0 = ReduceSum(e, last) t = Add(c, t0) {DIVIDED}", facts=SINKS),
    "a small number": form(f"{number(1e-6)} e = Exp(s) t0 = ReduceSum(e, last) t = Add(t0, c) {DIVIDED}", facts=SINKS),
    "divided late": form(f"{number(1.0)} e = Exp(s) t0 = ReduceSum(e, last) t = Add(t0, c) {LATE}", facts=SINKS),
    "times an inverse": form(
        f"""{number(1.0)} e = Exp(s) t0 = ReduceSum(e, last) t = Add(t0, c) r = Reciprocal(t) p = Mul(e, r)
        y = MatMul(p, v)""",
        facts=SINKS,
    ),
    "exp(-max)": form(f"{BEHIND_MAX} n = Neg(x) one = Exp(n) t = Add(one, t0) {DIVIDED}", facts=SINKS),
    "2 exp(-max)": form(
        f"{number(2.0)} {BEHIND_MAX} n = Neg(x) i = Exp(n) one = Mul(c, i) t = Add(t0, one) {DIVIDED}", facts=SINKS
    ),
    "exp(-max) with a maximum of at least 0": form(
        f"""{number(0.0)} x0 = ReduceMax<axes = [-1]>(s) x = Clip(x0, c) d = Sub(s, x) e = Exp(d)
        t0 = ReduceSum(e, last) n = Neg(x) one = Exp(n) t = Add(t0, one) {DIVIDED}""",
        facts=SINKS,
    ),
    "a logit a head": form(f"{LOGITS} {BEHIND_MAX} n = Sub(h, x) one = Exp(n) t = Add(t0, one) {DIVIDED}", facts=SINKS),
    "a logit a head, also in the maximum": form(
        f"""{LOGITS} x0 = ReduceMax<axes = [-1]>(s) x = Max(x0, h) d = Sub(s, x) e = Exp(d) t0 = ReduceSum(e, last)
        n = Sub(h, x) one = Exp(n) t = Add(t0, one) {LATE}""",
        facts=SINKS,
    ),
}
COLUMNS = {
    "a maximum of scores and column": column(
        """pads = Constant<value = int64[8] {0, 0, 0, 0, 0, 0, 0, 1}>() c = Pad(s, pads)
        top = ReduceMax<axes = [-1]>(c) x = Sub(c, top)""",
        facts=SINKS,
    ),
    "a maximum, and then a factor of rows": form(
        """top = ReduceMax<axes = [-1]>(s) low = Sub(s, top) x = Mul(low, g) p = Softmax<axis = -1>(x)
        y = MatMul(p, v)""",
        "float[T, 1] g",
    ),
    "a column of 0 by Pad": column(
        f"""pads = Constant<value = int64[8] {{0, 0, 0, 0, 0, 0, 0, 1}}>() {number(0.0)} x = Pad(s, pads, c)""",
        facts=SINKS,
    ),
    "a column of 0 by Pad without a number": column(
        "pads = Constant<value = int64[8] {0, 0, 0, 0, 0, 0, 0, 1}>() x = Pad(s, pads)", facts=SINKS
    ),
    "a column of a number": column(
        """z = Shape<start = 0, end = 3>(s) one = Constant<value = int64[1] {1}>() n = Concat<axis = 0>(z, one)
        h = ConstantOfShape<value = float[1] {0.5}>(n) x = Concat<axis = -1>(s, h)""",
        facts=SINKS,
    ),
    "all numbers of float32": form(
        "low = Constant<value = float {-3.4028234e38}>() high = Constant<value = float {3.4028235e38}>() "
        "x = Clip(s, low, high) p = Softmax<axis = -1>(x) y = MatMul(p, v)"
    ),
}
OWN_MAXIMUM = "top = ReduceMax<axes = [-1]>(s) low = Sub(s, top)"
FROM_MAXIMUM = "a maximum of the scores is subtracted in front"
WRONG = {
    "a maximum that is subtracted in front of a softcap": form(
        f"{OWN_MAXIMUM} x = Tanh(low) p = Softmax<axis = -1>(x) y = MatMul(p, v)", reason=FROM_MAXIMUM
    ),
    "a maximum that is subtracted in front of a factor of keys": form(
        f"{OWN_MAXIMUM} x = Mul(low, g) p = Softmax<axis = -1>(x) y = MatMul(p, v)", "float[S] g", reason=FROM_MAXIMUM
    ),
    "a maximum that is subtracted in front of a sink": column(
        f"{OWN_MAXIMUM} pads = Constant<value_ints = [0, 0, 0, 0, 0, 0, 0, 1]>() x = Pad(low, pads)",
        reason=FROM_MAXIMUM,
    ),
    "a maximum that is subtracted in front of a bias, and 1 beside the sum": form(
        f"{OWN_MAXIMUM} x = Add(low, b) e = Exp(x) n = ReduceSum(e, last) {number(1.0)} t = Add(n, c) {DIVIDED}",
        "float[T, S] b",
        reason=FROM_MAXIMUM,
    ),
    "weights that are hidden behind the softmax and divided by what is left": Form(
        f"{QKV}, bool[1, 1, T, S] m",
        f"""{PRODUCT} w = Softmax<axis = -1>(s) f = Cast<to = 1>(m) h = Mul(w, f) last = Constant<value_ints = [-1]>()
        t = ReduceSum<keepdims = 1>(h, last) zero = Constant<value = float {{0}}>() any = Greater(t, zero)
        one = Constant<value = float {{1}}>() d = Where(any, t, one) n = Div(h, d) p = Where(any, n, zero)
        y = MatMul(p, v)""",
        reason="weights are set to 0 behind the softmax and divided by what is left of them",
    ),
    "times any numbers": form(
        f"f = Exp(s) e = Mul(f, m) t = ReduceSum(e, last) {DIVIDED}",
        "float[B, 1, 1, S] m",
        reason="may hold other numbers than 0 and 1",
    ),
    "times 0 and 2": form(
        f"""h = Constant<value = float[1, 3, 1, 1] {{0.0, 2.0, 1.0}}>() f = Exp(s) e = Mul(f, h) t = ReduceSum(e, last)
        {DIVIDED}""",
        reason="may hold other numbers than 0 and 1",
    ),
    "a mask, and a number that decides where little is left": form(
        f"""{number(1e-9)} {GATE} x = ReduceMax<axes = [-1]>(s) d = Sub(s, x) f = Exp(d) e = Mul(f, w)
        t0 = ReduceSum(e, last) t = Add(t0, c) {DIVIDED}""",
        MASK,
        reason="sum of the exponentials",
    ),
    "hidden behind the sum": form(
        f"{GATE} f = Exp(s) t = ReduceSum(f, last) e = Mul(f, w) {DIVIDED}", MASK, reason="changed (Mul)"
    ),
    "1 beside the sum, behind a maximum": form(
        f"{number(1.0)} {BEHIND_MAX} t = Add(t0, c) {DIVIDED}", reason="sum of the exponentials"
    ),
    "exp(max)": form(f"{BEHIND_MAX} one = Exp(x) t = Add(t0, one) {DIVIDED}", reason="the exponentials or their sum"),
    "a logit of another maximum": form(
        f"{LOGITS} {BEHIND_MAX} u = ReduceMax<axes = [-2]>(s) n = Sub(h, u) one = Exp(n) t = Add(t0, one) {DIVIDED}",
        reason="",
    ),
    "a logit a row": form(
        f"{BEHIND_MAX} n = Sub(r, x) one = Exp(n) t = Add(t0, one) {DIVIDED}",
        "float[B, 1, T, 1] r",
        reason="is not one logit for each head",
    ),
    "two columns by Pad": column(
        "pads = Constant<value = int64[8] {0, 0, 0, 0, 0, 0, 0, 2}>() x = Pad(s, pads)", reason="pass through Pad"
    ),
    "a column by Pad of a number that is an input": column(
        "pads = Constant<value = int64[8] {0, 0, 0, 0, 0, 0, 0, 1}>() x = Pad(s, pads, c)",
        "float c",
        reason="is not one logit for each head",
    ),
    "a column by Pad that stays": form(
        """pads = Constant<value = int64[8] {0, 0, 0, 0, 0, 0, 0, 1}>() x = Pad(s, pads) p = Softmax<axis = -1>(x)
        y = MatMul(p, u)""",
        "float[B, 3, R, 5] u",
        reason="sink's column is not dropped",
    ),
    "cut at 50000": form(
        "low = Constant<value = float {-3.4e38}>() high = Constant<value = float {5.0e4}>() x = Clip(s, low, high) "
        "p = Softmax<axis = -1>(x) y = MatMul(p, v)",
        reason="pass through Clip",
    ),
}

test_hidden = checks_of(HIDDEN)
test_one_more = checks_of(ONE_MORE)
test_columns = checks_of(COLUMNS)
test_near_misses = checks_of({name: one for name, one in WRONG.items() if one.reason})


def test_a_logit_behind_a_maximum_of_rows_is_no_softmax() -> None:
    _, report = faexport.fuse(WRONG["a logit of another maximum"].model())
    assert report.num_fused == 0


@pytest.mark.parametrize("form", [HIDDEN["times a mask"], ONE_MORE["1 beside the sum"], HIDDEN["replaced by 0"]])
def test_exponentials_that_overflow_are_no_difference(form: Form, tmp_path: pathlib.Path, library: str) -> None:
    """The comparison draws scores of which an exponential is infinite, so that the original gives NaN."""
    onnx.save(form.model(), tmp_path / "model.onnx")
    report = faexport.optimize(tmp_path / "model.onnx", tmp_path / "fused.onnx")
    assert report.num_fused == 1 and report.verification.status is VerificationStatus.PASSED


def test_a_float_mask_that_the_user_vouches_for(tmp_path: pathlib.Path, library: str) -> None:
    onnx.save(WRONG["times any numbers"].model(), tmp_path / "model.onnx")
    options = faexport.Options(assume_zeros_and_ones=True)
    report = faexport.optimize(tmp_path / "model.onnx", tmp_path / "fused.onnx", options=options)
    assert report.num_fused == 1 and report.verification.status is VerificationStatus.PASSED
    assert any(
        "'m', which the exponentials are multiplied by, holds 0 and 1 only" in f.text for f in report.sites[0].facts
    )
    _, report = faexport.fuse(WRONG["times 0 and 2"].model(), options=options)
    assert report.num_fused == 0, "a constant says itself what it holds"
