# SPDX-License-Identifier: Apache-2.0
"""--dtype fp8: attention in float8 by measured factors, or by those that a model has. The rounding is computed a second
time with ml_dtypes and NumPy here, so that no part of ours judges itself."""

from __future__ import annotations

import dataclasses
import io
import pathlib
from collections.abc import Mapping

import faexport
import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import rich.console
from faexport import jobs
from faexport.options import Options
from faexport.precision import float8, float8_check
from faexport.report import html_page, terminal_view
from faexport.report.data import Float8, Float8Output, Float8Site, Report
from faexport.runtimes import ort_session
from faexport.verify import model_check

FP8 = Options(dtype=ir.DataType.FLOAT8E4M3FN)
HEADS, DIM, ROWS, KEYS = 4, 16, 24, 40
QKV = f"{{0}}[2, {HEADS}, {ROWS}, {DIM}] q, {{0}}[2, {{1}}, {KEYS}, {DIM}] k, {{0}}[2, {{1}}, {KEYS}, {DIM}] v"
PLAIN = """c = Constant<value = float {0.25}>() kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt) t = Mul(s, c)
    p = Softmax<axis = -1>(t) y = MatMul(p, v)"""
SOFTCAP = """c = Constant<value = float {0.25}>() cap = Constant<value = float {3.0}>()
    kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt) t = Mul(s, c) d = Div(t, cap) h = Tanh(d) u = Mul(h, cap)
    p = Softmax<axis = -1>(u) y = MatMul(p, v)"""


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models run in this process, which takes less time than starting others."""
    monkeypatch.setattr(ort_session, "Session", lambda job, timeout, device="": ort_session.SessionHere(job))


def model_of(body: str, inputs: str = "", type: str = "float", opset: int = 19) -> onnx.ModelProto:
    header = f'<ir_version: 9, opset_import: ["" : {opset}]>'
    given = inputs or QKV.format(type, HEADS)
    model = onnx.parser.parse_model(f"{header}\nblock ({given}) => ({type} y) {{{body}\n}}")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


def drawn(dtype: type = np.float32, key_mean: float = 0.0) -> dict[str, np.ndarray]:
    """Queries, keys and values; heads differ in their size, and columns of the keys have a mean of their own."""
    rng = np.random.default_rng(7)
    shapes = {"q": (2, HEADS, ROWS, DIM), "k": (2, HEADS, KEYS, DIM), "v": (2, HEADS, KEYS, DIM)}
    found = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    found = {name: x * (10.0 ** np.arange(x.shape[1]))[:, None, None] ** 0.5 / 10 for name, x in found.items()}
    found["k"] = found["k"] + key_mean * rng.standard_normal(DIM)
    return {name: x.astype(dtype) for name, x in found.items()}


def written(model: onnx.ModelProto, tensors: Mapping[str, np.ndarray] | None, folder: pathlib.Path, options=FP8):
    """The report, and the file."""
    source, target, given = folder / "a.onnx", folder / "a.fa.onnx", folder / "a.npz"
    onnx.save(model, source)
    if tensors is not None:
        np.savez(given, **tensors)
    report = faexport.optimize(source, target, options, inputs=given if tensors is not None else None)
    return report, onnx.load(target)


def outputs(model: onnx.ModelProto, tensors: Mapping[str, np.ndarray], library: bool = True) -> np.ndarray:
    job = ort_session.Job(model.SerializeToString(), library=library)
    with ort_session.SessionHere(job) as session:
        return session.run(tensors)["y"].astype(np.float64)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float = 0.25) -> np.ndarray:
    scores = scale * np.einsum("bhtd,bhsd->bhts", q, k)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bhsd->bhtd", weights / weights.sum(-1, keepdims=True), v)


def rounded(x: np.ndarray, moved: bool = False) -> np.ndarray:
    """To e4m3 by a factor for each head, from which its mean was taken where `moved`."""
    wide = x.astype(np.float64)
    mean = wide.mean(axis=(0, 2), keepdims=True) if moved else 0.0
    factor = np.abs(wide - mean).max(axis=(0, 2, 3), keepdims=True) / 448
    numbers = ((wide - mean) / factor).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    return numbers.astype(np.float64) * factor + mean


def distance(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sqrt(((x - y) ** 2).mean() / (y**2).mean()))


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_each_head_has_its_factor_and_keys_lose_their_mean(dtype: str, tmp_path: pathlib.Path, library: str) -> None:
    """The written file computes attention of the rounded numbers, and the report's distance is that of these."""
    number = "c = Constant<value = float {0.25}>()"
    half = "n = Constant<value = float {0.25}>() c = Cast<to = 10>(n)"
    body = PLAIN if dtype == "float" else PLAIN.replace(number, half)
    numpy_type = np.float32 if dtype == "float" else np.float16
    tensors = drawn(numpy_type, key_mean=5.0)
    report, model = written(model_of(body, type=dtype), tensors, tmp_path)
    assert report.verification.status == "passed" and report.float8.status == "passed"
    (site,) = report.float8.sites
    q, k, v = tensors.values()
    want, exact = attention(rounded(q), rounded(k, moved=True), rounded(v)), attention(q, k, v)
    got = outputs(model, tensors)
    assert distance(got, want) < (1e-5 if dtype == "float" else 0.03), "the rounding is another one"
    assert site.error == pytest.approx(distance(want, exact), rel=0.15) and 0.01 < site.error < 0.2
    assert distance(attention(rounded(q), rounded(k), rounded(v)), exact) > 1.3 * site.error, "the mean is no matter"
    assert distance(outputs(model, tensors, library=False), got) < 1e-3, "the stand-in computes something else"
    (output,) = report.float8.outputs
    assert output.name == "y" and output.error == pytest.approx(site.error, rel=0.05)


def test_keys_keep_their_mean_under_a_softcap(tmp_path: pathlib.Path, library: str) -> None:
    report, model = written(model_of(SOFTCAP), drawn(key_mean=0.3), tmp_path)
    assert "Sub" not in {node.op_type for node in model.graph.node} and report.float8.sites[0].left == ""
    _, model = written(model_of(PLAIN), drawn(key_mean=0.3), tmp_path)
    assert "Sub" in {node.op_type for node in model.graph.node}


PACKED = f"""one = Constant<value = int64[4] {{2, {ROWS}, 4, {DIM}}}>()
    two = Constant<value = int64[4] {{2, {ROWS}, 2, {DIM}}}>()
    q1 = MatMul(x, wq) k1 = MatMul(x, wk) v1 = MatMul(x, wv) q4 = Reshape(q1, one) k4 = Reshape(k1, two)
    v4 = Reshape(v1, two) q = Transpose<perm = [0, 2, 1, 3]>(q4) k5 = Transpose<perm = [0, 2, 1, 3]>(k4)
    v5 = Transpose<perm = [0, 2, 1, 3]>(v4) ax = Constant<value = int64[1] {{2}}>() k6 = Unsqueeze(k5, ax)
    v6 = Unsqueeze(v5, ax) many = Constant<value = int64[5] {{2, 2, 2, {ROWS}, {DIM}}}>() k7 = Expand(k6, many)
    v7 = Expand(v6, many) flat = Constant<value = int64[4] {{2, 4, {ROWS}, {DIM}}}>() k = Reshape(k7, flat)
    v = Reshape(v7, flat)"""  # fmt: skip


def test_columns_of_one_projection_and_grouped_heads(tmp_path: pathlib.Path, library: str) -> None:
    """Queries, keys and values lie in one tensor, which is rounded once, each column by its head's factor."""
    inputs = f"float[2, {ROWS}, 32] x"
    model = model_of(f"{PACKED} {PLAIN}", inputs)
    rng = np.random.default_rng(3)
    for name, columns in (("wq", 64), ("wk", 32), ("wv", 32)):
        weights = rng.standard_normal((32, columns)) * np.repeat(2.0 ** np.arange(columns // 16), 16)
        model.graph.initializer.append(onnx.numpy_helper.from_array((weights / 10).astype(np.float32), name))
    tensors = {"x": rng.standard_normal((2, ROWS, 32)).astype(np.float32)}
    report, made = written(model, tensors, tmp_path)
    assert report.float8.sites[0].left == "", report.float8
    (node,) = (node for node in made.graph.node if node.domain == "faexport")
    assert len(set(node.input[:3])) == 1 and sum(n.op_type == "QuantizeLinear" for n in made.graph.node) == 1
    error, original = report.float8.sites[0].error, outputs(model, tensors, library=False)
    assert 0.001 < error < 0.2 and distance(outputs(made, tensors), original) == pytest.approx(error, rel=0.1)


def test_stored_queries_are_measured_too(tmp_path: pathlib.Path, library: str) -> None:
    """As those that a model learnt, which no node makes."""
    tensors, model = drawn(), model_of(PLAIN)
    stored = onnx.numpy_helper.from_array(tensors.pop("q"), "q")
    del model.graph.input[0]
    model.graph.initializer.append(stored)
    report, _ = written(model, tensors, tmp_path)
    assert [site.left for site in report.float8.sites] == [""] and report.float8.sites[0].error > 0.001


def test_a_site_is_analysed_once_where_it_stands_and_once_beside_itself(
    tmp_path: pathlib.Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it can be converted is asked before the models are compared; then that is what is converted."""
    honest, seen = float8.site_of, []
    monkeypatch.setattr(float8, "site_of", lambda node, a: seen.append(node) or honest(node, a))
    written(model_of(PLAIN), drawn(), tmp_path)
    assert len(seen) == len(set(seen)) == 2


def test_a_site_that_is_not_what_it_says_keeps_its_precision(
    tmp_path: pathlib.Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factor that is 5 % off is no more than float8's own error, and is found."""
    honest = float8.quantized

    def wrong(*args, **kwargs):
        made = honest(*args, **kwargs)
        return dataclasses.replace(made, scales=[made.scales[0] * np.float32(1.05), *made.scales[1:]])

    monkeypatch.setattr(float8, "quantized", wrong)
    with pytest.raises(faexport.ModelError, match="not what float32 gives for the rounded numbers"):
        written(model_of(PLAIN), drawn(), tmp_path)


def test_what_float8_would_ruin_keeps_its_precision(
    tmp_path: pathlib.Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float8_check, "MOST_ERROR", 0.001)
    with pytest.raises(faexport.ModelError, match="float8 loses .* of its output there, more than"):
        written(model_of(PLAIN), drawn(), tmp_path)


@pytest.mark.parametrize(
    ("model", "given", "sentence"),
    [
        (model_of(PLAIN, opset=17), True, "opset=19"),
        (model_of(PLAIN), False, 'inputs="FILE.npz"'),
        (model_of(PLAIN, QKV.format("float", HEADS).replace(f", {DIM}]", ", 8]")), True, "heads have 8 columns"),
    ],
    ids=["opset", "inputs", "columns"],
)
def test_what_is_missing_is_said(
    model: onnx.ModelProto,
    given: bool,
    sentence: str,
    tmp_path: pathlib.Path,
    library: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "columns" not in sentence:  # what the file alone tells is said before anything is run
        monkeypatch.setattr(jobs, "make_reference", lambda *args, **more: pytest.fail("the original was run"))
    tensors = {name: x[..., :8] if "columns" in sentence else x for name, x in drawn().items()}
    with pytest.raises(faexport.ModelError, match=sentence):
        written(model, tensors if given else None, tmp_path)
    assert not (tmp_path / "a.fa.onnx").exists()


OWN = """zf = Constant<value = float {0.0}>() zero = Cast<to = 17>(zf) qs = Constant<value = float {0.02}>()
    ks = Constant<value = float {0.03}>() vs = Constant<value = float {0.04}>() q8 = QuantizeLinear(q, qs, zero)
    qr = DequantizeLinear(q8, qs, zero) kt = Transpose<perm = [0, 1, 3, 2]>(k) k8 = QuantizeLinear(kt, ks, zero)
    kr = DequantizeLinear(k8, ks, zero) v8 = QuantizeLinear(v, vs, zero) vr = DequantizeLinear(v8, vs, zero)
    c = Constant<value = float {0.25}>() s = MatMul(qr, kr) t = Mul(s, c) p = Softmax<axis = -1>(t)
    y = MatMul(p, vr)"""


def test_a_models_own_float8_numbers_are_taken_as_they_are(tmp_path: pathlib.Path, library: str) -> None:
    """No factor is measured, and nothing more is lost: also where keys are rearranged behind their rounding."""
    model = model_of(OWN)
    report, made = written(model, None, tmp_path)
    (site,) = report.float8.sites
    assert site.own_factors and site.left == "" and site.error < 1e-5
    (node,) = (node for node in made.graph.node if node.domain == "faexport")
    assert node.input[0] == "q8" and node.input[2] == "v8"
    assert "query_descale" in next(a for a in node.attribute if a.name == "optional_inputs").s.decode()
    assert distance(outputs(made, drawn()), outputs(model, drawn(), library=False)) < 1e-5


HALF = OWN.replace("qs = ", "qsf = ").replace("ks = ", "ksf = ").replace("vs = ", "vsf = ").replace("c = ", "cf = ")
CASTS = "qs = Cast<to = 10>(qsf) ks = Cast<to = 10>(ksf) vs = Cast<to = 10>(vsf) c = Cast<to = 10>(cf)"


@pytest.mark.parametrize(("wide", "is_exact"), [(1, True), (16, False)], ids=["float32", "bfloat16"])
def test_casts_around_the_products_leave_such_numbers_as_they_are(
    wide: int, is_exact: bool, tmp_path: pathlib.Path, library: str
) -> None:
    """ModelOpt writes them where products are to be summed in float32 (mha_accumulation_dtype). bfloat16 rounds."""
    body = HALF.replace("q8 =", f"{CASTS} q8 =").replace(
        "s = MatMul(qr, kr)",
        f"qw = Cast<to = {wide}>(qr) kw = Cast<to = {wide}>(kr) sw = MatMul(qw, kw) s = Cast<to = 10>(sw)",
    )
    body = body.replace(
        "y = MatMul(p, vr)",
        f"pw = Cast<to = {wide}>(p) vw = Cast<to = {wide}>(vr) yw = MatMul(pw, vw) y = Cast<to = 10>(yw)",
    )
    model = model_of(body, type="float16")
    _, report = faexport.fuse(model)
    assert report.num_fused == 1, report.sites
    assert any("made of float8 numbers" in note for note in report.notes) == is_exact
    if is_exact:
        report, made = written(model, None, tmp_path)
        (site,) = report.float8.sites
        assert site.own_factors and site.left == "" and site.error < 2e-3
        (node,) = (node for node in made.graph.node if node.domain == "faexport")
        assert node.input[0] == "q8" and node.input[2] == "v8"


def test_the_report_tells_of_such_numbers_where_float8_was_not_asked_for() -> None:
    _, report = faexport.fuse(model_of(OWN))
    assert any("of 1 site are made of float8 numbers" in note and "--dtype fp8" in note for note in report.notes)
    _, report = faexport.fuse(model_of(PLAIN))
    assert not any("float8" in note for note in report.notes)


def test_what_is_shown_of_float8() -> None:
    """On a terminal and as a page: equal layers are one row, with the largest distance."""
    sites = [Float8Site(f"layer.{n}", "", False, 0.01 * (n + 1)) for n in range(3)]
    sites.append(Float8Site("other", "it has sinks", False))
    output = Float8Output("logits", 0.034, 0.25)
    said = Float8(tuple(sites), (output,), "real.npz", model_check.VerificationStatus.FAILED, "it is another model")
    console = rich.console.Console(width=100, record=True, file=io.StringIO())
    for part in terminal_view.view(Report(float8=said)):
        console.print(part)
    for text in (console.export_text(), html_page.page(Report(float8=said), {})):
        for words in (
            "layer.0…2",
            "3 %",
            "other",
            "it has sinks",
            "logits",
            "3.4 %",
            "0.25",
            "real.npz",
            "another model",
        ):
            assert words in text, words


def test_a_file_is_measured_without_the_library(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the function that stands in for the operator."""
    monkeypatch.setattr(ort_session, "has_library", lambda: False)
    report, _ = written(model_of(PLAIN), drawn(), tmp_path)
    assert report.float8.status == "passed" and report.float8.sites[0].error < 0.2


def test_a_site_in_a_body_keeps_its_precision(tmp_path: pathlib.Path, library: str) -> None:
    """And a model where another one doesn't is written."""
    model = model_of(PLAIN)
    inner = onnx.parser.parse_graph("""inner () => (float z) { kt2 = Transpose<perm = [0, 1, 3, 2]>(k)
        s2 = MatMul(y, kt2) p2 = Softmax<axis = -1>(s2) z = MatMul(p2, v) }""")
    outer = onnx.parser.parse_graph("outer () => (float z2) { z2 = Identity(y) }")
    for graph in (inner, outer):
        graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.input.append(onnx.helper.make_tensor_value_info("b", onnx.TensorProto.BOOL, []))
    model.graph.node.append(onnx.helper.make_node("If", ["b"], ["w"], then_branch=inner, else_branch=outer))
    model.graph.output.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, None))
    report, _ = written(model, drawn() | {"b": np.array(True)}, tmp_path)
    left = [site.left for site in report.float8.sites]
    assert report.num_fused == 2 and "" in left and any("body of an If" in text for text in left)


def test_the_job_reports_a_model_without_onnxruntime(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_session, "missing_packages", lambda: "onnxruntime is not installed")
    onnx.save(model_of(PLAIN), tmp_path / "a.onnx")
    job = jobs.Job(tmp_path / "a.onnx", tmp_path / "b.onnx", FP8, check=False)
    with pytest.raises(faexport.ModelError, match="can't be computed in float8: onnxruntime is not installed"):
        jobs.run(job, faexport.Report(model="a.onnx"))
