# SPDX-License-Identifier: Apache-2.0
"""Computes what depends on stored numbers alone before a model becomes half precision. Called by half.py.

onnxruntime does so when it loads a model, but with the kernels of its CPU provider, which has no arithmetic in half
precision: such nodes would run on the GPU in each run. Nodes that only move numbers it does compute.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import op
from faexport.understand.shapes import constants

MOST_ELEMENTS = 1 << 22
SMALL = 1 << 16  # elements; of larger results the file would grow, where they are larger than what they are made of
# What moves, repeats or makes numbers, or has them in fewer bits than they would be stored in.
_MOVES = {
    "Concat", "ConstantOfShape", "DequantizeLinear", "Expand", "Gather", "Identity", "Range", "Reshape", "Slice",
    "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze",
}  # fmt: skip


def compute(model: ir.Model, kept: Collection[str]) -> None:
    """Changes the main graph in place.

    Args:
        model: from half.prepared(), whose constants are initializers.
        kept: names of nodes that stay in float32, and stay.
    """
    graph, known = model.graph, _stored(model)
    for node in list(graph):
        value = node.outputs[0]
        if node.name in kept or op(node) not in constants.FOLD or len(node.outputs) != 1 or value.name is None:
            continue
        arrays = [known.get(given) if given is not None else None for given in node.inputs]
        if not arrays or any(array is None for array, given in zip(arrays, node.inputs, strict=True) if given):
            continue
        found = constants.fold(node, arrays, MOST_ELEMENTS)
        if found is None:
            continue
        known[value] = found
        floats = any(v is not None and v.dtype == ir.DataType.FLOAT for v in (*node.inputs, value))
        worth = found.size <= SMALL or _size(found) <= sum(_size(array) for array in arrays if array is not None)
        if op(node) not in _MOVES and floats and worth and not value.is_graph_output():
            stored = ir.Value(name=value.name, shape=ir.Shape(found.shape), const_value=ir.tensor(found))
            stored.dtype = ir.DataType.from_numpy(found.dtype)
            ir.convenience.replace_all_uses_with(value, stored)
            value.name = f"{value.name}_computed"
            graph.remove(node, safe=True)
            graph.register_initializer(stored)
            known[stored] = found


def _size(array: np.ndarray) -> int:
    """Bytes, once floats have become half precision."""
    return array.size * (2 if array.dtype == np.float32 else array.itemsize)


def _stored(model: ir.Model) -> dict[ir.Value, np.ndarray]:
    """The initializers that no caller can replace, but large ones."""
    found = {}
    for value in model.graph.initializers.values():
        tensor = constants.tensor_of(value)
        if tensor is not None and tensor.size <= MOST_ELEMENTS:
            found[value] = tensor.numpy()
    return found
