# SPDX-License-Identifier: Apache-2.0
"""New nodes that the sites of one graph share, each made once. They are not inserted here. Called by emit.py and by
write/empty_rows.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from faexport.graph.surgery import Missing, Writer, attributes_of
from faexport.understand.index.tensor import Unknown


class Nodes(Writer):
    """Makes nodes for one graph. `nodes` maps each value made to the nodes that it needs, in order."""

    def __init__(self, opset: int):
        super().__init__(opset)
        self.nodes: dict[ir.Value, tuple[ir.Node, ...]] = {}
        self._cache: dict[tuple, ir.Value] = {}
        self._count = itertools.count()
        self._hint = ""

    def node(
        self, op_type: str, inputs: Sequence[ir.Value], attributes: dict | None = None, hint: str = ""
    ) -> ir.Value:
        """The output of a node with these parts. Raises Unknown where the model's opset has none."""
        self._hint = hint
        try:
            return self.add(op_type, inputs, **attributes or {})
        except Missing as what:
            raise Unknown from what

    def extreme(self, op_type: str, values: Sequence[ir.Value]) -> ir.Value:
        """Max or Min of integers, which these operators don't take before opset 12."""
        result = values[0]
        for value in values[1:]:
            if self.opset >= 12:
                result = self.node(op_type, [result, value])
            else:
                chosen = [value, result] if op_type == "Max" else [result, value]
                result = self.node("Where", [self.node("Less", [result, value]), *chosen])
        return result

    def constant(self, array: np.ndarray | Sequence[int]) -> ir.Value:
        array = np.asarray(array)
        key = ("constant", array.dtype.str, array.shape, array.tobytes())
        if key not in self._cache:
            self._cache[key] = super().constant(array)
        return self._cache[key]

    def _made(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict, dtype: ir.DataType | None
    ) -> ir.Value:
        number = next(self._count) if op_type == "Constant" else None  # constant() makes each once
        key = (op_type, tuple(inputs), repr(sorted((k, repr(v)) for k, v in attributes.items())), number)
        if key not in self._cache:
            name = f"faexport_mask_{self._hint or op_type.lower()}_{next(self._count)}"
            made = ir.Node("", op_type, inputs, attributes_of(attributes), name=name, outputs=[ir.Value(name=name)])
            if dtype is not None:
                made.outputs[0].dtype = dtype
            before = dict.fromkeys(n for v in inputs if v is not None for n in self.nodes.get(v, ()))
            self._cache[key] = made.outputs[0]
            self.nodes[made.outputs[0]] = (*before, made)
        return self._cache[key]
