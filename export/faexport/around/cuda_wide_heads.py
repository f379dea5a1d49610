# SPDX-License-Identifier: Apache-2.0
"""Queries and keys that got further columns for a bias of rows and columns of an image (match/decomposed_bias.py), read
from one packed projection, for onnxruntime's CUDA provider (Options.joins_cuda). Called by pipeline.py.

Segment Anything and ViTDet turn the packed projection to [3, batch, heads, rows, columns], and the output back, and
onnxruntime's Einsum turns queries twice more for each part of the bias. All of that can be done where the projection
has the heads: the products with the stored positions by MatMul, the new columns behind each head's, and the values
are read in place.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence

import onnx_ir as ir

from faexport.around import wide_biases
from faexport.graph.edits import Names, insert_in_front, remove_dead, take_over
from faexport.graph.fused import is_fused
from faexport.graph.nodes import VIEWS, attribute, graphs_of, is_read_once, only_reader, op, operand, producer
from faexport.graph.surgery import Builder
from faexport.sizes.dims import Dim, product
from faexport.spec import NUM_REQUIRED, Layout
from faexport.understand.layout import view_ops
from faexport.understand.layout.heads import Link, chain_of
from faexport.understand.layout.views import Atom, Axis, View, merged
from faexport.understand.shapes.analysis import Analysis

ROWS, COLUMNS = "bhwc,hkc->bhwk", "bhwc,wkc->bhwk"  # of the image: what the positions of queries are multiplied by


def join(model: ir.Model, a: Analysis, names: Names) -> None:
    """Changes the model in place."""
    a.extend(model)
    for graph, _ in graphs_of(model):
        for node in list(graph):
            found = _place_of(node, a) if is_fused(node) and len(node.inputs) == NUM_REQUIRED else None
            if found is not None:
                _write(found, a, names)


@dataclasses.dataclass(frozen=True)
class _Place:
    """A node of ours, what it reads, and what of its output is read in the end."""

    node: ir.Node
    packed: ir.Value  # [batch, rows ..., (queries, keys, values) * heads * columns]
    end: ir.Value  # [batch, rows ..., heads * columns]
    heads: int
    rows: tuple[int, int]  # of the image, and its columns
    width: int  # columns of a head
    positions: list[tuple[str, ir.Value]]  # ROWS or COLUMNS, and what queries are multiplied by
    padding: int  # columns of zeros
    units: ir.Value  # [1, 1, rows, columns]
    biases: wide_biases.Biases | None  # of the projection, where they need not be added to all of it


def _place_of(node: ir.Node, a: Analysis) -> _Place | None:
    query, key, value = node.inputs
    shape = a.shape(value)
    sizes = [size.const for size in (shape or ())[1:]]
    if not _is_plain(node) or len(sizes) != 3 or not all(sizes):
        return None
    heads, rows, width = (size for size in sizes if size)
    columns, units = _parts(query, a), _parts(key, a)
    if columns is None or units is None or len(units) != 2 or len(columns) not in (3, 4):
        return None
    packed = _packed_of([columns[0], units[0], value], heads, width, a)
    places = _positions(columns[1:3], columns[0], a)
    padding, stored = _zeros(columns[3:], a), _repeated(units[1])
    end = _end_of(node.outputs[0], a)
    if packed is None or places is None or padding is None or stored is None or end is None:
        return None
    (first, stored_rows), (second, stored_columns) = places
    image = (_size(stored_rows, 0, a), _size(stored_columns, 0, a))
    if (first, second) != (ROWS, COLUMNS) or image[0] * image[1] != rows or a.tensor(stored) is None:
        return None
    biases = wide_biases.find(node, packed, end, heads * width, a)
    return _Place(node, packed, end, heads, image, width, places, padding, stored, biases)


def _size(value: ir.Value, axis: int, a: Analysis) -> int:
    return a.known_shape(value)[axis].const or 0


def _is_plain(node: ir.Node) -> bool:
    layouts = [attribute(node, f"{name}_layout", Layout.BHSD) for name in ("query", "key", "value", "output")]
    return all(str(layout) == Layout.BHSD for layout in layouts) and "packed_columns" not in node.attributes


def _parts(value: ir.Value | None, a: Analysis) -> list[ir.Value] | None:
    """What stands side by side in each head, where nothing else reads it."""
    joined = producer(value)
    if value is None or joined is None or op(joined) != "Concat" or attribute(joined, "axis") not in (3, -1):
        return None
    parts = [part for part in joined.inputs if part is not None]
    return parts if is_read_once(value) and len(a.shape(value) or ()) == 4 else None


def _packed_of(parts: Sequence[ir.Value | None], heads: int, width: int, a: Analysis) -> ir.Value | None:
    """The tensor whose columns hold queries, keys and values one behind the other, each head's together."""
    found: ir.Value | None = None
    for index, part in enumerate(parts):
        links = [] if part is None else chain_of(part, a)
        link = next((x for x in reversed(links) if _is_packed(x, index * heads * width, heads, width, a)), None)
        if link is None or (found is not None and link.value is not found):
            return None
        found = link.value
    return found


def _is_packed(link: Link, start: int, heads: int, width: int, a: Analysis) -> bool:
    """Is a [batch, heads, rows, columns] so many columns of a [batch, rows ..., columns]?"""
    shape, view = a.known_shape(link.value), link.view
    last = len(shape) - 1
    if link.scale != 1 or last < 2 or shape[last] != 3 * heads * width or len(view.axes) != 4:
        return False
    wanted = _flat(shape[:1], 0), (Atom(last, Dim.of(width), Dim.of(heads)),), _flat(shape[1:last], 1)
    axes = [merged(axis) for axis in view.axes]
    in_place = axes == [*wanted, (Atom(last, Dim.of(1), Dim.of(width)),)]
    return in_place and list(view.offsets) == [*(0,) * last, start]


def _flat(shape: Sequence[Dim], first: int) -> Axis:
    """Whole axes of a tensor as one."""
    return tuple(Atom(first + index, Dim.of(1), size) for index, size in enumerate(shape) if size != 1)


def _positions(parts: Sequence[ir.Value], query: ir.Value, a: Analysis) -> list[tuple[str, ir.Value]] | None:
    """How each part is a product of the queries with stored positions."""
    found = []
    for part in parts:
        node = producer(part)
        while node is not None and op(node) in VIEWS:
            node = producer(node.inputs[0])
        if node is None or op(node) != "Einsum" or len(node.inputs) != 2:
            return None
        image, stored = node.inputs
        sizes, whole = a.shape(image), a.shape(query)
        if image is None or stored is None or not sizes or not whole or not a.is_static(stored):
            return None
        shapes_fit = len(sizes) == 4 and a.rank(stored) == 3 and sizes[3] == whole[3]
        if not shapes_fit or product(sizes[1:3]) != whole[2] or not _is_same(image, query, a):
            return None
        found.append((_renamed(attribute(node, "equation")), stored))
    return found


def _renamed(equation: str | bytes) -> str:
    """An equation with the letters of ROWS and COLUMNS for its first operand and the third letter of the result."""
    text = (equation.decode() if isinstance(equation, bytes) else equation).replace(" ", "")
    operands, _, result = text.partition("->")
    first, _, second = operands.partition(",")
    letters = dict(zip(first, "bhwc", strict=False))
    for letter in second:
        letters.setdefault(letter, "k")
    known = all(letter in letters for letter in first + second + result) and set(text) <= {
        *string.ascii_letters,
        *",->",
    }
    return "".join(letters.get(letter, letter) for letter in text) if known and len(set(first)) == 4 else ""


def _is_same(image: ir.Value, query: ir.Value, a: Analysis) -> bool:
    """Are both the same numbers in the same order?"""
    for one in chain_of(image, a):
        for other in chain_of(query, a):
            if one.value is other.value and one.scale == other.scale == 1 and one.view.offsets == other.view.offsets:
                return _in_a_row(one.view) == _in_a_row(other.view)
    return False


def _in_a_row(view: View) -> Axis:
    return merged(atom for axis in view.axes for atom in axis)


def _zeros(parts: Sequence[ir.Value], a: Analysis) -> int | None:
    """How many columns of zeros these are."""
    if not parts:
        return 0
    stored = _repeated(parts[0])
    return _size(parts[0], 3, a) if stored is not None and a.scalar(stored) == 0 else None


def _repeated(value: ir.Value) -> ir.Value | None:
    node = producer(value)
    return operand(node, 0) if node is not None and op(node) == "Expand" else None


def _end_of(output: ir.Value, a: Analysis) -> ir.Value | None:
    """What is made of a [batch, heads, rows, columns] and holds it as [batch, rows ..., heads * columns]. Not even a
    node of no use may read the output otherwise: it will have other axes."""
    shape, value = a.shape(output), output
    if len({use.node for use in output.uses()}) != 1:
        return None
    view = View.whole(shape) if shape is not None else None
    wanted = (
        None
        if shape is None
        else (*_flat(shape[:1], 0), *_flat(shape[2:3], 2), *_flat(shape[1:2], 1), *_flat(shape[3:], 3))
    )
    while view is not None and (user := only_reader(value)) is not None:
        if user.inputs[0] is not value or len(user.outputs) != 1:
            return None
        value = user.outputs[0]
        view = view_ops.apply(value, view, a)
        last = view.axes[-1] if view is not None else ()
        if view is not None and _in_a_row(view) == merged(wanted or ()) and len(last) > 1:
            return value if all(size.const for size in view.shape[1:]) else None
    return None


class _Wide:
    """Queries and keys of a place, each head's with their new columns."""

    def __init__(self, place: _Place, build: Builder, dtype: ir.DataType, a: Analysis):
        self.place, self.build, self.dtype, self.a = place, build, dtype, a
        self.rows = place.rows[0] * place.rows[1]
        self.packed = place.packed if place.biases is None else place.biases.product
        if a.rank(self.packed) != 3:
            total = 3 * place.heads * place.width
            self.packed = build.add("Reshape", [self.packed, build.ints([-1, self.rows, total])], dtype)
        self.batch = build.slice(build.add("Shape", [self.packed], ir.DataType.INT64), 0, 1)
        self.further = _size(place.units, 3, a)

    def queries(self) -> ir.Value:
        place, build = self.place, self.build
        query = self._sliced(0)
        if place.biases is not None:
            query = build.add("Add", [query, build.constant(place.biases.queries)], self.dtype)
        parts = [self._of_heads(query, place.width)]
        height, width = place.rows
        groups = {ROWS: [-1, height, width * place.heads], COLUMNS: [-1, width, place.heads]}
        for equation, stored in place.positions:
            grouped = build.add("Reshape", [query, build.ints([*groups[equation], place.width])], self.dtype)
            turned = build.add("Transpose", [stored], self.dtype, perm=[0, 2, 1])
            found = build.add("MatMul", [grouped, turned], self.dtype)
            parts.append(self._of_heads(found, _size(stored, 1, self.a)))
        if place.padding:
            parts.append(self._spread(build.constant(self.dtype.numpy().type(0)), place.padding))
        return self._joined(parts)

    def keys(self) -> ir.Value:
        target = self.build.ints([1, self.rows, 1, self.further])
        units = self.build.add("Reshape", [self.place.units, target], self.dtype)
        return self._joined([self._of_heads(self._sliced(1), self.place.width), self._spread(units, self.further)])

    def _sliced(self, index: int) -> ir.Value:
        each = self.place.heads * self.place.width
        bounds = (self.build.ints([number]) for number in (index * each, index * each + each, 2))
        return self.build.add("Slice", [self.packed, *bounds], self.dtype)

    def _of_heads(self, value: ir.Value, columns: int) -> ir.Value:
        target = self.build.ints([-1, self.rows, self.place.heads, columns])
        return self.build.add("Reshape", [value, target], self.dtype)

    def _spread(self, value: ir.Value, columns: int) -> ir.Value:
        """For each batch entry."""
        sizes = self.build.ints([self.rows, self.place.heads, columns])
        shape = self.build.add("Concat", [self.batch, sizes], ir.DataType.INT64, axis=0)
        return self.build.add("Expand", [value, shape], self.dtype)

    def _joined(self, parts: list[ir.Value]) -> ir.Value:
        target = self.build.ints([-1, self.rows, self.place.heads * (self.place.width + self.further)])
        return self.build.add("Reshape", [self.build.add("Concat", parts, self.dtype, axis=3), target], self.dtype)


def _write(place: _Place, a: Analysis, names: Names) -> None:
    """The node reads and writes rows with all heads then."""
    node, end, build, dtype = place.node, place.end, Builder(a.opset), a.dtype(place.packed)
    assert dtype is not None
    wide = _Wide(place, build, dtype, a)
    inputs = [wide.queries(), wide.keys(), wide.packed]
    before, users = [producer(value) for value in node.inputs], [use.node for use in node.outputs[0].uses()]
    insert_in_front(node, build.nodes, node.name or "heads", names)
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    _describe(node, place, place.width + wide.further)
    output = node.outputs[0]
    output.name = names.fresh(f"{output.name}_rows")  # it is another value now
    output.shape = None
    after, maker = Builder(a.opset), producer(end)
    last = after.add("Reshape", [output, after.ints([size.const or -1 for size in a.known_shape(end)])], dtype)
    assert maker is not None
    insert_in_front(maker, after.nodes, node.name or "heads", names)
    take_over(end, last)
    if place.biases is not None:
        wide_biases.move(place.biases, last, a, names)
    remove_dead([*before, maker, *users])


def _describe(node: ir.Node, place: _Place, width: int) -> None:
    """The layouts in the node's attributes."""
    node.attributes.pop("output_layout", None)
    start = 2 * place.heads * place.width
    words: dict = {f"{name}_layout": "BSH" for name in ("query", "key", "value")}
    words |= {"q_num_heads": place.heads, "kv_num_heads": place.heads, "head_dim": width, "head_dim_v": place.width}
    words["packed_columns"] = [0, width, 0, width, start, place.width]
    for name, word in words.items():
        node.attributes[name] = ir.convenience.convert_attribute(name, word)
