# SPDX-License-Identifier: Apache-2.0
"""Quantized attention: fused where queries, keys and values alone are quantized, else a row with the reason; and rows
for attention operators that are not read."""

from __future__ import annotations

import faexport
import onnx
import onnx.parser
import onnxruntime

from tests.export.form_text import PRODUCT, QKV, Form, checks_of

SCALES = """one = Constant<value = float {0.02}>() small = Constant<value = float {0.008}>()
    zero = Constant<value = int8 {0}>() half = Constant<value = uint8 {128}>() none = Constant<value = uint8 {0}>()"""
EIGHT = "int8[B, 3, T, 8] q8, int8[B, 3, S, 8] k8, int8[B, 3, S, 8] v8"


def qdq(name: str, scale: str = "one") -> str:
    """Nodes that quantize `name` and back, to `name`r."""
    return f"{name}8 = QuantizeLinear({name}, {scale}, zero) {name}r = DequantizeLinear({name}8, {scale}, zero)"


def in_float8(w: str, factor: str = "") -> Form:
    """Weights `w` in float8, by a scale with which they reach from 0 to 1, and no number above 1."""
    body = f"""{PRODUCT} {w} scale = Constant<value = float {{0.0023}}>()
    w8 = QuantizeLinear<output_dtype = 17>(w, scale) wr = DequantizeLinear(w8, scale) y = MatMul(wr, v)"""
    return Form(f"{QKV}{factor}", body, opset=21, reason="the attention weights are quantized")


RIGHT = {
    "queries, keys and values": Form(
        QKV,
        f"""{SCALES} {qdq("q")} {qdq("k")} {qdq("v")} kt = Transpose<perm = [0, 1, 3, 2]>(kr) s = MatMul(qr, kt)
        p = Softmax<axis = -1>(s) y = MatMul(p, vr)""",
    ),
}
WRONG = {
    "weights in float8, times a number": in_float8(
        "p = Softmax<axis = -1>(s) three = Constant<value = float {3}>() w = Mul(p, three)"
    ),
    "weights in float8, times numbers of keys": in_float8(
        "p = Softmax<axis = -1>(s) w = Mul(p, g)", ", float[B, 1, 1, S] g"
    ),
    "weights in float8, times numbers of rows": in_float8("p = Softmax<axis = -1>(s) w = Mul(p, g)", ", float[T, 1] g"),
    "scores": Form(
        QKV,
        f"{SCALES} {PRODUCT} {qdq('s')} p = Softmax<axis = -1>(sr) y = MatMul(p, v)",
        reason="the scores are quantized",
    ),
    "weights": Form(
        QKV,
        f"{SCALES} {PRODUCT} p = Softmax<axis = -1>(s) {qdq('p', 'small')} y = MatMul(pr, v)",
        reason="the attention weights are quantized",
    ),
    "scores and weights": Form(
        QKV,
        f"{SCALES} {PRODUCT} {qdq('s')} p = Softmax<axis = -1>(sr) {qdq('p', 'small')} y = MatMul(pr, v)",
        reason="the scores are quantized",
    ),
    "MatMulInteger": Form(
        QKV,
        f"""{SCALES} kt = Transpose<perm = [0, 1, 3, 2]>(k) q8, qs, qz = DynamicQuantizeLinear(q)
        k8, ks, kz = DynamicQuantizeLinear(kt) i = MatMulInteger(q8, k8, qz, kz) f = Cast<to = 1>(i)
        scale = Mul(qs, ks) s = Mul(f, scale) p = Softmax<axis = -1>(s) p8, ps, pz = DynamicQuantizeLinear(p)
        v8, vs, vz = DynamicQuantizeLinear(v) o = MatMulInteger(p8, v8, pz, vz) of = Cast<to = 1>(o)
        all = Mul(ps, vs) y = Mul(of, all)""",
        reason="multiplied as quantized numbers (MatMulInteger); see --assume scores-unquantized",
    ),
    "DynamicQuantizeMatMul": Form(
        QKV,
        f"""{SCALES} k8, ks, kz = DynamicQuantizeLinear(k) kt = Transpose<perm = [0, 1, 3, 2]>(k8)
        s = com.microsoft.DynamicQuantizeMatMul(q, kt, ks, kz) p = Softmax<axis = -1>(s) y = MatMul(p, v)""",
        reason="numbers (com.microsoft::DynamicQuantizeMatMul): fuse the model before onnxruntime's optimizer",
    ),
    "QLinearMatMul": Form(
        EIGHT,
        f"""{SCALES} kt = Transpose<perm = [0, 1, 3, 2]>(k8)
        s8 = QLinearMatMul(q8, one, zero, kt, one, zero, one, zero) s = DequantizeLinear(s8, one, zero)
        p = Softmax<axis = -1>(s) p8 = QuantizeLinear(p, small, zero)
        y8 = QLinearMatMul(p8, small, zero, v8, one, zero, one, zero) y = DequantizeLinear(y8, one, zero)""",
        reason="the scores are quantized",
    ),
    "QLinearSoftmax": Form(
        EIGHT,
        f"""{SCALES} kt = Transpose<perm = [0, 1, 3, 2]>(k8)
        s8 = QLinearMatMul(q8, one, zero, kt, one, zero, one, zero)
        p8 = com.microsoft.QLinearSoftmax<axis = -1, opset = 13>(s8, one, zero, small, zero)
        y8 = QLinearMatMul(p8, small, zero, v8, one, zero, one, zero) y = DequantizeLinear(y8, one, zero)""",
        reason="QLinearSoftmax",
    ),
    "QAttention": Form(
        "int8[B, S, 24] x8, int8[24, 72] w8, float[72] b",
        f"{SCALES} y = com.microsoft.QAttention<num_heads = 3>(x8, w8, b, one, one)",
        reason="QAttention is not read",
    ),
    "BiasSoftmax": Form(
        f"{QKV}, float[B, 1, 1, S] b",
        f"{PRODUCT} p = com.microsoft.BiasSoftmax<axis = 3, is_inner_broadcast = 0>(s, b) y = MatMul(p, v)",
        reason="BiasSoftmax",
    ),
}

test_fused_and_right = checks_of(RIGHT)
test_a_row_with_the_reason = checks_of(WRONG)


def test_a_softmax_that_classifies_has_no_row() -> None:
    """What follows it is no product with a computed tensor."""
    model = Form("float[B, 8] x, float[8, 4] w", "z = MatMul(x, w) y = Softmax<axis = -1>(z)").model()
    _, report = faexport.fuse(model)
    assert not report.sites


QUANTIZED = """<ir_version: 9, opset_import: ["": 17]>
g (float[B,2,T,8] q, float[B,2,S,8] k, float[B,2,S,8] v, int8[8,8] w, float ws) => (float[B,2,T,8] y) {
    a, a_scale, a_zero = DynamicQuantizeLinear (q) zero = Constant <value = int8 {0}> ()
    i = MatMulInteger (a, w, a_zero, zero) f = Cast <to = 1> (i) scale = Mul (a_scale, ws) qs = Mul (f, scale)
    b = QuantizeLinear (k, ws, zero) ks = DequantizeLinear (b, ws, zero)
    c = QuantizeLinear (v, ws) vs = DequantizeLinear (c, ws)
    kt = Transpose <perm = [0, 1, 3, 2]> (ks) s = MatMul (qs, kt) p = Softmax <axis = -1> (s) y = MatMul (p, vs)
}"""


def test_types_of_quantized_numbers_are_declared_as_they_are(library: str) -> None:
    """A file that declares another one does not load."""
    model = onnx.parser.parse_model(QUANTIZED)
    fused, report = faexport.fuse(model)
    assert report.num_fused == 1
    types = {value.name: value.type.tensor_type.elem_type for value in fused.graph.value_info}
    known = {"a": onnx.TensorProto.UINT8, "a_scale": onnx.TensorProto.FLOAT, "a_zero": onnx.TensorProto.UINT8}
    known |= {"b": onnx.TensorProto.INT8, "c": onnx.TensorProto.UINT8, "i": onnx.TensorProto.INT32}
    assert all(types.get(name, dtype) == dtype for name, dtype in known.items()), types
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(library)
    onnxruntime.InferenceSession(fused.SerializeToString(), options, providers=["CPUExecutionProvider"])
