# SPDX-License-Identifier: Apache-2.0
"""Writes behind the fused node what rows without a visible key give, where the operator has no word for it
(spec.EmptyRows). Called by pipeline.py.

Sums of values are products with a row of 0 and 1, and running sums: nothing of S_q x S_kv is made. They are taken in
float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from faexport.graph.surgery import Builder, Missing
from faexport.spec import ROW_BLOCK, AttentionSpec, EmptyRows, Layout, Refusal, RefusalKind
from faexport.understand.mask.nodes import Nodes

_FLOAT = ir.DataType.FLOAT


def with_empty_rows(
    spec: AttentionSpec, dtype: ir.DataType | None, shared: Nodes, opset: int
) -> AttentionSpec | Refusal:
    """The spec with the nodes that spec.mask.empty_rows asks for.

    Args:
        dtype: of query, key and value, and so of the output.
        shared: makes what layers have in common; its nodes are added to those of the mask.
    """
    empty = spec.mask.empty_rows
    if empty is None:
        return spec
    node = (spec.replaces.name if spec.replaces is not None else "") or ""
    heads, kv_heads, head_dim = spec.query.heads, spec.value.heads, spec.value.head_dim
    if heads is None or kv_heads is None or head_dim is None:
        return Refusal(
            "its number of heads isn't known, and rows that see no key give sums of each head's",
            node,
            RefusalKind.UNKNOWN_SIZES,
        )
    rows = _Rows(spec, empty, (heads, kv_heads, head_dim), dtype or _FLOAT, shared, Builder(opset))
    try:
        result = rows.result()
    except Missing as what:
        return Refusal(f"what its rows give that see no key {what}", node)
    if spec.output_entry is not None:
        spec.output_entry.replace_all_uses_with(result)
    needed = dict.fromkeys([*spec.mask.new_nodes, *rows.shared_nodes])
    return dataclasses.replace(
        spec,
        mask=dataclasses.replace(spec.mask, new_nodes=tuple(needed)),
        output_nodes=(*rows.build.nodes, *spec.output_nodes),
        output_entry=rows.entry,
    )


class _Rows:
    """The nodes behind one fused node."""

    def __init__(
        self,
        spec: AttentionSpec,
        empty: EmptyRows,
        sizes: tuple[int, int, int],
        dtype: ir.DataType,
        shared: Nodes,
        build: Builder,
    ):
        self.spec, self.empty, self.dtype, self.shared, self.build = spec, empty, dtype, shared, build
        self.heads, self.kv_heads, self.head_dim = sizes  # the last one is the values'
        self.entry = ir.Value(type=ir.TensorType(dtype))  # the fused node's output
        self.shared_nodes: list[ir.Node] = []

    def result(self) -> ir.Value:
        build, layout = self.build, self.spec.output_layout
        sums = self._in_output_layout()
        output = self._cast(self.entry, _FLOAT)
        own = build.add("Mul", [output, self._placed(self.empty.output_weight, layout)], _FLOAT)
        others = build.add("Mul", [sums, self._placed(self.empty.value_weight, layout)], _FLOAT)
        mean = self._cast(build.add("Add", [own, others], _FLOAT), self.dtype)
        return build.add("Where", [self._placed(self.empty.rows, layout), mean, self.entry], self.dtype)

    def _placed(self, value: ir.Value, layout: Layout) -> ir.Value:
        """[B, 1, S, 1] so that it broadcasts against a tensor of this layout."""
        shared = self.shared
        if layout is Layout.BSH:
            value = shared.node("Squeeze", [value, shared.constant([1])])
        elif layout is Layout.BSHD:
            value = shared.node("Transpose", [value], {"perm": [0, 2, 1, 3]})
        self.shared_nodes += shared.nodes.get(value, ())
        return value

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return value if self.dtype is _FLOAT else self.build.add("Cast", [value], dtype, to=int(dtype))

    def _in_output_layout(self) -> ir.Value:
        """The sums, float32, of each query head."""
        build, wanted = self.build, self.spec.output_layout
        values, layout = self._values()
        sums = self._summed(self._cast(values, _FLOAT), layout)
        group = self.heads // self.kv_heads
        if layout is Layout.BHSD:
            if group > 1:
                sums = build.add("Gather", [sums, build.ints([h // group for h in range(self.heads)])], _FLOAT, axis=1)
            if wanted is Layout.BHSD:
                return sums
            sums = build.transpose(sums, [0, 2, 1, 3])
            return build.reshape(sums, [0, 0, self.heads * self.head_dim]) if wanted is Layout.BSH else sums
        if group > 1:
            starts = [h // group * self.head_dim for h in range(self.heads)]
            sums = build.add("Gather", [sums, build.ints(self._columns(starts))], _FLOAT, axis=2)
        if wanted is Layout.BSH:
            return sums
        sums = build.reshape(sums, [0, 0, self.heads, self.head_dim])
        return build.transpose(sums, [0, 2, 1, 3]) if wanted is Layout.BHSD else sums

    def _columns(self, starts: Sequence[int]) -> list[int]:
        return [start + d for start in starts for d in range(self.head_dim)]

    def _values(self) -> tuple[ir.Value, Layout]:
        """The values as [B, H, S, D] or [B, S, H * D]."""
        build, value = self.build, self.spec.value
        if value.layout is Layout.BSHD:
            return build.reshape(value.value, [0, 0, self.kv_heads * self.head_dim]), Layout.BSH
        if value.column_start is None or value.column_stride is None:
            return value.value, value.layout
        columns = self._columns([value.column_start + h * value.column_stride for h in range(self.kv_heads)])
        return build.add("Gather", [value.value, build.ints(columns)], value.value.dtype, axis=2), Layout.BSH

    def _summed(self, values: ir.Value, layout: Layout) -> ir.Value:
        """[…, S_q, …], or size 1 there if all rows have the same."""
        parts = []
        if self.empty.keys is not None:
            parts.append(self.build.add("MatMul", [self._placed(self.empty.keys, layout), values], _FLOAT))
        if self.empty.row_keys is not None:
            parts.append(self._running(self.empty.row_keys, values, layout))
        return parts[0] if len(parts) == 1 else self.build.add("Add", parts, _FLOAT)

    def _running(self, row_keys: ir.Value, values: ir.Value, layout: Layout) -> ir.Value:
        """Running sums over the rows' own keys: in each block by a triangle of ones, then over the blocks."""
        build, empty, axis = self.build, self.empty, layout.index("S")
        assert empty.row_kept is not None and empty.num_rows is not None  # they are there where row_keys are
        blocks = build.add("Gather", [values, row_keys], _FLOAT, axis=axis)
        zero, triangle = (self._constant(x) for x in (np.zeros(1, np.float32), np.tri(ROW_BLOCK, dtype=np.float32)))
        kept = build.add("Where", [self._placed(empty.row_kept, layout), blocks, zero], _FLOAT)
        within = build.add("MatMul", [triangle, kept], _FLOAT)
        last, over = (self._constant(np.asarray(x, np.int64)) for x in (ROW_BLOCK - 1, axis))
        totals = build.add("Gather", [within, last], _FLOAT, axis=axis + 1)
        before = build.unsqueeze(build.add("CumSum", [totals, over], _FLOAT, exclusive=1), axis + 1)
        columns = self.head_dim * (1 if layout is Layout.BHSD else self.kv_heads)
        sums = build.add("Add", [within, before], _FLOAT)
        if build.opset < 14:
            rows = build.reshape(sums, [*[0] * axis, -1, columns])
        else:
            num_rows = self.shared.node(
                "Reshape", [self.shared.node("Size", [row_keys]), self._constant(np.ones(1, np.int64))]
            )
            self.shared_nodes += self.shared.nodes[num_rows]
            lead = build.add("Shape", [sums], ir.DataType.INT64, start=0, end=axis)
            rows = build.reshape_to(sums, lead, num_rows, build.ints([columns]))
        return build.add("Slice", [rows, build.ints([0]), empty.num_rows, build.ints([axis])], _FLOAT)

    def _constant(self, array: np.ndarray) -> ir.Value:
        value = self.shared.constant(array)
        self.shared_nodes += self.shared.nodes[value]
        return value
