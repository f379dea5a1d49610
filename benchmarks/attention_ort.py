# SPDX-License-Identifier: Apache-2.0
"""Contestants inside onnxruntime's CUDA provider, inputs and outputs bound on the device: the operator, the unfused
graph, ONNX's Attention, onnxruntime's MultiHeadAttention and GroupQueryAttention.

A float32 row has each contestant twice: "NAME TF32" with the provider's default, use_tf32=1, and "NAME float32"; the
operator once with each of its precisions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import faplugin
import numpy as np
import onnxruntime as ort
import torch
from attention_rows import Row, Tensors, draw
from onnx import TensorProto, helper, numpy_helper

ELEMENTS = {
    torch.float16: (TensorProto.FLOAT16, np.float16),
    torch.float32: (TensorProto.FLOAT, np.float32),
    torch.bool: (TensorProto.BOOL, np.bool_),
    torch.int64: (TensorProto.INT64, np.int64),
    torch.int32: (TensorProto.INT32, np.int32),
    torch.int8: (TensorProto.INT8, np.int8),
    torch.float8_e4m3fn: (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FN),  # NumPy has no such type
}
Contestant = Callable[[int], torch.Tensor]  # argument: which set of tensors; returns [B, S, H, D]


def _projected(tensors: Tensors) -> dict[str, torch.Tensor]:
    """[B, S, H·D], as a projection leaves them."""
    return {name: getattr(tensors, name).flatten(2) for name in ("query", "key", "value")}


def _faexport(row: Row, tensors: Tensors, precision: str = ""):
    inputs = _projected(tensors)
    if row.mask == "mask":
        inputs["attn_mask"] = tensors.mask
    elif row.mask == "lengths":
        inputs["nonpad_kv_seqlen"] = tensors.lengths
    if tensors.bias is not None:
        inputs["attn_bias"] = tensors.bias
    optional = [name for name in inputs if name not in ("query", "key", "value")]
    attributes = {"q_num_heads": row.num_heads, "kv_num_heads": row.kv_heads, "is_causal": int(row.is_causal)}
    if precision:
        attributes["float32_precision"] = precision
    node = helper.make_node(
        "FlashAttention", list(inputs), ["output"], domain="faexport", optional_inputs=",".join(optional), **attributes
    )
    return [node], inputs, []


def _unfused(row: Row, tensors: Tensors):
    inputs = {name: getattr(tensors, name).transpose(1, 2).contiguous() for name in ("query", "key", "value")}
    element = ELEMENTS[tensors.query.dtype][1]
    scale = numpy_helper.from_array(np.array(row.head_dim**-0.5, element), "scale")
    nodes = [
        helper.make_node("Transpose", ["key"], ["key_t"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["query", "key_t"], ["scores"]),
        helper.make_node("Mul", ["scores", "scale"], ["scaled"]),
    ]
    last, initializers = "scaled", [scale]
    if tensors.lengths is not None:
        inputs["mask"] = tensors.mask
        initializers.append(numpy_helper.from_array(np.array(-np.inf, element), "hidden"))
        nodes.append(helper.make_node("Where", ["mask", "scaled", "hidden"], ["masked"]))
        last = "masked"
    elif row.is_causal or tensors.bias is not None:
        causal = torch.full((row.seqlen, row.kv_len), float("-inf"), device="cuda", dtype=tensors.query.dtype).triu(1)
        inputs["bias"] = tensors.bias if tensors.bias is not None else causal
        nodes.append(helper.make_node("Add", ["scaled", "bias"], ["biased"]))
        last = "biased"
    nodes += [
        helper.make_node("Softmax", [last], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "value"], ["output"]),
    ]
    return nodes, inputs, initializers


def _attention(row: Row, tensors: Tensors):
    inputs, names = _projected(tensors), ["query", "key", "value"]
    if tensors.bias is not None or tensors.lengths is not None:
        mask = tensors.bias if tensors.bias is not None else tensors.mask
        inputs["mask"] = mask if tensors.bias is not None else mask.expand(-1, -1, row.seqlen, -1).contiguous()
        names.append("mask")
    attributes = {"q_num_heads": row.num_heads, "kv_num_heads": row.kv_heads, "is_causal": int(row.is_causal)}
    return [helper.make_node("Attention", names, ["output"], **attributes)], inputs, []


def _multi_head_attention(row: Row, tensors: Tensors):
    inputs, names = _projected(tensors), ["query", "key", "value"]
    if row.mask == "lengths":
        inputs["lengths"] = tensors.lengths.int()
        names += ["", "lengths"]
    elif row.mask == "mask":
        inputs["mask"] = tensors.mask[:, 0, 0].int().contiguous()
        names += ["", "mask"]
    elif tensors.bias is not None:
        inputs["bias"] = tensors.bias
        names += ["", "", "bias"]
    attributes = {"num_heads": row.num_heads, "unidirectional": int(row.is_causal)}
    return [helper.make_node("MultiHeadAttention", names, ["output"], domain="com.microsoft", **attributes)], inputs, []


def _group_query_attention(row: Row, tensors: Tensors):
    if not row.is_causal or row.mask:
        raise NotImplementedError("GroupQueryAttention is causal")
    inputs = _projected(tensors)
    inputs["seqlens_k"] = torch.full((row.batch_size,), row.kv_len - 1, dtype=torch.int32, device="cuda")
    total = numpy_helper.from_array(np.array([row.kv_len], np.int32), "total")
    names = ["query", "key", "value", "", "", "seqlens_k", "total"]
    attributes = {"num_heads": row.num_heads, "kv_num_heads": row.kv_heads}
    outputs = ["output", "present_key", "present_value"]
    return (
        [helper.make_node("GroupQueryAttention", names, outputs, domain="com.microsoft", **attributes)],
        inputs,
        [total],
    )


GRAPHS = {
    "ours": _faexport,
    "ours tf32": functools.partial(_faexport, precision="tf32"),
    "ours tf32x3": functools.partial(_faexport, precision="tf32x3"),
    "unfused": _unfused,
    "Attention": _attention,
    "MultiHeadAttention": _multi_head_attention,
    "GroupQueryAttention": _group_query_attention,
}


def _model(nodes, inputs: dict[str, torch.Tensor], initializers, rank: int) -> bytes:
    """Batch and lengths stay open, so that rows which differ in them alone share a session. NOTE: H·D is fixed, since
    onnx infers 0 for it where Attention's inputs leave it open, and the run then fails."""
    declared = [
        helper.make_tensor_value_info(
            name, ELEMENTS[t.dtype][0], [None, None, t.shape[2]] if t.ndim == 3 else [None] * t.ndim
        )
        for name, t in inputs.items()
    ]
    element = ELEMENTS[inputs["query"].dtype][0]
    outputs = [helper.make_tensor_value_info("output", element, [None] * rank)]
    outputs += [helper.make_tensor_value_info(name, element, [None] * 4) for name in nodes[-1].output[1:]]
    graph = helper.make_graph(nodes, "row", declared, outputs, initializers)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("faexport", 1), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@functools.lru_cache(maxsize=8)
def session(model: bytes | str, ours: bool, use_tf32: bool = True) -> ort.InferenceSession:
    """A CUDA session on PyTorch's current stream, so that PyTorch's events time it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if ours:
        faplugin.register(options)
    stream = str(torch.cuda.current_stream().cuda_stream)
    provider = {"user_compute_stream": stream, "use_tf32": str(int(use_tf32))}
    return ort.InferenceSession(model, options, providers=[("CUDAExecutionProvider", provider)])


def _graph_of(name: str) -> tuple[Callable, bool]:
    """What builds the contestant's graph, and whether its session may use TF32."""
    if name in GRAPHS:
        return GRAPHS[name], True
    base, _, precision = name.rpartition(" ")
    return GRAPHS[base], precision == "TF32"


def names_for(row: Row) -> list[str]:
    """The contestants of a row."""
    if row.dtype != "float32":
        return [name for name in GRAPHS if not name.startswith("ours ")]
    peers = ("unfused", "Attention", "MultiHeadAttention")
    return ["ours tf32", "ours tf32x3", *(f"{peer} {precision}" for peer in peers for precision in ("TF32", "float32"))]


def bind(
    made: ort.InferenceSession, inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]
) -> ort.IOBinding:
    binding = made.io_binding()
    for tensors, give in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
        for name, t in tensors.items():
            give(name, "cuda", 0, ELEMENTS[t.dtype][1], list(t.shape), t.data_ptr())
    for other in made.get_outputs():
        if other.name not in outputs:
            binding.bind_output(other.name, "cuda")
    return binding


def contestant(name: str, row: Row, sets: list[Tensors]) -> Contestant:
    """One graph in one session; the call enqueues one run on a set of tensors and waits for nothing."""
    made, bindings, views, kept = None, [], [], []
    build, use_tf32 = _graph_of(name)
    for tensors in sets:
        nodes, inputs, initializers = build(row, tensors)
        shape = inputs["query"].shape
        output = torch.full(shape, float("nan"), device="cuda", dtype=tensors.query.dtype)
        ours = name.startswith("ours")
        made = made or session(_model(nodes, inputs, initializers, len(shape)), ours, use_tf32)
        bindings.append(bind(made, inputs, {"output": output}))
        heads = (row.batch_size, row.seqlen, row.num_heads, row.head_dim)
        views.append(output.transpose(1, 2) if name.startswith("unfused") else output.view(heads))
        kept.append(inputs)  # the binding holds addresses only
    run_options = ort.RunOptions()
    run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def call(i: int) -> torch.Tensor:
        made.run_with_iobinding(bindings[i], run_options)
        return views[i]

    call.kept = kept
    return call


def contestants(row: Row, sets: list[Tensors], wanted: set[str]) -> dict[str, Contestant | str]:
    """By name a contestant, or the sentence that says why there is none."""
    found: dict[str, Contestant | str] = {}
    for name in names_for(row):
        if wanted and name not in wanted:
            continue
        try:
            found[name] = contestant(name, row, sets)
        except Exception as error:  # each runtime refuses in its own way
            found[name] = str(error).strip().splitlines()[-1][:200]
    return found


def memory_of_long_sequence() -> dict:
    """Device memory of one run at B1 H16 S32768 d64, beyond inputs and output."""
    small, row = Row(1, 16, 1024, 64, dtype="float16"), Row(1, 16, 32768, 64, dtype="float16")
    contestant("ours", small, [draw(small)])(0)  # the libraries' own memory, and the code of the same kernel
    tensors = draw(row)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    contestant("ours", row, [tensors])(0)
    torch.cuda.synchronize()
    extra = before - torch.cuda.mem_get_info()[0] - tensors.out.nbytes  # the contestant has an output of its own
    bound = sum(t.nbytes for t in (tensors.query, tensors.key, tensors.value, tensors.out))
    return {"row": row.name, "inputs_and_output_MiB": bound / 2**20, "extra_MiB": round(extra / 2**20, 1)}
