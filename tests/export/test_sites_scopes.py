# SPDX-License-Identifier: Apache-2.0
"""Attention is found wherever it stands: bodies of If, Loop and Scan, model-local functions, files without shapes or
with shared weights."""

from __future__ import annotations

import faexport
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from faexport import pipeline
from faexport.pipeline import Options
from onnx import TensorProto, helper, numpy_helper

from tests.export.compared import OPTIONS, node_of, run
from tests.export.site_graphs import Form, build, feeds
from tests.export.test_sites import TOLERANCE

FLOAT = TensorProto.FLOAT


def check(model: onnx.ModelProto, inputs: dict, library: str, num_fused: int = 1) -> onnx.ModelProto:
    fused, report = faexport.fuse(model, options=OPTIONS)
    assert report.num_fused == num_fused, [str(site.refusal) for site in report.sites]
    for expected, got in zip(run(model, inputs), run(fused, inputs, library), strict=True):
        np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    return fused


def in_branch(form: Form) -> onnx.ModelProto:
    """The core in the then branch of an If; x and the weights are captured from outside."""
    model = build(form)
    inner = helper.make_graph(list(model.graph.node), "then", [], list(model.graph.output))
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["e"])], "else", [], [helper.make_tensor_value_info("e", FLOAT, None)]
    )
    node = helper.make_node("If", ["go"], ["out"], then_branch=inner, else_branch=other)
    inputs = [*model.graph.input, helper.make_tensor_value_info("go", TensorProto.BOOL, [])]
    outputs = [helper.make_tensor_value_info("out", FLOAT, None)]
    graph = helper.make_graph([node], "g", inputs, outputs, list(model.graph.initializer))
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=9)


@pytest.mark.parametrize("go", [True, False])
@pytest.mark.parametrize("form", [Form(), Form(kv_heads=2, mask="causal"), Form(packed="split", mask="where")])
def test_in_a_branch(form: Form, go: bool, library: str) -> None:
    inputs = feeds(build(form)) | {"go": np.array(go)}
    check(in_branch(form), inputs, library)


def test_in_a_loop(library: str) -> None:
    model = build(Form(output="merge"))
    body_in = [
        helper.make_tensor_value_info(n, t, None)
        for n, t in (("i", TensorProto.INT64), ("more", TensorProto.BOOL), ("x", FLOAT))
    ]
    body_in[0].type.tensor_type.shape.SetInParent()
    body_in[1].type.tensor_type.shape.SetInParent()
    keep = helper.make_node("Identity", ["more"], ["again"])
    body_out = [
        helper.make_tensor_value_info("again", TensorProto.BOOL, []),
        helper.make_tensor_value_info("y", FLOAT, None),
    ]
    body = helper.make_graph([keep, *model.graph.node], "body", body_in, body_out)
    loop = helper.make_node("Loop", ["times", "", "start"], ["end"], body=body)
    times = numpy_helper.from_array(np.array(3, np.int64), "times")
    start = helper.make_tensor_value_info("start", FLOAT, ["batch", "sequence", 32])
    graph = helper.make_graph(
        [loop], "g", [start], [helper.make_tensor_value_info("end", FLOAT, None)], [times, *model.graph.initializer]
    )
    check(
        helper.make_model(graph, opset_imports=model.opset_import, ir_version=9), {"start": feeds(model)["x"]}, library
    )


def test_in_a_function(library: str) -> None:
    """Two calls of one function that gets even the shapes of its Reshapes from the caller. It is inlined."""
    model = build(Form(scale="scores"))
    names = [w.name for w in model.graph.initializer]
    function = helper.make_function(
        "local", "Block", ["x", *names], ["y"], list(model.graph.node), list(model.opset_import)
    )
    calls = [helper.make_node("Block", [x, *names], [y], domain="local") for x, y in (("x", "h"), ("h", "z"))]
    outputs = [helper.make_tensor_value_info("z", FLOAT, None)]
    graph = helper.make_graph(calls, "g", list(model.graph.input), outputs, list(model.graph.initializer))
    imports = [*model.opset_import, helper.make_opsetid("local", 1)]
    whole = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=9)
    fused = check(whole, feeds(model), library, num_fused=2)
    assert not fused.functions


def test_functions_without_attention_stay() -> None:
    model = build(Form())
    function = helper.make_function(
        "local", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], list(model.opset_import)
    )
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.node.append(helper.make_node("Twice", ["x"], ["doubled"], domain="local"))
    model.graph.output.append(helper.make_tensor_value_info("doubled", FLOAT, None))
    fused, report = faexport.fuse(model, options=OPTIONS)
    assert report.num_fused == 1
    assert [f.name for f in fused.functions] == ["Twice"]


def test_without_any_shape(library: str) -> None:
    """An input of unknown rank: heads and scale are in the constants of the Reshapes."""
    model = build(Form())
    inputs = feeds(model)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    check(model, inputs, library)


def test_a_computed_scale_needs_a_known_head_size() -> None:
    """Without the size of x nothing tells what Shape(q)[-1] is."""
    model = build(Form(rank="single", scale="runtime"))
    model.graph.input[0].type.tensor_type.ClearField("shape")
    for weight in list(model.graph.initializer):
        if len(weight.dims) == 2:  # projections become inputs of unknown shape
            model.graph.initializer.remove(weight)
            model.graph.input.append(helper.make_tensor_value_info(weight.name, FLOAT, None))
    _, report = faexport.fuse(model, options=OPTIONS)
    assert report.num_fused == 0


def test_two_sites_sharing_key_and_value(library: str) -> None:
    """The second site reads what the first absorbed; nothing that is still needed may go."""
    model = build(Form(kv_heads=2))
    second = [onnx.NodeProto.FromString(n.SerializeToString()) for n in model.graph.node if n.name != "last"]
    query = next(n for n in model.graph.node if n.op_type == "MatMul")
    renamed = {n.output[0]: f"{n.output[0]}_second" for n in second if _depends(second, n, query.output[0])}
    copies = [n for n in second if n.output[0] in renamed]
    for node in copies:
        node.name += "_second"
        for names in (node.input, node.output):
            names[:] = [renamed.get(x, x) for x in names]
    before = next(n for n in model.graph.node if n.name == "last").input[0]
    model.graph.node.extend(copies)
    model.graph.output.append(helper.make_tensor_value_info(renamed[before], FLOAT, None))
    check(model, feeds(model), library, num_fused=2)


def _depends(nodes: list, node: onnx.NodeProto, value: str) -> bool:
    if value in node.output:
        return True
    return any(_depends(nodes, n, value) for n in nodes if set(n.output) & set(node.input))


def test_weights_that_others_read_stay(library: str) -> None:
    model = build(Form(kv_heads=2, repeat="gather"))
    index = next(n for n in model.graph.node if n.op_type == "Gather").input[1]
    model.graph.node.append(helper.make_node("Cast", [index], ["kept"], to=FLOAT))
    model.graph.output.append(helper.make_tensor_value_info("kept", FLOAT, None))
    check(model, feeds(model), library)


def test_dead_nodes_of_others_stay() -> None:
    model = build(Form())
    model.graph.node.append(helper.make_node("Relu", ["x"], ["nobody"], name="nobody"))
    fused, _ = faexport.fuse(model, options=OPTIONS)
    assert any(n.name == "nobody" for n in fused.graph.node)


def test_an_ir_model_is_changed_in_place() -> None:
    model = ir.from_proto(build(Form()))
    fused, report = faexport.fuse(model, options=Options(fallback=False))
    assert fused is model
    assert report.num_fused == 1


def test_a_path_gives_a_model(tmp_path) -> None:
    onnx.save(build(Form()), tmp_path / "m.onnx")
    fused, report = faexport.fuse(tmp_path / "m.onnx", options=OPTIONS)
    assert isinstance(fused, ir.Model)
    assert node_of(ir.to_proto(fused)).domain == "faexport"
    assert report.num_fused == 1


def test_a_site_that_is_never_there_is_examined_no_longer_than_the_graph_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A defect of ours would be one; it took all memory."""
    monkeypatch.setattr(pipeline, "is_current", lambda spec: False)
    _, report = faexport.fuse(build(Form()))
    assert report.num_fused == 0 and "is not in the graph; please report" in str(report.sites[0].refusal)
