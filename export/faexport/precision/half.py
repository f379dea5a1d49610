# SPDX-License-Identifier: Apache-2.0
"""A float32 model in half precision, by the converter in onnxruntime's package (onnxruntime.transformers.float16).
Called by half_check.py.

The converter decides by the types that the file declares, so these are completed first. What it is told to keep it
keeps, but it puts Casts to float16 between two such nodes, through which a large number becomes infinite: these go.
Inputs of our operator that are float32 by definition stay so. It writes float16 only: for bfloat16 the types that it
wrote are changed, and stored numbers are rounded anew.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping

import ml_dtypes
import onnx
import onnx_ir as ir
import onnx_ir.external_data
import onnx_ir.passes.common as passes

from faexport import schema
from faexport.errors import ModelError
from faexport.fallback.functions import add_fallback, remove_fallback
from faexport.files import model_io
from faexport.graph.fused import is_fused, optional_inputs
from faexport.graph.nodes import HALVES
from faexport.graph.surgery import Builder
from faexport.precision import half_constants
from faexport.spec import NUM_REQUIRED
from faexport.understand.shapes.analysis import Analysis
from faexport.verify.widen import TYPE_ATTRIBUTES, in_float32


def prepared(source: os.PathLike[str] | str) -> ir.Model:
    """A model file as the converter needs it: without functions, each node under a name of its own (the same in each
    call), constants as initializers, and the type of every value written down as far as it is known.

    Raises ModelError where a body of If, Loop or Scan computes with float32, which the converter gets wrong.
    """
    model = model_io.load(source)
    remove_fallback(model)
    passes.InlinePass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.NameFixPass()(model)
    schema.register()
    passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    for node in model.graph.all_nodes():
        if node.graph is not model.graph and any(value.dtype == ir.DataType.FLOAT for value in node.outputs):
            raise ModelError(
                f"{os.fspath(source)}: a body of an If, Loop or Scan computes with float32 ('{node.name}'), which the "
                "converter to half precision doesn't support; leave out --fp16 or --bf16 (--dtype computes attention "
                "alone in it)"
            )
    analysis = Analysis(model)
    for node in model.graph:
        for value in node.outputs:
            if value.dtype is None and (dtype := analysis.dtype(value)) is not None:
                value.dtype = dtype
    return model


def convert(
    model: ir.Model,
    kept: Collection[str],
    *,
    keep_io_types: bool,
    fallback: bool,
    dtype: ir.DataType = ir.DataType.FLOAT16,
) -> ir.Model:
    """The model in half precision.

    Args:
        model: from prepared(); it is changed, and of no use afterwards.
        kept: names of nodes that stay in float32.
        keep_io_types: inputs and outputs of the model stay float32.
        fallback: carry the operator's function in standard operators.
        dtype: FLOAT16 or BFLOAT16.
    """
    from onnxruntime.transformers import float16  # slow to import

    half_constants.compute(model, kept)
    guards = _guard_float32_inputs(model, kept)
    onnx_ir.external_data.load_to_model(model)
    stored = _stored(model)
    proto = float16.convert_float_to_float16(
        ir.to_proto(model),
        keep_io_types=keep_io_types,
        disable_shape_infer=True,
        node_block_list=[*kept, *guards],
    )
    made = ir.from_proto(without_twins(proto))
    for value in made.graph.initializers.values():  # the converter declares each float16, what it kept float32, too
        if value.const_value is not None:
            value.dtype = value.const_value.dtype
    join_casts(made)
    if dtype == ir.DataType.BFLOAT16:
        _to_bfloat16(made, stored)
    for node in list(made.graph):
        if node.name in guards:
            ir.convenience.replace_all_uses_with(node.outputs[0], _input(node))
            made.graph.remove(node, safe=True)
    passes.RemoveUnusedNodesPass()(made)
    passes.TopologicalSortPass()(made)
    if fallback:
        add_fallback(made)
    return made


def without_twins(proto: onnx.ModelProto) -> onnx.ModelProto:
    """onnxruntime before 1.32 writes a cast to float32 once for each node that reads it, all of one name."""
    written: set[str] = set()
    nodes = []
    for node in proto.graph.node:
        if node.op_type != "Cast" or node.output[0] not in written:
            nodes.append(node)
        written.update(node.output)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def _stored(model: ir.Model) -> dict[tuple[str, str], ir.TensorProtocol]:
    """The numbers of a model: initializers by ("", name), tensors in attributes by the names of node and attribute."""
    found = {("", name): value.const_value for name, value in model.graph.initializers.items()}
    for node in model.graph:
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.TENSOR:
                found[node.name or "", name] = attribute.as_tensor()
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def _to_bfloat16(model: ir.Model, stored: Mapping[tuple[str, str], ir.TensorProtocol]) -> None:
    """Changes what the converter made float16, which the model had none of. `stored`: the numbers before."""
    for name, value in model.graph.initializers.items():
        if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT16:
            value.const_value = _rounded(stored["", name])
            value.dtype = ir.DataType.BFLOAT16
    for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs)):
        if value.dtype == ir.DataType.FLOAT16:
            value.dtype = ir.DataType.BFLOAT16
    for node in model.graph:
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.FLOAT16:
                node.attributes[name] = ir.AttrTensor(name, _rounded(stored[node.name or "", name]))
            elif name in TYPE_ATTRIBUTES and attribute.value == ir.DataType.FLOAT16:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.BFLOAT16))


def _rounded(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """In bfloat16."""
    return ir.tensor(tensor.numpy().astype(ml_dtypes.bfloat16), name=tensor.name)


def _input(node: ir.Node) -> ir.Value:
    """Of a node that has one."""
    value = node.inputs[0]
    assert value is not None
    return value


def _guard_float32_inputs(model: ir.Model, kept: Collection[str]) -> list[str]:
    """Puts an Identity, which is to be kept in float32, in front of those inputs that must be float32; returns their
    names. They go after the conversion."""
    guards: list[str] = []
    for node in [node for node in model.graph if node.name not in kept]:
        for index in _float32_inputs(node, kept):
            value = node.inputs[index]
            if value is None or value.dtype != ir.DataType.FLOAT:
                continue
            guard = ir.node("Identity", [value], name=f"faexport_float32_{len(guards)}")
            guard.outputs[0].name = guard.name
            model.graph.insert_before(node, guard)
            node.replace_input_with(index, guard.outputs[0])
            assert guard.name is not None
            guards.append(guard.name)
    return guards


def _float32_inputs(node: ir.Node, kept: Collection[str]) -> Iterator[int]:
    """The inputs that must be float32: the weights of a GroupNorm; of our operator those that are float32 by
    definition, and masks and tables that are computed in float32."""
    if node.op_type == "GroupNorm":
        yield from (1, 2)
    if not is_fused(node):
        return
    always = {row.name for row in schema.inputs() if row.dtypes == "FLOAT32"}
    either = {row.name for row in schema.inputs() if row.dtypes in ("FLOAT", "MASK")}
    for index, word in enumerate(optional_inputs(node), start=NUM_REQUIRED):
        value = node.inputs[index]
        made_by = value.producer() if value is not None else None
        if word in always or (word in either and made_by is not None and made_by.name in kept):
            yield index


def join_casts(model: ir.Model) -> None:
    """Where float32 is cast to float16 and back, the second Cast reads what the first one did; and stored numbers that
    are float32 are not cast to it."""
    for node in list(model.graph):
        if not _casts_to(node, ir.DataType.FLOAT):
            continue
        stored = _input(node).const_value  # the converter takes it for float16 where the file tells its type
        if stored is not None and stored.dtype == ir.DataType.FLOAT and not node.outputs[0].is_graph_output():
            ir.convenience.replace_all_uses_with(node.outputs[0], _input(node))
            continue
        before = _input(node).producer()
        if before is not None and _casts_to(before, ir.DataType.FLOAT16):
            source = _input(before)
            if source.dtype != ir.DataType.FLOAT:
                continue
            node.replace_input_with(0, source)
            if not node.outputs[0].is_graph_output():
                ir.convenience.replace_all_uses_with(node.outputs[0], source)


def _casts_to(node: ir.Node, dtype: ir.DataType) -> bool:
    return node.op_type == "Cast" and node.attributes.get_int("to", 0) == int(dtype)


def rounding(model: ir.Model, dtype: ir.DataType = ir.DataType.FLOAT16) -> ir.Model:
    """The arithmetic of a model in half precision on GPUs, in float32 on any machine: every tensor that is of this
    `dtype` in the file is computed in float32, as GPUs sum, and rounded to it (float16 is infinite above 65504).
    onnxruntime's CPU provider runs most float16 nodes in float32 and leaves these roundings out, and it runs hardly any
    bfloat16 ones. Our operator itself stays in half precision."""
    remove_fallback(model)
    graph = model.graph
    half = {
        value
        for node in graph
        for value in (*node.outputs, *node.inputs)
        if value is not None and value.dtype in HALVES
    }
    halves = {node: [n for n, value in enumerate(node.inputs) if value in half] for node in graph if is_fused(node)}
    in_float32(model)
    for node in list(graph):
        ours = node in halves
        build = Builder(model.opset_imports.get("", 0))
        for index in halves.get(node, ()):
            value = node.inputs[index]
            assert value is not None
            node.replace_input_with(index, build.cast(value, dtype))
        graph.insert_before(node, build.nodes)
        build = Builder(model.opset_imports.get("", 0))
        for value in node.outputs:
            if value not in half:
                continue
            uses = list(value.uses())
            narrow = value if ours else build.cast(value, dtype)
            value.dtype = dtype if ours else ir.DataType.FLOAT
            wide = build.cast(narrow, ir.DataType.FLOAT)
            for user, index in uses:
                user.replace_input_with(index, wide)
        graph.insert_after(node, build.nodes)
    passes.NameFixPass()(model)
    return model
