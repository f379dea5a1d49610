# SPDX-License-Identifier: Apache-2.0
"""Models of one PagedAttention node, and running them step by step for the decoders of tests/decoding.py."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from tests import decoding
from tests.plugin import nodes

SLOTS = (
    "query", "key", "value", "past_key", "past_value", "cu_seqlens_q", "write_indices", "block_table", "cos_cache",
    "sin_cache", "slot_mapping", "sinks", "q_norm_weight", "k_norm_weight", "k_scale", "v_scale", "bounds",
)  # fmt: skip
OUTPUTS = ("output", "present_key", "present_value")
WEIGHTS = ("cos_cache", "sin_cache", "sinks", "q_norm_weight", "k_norm_weight", "k_scale", "v_scale")


def model_of(
    decoder: decoding.Decoder,
    tensors: Mapping[str, np.ndarray],
    *,
    packed: bool = False,
    **attributes: int | float | str,
) -> onnx.ModelProto:
    """The model of one node for tensors such as `arguments_of` gives; sizes that change from step to step are open.

    Args:
        packed: query, key and value lie side by side in the input "query".
        attributes: of the node, besides those that the decoder and the tensors tell.
    """
    given = {name: tensors[name] for name in SLOTS if name in tensors and not (packed and name in ("key", "value"))}
    names = [name if name in given else "" for name in SLOTS]
    while not names[-1]:
        names.pop()
    width = decoder.head_dim * (decoder.num_q_heads + 2 * decoder.num_kv_heads)
    widths = {"query": width} if packed else {}
    kind = "PER_CHANNEL" if decoder.per_channel else "PER_TENSOR"
    quantized = dict.fromkeys(("k_quant_type", "v_quant_type"), kind) if decoder.quantized else {}
    told = {"num_heads": decoder.num_q_heads, "kv_num_heads": decoder.num_kv_heads, "softcap": decoder.softcap}
    told |= {"do_rotary": int(bool(decoder.rotary)), "rotary_interleaved": int("interleaved" in decoder.rotary)}
    told |= {"local_window_size": decoder.window_left + 1} if decoder.window_left >= 0 else {}
    outputs = OUTPUTS
    node = helper.make_node(
        "PagedAttention", names, outputs, "paged", domain="com.microsoft", **{**told, **quantized, **attributes}
    )
    inputs = []
    for name, array in given.items():
        if name in WEIGHTS or name == "bounds":
            continue
        shape: list[int | None] = [None] * array.ndim
        shape[-1] = widths.get(name, array.shape[-1]) if name in ("query", "key", "value") else None
        if name.startswith("past"):
            shape = list(array.shape)
        inputs.append(helper.make_tensor_value_info(name, nodes.element_type(array.dtype), shape))
    kinds = [nodes.element_type(tensors[name].dtype) for name in ("query", "past_key", "past_value")]
    results = [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(outputs, kinds, strict=True)]
    weights = [numpy_helper.from_array(given[name], name) for name in (*WEIGHTS, "bounds") if name in given]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "one_node", inputs, results, weights)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def arguments_of(
    decoder: decoding.Decoder, query: np.ndarray, key: np.ndarray, value: np.ndarray, given: Mapping
) -> dict[str, np.ndarray]:
    """What the node takes of a step of tests/decoding.py, whose new rows are [1, tokens, H·D] and which tells
    write_indices."""
    tensors = {"query": query[0], "key": key[0], "value": value[0]}
    tensors |= {name: array for name, array in given.items() if name in SLOTS and isinstance(array, np.ndarray)}
    kind = tensors["query"].dtype
    tensors |= {name: tensors[name].astype(kind) for name in ("sinks",) if name in tensors}
    for name in ("k_scale", "v_scale"):
        if name in tensors and decoder.per_channel:
            tensors[name] = tensors[name][0]
    return tensors


def run(model: onnx.ModelProto, tensors: Mapping[str, np.ndarray], **how) -> np.ndarray:
    """The output [tokens, H·D]; the pages are changed in place, as PagedAttention and the operator do."""
    made = nodes.session(model, **how)
    device = "cpu" if made.get_providers()[0].startswith("CPU") else "cuda"
    binding, pages = made.io_binding(), {}
    binding.bind_output("output")
    for name in (value.name for value in made.get_inputs()):
        bound = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensors[name]), device, 0)
        binding.bind_ortvalue_input(name, bound)
        if name.startswith("past"):
            pages[name] = bound
            binding.bind_ortvalue_output(name.replace("past", "present"), bound)
    made.run_with_iobinding(binding)
    for name, bound in pages.items():
        tensors[name][...] = bound.numpy()
    return binding.get_outputs()[0].numpy()
