# SPDX-License-Identifier: Apache-2.0
"""The shapes and the type of faexport::FlashAttention's outputs: the one rule, as docs/operator.md gives it.

Used by analysis.py, for models that have the operator already, and by faexport/schema.py, for onnx's own inference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from faexport.graph.nodes import attribute
from faexport.sizes.dims import Dim
from faexport.spec import DOMAIN, OP_TYPE, Layout, listed
from faexport.understand.shapes.known import Known, Shape, Shapes
from faexport.understand.shapes.rules import shape_of

OPTIONAL_OUTPUTS = ("present_key", "present_value", "lse")  # in this order, behind the first


# Values of the attribute output_dtype, which a float8 query has; "" stands for bfloat16.
OUTPUT_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "float8_e4m3fn": ir.DataType.FLOAT8E4M3FN,
}


def output_dtype(query: ir.DataType, word: str) -> ir.DataType:
    """The type of the first output, of the query's type and the attribute output_dtype."""
    return OUTPUT_DTYPES.get(word, ir.DataType.BFLOAT16) if query is ir.DataType.FLOAT8E4M3FN else query


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Sizes of query, key or value, whatever its layout; None where unknown."""

    layout: Layout | None = None
    batch: Dim | None = None
    heads: Dim | None = None
    rows: Dim | None = None
    head_dim: Dim | None = None


def output_shapes(word: Callable[[str], Any], shapes: Sequence[Shape | None]) -> dict[str, list[Dim | None]]:
    """The shapes of the outputs that are there, by name; a size is None where it is unknown, and an output isn't listed
    where not even its rank is known. Raises ValueError with a sentence where attributes and shapes contradict.

    Args:
        word: gives the value of an attribute, None where the node doesn't have it.
        shapes: of the inputs.
    """
    packed = (word("head_dim"), word("head_dim_v") or word("head_dim")) if word("packed_columns") else (0, 0)
    query = _tensor("query", shapes[0], word, "q_num_heads", packed[0])
    key = _tensor("key", shapes[1], word, "kv_num_heads", packed[0])
    value = _tensor("value", shapes[2], word, "kv_num_heads", packed[1])
    found = {}
    layout = _layout(word, "output_layout") or query.layout
    if layout is not None:
        width = query.heads * value.head_dim if query.heads is not None and value.head_dim is not None else None
        sizes = {"B": query.batch, "S": query.rows, "H": query.heads, "D": value.head_dim}
        found["output"] = [query.batch, query.rows, width] if layout is Layout.BSH else [sizes[x] for x in layout]
    for name in listed(word("optional_outputs")):
        if name not in OPTIONAL_OUTPUTS:
            raise ValueError(f"optional_outputs names '{name}'; known are {', '.join(OPTIONAL_OUTPUTS)}")
        if name == "lse":
            found[name] = [query.batch, query.heads, query.rows]
        else:
            found[name] = _present(
                word, shapes, name.replace("present", "past"), key if name == "present_key" else value
            )
    return found


def _tensor(name: str, shape: Shape | None, word: Callable[[str], Any], count: str, head_dim: int | None) -> _Tensor:
    layout = _layout(word, f"{name}_layout")
    heads = Dim.of(word(count)) if word(count) else None
    if shape is None:
        return _Tensor(layout, heads=heads, head_dim=Dim.of(head_dim) if head_dim else None)
    layout = layout or (Layout.BSH if len(shape) == 3 else Layout.BHSD)
    if len(shape) != len(layout):
        raise ValueError(f"{name} has rank {len(shape)}; its layout {layout} has rank {len(layout)}")
    if layout is not Layout.BSH:
        return _Tensor(layout, shape[0], shape[layout.index("H")], shape[layout.index("S")], shape[3])
    per_head = Dim.of(head_dim) if head_dim else shape[2].divide(heads) if heads is not None else None
    return _Tensor(layout, shape[0], heads, shape[1], per_head)


def _layout(word: Callable[[str], Any], name: str) -> Layout | None:
    text = word(name)
    if text and text not in set(Layout):
        raise ValueError(f"{name} is '{text}'; it must be {', '.join(Layout)}")
    return Layout(text) if text else None


def _present(word: Callable[[str], Any], shapes: Sequence[Shape | None], name: str, new: _Tensor) -> list[Dim | None]:
    """The shape of the present of the past called `name`, whose new rows are `new`."""
    names = listed(word("optional_inputs"))
    past, extent = (
        shapes[3 + names.index(word)] if word in names and 3 + names.index(word) < len(shapes) else None
        for word in (name, "kv_extent")
    )
    cache, layout = word("cache") or "append", _layout(word, "cache_layout") or Layout.BHSD
    known = past if past is not None and len(past) == len(layout) else None
    if name in names and cache == "paged":
        return list(past) if past is not None and len(past) == 4 else [None] * 4
    rows = new.rows
    if name in names:
        rows = known[layout.index("S")] if known is not None else None
        if cache == "append":
            rows = rows + new.rows if rows is not None and new.rows is not None else None
        elif "kv_extent" in names:
            rows = _larger(rows, extent[-1] if extent else None)
    packs = word("kv_cache_bit_width") == 4 and name in names  # two numbers in an element: only the past knows
    if layout is Layout.BSH:
        width = new.heads * new.head_dim if new.heads is not None and new.head_dim is not None else None
        return [new.batch, rows, (known[2] if known is not None else None) if packs else width]
    columns = (known[3] if known is not None else None) if packs else new.head_dim
    sizes = {"B": new.batch, "H": new.heads, "S": rows, "D": columns}
    return [sizes[letter] for letter in layout]


def _larger(a: Dim | None, b: Dim | None) -> Dim | None:
    if a is None or b is None:
        return None
    if a.const is not None and b.const is not None:
        return Dim.of(max(a.const, b.const))
    return a if a == b and a.is_known else None


@shape_of(f"{DOMAIN}::{OP_TYPE}")
def _fused(node: ir.Node, a: Known) -> Shapes:
    found = output_shapes(lambda name: attribute(node, name), [a.shape(value) for value in node.inputs])
    shapes = (found.get(name) for name in ("output", *OPTIONAL_OUTPUTS))
    return [None if s is None else tuple(Dim.unknown("operator") if d is None else d for d in s) for s in shapes]
