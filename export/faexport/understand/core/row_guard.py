# SPDX-License-Identifier: Apache-2.0
"""The guard that exporters put behind the product with the values: rows in which a mask lets no key through become 0.

Called by value_chain.py. Only its form is read here; whether 0 is what attention gives there is for mask/terms.py.
"""

from __future__ import annotations

import onnx_ir as ir

from faexport.graph.nodes import FLOATS, attribute, live_users, op, operand, producer
from faexport.sizes.dims import Dim
from faexport.spec import MaskTerm, TermKind
from faexport.understand.shapes.analysis import Analysis


def row_guard(y: ir.Value, axes: str, dims: tuple[Dim, ...], a: Analysis) -> MaskTerm | None:
    """The term of Where(ReduceSum(Cast(mask), -1) < 1, 0, y), where nothing else reads `y` [..., S, D]. `axes` and
    `dims` are those of the probabilities [..., S, T] that the mask is aligned with."""
    users = live_users(y)
    if y.is_graph_output() or len(users) != 1 or op(users[0]) != "Where":
        return None
    node = users[0]
    empty, zero, kept = node.inputs
    if kept is not y or empty is y or zero is y or a.scalar(zero) != 0:
        return None
    if a.shape(y) is None or a.shape(node.outputs[0]) != a.shape(y):
        return None
    mask = _counted(empty, a)
    if mask is None or len(a.known_shape(mask)) > len(axes):
        return None
    return MaskTerm(TermKind.EMPTY_ROW, mask, node, axes, dims)


def _counted(empty: ir.Value | None, a: Analysis) -> ir.Value | None:
    """The bool mask of which `empty` says that the last axis holds no true."""
    less = producer(empty)
    if less is None or op(less) != "Less" or not 0 < (a.scalar(less.inputs[1]) or 0) <= 1:
        return None
    total = producer(less.inputs[0])
    if total is None or op(total) != "ReduceSum" or attribute(total, "keepdims", 1) != 1:
        return None
    cast = producer(total.inputs[0])
    if cast is None or op(cast) != "Cast" or ir.DataType(attribute(cast, "to")) not in FLOATS:
        return None
    mask = cast.inputs[0]
    shape = a.shape(mask)
    if a.dtype(mask) != ir.DataType.BOOL or not shape:
        return None
    reduced = a.constant(operand(total, 1))
    given = attribute(total, "axes") if reduced is None else reduced.reshape(-1).tolist()
    return mask if given is not None and list(given) in ([-1], [len(shape) - 1]) else None
