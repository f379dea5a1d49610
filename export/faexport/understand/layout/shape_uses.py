# SPDX-License-Identifier: Apache-2.0
"""Shape nodes that read a tensor which fusing removes (scores, probabilities, the output before its Transpose), as
exporters write them to compute a Reshape. Their result is built anew from the shapes of query, key and value. Called
by match/softmax_core.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from faexport.graph.nodes import attribute, given, is_live, name_of, op
from faexport.graph.surgery import Builder
from faexport.sizes import algebra
from faexport.sizes.dims import Dim
from faexport.spec import Refusal
from faexport.understand.shapes.analysis import Analysis


@dataclasses.dataclass(frozen=True)
class ShapeUse:
    node: ir.Node  # the Shape node
    sizes: tuple[Dim, ...]  # of the tensor that it reads


def shape_users(value: ir.Value) -> list[ir.Node]:
    return [n for n in dict.fromkeys(use.node for use in value.uses()) if op(n) == "Shape" and is_live(n)]


def uses_of(value: ir.Value, sizes: Sequence[Dim]) -> list[ShapeUse]:
    return [ShapeUse(node, tuple(sizes)) for node in shape_users(value)]


def as_it_is(use: ShapeUse, a: Analysis) -> ShapeUse:
    """With the sizes that hold whatever is taken for granted of the site that is being looked at."""
    with a.without_learnt():
        own = a.shape(given(use.node, 0))
    return use if own is None else dataclasses.replace(use, sizes=tuple(own))


def rebuild(use: ShapeUse, sources: Sequence[ir.Value], a: Analysis) -> list[ir.Node] | Refusal:
    """Nodes that compute what the Shape node gave from shapes of `sources`; the last one's output replaces it."""
    sizes = use.sizes[slice(attribute(use.node, "start", 0), attribute(use.node, "end"))]
    build = Builder(a.opset)
    numbers = [d.const for d in sizes if d.const is not None]
    if len(numbers) == len(sizes):
        build.ints(numbers)
        return build.nodes
    shapes: dict[ir.Value, ir.Value] = {}
    graph, parts = use.node.graph, []
    sources = [*sources, *(graph.inputs if graph is not None else ())]
    for size in sizes:
        part = build.ints([size.const]) if size.const is not None else _met_from(build, size, sources, shapes, a)
        if part is None:
            return Refusal("the shape of scores or output is used elsewhere too (Shape)", name_of(use.node))
        parts.append(part)
    build.add("Concat", parts, ir.DataType.INT64, axis=0)
    return build.nodes


def _met_from(
    build: Builder, size: Dim, sources: Iterable[ir.Value], shapes: dict[ir.Value, ir.Value], a: Analysis
) -> ir.Value | None:
    """As size_from(), also where no source has the size, but each of those that meet in it: all that aren't 1 are the
    same."""
    found = size_from(build, size, sources, shapes, a)
    atom = algebra.only_atom(size.expr)
    if found is not None or atom is None or atom.op != "meet":
        return found
    for part in atom.args:
        own = size_from(build, Dim(part), sources, shapes, a)
        if own is None:
            return None
        if found is None:
            found = own
        else:
            is_one = build.add("Equal", [found, build.ints([1])], ir.DataType.BOOL)
            found = build.add("Where", [is_one, own, found], ir.DataType.INT64)
    return found


def size_from(
    build: Builder, size: Dim, sources: Iterable[ir.Value], shapes: dict[ir.Value, ir.Value], a: Analysis
) -> ir.Value | None:
    """`size` as a constant times a size of one of the sources, or as that divided by one, int64 [1]; None where no
    source has it. `shapes` holds the Shape nodes that were made for them."""
    for source in sources:
        for axis, own in enumerate(a.shape(source) or ()):
            if own.const is not None:
                continue
            factor, divisor = (None if x is None else x.const for x in (size.divide(own), own.divide(size)))
            if factor is None and not divisor:
                continue
            if source not in shapes:
                shapes[source] = build.add("Shape", [source], ir.DataType.INT64)
            part = build.add("Gather", [shapes[source], build.ints([axis])], ir.DataType.INT64, axis=0)
            if factor == 1:
                return part
            kind, number = ("Div", divisor) if factor is None else ("Mul", factor)
            return build.add(kind, [part, build.ints([number or 1])], ir.DataType.INT64)
    return None
