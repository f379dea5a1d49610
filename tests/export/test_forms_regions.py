# SPDX-License-Identifier: Apache-2.0
"""Scores of which a part gets a bias, as PyTorch's exporters write `scores[:, :, 1:, 1:] += bias`: the relative
positions of MViTv2, whose class token has none."""

from __future__ import annotations

from tests.export.form_text import PRODUCT, Form, checks_of, replaced

SELF = "float[B, 3, 5, 8] q, float[B, 3, 7, 8] k, float[B, 3, 7, 8] v"
PLACES = """one = Constant<value_ints = [1]>() end = Constant<value_ints = [9223372036854775807]>()
    zero = Constant<value_ints = [0]>() second = Constant<value_ints = [2]>() third = Constant<value_ints = [3]>()
    first = Constant<value_int = 0>() step = Constant<value_int = 1>() last = Constant<value_ints = [-1]>()
    n = Shape<start = 2, end = 3>(q) count = Squeeze(n) line = Range(first, count, step)
    from_1 = Slice(line, one, end, zero) at_rows = Unsqueeze(from_1, last)
    m = Shape<start = 2, end = 3>(k) width = Squeeze(m) all = Range(first, width, step)
    keys_1 = Slice(all, one, end, zero) at_keys = Unsqueeze(keys_1, last)"""
CUT = "r = Slice(s, one, end, second) c = Slice(r, one, end, third)"
WRITTEN = """ut = Transpose<perm = [3, 1, 2, 0]>(u) rt = Transpose<perm = [3, 1, 2, 0]>(r)
    w = ScatterND(rt, at_keys, ut) wt = Transpose<perm = [2, 1, 3, 0]>(w) st = Transpose<perm = [2, 1, 0, 3]>(s)
    z = ScatterND(st, at_rows, wt) x = Transpose<perm = [2, 1, 0, 3]>(z)"""
END = "p = Softmax<axis = -1>(x) y = MatMul(p, v)"
BIASED = f"{SELF}, float[B, 3, 4, 6] b"
PLAIN = f"{PRODUCT} {PLACES} {CUT} u = Add(c, b) {WRITTEN} {END}"
BIAS = frozenset({"bias [B, H, S_q, S_kv]"})

RIGHT = {
    "a bias for all but the first row and key": Form(BIASED, PLAIN, facts=BIAS, gone=frozenset({"ScatterND"})),
    "two biases, one behind the other": Form(
        f"{BIASED}, float[1, 3, 4, 1] d", replaced(PLAIN, ("u = Add(c, b)", "a = Add(c, b) u = Add(d, a)")), facts=BIAS
    ),
    "biases of rows and of columns of an image": Form(
        f"{SELF}, float[B, 3, 2, 2, 3, 1] rows, float[B, 3, 2, 2, 1, 2] columns",
        replaced(
            PLAIN,
            (
                "u = Add(c, b)",
                """image = Constant<value = int64[6] {-1, 3, 2, 2, 3, 2}>() c6 = Reshape(c, image) a = Add(c6, rows)
                d = Add(a, columns) flat = Constant<value = int64[4] {-1, 3, 4, 6}>() u = Reshape(d, flat)""",
            ),
        ),
        facts=BIAS,
    ),
    "a part that is expanded to its own shape, which is asked of it": Form(
        BIASED, replaced(PLAIN, ("u = Add(c, b)", "a = Add(c, b) whole = Shape(c) u = Expand(a, whole)")), facts=BIAS
    ),
    "scaled scores, and a mask behind the bias": Form(
        f"{BIASED}, bool[B, 1, 1, 7] mask",
        replaced(
            PLAIN,
            ("s = MatMul(q, kt)", "s0 = MatMul(q, kt) half = Constant<value = float {0.3}>() s = Mul(s0, half)"),
            ("p = Softmax<axis = -1>(x)", "low = Constant<value = float {-3.0e38}>() t = Where(mask, x, low)"),
            ("y = MatMul(p, v)", "p = Softmax<axis = -1>(t) y = MatMul(p, v)"),
        ),
    ),
}

REFUSED = "elements of the scores are written anew (ScatterND)"
WRONG = {
    "another part than that which was cut out": Form(
        f"{SELF}, float[B, 3, 4, 6] b",
        replaced(PLAIN, ("r = Slice(s, one, end, second)", "r = Slice(s, zero, last, second)")),
        reason=REFUSED,
    ),
    "a part that was turned around": Form(
        f"{SELF.replace('5, 8] q', '7, 8] q')}, float[B, 3, 6, 6] b",
        replaced(PLAIN, ("u = Add(c, b)", "turned = Transpose<perm = [0, 1, 3, 2]>(c) u = Add(turned, b)")),
        reason=REFUSED,
    ),
    "a part that is multiplied": Form(BIASED, replaced(PLAIN, ("u = Add(c, b)", "u = Mul(c, b)")), reason=REFUSED),
    "a part that is added once more": Form(
        BIASED, replaced(PLAIN, ("z = ScatterND(", 'z = ScatterND<reduction = "add">(')), reason=REFUSED, opset=18
    ),
    "a part of scores that are read elsewhere": Form(
        BIASED,
        replaced(PLAIN, ("y = MatMul(p, v)", "o = MatMul(p, v) most = ReduceMax<keepdims = 1>(r) y = Add(o, most)")),
        reason="used twice",
    ),
    "a part that its own scores are added to": Form(
        BIASED, replaced(PLAIN, ("u = Add(c, b)", "u = Add(c, c)")), reason="used twice"
    ),
}

test_fused_and_right = checks_of(RIGHT)
test_near_misses = checks_of(WRONG)
