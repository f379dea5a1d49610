# SPDX-License-Identifier: Apache-2.0
"""Masks in another precision than queries and keys: their numbers are those of the type in which they meet the scores.
And sizes that stand in front of heads, or are their number, and may be 0."""

from __future__ import annotations

import faexport
import pytest

from tests.export.form_text import PRODUCT, Form, checks_of

HALF = "float16[B, 3, T, 8] q, float16[B, 3, S, 8] k, float16[B, 3, S, 8] v"
SINGLE = "x = Cast<to = 1>(s)"
END = "p = Softmax<axis = -1>(m) h = Cast<to = 10>(p) y = MatMul(h, v)"
KEEP = "bool[B, 1, 1, S] keep"
OF_NUMBERS = """i = Constant<value_float = 1.0>() one = Cast<to = 10>(i)
u = Constant<value_float = -10000.0>() low = Cast<to = 10>(u)
f = Cast<to = 10>(n) d = Sub(one, f) b = Mul(d, low) x = Add(s, b) p = Softmax<axis = -1>(x) y = MatMul(p, v)"""
FIVE_AXES = "float[A, B, 3, T, 8] q, float[A, B, 3, S, 8] k, float[A, B, 3, S, 8] v, bool[A, 1, 1, 1, S] keep"
HEADS = "float[B, H, T, 8] q, float[B, H, S, 8] k, float[B, H, S, 8] v"


def half(body: str, low: float, **more: object) -> Form:
    """Scores in float16, that are cast to float32 in front of `body`."""
    fill = f"low = Constant<value_float = {low}>() zero = Constant<value_float = 0.0>()"
    return Form(f"{HALF}, {KEEP}", f"{PRODUCT} {SINGLE} {fill} {body} {END}", type="float16", **more)


RIGHT = {
    "put in place, beyond float16": half("m = Where(keep, x, low)", -1.0e9),
    "put in place, the lowest float32": half("m = Where(keep, x, low)", -3.4028235e38),
    "added, beyond float16": half("a = Where(keep, zero, low) m = Add(x, a)", -1.0e9),
    "added, the lowest float32": half("a = Where(keep, zero, low) m = Add(x, a)", -3.4028235e38),
    "heads in two axes, the inner batch 0": Form(
        FIVE_AXES,
        """kt = Transpose<perm = [0, 1, 2, 4, 3]>(k) s = MatMul(q, kt) low = Constant<value_float = -1.0e9>()
        m = Where(keep, s, low) p = Softmax<axis = -1>(m) y = MatMul(p, v)""",
    ),
    "0 heads": Form(HEADS, f"{PRODUCT} p = Softmax<axis = -1>(s) y = MatMul(p, v)"),
    "heads of 0 columns": Form(
        "float[B, 3, T, D] q, float[B, 3, S, D] k, float[B, 3, S, D] v",
        f"{PRODUCT} p = Softmax<axis = -1>(s) y = MatMul(p, v)",
    ),
}

test_fused_and_right = checks_of(RIGHT)


@pytest.mark.parametrize("heads", range(1, 6))
def test_float16_masks_of_numbers(heads: int) -> None:
    """What a row of padding gives depends on how a runtime adds in float16: that is no defect of the proof."""
    inputs = f"{HALF}, int64[B, 1, 1, S] n".replace("3", str(heads))
    _, report = faexport.fuse(Form(inputs, f"{PRODUCT} {OF_NUMBERS}", type="float16").model())
    assert report.num_fused == 1, report.sites[0].refusal
