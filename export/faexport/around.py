# SPDX-License-Identifier: Apache-2.0
"""Joins what stands around attention into onnxruntime's own operators, where asked (Options.rest). Called by
pipeline.py.

onnxscript finds the places; that the shapes of both sides are equal it reads from what declare.py wrote. onnxruntime
joins a residual with the layer normalization behind it by itself, but not where the sum is read again (in models that
normalize first), and no root-mean-square normalizations of newer exports.
"""

from __future__ import annotations

import collections

import onnx_ir as ir

DOMAIN = "com.microsoft"
JOINED = ("SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization")


def join(model: ir.Model) -> str:
    """Changes the model in place. Returns a note that counts the operators that it has now, or "" where nothing was
    joined."""
    from onnxscript.rewriter.ort_fusions import rms_normalization, skip_normalization  # slow to import

    before = _counts(model)
    for joined in (
        rms_normalization.fuse_rms_normalization,
        skip_normalization.fuse_skip_layer_normalization,
        skip_normalization.fuse_skip_rms_normalization,
    ):
        joined(model)
    made = _counts(model) - before
    if not made:
        return ""
    model.opset_imports.setdefault(DOMAIN, 1)
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN and node.op_type in JOINED:
            _leave_out_unused(node)
    counts = ", ".join(f"{number} {name}" for name, number in sorted(made.items()))
    return (
        f"joined around attention: {counts}; these are operators of onnxruntime, and other runtimes don't run the file"
    )


def _leave_out_unused(node: ir.Node) -> None:
    """Outputs that nothing reads: the kernels for GPUs don't compute them."""
    used = [bool(value.uses()) or value.is_graph_output() for value in node.outputs]
    node.resize_outputs(max(index for index, wanted in enumerate(used) if wanted) + 1)
    for value, wanted in zip(node.outputs, used, strict=False):
        if not wanted:
            value.name = ""


def _counts(model: ir.Model) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph.all_nodes() if node.op_type in JOINED)
