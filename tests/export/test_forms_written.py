# SPDX-License-Identifier: Apache-2.0
"""Masks by the lower of a score and a number, and scores that are written anew as PyTorch's `x[:, :, 0:] = y` is."""

from __future__ import annotations

from tests.export.form_text import PRODUCT, QKV, Form, checks_of

LARGEST = 3.4028234663852886e38
BIASED = f"{QKV}, float[1, 3, T, S] bias, bool[B, 1, 1, S] m"
END = "p = Softmax<axis = -1>(x) y = MatMul(p, v)"


def lowered(body: str, low: float, high: float, **more: object) -> Form:
    """The plain block with a mask `w` of two numbers."""
    numbers = f"low = Constant<value = float {{{low}}}>() high = Constant<value = float {{{high}}}>()"
    return Form(BIASED, f"{PRODUCT} {numbers} w = Where(m, high, low) {body} {END}", **more)


INFINITE = float("-inf"), float("inf")
PADDING = "padding mask [B, 1, 1, S_kv]"
MEAN = "a row that sees no key gives the mean of all values, as the fill"

# All places of [B, 3, T, S] as TorchScript lists them, and what is written there.
SIZES = """shape = Shape(s) b1 = Shape<start = 0, end = 1>(s) t1 = Shape<start = 2, end = 3>(s)
    s1 = Shape<start = 3, end = 4>(s) n0 = Squeeze(b1) n2 = Squeeze(t1) n3 = Squeeze(s1)
    zero = Constant<value_int = 0>() one = Constant<value_int = 1>() three = Constant<value_int = 3>()"""
PLACES = """r0 = Range(zero, n0, one) r1 = Range(zero, three, one) r2 = Range(zero, n2, one) r3 = Range(FROM, n3, one)
    c0 = Constant<value_ints = [-1, 1, 1, 1]>() c1 = Constant<value_ints = [-1, 1, 1]>()
    c2 = Constant<value_ints = [-1, 1]>() last = Constant<value_ints = [-1]>()
    a0 = Reshape(r0, c0) a1 = Reshape(r1, c1) a2 = Reshape(r2, c2) count = Shape<start = 0, end = 1>(r3)
    threes = Constant<value_ints = [3]>() all = Concat<axis = 0>(b1, threes, t1, count)
    e0 = Expand(a0, all) e1 = Expand(a1, all) e2 = Expand(a2, all) e3 = Expand(r3, all)
    u0 = Unsqueeze(e0, last) u1 = Unsqueeze(e1, last) u2 = Unsqueeze(e2, last) u3 = Unsqueeze(e3, last)
    places = Concat<axis = -1>(u0, u1, u2, u3)"""


def written(update: str, places: str = PLACES, start: str = "zero", how: str = "", **more: object) -> Form:
    """The plain block, whose scores are written anew by `u`."""
    return Form(
        f"{QKV}, float[1, 3, T, S] bias",
        f"{PRODUCT} {SIZES} {places.replace('FROM', start)} {update} x = ScatterND{how}(s, places, u) {END}",
        empty=False,
        **more,
    )


RIGHT = {
    "the lower of scores and a mask of infinities": lowered(
        "x = Min(s, w)", *INFINITE, facts=frozenset({PADDING, "a row that sees no key gives 0 (NaN before)"})
    ),
    "the lower of a mask of the type's ends and scores": lowered(
        "x = Min(w, s)", -LARGEST, LARGEST, facts=frozenset({PADDING, f"{MEAN} -3.40282e+38 does"})
    ),
    "the lower of scores and a number that no score reaches": lowered(
        "x = Min(s, w)", -1.0e9, LARGEST, facts=frozenset({PADDING, "scores stay far above the fill -1e+09 (assumed)"})
    ),
    "a bias, and then a mask of infinities": lowered("a = Add(s, bias) x = Min(a, w)", *INFINITE),
    "a bias that is never so low, and then a mask": lowered(
        "b = Constant<value = float[1, 3, 1, 1] {1.0, -2.0, 0.5}>() a = Add(s, b) x = Min(a, w)",
        -1.0e9,
        LARGEST,
    ),
    "a mask that is added, and then a lower one": lowered(
        """zero = Constant<value = float {0.0}>() fill = Constant<value = float {-1.0e9}>() n = Where(m, zero, fill)
        a = Add(s, n) x = Min(a, w)""",
        *INFINITE,
        facts=frozenset({PADDING}),
    ),
    "a mask, and half of it all": lowered(
        "a = Min(s, w) half = Constant<value = float {0.5}>() x = Mul(a, half)", *INFINITE, facts=frozenset({PADDING})
    ),
    "a bias in scores that are all written anew": written("u = Add(s, bias)"),
    "scores that are expanded to their own size": Form(
        f"{QKV}, bool[B, 1, 1, S] m",
        f"{PRODUCT} shape = Shape(s) e = Expand(s, shape) low = Constant<value = float {{-1.0e30}}>() "
        f"x = Where(m, e, low) {END}",
        facts=frozenset({PADDING}),
    ),
}

WRONG = {
    "the lower of scores and a number that they reach": lowered(
        "x = Min(s, w)", -1.0e9, 50.0, reason="cut off above at 50, which scores can reach"
    ),
    "the lower of scores and numbers that they may be below": lowered(
        "x = Min(s, w)", -100.0, LARGEST, reason="cut off above at -100, which scores can reach"
    ),
    "the lower of scores and a bias of the user's": lowered(
        "x = Min(s, bias)", *INFINITE, reason="cut off above at numbers that are not known"
    ),
    "a bias of the user's, and then a mask that may be above it": lowered(
        "a = Add(s, bias) x = Min(a, w)", -1.0e9, float("inf"), reason="after what may be lower was added"
    ),
    "a bias that may be infinite, and then the type's ends": lowered(
        "a = Add(s, bias) x = Min(a, w)",
        float("-inf"),
        LARGEST,
        reason="cut off above after a bias was added that may be infinite",
    ),
    "what is lower, turned over": lowered("a = Min(s, w) x = Neg(a)", *INFINITE, reason="negated after"),
    "scores that are written anew from the second key on": written(
        "k1 = Constant<value_ints = [1]>() rest = Constant<value_ints = [9999]>() c3 = Constant<value_ints = [3]>() "
        "part = Slice(s, k1, rest, c3) more = Slice(bias, k1, rest, c3) u = Add(part, more)",
        start="one",
        reason="elements of the scores are written anew (ScatterND)",
    ),
    "scores that are written in another order": written(
        "u = Add(s, bias)",
        PLACES.replace("r3 = Range(FROM, n3, one)", "f3 = Range(FROM, n3, one) m3 = Sub(n3, one) r3 = Sub(m3, f3)"),
        reason="elements of the scores are written anew (ScatterND)",
    ),
    "scores that are written beside what stood there": written(
        "u = Add(s, bias)", how='<reduction = "add">', reason="elements of the scores are written anew (ScatterND)"
    ),
    "scores that are expanded over more batch entries": Form(
        "float[1, 3, T, 8] q, float[1, 3, S, 8] k, float[1, 3, S, 8] v, float[B, 3, T, S] other",
        f"{PRODUCT} shape = Shape(other) x = Expand(s, shape) {END}",
        reason="the scores change their shape in a way that is not understood",
    ),
}

test_fused_and_right = checks_of(RIGHT)
test_near_misses = checks_of(WRONG)
