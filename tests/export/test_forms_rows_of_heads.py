# SPDX-License-Identifier: Apache-2.0
"""Query heads as rows of one product with the one key head that they share, which get an axis of their own where a mask
meets them: multi-query attention as StarCoder's first form writes it."""

from __future__ import annotations

import dataclasses
import re

from tests.export.form_text import Form, checks_of

KEYS = "float[B, S, 8] k, float[B, S, 8] v"
LOW = "low = Constant<value = float {-1e9}>()"
SIZES = """b = Shape<end = 1>(k) s_size = Shape<start = 1, end = 2>(k) three = Constant<value_ints = [3]>()
eight = Constant<value_ints = [8]>() all = Constant<value_ints = [24]>()
tall = Mul(t, three) flat = Concat<axis = 0>(b, tall, eight) flat_scores = Concat<axis = 0>(b, tall, s_size)"""
TOKENS = f"t = Shape<start = 1, end = 2>(q) {SIZES} four = Concat<axis = 0>(b, t, three, s_size)"
HEADS = f"t = Shape<start = 2, end = 3>(q) {SIZES} four = Concat<axis = 0>(b, three, t, s_size)"
PRODUCT = """q3 = Reshape<allowzero = 1>(q, flat) kt = Transpose<perm = [0, 2, 1]>(k) s0 = MatMul(q3, kt)
c = Constant<value = float {0.3}>() s1 = Mul(s0, c) s = Reshape<allowzero = 1>(s1, four)"""
SOFTMAX = "p0 = Softmax<axis = -1>(x) p = Reshape<allowzero = 1>(p0, flat_scores) o = MatMul(p, v)"
BACK = "whole = Concat<axis = 0>(b, t, all) y = Reshape<allowzero = 1>(o, whole)"
TURNED = """apart = Concat<axis = 0>(b, three, t, eight) o4 = Reshape<allowzero = 1>(o, apart)
y = Transpose<perm = [0, 2, 1, 3]>(o4)"""
SHARED = frozenset({"3 query heads on 1 kv heads"})
CAUSAL = """both = Concat<axis = 0>(t, t) true = ConstantOfShape<value = bool[1] {1}>(both)
low_part = Trilu<upper = 0>(true)
seen = Constant<value_ints = [0, 2]>()"""

NOTHING = "scaled = Mul(s0, c) none = Constant<value = float {0}>() s1 = Add(scaled, none)"
COMPUTED = PRODUCT.replace("s0 = MatMul(q3", "relu = Relu(q3) s0 = MatMul(relu")


def older(body: str) -> str:
    """Shape without `start` and `end`, Reshape without `allowzero`."""
    body = re.sub(r"(\w+) = Shape<end = 1>\((\w+)\)", r"\1 = Shape<start = 0, end = 1>(\2)", body)
    bounds = (
        r"\1_all = Shape(\4) \1_from = Constant<value_ints = [\2]>() \1_to = Constant<value_ints = [\3]>() "
        r"\1 = Slice(\1_all, \1_from, \1_to)"
    )
    return re.sub(r"(\w+) = Shape<start = (\d), end = (\d)>\((\w+)\)", bounds, body).replace("<allowzero = 1>", "")


def tokens(middle: str, inputs: str = "bool[B, T, 1, S] m", product: str = PRODUCT, **more: object) -> Form:
    """Rows [T, heads]."""
    body = f"{TOKENS} {LOW} {product} {middle} {SOFTMAX} {BACK}"
    body = body if more.get("opset", 17) >= 15 else older(body)
    return Form(f"float[B, T, 24] q, {KEYS}, {inputs}", body, **{"facts": SHARED, **more})


def heads(middle: str, inputs: str = "bool[B, 1, T, S] m", product: str = PRODUCT, **more: object) -> Form:
    """Rows [heads, T]."""
    body = f"{HEADS} {LOW} {product} {middle} {SOFTMAX} {TURNED}"
    return Form(f"float[B, 3, T, 8] q, {KEYS}, {inputs}", body, **{"facts": SHARED, **more})


WHERE = "x = Where(m, s, low)"
RIGHT = {
    "rows of heads behind each other, masked": tokens(WHERE),
    "heads of rows behind each other, masked": heads(WHERE),
    "padded": tokens(WHERE, "bool[B, 1, 1, S] m", facts=SHARED | {"padding mask [B, 1, 1, S_kv]"}),
    "causal": Form(
        "float[B, T, 24] q, float[B, T, 8] k, float[B, T, 8] v",
        f"{TOKENS} {LOW} {PRODUCT} {CAUSAL} m = Unsqueeze(low_part, seen) {WHERE} {SOFTMAX} {BACK}",
        facts=SHARED | {"causal"},
    ),
    "a bias of all heads": tokens("x = Add(s, m)", "float[B, T, 3, S] m"),
    "a bias of heads alone": heads("x = Add(s, m)", "float[3, 1, S] m"),
    "nothing was added to the product": tokens(WHERE, product=PRODUCT.replace("s1 = Mul(s0, c)", NOTHING)),
    "the rows are turned before the values": Form(
        f"float[B, 3, T, 8] q, {KEYS}, bool[B, 1, T, S] m",
        f"""{HEADS} {LOW} {PRODUCT} {WHERE} p0 = Softmax<axis = -1>(x) turned = Transpose<perm = [0, 2, 1, 3]>(p0)
        p = Reshape<allowzero = 1>(turned, flat_scores) o = MatMul(p, v) {BACK}""",
        facts=SHARED,
    ),
    "what is no view of the queries": tokens(WHERE, product=COMPUTED),
    "what is no view of the queries, heads first": heads(WHERE, product=COMPUTED),
    "in an older opset": tokens(WHERE, product=COMPUTED, opset=13),
    "as many rows as heads": Form(
        "float[B, 3, 3, 8] q, float[B, S, 8] k, float[B, S, 8] v, bool[B, 1, 3, S] m",
        f"{HEADS} {LOW} {PRODUCT} {WHERE} {SOFTMAX} {TURNED}",
        facts=SHARED,
    ),
    "two key heads": Form(
        "float[B, T, 48] q, float[B, 2, S, 8] k, float[B, 2, S, 8] v, bool[B, 1, T, 1, S] m",
        f"""{LOW} b = Shape<end = 1>(q) t = Shape<start = 1, end = 2>(q) n = Shape<start = 2, end = 3>(k)
        two = Constant<value_ints = [2]>() three = Constant<value_ints = [3]>() eight = Constant<value_ints = [8]>()
        apart = Concat<axis = 0>(b, t, two, three, eight) q5 = Reshape<allowzero = 1>(q, apart)
        turned = Transpose<perm = [0, 2, 1, 3, 4]>(q5) tall = Mul(t, three) flat = Concat<axis = 0>(b, two, tall, eight)
        q4 = Reshape<allowzero = 1>(turned, flat) kt = Transpose<perm = [0, 1, 3, 2]>(k) s0 = MatMul(q4, kt)
        five = Concat<axis = 0>(b, two, t, three, n) s = Reshape<allowzero = 1>(s0, five) {WHERE}
        p0 = Softmax<axis = -1>(x) flat_scores = Concat<axis = 0>(b, two, tall, n)
        p = Reshape<allowzero = 1>(p0, flat_scores) o = MatMul(p, v)
        o_apart = Concat<axis = 0>(b, two, t, three, eight) o5 = Reshape<allowzero = 1>(o, o_apart)
        back = Transpose<perm = [0, 2, 1, 3, 4]>(o5)
        all = Constant<value_ints = [48]>() whole = Concat<axis = 0>(b, t, all)
        y = Reshape<allowzero = 1>(back, whole)""",
        facts=frozenset({"6 query heads on 2 kv heads"}),
    ),
}

# Batch and key heads in one axis of the products, query heads and rows in another, as tf2onnx writes Gemma's Einsums.
BOTH = f"""{LOW} b = Shape<end = 1>(q) t = Shape<start = 3, end = 4>(q) n = Shape<start = 2, end = 3>(k)
two = Constant<value_ints = [2]>() three = Constant<value_ints = [3]>() eight = Constant<value_ints = [8]>()
one = Constant<value_ints = [1]>() pairs = Mul(b, two) tall = Mul(t, three)
flat_q = Concat<axis = 0>(pairs, tall, eight) flat_k = Concat<axis = 0>(pairs, n, eight)
q3 = Reshape<allowzero = 1>(q, flat_q) k3 = Reshape<allowzero = 1>(k, flat_k) v3 = Reshape<allowzero = 1>(v, flat_k)
kt = Transpose<perm = [0, 2, 1]>(k3) s0 = MatMul(q3, kt)"""
BOTH_END = """p0 = Softmax<axis = -1>(x) flat_scores = Concat<axis = 0>(pairs, tall, n)
p = Reshape<allowzero = 1>(p0, flat_scores) o = MatMul(p, v3) o_apart = Concat<axis = 0>(b, two, three, t, eight)
o5 = Reshape<allowzero = 1>(o, o_apart) back = Transpose<perm = [0, 3, 1, 2, 4]>(o5)
all = Constant<value_ints = [48]>() whole = Concat<axis = 0>(b, t, all) y = Reshape<allowzero = 1>(back, whole)"""
FIVE = "five = Concat<axis = 0>(b, two, three, t, n) s = Reshape<allowzero = 1>(s0, five)"
SIX = """six = Concat<axis = 0>(b, two, three, t, n, one) s6 = Reshape<allowzero = 1>(s0, six)
last = Constant<value_ints = [5]>() s = Squeeze(s6, last)"""


def both(middle: str, mask: str = "bool[B, 1, 1, T, S] m", **more: object) -> Form:
    """Six query heads on two key heads, masked while batch, key heads, query heads and rows are apart."""
    inputs = f"float[B, 2, 3, T, 8] q, float[B, 2, S, 8] k, float[B, 2, S, 8] v, {mask}"
    return Form(inputs, f"{BOTH} {middle} {BOTH_END}", **{"facts": frozenset({"6 query heads on 2 kv heads"}), **more})


RIGHT |= {
    "key heads in the axis of the batch": both(f"{FIVE} {WHERE}"),
    "key heads in the axis of the batch, an axis of size 1 more": both(f"{SIX} {WHERE}"),
    "key heads in the axis of the batch, biased": both(f"{FIVE} x = Add(s, m)", "float[2, 3, T, S] m"),
    "key heads in the axis of the batch, a mask of conditions": both(
        f"{SIX} off = Less(m, low) x = Where(off, low, s)", "float[B, 1, 1, T, S] m"
    ),
}

LEFT = {
    "key heads and query heads change places before the values": (
        both(f"{FIVE} turned = Transpose<perm = [0, 2, 1, 3, 4]>(s) x = Where(m, turned, low)"),
        "change their shape in a way that is not understood",
    ),
    "a mask also meets the rows together": (
        tokens(
            WHERE, "bool[B, T, 1, S] m, float[B, 1, S] bias", product=PRODUCT.replace("Mul(s0, c)", "Add(s0, bias)")
        ),
        "a shape that is not understood",
    ),
    "rows of two open sizes": (
        Form(
            f"float[B, T, U, 8] q, {KEYS}, bool[B, T, 1, S] m",
            f"""{LOW} b = Shape<end = 1>(q) t = Shape<start = 1, end = 2>(q) u = Shape<start = 2, end = 3>(q)
            n = Shape<start = 1, end = 2>(k) eight = Constant<value_ints = [8]>() tall = Mul(t, u)
            flat = Concat<axis = 0>(b, tall, eight) q0 = Reshape<allowzero = 1>(q, flat) q3 = Relu(q0)
            kt = Transpose<perm = [0, 2, 1]>(k) s0 = MatMul(q3, kt) four = Concat<axis = 0>(b, t, u, n)
            s = Reshape<allowzero = 1>(s0, four) {WHERE} p0 = Softmax<axis = -1>(x)
            flat_scores = Concat<axis = 0>(b, tall, n) p = Reshape<allowzero = 1>(p0, flat_scores) y = MatMul(p, v)""",
        ),
        "a shape that is not understood",
    ),
    "the output keeps rows of heads": (
        Form(
            f"float[B, T, 24] q, {KEYS}, bool[B, T, 1, S] m", f"{TOKENS} {LOW} {PRODUCT} {WHERE} {SOFTMAX} y = Relu(o)"
        ),
        "the output's shape is not understood",
    ),
}

test_fused_and_right = checks_of(RIGHT)
test_left_with_a_reason = checks_of({name: dataclasses.replace(form, reason=why) for name, (form, why) in LEFT.items()})
