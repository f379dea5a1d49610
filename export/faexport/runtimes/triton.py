# SPDX-License-Identifier: Apache-2.0
"""The configuration of a model for NVIDIA's Triton server, config.pbtxt, made from the model's own inputs and outputs.
Called by deploy.py.

The fields are those of Triton's model_config.proto, against which a test parses what is written here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import onnx_ir as ir

from faexport.errors import ModelError

BACKEND = "onnxruntime"
TYPES = {
    ir.DataType.BOOL: "TYPE_BOOL",
    ir.DataType.UINT8: "TYPE_UINT8",
    ir.DataType.UINT16: "TYPE_UINT16",
    ir.DataType.UINT32: "TYPE_UINT32",
    ir.DataType.UINT64: "TYPE_UINT64",
    ir.DataType.INT8: "TYPE_INT8",
    ir.DataType.INT16: "TYPE_INT16",
    ir.DataType.INT32: "TYPE_INT32",
    ir.DataType.INT64: "TYPE_INT64",
    ir.DataType.FLOAT16: "TYPE_FP16",
    ir.DataType.FLOAT: "TYPE_FP32",
    ir.DataType.DOUBLE: "TYPE_FP64",
    ir.DataType.BFLOAT16: "TYPE_BF16",
    ir.DataType.STRING: "TYPE_STRING",
}


@dataclasses.dataclass(frozen=True)
class Serving:
    """How the model is served. `max_batch`: rows that Triton may put together; 0: it does not; None: 8 where it can."""

    name: str
    library: str = ""  # path of libfa_ort.so as the server sees it; empty: the model needs none
    max_batch: int | None = None
    instances: int = 1
    gpu: bool = False


def config(model: ir.Model, serving: Serving) -> str:
    """The text of config.pbtxt. Raises ModelError where an input, an output or a batch can't be served."""
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    outputs = list(model.graph.outputs)
    unbatched = _unbatched(inputs, outputs)
    if serving.max_batch and unbatched:
        raise ModelError(f"--max-batch {serving.max_batch}: {unbatched}; --max-batch 0 serves each request by itself")
    max_batch = (0 if unbatched else 8) if serving.max_batch is None else serving.max_batch
    kind = "KIND_GPU" if serving.gpu else "KIND_CPU"
    lines = [
        f"name: {json.dumps(serving.name)}",
        f"backend: {json.dumps(BACKEND)}",
        f"max_batch_size: {max_batch}",
        *(_tensor("input", value, max_batch > 0) for value in inputs),
        *(_tensor("output", value, max_batch > 0) for value in outputs),
        f"instance_group {{ count: {serving.instances} kind: {kind} }}",
    ]
    if max_batch:
        lines.append("dynamic_batching { }")
    if serving.library:
        lines.append(f"model_operations {{ op_library_filename: {json.dumps(serving.library)} }}")
    return "\n".join(lines) + "\n"


def _unbatched(inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> str:
    """Why requests can't be put together along axis 0, or ""."""
    first: dict[str, str] = {}
    for value in (*inputs, *outputs):
        if value.shape is None or not len(value.shape):
            return f"'{value.name}' has no axis for a batch"
        size = value.shape[0]
        if isinstance(size, int):
            return f"axis 0 of '{value.name}' has the fixed size {size}"
        first.setdefault(str(size.value), str(value.name))
    if len(first) > 1:
        sizes = ", ".join(f"'{name}' has '{size}'" for size, name in first.items())
        return f"axis 0 is not the same size everywhere: {sizes}"
    return ""


def _tensor(field: str, value: ir.Value, batched: bool) -> str:
    """One input or output. Triton knows no scalars: they are sent as one element, and reshaped."""
    if value.dtype not in TYPES:
        kind = value.dtype.name.lower() if value.dtype else str(value.type)
        raise ModelError(f"{field} '{value.name}' is of type {kind}, which Triton can't serve")
    if value.shape is None:
        raise ModelError(f"{field} '{value.name}' has no shape, which Triton needs; export the model with its rank")
    dims = [size if isinstance(size, int) else -1 for size in value.shape][batched:]
    if 0 in dims:
        raise ModelError(f"{field} '{value.name}' has an axis of size 0, which Triton can't serve")
    shown = ", ".join(map(str, dims or [1]))
    reshape = "" if dims else " reshape { shape: [ ] }"
    name = json.dumps(value.name, ensure_ascii=False)
    return f"{field} {{ name: {name} data_type: {TYPES[value.dtype]} dims: [ {shown} ]{reshape} }}"
