# SPDX-License-Identifier: Apache-2.0
"""Formulas, in standard operators, of the operators of onnxruntime that faexport writes and that have CUDA kernels
only, as their documentation defines them. Called by ort_session.py where a model with such operators is run on the CPU.

So a file for GPUs is compared without one, too, but for what the kernels themselves compute.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from faexport.graph.nodes import RUNTIME_DOMAIN, all_nodes, attribute, given
from faexport.graph.surgery import Builder
from faexport.understand.shapes.constants import tensor_of

_NO_KERNEL = re.compile(r"(?:Could not find an implementation|Failed to find kernel) for (?:com\.microsoft\.)?(\w+)\(")
Formula = Callable[[ir.Node, Builder], ir.Value]


def _bias_add(node: ir.Node, build: Builder) -> ir.Value:
    x, bias, skip = (given(node, index) for index in range(3))
    return build.add("Add", [build.add("Add", [x, bias]), skip])


def _bias_split_gelu(node: ir.Node, build: Builder) -> ir.Value:
    """The left half of x + bias, times the GELU of the right one."""
    x, bias = given(node, 0), given(node, 1)
    width = _length(bias)
    both = _widened(build.add("Add", [x, bias]), build)
    left, right = (build.slice(both, start, start + width // 2, -1) for start in (0, width // 2))
    root, one, half = (_number(value, build) for value in (2.0**0.5, 1.0, 0.5))
    raised = build.add("Add", [build.add("Erf", [build.add("Div", [right, root])]), one])
    gelu = build.add("Mul", [build.add("Mul", [right, half]), raised])
    return _narrowed(build.add("Mul", [left, gelu], ir.DataType.FLOAT), node, build)


def _group_norm(node: ir.Node, build: Builder) -> ir.Value:
    """gamma * (x - mean) / sqrt(variance + epsilon) + beta, with mean and variance of each group of channels, which are
    the last axis; then perhaps y * sigmoid(y)."""
    x, gamma, beta = (given(node, index) for index in range(3))
    channels, groups = _length(gamma), attribute(node, "groups")
    apart = build.reshape(_widened(x, build), [0, 0, 0, groups, channels // groups])
    axes = build.ints([1, 2, 4])
    rest = build.add("Sub", [apart, build.add("ReduceMean", [apart, axes], keepdims=1)])
    variance = build.add("ReduceMean", [build.add("Mul", [rest, rest]), axes], keepdims=1)
    root = build.add("Sqrt", [build.add("Add", [variance, _number(attribute(node, "epsilon", 1e-5), build)])])
    together = build.reshape(build.add("Div", [rest, root]), [0, 0, 0, channels])
    y = build.add("Add", [build.add("Mul", [together, _widened(gamma, build)]), _widened(beta, build)])
    if attribute(node, "activation"):
        y = build.add("Mul", [y, build.add("Sigmoid", [y])])
    y.dtype = ir.DataType.FLOAT
    return _narrowed(y, node, build)


FORMULAS: dict[str, Formula] = {
    "BiasAdd": _bias_add,
    "BiasSplitGelu": _bias_split_gelu,
    "GroupNorm": _group_norm,
}


def cuda_only(model: ir.Model) -> list[ir.Node]:
    """The nodes of these operators, in all graphs."""
    return [node for node in all_nodes(model) if node.domain == RUNTIME_DOMAIN and node.op_type in FORMULAS]


def note(model: ir.Model) -> str:
    """How a model was compared on the CPU, as a sentence; "" where it has no such operator."""
    names = sorted({node.op_type for node in cuda_only(model)})
    if not names:
        return ""
    return (
        f"compared by their formulas in standard operators, as the CPU has no kernels for them: {', '.join(names)} "
        "(--verify-on cuda compares the kernels)"
    )


def are_missing(complaint: str) -> bool:
    """Is it onnxruntime's complaint that it has no kernel for one of these?"""
    found = _NO_KERNEL.search(complaint)
    return found is not None and found[1] in FORMULAS


def written_out(source: str | bytes) -> tuple[bytes, str]:
    """A model file with the formulas in the place of these nodes, and the folder which its external data lies in."""
    if isinstance(source, bytes):
        model, folder = ir.from_proto(onnx.load_from_string(source)), ""
    else:
        model, folder = ir.load(source), os.path.dirname(os.path.abspath(source))
    for node in cuda_only(model):
        build = Builder(model.opset_imports.get("", 0))
        value = FORMULAS[node.op_type](node, build)
        assert node.graph is not None
        for number, made in enumerate(build.nodes):
            made.name = made.outputs[0].name = f"{node.outputs[0].name}_formula_{number}"
        value.name = node.outputs[0].name
        value.type = node.outputs[0].type
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], build.nodes, [node.outputs[0]], [value])
    return ir.to_proto(model).SerializeToString(), folder


def _length(vector: ir.Value) -> int:
    """The length of a stored vector."""
    tensor = tensor_of(vector)
    if tensor is None:
        raise ValueError(f"'{vector.name}' is not stored")
    return tensor.size


def _widened(value: ir.Value, build: Builder) -> ir.Value:
    return build.add("Cast", [value], ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))


def _narrowed(value: ir.Value, node: ir.Node, build: Builder) -> ir.Value:
    """The value in the element type of the node's tensors."""
    dtype = given(node, 0).dtype or node.outputs[0].dtype
    return value if dtype is None else build.cast(value, dtype)


def _number(value: float, build: Builder) -> ir.Value:
    return build.constant(np.array(value, np.float32))
