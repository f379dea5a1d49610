# SPDX-License-Identifier: Apache-2.0
"""The operator's schema for onnx: onnx.checker and onnx.shape_inference then know faexport::FlashAttention.

Attributes and inputs are read from attributes.def and inputs.def, the tables that both runtimes' adapters are compiled
from. Shapes follow docs/operator.md.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.resources
import re

import onnx
import onnx_ir as ir
from onnx.defs import OpSchema

from faexport.sizes.dims import Dim
from faexport.spec import DOMAIN, NUM_REQUIRED, OP_TYPE, VERSION, listed
from faexport.understand.shapes.rules_operator import OPTIONAL_OUTPUTS, output_dtype, output_shapes

FLOAT_TYPES = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
FLOAT8_TYPE = "tensor(float8e4m3fn)"
CACHE_TYPES = ["tensor(int8)", "tensor(uint8)", FLOAT8_TYPE]  # quantized
OPTIONAL_TYPES = [*FLOAT_TYPES, "tensor(bool)", "tensor(int32)", "tensor(int64)", *CACHE_TYPES]
OUTPUTS_MEAN = {
    "present_key": "[B, H_kv, P + S, D]",
    "present_value": "[B, H_kv, P + S, D_v]",
    "lse": "[B, H_q, S_q] float32: natural log-sum-exp of the scores",
}
DOC = """Attention in one pass over the keys: softmax(softcap(scale * Q K^T) + bias, masked) V.
A superset of ONNX Attention. Inputs after value are named by optional_inputs, outputs after the first by
optional_outputs:
"""

_TEXT = r'("(?:[^"\\]|\\.)*")'
_INPUT_ROW = re.compile(rf"^FA_INPUT\((\w+), (\w+), (\w+), {_TEXT}, {_TEXT}\)\s*$")
_ROW = re.compile(r'^FA_ATTRIBUTE\((INT|FLOAT|STRING|INTS), (\w+), (.+?), ("(?:[^"\\]|\\.)*")\)\s*$')


@dataclasses.dataclass(frozen=True)
class Attribute:
    """A row of attributes.def."""

    name: str
    type: ir.AttributeType
    default: int | float | str | list[int]
    meaning: str


@dataclasses.dataclass(frozen=True)
class Input:
    """A row of inputs.def."""

    name: str
    dtypes: str
    shape: str
    meaning: str


def table_rows(table: str, macro: str, pattern: re.Pattern[str]) -> list[tuple[str, ...]]:
    """The columns of a table's rows, in its order.

    Raises:
        ValueError: a row has another form.
    """
    rows = []
    for line in importlib.resources.files(__package__).joinpath(table).read_text("utf-8").splitlines():
        if not line.startswith(f"{macro}("):
            continue
        match = pattern.match(line)
        if match is None:
            raise ValueError(f"{table} has a row of another form: {line}")
        rows.append(match.groups())
    return rows


@functools.cache
def inputs() -> tuple[Input, ...]:
    """The rows of inputs.def, in its order: NUM_REQUIRED that are always there, then those of optional_inputs."""
    return tuple(
        Input(name, dtypes, ast.literal_eval(shape), ast.literal_eval(meaning))
        for _, name, dtypes, shape, meaning in table_rows("inputs.def", "FA_INPUT", _INPUT_ROW)
    )


@functools.cache
def attributes() -> tuple[Attribute, ...]:
    """The rows of attributes.def, in its order."""
    return tuple(
        Attribute(name, ir.AttributeType[kind], _default(kind, default), ast.literal_eval(meaning))
        for kind, name, default, meaning in table_rows("attributes.def", "FA_ATTRIBUTE", _ROW)
    )


def _default(kind: str, text: str) -> int | float | str | list[int]:
    value = ast.literal_eval(text.rstrip("f") if kind == "FLOAT" else text)
    return [int(item) for item in value.split(",") if item] if kind == "INTS" else value


def register() -> None:
    """Makes the operator known to onnx.checker and onnx.shape_inference of this process. May be called again."""
    if not onnx.defs.has(OP_TYPE, domain=DOMAIN):
        onnx.defs.register_schema(make_schema())


def make_schema() -> OpSchema:
    """The schema with type and shape inference; register() hands it to onnx."""
    option = OpSchema.FormalParameterOption
    required, named = inputs()[:NUM_REQUIRED], inputs()[NUM_REQUIRED:]
    tensors = [OpSchema.FormalParameter(row.name, "T", f"{row.meaning}, {row.shape}") for row in required]
    meanings = {row.name: f"{row.meaning}, {row.dtypes}, {row.shape}" for row in named} | OUTPUTS_MEAN
    optional = _variadic("optional_in", "T_optional", "as optional_inputs names them", option)
    outputs = [
        OpSchema.FormalParameter("output", "T_output", "[B, H_q, S_q, D_v], [B, S_q, H_q, D_v] or [B, S_q, H_q * D_v]"),
        _variadic("optional_out", "T_optional", "as optional_outputs names them", option),
    ]
    schema = OpSchema(
        OP_TYPE,
        DOMAIN,
        VERSION,
        DOC + "\n".join(f"{name}: {meaning}" for name, meaning in meanings.items()),
        inputs=[*tensors, optional],
        outputs=outputs,
        type_constraints=[
            ("T", [*FLOAT_TYPES, FLOAT8_TYPE], "query, key and value have one type"),
            ("T_output", [*FLOAT_TYPES, FLOAT8_TYPE], "T; beside float8e4m3fn that of output_dtype"),
            ("T_optional", OPTIONAL_TYPES, "masks, biases, lengths, caches"),
        ],
        attributes=[_schema_attribute(attribute) for attribute in attributes()],
    )
    schema.set_type_and_shape_inference_function(_infer)
    return schema


def _variadic(
    name: str, type_name: str, doc: str, option: type[OpSchema.FormalParameterOption]
) -> OpSchema.FormalParameter:
    return OpSchema.FormalParameter(
        name, type_name, doc, param_option=option.Variadic, is_homogeneous=False, min_arity=0
    )


def _schema_attribute(row: Attribute) -> OpSchema.Attribute:
    default = onnx.helper.make_attribute(row.name, row.default, attr_type=int(row.type))
    return OpSchema.Attribute(row.name, default, row.meaning)


def _infer(context: onnx.shape_inference.InferenceContext) -> None:
    shapes = [_shape(context, index) for index in range(context.get_num_inputs())]
    try:
        found = output_shapes(lambda name: _attribute(context, name), shapes)
    except ValueError as error:
        raise onnx.shape_inference.InferenceError(str(error)) from error
    kind = _elem_type(context, 0)
    if kind is None:
        return
    names = listed(str(_attribute(context, "optional_inputs") or ""))
    past = NUM_REQUIRED + names.index("past_key") if "past_key" in names else 0
    cache = _elem_type(context, past) if past < context.get_num_inputs() else kind
    output = int(output_dtype(ir.DataType(kind), str(_attribute(context, "output_dtype") or "")))
    for index, name in enumerate(("output", *OPTIONAL_OUTPUTS)):  # a missing one leaves a hole
        elem_type = {"lse": onnx.TensorProto.FLOAT, "output": output}.get(name, cache)
        if name in found and elem_type and index < context.get_num_outputs() and context.has_output(index):
            written = [None if size is None else _written(size) for size in found[name]]
            context.set_output_type(index, onnx.helper.make_tensor_type_proto(elem_type, written))


def _attribute(context: onnx.shape_inference.InferenceContext, name: str) -> int | str | list[int] | None:
    attribute = context.get_attribute(name)
    if attribute is None or not attribute.name:
        return None
    value = onnx.helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def _elem_type(context: onnx.shape_inference.InferenceContext, index: int) -> int | None:
    """None for what an operator makes that onnx knows no types of."""
    kind = context.get_input_type(index)
    return None if kind is None else kind.tensor_type.elem_type or None


def _shape(context: onnx.shape_inference.InferenceContext, index: int) -> tuple[Dim, ...] | None:
    """None where even the rank is unknown."""
    if not context.has_input(index):
        return None
    kind = context.get_input_type(index)
    if kind is None or not kind.tensor_type.HasField("shape"):
        return None
    return tuple(
        Dim.of(dim.dim_value)
        if dim.HasField("dim_value")
        else Dim.of(dim.dim_param)
        if dim.dim_param
        else Dim.unknown()
        for dim in kind.tensor_type.shape.dim
    )


def _written(size: Dim) -> int | str | None:
    """A number or a name as onnx has it; None for what is computed from several, and for what is unknown."""
    if size.const is not None:
        return size.const
    symbols = size.symbols
    alone = len(symbols) == 1 and size == Dim.of(next(iter(symbols))) and size.is_known
    return str(size) if alone else None
