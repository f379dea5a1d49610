# SPDX-License-Identifier: Apache-2.0
"""Models in float16 by onnxruntime's converter, for the tools without one of their own. Called by encoder_models.py."""

from __future__ import annotations

import onnx


def in_half(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.transformers import float16

    made = float16.convert_float_to_float16(model, keep_io_types=False, node_block_list=angles(model))
    join_casts(made)
    return made


def angles(model: onnx.ModelProto) -> list[str]:
    """The nodes that compute angles of rotary positions, which float16 rounds by radians: they stay float32, as whoever
    converts such a model learns to leave them."""
    producers = {output: node for node in model.graph.node for output in node.output}
    waiting = [node for node in model.graph.node if node.op_type in ("Cos", "Sin")]
    found: dict[str, None] = {}
    while waiting:
        node = waiting.pop()
        if node.name not in found and node.op_type != "Shape":
            found[node.name] = None
            waiting += [producers[name] for name in node.input if name in producers]
    return list(found)


def join_casts(model: onnx.ModelProto) -> None:
    """What stays float32 is not rounded on its way to what stays float32, too: the converter writes each such node
    between casts."""
    types = {}  # of casts, by output
    for node in model.graph.node:
        if node.op_type == "Cast":
            types[node.output[0]] = (node.input[0], next(a.i for a in node.attribute if a.name == "to"))
    there_and_back = {
        output: types[source][0]
        for output, (source, to) in types.items()
        if to == onnx.TensorProto.FLOAT and types.get(source, ("", 0))[1] == onnx.TensorProto.FLOAT16
    }
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = there_and_back.get(name, name)
