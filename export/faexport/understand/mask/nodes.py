# SPDX-License-Identifier: Apache-2.0
"""New nodes that the sites of one graph share, each made once. They are not inserted here. Called by emit.py and by
faexport/empty_rows.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


class Nodes:
    """Makes nodes for one graph. `nodes` maps each value made to the nodes that it needs, in order."""

    def __init__(self, opset: int):
        self.opset = opset
        self.nodes: dict[ir.Value, tuple[ir.Node, ...]] = {}
        self._cache: dict[tuple, ir.Value] = {}
        self._count = itertools.count()

    def node(
        self, op_type: str, inputs: Sequence[ir.Value], attributes: dict | None = None, hint: str = ""
    ) -> ir.Value:
        """The output of a node with these parts (made once), written as opset 15 has it."""
        attributes = attributes or {}
        older = self._in_older_opset(op_type, inputs, attributes)
        if older is not None:
            return older
        key = (op_type, tuple(inputs), repr(sorted((k, repr(v)) for k, v in attributes.items())))
        if key not in self._cache:
            name = f"faexport_mask_{hint or op_type.lower()}_{next(self._count)}"
            made = ir.node(op_type, inputs, attributes, name=name, outputs=[ir.Value(name=name)])
            before = dict.fromkeys(n for v in inputs for n in self.nodes.get(v, ()))
            self._cache[key] = made.outputs[0]
            self.nodes[made.outputs[0]] = (*before, made)
        return self._cache[key]

    def _in_older_opset(self, op_type: str, inputs: Sequence[ir.Value], attributes: dict) -> ir.Value | None:
        """The same in a form that the model's opset has, where it doesn't have this one."""
        opset = self.opset
        if op_type == "Shape" and attributes and opset < 15:
            return self.node(
                "Slice", [self.node("Shape", inputs), *(self.constant([attributes[n]]) for n in ("start", "end"))]
            )
        if op_type in ("Squeeze", "Unsqueeze", "ReduceSum") and len(inputs) == 2 and opset < 13:
            axes = inputs[1].producer().attributes["value"].value.numpy().reshape(-1).tolist()
            return self.node(op_type, inputs[:1], {**attributes, "axes": axes})
        if op_type == "GreaterOrEqual" and opset < 12:
            return self.node("Not", [self.node("Less", inputs)])
        return None

    def constant(self, array: np.ndarray | Sequence[int]) -> ir.Value:
        array = np.asarray(array)
        key = ("constant", array.dtype.str, array.shape, array.tobytes())
        if key not in self._cache:
            tensor = ir.tensor(array, name=f"faexport_constant_{next(self._count)}")
            self._cache[key] = self.node("Constant", (), {"value": tensor}, "constant")
        return self._cache[key]
