# SPDX-License-Identifier: Apache-2.0
"""Masks that the model itself makes longer, as for tokens that it puts behind those of the user, and what has to be
read for them beyond the user's mask."""

from __future__ import annotations

import faexport
import pytest
from faexport.understand.mask.emit import Emitter

from tests.export.form_text import PRODUCT, QKV, Form, checks_of

SELF = "float[B, 3, 9, 8] q, float[B, 3, 9, 8] k, float[B, 3, 9, 8] v"
LOW = "low = Constant<value = float {-10000.0}>()"
TRIANGLE = """square = Constant<value = int64[2] {9, 9}>()
    whole = ConstantOfShape<value = float[1] {-10000.0}>(square) k1 = Constant<value = int64 {1}>()
    causal = Trilu<upper = 1>(whole, k1)"""
INDICES = """rows = Shape<start = 2, end = 3>(q) last = Squeeze(rows) keys = Shape<start = 2, end = 3>(k)
    count = Squeeze(keys) zero = Constant<value_int = 0>() one = Constant<value_int = 1>() line = Range(zero, last, one)
    axis = Constant<value_ints = [1]>() i = Unsqueeze(line, axis) j = Range(zero, count, one)"""
WEAK = "zero = Constant<value = float {0.0}>() w = Where(m, zero, low)"
BESIDE_1E9 = "in a row that sees no key scores are rounded to steps of 64 beside -1e+09, as before"
END = "p = Softmax<axis = -1>(x) y = MatMul(p, v)"
OF_BOTH = f"{QKV}, bool[B, 1, 1, S] m, bool[B, 1, T, 1] n"  # masks of keys and of rows
TIMES_MASK = f"""{PRODUCT} low = Constant<value = float {{-1.0e30}}>() both = And(m, n) x = Where(both, s, low)
    p = Softmax<axis = -1>(x) f = Cast<to = 1>(both) w = Mul(p, f) y = MatMul(w, v)"""


def biased(body: str, fill: float, **more: object) -> Form:
    """The plain block with a bias of the user's, a padding mask and a number to hide keys by."""
    low = f"low = Constant<value = float {{{fill}}}>()"
    return Form(f"{QKV}, float[1, 3, T, S] bias, bool[B, 1, 1, S] m", f"{PRODUCT} {low} {body} {END}", **more)


def clamped(body: str, **more: object) -> Form:
    """The plain block with a bias `b` that overflows to -inf in places, and numbers to hide keys by and to clamp at."""
    return Form(
        f"{QKV}, float[1, 3, T, S] bias, bool[B, 1, 1, S] m",
        f"""{PRODUCT} {LOWEST} none = Constant<value = float {{-inf}}>() away = Abs(bias) b = Mul(away, lowest)
        {body} {END}""",
        **more,
    )


LOWEST = "lowest = Constant<value = float {-3.4028235e38}>()"
INFINITE = frozenset({"a row whose bias is -inf at every key gives 0 (NaN before)"})


def huge(body: str, **more: object) -> Form:
    """A mask `w` by -3.4e38 or 0, and `up`: 2e38 or 0. Their sum hides nothing where both are added, or too little."""
    reason = "2e+38 is added to its scores" if "half" not in body else "1e+38 is added to its scores"
    return Form(
        f"{QKV}, bool[B, 1, 1, S] m, bool[1, 1, T, S] n",
        f"""{PRODUCT} low = Constant<value = float {{-3.4e38}}>() high = Constant<value = float {{2.0e38}}>() {WEAK}
        up = Where(n, zero, high) {body} {END}""",
        **{"reason": reason, **more},
    )


HIDDEN_ROWS = """lowest = Constant<value = float {-3.4e38}>() zero = Constant<value = float {0.0}>()
    w = Where(m, zero, lowest) b = Einsum<equation = "bhij->bhij">(w)"""
RIGHT = {
    "a mask of rows that an Einsum gives": Form(
        f"{QKV}, bool[B, 1, T, 1] m", f"{PRODUCT} {HIDDEN_ROWS} x = Add(s, b) {END}"
    ),
    "a mask of batch entries that a product gives": Form(
        f"{QKV}, bool[B, 1, 1, 1] m",
        f"""{PRODUCT} {HIDDEN_ROWS} one = Constant<value = float[1, 1] {{1.0}}>() c = MatMul(b, one)
        x = Add(s, c) {END}""",
    ),
    "a bias of rows that is computed of the queries": Form(
        QKV, f"{PRODUCT} b = ReduceMean<axes = [-1]>(q) x = Add(s, b) {END}", facts=frozenset()
    ),
    "a bias that is divided by 0": Form(
        f"{QKV}, float[B, 1, 1, S] b",
        f"{PRODUCT} none = Constant<value = float {{0.0}}>() d = Div(b, none) x = Add(s, d) {END}",
    ),
    "a clamp behind a bias that overflows": clamped("a = Add(s, b) x = Max(a, lowest)", gone=frozenset()),
    "a clamp by Clip, and then hidden keys": clamped("a = Add(s, b) c = Clip(a, lowest) x = Where(m, c, none)"),
    "a clamp by Clip behind a bias that overflows to +inf": clamped("up = Neg(b) a = Add(s, up) x = Clip(a, lowest)"),
    "a mask, a bias that overflows to +inf, and a clamp by Clip": clamped(
        "a = Where(m, s, lowest) up = Neg(b) c = Add(a, up) x = Clip(c, lowest)"
    ),
    "hidden keys between a bias and its clamp": clamped("a = Add(s, b) c = Where(m, a, none) x = Max(c, lowest)"),
    "a fill, a bias that overflows, and a clamp": clamped("a = Where(m, s, lowest) c = Add(a, b) x = Max(c, lowest)"),
    "a clamp between two biases, and half of it all": clamped(
        "a = Add(s, b) c = Max(lowest, a) d = Add(c, bias) half = Constant<value = float {0.5}>() x = Mul(d, half)"
    ),
    "a clamp in front of a bias that overflows": clamped("a = Max(s, lowest) x = Add(a, b)", facts=INFINITE),
    "a bias that overflows": clamped("x = Add(s, b)", facts=INFINITE),
    "a clamp behind a bias that is never so low": clamped(
        """table = Constant<value = float[1, 3, 1, 1] {1.0, -2.0, 0.5}>() t = Tanh(bias) c = Mul(t, table)
        a = Add(s, c) x = Max(a, lowest)""",
        gone=frozenset({"Softmax", "Max"}),
    ),
    "padded by a constant, and causal": Form(
        f"{SELF}, float[B, 5] m",
        f"""{PRODUCT} {LOW} one = Constant<value = float {{1.0}}>() i = Sub(one, m) b = Mul(i, low)
        pads = Constant<value = int64[4] {{0, 0, 0, 4}}>() more = Pad(b, pads) axis = Constant<value = int64[1] {{1}}>()
        b3 = Unsqueeze(more, axis) {TRIANGLE} both = Add(b3, causal) b4 = Unsqueeze(both, axis) x = Add(s, b4) {END}""",
    ),
    "a bool mask, padded in front": Form(
        f"{SELF}, bool[B, 5] m",
        f"""{PRODUCT} none = Constant<value = bool {{0}}>() pads = Constant<value = int64[4] {{0, 4, 0, 0}}>()
        more = Pad(m, pads, none) axes = Constant<value = int64[2] {{1, 2}}>() b4 = Unsqueeze(more, axes)
        low = Constant<value = float {{-3.4e38}}>() x = Where(b4, s, low) {END}""",
    ),
    "two masks, padded for a key of the model's own": Form(
        f"{QKV}, bool[B, S] m, bool[T, S] n",
        """below = Constant<value = int64[8] {0, 0, 0, 0, 0, 0, 1, 0}>() k1 = Pad(k, below) v1 = Pad(v, below)
        kt = Transpose<perm = [0, 1, 3, 2]>(k1) s = MatMul(q, kt) none = Constant<value = float {-inf}>()
        zero = Constant<value = float {0.0}>() a = Where(m, none, zero) b = Where(n, none, zero)
        behind = Constant<value = int64[4] {0, 0, 0, 1}>() a1 = Pad(a, behind) b1 = Pad(b, behind)
        axes = Constant<value = int64[2] {1, 2}>() a4 = Unsqueeze(a1, axes) both = Add(a4, b1) x = Add(s, both)
        p = Softmax<axis = -1>(x) y = MatMul(p, v1)""",
    ),
    "two masks, padded as far as there are keys": Form(
        "float[B, 3, 2, 8] q, float[B, 3, K, 8] k, float[B, 3, K, 8] v, bool[B, M] m, bool[2, M] n",
        f"""{PRODUCT} none = Constant<value = float {{-inf}}>() zero = Constant<value = float {{0.0}}>()
        a = Where(m, none, zero) b = Where(n, none, zero) keys = Shape<start = 2, end = 3>(k)
        own = Shape<start = 1, end = 2>(m) missing = Sub(keys, own) zeros = Constant<value = int64[3] {{0, 0, 0}}>()
        behind = Concat<axis = 0>(zeros, missing) a1 = Pad(a, behind) b1 = Pad(b, behind)
        axes = Constant<value = int64[2] {{1, 2}}>() a4 = Unsqueeze(a1, axes) both = Add(a4, b1) x = Add(s, both)
        {END}""",
    ),
    "weights times the mask of their scores": Form(OF_BOTH, TIMES_MASK, gone=frozenset({"Softmax", "Mul"})),
    "as many zeros as rows are missing": Form(
        "float[B, 3, T, 8] q, float[B, 3, T, 8] k, float[B, 3, T, 8] v, float[B, M] m",
        f"""{PRODUCT} {LOW} one = Constant<value = float {{1.0}}>() i = Sub(one, m) b = Mul(i, low)
        rows = Shape<start = 2, end = 3>(q) own = Shape<start = 1, end = 2>(m) missing = Sub(rows, own)
        zeros = Constant<value = int64[3] {{0, 0, 0}}>() pads = Concat<axis = 0>(zeros, missing) more = Pad(b, pads)
        axes = Constant<value = int64[2] {{1, 2}}>() b4 = Unsqueeze(more, axes) x = Add(s, b4) {END}""",
    ),
    "blocks of rows, each with its own bias": Form(
        "float[B, 3, 4, 2, 8] q, float[B, 3, 6, 2, 8] k, float[B, 3, 6, 2, 8] v, float[B, 3, 2, 4, 6] b",
        """bias = LpNormalization<axis = -1>(b) s = Einsum<equation = "...qhd,...khd->...hqk">(q, k) x = Add(s, bias)
        p = Softmax<axis = -1>(x) o = Einsum<equation = "...hqk,...khd->...qhd">(p, v)
        t = Einsum<equation = "...qhd,...khd->...hqk">(o, k) z = Add(t, bias) w = Softmax<axis = -1>(z)
        y = Einsum<equation = "...hqk,...khd->...qhd">(w, v)""",
        fused=2,
        empty=False,
    ),
    "repeated for each head of a bmm": Form(
        "float[N, 9, 8] q, float[N, 9, 8] k, float[N, 9, 8] v, float[N, 5] m",
        f"""kt = Transpose<perm = [0, 2, 1]>(k) s = MatMul(q, kt) {LOW} one = Constant<value = float {{1.0}}>()
        i = Sub(one, m) b = Mul(i, low) pads = Constant<value = int64[4] {{0, 0, 0, 4}}>() more = Pad(b, pads)
        axis = Constant<value = int64[1] {{1}}>() b3 = Unsqueeze(more, axis) {TRIANGLE} both = Add(b3, causal)
        x = Add(s, both) {END}""",
    ),
    "a fill and a number that undoes it, added up first": huge("a = Add(w, up) x = Add(s, a)", reason=""),
    "a fill that overflows by the scale behind it": biased(
        f"{WEAK} a = Add(s, w) two = Constant<value = float {{2.0}}>() x = Mul(a, two)",
        -3.0e38,
        facts=frozenset({"a row that sees no key gives 0 (NaN before)"}),
    ),
    "causal from the last key, and more rows than keys": Form(
        QKV,
        f"""{PRODUCT} {INDICES} more = Sub(count, last) at = Add(i, more) keep = LessOrEqual(j, at)
        low = Constant<value = float {{-3.0e38}}>() x = Where(keep, s, low) {END}""",
        facts=frozenset({"causal from position S - T"}),
    ),
    "a bias, and then a fill that absorbs it": biased("a = Add(s, bias) x = Where(m, a, low)", -3.0e38),
    "a fill that absorbs, and then a bias": biased("a = Where(m, s, low) x = Add(a, bias)", -3.0e38),
    "a bias and a weak fill, added up first": biased(
        f"{WEAK} b = LpNormalization<axis = -1>(bias) a = Add(b, w) x = Add(s, a)",
        -1.0e9,
        facts=frozenset({BESIDE_1E9}),
        scale=10.0,
    ),
    "a weak fill, and then half of it all": biased(
        f"{WEAK} a = Add(s, w) half = Constant<value = float {{0.5}}>() x = Mul(a, half)",
        -2.0e9,
        facts=frozenset({BESIDE_1E9}),
        scale=10.0,
    ),
    "two weak fills, of which one leaves each row a key": Form(
        f"{SELF}, bool[B, 1, 1, 9] m",
        f"""{PRODUCT} {LOW} {WEAK} a = Add(s, w) {TRIANGLE} x = Add(a, causal) {END}""",
        facts=frozenset({"in a row that sees no key scores are rounded to steps of 0.00098 beside -10000, as before"}),
    ),
    "a bias of the user's, and then a weak fill that leaves each row a key": Form(
        f"{SELF}, float[1, 3, 9, 9] bias",
        f"{PRODUCT} {LOW} {TRIANGLE} a = Add(s, bias) x = Add(a, causal) {END}",
        facts=frozenset({"a finite mask beside a float mask: both stay a bias"}),
    ),
    "a bias, and then numbers of a mask": Form(
        f"{QKV}, float[1, 3, T, S] bias, int64[B, 1, 1, S] m",
        f"""{PRODUCT} low = Constant<value = float {{-1.0e9}}>() one = Constant<value = float {{1.0}}>()
        f = Cast<to = 1>(m) i = Sub(one, f) w = Mul(i, low) a = Add(s, bias) x = Add(a, w) {END}""",
        facts=frozenset(
            {
                "where a float mask hides every key of a row, nothing depends on what rounding leaves of their scores "
                "(assumed)"
            }
        ),
    ),
}

OTHER_ORDER = "what, depends on the order of its additions"

CLAMPED = "after a bias was added that may be lower, and this number does not absorb scores"

WRONG = {
    "a mask of keys that an Einsum gives, behind a finite number": Form(
        f"{QKV}, bool[B, 1, 1, S] m, bool[T, S] n",
        f"""{PRODUCT} {HIDDEN_ROWS} far = Constant<value = float {{-1e9}}>() a = Where(n, s, far) x = Add(a, b)
        {END}""",
        reason="a float mask is added to scores that another mask replaced by a number",
    ),
    "a clamp that absorbs nothing behind a bias of the user's": biased(
        "a = Add(s, bias) x = Max(a, low)", -65504.0, reason=CLAMPED
    ),
    "a clamp that absorbs nothing behind a mask and a bias": biased(
        "a = Where(m, s, low) c = Add(a, bias) x = Clip(c, low)", -1.0e9, reason=CLAMPED
    ),
    "a clamp in half precision": Form(
        "float16[B, 3, T, 8] q, float16[B, 3, S, 8] k, float16[B, 3, S, 8] v, float16[1, 3, T, S] bias",
        f"""{PRODUCT} f = Constant<value = float {{-65504.0}}>() low = Cast<to = 10>(f) a = Add(s, bias)
        x = Max(a, low) {END}""",
        reason=CLAMPED,
        type="float16",
    ),
    "both ends cut off behind a bias of the user's": biased(
        "high = Constant<value = float {3.4028235e38}>() a = Add(s, bias) x = Clip(a, low, high)",
        -3.4028235e38,
        reason="its scores are cut off above after a bias was added that may be infinite",
    ),
    "a bias, and then a weak fill added": biased(f"{WEAK} a = Add(s, bias) x = Add(a, w)", -1.0e9, reason=OTHER_ORDER),
    "a weak fill added, and then a bias": biased(f"{WEAK} a = Add(s, w) x = Add(a, bias)", -1.0e4, reason=OTHER_ORDER),
    "a bias of the model's, and then a weak fill": biased(
        f"{WEAK} b = LpNormalization<axis = -1>(bias) a = Add(s, b) x = Add(a, w)", -1.0e9, reason=OTHER_ORDER
    ),
    "weights times more than the mask of their scores": Form(
        OF_BOTH,
        TIMES_MASK.replace("Where(both", "Where(m"),
        reason="probabilities are set to 0 after its softmax, where they aren't masked before it",
    ),
    "two weak fills": Form(
        f"{QKV}, bool[B, 1, 1, S] m, bool[1, 1, T, S] n",
        f"""{PRODUCT} low = Constant<value = float {{-1.0e9}}>() {WEAK} a = Add(s, w) w2 = Where(n, zero, low)
        x = Add(a, w2) {END}""",
        reason=OTHER_ORDER,
    ),
    "a weak fill, and then a third of it all": biased(
        f"{WEAK} a = Add(s, w) three = Constant<value = float {{3.0}}>() x = Div(a, three)", -1.0e9, reason=OTHER_ORDER
    ),
    "a bias, and then a weak fill in its place": biased(
        "a = Add(s, bias) x = Where(m, a, low)", -1.0e9, reason="what was added to others may be lower"
    ),
    "a weak fill, and then a bias": biased(
        "a = Where(m, s, low) x = Add(a, bias)", -1.0e9, reason="rows of padding only would come out differently"
    ),
    "a fill, and then a number that undoes it": huge("a = Add(s, w) x = Add(a, up)"),
    "a number, and then a fill that it is not absorbed by": huge("a = Add(s, up) x = Add(a, w)"),
    "a number that the scale leaves in the way of a fill": huge(
        "a = Add(s, up) half = Constant<value = float {0.5}>() b = Mul(a, half) x = Add(b, w)"
    ),
    "a fill in the place of scores, and then a number that undoes it": huge("a = Where(m, s, low) x = Add(a, up)"),
    "a stored mask, and then a number that undoes it": huge(
        "t = Constant<value = float[3, 1, 1] {0.0, -3.4e38, 0.0}>() a = Add(s, t) x = Add(a, up)"
    ),
    "weights set to 0 where a fill hides scores, beside a bias": Form(
        f"{QKV}, float[1, 3, T, S] bias, bool[B, 1, 1, S] m",
        f"""{PRODUCT} low = Constant<value = float {{-1.0e30}}>() {WEAK} a = Add(s, bias) x = Add(a, w)
        p0 = Softmax<axis = -1>(x) p = Where(m, p0, zero) y = MatMul(p, v)""",
        reason="where a finite number hides scores, and what was added to others may be lower",
    ),
    "a mask with any number of axes": Form(
        f"{QKV}, int64[R] shape, float[N] numbers",
        f"{PRODUCT} m = Reshape(numbers, shape) x = Add(s, m) {END}",
        reason="since that of 'm' isn't: not even how many axes it has",
    ),
}

test_fused_and_right = checks_of(RIGHT)
test_near_misses = checks_of(WRONG)


def test_a_proof_whose_nodes_fail_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own nodes run, and those that were written for the mask don't: that is no reason to look away."""
    monkeypatch.setattr(Emitter, "_is_size", staticmethod(lambda site, size, axis, x: True))
    _, report = faexport.fuse(RIGHT["two masks, padded as far as there are keys"].model())
    assert report.num_fused == 0 and "please report" in str(report.sites[0].refusal)


@pytest.mark.parametrize("bound", ["Max(a, lowest)", "Clip(a, lowest)"])
def test_where_a_bias_is_bounded_no_row_is_said_to_be_infinite(bound: str) -> None:
    _, report = faexport.fuse(clamped(f"a = Add(s, b) x = {bound}").model())
    assert report.num_fused == 1
    assert not INFINITE & {str(fact) for site in report.sites for fact in site.facts}


def test_right_padding_is_checked_where_there_may_be_no_key() -> None:
    """The check of a mask also draws masks of length 0, which hold no first token."""
    block = Form(
        f"{QKV}, int64[B, S] m",
        f"""{PRODUCT} {LOW} none = Constant<value = int64 {{0}}>() hidden = Equal(m, none)
        axes = Constant<value_ints = [1, 2]>() h = Unsqueeze(hidden, axes) x = Where(h, low, s) {END}""",
    )
    _, report = faexport.fuse(block.model(), options=faexport.Options(assume_right_padding=True))
    assert report.num_fused == 1, report.sites
    assert "key lengths (right padding assumed)" in {str(fact) for site in report.sites for fact in site.facts}
