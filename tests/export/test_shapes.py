# SPDX-License-Identifier: Apache-2.0
"""What the analysis concludes of shapes, where no site of the other tests shows it."""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir
from faexport.understand.shapes.analysis import Analysis

BEHIND_A_TABLE = """<ir_version: 8, opset_import: ["" : 17, "other" : 1]>
main (float[b, s, 8] x, float[128, 8] table) => (float[b, s, 8] y) {
    zero = Constant <value_ints = [0]> ()
    length = Shape <start = 1, end = 2> (x)
    positions = Slice (table, zero, length, zero)
    sum = Add (x, positions)
    own = other.Unknown (sum)
    y = Relu (own)
}"""


def test_a_size_that_the_file_calls_a_minimum_is_the_derived_one() -> None:
    """PyTorch's exporter calls it so behind a table of positions; other tensors have the size's own name."""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(BEHIND_A_TABLE))
    values = {value.name: value for node in model.graph for value in node.outputs}
    for name in ("sum", "own"):
        values[name].shape = ir.Shape(["b", "Min(128, s)", 8])
    analysis = Analysis(model)
    for name in ("sum", "own"):
        assert [str(size) for size in analysis.shape(values[name])] == ["b", "s", "8"], name


TWO_UNKNOWN_SIZES = """<ir_version: 8, opset_import: ["" : 17]>
main (float[b, s, 8] x) => (float[m, n] y) {
    target = Constant <value_ints = [-1, -1]> ()
    z = Reshape (x, target)
    y = Relu (z)
}"""


def test_a_reshape_to_two_unknown_sizes_has_no_shape() -> None:
    """No runtime takes it, so nothing is derived; that is no defect of the analysis."""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(TWO_UNKNOWN_SIZES))
    analysis = Analysis(model)
    assert analysis.shape(model.graph.node(1).outputs[0]) is None
    assert not analysis.defects


RESIDUALS = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
main (float16[b, s, 8] x, float16[8] weight) => (float16[b, s, 8] y) {
    normed, m, v, sum = com.microsoft.SkipLayerNormalization (x, x, weight)
    rms, n, w, more = com.microsoft.SkipSimplifiedLayerNormalization (normed, sum, weight)
    y = Add (rms, more)
}"""


def test_the_sum_beside_a_norm_has_the_type_of_what_is_added() -> None:
    """Models of onnxruntime-genai may say no type of values inside."""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(RESIDUALS))
    analysis = Analysis(model)
    values = {value.name: analysis.dtype(value) for node in model.graph for value in node.outputs}
    assert values["sum"] == values["more"] == values["normed"] == ir.DataType.FLOAT16
    assert values["m"] is None  # float32, which nobody asks for
