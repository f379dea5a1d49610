# SPDX-License-Identifier: Apache-2.0
"""Sums of embeddings in front of a normalization are joined where it is proven what indexes the tables."""

from __future__ import annotations

import pathlib

import faexport
import numpy as np
import onnx
import pytest
from faexport import pipeline
from faexport.files import model_io
from faexport.runtimes import ort_session
from faexport.verify import model_check
from onnx import TensorProto, helper, numpy_helper

from tests.export.test_projections import E, attention

LONGEST = 12  # positions


def embedded(change: str = "") -> onnx.ModelProto:
    """Attention of normalized embeddings of tokens, token types (all 0) and positions; BERT's, in short."""
    model, random = attention(), np.random.default_rng(0)
    graph = model.graph
    graph.input[0].CopyFrom(helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "rows"]))
    tables = {"tokens": (9, E), "types": (2, E), "positions": (LONGEST, E), "gamma": (E,), "beta": (E,)}
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in tables.items()}
    arrays |= {"zeros": np.zeros((1, LONGEST), np.int64), "all": np.arange(LONGEST)[None]}
    arrays |= {name: np.array([number]) for name, number in (("zero", 0), ("one", 1))}
    if change == "two token types":
        arrays["zeros"][0, 5:] = 1
    start = "one" if change == "one position" else "rows"
    nodes = [
        helper.make_node("Shape", ["ids"], ["sizes"]),
        helper.make_node("Shape", ["ids"], ["rows"], start=1),
        helper.make_node("Slice", ["all", "zero", start, "one", "one"], ["places"]),
        helper.make_node("Slice", ["zeros", "zero", "rows", "one", "one"], ["some"]),
        helper.make_node("Expand", ["some", "sizes"], ["kinds"]),
        helper.make_node("Gather", ["tokens", "ids"], ["token"]),
        helper.make_node("Gather", ["types", "kinds"], ["type"]),
        helper.make_node("Gather", ["positions", "places"], ["position"]),
        helper.make_node("Add", ["token", "type"], ["both"]),
        helper.make_node("Add", ["both", "position"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "gamma", "beta"], ["x"], axis=-1, epsilon=1e-12),
    ]
    if change == "deviations read":
        nodes[-1].output.extend(["mean", "deviation"])
        graph.output.append(helper.make_tensor_value_info("deviation", TensorProto.FLOAT, ["batch", "rows", 1]))
    if change == "sum read again":
        graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["batch", "rows", E]))
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return model


def fused(model: onnx.ModelProto, folder: pathlib.Path, **options: object) -> onnx.ModelProto:
    """The rewritten model, which was compared."""
    source, target = folder / "model.onnx", folder / "fused.onnx"
    onnx.save(model, source)
    result, found = faexport.fuse(source, options=pipeline.Options(**options))
    assert found.num_fused == 1
    model_io.save(result, target, source=source)
    given = model_check.InputSet("longer", {"ids": np.arange(2 * LONGEST).reshape(2, LONGEST) % 9})
    checked = model_check.verify(source, target, extra_inputs=[given], open_session=ort_session.SessionHere)
    assert checked.status == "passed", checked.reason
    return onnx.load(target)


def joined(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "SkipLayerNormalization"]


def test_token_types_that_are_all_zero_become_part_of_the_positions(tmp_path: pathlib.Path) -> None:
    made = fused(embedded(), tmp_path)
    (node,) = joined(made)
    assert node.input[0] == "token" and node.output[0] == "x"
    assert not {"kinds", "type", "both", "sum"} & {name for other in made.graph.node for name in other.output}


@pytest.mark.parametrize("change", ["two token types", "one position", "sum read again", "deviations read"])
def test_other_embeddings_stay(change: str, tmp_path: pathlib.Path) -> None:
    """Types that differ; one position for all rows, which onnxruntime's operator doesn't take; a sum that is needed."""
    assert not joined(fused(embedded(change), tmp_path))


def test_embeddings_stay_for_tensorrt(tmp_path: pathlib.Path) -> None:
    assert not joined(fused(embedded(), tmp_path, target="tensorrt"))
