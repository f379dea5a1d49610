# SPDX-License-Identifier: Apache-2.0
"""What becomes of rows of queries and new keys in the stand-in function before they are used: norm and rotary
embedding, in float32 (docs/operator.md, "The cache"). Used by body.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from faexport.fallback.ops import Ops

WRITES_OPSET = 13  # the first with what a cache of fixed size needs
_END = np.iinfo(np.int64).max


@dataclasses.dataclass(frozen=True)
class Rotary:
    """What is the same for all rows of a rotary embedding."""

    num_pairs: int  # of columns that are turned
    interleaved: bool
    by_row: bool  # the tables have a row for each row of the query, else one for each position


class Transform:
    """Of heads [B, H, S, D], called by the letter q or k."""

    def __init__(self, ops: Ops, given: Mapping[str, ir.Value], rotary: Rotary | None):
        self.ops, self.given, self.rotary = ops, given, rotary
        self._angles: list[ir.Value] = []

    def changes(self, letter: str) -> bool:
        return self.rotary is not None or f"{letter}_norm_weight" in self.given

    def __call__(self, x: ir.Value, letter: str) -> ir.Value:
        """In float32, where anything changes."""
        if not self.changes(letter):
            return x
        x = self._normalized(self.ops.float32(x), letter)
        return x if self.rotary is None else self._turned(x, self.rotary)

    def _normalized(self, x: ir.Value, letter: str) -> ir.Value:
        if f"{letter}_norm_weight" not in self.given:
            return x
        ops = self.ops
        epsilon = ops.ref(f"{letter}_norm_epsilon", ir.AttributeType.FLOAT)
        root = ops("Sqrt", ops("Add", ops.reduce("ReduceMean", ops("Mul", x, x)), epsilon))
        return ops("Mul", ops("Div", x, root), ops.float32(self.given[f"{letter}_norm_weight"]))

    def _turned(self, x: ir.Value, rotary: Rotary) -> ir.Value:
        ops, n, step = self.ops, rotary.num_pairs, 2 if rotary.interleaved else 1
        self._angles = self._angles or [self._table(self.given[name], rotary) for name in ("cos_cache", "sin_cache")]
        cos, sin = self._angles
        first = self._columns(x, 0, step * (n - 1) + 1, step)
        second = self._columns(x, 1 if rotary.interleaved else n, 2 * n, step)
        turned = [
            ops("Sub", ops("Mul", first, cos), ops("Mul", second, sin)),
            ops("Add", ops("Mul", second, cos), ops("Mul", first, sin)),
        ]
        rest = self._columns(x, 2 * n, _END, 1)
        if not rotary.interleaved:
            return ops.concat(*turned, rest, axis=3)
        pairs = ops.concat(*(ops.unsqueeze(part, 4) for part in turned), axis=4)
        return ops.concat(ops.resize(pairs, ops.size(x, 2), ops.const([2 * n])), rest, axis=3)

    def _table(self, table: ir.Value, rotary: Rotary) -> ir.Value:
        """The angles of the rows [B or 1, 1, S, pairs]; a position is kept inside of the table."""
        ops = self.ops
        if not rotary.by_row:
            positions = ops("Cast", self.given["position_ids"], to=int(ir.DataType.INT64))
            last = ops("Sub", ops.size(table, 0), ops.const([1]))
            positions = ops("Where", ops("Less", last, positions), last, positions)
            positions = ops("Where", ops("Less", positions, ops.const([0])), ops.const([0]), positions)
            table = ops("Gather", table, positions, axis=0)
        bounds = (ops.const([k]) for k in (0, rotary.num_pairs, 2))
        return ops.unsqueeze(ops.float32(ops("Slice", table, *bounds)), 1)

    def _columns(self, x: ir.Value, start: int, end: int, step: int) -> ir.Value:
        return self.ops("Slice", x, *(self.ops.const([k]) for k in (start, end, 3, step)))


def first_position(ops: Ops, given: Mapping[str, ir.Value], rows: ir.Value) -> ir.Value:
    """[B]: where the new rows of each entry begin in a cache that they are written to."""
    if "write_indices" in given:
        return ops("Cast", given["write_indices"], to=int(ir.DataType.INT64))
    lengths = ops("Cast", given["nonpad_kv_seqlen"], to=int(ir.DataType.INT64))
    start = ops("Sub", lengths, rows)
    return ops("Where", ops("Less", start, ops.const([0])), ops.const([0]), start)


def written(
    ops: Ops,
    given: Mapping[str, ir.Value],
    past: ir.Value,
    new: ir.Value,
    start: ir.Value,
    dtype: ir.DataType,
) -> ir.Value:
    """The cache [B, H, C, D] with the new rows [B, H, S, D] of each entry from `start` on, those that are in use."""
    rows = ops.size(new, 2)
    place = ops.arange(ops.scalar_size(past, 2))
    index = ops("Sub", ops.unsqueeze(place, 0), ops.unsqueeze(start, 1))  # [B, C]: the new row that each row gets
    stored = ops("And", ops("Less", ops.const([-1]), index), ops("Less", index, rows))
    if "nonpad_kv_seqlen" in given:
        lengths = ops.unsqueeze(ops("Cast", given["nonpad_kv_seqlen"], to=int(ir.DataType.INT64)), 1)
        stored = ops("And", stored, ops("Less", ops.unsqueeze(place, 0), lengths))
    # One more row, of zeros, so that there is one to point at: [B, H, S + 1, D].
    padded = ops("Cast", ops("Pad", ops.float32(new), ops.const([0] * 6 + [1, 0])), to=int(dtype))
    index = ops.unsqueeze(ops("Where", stored, index, rows), 1, 3)
    taken = ops("GatherElements", padded, ops("Expand", index, ops("Shape", past)), axis=2)
    return ops("Where", ops.unsqueeze(stored, 1, 3), taken, past)
