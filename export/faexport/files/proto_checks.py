# SPDX-License-Identifier: Apache-2.0
"""What a file must be before anything else looks at it: names are text, tensors hold what their shapes say, nodes have
the inputs, outputs and attributes that their operators ask for. Called by model_io.py on the protobuf message.

onnx.checker refuses some models that runtimes take (operators of their own in ONNX's domain, nodes out of order), so
these are checks of our own: of all that the rest of the exporter relies on, and of nothing more.
"""

from __future__ import annotations

import functools
import graphlib
import math
from collections.abc import Iterable, Mapping

import onnx
import onnx_ir as ir
from onnx import AttributeProto, TensorProto
from onnx.defs import OpSchema

from faexport.errors import ModelError
from faexport.graph.nodes import ONNX_DOMAINS

_Graph = onnx.GraphProto | onnx.FunctionProto
_FunctionKey = tuple[str, str, str]  # domain, name, overload

# The field of a TensorProto that holds the numbers of a type where raw_data does not, and how many of the field's
# numbers make an element. Types that are not listed lie in int32_data.
_TYPED_FIELDS: dict[int, tuple[str, int]] = {
    TensorProto.FLOAT: ("float_data", 1),
    TensorProto.COMPLEX64: ("float_data", 2),
    TensorProto.DOUBLE: ("double_data", 1),
    TensorProto.COMPLEX128: ("double_data", 2),
    TensorProto.INT64: ("int64_data", 1),
    TensorProto.UINT32: ("uint64_data", 1),
    TensorProto.UINT64: ("uint64_data", 1),
    TensorProto.STRING: ("string_data", 1),
}


class _Malformed(Exception):
    """What is wrong, as the middle of a sentence."""


def check_proto(proto: onnx.ModelProto, name: str) -> None:
    """Raises ModelError, which begins with `name`, where the model is malformed or newer than this onnx."""
    _check_header(proto, name)
    try:
        _check_text("the model's description", proto.producer_name, proto.producer_version, proto.doc_string)
        _check_text("the model's domain", proto.domain, *(p.key for p in proto.metadata_props))
        _check_text("the model's metadata", *(p.value for p in proto.metadata_props))
        imports = _imports(proto.opset_import)
        functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
        if len(functions) < len(proto.functions):
            raise _Malformed("two of its functions have the same name")
        calls: dict[_FunctionKey, set[_FunctionKey]] = {}
        _check_graph(proto.graph, imports, functions, set())
        for key, function in functions.items():
            _check_text("the name of a function", *key)
            own = imports | _imports(function.opset_import)
            _check_graph(function, own, functions, calls.setdefault(key, set()))
        _check_recursion(calls)
    except _Malformed as wrong:
        raise ModelError(f"{name}: malformed model: {wrong}; export or copy the model again") from wrong


def _check_header(proto: onnx.ModelProto, name: str) -> None:
    if not proto.HasField("graph") or not proto.ir_version or not proto.opset_import:
        missing = "graph" if not proto.HasField("graph") else "IR version" if not proto.ir_version else "opset_import"
        raise ModelError(
            f"{name}: not a complete ONNX model (no {missing}), perhaps truncated; export or copy the model again"
        )
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{name}: IR version {proto.ir_version} is newer than {onnx.IR_VERSION}, the newest that "
            f"onnx {onnx.__version__} knows; update onnx (pip install -U onnx) or export for an older version"
        )
    newest = onnx.defs.onnx_opset_version()
    opset = max((entry.version for entry in proto.opset_import if entry.domain in ONNX_DOMAINS), default=1)
    if opset > newest:
        raise ModelError(
            f"{name}: opset {opset} is newer than {newest}, the newest that onnx {onnx.__version__} knows; "
            "update onnx (pip install -U onnx) or export for an older opset"
        )
    if opset < 1 or proto.ir_version < 1:
        what = f"opset {opset}" if opset < 1 else f"IR version {proto.ir_version}"
        raise ModelError(f"{name}: malformed model: there is no {what}; export or copy the model again")
    if proto.graph.sparse_initializer:
        sparse = proto.graph.sparse_initializer[0].values.name
        raise ModelError(f"{name}: the sparse initializer '{sparse}' is not supported; make it dense")


def _imports(entries: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in entries:
        _check_text("an imported domain", entry.domain)
        domain = "" if entry.domain in ONNX_DOMAINS else entry.domain
        if found.setdefault(domain, entry.version) != entry.version:
            raise _Malformed(f"it imports two versions of the domain '{domain}'")
    return found


def _check_text(what: str, *texts: str | bytes) -> None:
    """protobuf gives bytes where a string isn't UTF-8."""
    for text in texts:
        if isinstance(text, bytes):
            raise _Malformed(f"{what} is not UTF-8 ({text[:40]!r})")


def _check_recursion(calls: Mapping[_FunctionKey, set[_FunctionKey]]) -> None:
    try:
        graphlib.TopologicalSorter(calls).prepare()
    except graphlib.CycleError as error:
        raise _Malformed(f"the function '{error.args[1][0][1]}' calls itself") from error


# ---------------------------------------------------------------------------------------------------------- graphs


def _check_graph(
    graph: _Graph,
    imports: Mapping[str, int],
    functions: Mapping[_FunctionKey, onnx.FunctionProto],
    calls: set[_FunctionKey],
) -> None:
    """A graph or function and what is nested in it. `calls` collects the functions that are called."""
    pending: list[_Graph] = [graph]
    while pending:
        current = pending.pop()
        _check_names(current)
        for node in current.node:
            _check_node(node, imports, functions)
            key = (node.domain, node.op_type, node.overload)
            if key in functions:
                calls.add(key)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    pending.append(attribute.g)
                pending.extend(attribute.graphs)


def _check_names(graph: _Graph) -> None:
    """Every name is text, and no two values of one graph have the same."""
    _check_text("the name of a graph", graph.name)
    if isinstance(graph, onnx.GraphProto):
        inputs = [value.name for value in graph.input]
        outputs = [value.name for value in graph.output]
        for value in (*graph.input, *graph.output, *graph.value_info):
            _check_text("the name of a value", value.name)
            _check_text(f"a dimension of '{value.name}'", *_dimension_names(value.type))
        tensors = graph.initializer
    else:
        inputs, outputs, tensors = list(graph.input), list(graph.output), ()
        _check_text("an attribute of a function", *graph.attribute, *(a.name for a in graph.attribute_proto))
    _check_text("the name of a value", *inputs, *outputs)
    if "" in inputs or "" in outputs:
        raise _Malformed(f"an {'input' if '' in inputs else 'output'} of the graph '{graph.name}' has no name")
    made = _unique("input", inputs)
    made_here = _unique("initializer", [tensor.name for tensor in tensors])
    for tensor in tensors:
        _check_text("the name of a weight", tensor.name)
        _check_tensor(tensor, f"the weight '{tensor.name}'")
    _unique("output", outputs)
    for node in graph.node:
        for output in node.output:
            if not output:
                continue
            if output in made or output in made_here:
                raise _Malformed(f"the value '{_shown(output)}' is produced twice")
            made.add(output)


def _unique(what: str, names: list[str]) -> set[str]:
    found: set[str] = set()
    for name in names:
        if name in found:
            raise _Malformed(f"the {what} '{_shown(name)}' is there twice")
        found.add(name)
    return found


def _dimension_names(kind: onnx.TypeProto) -> list[str | bytes]:
    return [dim.dim_param for dim in kind.tensor_type.shape.dim if dim.HasField("dim_param")]


def _shown(name: str | bytes) -> str:
    return name if isinstance(name, str) else name.decode(errors="backslashreplace")


# ----------------------------------------------------------------------------------------------------------- nodes


def _check_node(
    node: onnx.NodeProto, imports: Mapping[str, int], functions: Mapping[_FunctionKey, onnx.FunctionProto]
) -> None:
    _check_text("the name of a node", node.name)
    _check_text(f"the operator of the node '{node.name}'", node.op_type, node.domain, node.overload)
    _check_text(f"a name at the node '{node.name}'", *node.input, *node.output, *(a.name for a in node.attribute))
    where = f"node '{node.name or next(iter(node.output), '')}' ({node.op_type})"
    if not node.op_type:
        raise _Malformed(f"{where} has no operator")
    seen: set[str] = set()
    for attribute in node.attribute:
        if attribute.name in seen:
            raise _Malformed(f"{where} has the attribute '{attribute.name}' twice")
        seen.add(attribute.name)
        if attribute.type == AttributeProto.UNDEFINED:
            raise _Malformed(f"{where} has an attribute '{attribute.name}' without a type")
        for tensor in (*([attribute.t] if attribute.HasField("t") else ()), *attribute.tensors):
            _check_tensor(tensor, f"the tensor of {where}")
    function = functions.get((node.domain, node.op_type, node.overload))
    if function is not None:
        if len(node.input) > len(function.input) or len(node.output) > len(function.output):
            raise _Malformed(f"{where} has more inputs or outputs than the function that it calls")
    elif node.domain in ONNX_DOMAINS:
        if "" not in imports:
            raise _Malformed(f"{where} is one of ONNX's operators, of which no opset is imported")
        schema = _schema(node.op_type, imports[""])
        if schema is not None and (wrong := _misuse(node, schema)):
            raise _Malformed(f"{where} {wrong}")


@functools.cache
def _schema(op_type: str, opset: int) -> OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None  # an operator of some runtime


@functools.cache
def _required(op_type: str, opset: int) -> tuple[tuple[int, ...], Mapping[str, tuple[int, bool]]]:
    """(places of inputs that must be there, attribute -> (type, must be there))."""
    schema = onnx.defs.get_schema(op_type, opset, "")
    single = OpSchema.FormalParameterOption.Single
    places = tuple(k for k, formal in enumerate(schema.inputs) if formal.option == single)
    # NOTE: onnx's stubs leave out what pybind11 gives each enumeration.
    types = {name: a.type.value for name, a in schema.attributes.items()}  # type: ignore[attr-defined]
    return places, {name: (types[name], a.required) for name, a in schema.attributes.items()}


def _misuse(node: onnx.NodeProto, schema: OpSchema) -> str:
    """How a node contradicts its operator's schema, or ""."""
    given = list(node.input)
    while given and not given[-1]:
        given.pop()  # inputs that are left out at the end
    if not schema.min_input <= len(given) <= schema.max_input:
        return f"has {len(given)} inputs; {_range(schema.min_input, schema.max_input)} are expected"
    places, attributes = _required(node.op_type, schema.since_version)
    if any(k >= len(given) or not given[k] for k in places):
        return "lacks an input that it needs"
    if not any(node.output):
        return "has no output"
    if len(node.output) > schema.max_output:
        return f"has {len(node.output)} outputs; {_range(schema.min_output, schema.max_output)} are expected"
    found = {a.name: a for a in node.attribute}
    for name, (kind, required) in attributes.items():
        attribute = found.get(name)
        if attribute is None and required:
            return f"lacks the attribute '{name}'"
        if attribute is not None and attribute.type != kind:
            return f"has an attribute '{name}' of another type than its operator's"
    return ""


def _range(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}" if most < 2**30 else f"{least} or more"


# --------------------------------------------------------------------------------------------------------- tensors


def _check_tensor(tensor: TensorProto, what: str) -> None:
    """The data is as long as type and shape say; of a file of its own, that it is named rightly."""
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        raise _Malformed(f"{what} has the unknown type {tensor.data_type}") from None
    if dtype is ir.DataType.UNDEFINED:
        raise _Malformed(f"{what} has no type")
    dims = tuple(tensor.dims)
    if any(size < 0 for size in dims):
        raise _Malformed(f"{what} has the shape {list(dims)}")
    if tensor.data_location == TensorProto.EXTERNAL:
        _check_location(tensor, what)
        return
    num_elements = math.prod(dims)
    if num_elements == 0:
        return
    if tensor.HasField("raw_data") and dtype is not ir.DataType.STRING:
        given, expected, unit = len(tensor.raw_data), -(-num_elements * dtype.bitwidth // 8), "bytes"
    else:
        field, per_element = _TYPED_FIELDS.get(tensor.data_type, ("int32_data", 1))
        packed = min(dtype.bitwidth, 8) if field == "int32_data" else 8  # several elements of 4 bits share a number
        given, expected = len(getattr(tensor, field)), -(-num_elements * per_element * packed // 8)
        unit = "numbers"
    if given != expected:
        raise _Malformed(f"{what} has {given} {unit} of data, and its shape {list(dims)} needs {expected}")


def _check_location(tensor: TensorProto, what: str) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    _check_text(f"the location of {what}", *entries, *entries.values())
    location = entries.get("location", "")
    if not location or "\0" in location:
        raise _Malformed(f"{what} lies in an external file that has no proper name ({location!r})")
    for key in ("offset", "length"):
        text = entries.get(key, "0")
        if not (text.isascii() and text.isdigit()):
            raise _Malformed(f"{what} lies in an external file at an {key} that is no number ({text[:40]!r})")
