# SPDX-License-Identifier: Apache-2.0
"""Vectors that scale and shift what a normalization gives become its weights, and vectors stand second, for CUDA."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from tests.export import compared
from tests.export.compared import fuse_one
from tests.export.form_text import replaced

# A block of a diffusion transformer, whose normalization is scaled and shifted by what a time step becomes.
TEXT = """
<ir_version: 9, opset_import: ["": 18]>
block (float[batch, rows, 8] x, float[batch, 16] t) => (float[batch, rows, 8] y)
<int64[1] middle = {1}, float one = {1.0}>
{
  active = Relu (x)
  normal = LayerNormalization <axis = -1, epsilon = 0.001> (active, ones)
  part, other = Split <axis = 1, num_outputs = 2> (t)
  factor = Unsqueeze (part, middle)
  scale = Add (factor, one)
  shift = Unsqueeze (other, middle)
  scaled = Mul (normal, scale)
  w = Add (scaled, shift)
  k = Transpose <perm = [0, 2, 1]> (w)
  products = MatMul (w, k)
  weights = Softmax <axis = -1> (products)
  mixed = MatMul (weights, w)
  gated = Mul (factor, mixed)
  y = Add (x, gated)
}
"""


def model(*pieces: tuple[str, str]) -> onnx.ModelProto:
    made = parser.parse_model(replaced(TEXT, *pieces))
    stored = {"ones": np.ones(8), "twos": np.full(8, 2), "zeros": np.zeros(8), "vector": np.linspace(-1, 1, 8)}
    for name, array in stored.items():
        if any(name in node.input for node in made.graph.node):
            made.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    return made


def fused(given: onnx.ModelProto, **options: object) -> tuple[onnx.ModelProto, dict[str, list[onnx.NodeProto]]]:
    made = fuse_one(given, **{"target": "cuda", **options})
    return made, compared.nodes_by_kind(made)


def agree(given: onnx.ModelProto, made: onnx.ModelProto, library: str, sizes=((3, 5), (1, 5), (3, 1), (0, 4))) -> None:
    feeds = (compared.normal(rows, x=(batch, rows, 8), t=(batch, 16)) for batch, rows in sizes)
    compared.agree(given, made, library, feeds)


MODULATED = {
    "as it is": (),
    "the other way round": (
        ("Mul (normal, scale)", "Mul (scale, normal)"),
        ("Add (scaled, shift)", "Add (shift, scaled)"),
    ),
    "a bias of zeros": (("(active, ones)", "(active, ones, zeros)"),),
    "by its number": (("axis = -1, epsilon", "axis = 2, epsilon"),),
    "shapes that are read": (
        ("y = Add (x, gated)", "y = Add (x, gated) sizes = Shape (normal) more = Shape (scaled)"),
        (" y)", " y, int64[3] sizes, int64[3] more)"),
    ),
    "a sum that is read again": (
        ("active = Relu (x)", "more = Relu (x) active = Add (x, more)"),
        ("Add (x, gated)", "Add (active, gated)"),
    ),
}


@pytest.mark.parametrize("name", MODULATED)
def test_vectors_are_weights(name: str, library: str) -> None:
    given = model(*MODULATED[name])
    made, nodes = fused(given)
    (norm,) = nodes["LayerNormalization"]
    assert [value.split("_")[0] for value in norm.input[1:]] == ["scale", "shift"]
    assert {a.name: onnx.helper.get_attribute_value(a) for a in norm.attribute}["epsilon"] == pytest.approx(1e-3)
    agree(given, made, library)


PLAIN = {
    "weights of its own": (("(active, ones)", "(active, twos)"),),
    "a bias of its own": (("(active, ones)", "(active, ones, vector)"),),
    "read elsewhere": (("y = Add (x, gated)", "z = Relu (normal) y = Add (x, gated)"), (" y)", " y, float z)")),
    "scaled and read elsewhere": (
        ("y = Add (x, gated)", "z = Relu (scaled) y = Add (x, gated)"),
        (" y)", " y, float z)"),
    ),
    "mean, too": (("normal =", "normal, mean ="), ("y = Add (x, gated)", "z = Add (gated, mean) y = Add (x, z)")),
    "a vector of a row": (("scale = Add (factor, one)", "scale = Add (active, one)"),),
    "one vector for all entries": (("Add (scaled, shift)", "Add (scaled, vector)"),),
    "one entry's for all": (
        ("Add (scaled, shift)", "Add (scaled, first)"),
        ("int64[1] middle", "int64[1] front = {0}, int64[1] middle"),
        ("scaled = Mul", "first = Slice (shift, front, middle, front) scaled = Mul"),
    ),
    "a sum that nothing else reads": (("active = Relu (x)", "more = Relu (x) active = Add (x, more)"),),
    "of two axes": (
        ("axis = -1, epsilon", "axis = -2, epsilon"),
        ("rows, 8] x", "8, 8] x"),
        ("(active, ones)", "(active, square)"),
        ("int64[1] middle", "int64[2] all = {8, 8}, int64[1] middle"),
        ("normal =", "square = Expand (ones, all) normal ="),
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_other_normalizations_stay(name: str, library: str) -> None:
    given = model(*PLAIN[name])
    made, nodes = fused(given)
    norms = nodes["LayerNormalization"] + nodes["SkipLayerNormalization"]
    assert len(norms) == 1 and not any(value.startswith("scale") for value in norms[0].input)
    agree(given, made, library, sizes=((3, 8), (1, 8)) if name in ("of two axes",) else ((3, 5), (1, 5)))


def test_vectors_stand_second(library: str) -> None:
    given = model(("y = Add (x, gated)", "sum = Add (x, gated) y = Add (vector, sum)"))
    made, nodes = fused(given)
    assert [node.input[1] for node in nodes["Mul"] if node.output[0] == "gated"] == ["factor"]
    assert [node.input[1] for node in nodes["Add"] if node.output[0] == "y"] == ["vector"]
    agree(given, made, library)


@pytest.mark.parametrize("options", [{"target": "onnxruntime"}, {"rest": False}, {"target": "tensorrt"}])
def test_only_for_cuda(options: dict) -> None:
    made, nodes = fused(model(), **options)
    assert [node.input[0] for node in nodes["Mul"] if node.output[0] == "gated"] == ["factor"]
    assert nodes["LayerNormalization"][0].input[1] == "ones"
