# SPDX-License-Identifier: Apache-2.0
"""Of which kind a refusal is, by which the report chooses its advice, whatever the words."""

from __future__ import annotations

import faexport
import pytest
from faexport.spec import RefusalKind

from tests.export.form_text import PRODUCT, QKV, Form

END = "p = Softmax<axis = -1>(s) y = MatMul(p, v)"
TRAINED = """ratio = Constant<value = float {0.5}>() yes = Constant<value = bool {1}>() p = Softmax<axis = -1>(s)
    d = Dropout(p, ratio, yes) y = MatMul(d, v)"""
DOUBLE = QKV.replace("float[", "double[")
REFUSED = {
    RefusalKind.SCORES_READ: Form(
        QKV, f"{PRODUCT} p = Softmax<axis = -1>(s) o = MatMul(p, v) m = ReduceMax<axes = [-1]>(p) y = Mul(o, m)"
    ),
    RefusalKind.QUANTIZED: Form(
        QKV,
        f"""{PRODUCT} f = Constant<value = float {{0.1}}>() z = Constant<value = int8 {{0}}>()
        a = QuantizeLinear(s, f, z) b = DequantizeLinear(a, f, z) p = Softmax<axis = -1>(b) y = MatMul(p, v)""",
    ),
    RefusalKind.RANDOM: Form(QKV, f"{PRODUCT} {TRAINED}"),
    RefusalKind.RUNTIME_OPERATOR: Form(
        "float[2, 9, 24] x, float[24, 72] w, float[72] b, int32[2] n, int32[2, 9] t, int32[3] c",
        "y = com.microsoft.PackedAttention<num_heads = 3>(x, w, b, t, c)",
    ),
    RefusalKind.SOFTCAP: Form(
        f"{QKV}, float[1, 3, T, S] bias",
        f"{PRODUCT} a = Add(s, bias) t = Tanh(a) p = Softmax<axis = -1>(t) y = MatMul(p, v)",
    ),
    RefusalKind.FACTOR: Form(
        f"{QKV}, float[1, 3, T, S] g", f"{PRODUCT} a = Mul(s, g) p = Softmax<axis = -1>(a) y = MatMul(p, v)"
    ),
    RefusalKind.TYPE: Form(DOUBLE, f"{PRODUCT} {END}"),
    RefusalKind.UNKNOWN_SIZES: Form(
        f"{QKV}, int64[R] shape, float[N] numbers",
        f"{PRODUCT} m = Reshape(numbers, shape) x = Add(s, m) p = Softmax<axis = -1>(x) y = MatMul(p, v)",
    ),
    RefusalKind.NO_ATTENTION: Form(
        "float[B, 3, T, 8] q, float[B, 3, S, 8] k, float[B, 3, T, 8] v",
        f"{PRODUCT} p = Softmax<axis = -1>(s) t = Transpose<perm = [0, 1, 3, 2]>(p) y = MatMul(t, v)",
    ),
    RefusalKind.OTHER: Form(
        QKV, f"{PRODUCT} a = Sin(s) p = Softmax<axis = -1>(a) y = MatMul(p, v)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refusal_is_of_its_kind(kind: RefusalKind) -> None:
    _, report = faexport.fuse(REFUSED[kind].model())
    assert [site.refusal.kind for site in report.sites if site.refusal] == [kind], report.sites
