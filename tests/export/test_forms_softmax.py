# SPDX-License-Identifier: Apache-2.0
"""Softmaxes: those of opset 7 to 12, which normalise over all axes behind theirs, and those written out, which divide
before or after the product with the values; weights that two products read; and a row in the report for each."""

from __future__ import annotations

import faexport
import pytest

from tests.export.form_text import PRODUCT, QKV, Form, checks_of

LAST = "last = Constant<value = int64[1] {-1}>()"
TWO = f"{QKV}, float[B, 3, S, 5] u"
MIXER = "w = Constant<value = float[3, 3] {1, 2, 3, 4, 5, 6, 7, 8, 9}>()"
MIXED = "heads or batch entries are mixed after the softmax"
PAIRS = "the scores are a product of what has rows and keys already"
# The maximum and the sum as JAX writes them: the axis is put back by a Reshape, behind which stands an Expand.
EXPANDED = """m0 = ReduceMax<axes = [-1], keepdims = 0>(s) tall = Shape<start = 0, end = 3>(s)
    one = Constant<value_ints = [1]>() target = Concat<axis = 0>(tall, one) m1 = Reshape<allowzero = 1>(m0, target)
    m = Expand(m1, target) d = Sub(s, m) e = Exp(d)"""
AT_ONCE = """t0 = ReduceSum<keepdims = 0>(e, last) t1 = Reshape<allowzero = 1>(t0, target) t = Expand(t1, target)
    o = MatMul(e, v) y = Div(o, t)"""


def over_heads(source: str, target: str) -> str:
    """A layer over the heads, as nn.Linear is exported."""
    return f"""{MIXER} turned = Transpose<perm = [0, 2, 3, 1]>({source}) mixed = MatMul(turned, w)
    {target} = Transpose<perm = [0, 3, 1, 2]>(mixed)"""


def old(axis: str, q: str = "B, 3, T, 8", opset: int = 11, **more: object) -> Form:
    """A Softmax of an old opset; `axis` is its attribute, or nothing."""
    inputs = f"float[{q}] q, float[B, 3, S, 8] k, float[B, 3, S, 8] v"
    return Form(inputs, f"{PRODUCT} p = Softmax{axis}(s) y = MatMul(p, v)", opset=opset, **more)


def late(body: str, **more: object) -> Form:
    """exp(s) @ v and the sum of exp(s), which `body` makes y of."""
    return Form(QKV, f"{PRODUCT} {LAST} {body}", gone=frozenset({"Exp", "Div"}), **more)


def in_front(rows: str, **more: object) -> Form:
    """A bmm whose weights get an axis of size 1 in front, as its result then has."""
    return Form(
        f"float[N, {rows}, 8] q, float[N, {rows}, 8] k, float[N, {rows}, 8] v",
        """kt = Transpose<perm = [0, 2, 1]>(k) s = MatMul(q, kt) p = Softmax<axis = -1>(s)
        front = Constant<value_ints = [0]>() w = Unsqueeze(p, front) y = MatMul(w, v)""",
        **more,
    )


RIGHT = {
    "three products, the last with what the first gives": Form(
        "float[B, 3, S, 8] q, float[B, 3, S, 8] k, float[B, 3, S, 8] v",
        f"""{PRODUCT} p = Softmax<axis = -1>(s) a = MatMul(p, v) b = MatMul(p, k) c = MatMul(p, a) d = Add(a, b)
        y = Add(c, d)""",
        fused=3,
    ),
    "weights of a bmm that get an axis in front": in_front("9"),
    "opset 11, the last axis": old("<axis = 3>"),
    "opset 11, counted from the end": old("<axis = -1>"),
    "opset 11, one row": old("<axis = 2>", q="B, 3, 1, 8"),
    "opset 7": old("<axis = 3>", opset=7),
    "opset 8": old("<axis = 3>", opset=8),
    "opset 9": old("<axis = 3>", opset=9),
    "opset 10": old("<axis = 3>", opset=10),
    "opset 12": old("<axis = 3>", opset=12),
    "opset 11, a bmm of one row": Form(
        "float[N, 1, 8] q, float[N, S, 8] k, float[N, S, 8] v",
        "kt = Transpose<perm = [0, 2, 1]>(k) s = MatMul(q, kt) p = Softmax(s) y = MatMul(p, v)",
        opset=11,
    ),
    "opset 11, rank 2": Form(
        "float[T, 8] q, float[S, 8] k, float[S, 8] v",
        "kt = Transpose(k) s = MatMul(q, kt) p = Softmax(s) y = MatMul(p, v)",
        opset=11,
    ),
    "divided after the product": late("e = Exp(s) t = ReduceSum<keepdims = 1>(e, last) o = MatMul(e, v) y = Div(o, t)"),
    "divided after the product, x - max": late(
        """m = ReduceMax<axes = [-1]>(s) d = Sub(s, m) e = Exp(d) t = ReduceSum<keepdims = 1>(e, last)
        o = MatMul(e, v) y = Div(o, t)"""
    ),
    "divided after the product, expanded to what they are": late(f"{EXPANDED} {AT_ONCE}"),
    "divided after the product, the axis put back": late(
        """e = Exp(s) t0 = ReduceSum<keepdims = 0>(e, last) t = Unsqueeze(t0, last) o = MatMul(e, v)
        y = Div(o, t)"""
    ),
    "multiplied by 1 / sum after the product": late(
        "e = Exp(s) t = ReduceSum(e, last) r = Reciprocal(t) o = MatMul(e, v) y = Mul(o, r)"
    ),
    "multiplied by 1 / sum on the left": late(
        "e = Exp(s) t = ReduceSum(e, last) r = Reciprocal(t) o = MatMul(e, v) y = Mul(r, o)"
    ),
    "multiplied by a quotient": late(
        """one = Constant<value = float {1.0}>() e = Exp(s) t = ReduceSum(e, last) r = Div(one, t)
        o = MatMul(e, v) y = Mul(o, r)"""
    ),
    "1 / sum by a quotient in front of the product": late(
        """one = Constant<value = float {1.0}>() e = Exp(s) t = ReduceSum(e, last) r = Div(one, t)
        p = Mul(e, r) y = MatMul(p, v)"""
    ),
    "ReduceL1 of the exponentials": late("e = Exp(s) t = ReduceL1<axes = [-1]>(e) p = Div(e, t) y = MatMul(p, v)"),
    "exp(x - log(sum(exp(x))))": late(
        "e = Exp(s) t = ReduceSum(e, last) l = Log(t) d = Sub(s, l) p = Exp(d) y = MatMul(p, v)"
    ),
    "exp(x - ReduceLogSum(exp(x)))": late(
        "e = Exp(s) l = ReduceLogSum<axes = [-1]>(e) d = Sub(s, l) p = Exp(d) y = MatMul(p, v)"
    ),
    "the sum with what is rounded away": late(
        """m = ReduceMax<axes = [-1]>(s) d = Sub(s, m) e = Exp(d) t0 = ReduceSum(e, last)
        c = Constant<value = float {1.0e-9}>() t1 = Add(t0, c) t = Clip(t1, c) p = Div(e, t) y = MatMul(p, v)"""
    ),
    "an Einsum that is divided late": Form(
        "float[B, T, 3, 8] q, float[B, S, 3, 8] k, float[B, S, 3, 8] v",
        f"""{LAST} s = Einsum<equation = "bthd,bshd->bhts">(q, k) e = Exp(s) t = ReduceSum(e, last)
        o = Einsum<equation = "bhts,bshd->bthd">(e, v) tt = Transpose<perm = [0, 2, 1, 3]>(t) y = Div(o, tt)""",
        gone=frozenset({"Exp", "Div", "Einsum"}),
        empty=False,
    ),
    "two products, one of them transposed": Form(
        f"{QKV}, float[B, 3, 5, S] u",
        f"""{PRODUCT} p = Softmax<axis = -1>(s) a = MatMul(p, v) pt = Transpose<perm = [0, 1, 3, 2]>(p)
        bt = MatMul(u, pt) b = Transpose<perm = [0, 1, 3, 2]>(bt) y = Concat<axis = -1>(a, b)""",
        fused=2,
    ),
    "two products": Form(
        TWO,
        f"{PRODUCT} p = Softmax<axis = -1>(s) a = MatMul(p, v) b = MatMul(p, u) y = Concat<axis = -1>(a, b)",
        fused=2,
    ),
    "two products, of one of which the shape alone is read": Form(
        QKV,
        f"""{PRODUCT} p = Softmax<axis = -1>(s) a = MatMul(p, v) b = MatMul(p, v)
        batch = Shape<end = 1>(b) rows = Shape<start = 2, end = 3>(b) width = Constant<value_ints = [24]>()
        to = Concat<axis = 0>(batch, rows, width) t = Transpose<perm = [0, 2, 1, 3]>(a)
        y = Reshape<allowzero = 1>(t, to)""",
        gone=frozenset({"Softmax", "MatMul"}),
    ),
    "two products, one behind a Cast": Form(
        TWO,
        f"""{PRODUCT} p = Softmax<axis = -1>(s) w = Cast<to = 1>(p) a = MatMul(p, v) b = MatMul(w, u)
        y = Concat<axis = -1>(a, b)""",
        fused=2,
    ),
    "three products of the same values": Form(
        QKV,
        f"""{PRODUCT} p = Softmax<axis = -1>(s) n = Neg(v) a = MatMul(p, v) b = MatMul(p, n) c = MatMul(p, v)
        y = Concat<axis = -1>(a, b, c)""",
        fused=3,
    ),
    "two products and a mask": Form(
        f"{TWO}, bool[B, 1, 1, S] m",
        f"""{PRODUCT} low = Constant<value = float {{-3.4e38}}>() x = Where(m, s, low) p = Softmax<axis = -1>(x)
        a = MatMul(p, v) b = MatMul(p, u) y = Concat<axis = -1>(a, b)""",
        fused=2,
        facts=frozenset({"padding mask [B, 1, 1, S_kv]"}),
    ),
    "one product, two softmaxes": Form(
        f"{QKV}, bool[B, 1, T, S] m",
        f"""{PRODUCT} c = Constant<value = float {{0.5}}>() z = Mul(s, c) low = Constant<value = float {{-1e30}}>()
        x = Where(m, z, low) p = Softmax<axis = -1>(x) a = MatMul(p, v) r = Softmax<axis = -1>(z) b = MatMul(r, v)
        y = Add(a, b)""",
        fused=2,
    ),
    "one product, softmaxes over its columns and its rows": Form(
        f"{QKV}, float[B, 3, T, 8] u, bool[B, 1, 1, S] m, bool[B, 1, 1, T] n",
        f"""{PRODUCT} st = Transpose<perm = [0, 1, 3, 2]>(s) low = Constant<value = float {{-1e30}}>()
        x = Where(m, s, low) p = Softmax<axis = -1>(x) a = MatMul(p, v) z = Where(n, st, low)
        r = Softmax<axis = -1>(z) b = MatMul(r, u) c = Concat<axis = 2>(a, b) y = Identity(c)""",
        fused=2,
    ),
}

HEADS = "together (opset"
MAXIMUM_OF_ALL = "m = ReduceMax(s) d = Sub(s, m) e = Exp(d) t = ReduceSum(e, last)"
WRONG = {
    "sums that are cast to float16, which they may leave, divided late": late(
        """e = Exp(s) t = ReduceSum(e, last) h = Cast<to = 10>(t) w = Cast<to = 1>(h) o = MatMul(e, v) y = Div(o, w)""",
        reason="not divided by their sum in a way that is understood",
    ),
    "weights of a bmm that get an axis in front, of any rows": in_front("T", reason="shape is not understood"),
    "a small number in the sum, behind the maximum of all rows": Form(
        QKV,
        f"""{PRODUCT} {LAST} {MAXIMUM_OF_ALL} small = Constant<value = float {{1e-8}}>() n = Add(t, small)
        p = Div(e, n) y = MatMul(p, v)""",
        reason="the sum of the exponentials is changed (Add)",
    ),
    "a sum of at least 1, behind the maximum of all rows": Form(
        QKV,
        f"""{PRODUCT} {LAST} {MAXIMUM_OF_ALL} one = Constant<value = float {{1.0}}>() n = Max(t, one)
        p = Div(e, n) y = MatMul(p, v)""",
        reason="the sum of the exponentials is changed (Max)",
    ),
    "values with an axis of their own, divided late": late(
        """second = Constant<value_ints = [2]>() e = Exp(s) t = ReduceSum(e, last) u = Unsqueeze(v, second)
        o = MatMul(e, u) y = Div(o, t)""",
        reason="not divided by their sum in a way that is understood",
    ),
    "an Einsum that sums over two axes": Form(
        "float[R, T, 3, 8] q, float[R, S, 3, 8] k, float[R, S, 3, 8] v",
        """s = Einsum<equation = "rihd,rjhd->hij">(q, k) p = Softmax<axis = -1>(s)
        y = Einsum<equation = "hij,rjhd->rihd">(p, v)""",
        reason="an Einsum of this form (rihd,rjhd->hij) is no product of queries and keys",
        empty=False,
    ),
    "a maximum that is expanded to the scores' size": Form(
        QKV,
        f"{PRODUCT} {LAST} {EXPANDED.replace('Expand(m1, target)', 'Expand(m1, all)')} {AT_ONCE}".replace(
            "target = Concat", "all = Shape(s) target = Concat"
        ),
        reason="used twice: also by ReduceMax",
    ),
    "opset 11, heads, rows and keys": old("<axis = 1>", reason=HEADS),
    "opset 11, no attribute": old("", reason=HEADS),
    "opset 11, rows and keys": old("<axis = 2>", reason=HEADS),
    "opset 11, everything": old("<axis = 0>", reason=HEADS),
    "opset 13, over heads": old("<axis = 1>", opset=13, reason="does not run over the keys"),
    "opset 13, over rows": old("<axis = 2>", opset=13, reason="does not sum over the softmax's axis"),
    "opset 13, over the batch": old("<axis = 0>", opset=13, reason="does not run over the keys"),
    "a bmm of opset 11 over rows and keys": Form(
        "float[N, T, 8] q, float[N, S, 8] k, float[N, S, 8] v",
        "kt = Transpose<perm = [0, 2, 1]>(k) s = MatMul(q, kt) p = Softmax(s) y = MatMul(p, v)",
        opset=11,
        reason=HEADS,
    ),
    "the sum as an integer": late(
        """e = Exp(s) t = ReduceSum(e, last) i = Cast<to = 7>(t) f = Cast<to = 1>(i) p = Div(e, f)
        y = MatMul(p, v)""",
        reason="not divided by their sum",
    ),
    "exponentials divided by the sum of the rows": late(
        "two = Constant<value = int64[1] {-2}>() e = Exp(s) t = ReduceSum(e, two) p = Div(e, t) y = MatMul(p, v)",
        reason="",
        fused=0,
    ),
    "divided by the sum of other exponentials": late(
        "e = Exp(s) n = Neg(s) f = Exp(n) t = ReduceSum(f, last) o = MatMul(e, v) y = Div(o, t)",
        fused=0,
    ),
    "two products, and a mean of the weights": Form(
        TWO,
        f"""{PRODUCT} p = Softmax<axis = -1>(s) a = MatMul(p, v) b = MatMul(p, u) c = Concat<axis = -1>(a, b)
        m = ReduceMean(p) y = Add(c, m)""",
        reason="used twice: also by ReduceMean",
    ),
    "one product, two softmaxes, one of which is read again": Form(
        QKV,
        f"""{PRODUCT} p = Softmax<axis = -1>(s) a = MatMul(p, v) n = Neg(s) x = Softmax<axis = -1>(n) b = MatMul(x, v)
        m = ReduceMean(n) c = Add(a, b) y = Add(c, m)""",
        reason="used twice",
    ),
    "a mask of the scores themselves": Form(
        QKV,
        f"""{PRODUCT} zero = Constant<value = float {{0.0}}>() low = Constant<value = float {{-1e30}}>()
        above = Greater(s, zero) x = Where(above, s, low) p = Softmax<axis = -1>(x) y = MatMul(p, v)""",
        reason="used twice: also by Greater",
    ),
    "a sum of exponentials that is read again": Form(
        QKV,
        f"""{PRODUCT} l = ReduceLogSumExp<axes = [-1], keepdims = 1>(s) d = Sub(s, l) p = Exp(d) o = MatMul(p, v)
        y = Add(o, l)""",
        reason="what the softmax's ReduceLogSumExp gives is used twice: also by Add",
    ),
    "two products, one over the rows": Form(
        "float[B, 3, T, 8] q, float[B, 3, T, 8] k, float[B, 3, T, 8] v",
        f"""{PRODUCT} p = Softmax<axis = -1>(s) a = MatMul(p, v) pt = Transpose<perm = [0, 1, 3, 2]>(p)
        b = MatMul(pt, v) y = Add(a, b)""",
        reason="does not sum over the softmax's axis",
    ),
    "heads mixed after the softmax": Form(
        QKV, f"{PRODUCT} p = Softmax<axis = -1>(s) {over_heads('p', 'u')} y = MatMul(u, v)", reason=MIXED
    ),
    "heads mixed after the softmax by Einsum": Form(
        f"{QKV}, float[3, 3] w",
        f"""{PRODUCT} p = Softmax<axis = -1>(s) u = Einsum<equation = "bhts,hg->bgts">(p, w) y = MatMul(u, v)""",
        reason=MIXED,
    ),
    "batch entries mixed after the softmax": Form(
        QKV.replace("B", "4") + ", float[4, 4] w",
        f"""{PRODUCT} p = Softmax<axis = -1>(s) u = Einsum<equation = "bhts,bc->chts">(p, w) y = MatMul(u, v)""",
        reason=MIXED,
    ),
    "heads mixed before the softmax": Form(
        QKV, f"{PRODUCT} {over_heads('s', 'x')} p = Softmax<axis = -1>(x) y = MatMul(p, v)", reason=PAIRS
    ),
    "heads mixed before and after the softmax": Form(
        QKV,
        f"""{PRODUCT} {over_heads("s", "x")} p = Softmax<axis = -1>(x) pt = Transpose<perm = [0, 2, 3, 1]>(p)
        pw = MatMul(pt, w) u = Transpose<perm = [0, 3, 1, 2]>(pw) y = MatMul(u, v)""",
        reason=PAIRS,
    ),
    "heads mixed before the softmax by Einsum": Form(
        QKV,
        f"""{MIXER} {PRODUCT} x = Einsum<equation = "hg,bhts->bgts">(w, s) p = Softmax<axis = -1>(x)
        y = MatMul(p, v)""",
        reason=PAIRS,
    ),
    "heads mixed after the softmax by a convolution": Form(
        f"{QKV}, float[3, 3, 1, 1] w",
        f"{PRODUCT} p = Softmax<axis = -1>(s) u = Conv<kernel_shape = [1, 1]>(p, w) y = MatMul(u, v)",
        reason="pass through Conv after the softmax",
    ),
    "additive attention": Form(
        "float[B, T, 1, 8] q, float[B, 1, S, 8] k, float[8, 3] w, float[B, 3, S, 8] v",
        """a = Add(q, k) t = Tanh(a) m = MatMul(t, w) x = Transpose<perm = [0, 3, 1, 2]>(m)
        p = Softmax<axis = -1>(x) y = MatMul(p, v)""",
        reason=PAIRS,
    ),
    "over the rows": Form(
        "float[B, 3, T, 8] q, float[B, 3, T, 8] k, float[B, 3, T, 8] v",
        f"""{PRODUCT} p = Softmax<axis = -1>(s) pt = Transpose<perm = [0, 1, 3, 2]>(p) y = MatMul(pt, v)""",
        reason="does not sum over the softmax's axis, but over the rows",
    ),
    "exponentials above 1 that are cut, divided late": late(
        """one = Constant<value = float {1.0}>() e = Exp(s) t = ReduceSum(e, last) above = Greater(e, one)
        w = Where(above, one, e) o = MatMul(w, v) y = Div(o, t)""",
        reason="used twice",
    ),
    "weights above 1 that are cut": Form(
        QKV,
        f"""{PRODUCT} p = Softmax<axis = -1>(s) c = Constant<value = float {{3.0}}>() w = Mul(p, c)
        one = Constant<value = float {{1.0}}>() above = Greater(w, one) u = Where(above, one, w) y = MatMul(u, v)""",
        reason="used twice",
    ),
    "sigmoid instead of exp": Form(
        QKV, f"{PRODUCT} {LAST} e = Sigmoid(s) t = ReduceSum(e, last) p = Div(e, t) y = MatMul(p, v)", fused=0
    ),
}

test_fused_and_right = checks_of(RIGHT)
test_near_misses = checks_of({name: form for name, form in WRONG.items() if form.reason})


@pytest.mark.parametrize("name", [name for name, form in WRONG.items() if not form.reason])
def test_what_is_no_softmax(name: str) -> None:
    _, report = faexport.fuse(WRONG[name].model())
    assert report.num_fused == 0
