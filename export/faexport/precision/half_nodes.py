# SPDX-License-Identifier: Apache-2.0
"""Which nodes of a float32 model stay in float32 when it becomes float16 or bfloat16. Called by half_check.py.

By measurement: nodes that read or write a number above the type's range, on the inputs that the models are compared on,
with a margin since others may be larger. By what they compute: positions and what is made of them (the arguments of
sines, the buckets of relative positions), since float16 counts to 2,048 only, and bfloat16 to 256, which short inputs
don't show. By what onnxruntime runs: it has kernels in bfloat16 for some operators only.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from faexport.fallback.functions import add_fallback
from faexport.files import model_io, scratch
from faexport.graph.fused import is_fused, optional_outputs
from faexport.graph.nodes import op
from faexport.precision.half import prepared
from faexport.runtimes.ort_session import Job, ModelFailure, has_library
from faexport.verify.reference import Reference, needs_library
from faexport.verify.side_by_side_math import Emit

LARGEST = {ir.DataType.FLOAT16: 65504.0, ir.DataType.BFLOAT16: 3.3895e38}
MARGIN = 4.0  # a computed number may be this much larger on other inputs
# Operators that add their inputs before they do anything else; the sum is no tensor of the file.
SUMS = (
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "BiasGelu",
    "FastGelu",
    "BiasSplitGelu",
    "BiasAdd",
)
_CORE_INPUTS = 3  # queries, keys and values: our operator takes masks and biases of any float type
_FOLLOWS = {  # what keeps a position a position
    "Abs", "Add", "Cast", "Ceil", "Clip", "Concat", "Cos", "Div", "Exp", "Expand", "Flatten", "Floor", "Gather",
    "Identity", "Log", "Max", "Min", "Mod", "Mul", "Neg", "Pow", "Range", "Reciprocal", "Reshape", "Round", "Sin",
    "Slice", "Sqrt", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
# What moves and repeats numbers, and changes none.
_REPEATS = {"Expand", "Identity", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
# What onnxruntime's CUDA provider has kernels for in bfloat16, by its list of kernels, from OPSET_OF_BFLOAT16 on.
_IN_BFLOAT16 = {
    "Abs", "Add", "Cast", "Concat", "ConstantOfShape", "Div", "Dropout", "Erf", "Exp", "Expand", "Flatten", "Gather",
    "GatherElements", "GatherND", "Gelu", "Gemm", "Identity", "IsNaN", "LayerNormalization", "MatMul", "Max", "Min",
    "Mul", "Neg", "Pow", "RMSNormalization", "ReduceSum", "Relu", "Reshape", "RotaryEmbedding", "ScatterElements",
    "ScatterND", "Shape", "Sigmoid", "SimplifiedLayerNormalization", "Size", "Slice", "Softmax", "Split", "Sqrt",
    "Squeeze", "Sub", "Sum", "Tanh", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where", "com.microsoft::BiasGelu",
    "com.microsoft::FastGelu", "com.microsoft::FusedMatMul", "com.microsoft::Gelu", "com.microsoft::QuickGelu",
    "com.microsoft::RotaryEmbedding", "com.microsoft::SkipLayerNormalization",
    "com.microsoft::SkipSimplifiedLayerNormalization",
}  # fmt: skip
OPSET_OF_BFLOAT16 = 16
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.INT16, ir.DataType.INT8, ir.DataType.UINT8)


def find(
    path: os.PathLike[str] | str, reference: Reference, dtype: ir.DataType = ir.DataType.FLOAT16
) -> dict[str, str]:
    """Names of the nodes of prepared(path), each with the reason as the end of a sentence.

    Args:
        reference: has the inputs to measure on.
        dtype: what the model becomes, FLOAT16 or BFLOAT16.
    Raises ModelFailure or CannotRun where the model can't be run.
    """
    model = prepared(path)
    kept = dict.fromkeys(positions(model), "computes positions")
    sizes = {**_weights(model), **_measured(path, reference)}
    for node in model.graph:
        if node.name and (size := _largest(node, sizes)) > LARGEST[dtype]:
            kept[node.name] = f"has numbers up to {size:.3g}"
        elif node.name and dtype == ir.DataType.BFLOAT16 and not _runs_in_bfloat16(node):
            kept[node.name] = f"is {node.op_type}, which onnxruntime doesn't run in bfloat16"
        elif node.name and is_fused(node) and "lse" in optional_outputs(node):
            kept[node.name] = "returns its log-sum-exp, which is float32"
    return kept


def _runs_in_bfloat16(node: ir.Node) -> bool:
    floats = any(v is not None and v.dtype == ir.DataType.FLOAT for v in (*node.inputs, *node.outputs))
    return not floats or is_fused(node) or op(node) in _IN_BFLOAT16


def _largest(node: ir.Node, sizes: dict[str, float]) -> float:
    """The largest number that a node reads, writes or sums."""
    read = node.inputs[:_CORE_INPUTS] if is_fused(node) else node.inputs
    names = [value.name for value in (*read, *node.outputs) if value is not None and value.name]
    return max((sizes.get(name, 0.0) for name in (*names, _sum_of(node))), default=0.0)


def _sum_of(node: ir.Node) -> str:
    return f"the sum inside of {node.name}"


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A stored tensor, and the names of the nodes that move and repeat it: TorchScript repeats frequencies of rotary
    positions for each batch entry."""

    tensor: ir.TensorProtocol
    nodes: tuple[str, ...] = ()


def _stored(value: ir.Value, repeated: Mapping[ir.Value, _Stored]) -> _Stored | None:
    """What is stored for a value, which may be one of those that are `repeated`."""
    return repeated.get(value) or (None if value.const_value is None else _Stored(value.const_value))


def positions(model: ir.Model) -> Iterator[str]:
    """Names of the nodes that compute numbers from integers and constants alone, and of those that repeat these
    constants."""
    made: set[ir.Value] = set()
    repeated: dict[ir.Value, _Stored] = {}
    for node in model.graph:
        floats = [v for v in node.inputs if v is not None and v.dtype == ir.DataType.FLOAT]
        begins = op(node) in ("Cast", "Range") and node.outputs[0].dtype == ir.DataType.FLOAT and not floats
        begins = begins and all(v.dtype in _INTEGERS for v in node.inputs if v is not None)
        follows = any(v in made for v in floats) and all(v in made or _stored(v, repeated) is not None for v in floats)
        source = _stored(floats[0], repeated) if len(floats) == 1 and op(node) in _REPEATS else None
        if source is not None:
            repeated[node.outputs[0]] = _Stored(source.tensor, (*source.nodes, node.name or ""))
        elif begins or (follows and (op(node) in _FOLLOWS or _is_outer_product(node, repeated))):
            made.update(v for v in node.outputs if v.dtype == ir.DataType.FLOAT)
            repeating = (name for v in floats if v in repeated for name in repeated[v].nodes)
            yield from filter(None, (node.name, *repeating))


def _is_outer_product(node: ir.Node, repeated: Mapping[ir.Value, _Stored]) -> bool:
    """Each position times each of some constants: no sum, as in a linear layer."""
    if op(node) not in ("MatMul", "Einsum"):
        return False
    constants = [one.tensor for v in node.inputs if v is not None and (one := _stored(v, repeated)) is not None]
    return any(tensor.size == max(tensor.shape.numpy(), default=0) for tensor in constants)


def _weights(model: ir.Model) -> dict[str, float]:
    """The largest magnitudes of stored numbers."""
    found = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT:
            numbers = np.abs(tensor.numpy())
            found[name] = float(numbers[np.isfinite(numbers)].max(initial=0.0))
    return found


def _measured(path: os.PathLike[str] | str, reference: Reference) -> dict[str, float]:
    """The largest magnitudes of what the model computes on the reference's inputs, times MARGIN."""
    model = prepared(path)
    library = needs_library(model)
    if library and not has_library():
        add_fallback(model)
        library = False
    names = _measure(model)
    largest = np.zeros(len(names))
    given = {value.name for value in model.graph.inputs}
    with scratch.folder(what="range-") as folder:
        target = folder / "model.onnx"
        model_io.save(model, target)
        job = Job(os.fspath(target), optimize=False, library=library)
        with reference.open_session(job) as session:
            for index in reference.compared:
                tensors = reference.sets[index].tensors
                try:
                    (found,) = session.run({name: x for name, x in tensors.items() if name in given}).values()
                except ModelFailure:  # an empty input; the others tell enough
                    continue
                largest = np.maximum(largest, found)
    return dict(zip(names, MARGIN * largest, strict=True))


def _measure(model: ir.Model) -> Sequence[str]:
    """Makes the largest magnitudes the model's only output, and returns what they are of."""
    graph = model.graph
    emit = Emit(graph, graph)
    infinity, zero = (emit.constant(np.array(x, np.float32)) for x in (np.inf, 0))
    one = emit.constant(np.array([1], np.int64))

    def largest(value: ir.Value) -> ir.Value:
        size = emit("Abs", value)
        number = emit("Where", emit("Less", size, infinity), size, zero)
        return emit("Reshape", emit.largest(number), one)

    found: dict[str, ir.Value] = {}
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT and value.name:
            found[value.name] = largest(value)
    for node in list(graph):
        if node.name and node.name.startswith("faexport_check_"):
            break
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT and value.name:
                found[value.name] = largest(value)
        if node.op_type in SUMS:
            first, *others = [v for i, v in enumerate(node.inputs) if v is not None and i in _summed(node)]
            for other in others:
                first = emit("Add", first, other)
            found[_sum_of(node)] = largest(first)
    graph.outputs.clear()
    if found:
        graph.outputs.append(emit("Concat", *found.values(), axis=0))
        graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return list(found)


def _summed(node: ir.Node) -> tuple[int, ...]:
    """Inputs that are added: of a normalization the two tensors and the bias, without its weights."""
    return {"SkipLayerNormalization": (0, 1, 4), "SkipSimplifiedLayerNormalization": (0, 1, 3)}.get(
        node.op_type, (0, 1)
    )
