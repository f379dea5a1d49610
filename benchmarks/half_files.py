# SPDX-License-Identifier: Apache-2.0
"""Models in float16 by onnxruntime's converter, for the tools without one of their own. Called by encoder_models.py."""

from __future__ import annotations

import onnx


def in_half(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.transformers import float16

    made = float16.convert_float_to_float16(model, keep_io_types=False, node_block_list=angles(model))
    return join_casts(made)


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


def join_casts(model: onnx.ModelProto) -> onnx.ModelProto:
    """What stays float32 is not rounded on its way to what stays float32, either: the converter writes each such node
    between casts. The other tools' files get what faexport does for its own."""
    import onnx_ir as ir
    from faexport.precision import half

    made = ir.from_proto(model)
    half.join_casts(made)
    return ir.to_proto(made)
