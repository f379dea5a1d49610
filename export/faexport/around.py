# SPDX-License-Identifier: Apache-2.0
"""Joins what stands around attention into onnxruntime's own operators, where asked (Options.rest). Called by
pipeline.py.

onnxscript finds the places; that the shapes of both sides are equal it reads from what declare.py wrote. onnxruntime
joins much of it by itself, but not the GELU of newer exports, not a residual whose sum is read again (in models that
normalize first), and no root-mean-square normalizations of newer exports.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator

import onnx_ir as ir

from faexport.nodes import op, producer

DOMAIN = "com.microsoft"
NORMALIZATIONS = ("SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
JOINED = (*NORMALIZATIONS, "Gelu", "FastGelu", "BiasGelu")


def join(model: ir.Model) -> str:
    """Changes the model in place. Returns a note that counts the operators that it has now, or "" where nothing was
    joined."""
    from onnxscript.rewriter.ort_fusions import (  # slow to import
        bias_gelu,
        erfgelu,
        gelu,
        rms_normalization,
        skip_normalization,
    )

    before = _counts(model)
    turned = list(_put_biases_second(model))
    for joined in (
        erfgelu.fuse_erfgelu,
        gelu.fuse_gelu,
        bias_gelu.fuse_bias_gelu,
        rms_normalization.fuse_rms_normalization,
        skip_normalization.fuse_skip_layer_normalization,
        skip_normalization.fuse_skip_rms_normalization,
    ):
        joined(model)
    for node in turned:
        if node.graph is not None:  # it was of no use
            _turn(node)
    made = _counts(model) - before
    if not made:
        return ""
    model.opset_imports.setdefault(DOMAIN, 1)
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN and node.op_type in NORMALIZATIONS:
            _leave_out_unused(node)
    counts = ", ".join(f"{number} {name}" for name, number in sorted(made.items()))
    return (
        f"joined around attention: {counts}; these are operators of onnxruntime, and other runtimes don't run the file"
    )


def _put_biases_second(model: ir.Model) -> Iterator[ir.Node]:
    """onnxscript's rules look for a bias there; TorchScript's exporter writes it first. Gives the nodes that were
    turned."""
    for node in model.graph:
        if op(node) != "Add":
            continue
        first, second = map(_is_stored, node.inputs)
        if first and not second:
            _turn(node)
            yield node


def _is_stored(value: ir.Value | None) -> bool:
    """In the file, perhaps under another name: TorchScript's exporter writes equal weights once."""
    made_by = producer(value)
    if made_by is not None and op(made_by) == "Identity":
        value = made_by.inputs[0]
    return value is not None and value.const_value is not None


def _turn(node: ir.Node) -> None:
    first, second = node.inputs
    node.replace_input_with(0, second)
    node.replace_input_with(1, first)


def _leave_out_unused(node: ir.Node) -> None:
    """Outputs that nothing reads: the kernels for GPUs don't compute them."""
    used = [bool(value.uses()) or value.is_graph_output() for value in node.outputs]
    node.resize_outputs(max(index for index, wanted in enumerate(used) if wanted) + 1)
    for value, wanted in zip(node.outputs, used, strict=False):
        if not wanted:
            value.name = ""


def _counts(model: ir.Model) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph.all_nodes() if node.op_type in JOINED)
