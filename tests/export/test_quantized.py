# SPDX-License-Identifier: Apache-2.0
"""Sites with QuantizeLinear and DequantizeLinear between their products, in the forms that quantization tools write:
which are fused, what a user has to agree to, and what the comparison holds them to."""

from __future__ import annotations

import pathlib

import faexport
import numpy as np
import onnx
import onnx.parser
import pytest
from faexport.options import Options
from faexport.runtimes import ort_session
from faexport.verify import model_check

PASSED, FAILED = model_check.VerificationStatus.PASSED, model_check.VerificationStatus.FAILED
AGREED = Options(assume_scores_unquantized=True)
SHAPES = "[2, 3, 12, 8] q, {0}[2, 3, 20, 8] k, {0}[2, 3, 20, 8] v"  # fixed: onnxruntime crashes on empty ones
# The zero points say what is quantized to.
ZEROS = """zf = Constant<value = float {0.0}>() e4m3 = Cast<to = 17>(zf) int8 = Constant<value = int8 {0}>()
    uint8 = Constant<value = uint8 {3}>()"""


def number(name: str, value: float, type: str = "float") -> str:
    """A node that makes the number, and a Cast where the text knows no constants of the type."""
    if type == "float":
        return f"{name} = Constant<value = float {{{value}}}>()"
    return f"{number(f'{name}f', value)} {name} = Cast<to = 10>({name}f)"


def qdq(name: str, zero: str, scale: float, back: float | None = None, type: str = "float") -> str:
    """Nodes that quantize `name` and back, to `name`r."""
    scales = (number(f"{name}{end}", value, type) for end, value in (("s", scale), ("t", back or scale)))
    return f"""{" ".join(scales)}
        {name}8 = QuantizeLinear({name}, {name}s, {zero}) {name}r = DequantizeLinear({name}8, {name}t, {zero})"""


def modelopt(zero: str, weights: float, type: str = "float", wide: bool = False) -> str:
    """Queries, keys, weights and values as ModelOpt writes them; `wide`: products in float32 between Casts."""
    operands = [qdq(name, zero, 0.2, type=type) for name in ("qm", "km", "v")]
    product, total = ("s = MatMul(qmr, kmr)", "y = MatMul(pr, vr)")
    if wide:
        product = "qw = Cast<to = 1>(qmr) kw = Cast<to = 1>(kmr) sw = MatMul(qw, kw) s = Cast<to = 10>(sw)"
        total = "pw = Cast<to = 1>(pr) vw = Cast<to = 1>(vr) yw = MatMul(pw, vw) y = Cast<to = 10>(yw)"
    return f"""{ZEROS} {number("c", 0.6, type)}
        qm = Mul(q, c) kt = Transpose<perm = [0, 1, 3, 2]>(k) km = Mul(kt, c) {" ".join(operands)}
        {product} p = Softmax<axis = -1>(s) {qdq("p", zero, weights, type=type)} {total}"""


def model_of(body: str, type: str = "float", more: str = "", opset: int = 19) -> onnx.ModelProto:
    header = f'<ir_version: 9, opset_import: ["" : {opset}, "com.microsoft" : 1, "trt" : 1]>'
    inputs = type + SHAPES.format(type) + more
    model = onnx.parser.parse_model(f"{header}\nblock ({inputs}) => ({type} y) {{{body}\n}}")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


def fused_and_checked(
    model: onnx.ModelProto, folder: pathlib.Path, options: Options = Options(), change=lambda model: None
) -> tuple[faexport.Report, model_check.Verification]:
    """Fuses it and compares, after `change` was done to the outcome."""
    fused, report = faexport.fuse(model, options=options)
    change(fused)
    paths = folder / "a.onnx", folder / "b.onnx"
    for path, content in zip(paths, (model, fused), strict=True):
        path.write_bytes(content.SerializeToString())
    return report, model_check.verify(*paths, open_session=ort_session.SessionHere)


def facts(report: faexport.Report) -> list[str]:
    return [fact.text for site in report.sites for fact in site.facts]


@pytest.mark.parametrize(
    ("type", "wide"), [("float", False), ("float16", False), ("float16", True)], ids=["float32", "float16", "wide"]
)
def test_float8_weights_are_left_to_the_operator(type: str, wide: bool, tmp_path: pathlib.Path, library: str) -> None:
    """It rounds none: nearer to the model before it was quantized than the original is, and that is measured."""
    report, found = fused_and_checked(model_of(modelopt("e4m3", 1 / 36, type, wide), type), tmp_path)
    assert (report.num_fused, report.num_refused) == (1, 0)
    assert facts(report) == ["the attention weights are not rounded to float8e4m3fn as the original does"]
    assert found.status is PASSED, found.reason
    assert model_check.LEAVES_OUT in found.notes
    assert {row.by_stand_in for row in found.sites} == {False, True}
    for row in found.sites:
        assert 0.001 < row.quantization_error < row.original_quantization_error < 0.4
        assert row.ok and row.tolerance < 0.03  # not that of float8: the bound is that of all sites


@pytest.mark.parametrize("weights", [0.001, 4e-5, 1e6])
def test_float8_that_cuts_weights_off_or_loses_them_needs_consent(weights: float) -> None:
    """448 * 0.001 is the largest weight then; and of 1e6 the smallest that isn't 0 is 977."""
    model = model_of(modelopt("e4m3", weights))
    _, report = faexport.fuse(model)
    assert "the attention weights are quantized inside the block" in str(report.sites[0].refusal)
    _, report = faexport.fuse(model, options=AGREED)
    assert report.num_fused == 1 and "as was asked" in " ".join(facts(report))


@pytest.mark.parametrize("weights", [1 / 448, 0.95 / 448, 1.0])
def test_float8_that_reaches_from_0_to_1_needs_none(weights: float) -> None:
    _, report = faexport.fuse(model_of(modelopt("e4m3", weights)))
    assert report.num_fused == 1


def scaled(model: onnx.ModelProto) -> None:
    (node,) = (node for node in model.graph.node if node.domain == "faexport")
    (scale,) = (attribute for attribute in node.attribute if attribute.name == "scale")
    scale.f *= 1.05


def without_names(model: onnx.ModelProto) -> None:
    (node,) = (node for node in model.graph.node if node.domain == "faexport")
    del node.metadata_props[:]


@pytest.mark.parametrize("change", [scaled, without_names], ids=["another scale", "nothing said of what is left out"])
def test_the_comparison_still_fails_what_is_wrong(change, tmp_path: pathlib.Path, library: str) -> None:
    """A site 5 % off is no farther from the original than the rounding, and fails all the same; and a rounding that
    the file doesn't say to leave out counts."""
    _, found = fused_and_checked(model_of(modelopt("e4m3", 1 / 36)), tmp_path, change=change)
    assert found.status is FAILED and "compared by itself" in found.reason


INT8_WEIGHTS = modelopt("int8", 1 / 127)
SCORES = f"""{ZEROS} kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt) {qdq("s", "uint8", 0.3)}
    p = Softmax<axis = -1>(sr) {qdq("p", "e4m3", 1 / 448)} y = MatMul(pr, v)"""
# As onnxruntime writes it: a pair behind every node, the guard against NaN and the mask among them.
ALL = f"""{ZEROS} kt = Transpose<perm = [0, 1, 3, 2]>(k) {qdq("kt", "int8", 0.4)} s = MatMul(q, ktr)
    {qdq("s", "int8", 4.0)} m = Where(b, none, low) none = Constant<value = float {{0.0}}>()
    low = Constant<value = float {{-3.4e38}}>() {qdq("m", "int8", 1.3e36)} t = Add(sr, mr) {qdq("t", "int8", 1.3e36)}
    p = Softmax<axis = -1>(tr) {qdq("p", "uint8", 1 / 255)} i = IsNaN(pr) w = Where(i, none, pr)
    {qdq("w", "uint8", 1 / 255)} y = MatMul(wr, v)"""


@pytest.mark.parametrize(
    ("body", "more", "what", "said"),
    [
        (INT8_WEIGHTS, "", "attention weights", ["attention weights are not rounded to int8"]),
        (SCORES, "", "scores", ["scores are not rounded to uint8", "weights are not rounded to float8e4m3fn"]),
        (
            ALL.replace("m = Where(b, none, low) none = Constant<value = float {0.0}>()", "none = Constant<value = "
            "float {0.0}>()").replace("{-3.4e38}>()", "{-3.4e38}>() m = Where(b, none, low)"),
            ", bool[2, 1, 1, 20] b",
            "scores",
            ["scores are not", "masks are not rounded to int8", "weights are not rounded to uint8", "[B, 1, 1, S_kv]"],
        ),
    ],
    ids=["weights in int8", "scores", "everything"],
)  # fmt: skip
def test_what_needs_consent(
    body: str, more: str, what: str, said: list[str], tmp_path: pathlib.Path, library: str
) -> None:
    model = model_of(body, more=more)
    _, report = faexport.fuse(model)
    (refusal,) = (site.refusal for site in report.sites)
    assert f"the {what} are quantized inside the block" in refusal.reason
    assert "--assume scores-unquantized" in refusal.reason
    report, found = fused_and_checked(model, tmp_path, AGREED)
    assert report.num_fused == 1, report.sites
    texts = facts(report)
    assert all(any(words in text for text in texts) for words in said), texts
    assert found.status is PASSED, found.reason
    assert all(row.quantization_error < row.original_quantization_error for row in found.sites)


def test_a_mask_whose_scale_is_infinite(tmp_path: pathlib.Path, library: str) -> None:
    """As ModelOpt writes it for masks of finfo.min: the original's weights are all NaN, its guard makes 0 of them. With
    consent the mask is there again; without, the site has to stay."""
    body = f"""{ZEROS} none = Constant<value = float {{0.0}}>() low = Constant<value = float {{-3.4e38}}>()
        m = Where(b, none, low) huge = Constant<value = float {{3e38}}>() inf = Add(huge, huge)
        m8 = QuantizeLinear(m, inf, e4m3) mr = DequantizeLinear(m8, inf, e4m3)
        kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt) {qdq("s", "e4m3", 0.05)} t = Add(sr, mr)
        p = Softmax<axis = -1>(t) i = IsNaN(p) w = Where(i, none, p) {qdq("w", "e4m3", 1 / 36)} y = MatMul(wr, v)"""
    report, found = fused_and_checked(model_of(body, more=", bool[2, 1, 1, 20] b"), tmp_path, AGREED)
    assert report.num_fused == 1 and found.status is PASSED, found.reason
    assert all(row.quantization_error < 0.01 and row.original_quantization_error > 0.9 for row in found.sites)


WRONG = {
    "another scale back": f"""{ZEROS} kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt)
        p = Softmax<axis = -1>(s) {qdq("p", "e4m3", 1 / 36, back=1 / 35)} y = MatMul(pr, v)""",
    "scores with another scale back": f"""{ZEROS} kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt)
        {qdq("s", "int8", 0.1, back=0.2)} p = Softmax<axis = -1>(sr) y = MatMul(p, v)""",
    "another zero point back": f"""{ZEROS} kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt)
        p = Softmax<axis = -1>(s) {qdq("p", "uint8", 1 / 255)} two = Constant<value = uint8 {{2}}>()
        u = DequantizeLinear(p8, pt, two) y = MatMul(u, v)""",
    "quantized numbers that are read twice": f"""{ZEROS} kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt)
        {qdq("s", "int8", 0.1)} e = Cast<to = 1>(s8) p = Softmax<axis = -1>(sr) o = MatMul(p, v)
        r = ReduceSum(e) y = Add(o, r)""",
    "weights that are read quantized, too": f"""{ZEROS} kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt)
        p = Softmax<axis = -1>(s) {qdq("p", "e4m3", 1 / 36)} e = Cast<to = 1>(p8) o = MatMul(pr, v)
        r = ReduceSum(e) y = Add(o, r)""",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_more_than_a_rounding_stays(name: str) -> None:
    """Consent or not: and none goes unlisted."""
    _, report = faexport.fuse(model_of(WRONG[name]), options=AGREED)
    assert len(report.sites) == 1 and report.num_fused == 0, facts(report)
    assert "quantized" in report.sites[0].refusal.reason or "twice" in report.sites[0].refusal.reason


def test_the_pairs_of_exports_from_pytorch() -> None:
    """ModelOpt's own operators, which TensorRT reads. onnxruntime has no such operator, so nothing is compared."""
    pairs = [f"{n}8 = trt.TRT_FP8QuantizeLinear({n}, f) {n}r = trt.TRT_FP8DequantizeLinear({n}8, f)" for n in "qkvp"]
    body = f"""f = Constant<value = float {{0.01}}>() {" ".join(pairs[:3])} kt = Transpose<perm = [0, 1, 3, 2]>(kr)
        s = MatMul(qr, kt) p = Softmax<axis = -1>(s) {pairs[3]} y = MatMul(pr, vr)"""
    _, report = faexport.fuse(model_of(body, opset=17))
    assert report.num_fused == 1, report.sites
    assert facts(report) == ["the attention weights are not rounded to float8e4m3fn as the original does"]


def test_the_original_without_its_roundings_is_what_the_operator_computes(library: str) -> None:
    """Against NumPy, so that no part of ours judges itself."""
    model = model_of(SCORES)
    fused, _ = faexport.fuse(model, options=AGREED)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 3, rows, 8)).astype(np.float32) for rows in (12, 20, 20))
    scores = np.einsum("bhtd,bhsd->bhts", q, k)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("bhts,bhsd->bhtd", weights / weights.sum(-1, keepdims=True), v)
    with ort_session.SessionHere(ort_session.Job(fused.SerializeToString(), library=True)) as session:
        got = session.run({"q": q, "k": k, "v": v})["y"]
    np.testing.assert_allclose(got, want, atol=2e-6)
