# SPDX-License-Identifier: Apache-2.0
"""Blocks as other tools leave them, written as ONNX text: onnxruntime's optimizer (FusedMatMul, Split of a Shape, its
own attention ops), positions cut from a table or added
while rows and columns are split. Fused and right, or refused."""

from __future__ import annotations

import faexport
import numpy as np
import onnx
import onnx.parser
import onnx.shape_inference
import pytest

from tests.export.compared import run
from tests.export.site_graphs import AHEAD

RANDOM = np.random.default_rng(17)
HEADER = '<ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1]>\n'
BATCH, ROWS = 2, 6
SIZES = [
    {"B": 2, "S": 6, "T": 9, "N": 3, "Y": 3, "X": 4},
    {"B": 1, "S": 1, "T": 4, "N": 1, "Y": 1, "X": 1},
    {"B": 3, "S": 11, "T": 2, "N": 5, "Y": 5, "X": 2},
]

# One projection of x [B, S, 32] for query, key and value, split into 4 heads of 8.
HEADS = """
    split = Constant<value = int64[4] {0, 0, 4, 8}>()
    q3 = MatMul(x, wq)
    k3 = MatMul(x, wk)
    v3 = MatMul(x, wv)
    q4 = Reshape(q3, split)
    k4 = Reshape(k3, split)
    v4 = Reshape(v3, split)
    q = Transpose<perm = [0, 2, 1, 3]>(q4)
    k = Transpose<perm = [0, 2, 1, 3]>(k4)
    v = Transpose<perm = [0, 2, 1, 3]>(v4)
"""
SELF = "block (float[B, S, 32] x, float[32, 32] wq, float[32, 32] wk, float[32, 32] wv) => (float y)"
SEQUENCE_FIRST = "block (float[S, N, 8] q, float[S, N, 8] k, float[S, N, 8] v) => (float y)"

RIGHT = {
    "the batch of bmm is the second axis": (
        SEQUENCE_FIRST,
        """
        scores = com.microsoft.FusedMatMul<transBatchA = 1, transBatchB = 1, transB = 1, alpha = 0.3>(q, k)
        weights = Softmax<axis = -1>(scores)
        y = com.microsoft.FusedMatMul<transBatchB = 1>(weights, v)""",
        set(),
    ),
    "a queries' transpose inside the product": (
        "block (float[N, 8, S] q, float[N, T, 8] k, float[N, T, 8] v) => (float y)",
        """
        scores = com.microsoft.FusedMatMul<transA = 1, transB = 1, alpha = 0.3>(q, k)
        weights = Softmax<axis = -1>(scores)
        y = MatMul(weights, v)""",
        set(),
    ),
    "sizes by a Split of the shape": (
        SELF,
        HEADS
        + """
        kt = Transpose<perm = [0, 1, 3, 2]>(k)
        scores = MatMul(q, kt)
        size = Shape(scores)
        axis0 = Constant<value = int64[1] {0}>()
        b1, h1, s1, t1 = Split<axis = 0>(size)
        s0 = Squeeze(s1, axis0)
        one = Constant<value = int64 {1}>()
        zero = Constant<value = int64 {0}>()
        place = Range(zero, s0, one)
        axis1 = Constant<value = int64[1] {1}>()
        rows = Unsqueeze(place, axis1)
        ahead = Greater(place, rows)
        low = Constant<value = float {-inf}>()
        masked = Where(ahead, low, scores)
        weights = Softmax<axis = -1>(masked)
        y4 = MatMul(weights, v)
        yt = Transpose<perm = [0, 2, 1, 3]>(y4)
        merged = Constant<value = int64[1] {32}>()
        target = Concat<axis = 0>(b1, s1, merged)
        y = Reshape(yt, target)""",
        {"causal"},
    ),
    "the sink's column in front": (
        SELF.replace(") =>", ", float[4] sinks) =>"),
        HEADS
        + """
        kt = Transpose<perm = [0, 1, 3, 2]>(k)
        scores = MatMul(q, kt)
        size = Shape<start = 0, end = 3>(scores)
        one = Constant<value = int64[1] {1}>()
        wide = Concat<axis = 0>(size, one)
        each = Constant<value = int64[3] {4, 1, 1}>()
        sinks3 = Reshape(sinks, each)
        column = Expand(sinks3, wide)
        both = Concat<axis = -1>(column, scores)
        p = Softmax<axis = -1>(both)
        end = Constant<value = int64[1] {9223372036854775807}>()
        last = Constant<value = int64[1] {3}>()
        weights = Slice(p, one, end, last)
        y = MatMul(weights, v)""",
        {"attention sinks"},
    ),
}
SINK_FIRST = RIGHT["the sink's column in front"]
RIGHT["positions cut from a table"] = (
    SELF.replace(") =>", ", float[64, 32] table) =>").replace(" x,", " x0,"),
    """
    size = Shape<start = 1, end = 2>(x0)
    zero = Constant<value = int64[1] {0}>()
    places = Slice(table, zero, size, zero)
    x = Add(x0, places)
"""
    + HEADS
    + """
    kt = Transpose<perm = [0, 1, 3, 2]>(k)
    scores = MatMul(q, kt)
    square = Shape<start = 2>(scores)
    true = ConstantOfShape<value = bool[1] {1}>(square)
    ahead = Constant<value = int64 {1}>()
    hidden = Trilu<upper = 1>(true, ahead)
    low = Constant<value = float {-3.4028235e38}>()
    masked = Where(hidden, low, scores)
    weights = Softmax<axis = -1>(masked)
    y = MatMul(weights, v)""",
    {"causal"},
)
SPLIT = "block (float[N, 12, 8] q, float[N, 12, 8] k, float[N, 12, 8] v, float[{a}] a, float[{b}] b) => (float y)"
IMAGE = """
        kt = Transpose<perm = [0, 2, 1]>(k)
        scores = MatMul(q, kt)
        split = Constant<value = int64[5] {-1, 3, 4, 3, 4}>()
        image = Reshape(scores, split)
        once = Add(image, a)
        both = Add(once, b)
        merged = Constant<value = int64[3] {-1, 12, 12}>()
        masked = Reshape(both, merged)
        weights = Softmax<axis = -1>(masked)
        y = MatMul(weights, v)"""
RIGHT["relative positions of an image"] = (SPLIT.format(a="N, 3, 4, 3, 1", b="N, 3, 4, 1, 4"), IMAGE, set())
RIGHT["relative positions that the batch shares"] = (SPLIT.format(a="3, 4, 3, 1", b="3, 1, 1, 4"), IMAGE, set())
RIGHT["one axis of an image"] = (SPLIT.format(a="1, 1, 1, 3, 1", b="1, 1, 1, 1, 1"), IMAGE, set())
RIGHT["heads apart, an image of any size"] = (
    "block (float[B, 4, Y, X, 8] q, float[B, 4, Y, X, 8] k, float[B, 4, Y, X, 8] v, float[B, 4, Y, X, Y, 1] a, "
    "float[B, 4, Y, X, 1, X] b) => (float y)",
    """
        flat = Constant<value = int64[4] {0, 0, -1, 8}>()
        q4 = Reshape(q, flat)
        k4 = Reshape(k, flat)
        v4 = Reshape(v, flat)
        kt = Transpose<perm = [0, 1, 3, 2]>(k4)
        scores = MatMul(q4, kt)
        whole = Shape(scores)
        outer = Shape<end = 4>(q)
        inner = Shape<start = 2, end = 4>(k)
        split = Concat<axis = 0>(outer, inner)
        image = Reshape(scores, split)
        once = Add(image, a)
        both = Add(once, b)
        masked = Reshape(both, whole)
        weights = Softmax<axis = -1>(masked)
        y = MatMul(weights, v4)""",
    set(),
)
RIGHT["an Einsum with an ellipsis"] = (
    "block (float[B, S, 4, 8] q, float[B, S, 4, 8] k, float[B, S, 4, 8] v) => (float y)",
    """
        scores = Einsum<equation = "...qhd,...khd->...hqk">(q, k)
        weights = Softmax<axis = -1>(scores)
        y = Einsum<equation = "...hqk,...khd->...qhd">(weights, v)""",
    set(),
)
RIGHT["an Einsum that puts heads in front of the batch"] = (
    "block (float[B, S, 4, 8] q, float[B, T, 4, 8] k, float[B, T, 4, 8] v, float[4, 1, S, T] bias) => (float y)",
    """
        scores = Einsum<equation = "bthd,bshd->hbts">(q, k)
        masked = Add(scores, bias)
        weights = Softmax<axis = -1>(masked)
        y = Einsum<equation = "hbts,bshd->bthd">(weights, v)""",
    set(),
)
RIGHT["an Einsum of groups of heads"] = (
    "block (float[B, S, 2, 3, 8] q, float[B, T, 2, 8] k, float[B, T, 2, 8] v) => (float y)",
    """
        scores = Einsum<equation = "btkgd,bskd->bkgts">(q, k)
        weights = Softmax<axis = -1>(scores)
        y = Einsum<equation = "bkgts,bskd->btkgd">(weights, v)""",
    {"6 query heads on 2 kv heads"},
)
RIGHT["a bias of either branch"] = (
    SELF.replace(") =>", ", float[4, S, S] bias, float[1] which) =>"),
    HEADS
    + """
        kt = Transpose<perm = [0, 1, 3, 2]>(k)
        scores = MatMul(q, kt)
        nothing = Constant<value = float[1] {0.0}>()
        positive = Greater(which, nothing)
        added = If (positive) <
            then_branch = g1 () => (float[4, S, S] same) { same = Identity(bias) },
            else_branch = g2 () => (float[4, S, S] other) { other = Neg(bias) }
        >
        masked = Add(scores, added)
        weights = Softmax<axis = -1>(masked)
        y = MatMul(weights, v)""",
    {"bias [1, H, S_q, S_kv]"},
)
RIGHT["key heads repeated by torch.repeat_interleave"] = (
    "block (float[B, 4, S, 8] q, float[B, 2, S, 8] k, float[B, 2, S, 8] v) => (float y)",
    """
        axis2 = Constant<value = int64[1] {2}>()
        rank = Constant<value = int64 {5}>()
        repeats = Constant<value = int64[2] {1, 2}>()
        onehot = OneHot(axis2, rank, repeats)
        whole = Shape(onehot)
        zero = Constant<value = int64[1] {0}>()
        empty = Slice(whole, zero, zero, zero)
        rest = Constant<value = int64[1] {-1}>()
        flat = Concat<axis = 0>(empty, rest)
        counts = Reshape(onehot, flat)
        heads = Constant<value = int64[4] {0, 4, -1, 8}>()
        k5 = Unsqueeze(k, axis2)
        k2 = Tile(k5, counts)
        k4 = Reshape(k2, heads)
        v5 = Unsqueeze(v, axis2)
        v2 = Tile(v5, counts)
        v4 = Reshape(v2, heads)
        kt = Transpose<perm = [0, 1, 3, 2]>(k4)
        scores = MatMul(q, kt)
        weights = Softmax<axis = -1>(scores)
        y = MatMul(weights, v4)""",
    {"4 query heads on 2 kv heads"},
)
RIGHT["learnt weights of heads that stand in front of the batch"] = (
    "block (float[B, S, 4, 8] q, float[B, S, 4, 8] k, float[B, S, 4, 8] v) => (float y)",
    """
    scores = Einsum<equation = "bthd,bshd->hbts">(q, k)
    temperature = Constant<value = float[4, 1, 1, 1] {1.0, 2.0, 0.5, 3.0}>()
    scaled = Mul(scores, temperature)
    weights = Softmax<axis = -1>(scaled)
    y = Einsum<equation = "hbts,bshd->bthd">(weights, v)""",
    set(),
)
WRONG = {
    "a bias that meets a split image, and a Where after it": (
        SPLIT.format(a="N, 3, 4, 3, 1", b="N, 3, 4, 1, 4"),
        IMAGE.replace(
            "both = Add(once, b)", "low = Constant<value = float {-9.0}>() no = Less(b, low) both = Where(no, b, once)"
        ),
        "in a shape that is not understood",
    ),
    "a bias of an unknown size that meets a split image": (
        SPLIT.format(a="N, 3, 4, Z, 1", b="N, 3, 4, 1, 4"),
        IMAGE,
        "in a shape that is not understood",
    ),
    "the product with the values is scaled": (
        SELF,
        HEADS
        + """
        scores = com.microsoft.FusedMatMul<transB = 1, alpha = 0.3>(q, k)
        weights = Softmax<axis = -1>(scores)
        y = com.microsoft.FusedMatMul<alpha = 0.5>(weights, v)""",
        "scaled (alpha)",
    ),
    "the sink's column in front, and the last one dropped": (
        SINK_FIRST[0],
        SINK_FIRST[1]
        .replace("  end = C", "  first = Constant<value = int64[1] {0}>() end = C")
        .replace("(p, one,", "(p, first,")
        .replace("{9223372036854775807}", "{-1}"),
        "not simply dropped",
    ),
}


def model_of(head: str, body: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f"{HEADER}{head} {{{body}\n}}")


def feeds(model: onnx.ModelProto, **sizes: int) -> dict[str, np.ndarray]:
    def shape(value: onnx.ValueInfoProto) -> list[int]:
        return [d.dim_value or sizes[d.dim_param] for d in value.type.tensor_type.shape.dim]

    return {v.name: RANDOM.standard_normal(shape(v)).astype(np.float32) / 2 for v in model.graph.input}


@pytest.mark.parametrize("name", RIGHT)
def test_fused_and_right(name: str, library: str) -> None:
    head, body, facts = RIGHT[name]
    model = model_of(head, body)
    fused, report = faexport.fuse(model)
    assert report.num_fused == 1, [str(site.refusal) for site in report.sites]
    assert facts <= {fact.text for fact in report.sites[0].facts}
    for sizes in SIZES:
        inputs = feeds(model, **sizes)
        np.testing.assert_allclose(run(fused, inputs, library)[0], run(model, inputs)[0], atol=2e-5)


@pytest.mark.parametrize("name", WRONG)
def test_near_misses(name: str) -> None:
    head, body, reason = WRONG[name]
    _, report = faexport.fuse(model_of(head, body))
    assert report.num_fused == 0
    assert reason in report.sites[0].refusal.reason


def test_each_block_of_a_model_that_onnxruntime_fused(library: str) -> None:
    """Its embedding gives the lengths that its attention ops read; each block's input is the output of the one in
    front, and the file states no shape."""
    model = model_of(
        "block (int32[B, S] ids, int32[B, S] pad, float[20, 32] table, float[32] one, float[32] none, "
        "float[32, 96] w, float[96] bias) => (float y)",
        """
        x, lengths, sum = com.microsoft.EmbedLayerNormalization(ids, , table, table, , one, none, pad)
        a = com.microsoft.Attention<num_heads = 4>(x, w, bias, lengths)
        n = com.microsoft.SkipLayerNormalization(a, x, one, none)
        b = com.microsoft.Attention<num_heads = 4>(n, w, bias, lengths)
        y = com.microsoft.SkipLayerNormalization(b, n, one, none)""",
    )
    fused, report = faexport.fuse(model)
    assert [site.fused for site in report.sites] == [True, True], [str(site.refusal) for site in report.sites]
    inputs = {n: RANDOM.standard_normal(s).astype(np.float32) / 3 for n, s in (("table", (20, 32)), ("w", (32, 96)))}
    inputs |= {"one": np.ones(32, np.float32), "none": np.zeros(32, np.float32), "bias": np.zeros(96, np.float32)}
    inputs["ids"] = RANDOM.integers(0, 20, (BATCH, ROWS)).astype(np.int32)
    inputs["pad"] = (np.arange(ROWS) < np.array([[3], [6]])).astype(np.int32)
    np.testing.assert_allclose(run(fused, inputs, library)[0], run(model, inputs)[0], atol=2e-5)


def test_names_that_shape_inference_gave(library: str) -> None:
    """A tool that ran onnx's shape inference leaves names of its own (unk__0) for sizes that it could not tell."""
    head, body, facts = RIGHT["positions cut from a table"]
    model = onnx.shape_inference.infer_shapes(model_of(head, body))
    names = {d.dim_param for v in model.graph.value_info for d in v.type.tensor_type.shape.dim}
    assert any(name.startswith("unk__") for name in names)
    fused, report = faexport.fuse(model)
    assert facts <= {fact.text for fact in report.sites[0].facts}
    inputs = feeds(model, B=2, S=6)
    np.testing.assert_allclose(run(fused, inputs, library)[0], run(model, inputs)[0], atol=2e-5)


@pytest.mark.parametrize("opset", [11, 12, 13, 15, 20])
def test_new_nodes_are_of_the_models_opset(opset: int, library: str) -> None:
    """Causal, and one key behind the others that every query sees: a mask that is computed anew."""
    head = "block (float[B, 4, S, 8] q, float[B, 4, S, 8] k, float[B, 4, 1, 8] more, float[B, 4, S, 8] v) => (float y)"
    body = """
        k1 = Concat<axis = 2>(k, more)
        v1 = Concat<axis = 2>(v, more)
        kt = Transpose<perm = [0, 1, 3, 2]>(k1)
        scores = MatMul(q, kt)
        AHEAD
        low = Constant<value = float {-inf}>()
        nothing = Constant<value = float {0.0}>()
        triangle = Where(ahead, low, nothing)
        pads = Constant<value = int64[4] {0, 0, 0, 1}>()
        mask = Pad(triangle, pads)
        masked = Add(scores, mask)
        weights = Softmax<axis = -1>(masked)
        y = MatMul(weights, v1)"""
    model = onnx.parser.parse_model(HEADER.replace("17", str(opset)) + f"{head} {{{body}\n}}".replace("AHEAD", AHEAD))
    fused, report = faexport.fuse(model)
    assert [fact.text for fact in report.sites[0].facts] == ["bool mask [1, 1, S_q, S_kv]"]
    inputs = feeds(model, B=2, S=6)
    np.testing.assert_allclose(run(fused, inputs, library)[0], run(model, inputs)[0], atol=2e-5)
