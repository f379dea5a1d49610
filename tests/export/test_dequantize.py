# SPDX-License-Identifier: Apache-2.0
"""Attention that onnxruntime's quantizer wrote with operators on quantized numbers: fused where the user agreed to it,
and put back as it was where it isn't fused in the end."""

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

AGREED = Options(assume_scores_unquantized=True)
NUMBERS = """one = Constant<value = float {0.02}>() some = Constant<value = float {0.3}>()
    small = Constant<value = float {0.0039}>() zero = Constant<value = int8 {3}>()
    low = Constant<value = int8 {-128}>()"""
EIGHT = "int8[2, 3, 12, 16] q8, int8[2, 3, 20, 16] k8, int8[2, 3, 20, 16] v8"
FLOATS = "float[2, 3, 12, 16] q, float[2, 3, 20, 16] k, float[2, 3, 20, 16] v"
SCORES = """kt = Transpose<perm = [0, 1, 3, 2]>(k8)
    s8 = QLinearMatMul(q8, one, zero, kt, one, zero, some, zero)"""
VALUES = """y8 = QLinearMatMul(p8, small, low, v8, one, zero, one, zero) y = DequantizeLinear(y8, one, zero)"""
SOFTMAX = "p8 = com.microsoft.QLinearSoftmax<axis = -1, opset = 13>(s8, some, zero, small, low)"
FORMS = {
    "QLinearMatMul": (
        EIGHT,
        f"""{NUMBERS} {SCORES} s = DequantizeLinear(s8, some, zero) p = Softmax<axis = -1>(s)
        p8 = QuantizeLinear(p, small, low) {VALUES}""",
    ),
    "QLinearSoftmax": (EIGHT, f"{NUMBERS} {SCORES} {SOFTMAX} {VALUES}"),
    "QLinearAdd": (
        f"{EIGHT}, int8[2, 1, 1, 20] m8",
        f"""{NUMBERS} {SCORES} t8 = com.microsoft.QLinearAdd(s8, some, zero, m8, one, zero, some, zero)
        {SOFTMAX.replace("s8,", "t8,")} {VALUES}""",
    ),
    "MatMulInteger": (
        FLOATS,
        """kt = Transpose<perm = [0, 1, 3, 2]>(k) q8, qs, qz = DynamicQuantizeLinear(q)
        k8, ks, kz = DynamicQuantizeLinear(kt) i = MatMulInteger(q8, k8, qz, kz) f = Cast<to = 1>(i)
        scale = Mul(qs, ks) s = Mul(f, scale) p = Softmax<axis = -1>(s) p8, ps, pz = DynamicQuantizeLinear(p)
        v8, vs, vz = DynamicQuantizeLinear(v) o = MatMulInteger(p8, v8, pz, vz) of = Cast<to = 1>(o)
        all = Mul(ps, vs) y = Mul(of, all)""",
    ),
}
LEFT = {"QLinearMatMul", "QLinearSoftmax", "QLinearAdd", "MatMulInteger", "Softmax"}


def model_of(name: str, more: str = "") -> onnx.ModelProto:
    inputs, body = FORMS[name]
    header = '<ir_version: 9, opset_import: ["" : 19, "com.microsoft" : 1]>'
    model = onnx.parser.parse_model(f"{header}\nblock ({inputs}) => (float y) {{{body} {more}\n}}")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    for number, node in enumerate(model.graph.node):
        node.name = f"node_{number}"
    return model


@pytest.mark.parametrize("name", FORMS)
def test_fused_with_consent(name: str, tmp_path: pathlib.Path, library: str) -> None:
    model = model_of(name)
    _, report = faexport.fuse(model)
    assert len(report.sites) == 1 and "quantized" in report.sites[0].refusal.reason
    fused, report = faexport.fuse(model, options=AGREED)
    assert report.num_fused == 1, report.sites
    assert not LEFT & {node.op_type for node in fused.graph.node}, "what only the old nodes read is there still"
    assert report.sites[0].name in {node.name for node in model.graph.node}
    paths = tmp_path / "a.onnx", tmp_path / "b.onnx"
    for path, content in zip(paths, (model, fused), strict=True):
        path.write_bytes(content.SerializeToString())
    found = model_check.verify(*paths, open_session=ort_session.SessionHere)
    assert found.status == "passed", found.reason
    rows = [row for row in found.sites if row.site]
    assert rows and all(row.quantization_error < row.original_quantization_error < 0.2 for row in rows), rows


@pytest.mark.parametrize("name", FORMS)
def test_the_operator_computes_attention_of_the_dequantized_numbers(name: str, library: str) -> None:
    """Against NumPy. Behind it stands the original's rounding of the output, a step of 0.02, or none."""
    model = model_of(name)
    fused, _ = faexport.fuse(model, options=AGREED)
    rng = np.random.default_rng(1)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    if name == "MatMulInteger":
        feeds = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
        numbers = [_dynamic(x) for x in feeds.values()]
    else:
        feeds = {n: rng.integers(-100, 100, shape).astype(np.int8) for n, shape in shapes.items()}
        numbers = [0.02 * (x.astype(np.float64) - 3) for x in feeds.values()]
    q, k, v, *masks = numbers
    scores = np.einsum("bhtd,bhsd->bhts", q, k) + sum(masks)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("bhts,bhsd->bhtd", weights / weights.sum(-1, keepdims=True), v)
    with ort_session.SessionHere(ort_session.Job(fused.SerializeToString(), library=True)) as session:
        got = session.run(feeds)["y"]
    step = 0.0 if name == "MatMulInteger" else 0.02
    assert np.abs(got - want).max() < step / 2 + 1e-5


def _dynamic(x: np.ndarray) -> np.ndarray:
    """DynamicQuantizeLinear and back."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * float(scale)


MORE = {
    "QLinearMatMul": "w = Cast<to = 1>(s8)",
    "QLinearSoftmax": "w = Cast<to = 1>(p8)",
    "QLinearAdd": "w = Cast<to = 1>(t8)",
    "MatMulInteger": "w = Identity(s)",
}


@pytest.mark.parametrize("name", FORMS)
def test_what_is_not_fused_is_as_it_was(name: str) -> None:
    """Scores or weights are an output of the model, too."""
    model = model_of(name, MORE[name])
    model.graph.output.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, None))
    fused, report = faexport.fuse(model, options=AGREED)
    assert report.num_fused == 0 and len(report.sites) == 1
    assert report.sites[0].refusal.node in {node.name for node in model.graph.node}
    before, after = (
        {node.name: (node.op_type, list(node.input), list(node.output)) for node in one.graph.node}
        for one in (model, fused)
    )
    assert after == before and "faexport.dequantized" not in {entry.key for entry in fused.metadata_props}


def test_products_with_weights_stay_quantized(library: str) -> None:
    """What is no block of attention isn't touched: a classifier's QLinearMatMul in front of a softmax."""
    header = '<ir_version: 9, opset_import: ["" : 19, "com.microsoft" : 1]>'
    body = f"""{NUMBERS} s8 = QLinearMatMul(q8, one, zero, w8, one, zero, some, zero)
        s = DequantizeLinear(s8, some, zero) y = Softmax<axis = -1>(s)"""
    model = onnx.parser.parse_model(f"{header}\nblock (int8[4, 8] q8, int8[8, 5] w8) => (float[4, 5] y) {{{body}\n}}")
    fused, report = faexport.fuse(model, options=AGREED)
    assert not report.sites and "QLinearMatMul" in {node.op_type for node in fused.graph.node}
