# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values that share batch entries or heads with each other: constants, sizes that are 1 in the file,
and sizes by two names, which are equal or one of them is 1 when the model runs."""

from __future__ import annotations

from tests.export.form_text import PRODUCT, QKV, Form, checks_of

END = "p = Softmax<axis = -1>(s) y = MatMul(p, v)"
EINSUM = 'y = Einsum<equation = "bhts,bhsd->bhtd">(p, v)'
ADDED = f"x = Add(s, m) p = Softmax<axis = -1>(x) {EINSUM}"
LEARNT = "lat = Constant<value = float[1, 3, 2, 8] {" + ", ".join(str(i % 7 - 3) for i in range(48)) + "}>()"


COPIED = frozenset({"operands are copied to the size of 'm', which has names of its own: equal, or one of both is 1"})


def summed(body: str, mask: str = "B, 1, 1, M", v: str = "B, 3, S, 8", k: str = "B, 3, S, 8", **more: object) -> Form:
    """The plain block with a mask, and values that an Einsum sums up: of one row it takes as many as it needs."""
    inputs = f"float[B, 3, T, 8] q, float[{k}] k, float[{v}] v, float[{mask}] m"
    return Form(inputs, f"{PRODUCT} {body}", empty=False, **more)


def heads(q: str = "B, 3, T, 8", k: str = "B, 3, S, 8", v: str = "B, 3, S, 8", **more: object) -> Form:
    """The plain block on operands of these shapes."""
    return Form(f"float[{q}] q, float[{k}] k, float[{v}] v", f"{PRODUCT} {END}", **more)


RIGHT = {
    "learnt queries, in a Constant node, and one key": Form(
        "float[1, 3, 1, 8] k, float[1, 3, S, 8] v",
        f"""{LEARNT} kt = Transpose<perm = [2, 1, 3, 0]>(k) s = MatMul(lat, kt) p = Softmax<axis = -1>(s)
        y = MatMul(p, v)""",
    ),
    "a mask of more rows than one, beside one head of scores and more of values": Form(
        "float[B, 1, 1, 8] q, float[B, 1, S, 8] k, float[B, 3, S, 8] v, float[T, 1, 1, 1] m",
        f"""{PRODUCT} t = Transpose<perm = [2, 1, 3, 0]>(s) z = Add(t, m) x = Transpose<perm = [3, 1, 0, 2]>(z)
        p = Softmax<axis = -1>(x) y = MatMul(p, v)""",
    ),
    "the shape of scores that have the heads of a mask, as the values do": Form(
        "float[B, H, T, 8] q, float[B, H, S, 8] k, float[B, 3, S, 8] v, float[B, 3, 1, S] m",
        f"""{PRODUCT} x = Add(s, m) n = Shape(x) ones = ConstantOfShape<value = float[1] {{1.0}}>(n)
        axes = Constant<value_ints = [1, 3]>() count = ReduceSum<keepdims = 1>(ones, axes)
        p = Softmax<axis = -1>(x) o = MatMul(p, v) y = Add(o, count)""",
        opset=18,
    ),
    "a mask that gives more rows to one row and one key that changed places": Form(
        "float[B, 3, 1, 8] q, float[B, 3, 1, 8] k, float[B, 3, 1, 8] v, float[B, 1, 1, T] m",
        f"""{PRODUCT} turned = Transpose<perm = [0, 1, 3, 2]>(s) x = Add(turned, m) pt = Softmax<axis = 2>(x)
        p = Transpose<perm = [0, 1, 3, 2]>(pt) y = MatMul(p, v)""",
    ),
    "batch entries of a factor, and then those of a mask behind a bias": Form(
        """float[B, 3, 2, 8] q, float[B, 3, 5, 8] k, float[B, 3, 5, 8] v, float[N, 1, 1, 1] g, float[B, 1, 1, 1] b,
        float[M, 1, 1, 5] m""",
        f"{PRODUCT} w = Mul(s, g) z = Add(w, b) x = Add(z, m) p = Softmax<axis = -1>(x) y = MatMul(p, v)",
        empty=False,
    ),
    "a mask for the keys of an Einsum": summed(ADDED, "B, 1, 1, S"),
    "a mask that may have more keys than the one of an Einsum": summed(ADDED, facts=COPIED),
    "a mask that may hide more keys than the one of an Einsum": summed(
        f"""zero = Constant<value = float {{0}}>() seen = Less(m, zero) low = Constant<value = float {{-inf}}>()
        x = Where(seen, s, low) p = Softmax<axis = -1>(x) {EINSUM}""",
        facts=frozenset({"padding mask [B, 1, 1, S_kv]"}),
    ),
    "a bias that may have more rows and keys than the one of an Einsum": summed(ADDED, "B, 3, M, M", facts=COPIED),
    "a mask that may have more keys, beside sinks": summed(
        f"""x = Add(s, m) n = Shape<end = 3>(x) one = Constant<value_ints = [1]>() to = Concat<axis = 0>(n, one)
        logit = Constant<value = float[1, 3, 1, 1] {{0.5, -1.0, 2.0}}>() sink = Expand(logit, to)
        c = Concat<axis = 3>(x, sink) w = Softmax<axis = -1>(c) zero = Constant<value_ints = [0]>()
        last = Constant<value_ints = [-1]>() keys = Constant<value_ints = [3]>() p = Slice(w, zero, last, keys)
        {EINSUM}""",
        facts=COPIED | {"attention sinks"},
    ),
    "a mask for all keys of an Einsum": summed(ADDED, "B, 1, T, 1"),
    "a mask of more numbers than an Einsum has keys, cut to theirs": summed(
        f"""n = Shape<start = 3>(s) zero = Constant<value_ints = [0]>() last = Constant<value_ints = [3]>()
        cut = Slice(m, zero, n, last) x = Add(s, cut) p = Softmax<axis = -1>(x) {EINSUM}""",
        "1, 1, 1, 6",
    ),
    "keys of one batch entry": heads(k="1, 3, S, 8"),
    "values of one batch entry": heads(v="1, 3, S, 8"),
    "keys and values of one batch entry": heads(k="1, 3, S, 8", v="1, 3, S, 8"),
    "queries of one batch entry": heads(q="1, 3, T, 8"),
    "queries and keys of one batch entry": heads(q="1, 3, T, 8", k="1, 3, S, 8"),
    "keys without a batch": Form(
        "float[B, 3, T, 8] q, float[3, S, 8] k, float[B, 3, S, 8] v",
        "kt = Transpose<perm = [0, 2, 1]>(k) s = MatMul(q, kt) " + END,
    ),
    "values without a batch": heads(v="3, S, 8"),
    "queries without a batch": heads(q="3, T, 8"),
    "keys of one head": heads(k="B, 1, S, 8"),
    "values of one head": heads(v="B, 1, S, 8"),
    "keys and values of one head": heads(
        k="B, 1, S, 8", v="B, 1, S, 8", facts=frozenset({"3 query heads on 1 kv heads"})
    ),
    "queries of one head": heads(q="B, 1, T, 8"),
    "queries and keys of one head": heads(q="B, 1, T, 8", k="B, 1, S, 8"),
    "queries and values of one head": heads(q="B, 1, T, 8", v="B, 1, S, 8"),
    "keys of one head and one batch entry": heads(k="1, 1, S, 8"),
    "keys of one head, values of one batch entry": heads(k="B, 1, S, 8", v="1, 3, S, 8"),
    "keys of two dimensions": Form(
        "float[B, 3, T, 8] q, float[S, 8] k, float[S, 8] v", "kt = Transpose(k) s = MatMul(q, kt) " + END
    ),
    "a batch by another name": heads(k="E, 3, S, 8", v="E, 3, S, 8"),
    "three names of a batch": heads(k="E, 3, S, 8", v="F, 3, S, 8"),
    "a batch by another name, causal": Form(
        "float[B, 3, T, 8] q, float[E, 3, T, 8] k, float[E, 3, T, 8] v",
        f"""{PRODUCT} size = Shape<start = 2>(s) true = ConstantOfShape<value = bool[1] {{1}}>(size)
        one = Constant<value = int64 {{1}}>() ahead = Trilu<upper = 1>(true, one)
        low = Constant<value = float {{-inf}}>() x = Where(ahead, low, s) p = Softmax<axis = -1>(x)
        y = MatMul(p, v)""",
        frozenset({"causal"}),
    ),
    "a batch by another name, padded": Form(
        "float[B, 3, T, 8] q, float[E, 3, S, 8] k, float[E, 3, S, 8] v, bool[E, 1, 1, S] m",
        f"""{PRODUCT} low = Constant<value = float {{-inf}}>() x = Where(m, s, low) p = Softmax<axis = -1>(x)
        y = MatMul(p, v)""",
    ),
    "values of a batch by another name, padded": Form(
        "float[B, 3, T, 8] q, float[B, 3, S, 8] k, float[E, 3, S, 8] v, bool[B, 1, 1, S] m",
        f"""{PRODUCT} low = Constant<value = float {{-inf}}>() x = Where(m, s, low) p = Softmax<axis = -1>(x)
        y = MatMul(p, v)""",
    ),
    "values of more heads, biased": Form(
        "float[B, H, T, 8] q, float[B, H, S, 8] k, float[B, K, S, 8] v, float[B, H, T, S] m",
        f"{PRODUCT} x = Add(s, m) p = Softmax<axis = -1>(x) y = MatMul(p, v)",
    ),
    "heads by two names": heads(q="B, H, T, 8", k="B, K, S, 8", v="B, 3, S, 8"),
    "one head of any number": heads(q="B, H, T, 8", k="B, 1, S, 8", v="B, 1, S, 8"),
    "learnt queries": Form(
        "float[B, 3, S, 8] k, float[B, 3, S, 8] v",
        f"{LEARNT} kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(lat, kt) {END}",
    ),
    "learnt queries, scaled": Form(
        "float[B, 3, S, 8] k, float[B, 3, S, 8] v",
        f"""{LEARNT} kt = Transpose<perm = [0, 1, 3, 2]>(k) s0 = MatMul(lat, kt)
        c = Constant<value = float {{0.3}}>() s = Mul(s0, c) {END}""",
    ),
    "learnt queries of a batch": Form(
        "float[B, 3, S, 8] k, float[B, 3, S, 8] v",
        f"""{LEARNT} b = Shape<end = 1>(k) ones = Constant<value = int64[3] {{1, 1, 1}}>()
        to = Concat<axis = 0>(b, ones) q = Expand(lat, to)
        kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt) {END}""",
    ),
    "a bmm's keys of one entry": Form(
        "float[N, T, 8] q, float[1, S, 8] k, float[N, S, 8] v",
        f"kt = Transpose<perm = [0, 2, 1]>(k) s = MatMul(q, kt) {END}",
    ),
    "keys of one batch entry, merged heads": Form(
        "float[B, T, 24] q, float[1, S, 24] k, float[B, S, 24] v",
        """heads = Constant<value = int64[4] {0, 0, 3, 8}>() q4 = Reshape(q, heads) k4 = Reshape(k, heads)
        v4 = Reshape(v, heads) qt = Transpose<perm = [0, 2, 1, 3]>(q4) kt = Transpose<perm = [0, 2, 3, 1]>(k4)
        vt = Transpose<perm = [0, 2, 1, 3]>(v4) s = MatMul(qt, kt) p = Softmax<axis = -1>(s) o = MatMul(p, vt)
        ot = Transpose<perm = [0, 2, 1, 3]>(o) flat = Constant<value = int64[3] {0, 0, 24}>()
        y = Reshape(ot, flat)""",
    ),
}

WRONG = {
    "a mask that may have more keys than an Einsum has, and values of another number": summed(
        ADDED, v="B, 3, V, 8", reason="of size S in one operand and V in the other"
    ),
    "a mask that gives more rows to the one row of one key": Form(
        "float[B, 3, 1, 8] q, float[B, 3, 1, 8] k, float[B, 3, 1, 8] v, float[3, 1, T, 1] m",
        f"""{PRODUCT} at = Constant<value_ints = [2]>() s5 = Unsqueeze(s, at) x = Add(s5, m)
        p5 = Softmax<axis = -1>(x) p = Squeeze(p5, at) y = MatMul(p, v)""",
        reason="its mask may have more entries than the scores",
    ),
    "one value for all weights of an Einsum": summed(
        ADDED, "B, 1, 1, S", "B, 3, V, 8", reason="of size S in one operand"
    ),
    "one column of keys for all of the queries of an Einsum": Form(
        "float[B, 3, T, 8] q, float[B, 3, S, 1] k, float[B, 3, S, 8] v",
        f"""s = Einsum<equation = "bhtd,bhsd->bhts">(q, k) {END}""",
        reason="an Einsum sums over an axis of size 8 in one operand and 1 in the other",
    ),
    "learnt keys": Form(
        "float[B, 3, T, 8] q, float[B, 3, 2, 8] v",
        f"{LEARNT} kt = Transpose<perm = [0, 1, 3, 2]>(lat) s = MatMul(q, kt) {END}",
        reason="weights",
    ),
    "a bias of a size that the file doesn't tell": Form(
        f"{QKV}, float[M, T, S] b, int64[1] n",
        """zero = Constant<value_ints = [0]>() size = Shape<end = 1>(q) three = Constant<value_ints = [3]>()
        all = Mul(size, three) eight = Constant<value_ints = [8]>() t = Shape<start = 2, end = 3>(q)
        n_keys = Shape<start = 2, end = 3>(k) to_q = Concat<axis = 0>(all, t, eight) q3 = Reshape(q, to_q)
        to_k = Concat<axis = 0>(all, n_keys, eight) k3 = Reshape(k, to_k) v3 = Reshape(v, to_k)
        kt = Transpose<perm = [0, 2, 1]>(k3) s = MatMul(q3, kt) cut = Slice(b, zero, n, zero) x = Add(s, cut)
        apart = Concat<axis = 0>(size, three, t, n_keys) x4 = Reshape(x, apart) p4 = Softmax<axis = -1>(x4)
        flat = Concat<axis = 0>(all, t, n_keys) p = Reshape(p4, flat) y = MatMul(p, v3)""",
        reason="the file doesn't tell, and change their shape behind it",
    ),
    "scores that get a fifth axis": Form(
        QKV,
        f"c = Constant<value = float[1, 1, 1, 1, 1] {{0.3}}>() {PRODUCT.replace('s =', 's0 =')} s = Mul(s0, c) {END}",
        reason="the scores get more axes",
    ),
    "weights that get a fifth axis": Form(
        f"{QKV}, bool[1, B, 1, T, S] m",
        f"none = Constant<value = float {{0}}>() {PRODUCT} p0 = Softmax<axis = -1>(s) p = Where(m, p0, none)"
        " y = MatMul(p, v)",
        reason="the attention weights get more axes",
    ),
}

test_fused_and_right = checks_of(RIGHT)
test_near_misses = checks_of(WRONG)
