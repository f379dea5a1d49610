# SPDX-License-Identifier: Apache-2.0
"""Sites with QuantizeLinear and DequantizeLinear between their products, in the forms that quantization tools write:
which are fused, what a user has to agree to, and what the comparison holds them to."""

from __future__ import annotations

import pathlib

import faexport
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from faexport.around import quantized_moves
from faexport.graph.edits import Names
from faexport.options import Options
from faexport.runtimes import ort_session
from faexport.understand.shapes.analysis import Analysis
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


@pytest.mark.parametrize(
    ("axis", "scale"), [(1, "float {0.01}"), (3, "float {0.01}"), (1, "float[3] {0.01, 0.02, 0.03}")]
)
def test_an_axis_that_one_of_a_pair_leaves_out_is_the_default(axis: int, scale: str) -> None:
    """onnxruntime writes attributes that a file leaves out; of a single scale the axis says nothing."""
    body = f"""{ZEROS} f = Constant<value = {scale}>() kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt)
        p = Softmax<axis = -1>(s) p8 = QuantizeLinear<axis = {axis}>(p, f, ZERO) pr = DequantizeLinear(p8, f, ZERO)
        y = MatMul(pr, v)""".replace("ZERO", "e4m3" if "[3]" not in scale else "zeros")
    zeros = "none = Constant<value = float[3] {0.0, 0.0, 0.0}>() zeros = Cast<to = 17>(none)"
    _, report = faexport.fuse(model_of(f"{zeros} {body}"))
    assert report.num_fused == 1, report.sites


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


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray, softcap: float = 0.0, sinks=None) -> np.ndarray:
    """Attention in float64; `sinks` [H]."""
    scores = np.einsum("bhtd,bhsd->bhts", *(x.astype(np.float64) for x in (q, k)))
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    column = np.full(scores.shape[:-1] + (1,), -np.inf) if sinks is None else np.broadcast_to(
        sinks[:, None, None], scores.shape[:-1] + (1,))  # fmt: skip
    weights = np.exp(np.concatenate([scores, column], -1) - np.maximum(scores.max(-1, keepdims=True), column))
    return np.einsum("bhts,bhsd->bhtd", (weights / weights.sum(-1, keepdims=True))[..., :-1], v)


def drawn() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = {"q": 12, "k": 20, "v": 20}
    return {name: rng.standard_normal((2, 3, n, 8)).astype(np.float32) for name, n in rows.items()}


def outputs(model: onnx.ModelProto, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """As onnxruntime computes it, with its optimizations."""
    with ort_session.SessionHere(ort_session.Job(model.SerializeToString(), library=True)) as session:
        return session.run(tensors)["y"]


SOFTCAP = f"""{ZEROS} kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt) {qdq("s", "int8", 0.1)}
    tenth = Constant<value = float {{0.1}}>() fifty = Constant<value = int8 {{50}}>()
    five = DequantizeLinear(fifty, tenth, int8) d = Div(sr, five) h = Tanh(d) {qdq("h", "int8", 0.01)}
    u = Mul(hr, five) p = Softmax<axis = -1>(u) y = MatMul(p, v)"""
SINKS = f"""{ZEROS} kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt) {qdq("s", "int8", 0.1)}
    z = Constant<value = float[1, 3, 1, 1] {{0.53, -1.0, 2.0}}>() {qdq("z", "int8", 0.1)}
    target = Constant<value = int64[4] {{2, 3, 12, 1}}>() e = Expand(zr, target) {qdq("e", "int8", 0.1)}
    c = Concat<axis = -1>(sr, er) {qdq("c", "int8", 0.1)} p = Softmax<axis = -1>(cr) {qdq("p", "uint8", 1 / 255)}
    zero = Constant<value = int64[1] {{0}}>() last = Constant<value = int64[1] {{-1}}>()
    w = Slice(pr, zero, last, last) y = MatMul(w, v)"""


@pytest.mark.parametrize(
    ("body", "said", "options"),
    [
        (SOFTCAP, "softcap 5", {"softcap": 5.0}),
        (SINKS, "the sinks are not rounded to int8", {"sinks": np.array([0.53, -1.0, 2.0])}),
    ],
    ids=["a softcap whose number is stored quantized", "quantized sinks"],
)
def test_what_onnxruntime_quantizes_beside_the_scores(
    body: str, said: str, options: dict, tmp_path: pathlib.Path, library: str
) -> None:
    model = model_of(body)
    _, report = faexport.fuse(model)
    assert "the scores are quantized inside the block" in report.sites[0].refusal.reason
    report, found = fused_and_checked(model, tmp_path, AGREED)
    assert report.num_fused == 1, report.sites
    assert any(said in text for text in facts(report)), facts(report)
    assert found.status is PASSED, found.reason
    fused, _ = faexport.fuse(model, options=AGREED)
    tensors = drawn()
    np.testing.assert_allclose(outputs(fused, tensors), attended(*tensors.values(), **options), atol=2e-6)


def test_sinks_that_alone_are_quantized_need_consent() -> None:
    body = SINKS.replace("Concat<axis = -1>(sr, er)", "Concat<axis = -1>(s, er)").replace("(cr)", "(c)")
    body = body.replace("Slice(pr,", "Slice(p,")
    _, report = faexport.fuse(model_of(body))
    assert report.sites[0].refusal.reason.startswith("the sinks are quantized inside the block: --assume")
    _, report = faexport.fuse(model_of(body), options=AGREED)
    assert report.num_fused == 1, report.sites
    _, report = faexport.fuse(model_of(body.replace("(s, er)", "(s, e)")))
    assert report.num_fused == 1, "one number for each head is read as it is, rounded or not"


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("opset", [19, 21, 23])
def test_keys_that_are_quantized_transposed_load(opset: int, dtype: str, library: str) -> None:
    """The operator wants them in rows, and from opset 21 on onnxruntime's optimizer makes an invalid node of a
    Transpose behind the DequantizeLinear of int8."""
    pairs = " ".join(
        f"{name}8 = QuantizeLinear({name}, scale, zero) {name}r = DequantizeLinear({name}8, scale, zero)"
        for name in ("q", "kt", "v")
    )
    header = f'<ir_version: 10, opset_import: ["" : {opset}]>'
    inputs = "float[2, 3, 12, 8] q, float[2, 3, 8, 20] k, float[2, 3, 20, 8] v"
    model = onnx.parser.parse_model(
        f"""{header} block ({inputs}) => (float[2, 3, 12, 8] y) {{ kt = Neg(k) {pairs} s = MatMul(qr, ktr)
        p = Softmax<axis = -1>(s) y = MatMul(p, vr)\n}}"""
    )
    stored = {"scale": np.array(0.03, np.float32), "zero": np.array(0 if dtype == "int8" else 3, dtype)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in stored.items())
    fused, report = faexport.fuse(model)
    assert report.num_fused == 1
    tensors = drawn()
    zero, limits = (0 if dtype == "int8" else 3), np.iinfo(dtype)
    rounded = [np.clip(np.rint(x / np.float32(0.03)) + zero, limits.min, limits.max) - zero for x in tensors.values()]
    want = attended(*(x.astype(np.float64) * float(np.float32(0.03)) for x in rounded))
    tensors["k"] = -tensors["k"].transpose(0, 1, 3, 2)
    np.testing.assert_allclose(outputs(fused, tensors), want, atol=1e-5)


def test_what_says_the_type_of_dequantized_keys_is_kept() -> None:
    """A scale of float32 and numbers in float16, in front of a Transpose that goes in front of them."""
    body = """kr = DequantizeLinear<output_dtype = 10>(k, scale)
        s = MatMul(q, kr) p = Softmax<axis = -1>(s) y = MatMul(p, v)"""
    inputs = "float16[2, 3, 12, 8] q, int8[2, 3, 8, 20] k, float16[2, 3, 20, 8] v"
    header = '<ir_version: 11, opset_import: ["" : 23]>'
    model = onnx.parser.parse_model(f"{header} block ({inputs}) => (float16[2, 3, 12, 8] y) {{{body}\n}}")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.03, np.float32), "scale"))
    fused, report = faexport.fuse(model)
    assert report.num_fused == 1
    places = {name: node for node in fused.graph.node for name in node.output}
    (node,) = (node for node in fused.graph.node if node.domain == "faexport")
    dequantize = places[node.input[1]]
    assert (dequantize.op_type, places[dequantize.input[0]].op_type) == ("DequantizeLinear", "Transpose")
    assert [onnx.helper.get_attribute_value(attribute) for attribute in dequantize.attribute] == [10]


def test_a_scale_of_blocks_stays_where_its_blocks_are() -> None:
    """Even where one block is all there is."""
    text = """<ir_version: 11, opset_import: ["" : 23]> block (int8[1, 8] k, float[1, 1] scale) => (float[8, 1] y) {
        kr = DequantizeLinear<axis = 1, block_size = 8>(k, scale) y = Transpose<perm = [1, 0]>(kr)\n}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    quantized_moves.put_in_front(model, Analysis(model), Names(model))
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "Transpose"]


def test_a_reason_says_whether_consent_helps(library: str) -> None:
    """Of a product that nobody reads as one on floats: its scale differs from column to column."""
    body = f"""{ZEROS} kt = Transpose<perm = [0, 1, 3, 2]>(k8) one = Constant<value = float {{0.02}}>()
        s8 = QLinearMatMul(q8, one, int8, kt, SCALE, int8, one, int8) s = DequantizeLinear(s8, one, int8)
        p = Softmax<axis = -1>(s) y = MatMul(p, v)"""
    inputs = "int8[2, 3, 12, 8] q8, int8[2, 3, 20, 8] k8, float[2, 3, 20, 8] v, float[20] columns"
    for scale, helps in (("one", True), ("columns", False)):
        header = '<ir_version: 9, opset_import: ["" : 19]>'
        model = onnx.parser.parse_model(f"{header}\nblock ({inputs}) => (float y) {{{body.replace('SCALE', scale)}\n}}")
        model.graph.output[0].type.tensor_type.ClearField("shape")
        _, report = faexport.fuse(model)
        why = "the scores are quantized inside the block (QLinearMatMul)"
        assert report.sites[0].refusal.reason == f"{why}; see --assume scores-unquantized"
        _, report = faexport.fuse(model, options=AGREED)
        assert report.num_fused == helps
        if not helps:
            assert report.sites[0].refusal.reason == f"{why}, and not all around it is read as operators on floats"


WRONG = {
    "another scale back": f"""{ZEROS} kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt)
        p = Softmax<axis = -1>(s) {qdq("p", "e4m3", 1 / 36, back=1 / 35)} y = MatMul(pr, v)""",
    "scales of another axis back": f"""{ZEROS} three = Constant<value = float[3] {{0.01, 0.02, 0.03}}>()
        none = Constant<value = float[3] {{0.0, 0.0, 0.0}}>() zeros = Cast<to = 17>(none)
        kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt) p = Softmax<axis = -1>(s)
        p8 = QuantizeLinear(p, three, zeros) pr = DequantizeLinear<axis = 3>(p8, three, zeros) y = MatMul(pr, v)""",
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
