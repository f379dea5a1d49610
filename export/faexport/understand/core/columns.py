# SPDX-License-Identifier: Apache-2.0
"""What stands in each column of a tensor whose rows are heads: which columns of which other tensor, with which sign,
times which column of a table. Slices, Splits, stacked pairs and sums come out alike, however they are spelled.

Used by rotary.py. Trailing axes are numpy arrays of descriptions here; the axes in front of them stay as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import attribute, op, operand, producer
from faexport.sizes.dims import Dim
from faexport.spec import Layout
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.constants import tensor_of
from faexport.understand.shapes.known import Shape
from faexport.understand.shapes.rules import resolve_axis, slice_of, split_sizes

LEADS = 3  # batch, heads and rows, in any order
_ELEMENTWISE = ("Cos", "Sin", "Neg", "Cast", "Identity")
_BINARY = ("Mul", "Add", "Sub", "Div")
_MOST_COLUMNS = 1024
_MOST_DEPTH = 48
_MOST_TABLE = 1 << 24  # elements of a stored table that are compared

Read = Callable[[ir.Value, int], "np.ndarray | None"]


@dataclasses.dataclass(frozen=True)
class Term:
    """sign * source[…, column] * table[…, entry]; `key` is the same for entries that are the same number."""

    sign: int
    source: ir.Value
    column: int
    table: ir.Value | None = None
    entry: int = 0
    key: object = None


class Columns:
    """Reads tensors of heads in one layout, BHSD or BSHD, and the tables that they are multiplied by.

    dtype: of the heads; Casts to float32 and back to it change no column.
    """

    def __init__(self, a: Analysis, layout: Layout, dtype: ir.DataType | None):
        self.a, self.dtype = a, dtype
        self._heads, self._rows = layout.index("H"), layout.index("S")
        self._data: dict[ir.Value, np.ndarray | None] = {}
        self._keys: dict[tuple[ir.Value, int], np.ndarray | None] = {}

    @property
    def seen(self) -> list[ir.Value]:
        """The tensors of heads that were read."""
        return list(self._data)

    def data(self, value: ir.Value, depth: int = 0) -> np.ndarray | None:
        """A tuple of Terms for each column, in the shape of the axes behind the first LEADS."""
        if value not in self._data:
            self._data[value] = None
            shape = self.a.shape(value)
            sizes = _constants(shape[LEADS:]) if shape is not None and len(shape) > LEADS else None
            if sizes is not None and math.prod(sizes) <= _MOST_COLUMNS:
                found = self._data_of(value, depth) if depth < _MOST_DEPTH else None
                self._data[value] = found if found is not None and found.shape == sizes else _leaf(value, sizes)
        return self._data[value]

    def _data_of(self, value: ir.Value, depth: int) -> np.ndarray | None:
        node = producer(value)
        if node is None:
            return None
        sides = [v for v in node.inputs if v is not None]
        kind = op(node)
        if kind == "Neg":
            return _scaled(self.data(sides[0], depth + 1), -1)
        if kind == "Cast" and {self.a.dtype(sides[0]), self.a.dtype(value)} <= {self.dtype, ir.DataType.FLOAT}:
            return self.data(sides[0], depth + 1)
        if kind in ("Add", "Sub") and all(self._keeps_leads(v, value) for v in sides):
            first, second = (self.data(v, depth + 1) for v in sides)
            return _joined(first, _scaled(second, 1 if kind == "Add" else -1))
        if kind == "Mul":
            return self._product(sides, value, depth)
        if not sides or not self._keeps_leads(sides[0], value):
            return None
        return _rearranged(value, LEADS, lambda v, _: self.data(v, depth + 1), self.a)

    def _keeps_leads(self, source: ir.Value, value: ir.Value) -> bool:
        before, after = self.a.shape(source), self.a.shape(value)
        return before is not None and after is not None and len(before) > LEADS and before[:LEADS] == after[:LEADS]

    def _product(self, sides: list[ir.Value], value: ir.Value, depth: int) -> np.ndarray | None:
        for heads, other in (sides, sides[::-1]):
            if not self._keeps_leads(heads, value):
                continue
            if (number := self.a.scalar(other)) is not None:
                return _scaled(self.data(heads, depth + 1), int(number)) if number in (1.0, -1.0) else None
            if self._is_table(other, heads):
                return self._times(self.data(heads, depth + 1), other)
        return None

    def _is_table(self, value: ir.Value, heads: ir.Value) -> bool:
        """Has it a row for each row of the heads, which all heads share?"""
        shape, whole = self.a.shape(value), self.a.shape(heads)
        if shape is None or whole is None or len(whole) != LEADS + 1 or len(shape) > len(whole):
            return False
        padded = (*(Dim.of(1),) * (len(whole) - len(shape)), *shape)
        own, rows = padded[self._heads] == 1, padded[self._rows] == whole[self._rows]
        return own and rows and padded[0] in (1, whole[0]) and padded[3] == whole[3]

    def _times(self, data: np.ndarray | None, table: ir.Value) -> np.ndarray | None:
        keys = self.keys(table, 1)
        if data is None or keys is None or keys.shape != data.shape:
            return None
        if any(term.table is not None for terms in data for term in terms):
            return None
        return _array(
            [tuple(dataclasses.replace(t, table=table, entry=j, key=keys[j]) for t in x) for j, x in enumerate(data)]
        )

    # ------------------------------------------------------------------------------------------ tables

    def keys(self, value: ir.Value, trailing: int, depth: int = 0) -> np.ndarray | None:
        """A description of each of the last axes' elements: where two are equal, so are the numbers of every row."""
        if (value, trailing) not in self._keys:
            self._keys[value, trailing] = None
            shape = self.a.shape(value)
            sizes = _constants(shape[len(shape) - trailing :]) if shape is not None and len(shape) >= trailing else None
            if sizes is not None and 0 < math.prod(sizes) <= _MOST_COLUMNS:
                found = self._keys_of(value, trailing, depth) if depth < _MOST_DEPTH else None
                own = _array([(value, j) for j in range(math.prod(sizes))]).reshape(sizes)
                self._keys[value, trailing] = found if found is not None and found.shape == sizes else own
        return self._keys[value, trailing]

    def _keys_of(self, value: ir.Value, trailing: int, depth: int) -> np.ndarray | None:
        def read(source: ir.Value, count: int) -> np.ndarray | None:
            return self.keys(source, count, depth + 1)

        node, shape = producer(value), self.a.known_shape(value)
        if node is None or tensor_of(value) is not None:
            return _stored(value, trailing)
        kind, sides = op(node), [v for v in node.inputs if v is not None]
        if kind in _ELEMENTWISE:
            words = (kind, attribute(node, "to"))
            return _mapped(words, [read(sides[0], trailing)])
        if kind in _BINARY:
            parts = [self._broadcast(v, shape[len(shape) - trailing :], read) for v in sides]
            return None if any(p is None for p in parts) else _mapped((kind,), parts)
        if kind == "Gather" and trailing == 1 and self.a.rank(sides[0]) == 2 and attribute(node, "axis", 0) in (0, -2):
            return _mapped((kind, sides[1]), [read(sides[0], 1)])
        return _rearranged(value, len(shape) - trailing, read, self.a)

    def _broadcast(self, value: ir.Value, sizes: Shape, read: Read) -> np.ndarray | None:
        """The keys of one side of a sum or product, as many as the result has."""
        wanted, shape = _constants(sizes), self.a.shape(value)
        if wanted is None or shape is None:
            return None
        count = min(len(wanted), len(shape))
        own = _constants(shape[len(shape) - count :])
        if own is None or any(n not in (1, w) for n, w in zip(own, wanted[len(wanted) - count :], strict=True)):
            return None
        keys = read(value, count) if count else _array([(value, 0)]).reshape(())
        return None if keys is None else np.broadcast_to(keys, wanted)


def _constants(sizes: Shape) -> tuple[int, ...] | None:
    found = tuple(d.const for d in sizes if d.const is not None)
    return found if len(found) == len(sizes) else None


def _array(items: list) -> np.ndarray:
    made = np.empty(len(items), object)
    for k, item in enumerate(items):
        made[k] = item
    return made


def _leaf(value: ir.Value, sizes: tuple[int, ...]) -> np.ndarray:
    return _array([(Term(1, value, j),) for j in range(math.prod(sizes))]).reshape(sizes)


def _scaled(data: np.ndarray | None, sign: int) -> np.ndarray | None:
    if data is None or sign == 1:
        return data
    flat = [tuple(dataclasses.replace(t, sign=t.sign * sign) for t in terms) for terms in data.reshape(-1)]
    return _array(flat).reshape(data.shape)


def _joined(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    if first is None or second is None or first.shape != second.shape:
        return None
    flat = [a + b for a, b in zip(first.reshape(-1), second.reshape(-1), strict=True)]
    return _array(flat).reshape(first.shape)


def _mapped(words: tuple, parts: list[np.ndarray | None]) -> np.ndarray | None:
    if any(part is None for part in parts):
        return None
    known = [part for part in parts if part is not None]
    flat = [(*words, *keys) for keys in zip(*(part.reshape(-1) for part in known), strict=True)]
    return _array(flat).reshape(known[0].shape)


def _stored(value: ir.Value, trailing: int) -> np.ndarray | None:
    """Columns of a table in the file, by what they hold."""
    tensor = tensor_of(value)
    if tensor is None or trailing != 1 or tensor.size > _MOST_TABLE or len(tensor.shape) < 1:
        return None
    table = tensor.numpy()
    columns = np.ascontiguousarray(table.reshape(-1, table.shape[-1]).T)
    return _array([("stored", tensor.dtype, columns[j].tobytes()) for j in range(len(columns))])


# ---------------------------------------------------------------------------------------------- rearranging


def _rearranged(value: ir.Value, leads: int, read: Read, a: Analysis) -> np.ndarray | None:
    """The axes of `value` behind the first `leads`, where its node only moves elements within these."""
    node = producer(value)
    source = None if node is None else operand(node, 0)
    before, after = a.shape(source), a.shape(value)
    if node is None or source is None or before is None or after is None:
        return None
    kind = op(node)
    if kind in ("Reshape", "Unsqueeze", "Squeeze"):
        return _reshaped(source, before, after[leads:], leads, read)
    if kind == "Identity":
        return read(source, len(after) - leads)
    if kind == "Concat":
        return _concatenated(node, leads, len(after), read)
    if len(before) <= leads and kind != "Expand":
        return None
    move = _MOVES.get(kind)
    return None if move is None else move(node, value, leads, read, a)


def _reshaped(source: ir.Value, before: Shape, trailing: Shape, leads: int, read: Read) -> np.ndarray | None:
    sizes = _constants(trailing)
    if sizes is None:
        return None
    # Of heads the leading axes are the same before and after; tables may lose or get axes in front.
    for count in range(len(before) + 1):
        own = _constants(before[len(before) - count :])
        if own is None:
            return None
        if math.prod(own) == math.prod(sizes) and (count or not sizes):
            data = read(source, count)
            return None if data is None or math.prod(data.shape) != math.prod(sizes) else data.reshape(sizes)
    return None


def _concatenated(node: ir.Node, leads: int, rank: int, read: Read) -> np.ndarray | None:
    axis = resolve_axis(attribute(node, "axis", 0), rank) - leads
    parts = [None if v is None else read(v, rank - leads) for v in node.inputs]
    if axis < 0 or any(part is None or part.ndim != rank - leads for part in parts):
        return None
    return np.concatenate([part for part in parts if part is not None], axis=axis)


def _sliced(node: ir.Node, value: ir.Value, leads: int, read: Read, a: Analysis) -> np.ndarray | None:
    source = node.inputs[0]
    assert source is not None
    shape = a.known_shape(source)
    data, pieces = read(source, len(shape) - leads), slice_of(node, a, shape)
    if data is None or pieces is None:
        return None
    for axis, start, size, step in pieces:
        if axis < leads or start.const is None or size.const is None:
            return None
        data = np.take(data, start.const + step * np.arange(size.const), axis=axis - leads)
    return data


def _split(node: ir.Node, value: ir.Value, leads: int, read: Read, a: Analysis) -> np.ndarray | None:
    source = node.inputs[0]
    assert source is not None
    shape = a.known_shape(source)
    axis = resolve_axis(attribute(node, "axis", 0), len(shape))
    data, sizes = read(source, len(shape) - leads), split_sizes(node, a, shape[axis])
    parts = None if sizes is None else _constants(tuple(sizes))
    if axis < leads or data is None or parts is None:
        return None
    index = list(node.outputs).index(value)
    return np.take(data, np.arange(parts[index]) + sum(parts[:index]), axis=axis - leads)


def _gathered(node: ir.Node, value: ir.Value, leads: int, read: Read, a: Analysis) -> np.ndarray | None:
    source, index = node.inputs[0], a.constant(node.inputs[1])
    assert source is not None
    rank = len(a.known_shape(source))
    axis = resolve_axis(attribute(node, "axis", 0), rank)
    data = read(source, rank - leads)
    if axis < leads or data is None or index is None or index.ndim > 1:
        return None
    size = data.shape[axis - leads]
    return np.take(data, np.where(index < 0, index + size, index), axis=axis - leads)


def _transposed(node: ir.Node, value: ir.Value, leads: int, read: Read, a: Analysis) -> np.ndarray | None:
    source = node.inputs[0]
    assert source is not None
    rank = len(a.known_shape(source))
    perm = attribute(node, "perm") or list(range(rank))[::-1]
    if list(perm[:leads]) != list(range(leads)):
        return None
    data = read(source, rank - leads)
    return None if data is None else data.transpose([x - leads for x in perm[leads:]])


def _repeated(node: ir.Node, value: ir.Value, leads: int, read: Read, a: Analysis) -> np.ndarray | None:
    source = node.inputs[0]
    assert source is not None
    before, after = a.known_shape(source), a.known_shape(value)
    sizes, count = _constants(after[leads:]), min(len(before), len(after) - leads)
    data = read(source, count)
    if data is None or sizes is None:
        return None
    padded = data.reshape((1,) * (len(sizes) - data.ndim) + data.shape)
    if any(n not in (1, size) for n, size in zip(padded.shape, sizes, strict=True)):
        return None
    return np.broadcast_to(padded, sizes)


def _tiled(node: ir.Node, value: ir.Value, leads: int, read: Read, a: Analysis) -> np.ndarray | None:
    source, counts = node.inputs[0], a.constant(operand(node, 1))
    assert source is not None
    if counts is None or any(counts[:leads] != 1):
        return None
    data = read(source, len(counts) - leads)
    return None if data is None or math.prod(counts) * data.size > _MOST_COLUMNS else np.tile(data, counts[leads:])


_MOVES = {
    "Tile": _tiled,
    "Slice": _sliced,
    "Split": _split,
    "Gather": _gathered,
    "Transpose": _transposed,
    "Expand": _repeated,
}
