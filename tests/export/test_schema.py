# SPDX-License-Identifier: Apache-2.0
"""The schema: attributes are those of attributes.def, and onnx infers the shapes that docs/operator.md gives."""

from __future__ import annotations

import pathlib
import re

import onnx
import pytest
from faexport import schema
from faexport.fallback import functions
from onnx import TensorProto, helper

ROOT = pathlib.Path(__file__).parents[2]


def infer(query: list, key: list, value: list, *more: list, outputs: int = 1, **attributes: object) -> list[list]:
    """Shapes of the outputs, sizes as numbers and names as strings."""
    schema.register()
    shapes = [query, key, value, *more]
    inputs = [helper.make_tensor_value_info(f"i{n}", TensorProto.FLOAT16, shape) for n, shape in enumerate(shapes)]
    names = [f"o{n}" for n in range(outputs)]
    node = helper.make_node("FlashAttention", [value.name for value in inputs], names, domain="faexport", **attributes)
    empty = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in names]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("faexport", 1)]
    model = helper.make_model(helper.make_graph([node], "g", inputs, empty), opset_imports=opsets, ir_version=9)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    onnx.checker.check_model(inferred, full_check=True)
    tensors = [output.type.tensor_type for output in inferred.graph.output]
    return [[dim.dim_value or dim.dim_param for dim in tensor.shape.dim] for tensor in tensors]


def test_attributes_are_those_of_the_table() -> None:
    table = (ROOT / "csrc/include/fa/attributes.def").read_text()
    rows = re.findall(r"^FA_ATTRIBUTE\((\w+), (\w+),", table, re.M)
    assert [(row.type.name, row.name) for row in schema.attributes()] == rows
    made = schema.make_schema().attributes
    assert set(made) == {name for _, name in rows}
    assert made["left_window_size"].default_value.i == -1
    assert made["alignment"].default_value.s == b"onnx"


def test_the_documentation_has_the_table_of_attributes() -> None:
    page = (ROOT / "docs/operator.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| `?([^|`]+)`? \| ([^|]+) \|$", page.partition("## Attributes")[2], re.M)
    expected = []
    for row in schema.attributes():
        default = f"{row.default:g}" if isinstance(row.default, float) else str(row.default)
        expected.append((row.name, row.type.name, default if row.default not in ("", []) else "empty", row.meaning))
    assert rows == expected


def test_inputs_are_those_of_the_table() -> None:
    table = (ROOT / "csrc/include/fa/inputs.def").read_text()
    rows = re.findall(r"^FA_INPUT\(\w+, (\w+), (\w+),", table, re.M)
    assert [(row.name, row.dtypes) for row in schema.inputs()] == rows
    made = schema.make_schema()
    assert [parameter.name for parameter in made.inputs[:-1]] == [name for name, _ in rows[: schema.NUM_REQUIRED]]
    assert all(f"\n{name}: " in made.doc for name, _ in rows[schema.NUM_REQUIRED :])


def test_the_stand_in_function_knows_inputs_of_the_table_only() -> None:
    roles = functions.SUPPORTED - {"float_mask"}  # which is an attn_mask of floats
    assert {row.name for row in schema.inputs()} > roles


def test_names_of_optional_tensors_are_those_of_the_documentation() -> None:
    page = (ROOT / "docs/operator.md").read_text()
    inputs, outputs = page.split("| output | dtype", 1)
    named = re.findall(
        r"`(\w+)`", " ".join(line.split("|")[1] for line in inputs.splitlines() if line.startswith("| `"))
    )
    assert {row.name for row in schema.inputs()} == set(named)
    assert all(f"`{name}`" in outputs for name in schema.OPTIONAL_OUTPUTS)
    assert tuple(schema.OUTPUTS_MEAN) == schema.OPTIONAL_OUTPUTS


@pytest.mark.parametrize(
    ("query", "key", "value", "attributes", "expected"),
    [
        (["B", 8, "S", 64], ["B", 2, "T", 64], ["B", 2, "T", 32], {}, ["B", 8, "S", 32]),
        (["B", "S", 8, 64], ["B", "T", 8, 64], ["B", "T", 8, 64],
         {"query_layout": "BSHD", "key_layout": "BSHD", "value_layout": "BSHD"}, ["B", "S", 8, 64]),
        (["B", "S", 48], ["B", "T", 24], ["B", "T", 12], {"q_num_heads": 4, "kv_num_heads": 2}, ["B", "S", 24]),
        (["B", 8, "S", 64], ["B", 8, "T", 64], ["B", 8, "T", 64], {"output_layout": "BSH"}, ["B", "S", 512]),
        (["B", "S", 96], ["B", "S", 96], ["B", "S", 96],
         {"q_num_heads": 2, "kv_num_heads": 2, "packed_columns": [0, 16, 32, 16, 64, 16], "head_dim": 16},
         ["B", "S", 32]),
    ],
)  # fmt: skip
def test_output_shapes(query: list, key: list, value: list, attributes: dict, expected: list) -> None:
    assert infer(query, key, value, **attributes) == [expected]


def test_shapes_of_the_optional_outputs() -> None:
    fresh, past = ["B", 2, 3, 16], ["B", 2, 5, 16]
    shapes = infer(
        ["B", 8, 3, 16], fresh, fresh, past, past, outputs=4,
        optional_inputs="past_key, past_value", optional_outputs="present_key , present_value,lse",
    )  # fmt: skip
    assert shapes == [["B", 8, 3, 16], ["B", 2, 8, 16], ["B", 2, 8, 16], ["B", 8, 3]]


@pytest.mark.parametrize(
    ("past", "more", "attributes", "expected"),
    [
        (["B", 2, "C", 16], [], {"cache": "write"}, ["B", 2, "C", 16]),
        (["B", 2, 7, 16], [["B", 9]], {"cache": "write"}, ["B", 2, 9, 16]),
        (["B", 2, "C", 16], [["B", "T"]], {"cache": "write"}, ["B", 2, "", 16]),
        (["B", 7, 2, 16], [], {"cache": "window", "cache_layout": "BSHD"}, ["B", 7, 2, 16]),
        (["B", 7, 32], [], {"cache": "write", "cache_layout": "BSH"}, ["B", 7, 32]),
        (["N", 64, 2, 8], [], {"cache": "paged", "kv_cache_bit_width": 4}, ["N", 64, 2, 8]),
        (["B", 2, 5, 8], [], {"kv_cache_bit_width": 4}, ["B", 2, 8, 8]),
    ],
)
def test_shapes_of_caches(past: list, more: list, attributes: dict, expected: list) -> None:
    fresh = ["B", 2, 3, 16]
    names = ["past_key", "past_value", *["kv_extent"] * len(more)]
    shapes = infer(
        ["B", 8, 3, 16], fresh, fresh, past, past, *more, outputs=3, optional_inputs=",".join(names),
        optional_outputs="present_key,present_value", **attributes,
    )  # fmt: skip
    named = [["" if str(size).startswith("unk__") else size for size in shape] for shape in shapes]  # onnx's own names
    assert named[1:] == [expected, expected]


def test_contradictions_are_errors() -> None:
    four = ["B", 8, "S", 64]
    with pytest.raises(onnx.shape_inference.InferenceError, match="rank"):
        infer(four, four, four, query_layout="BSH", q_num_heads=8)
    with pytest.raises(onnx.shape_inference.InferenceError, match="BSDH"):
        infer(four, four, four, query_layout="BSDH")
    with pytest.raises(onnx.shape_inference.InferenceError, match="weights"):
        infer(four, four, four, outputs=2, optional_outputs="weights")


def test_what_another_domain_s_operator_makes_is_of_unknown_type() -> None:
    """onnx knows nothing of such values; nothing is inferred from them, and the model is no error."""
    schema.register()
    nodes = [
        helper.make_node("Unknown", ["x"], ["q"], domain="other"),
        helper.make_node("FlashAttention", ["q", "q", "q"], ["y"], domain="faexport", q_num_heads=4, kv_num_heads=4),
        helper.make_node("FlashAttention", ["x", "q", "q"], ["z"], domain="faexport", q_num_heads=4, kv_num_heads=4),
    ]
    x, y, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3, 32]) for name in "xyz")
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 17), ("faexport", 1), ("other", 1))]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y, z]), opset_imports=opsets, ir_version=9)
    onnx.checker.check_model(model, full_check=True)
