# SPDX-License-Identifier: Apache-2.0
"""Masks and factors with sizes of their own names: each such size is that of the scores, or one of both is 1, whatever
the file says of the result. And what may be in front of scores beside masks: constants in any attribute, integers of
narrow types, scores that are subtracted."""

from __future__ import annotations

from dataclasses import replace

import faexport
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from faexport.feeds import inputs, settings
from faexport.spec import RefusalKind

from tests.export.form_text import PRODUCT, QKV, Form, check, replaced

END = "p = Softmax<axis = -1>(x) y = MatMul(p, v)"
LOW = "low = Constant<value_float = -1.0e9>()"
RESULT = ("B", 3, "T", 8)
COPIED = "operands are copied to the size of 'm', which has names of its own: equal, or one of both is 1"


def masked(kind: str, **more: object) -> Form:
    """The plain block with a mask or bias of this type and shape."""
    body = f"{LOW} x = Where(m, s, low)" if kind.startswith("bool") else "x = Add(s, m)"
    return Form(f"{QKV}, {kind} m", f"{PRODUCT} {body} {END}", **more)


def scaled(kind: str, **more: object) -> Form:
    return Form(f"{QKV}, {kind} g", f"{PRODUCT} x = Mul(s, g) {END}", **more)


def cast(kind: str, body: str) -> Form:
    """The plain block with a padding mask that is made of integers `m` as `keep`."""
    return Form(f"{QKV}, {kind}[B, 1, 1, S] m", f"{PRODUCT} {LOW} {body} x = Where(keep, s, low) {END}")


MADE_OF_A_MASK = """one = Constant<value_float = 1.0>() f = Cast<to = 1>(m) away = Sub(one, f) lows = Mul(away, low)
kept = Mul(s, f) x = Add(kept, lows)"""


def behind_a_buffer(triangle: int) -> Form:
    """GPT-Neo's layers, as PyTorch's exporter writes them: new rows behind a cache, a mask cut from a triangle
    and one of the whole sizes, and the second layer's queries as many as rows were cut, by minima and maxima."""
    layer = """rows{0} = Sub(C{0}, R{0}) more{0} = Max(zero, rows{0})
        from{0} = Reshape(p, any) to{0} = Reshape(whole{0}, any)
        high{0} = Slice(triangle, from{0}, to{0}, two) mask{0} = Slice(high{0}, none, to{0}, three)
        kt{0} = Transpose<perm = [0, 1, 3, 2]>(k{0}) s{0} = MatMul(q{0}, kt{0}) x{0} = Where(mask{0}, s{0}, low)
        a{0} = Add(x{0}, later) w{0} = Softmax<axis = -1>(a{0}) o{0} = MatMul(w{0}, k{0})"""
    cut = "whole{0} = Add(p, {1}) C{0} = Min(limit, whole{0}) R{0} = Min(limit, p)"
    return Form(
        "float[B, 3, T, 8] q1, float[B, 3, P, 8] past",
        f"""{LOW} zero = Constant<value_int = 0>() one = Constant<value_int = 1>() none = Constant<value_ints = [0]>()
        any = Constant<value_ints = [-1]>() last = Constant<value_ints = [1]>() two = Constant<value_ints = [2]>()
        three = Constant<value_ints = [3]>() limit = Constant<value_int = {triangle}>()
        sides = Constant<value_ints = [1, 1, {triangle}, {triangle}]>()
        ones = ConstantOfShape<value = int64[1] {{1}}>(sides) lower = Trilu<upper = 0>(ones)
        triangle = Cast<to = 9>(lower)
        t1 = Shape<start = 2, end = 3>(q1) p1 = Shape<start = 2, end = 3>(past) t = Squeeze(t1) p = Squeeze(p1)
        all = Add(p, t) keys = Range(zero, all, one) rows = Range(p, all, one) column = Unsqueeze(rows, last)
        seen = LessOrEqual(keys, column) nil = Constant<value_float = 0.0>() later = Where(seen, nil, low)
        k1 = Concat<axis = 2>(past, q1) {cut.format(1, "t")} {layer.format(1)}
        b = Shape<start = 0, end = 1>(past) heads = Constant<value_ints = [3]>() size = Constant<value_ints = [8]>()
        again = Reshape(more1, any) shape = Concat<axis = 0>(b, heads, again, size) q2 = Reshape(o1, shape)
        k2 = Concat<axis = 2>(past, q2) {cut.format(2, "more1")} {layer.format(2)} y = Identity(o2)""",
        facts=frozenset({"causal from position P"}),
        fused=2,
    )


def reshaped(opset: int, softmax_axis: int = -1) -> Form:
    """An output that is reshaped as it lies, heads in front of rows: onnxruntime must not leave that size open."""
    return Form(
        "float[B, T, 24] x, float[24, 24] w",
        f"""all = Shape(x) one_b = Constant<value = int64[1] {{0}}>() one_t = Constant<value = int64[1] {{1}}>()
        b = Gather(all, one_b) t = Gather(all, one_t) h = Constant<value = int64[1] {{3}}>()
        d = Constant<value = int64[1] {{8}}>() x3 = MatMul(x, w) apart = Concat<axis = 0>(b, t, h, d)
        x4 = Reshape(x3, apart) q = Transpose<perm = [0, 2, 1, 3]>(x4) kt = Transpose<perm = [0, 2, 3, 1]>(x4)
        s = MatMul(q, kt) p = Softmax<axis = {softmax_axis}>(s) o = MatMul(p, q)
        whole = Concat<axis = 0>(b, t, h, d) y = Reshape(o, whole)""",
        opset=opset,
        empty=opset > 8,  # that takes operators of opset 9
    )


def shifted_windows(condition: str) -> Form:
    """Swin's windows of shifted rows, as transformers' exporter writes them: how many there are is a quotient rounded
    down, Div less `condition`, and so is the size of their mask."""
    return Form(
        "float[B, N, 24] x",
        f"""zero = Constant<value_int = 0>() one = Constant<value_int = 1>() width = Constant<value_int = 3>()
        any = Constant<value_ints = [-1]>() first = Constant<value_ints = [0]>() ones = Constant<value_ints = [1]>()
        size = Constant<value_ints = [3]>() d = Constant<value_ints = [8]>() two = Constant<value_int = 2>()
        whole = Shape(x) n = Gather(whole, one) b = Shape<start = 0, end = 1>(x)
        sign = Sign(n) same = Equal(sign, one) differs = Not(same) m = Mod(n, width) some = Cast<to = 9>(m)
        c = {condition} div = Div(n, width) less = Cast<to = 7>(c) windows = Sub(div, less)
        w = Reshape(windows, any) apart = Concat<axis = 0>(b, w, size, size, d) x5 = Reshape(x, apart)
        merged = Constant<value_ints = [-1, 3, 3, 8]>() x4 = Reshape(x5, merged)
        q = Transpose<perm = [0, 2, 1, 3]>(x4) kt = Transpose<perm = [0, 2, 3, 1]>(x4) s = MatMul(q, kt)
        rows = Mul(windows, width) at = Range(zero, rows, one) from = Sub(rows, two) late = GreaterOrEqual(at, from)
        region = Cast<to = 1>(late) by = Concat<axis = 0>(w, size) regions = Reshape(region, by)
        seconds = Constant<value_ints = [2]>() i = Unsqueeze(regions, seconds) j = Unsqueeze(regions, ones)
        gap = Sub(i, j) none = Constant<value_float = 0.0>() low = Constant<value_float = -100.0>()
        alike = Equal(gap, none) mask = Where(alike, none, low) outer = Constant<value_ints = [0, 2]>()
        m5 = Unsqueeze(mask, outer) copies = Concat<axis = 0>(b, ones, ones, ones, ones) all = Expand(m5, copies)
        each = Constant<value_ints = [-1, 1, 3, 3]>() m4 = Reshape(all, each) sum = Add(s, m4)
        p = Softmax<axis = -1>(sum) y = MatMul(p, q)""",
        opset=20,
    )


def five_axes(opset: int, body: str = "x = Add(s, bias)", sizes: tuple[str, str, str] = ("T", "S", "S")) -> Form:
    """Two axes of batch entries in front of the heads, each of which may be without elements."""
    operands = ", ".join(f"float[A, B, 3, {rows}, 8] {name}" for rows, name in zip(sizes, "qkv", strict=True))
    return Form(
        f"{operands}, float[A, B, 3, T, S] bias",
        f"""kt = Transpose<perm = [0, 1, 2, 4, 3]>(k) s = MatMul(q, kt) {body} p = Softmax<axis = 4>(x)
        y = MatMul(p, v)""",
        opset=opset,
    )


# Where the rows of a table begin of which there are as many as queries, counted from its end.
LAST_ROWS = """rows = Shape<start = 2, end = 3>(q) from = Neg(rows)
end = Constant<value = int64[1] {9223372036854775807}>()
first = Constant<value = int64[1] {0}>() one = Constant<value = int64[1] {1}>()"""

RIGHT = {
    "layers behind a buffer that is longer than any input": behind_a_buffer(20),
    "layers behind a buffer that cuts inputs off": behind_a_buffer(7),
    "five axes": five_axes(14),
    "five axes, before Reshape had allowzero": five_axes(13),
    "five axes in opset 11": five_axes(11),
    "five axes in opset 11, without a bias": five_axes(11, "x = Identity(s)"),
    "five axes in opset 11, and rows and keys of several names": five_axes(11, sizes=("Q", "K", "K")),
    "columns of an image, in front of the heads": Form(
        ", ".join(f"float[B, {rows}, W, 3, 8] {name}" for rows, name in zip("TSS", "qkv", strict=True)),
        """s = Einsum<equation = "bhwnd,bgwnd->bnwhg">(q, k) p = Softmax<axis = -1>(s)
        y = Einsum<equation = "bnwhg,bgwnd->bhwnd">(p, v)""",
        gone=frozenset({"Softmax", "Einsum"}),
        empty=False,
    ),
    "reshaped as it lies": reshaped(17),
    "reshaped as it lies, before Reshape had allowzero": reshaped(13),
    "reshaped as it lies, before there was Where": reshaped(8, softmax_axis=3),
    "a mask's own batch": masked("bool[M, 1, 1, S]", output=RESULT),
    "a mask's own batch, and any result": masked("bool[M, 1, 1, S]", facts=frozenset({COPIED})),
    "a mask's own batch, and a result of another name": masked("bool[M, 1, 1, S]", output=("R", 3, "T", 8)),
    "a mask's own everything": masked("bool[M, 1, N, O]", output=RESULT),
    "a bias's own everything": masked("float[M, 3, N, O]", output=RESULT),
    "a mask of four batch entries": masked("bool[4, 1, 1, S]"),
    "a mask of four rows": masked("float[4, S]"),
    "a factor's own batch, and any result": scaled("float[M, 1, 1, 1]"),
    "a mask's own batch and keys": masked("bool[M, 1, 1, N]", output=RESULT),
    "a mask's own rows": masked("bool[1, 1, M, S]", output=RESULT),
    "a mask's own rows and keys": masked("bool[M, N]", output=RESULT),
    "a mask's own heads": masked("bool[B, M, 1, S]", output=RESULT),
    "a bias's own batch": masked("float[M, 1, T, S]", output=RESULT),
    "a bias's own rows": masked("float[1, 3, M, S]", output=RESULT),
    "a factor's own batch": scaled("float[M, 1, 1, 1]", output=RESULT),
    "a factor's own rows": scaled("float[1, 1, M, 1]", output=RESULT),
    "a factor's own heads": scaled("float[1, M, 1, 1]", output=RESULT),
    "lengths of their own number": Form(
        f"{QKV}, int64[M] lengths",
        f"""{PRODUCT} {LOW} n = Shape<start = 2, end = 3>(k) count = Squeeze(n) zero = Constant<value_int = 0>()
        step = Constant<value_int = 1>() at = Range(zero, count, step) to = Constant<value_ints = [-1, 1, 1, 1]>()
        own = Reshape(lengths, to) keep = Less(at, own) x = Where(keep, s, low) {END}""",
        facts=frozenset({"key lengths"}),
        output=RESULT,
    ),
    "a mask by multiplication and addition": Form(
        f"{QKV}, bool[B, 1, 1, S] m",
        f"{PRODUCT} {LOW} {MADE_OF_A_MASK} {END}",
        facts=frozenset({"padding mask [B, 1, 1, S_kv]"}),
    ),
    "scores subtracted from a bias": Form(f"{QKV}, float[B, 3, T, S] b", f"{PRODUCT} x = Sub(b, s) {END}"),
    "scores subtracted from a number of the caller's": Form(f"{QKV}, float c", f"{PRODUCT} x = Sub(c, s) {END}"),
    "scores subtracted from 0": Form(QKV, f"{PRODUCT} zero = Constant<value_float = 0.0>() x = Sub(zero, s) {END}"),
    "int32 that wraps around": cast(
        "int32", "c = Constant<value = int32 {65536}>() a = Mul(m, c) b = Mul(a, c) keep = Cast<to = 9>(b)"
    ),
    "int32 at the end of its type": cast(
        "int32",
        "c = Constant<value = int32 {2147483647}>() a = Add(m, c) zero = Constant<value = int32 {0}>() "
        "keep = Greater(a, zero)",
    ),
    "uint8 below 0": cast(
        "uint8",
        "c = Constant<value = uint8 {1}>() a = Sub(m, c) d = Constant<value = uint8 {200}>() keep = Greater(a, d)",
    ),
    "a bias cut to its last rows, which are all": Form(
        f"{QKV.replace('S', 'T')}, float[3, T, T] b",
        f"{LAST_ROWS} {PRODUCT} r = Slice(b, from, end, one) x = Add(s, r) p = Softmax<axis = -1>(x) y = MatMul(p, v)",
        gone=frozenset({"Softmax", "Expand"}),
    ),
    "a bias cut to the rows behind a past": Form(
        f"{QKV.replace('S', 'T')}, float[B, 3, P, 8] pk, float[B, 3, P, 8] pv",
        f"""{LAST_ROWS} kk = Concat<axis = 2>(pk, k) vv = Concat<axis = 2>(pv, v)
        kt = Transpose<perm = [0, 1, 3, 2]>(kk) s = MatMul(q, kt) keys = Shape<start = 2, end = 3>(kk)
        n = Squeeze(keys) zero = Constant<value = int64 {{0}}>()
        step = Constant<value = int64 {{1}}>() j = Range(zero, n, step) i = Unsqueeze(j, one) d = Sub(i, j)
        f = Cast<to = 1>(d) c = Cos(f) r = Slice(c, from, end, first) x = Add(s, r) p = Softmax<axis = -1>(x)
        y = MatMul(p, vv)""",
        gone=frozenset({"Softmax", "Expand"}),
    ),
    "blocks inside of heads": Form(
        "float[B, 3, N, 4, 8] q, float[B, 3, N, 5, 8] k, float[B, 3, N, 5, 8] v",
        f"kt = Transpose<perm = [0, 1, 2, 4, 3]>(k) s = MatMul(q, kt) x = Identity(s) {END}",
    ),
}

# Batch and heads in one axis of both products, apart where a mask is put on, as tf2onnx writes any Einsum.
TOGETHER = """whole = Constant<value = int64[1] {-1}>() tail_q = Shape<start = 2>(q) tail_k = Shape<start = 2>(k)
    to_q = Concat<axis = 0>(whole, tail_q) to_k = Concat<axis = 0>(whole, tail_k)
    q3 = Reshape(q, to_q) k3 = Reshape(k, to_k) v3 = Reshape(v, to_k)
    k3t = Transpose<perm = [0, 2, 1]>(k3) s3 = MatMul(q3, k3t)
    lead_q = Shape<end = 2>(q) lead_k = Shape<end = 2>(k) lead = Max(lead_q, lead_k)
    rows = Shape<start = 2, end = 3>(q) keys = Shape<start = 2, end = 3>(k) apart = Concat<axis = 0>(lead, rows, keys)
    s = Reshape(s3, apart)"""
TOGETHER_END = """p = Softmax<axis = -1>(x) tail_p = Shape<start = 2>(p) to_p = Concat<axis = 0>(whole, tail_p)
    p3 = Reshape(p, to_p) y3 = MatMul(p3, v3) some = Shape<end = 2>(p) all = Max(some, lead_k)
    tail_y = Shape<start = 1>(y3) to_y = Concat<axis = 0>(all, tail_y) y = Reshape(y3, to_y)"""


def together(mask: str, body: str, heads: int = 3, **more: object) -> Form:
    """Three names of a batch: of queries, of keys and values, and of the mask. Without sizes of 0, for which these
    Reshapes copy another size."""
    inputs = f"float[B, {heads}, T, 8] q, float[E, {heads}, S, 8] k, float[E, {heads}, S, 8] v{mask}"
    return Form(inputs, f"{TOGETHER} {LOW} {body} {TOGETHER_END}", empty=False, **more)


# where(m, s, low) in front of the softmax and where(m, p, 0) behind it, as tf2onnx writes them.
CHOSEN = f"""{PRODUCT} {LOW} zero = Constant<value_float = 0.0>() f = Cast<to = 1>(m) off = Not(m) g = Cast<to = 1>(off)
    lows = Mul(low, g) kept = Mul(f, s) x = Add(kept, lows) p0 = Softmax<axis = -1>(x)
    some = Mul(f, p0) none = Mul(zero, g) p = Add(some, none) y = MatMul(p, v)"""
NOTHING = "zero = Constant<value_float = 0.0>() none = Mul(zero, m) x = Add(s, none)"
TURNED = "kt = Transpose<perm = [0, 1, 3, 2]>(q) s0 = MatMul(k, kt) s = Transpose<perm = [0, 1, 3, 2]>(s0)"

RIGHT |= {
    "batch and one head in one axis, and a mask of its own batch": together(
        ", bool[M, 1, 1, S] m", "x = Where(m, s, low)", heads=1
    ),
    "chosen by multiplication": Form(
        f"{QKV}, bool[B, 1, 1, S] m", CHOSEN, facts=frozenset({"padding mask [B, 1, 1, S_kv]"})
    ),
    "chosen by multiplication, with a mask's own batch": Form(f"{QKV}, bool[M, 1, 1, S] m", CHOSEN),
    "scores turned around, and a mask's own batch": Form(
        f"{QKV}, bool[M, 1, 1, S] m", f"{TURNED} {LOW} x = Where(m, s, low) {END}"
    ),
    "scores turned around, and a bias's own rows": Form(f"{QKV}, float[1, 3, M, S] m", f"{TURNED} x = Add(s, m) {END}"),
    "the scores' shape in front of a mask of its own batch": Form(
        f"{QKV}, bool[M, 1, 1, S] m",
        f"""{PRODUCT} {LOW} size = Shape<end = 1>(s) n = Cast<to = 1>(size) x = Where(m, s, low)
        p = Softmax<axis = -1>(x) y0 = MatMul(p, v) y = Mul(y0, n)""",
    ),
    "nothing added, in a batch of its own": Form(f"{QKV}, float[M, 1, 1, S] m", f"{PRODUCT} {NOTHING} {END}"),
    "nothing added, in rows of its own": Form(f"{QKV}, float[M, S] m", f"{PRODUCT} {NOTHING} {END}"),
    "nothing added in front of heads told apart, in a batch of its own": Form(
        "float[B, T, 3, 8] q, float[B, S, 8] k, float[B, S, 8] v, float[M, 1, S] m",
        """t = Shape<start = 1, end = 2>(q) b = Shape<end = 1>(q) whole = Constant<value_ints = [-1]>() h = Constant
        <value_ints = [3]>() d = Constant<value_ints = [8]>() n = Shape<start = 1, end = 2>(k) tall = Mul(t, h)
        flat = Concat<axis = 0>(b, tall, d) q3 = Reshape<allowzero = 1>(q, flat) kt = Transpose<perm = [0, 2, 1]>(k)
        s = MatMul(q3, kt) NOTHING four = Concat<axis = 0>(whole, t, h, n) x4 = Reshape<allowzero = 1>(x, four)
        p4 = Softmax<axis = -1>(x4) back = Concat<axis = 0>(whole, tall, n) p = Reshape<allowzero = 1>(p4, back)
        y = MatMul(p, v)""".replace("NOTHING", NOTHING),
        empty=False,
    ),
    "keys times 0 or 1 of a batch of its own": Form(
        f"{QKV}, bool[M, 1, 1, S] m", f"{PRODUCT} f = Cast<to = 1>(m) x = Mul(f, s) {END}"
    ),
    "batch and heads in one axis": together("", "x = Identity(s)"),
    "batch and heads in one axis of what is computed": replace(
        together("", "x = Identity(s)"),
        body=replaced(
            f"{TOGETHER} x = Identity(s) {TOGETHER_END}",
            ("q3 = Reshape(q, to_q)", "q2 = Reshape(q, to_q) q3 = Relu(q2)"),
            ("k3 = Reshape(k, to_k)", "k2 = Reshape(k, to_k) k3 = Relu(k2)"),
        ),
    ),
    "batch and heads in one axis, and a mask of its own batch": together(
        ", bool[M, 1, 1, S] m", "x = Where(m, s, low)", facts=frozenset({"padding mask [B, 1, 1, S_kv]"})
    ),
    "batch and heads in one axis, and a bias of its own batch": together(", float[M, 1, T, S] m", "x = Add(s, m)"),
    "batch and heads in one axis, and a mask made as large as the scores": together(
        ", bool[M, 1, 1, S] m",
        """size = Shape(s) true = Constant<value = bool {1}>() all_true = Expand(true, size)
        keep = And(all_true, m) x = Where(keep, s, low)""",
    ),
}

# Batch and heads in one axis of the scores' product, and exchanged while a mask meets the scores.
EXCHANGED = f"""b = Shape<end = 1>(q) t = Shape<start = 2, end = 3>(q) n = Shape<start = 2, end = 3>(k)
    three = Constant<value_ints = [3]>() eight = Constant<value_ints = [8]>() all = Mul(b, three)
    flat_q = Concat<axis = 0>(all, t, eight) flat_k = Concat<axis = 0>(all, n, eight)
    apart = Concat<axis = 0>(b, three, t, n)
    q3 = Reshape<allowzero = 1>(q, flat_q) k3 = Reshape<allowzero = 1>(k, flat_k) k3t = Transpose<perm = [0, 2, 1]>(k3)
    s3 = MatMul(q3, k3t) s = Reshape<allowzero = 1>(s3, apart) turned = Transpose<perm = [1, 0, 2, 3]>(s) {LOW}
    masked = Where(m, turned, low) x = Transpose<perm = [1, 0, 2, 3]>(masked) {END}"""
RIGHT |= {
    "batch and heads exchanged under a mask of batch entries": Form(
        f"{QKV}, bool[B, 1, S] m", EXCHANGED, facts=frozenset({"padding mask [B, 1, 1, S_kv]"})
    ),
    "batch and heads exchanged under a mask of heads": Form(f"{QKV}, bool[3, 1, 1, S] m", EXCHANGED),
    "batch and heads exchanged under a mask of both": Form(f"{QKV}, bool[3, B, T, S] m", EXCHANGED),
}

WRONG = {
    "nothing added that may be larger than the weights": Form(
        f"{QKV}, bool[B, 1, 1, S] m, float[M, 1, 1, S] other",
        CHOSEN.replace("none = Mul(zero, g)", "none = Mul(zero, other)"),
        reason="the attention weights pass through Add",
    ),
    "nothing added to the weights behind a Transpose": Form(
        "float[B, 3, T, 8] q, float[B, 3, S, 8] k, float[B, 3, T, 8] v, bool[B, 1, 1, S] m",
        CHOSEN.replace("p = Add(some, none)", "turned = Transpose<perm = [0, 1, 3, 2]>(some) p = Add(turned, none)"),
        reason="the attention weights pass through Add",
    ),
    "0 times what may be infinite added to the weights": Form(
        f"{QKV}, float[B, 1, 1, S] m",
        f"""{PRODUCT} zero = Constant<value_float = 0.0>() p0 = Softmax<axis = -1>(s) none = Mul(zero, m)
        p = Add(p0, none) y = MatMul(p, v)""",
        reason="the attention weights pass through Add",
    ),
    "nothing added, in keys of the values' own": Form(
        "float[B, 3, T, 8] q, float[B, 3, S, 8] k, float[B, 3, M, 8] v, float[M] m",
        f"{PRODUCT} {NOTHING} {END}",
        reason="its mask may have more keys than the scores",
    ),
    "something added to the weights": Form(
        f"{QKV}, bool[B, 1, 1, S] m",
        CHOSEN.replace("none = Mul(zero, g)", "none = Mul(low, g)"),
        reason="the attention weights pass through Add",
    ),
    "scores added to themselves": Form(QKV, f"{PRODUCT} x = Add(s, s) {END}", reason="used twice: also by Add"),
    "scores subtracted from themselves": Form(QKV, f"{PRODUCT} x = Sub(s, s) {END}", reason="used twice: also by Sub"),
    "scores subtracted behind a softcap": Form(
        f"{QKV}, float[B, 3, T, S] b",
        f"""{PRODUCT} c = Constant<value_float = 3.0>() a = Div(s, c) t = Tanh(a) capped = Mul(t, c)
        x = Sub(b, capped) {END}""",
        reason="softcap",
    ),
    "scores beside those of other keys": Form(
        f"{QKV}, float[B, 3, T, 2] m, float[B, 3, 2, 8] more, float[B, 1, 1, R] pad",
        f"""{PRODUCT} both = Concat<axis = 3>(m, s) x = Add(both, pad) w = Concat<axis = 2>(more, v)
        p = Softmax<axis = -1>(x) y = MatMul(p, w)""",
        reason="the scores are put beside others (Concat)",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_fused_and_right(name: str, library: str) -> None:
    check(RIGHT[name], library)


def test_the_mask_of_shifted_windows_has_their_number(library: str) -> None:
    """Not so where 1 is subtracted elsewhere: what is made then has a size that nothing is known of."""
    copied = COPIED.replace("'m'", "'m4'")
    for condition in ("And(differs, some)", "And(same, some)", "Identity(some)"):
        report = check(shifted_windows(condition), library)
        assert (copied in {fact.text for fact in report.sites[0].facts}) == (condition != "And(differs, some)")


@pytest.mark.parametrize("name", WRONG)
def test_near_misses(name: str, library: str) -> None:
    check(WRONG[name], library)


def test_batches_of_two_names_where_the_file_states_one_say_what_to_do() -> None:
    """As an export with Dim.DYNAMIC everywhere has them; under one name they fuse."""
    body = f"{PRODUCT} p = Softmax<axis = -1>(s) o = MatMul(p, v) y = Identity(o)"
    for name, reason in (("E", "file states one for the result: give sizes that are equal one name"), ("B", "")):
        model = Form(QKV.replace("float[B, 3, S, 8]", f"float[{name}, 3, S, 8]"), body).model()
        stated = onnx.helper.make_tensor_value_info("o", onnx.TensorProto.FLOAT, ["B", 3, "T", 8])
        model.graph.value_info.append(stated)
        (site,) = faexport.fuse(model)[1].sites
        assert reason in str(site.refusal) and site.fused is not bool(reason)
        assert site.fused or site.refusal.kind is RefusalKind.OTHER_NAMES


def test_question_marks_name_no_size() -> None:
    """Some exporters call every unknown size so. Were they one name, rows, keys and batch entries would be equal, and a
    mask of one batch entry's rows a mask of batch entries."""
    model = masked("bool[M, N]").model()
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_param = "?" if dim.dim_param else ""
    _, report = faexport.fuse(model)
    (site,) = report.sites
    assert "both sizes have names of their own" in str(site.refusal)


@pytest.mark.parametrize("op", ["Identity", "Relu"])
def test_any_number_of_nodes_behind_a_softmax_gives_a_row(op: str) -> None:
    chain = " ".join(f"p{i + 1} = {op}(p{i})" for i in range(500))
    body = f"{PRODUCT} p0 = Softmax<axis = -1>(s) {chain} y = MatMul(p500, v)"
    _, report = faexport.fuse(Form(QKV, body).model())
    assert [site.fused for site in report.sites] == [False]
    assert ("more than 24 nodes" if op == "Identity" else "pass through Relu") in str(report.sites[0].refusal)


@pytest.mark.parametrize("name", ["2**99999999", "9999999999*T*T", "(" * 300 + "T" + ")" * 300, "T//0", "-5"])
def test_sizes_that_nobody_can_compute(name: str) -> None:
    """They are refused by verification, or count as a name like others; nothing is computed with them."""
    model = Form(QKV, f"{PRODUCT} x = Identity(s) {END}").model()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = name
    specs = inputs.input_specs(ir.from_proto(model))
    try:
        sets = settings.plans(specs, settings.Assumed(), np.random.default_rng(0))
    except inputs.UnsupportedInput as error:
        assert name in str(error)
    else:
        assert all(item.tensors["q"].size < 1 << 20 for item in sets)
    assert faexport.fuse(model)[1].num_fused == 1
