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
from onnx.defs import OpSchema

from .spec import DOMAIN, OP_TYPE, VERSION, Layout

FLOAT_TYPES = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
OPTIONAL_TYPES = [*FLOAT_TYPES, "tensor(bool)", "tensor(int32)", "tensor(int64)"]
NUM_REQUIRED = 3  # query, key, value
OPTIONAL_OUTPUTS = {
    "present_key": "[B, H_kv, P + S, D]",
    "present_value": "[B, H_kv, P + S, D_v]",
    "lse": "[B, H_q, S_q] float32: natural log-sum-exp of the scores",
}
DOC = """Attention in one pass over the keys: softmax(softcap(scale * Q K^T) + bias, masked) V.
A superset of ONNX Attention. Inputs after value are named by optional_inputs, outputs after the first by
optional_outputs:
"""

Dim = int | str | None  # size, name, or unknown
_TEXT = r'("(?:[^"\\]|\\.)*")'
_INPUT_ROW = re.compile(rf"^FA_INPUT\((\w+), (\w+), (\w+), {_TEXT}, {_TEXT}\)\s*$")
_ROW = re.compile(r'^FA_ATTRIBUTE\((INT|FLOAT|STRING|INTS), (\w+), (.+?), ("(?:[^"\\]|\\.)*")\)\s*$')


@dataclasses.dataclass(frozen=True)
class Attribute:
    """A row of attributes.def."""

    name: str
    type: OpSchema.AttrType
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
        Attribute(name, OpSchema.AttrType.__members__[kind], _default(kind, default), ast.literal_eval(meaning))
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
    meanings = {row.name: f"{row.meaning}, {row.dtypes}, {row.shape}" for row in named} | OPTIONAL_OUTPUTS
    optional = _variadic("optional_in", "T_optional", "as optional_inputs names them", option)
    outputs = [
        OpSchema.FormalParameter("output", "T", "[B, H_q, S_q, D_v], [B, S_q, H_q, D_v] or [B, S_q, H_q * D_v]"),
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
            ("T", FLOAT_TYPES, "query, key, value and output have one type"),
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
    default = onnx.helper.make_attribute(row.name, row.default, attr_type=row.type.value)
    return OpSchema.Attribute(row.name, default, row.meaning)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Sizes of query, key or value, whatever its layout."""

    batch: Dim = None
    heads: Dim = None
    rows: Dim = None
    head_dim: Dim = None


def _infer(context: onnx.shape_inference.InferenceContext) -> None:
    node = _NodeView(context)
    head_dim, head_dim_v = node.packed_head_dims()
    query = node.tensor(0, "query_layout", node.integer("q_num_heads"), head_dim)
    key = node.tensor(1, "key_layout", node.integer("kv_num_heads"), head_dim)
    value = node.tensor(2, "value_layout", node.integer("kv_num_heads"), head_dim_v)
    layout = node.layout("output_layout", 0) if node.text("output_layout") else node.layout("query_layout", 0)
    if layout is not None:
        node.set_output(0, node.type(0), _output_shape(layout, query, value))
    places = {name: index for index, name in enumerate(OPTIONAL_OUTPUTS, start=1)}  # a missing one leaves a hole
    for name in filter(None, node.text("optional_outputs").split(",")):
        index = places.get(name, 0)
        if name == "lse":
            node.set_output(index, onnx.TensorProto.FLOAT, [query.batch, query.heads, query.rows])
        elif name in OPTIONAL_OUTPUTS:
            new = key if name == "present_key" else value
            rows = _add(node.past_rows(), new.rows)
            node.set_output(index, node.type(0), [new.batch, new.heads, rows, new.head_dim])
        else:
            raise onnx.shape_inference.InferenceError(
                f"optional_outputs names '{name}'; known are {', '.join(OPTIONAL_OUTPUTS)}"
            )


def _output_shape(layout: Layout, query: _Tensor, value: _Tensor) -> list[Dim]:
    if layout is Layout.BHSD:
        return [query.batch, query.heads, query.rows, value.head_dim]
    if layout is Layout.BSHD:
        return [query.batch, query.rows, query.heads, value.head_dim]
    return [query.batch, query.rows, _multiply(query.heads, value.head_dim)]


class _NodeView:
    """The node that is inferred, read through onnx's context."""

    def __init__(self, context: onnx.shape_inference.InferenceContext) -> None:
        self.context = context

    def _attribute(self, name: str) -> onnx.AttributeProto | None:
        attribute = self.context.get_attribute(name)
        return attribute if attribute is not None and attribute.name else None

    def integer(self, name: str) -> int:
        attribute = self._attribute(name)
        return attribute.i if attribute is not None else 0

    def text(self, name: str) -> str:
        attribute = self._attribute(name)
        return attribute.s.decode() if attribute is not None else ""

    def type(self, index: int) -> int:
        return self.context.get_input_type(index).tensor_type.elem_type

    def shape(self, index: int) -> list[Dim] | None:
        """None where even the rank is unknown."""
        if index >= self.context.get_num_inputs() or not self.context.has_input(index):
            return None
        tensor = self.context.get_input_type(index).tensor_type
        if not tensor.HasField("shape"):
            return None
        return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim]

    def layout(self, attribute: str, index: int) -> Layout | None:
        text = self.text(attribute)
        if text:
            if text not in set(Layout):
                raise onnx.shape_inference.InferenceError(f"{attribute} is '{text}'; it must be {', '.join(Layout)}")
            return Layout(text)
        shape = self.shape(index)
        return None if shape is None else Layout.BSH if len(shape) == 3 else Layout.BHSD

    def tensor(self, index: int, attribute: str, heads: int, head_dim: int) -> _Tensor:
        layout, shape = self.layout(attribute, index), self.shape(index)
        if layout is None or shape is None:
            return _Tensor(heads=heads or None, head_dim=head_dim or None)
        if len(shape) != len(layout):
            name = ("query", "key", "value")[index]
            raise onnx.shape_inference.InferenceError(
                f"{name} has rank {len(shape)}; its layout {layout} has rank {len(layout)}"
            )
        if layout is not Layout.BSH:
            return _Tensor(shape[0], shape[layout.index("H")], shape[layout.index("S")], shape[3])
        width = shape[2]
        per_head = head_dim or (width // heads if isinstance(width, int) and heads else None)
        return _Tensor(shape[0], heads or None, shape[1], per_head)

    def packed_head_dims(self) -> tuple[int, int]:
        """Of key and value with packed_columns, else zeros: then the shapes tell."""
        attribute = self._attribute("packed_columns")
        if attribute is None or not attribute.ints:
            return 0, 0
        return self.integer("head_dim"), self.integer("head_dim_v") or self.integer("head_dim")

    def past_rows(self) -> Dim:
        """Rows of past_key; 0 without a past, None where unknown."""
        names = [name for name in self.text("optional_inputs").split(",") if name]
        if "past_key" not in names:
            return 0
        shape = self.shape(3 + names.index("past_key"))
        return shape[2] if shape is not None and len(shape) == 4 else None

    def set_output(self, index: int, elem_type: int, shape: list[Dim]) -> None:
        if index < self.context.get_num_outputs() and self.context.has_output(index):
            self.context.set_output_type(index, onnx.helper.make_tensor_type_proto(elem_type, shape))


def _multiply(a: Dim, b: Dim) -> Dim:
    return a * b if isinstance(a, int) and isinstance(b, int) else None


def _add(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return b if a == 0 else None
