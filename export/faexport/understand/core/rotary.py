# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings in front of attention: the operators of that name, and spellings of x * cos + rotate_half(x) * sin.

Angles come row by row, from whatever computes them, so a rotation is the same for all positions: those that repeat or
skip, too. Which columns turn together, and that both take the same number of the table, is read by columns.py.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import attribute, op, operand, producer
from faexport.spec import Layout
from faexport.understand.core.columns import LEADS, Columns, Term
from faexport.understand.shapes.analysis import Analysis

OPERATORS = ("RotaryEmbedding", "com.microsoft::RotaryEmbedding")


@dataclasses.dataclass(frozen=True)
class Angles:
    """Cosines or sines: column start + i * step of `table` turns pair i. With positions its rows are those of
    positions, else those of the heads, against which it is broadcast."""

    table: ir.Value
    start: int = 0
    step: int = 1


@dataclasses.dataclass(frozen=True)
class Rotary:
    """value = `source` with its first 2 * num_pairs columns turned."""

    source: ir.Value
    cos: Angles
    sin: Angles
    positions: ir.Value | None  # [B, S]; None: the tables have a row for each row
    num_pairs: int
    interleaved: bool
    by_operator: bool = False  # the tables are [B or 1, S, columns] or [positions, columns] already

    @property
    def turns(self) -> dict[str, int]:
        """The operator's attributes."""
        return {"rotary_dim": 2 * self.num_pairs, **({"rotary_interleaved": 1} if self.interleaved else {})}


def rotary_of(value: ir.Value, layout: Layout, a: Analysis) -> Rotary | None:
    """The rotation that `value`, in a layout of heads, is the result of."""
    node = producer(value)
    if node is not None and op(node) in OPERATORS:
        return _by_operator(node, a)
    shape, dtype = a.shape(value), a.dtype(value)
    if layout is Layout.BSH or shape is None or len(shape) != LEADS + 1 or dtype is None:
        return None
    columns = Columns(a, layout, dtype)
    data = columns.data(value)
    if data is None or not any(len(terms) == 2 for terms in data):
        return None
    source = _source(data, columns, a, dtype)
    if source is None or a.shape(source) != shape:
        return None
    first = columns.data(source)
    assert first is not None
    place = {terms[0].column: j for j, terms in enumerate(first)}
    found = [[dataclasses.replace(t, column=place.get(t.column, -1)) for t in terms] for terms in data]
    for interleaved in (False, True):
        if (rotary := _matched(found, source, interleaved)) is not None:
            return rotary
    return None


def _source(data: np.ndarray, columns: Columns, a: Analysis, dtype: ir.DataType) -> ir.Value | None:
    """The tensor of as many columns whose columns these are made of: the nearest that has them all."""
    used = {(t.source, t.column) for terms in data for t in terms}
    for value in columns.seen:
        known = columns.data(value)
        if known is None or known.shape != data.shape or a.dtype(value) != dtype:
            continue
        plain = [terms[0] for terms in known if len(terms) == 1 and terms[0].sign == 1 and terms[0].table is None]
        if len(plain) == len(known) and {(t.source, t.column) for t in plain} == used:
            return value
    return None


def _matched(data: list[list[Term]], source: ir.Value, interleaved: bool) -> Rotary | None:
    """The rotation, where every column is what the operator makes of it."""
    count = sum(len(terms) == 2 for terms in data)
    if count % 2 or any(len(terms) != 2 for terms in data[:count]):
        return None
    if any(terms != [Term(1, terms[0].source, j)] for j, terms in enumerate(data[count:], count)):
        return None
    half = count // 2
    cosines: list[Term] = []
    sines: list[Term] = []
    for i in range(half):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        ahead, behind = ({t.column: t for t in data[j]} for j in (first, second))
        if set(ahead) != {first, second} or set(behind) != {first, second}:
            return None
        cos, sin = ahead[first], ahead[second]
        if (cos.sign, sin.sign, behind[second].sign, behind[first].sign) != (1, -1, 1, 1) or None in (cos.key, sin.key):
            return None
        if behind[second].key != cos.key or behind[first].key != sin.key:
            return None
        cosines.append(cos)
        sines.append(sin)
    angles = [_angles(terms) for terms in (cosines, sines)]
    if angles[0] is None or angles[1] is None:
        return None
    return Rotary(source, angles[0], angles[1], None, half, interleaved)


def _angles(terms: list[Term]) -> Angles | None:
    """The table, where the entries of the pairs lie at equal distances."""
    table, start = terms[0].table, terms[0].entry
    step = terms[1].entry - start if len(terms) > 1 else 1
    if (
        table is None
        or step < 1
        or any(t.table is not table or t.entry != start + i * step for i, t in enumerate(terms))
    ):
        return None
    return Angles(table, start, step)


def _by_operator(node: ir.Node, a: Analysis) -> Rotary | None:
    """ONNX's operator (x, cos, sin, positions) and onnxruntime's (x, positions, cos, sin)."""
    is_onnx = op(node) == "RotaryEmbedding"
    cos, sin, positions = (operand(node, i) for i in ((1, 2, 3) if is_onnx else (2, 3, 1)))
    source = node.inputs[0]
    if source is None or cos is None or sin is None or attribute(node, "is_packed_batching", 0):
        return None
    if attribute(node, "scale", 1.0) != 1.0 or any(x.is_ref() for x in node.attributes.values()):
        return None
    shape, other = a.shape(cos), a.shape(sin)
    rank = a.rank(positions) if positions is not None else None
    if shape is None or other != shape or len(shape) != (2 if positions is not None else 3) or rank not in (None, 2):
        return None
    columns, dim = shape[-1].const, attribute(node, "rotary_embedding_dim", 0)
    if (positions is not None and rank is None) or columns is None or (dim and dim != 2 * columns):
        return None
    interleaved = bool(attribute(node, "interleaved", 0))
    return Rotary(source, Angles(cos), Angles(sin), positions, columns, interleaved, by_operator=True)
