# SPDX-License-Identifier: Apache-2.0
"""Rows whose keys are all hidden by onnxruntime's Attention and MultiHeadAttention with lengths (ALL_KEYS). Called by
side_by_side.py and reference.py.

Such a node adds a number like -10000 to all scores of the row. That leaves its softmax as it is, but in float32 the
scores are rounded to steps of 2^-10 beside it, of which the fused node knows nothing: it attends all keys. So the
original is computed once more with a length that hides no key in the place of 0, to know how much it is off itself.
"""

from __future__ import annotations

import json
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import all_nodes
from faexport.spec import ALL_KEYS
from faexport.verify.side_by_side_math import Emit

_MANY = 1 << 30  # more keys than there are


def named_by(rewritten: ir.Model) -> frozenset[str]:
    """The lengths that fused nodes read so, as the original calls them."""
    entries = (node.metadata_props.get(ALL_KEYS, "[]") for node in all_nodes(rewritten))
    return frozenset(name for entry in entries for name in json.loads(entry))


def where_zero(lengths: ir.Value, emit: Emit) -> ir.Value:
    """The lengths with one that hides no key in the place of 0, or of less."""
    one, many = (emit.constant(np.array(number, np.int32)) for number in (1, _MANY))
    return emit("Where", emit("Less", lengths, one), many, lengths)


def with_all_keys(original: ir.Model, names: Collection[str]) -> ir.Model:
    """The original, in place, whose attention operators read these lengths so."""
    made: dict[ir.Value, ir.Value] = {}
    for node in list(all_nodes(original)):
        for index, value in enumerate(node.inputs if node.domain == "com.microsoft" else ()):
            if value is None or value.name not in names:
                continue
            owner = value.graph or node.graph
            if value not in made:
                assert isinstance(owner, ir.Graph)
                made[value] = where_zero(value, Emit(owner, original.graph))
            node.replace_input_with(index, made[value])
    for graph in {value.graph for value in made.values()}:
        assert graph is not None
        graph.sort()
    return original
