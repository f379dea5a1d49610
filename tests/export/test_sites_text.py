# SPDX-License-Identifier: Apache-2.0
"""Blocks written as ONNX text, one a spelling that exporters use beside those of site_graphs.py: fused, right, and
understood as far as the facts say; near misses are refused."""

from __future__ import annotations

import faexport
import numpy as np
import onnx
import onnx.parser
import pytest
from faexport.match import softmax_core

from tests.export.compared import run

RANDOM = np.random.default_rng(11)
BATCH, HEADS, ROWS, DEPTH = 2, 4, 7, 8

# `scores` become `weights` in each body.
HEAD = """<ir_version: 10, opset_import: ["" : 20]>
block (float[B, 4, S, 8] q, float[B, 4, S, 8] k, float[B, 4, S, 8] v, bool[B, S] pad) => (float[B, 4, S, 8] y) {
    kt = Transpose<perm = [0, 1, 3, 2]>(k)
    product = MatMul(q, kt)
    c = Constant<value = float {0.3}>()
    scores = Mul(product, c)
    zero = Constant<value = float {0.0}>()
    inf = Constant<value = float {-inf}>()
    low = Constant<value = float {-3.4028235e38}>()
    i0 = Constant<value = int64 {0}>()
    i1 = Constant<value = int64 {1}>()
    last = Constant<value = int64[1] {-1}>()
    shape = Shape(q)
    two = Constant<value = int64 {2}>()
    size = Gather(shape, two)
    place = Range(i0, size, i1)
    axes12 = Constant<value = int64[2] {1, 2}>()
    axis1 = Constant<value = int64[1] {1}>()
    key_pad = Unsqueeze(pad, axes12)
    columns = Cast<to = 1>(place)
    rows = Unsqueeze(columns, axis1)
    slopes = Constant<value = float[4, 1, 1] {0.5, 0.25, 0.125, 0.0625}>()
"""
TAIL = """
    y = MatMul(weights, v)
}"""

SOFTMAX = "weights = Softmax<axis = -1>(masked)"
SPELLINGS = {
    "x - max(x), the axis put back": """
        top = ReduceMax<keepdims = 0>(scores, last)
        column = Unsqueeze(top, last)
        d = Sub(scores, column)
        e = Exp(d)
        sum = ReduceSum<keepdims = 0>(e, last)
        sums = Unsqueeze(sum, last)
        weights = Div(e, sums)""",
    "maximum of all scores": """
        top = ReduceMax<keepdims = 0>(scores)
        d = Sub(scores, top)
        weights = Softmax<axis = -1>(d)""",
    "(x - max(x)) * number": """
        top = ReduceMax(scores, last)
        d = Sub(scores, top)
        masked = Mul(d, c)
        weights = Softmax<axis = -1>(masked)""",
    "exp(x - logsumexp(x))": """
        total = ReduceLogSumExp(scores, last)
        d = Sub(scores, total)
        weights = Exp(d)""",
    "nan_to_num": """
        masked = Where(key_pad, inf, scores)
        p = Softmax<axis = -1>(masked)
        isnan = IsNaN(p)
        p1 = Where(isnan, zero, p)
        isinf = IsInf(p1)
        above = Greater(p1, zero)
        both = And(isinf, above)
        p2 = Where(both, c, p1)
        isinf2 = IsInf(p2)
        below = Less(p2, zero)
        both2 = And(isinf2, below)
        weights = Where(both2, low, p2)""",
    "NaN replaced by as many zeros": """
        masked = Where(key_pad, inf, scores)
        p = Softmax<axis = -1>(masked)
        isnan = IsNaN(p)
        whole = Shape(p)
        zeros = ConstantOfShape(whole)
        weights = Where(isnan, zeros, p)""",
    "nan_to_num, all tests on the first weights": """
        masked = Where(key_pad, inf, scores)
        p = Softmax<axis = -1>(masked)
        isnan = IsNaN(p)
        p1 = Where(isnan, zero, p)
        isinf = IsInf(p)
        below = Less(p, zero)
        both = And(below, isinf)
        p2 = Where(both, low, p1)
        above = Greater(p, zero)
        both2 = And(above, isinf)
        weights = Where(both2, c, p2)""",
}
MASKS = {
    "causal, positions as floats": (
        "ahead = Less(rows, columns)  masked = Where(ahead, inf, scores)",
        {"causal"},
    ),
    "causal, a distance of floats": (
        """distance = Sub(rows, columns)
        seen = GreaterOrEqual(distance, zero)
        masked = Where(seen, scores, low)""",
        {"causal"},
    ),
    "symmetric ALiBi of floats": (
        """distance = Sub(rows, columns)
        near = Abs(distance)
        bias = Mul(near, slopes)
        masked = Sub(scores, bias)""",
        {"ALiBi, slopes 0.5, 0.25, 0.125, 0.0625"},
    ),
    "causal and ALiBi in one tensor": (
        """distance = Sub(columns, rows)
        bias = Mul(distance, slopes)
        ahead = Greater(columns, rows)
        triangle = Where(ahead, inf, zero)
        mask = Add(bias, triangle)
        masked = Add(scores, mask)""",
        {"causal", "ALiBi, slopes 0.5, 0.25, 0.125, 0.0625"},
    ),
    "causal and padding added up, one through a Reshape of fixed size": (
        """ahead = Greater(columns, rows)
        triangle = Where(ahead, inf, zero)
        pads = Where(pad, inf, zero)
        whole = Shape<end = 1>(q)
        rest = Constant<value = int64[3] {1, 1, 7}>()
        fixed = Concat<axis = 0>(whole, rest)
        pads4 = Reshape(pads, fixed)
        mask = Add(triangle, pads4)
        masked = Add(scores, mask)""",
        {"causal", "padding mask [B, 1, 1, S_kv]"},
    ),
}
NEAR_MISSES = {
    "x - max(y)": ("top = ReduceMax(product, last)  d = Sub(scores, top)  weights = Softmax<axis = -1>(d)", None),
    "maximum of another axis": (
        """axis2 = Constant<value = int64[1] {2}>()
        top = ReduceMax(scores, axis2)
        d = Sub(scores, top)
        weights = Softmax<axis = -1>(d)""",
        "used twice",
    ),
    "exp(x - logsumexp(y))": (
        "total = ReduceLogSumExp(product, last)  d = Sub(scores, total)  weights = Exp(d)",
        None,
    ),
    "small weights replaced": (
        "p = Softmax<axis = -1>(scores)  few = Less(p, c)  weights = Where(few, zero, p)",
        "used twice",
    ),
    "NaN replaced by 0, and then by another number": (
        """p = Softmax<axis = -1>(scores)
        isnan = IsNaN(p)
        p1 = Where(isnan, zero, p)
        weights = Where(isnan, c, p1)""",
        "used twice",
    ),
    "NaN replaced by as many ones": (
        """p = Softmax<axis = -1>(scores)
        isnan = IsNaN(p)
        whole = Shape(p)
        ones = ConstantOfShape<value = float[1] {1}>(whole)
        weights = Where(isnan, ones, p)""",
        "used twice",
    ),
    "NaN replaced by a 0 of more axes": (
        """p = Softmax<axis = -1>(scores)
        isnan = IsNaN(p)
        five = Constant<value = float[1, 1, 1, 1, 1] {0}>()
        weights5 = Where(isnan, five, p)
        first = Constant<value = int64[1] {0}>()
        weights = Squeeze(weights5, first)""",
        "used twice",
    ),
    "NaN replaced by zeros of another size": (
        """p = Softmax<axis = -1>(scores)
        isnan = IsNaN(p)
        five = Constant<value = int64[5] {1, 1, 1, 1, 1}>()
        zeros = ConstantOfShape(five)
        weights5 = Where(isnan, zeros, p)
        first = Constant<value = int64[1] {0}>()
        weights = Squeeze(weights5, first)""",
        "used twice",
    ),
    "NaN replaced by another number": (
        "p = Softmax<axis = -1>(scores)  isnan = IsNaN(p)  weights = Where(isnan, c, p)",
        "used twice",
    ),
}


def model_of(body: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(HEAD + body + TAIL)
    onnx.checker.check_model(model)
    return model


def feeds() -> dict[str, np.ndarray]:
    """Entry 0 is padded on the left, entry 1 nowhere."""
    tensors = {name: RANDOM.standard_normal((BATCH, HEADS, ROWS, DEPTH)).astype(np.float32) for name in "qkv"}
    pad = np.zeros((BATCH, ROWS), bool)
    pad[0, :3] = True
    return tensors | {"pad": pad}


def fused_and_right(body: str) -> set[str]:
    model = model_of(body)
    fused, report = faexport.fuse(model)
    assert report.num_fused == 1, [str(site.refusal) for site in report.sites]
    inputs = feeds()
    (expected,), (got,) = run(model, inputs), run(fused, inputs)
    np.testing.assert_allclose(got, np.where(np.isnan(expected), 0, expected), atol=2e-5)
    return {fact.text for fact in report.sites[0].facts}


@pytest.mark.parametrize("name", SPELLINGS)
def test_softmax_in_every_spelling(name: str) -> None:
    fused_and_right(SPELLINGS[name])


@pytest.mark.parametrize("name", MASKS)
def test_mask_in_every_spelling(name: str) -> None:
    body, facts = MASKS[name]
    assert facts <= fused_and_right(body + "\n" + SOFTMAX)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    body, reason = NEAR_MISSES[name]
    _, report = faexport.fuse(model_of(body))
    assert report.num_fused == 0
    assert reason is None or reason in report.sites[0].refusal.reason


GROUPED = """<ir_version: 10, opset_import: ["" : 20]>
block (float[B, 2, 4, S, 8] q, float[B, 2, 4, S, 8] k, float[B, 2, 4, S, 8] v, float[B, 2, 1, S, S] bias)
    => (float[B, 2, 4, S, 8] y) {
    kt = Transpose<perm = [0, 1, 2, 4, 3]>(k)
    scores = MatMul(q, kt)
    masked = Add(scores, bias)
    weights = Softmax<axis = -1>(masked)
    y = MatMul(weights, v)
}"""


def test_three_leading_axes_of_which_two_may_be_batch() -> None:
    """Whether 2 x 4 are heads or only the 4 are, the bias goes with its axes."""
    model = onnx.parser.parse_model(GROUPED)
    fused, report = faexport.fuse(model)
    assert report.num_fused == 1, [str(site.refusal) for site in report.sites]
    inputs = {name: RANDOM.standard_normal((3, 2, 4, ROWS, DEPTH)).astype(np.float32) for name in "qkv"}
    inputs["bias"] = RANDOM.standard_normal((3, 2, 1, ROWS, ROWS)).astype(np.float32)
    np.testing.assert_allclose(run(fused, inputs)[0], run(model, inputs)[0], atol=2e-5)


OPTIMIZED = """<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]>
block (int32[B, S] ids, float[20, 8] table, float[8] ones, float[8] zeros) => (float[B, S, 8] y) {
    x, , sum = com.microsoft.EmbedLayerNormalization(ids, , table, table, , ones, zeros)
    n, , , residual = com.microsoft.SkipLayerNormalization(x, sum, ones, zeros)
    kt = Transpose<perm = [0, 2, 1]>(residual)
    scores = MatMul(n, kt)
    weights = Softmax<axis = -1>(scores)
    y = MatMul(weights, residual)
}"""


def test_behind_layers_that_onnxruntime_fused() -> None:
    """Shapes and types go through its own layers, in a file that states neither."""
    _, report = faexport.fuse(onnx.parser.parse_model(OPTIMIZED))
    assert report.num_fused == 1 and report.sites[0].dtype == "float32"


def test_a_defect_at_one_site_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sites; the analysis of the first one fails."""
    second = """
        scores2 = MatMul(weights_v, kt)
        weights2 = Softmax<axis = -1>(scores2)
        y = MatMul(weights2, v)
    }"""
    body = "weights = Softmax<axis = -1>(scores)\n    weights_v = MatMul(weights, v)"
    model = onnx.parser.parse_model(HEAD + body + second)
    asked: list[str] = []

    def fails_once(terms, *others):
        asked.append("")
        if len(asked) == 1:
            raise ZeroDivisionError("by accident")
        return find_values(terms, *others)

    find_values = softmax_core.find_values
    monkeypatch.setattr(softmax_core, "find_values", fails_once)
    monkeypatch.delenv("FAEXPORT_TRACEBACK", raising=False)
    _, report = faexport.fuse(model)
    assert [site.fused for site in report.sites] == [False, True]
    assert "ZeroDivisionError: by accident" in report.sites[0].refusal.reason
