# SPDX-License-Identifier: Apache-2.0
"""Writes the convolution that cuts an image into patches as a product, for onnxruntime's CUDA provider
(Options.joins_cuda). Called by pipeline.py.

Vision transformers embed patches by a Conv whose kernels don't overlap. As a product of the patches' pixels with the
weights it needs no search for an algorithm, no memory beside its operands, and no Transpose behind it, since the
channels come last at once.
"""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from faexport.graph.edits import Names, insert_in_front, remove_dead, take_over
from faexport.graph.nodes import (
    RUNTIME_FLOATS,
    attribute,
    data_users,
    given,
    graphs_of,
    is_transpose,
    maker,
    op,
    operand,
)
from faexport.graph.surgery import Builder
from faexport.sizes.dims import Dim
from faexport.spec import Refusal
from faexport.understand.layout.shape_uses import rebuild, uses_of
from faexport.understand.shapes.analysis import Analysis


def join(model: ir.Model, a: Analysis, names: Names) -> None:
    """Changes the model in place."""
    a.extend(model)
    for graph, _ in graphs_of(model):
        for node in list(graph):
            found = _patches_of(node, a) if op(node) == "Conv" else None
            if found is not None:
                _write(found, a, names)


@dataclasses.dataclass(frozen=True)
class _Patches:
    """A Conv, the sizes of a patch, and how many of them stand along each axis of the image."""

    conv: ir.Node
    image: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    channels: int
    columns: int  # what each patch becomes
    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    last: tuple[ir.Node, ...]  # Transposes behind it that make the channels its last axis
    rows: tuple[ir.Node, ...]  # likewise, behind a Reshape that makes the patches one axis
    shapes: tuple[tuple[ir.Node, list[ir.Node]], ...]  # Shapes of what goes, and what computes them from the image


def _patches_of(node: ir.Node, a: Analysis) -> _Patches | None:
    """The Conv, where its kernels cover an image of known size once and all that reads it wants the channels last."""
    image, weight, bias = (operand(node, index) for index in range(3))
    shape, sizes = a.shape(image), _numbers(a.shape(weight))
    if image is None or weight is None or not shape or not sizes or a.dtype(image) not in RUNTIME_FLOATS:
        return None
    columns, channels, *patch = sizes
    if math.prod(patch) == 1 or not a.is_static(weight) or not (bias is None or a.is_static(bias)):
        return None
    image_sizes = _numbers(shape[1:])
    if image_sizes is None or image_sizes[0] != channels or not _covers_once(node, patch, image_sizes[1:]):
        return None
    last, rows = _transposes(node.outputs[0], columns, a)
    shapes = _shapes([node.outputs[0], *(given(turn, 0) for turn in rows)], image, a)
    if len(last) + len(rows) == 0 or shapes is None:
        return None
    counts = tuple(whole // size for whole, size in zip(image_sizes[1:], patch, strict=True))
    return _Patches(node, image, weight, bias, channels, columns, tuple(patch), counts, last, rows, shapes)


def _numbers(sizes: tuple[Dim, ...] | None) -> list[int] | None:
    """Sizes, where all are known and none is 0."""
    known = [size.const for size in sizes or ()]
    return [size for size in known if size] if known and all(known) else None


def _covers_once(node: ir.Node, patch: list[int], image: list[int]) -> bool:
    """Does each pixel belong to one patch?"""
    ones = [1] * len(patch)
    plain = attribute(node, "group", 1) == 1 and list(attribute(node, "dilations", ones)) == ones
    auto = attribute(node, "auto_pad", "NOTSET")
    padded = any(attribute(node, "pads", ())) or auto not in ("NOTSET", b"NOTSET", "VALID", b"VALID")
    whole = len(image) == len(patch) and all(x % size == 0 for x, size in zip(image, patch, strict=False))
    return plain and not padded and whole and list(attribute(node, "strides", ones)) == patch


def _transposes(value: ir.Value, columns: int, a: Analysis) -> tuple[tuple[ir.Node, ...], tuple[ir.Node, ...]]:
    """What reads a Conv's output [B, C, ...], where it is Transposes to [B, ..., C], or to [B, patches, C] behind a
    Reshape; nothing where something else reads it, too, or a body of an If, Loop or Scan does."""
    rank, last, rows = a.rank(value), [], []
    assert rank is not None
    for user in data_users(value):
        if _turns(user, rank):
            last.append(user)
            continue
        shape = a.shape(user.outputs[0]) if op(user) == "Reshape" and user.inputs[0] is value else None
        merged = shape is not None and len(shape) == 3 and shape[0] == a.known_shape(value)[0] and shape[1] == columns
        behind = data_users(user.outputs[0]) if merged and not user.outputs[0].is_graph_output() else []
        if not behind or not all(_turns(node, 3) for node in behind):
            return (), ()
        rows += behind
    outputs = [node for node in (*last[1:], *rows[1:]) if node.outputs[0].is_graph_output()]
    inside = any(node.graph is not maker(value).graph for node in (*last, *rows))
    return ((), ()) if value.is_graph_output() or outputs or inside else (tuple(last), tuple(rows))


def _shapes(values: list[ir.Value], image: ir.Value, a: Analysis) -> tuple[tuple[ir.Node, list[ir.Node]], ...] | None:
    """What computes the shapes of these, where they are asked for; None where that isn't known."""
    found = []
    for value in dict.fromkeys(values):
        for use in uses_of(value, a.known_shape(value)):
            nodes = rebuild(use, [image], a)
            if isinstance(nodes, Refusal):
                return None
            found.append((use.node, nodes))
    return tuple(found)


def _turns(node: ir.Node, rank: int) -> bool:
    """Does it make the second axis the last one?"""
    return is_transpose(node, [0, *range(2, rank), 1])


def _write(found: _Patches, a: Analysis, names: Names) -> None:
    build, dtype, count = Builder(a.opset), a.dtype(found.image), len(found.sizes)
    pairs = [size for both in zip(found.counts, found.sizes, strict=True) for size in both]
    apart = build.add("Reshape", [found.image, build.ints([0, found.channels, *pairs])], dtype)
    perm = [0, *range(2, 2 + 2 * count, 2), 1, *range(3, 3 + 2 * count, 2)]
    turned = build.add("Transpose", [apart], dtype, perm=perm)
    width = found.channels * math.prod(found.sizes)
    pixels = build.add("Reshape", [turned, build.ints([0, math.prod(found.counts), width])], dtype)
    flat = build.add("Reshape", [found.weight, build.ints([found.columns, width])], dtype)
    patches = build.add("MatMul", [pixels, build.add("Transpose", [flat], dtype, perm=[1, 0])], dtype)
    if found.bias is not None:
        patches = build.add("Add", [patches, found.bias], dtype)
    image = patches
    if found.last:
        image = build.add("Reshape", [patches, build.ints([0, *found.counts, found.columns])], dtype)
    insert_in_front(found.conv, build.nodes, found.conv.name or "patches", names)
    for shape, nodes in found.shapes:
        insert_in_front(shape, nodes, shape.name or "shape", names)
        take_over(shape.outputs[0], nodes[-1].outputs[0])
        remove_dead([shape])
    for turns, instead in ((found.last, image), (found.rows, patches)):
        for turn in turns[1:]:
            ir.convenience.replace_all_uses_with(turn.outputs[0], turns[0].outputs[0])
        if turns:
            take_over(turns[0].outputs[0], instead)
    remove_dead([*found.last, *found.rows])
