# SPDX-License-Identifier: Apache-2.0
"""Masks that are made of two tensors with sizes of their own: together these may have more than the scores have, which
the proof has to ask of whatever is made of such a mask, too. And scores of five axes that take rows from a mask."""

from __future__ import annotations

from tests.export.form_text import PRODUCT, QKV, Form, checks_of

END = "p = Softmax<axis = -1>(x) y = MatMul(p, v)"
LOW = "low = Constant<value_float = -1.0e30>()"
HALF = QKV.replace("float", "float16")
FIVE = "float[A, B, 3, T, 8] q, float[A, B, 3, S, 8] k, float[A, B, 3, S, 8] v"
FIVE_PRODUCT = "kt = Transpose<perm = [0, 1, 2, 4, 3]>(k) s = MatMul(q, kt)"
GROUPS = "float[B, 2, 3, T, 8] q, float[B, 2, 1, S, 8] k, float[B, 2, 1, S, 8] v"
BLOCKS = "float[B, 3, T, 8] q, float[B, 3, 10, 8] k, float[B, 3, 10, 8] v"
SPLIT = """apart = Constant<value_ints = [0, 0, -1, 2, 5]>() whole = Constant<value_ints = [0, 0, -1, 10]>()
    kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt) s5 = Reshape(s, apart)"""


def met(own: str, scores: str, body: str, inputs: str = QKV, product: str = PRODUCT, **more: object) -> Form:
    """A bias `b` that is made of a tensor with sizes of its own, and of one with those of the scores."""
    kind = "float16" if inputs == HALF else "float"
    return Form(f"{inputs}, {kind}[{own}] b1, {kind}[{scores}] b2", f"b = Sub(b1, b2) {product} {body}", **more)


def of_each(name: str, scores: str, body: str, *owns: str, **more: object) -> dict[str, Form]:
    return {f"{name}, [{own}]": met(own, scores, body, **more) for own in owns}


OWN = ("B, 1, R, S", "M, 1, T, S", "M, 1, R, S")
WEIGHED = f"u = Add(s, b) x = Mul(u, g) {END}"
IN_TYPES = f"""{LOW} u = Add(s, b) w = Cast<to = 1>(u) x = Where(m, w, low) h = Softmax<axis = -1>(x)
    p = Cast<to = 10>(h) y = MatMul(p, v)"""
RIGHT = {
    **of_each("a bias, and then a factor", "B, 1, T, S", WEIGHED, *OWN, inputs=f"{QKV}, float[3, 1, 1] g"),
    **of_each(
        "rows of five axes", "A, B, 3, T, S", f"x = Add(s, b) {END}", "1, 1, R, S", inputs=FIVE, product=FIVE_PRODUCT
    ),
    "more rows for groups of heads": Form(f"{GROUPS}, float[R, S] b", f"{FIVE_PRODUCT} x = Add(s, b) {END}"),
    "more rows for groups of heads, opset 13": Form(
        f"{GROUPS}, float[R, S] b", f"{FIVE_PRODUCT} x = Add(s, b) {END}", opset=13
    ),
}
# Batch entries and heads in one axis of the scores, and in two of the values.
RIGHT["values with an axis more than the scores"] = Form(
    "float[B, 4, 6, 8] x",
    """apart = Constant<value_ints = [0, 2, 2, 2, 3, 8]>() all = Constant<value_ints = [-1, 6, 8]>()
    cut = Reshape(x, apart) turned = Transpose<perm = [0, 1, 3, 2, 4, 5]>(cut) w = Reshape(turned, all) four = Shape(x)
    v = Expand(w, four) kt = Transpose<perm = [0, 2, 1]>(w) s = MatMul(w, kt) p = Softmax<axis = -1>(s)
    y = MatMul(p, v)""",
)
RIGHT["rows of five axes that a mask hides, of sizes of their own"] = Form(
    f"{FIVE}, float[A, B, 3, R, 1] b, bool[1, A, M, 1] m",
    f"""{FIVE_PRODUCT} lowest = Constant<value = float {{-3.4e38}}>() w = Where(m, b, lowest) x = Add(s, w) {END}""",
    opset=11,
)
RIGHT |= {
    f"a bias in float16, and then a mask in float32, [{own}]": Form(
        f"{HALF}, float16[{own}] b1, float16[B, 1, T, S] b2, bool[B, 1, 1, S] m",
        f"b = Sub(b1, b2) {PRODUCT} {IN_TYPES}",
        type="float16",
    )
    for own in OWN
}
WRONG = {
    **of_each(
        "batch entries of five axes",
        "A, B, 3, T, S",
        f"x = Add(s, b) {END}",
        "C, 1, 1, S",
        inputs=FIVE,
        product=FIVE_PRODUCT,
        reason="the heads of query, key and value cannot be told apart",
    ),
    **of_each(
        "scores in blocks",
        "B, 1, T, 2, 1",
        f"x5 = Add(s5, b) x = Reshape(x5, whole) {END}",
        "B, 1, R, 2, 1",
        "M, 1, T, 2, 1",
        inputs=BLOCKS,
        product=SPLIT,
        reason="a mask or bias meets the scores in a shape that is not understood",
    ),
}

test_fused_and_right = checks_of(RIGHT)
test_near_misses = checks_of(WRONG)
