# SPDX-License-Identifier: Apache-2.0
"""What tf2onnx makes of Keras Hub's decoders and encoders (Gemma, GPT-OSS, ALBERT): tokens and their padding mask have
names of their own for equal sizes, and what is computed of one meets the other."""

from __future__ import annotations

import faexport
from faexport.understand.index.interpreter import MAX_DEPTH

from tests.export.form_text import PRODUCT, QKV, Form, checks_of

LOW = "low = Constant<value = float {-3.4e38}>()"
END = "p = Softmax<axis = -1>(x) y = MatMul(p, v)"
SIZES = "rows = Shape<start = 2, end = 3>(q) keys = Shape<start = 2, end = 3>(k)"
# j <= i as int32 [T, S], with `count` for the number of rows.
CAUSAL = f"""{SIZES} zero = Constant<value_int = 0>() one = Constant<value_int = 1>()
    behind = Constant<value_ints = [1]>() last = Squeeze(count) width = Squeeze(keys) line = Range(zero, last, one)
    i = Unsqueeze(line, behind) j = Range(zero, width, one) seen = LessOrEqual(j, i) causal = Cast<to = 6>(seen)"""
DEPTH = MAX_DEPTH - 3  # nodes one behind the other, as of the hidden states of a deep layer
DEEP = "h0 = Neg(q) " + " ".join(f"h{k + 1} = Neg(h{k})" for k in range(DEPTH))
# Sinks with the sizes of the scores, joined to them as a last column that is cut off behind the softmax.
EXPANDED_SINKS = f"""{PRODUCT} z = Add(s, m) size = Shape(z) zero = Constant<value_ints = [0]>()
    one = Constant<value_ints = [1]>() two = Constant<value_ints = [2]>() three = Constant<value_ints = [3]>()
    b = Slice(size, zero, one) t = Slice(size, two, three) to = Concat<axis = 0>(b, three, t, one)
    sink = Expand(sinks, to) x = Concat<axis = 3>(z, sink) p4 = Softmax<axis = -1>(x)
    n = Shape<start = 2, end = 3>(k) p = Slice(p4, zero, n, three) y = MatMul(p, v)"""
# The product with the values, of batches that have names of their own: the larger one is the result's.
LARGER_BATCH = """p = Softmax<axis = -1>(x) pb = Shape<start = 0, end = 1>(p) vb = Shape<start = 0, end = 1>(v)
    rows = Shape<start = 2, end = 3>(p) keys = Shape<start = 3>(p) to3 = Concat<axis = 0>(pb, rows, keys)
    p3 = Reshape(p, to3) at = Constant<value_ints = [1]>() v3 = Squeeze(v, at) y3 = MatMul(p3, v3) most = Max(pb, vb)
    eight = Constant<value_ints = [8]>() to4 = Concat<axis = 0>(most, at, rows, eight) y = Reshape(y3, to4)"""
ONE_HEAD = "float[B, 1, T, 8] q, float[B, 1, S, 8] k, float[B, 1, S, 8] v, bool[M, 1, 1, S] m"

TF_SLICE = "a mask cut by the sizes of tf.slice, of which -1 would be all that is left"


def chosen(moved: str = "t = Sub(s, big)", hide: str = "n", sizes: str = "B, 1, 1, S", **more: object) -> Form:
    """Keras' Attention layer: scores, or what `moved` makes of them, chosen by multiplication with 1 and 0."""
    return Form(
        f"{QKV}, bool[{sizes}] m",
        f"""{PRODUCT} big = Constant<value = float {{1.0e9}}>() {LOW} n = Not(m) keep = Cast<to = 1>(m)
        hide = Cast<to = 1>({hide}) {moved} a = Mul(hide, t) b = Mul(s, keep) x = Add(a, b) {END}""",
        **more,
    )


RIGHT = {
    "scores, or scores less a number": chosen(),
    "scores, or scores and a number": chosen("weak = Constant<value = float {-1.0e5}>() t = Add(weak, s)"),
    "scores, or scores less a number, by a mask of its own batch and keys": chosen(sizes="M, 1, 1, N"),
    "scores, or scores less a number, by a mask of rows and keys": chosen(sizes="1, 1, T, S"),
    TF_SLICE: Form(
        QKV,
        f"""{PRODUCT} {SIZES} none = Constant<value = float {{0.0}}>() size = Concat<axis = 0>(rows, keys)
        b = Expand(none, size) small = Cast<to = 6>(size) rest = Constant<value = int32[1] {{-1}}>()
        all = Equal(rest, small) each = Cast<to = 6>(all) most = Constant<value = int32[1] {{2147483647}}>()
        more = Mul(most, each) ends = Add(small, more) starts = Constant<value = int32[2] {{0, 0}}>()
        cut = Slice(b, starts, ends) x = Add(s, cut) {END}""",
    ),
    "causal and padded, as the smaller of two integers that is more than 0": Form(
        f"{QKV}, int32[B, 1, 1, S] m",
        f"""{PRODUCT} {CAUSAL.replace("count", "rows")} {LOW} both = Min(m, causal) f = Cast<to = 1>(both)
        none = Constant<value = float {{0.0}}>() kept = Greater(f, none) x = Where(kept, s, low) {END}""",
        facts=frozenset({"causal", "padding mask [B, 1, 1, S_kv]"}),
    ),
    "causal by the size of what is computed behind many nodes": Form(
        QKV,
        f"""{PRODUCT} {DEEP} count = Shape<start = 2, end = 3>(h{DEPTH}) {CAUSAL} {LOW}
        x = Where(seen, s, low) {END}""",
        facts=frozenset({"causal"}),
    ),
    "sinks expanded to scores that take the batch of a mask": Form(
        f"{QKV}, float[M, 1, 1, S] m, float[1, 3, 1, 1] sinks",
        EXPANDED_SINKS,
        facts=frozenset({"attention sinks"}),
    ),
    "a mask's own batch behind axes of size 1": Form(
        f"{QKV}, float[M, 1, 1, 1, S] m",
        f"""{PRODUCT} at = Constant<value_ints = [2]>() wide = Unsqueeze(s, at) z = Add(wide, m) x = Squeeze(z, at)
        {END}""",
    ),
    "a bias's own rows behind axes of size 1 that are turned around": Form(
        f"{QKV}, float[R, 1, 1, S, 3] m",
        f"""{PRODUCT} at = Constant<value_ints = [0]>() wide = Unsqueeze(s, at)
        turned = Transpose<perm = [3, 0, 1, 4, 2]>(wide) z = Add(turned, m) back = Transpose<perm = [1, 2, 4, 0, 3]>(z)
        x = Squeeze(back, at) {END}""",
    ),
    "one head, and the larger of two batches": Form(ONE_HEAD, f"{PRODUCT} {LOW} x = Where(m, s, low) {LARGER_BATCH}"),
    "a mask beside keys whose size two names stand for": Form(
        """float[B, 3, T, 8] q, float[B, 3, S, 8] k1, float[B, 3, R, 8] k2, float[B, 3, S, 8] v1, float[B, 3, R, 8] v2,
        bool[B, 1, 1, M] m""",
        f"""k = Add(k1, k2) v = Add(v1, v2) {PRODUCT} size = Shape(s) true = Constant<value = bool {{1}}>()
        all = Expand(true, size) kept = And(all, m) {LOW} x = Where(kept, s, low) {END}""",
        facts=frozenset({"padding mask [B, 1, 1, S_kv]"}),
    ),
}

WRONG = {
    "more axes from what is added, of which one is taken away": Form(
        f"{QKV}, float[T, 1, 1, 1, S] m",
        f"""{PRODUCT} z = Add(s, m) at = Constant<value_ints = [4]>() x = Squeeze(z, at) {END}""",
        reason="gives the scores more rows, heads or batch entries",
    ),
    "a mask of sizes of its own, cut off with the sink": Form(
        f"{QKV}, float[M, 1, 1, N] m, float[1, 3, 1, 1] sinks",
        EXPANDED_SINKS,
        reason="is not simply dropped after the softmax",
    ),
    "more axes from what is added, turned around behind it": Form(
        f"{QKV}, float[T, 1, 1, 1, S] m",
        f"""{PRODUCT} z = Add(s, m) back = Transpose<perm = [1, 2, 4, 0, 3]>(z) at = Constant<value_ints = [4]>()
        x = Squeeze(back, at) {END}""",
        reason="gives the scores more rows, heads or batch entries",
    ),
    "scores, or scores less a number that may leave their type": chosen(
        "huge = Constant<value = float {3.0e38}>() t = Sub(s, huge)", reason="used twice"
    ),
    "scores and scores less a number, by the same": chosen(hide="m", reason="used twice"),
    "scores, or a number less them": chosen("t = Sub(big, s)", reason="used twice"),
    "scores, or another product of them": chosen("t = Mul(s, big)", reason="used twice"),
    "a bias that would give the scores a larger axis of size 1": Form(
        f"{QKV}, float[M, 1, 1, 1, S] m",
        f"""{PRODUCT} at = Constant<value_ints = [0]>() wide = Unsqueeze(s, at) x = Add(wide, m)
        p5 = Softmax<axis = -1>(x) p = Squeeze(p5, at) y = MatMul(p, v)""",
        reason="its mask may have more entries than the scores",
    ),
}

test_fused_and_right = checks_of(RIGHT)
test_near_misses = checks_of(WRONG)


def test_what_is_cut_by_known_sizes_copies_nothing() -> None:
    _, report = faexport.fuse(RIGHT[TF_SLICE].model())
    assert report.num_fused == 1 and not report.sites[0].facts  # it is 0 everywhere
