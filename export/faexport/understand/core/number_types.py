# SPDX-License-Identifier: Apache-2.0
"""The type in which masks and biases are understood that meet scores in several types: a bias in float16, then a Cast
to float32, then a mask. Called by match/softmax_core.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from faexport.graph.nodes import FLOATS, op
from faexport.graph.surgery import Builder
from faexport.spec import MaskTerm
from faexport.understand.core.score_chain import Scores
from faexport.understand.layout.view_ops import WIDTHS
from faexport.understand.shapes.analysis import Analysis


def type_of_masks(scores: Scores, a: Analysis) -> ir.DataType:
    """The widest type in which masks meet the scores, or in which these are multiplied behind one: it holds what the
    narrower ones hold. It isn't that of the product where scores in half precision are cast in front of their masks."""
    meeting = [term.node for term in scores.terms if term.kind.meets_scores]
    behind = scores.nodes[min(map(scores.nodes.index, meeting)) :] if meeting else []
    nodes = [*meeting, *(node for node in behind if op(node) in ("Mul", "Div"))]
    found = {a.dtype(node.outputs[0]) for node in nodes}
    widest = max((WIDTHS[dtype] for dtype in FLOATS if dtype in found), default=0)
    types = [dtype for dtype in FLOATS if dtype in found and WIDTHS[dtype] == widest]
    if len(types) > 1:
        return ir.DataType.FLOAT  # both half-precision types
    return types[0] if types else a.dtype(scores.product.node.outputs[0]) or ir.DataType.FLOAT


def in_one_type(scores: Scores, a: Analysis) -> list[MaskTerm]:
    """The terms with values of type_of_masks(), by nodes that are not in the graph yet, and with what the scores are
    cast to behind them."""
    dtype = type_of_masks(scores, a)
    return [
        dataclasses.replace(
            term,
            value=_cast(term.value, term, dtype, a),
            fill=None if term.fill is None else _cast(term.fill, term, dtype, a),
            narrowed=_narrowest(scores.nodes[scores.nodes.index(term.node) :], a)
            if term.node in scores.nodes
            else None,
        )
        for term in scores.terms
    ]


def _narrowest(nodes: Sequence[ir.Node], a: Analysis) -> ir.DataType | None:
    found = {a.dtype(node.outputs[0]) for node in nodes}
    return min((dtype for dtype in FLOATS if dtype in found), key=WIDTHS.__getitem__, default=None)


def _cast(value: ir.Value, term: MaskTerm, dtype: ir.DataType, a: Analysis) -> ir.Value:
    own = a.dtype(value)
    if own not in FLOATS or own == dtype or not term.kind.meets_scores:
        return value
    cast = Builder(a.opset).add("Cast", [value], dtype, to=int(dtype))
    cast.name = f"{term.node.outputs[0].name}_{value.name}_faexport_{dtype.name.lower()}"
    a.define_broadcast(cast, value)
    return cast
