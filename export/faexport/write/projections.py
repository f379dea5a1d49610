# SPDX-License-Identifier: Apache-2.0
"""Makes one matrix product of those that project queries, keys and values from the same tensor. Called by pipeline.py.

The operator then reads its heads from the columns of the one result (`packed_columns`). The weights are joined by a
Concat of the file's own tensors, which runtimes compute once, when they load the model: so no weight is copied here,
the file doesn't grow, and external data stays where it is.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from faexport.graph.edits import Names, insert_in_front, remove_dead
from faexport.graph.fused import LAYOUTS, optional_inputs, optional_outputs
from faexport.graph.nodes import given, op, producer
from faexport.graph.surgery import Builder
from faexport.spec import AttentionSpec, Candidate, Fact
from faexport.understand.shapes.analysis import Analysis

ROLES = ("queries", "keys", "values")
_FAR = 8  # nodes in front of the operator, among which a product is looked for
_KEEPS_WEIGHT = ("Identity", "Transpose", "Cast")  # between a stored weight and its product


class _Apart(Exception):
    """Why products stay as they are, as a sentence without its full stop."""


@dataclasses.dataclass(frozen=True)
class _Projection:
    """result = source @ weight + bias, read by the operator alone."""

    result: ir.Value  # [B, S, N]
    source: ir.Value  # [B, S, K]
    weight: ir.Value  # [K, N]
    bias: ir.Value | None  # [N]
    width: int  # N
    dtype: ir.DataType


def pack_projections(model: ir.Model, candidates: Sequence[Candidate], a: Analysis, names: Names) -> list[str]:
    """Packs the projections of each fused site where that computes the same. Returns a note for each reason why
    projections stayed as they are."""
    apart: dict[str, list[str]] = collections.defaultdict(list)
    for candidate in candidates:
        node, spec = candidate.fused_node, candidate.outcome
        if node is None or not isinstance(spec, AttentionSpec) or "packed_columns" in node.attributes:
            continue
        try:
            roles, reasons = _pack(model, node, a, names)
        except _Apart as error:
            roles, reasons = [], [str(error)]
        for why in reasons:
            apart[why].append(candidate.name)
        if roles:
            fact = Fact(f"{', '.join(roles[:-1])} and {roles[-1]} are one product", (node.name or "",))
            candidate.outcome = dataclasses.replace(spec, facts=(*spec.facts, fact))
    return [f"{sites_text(sites)}: projections stay as they are: {why}" for why, sites in apart.items()]


def sites_text(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"site '{names[0]}'{more}"


def _pack(model: ir.Model, node: ir.Node, a: Analysis, names: Names) -> tuple[list[str], list[str]]:
    """Packs what can be packed of one operator; returns the roles that now share a product, and why others don't.
    Raises _Apart."""
    if node.graph is not model.graph:
        raise _Apart("they stand in the body of another node")
    if {"past_key", "past_value"} & set(optional_inputs(node)):
        raise _Apart("the operator has a cache, whose new rows are read by themselves")
    if {"present_key", "present_value"} & set(optional_outputs(node)):
        raise _Apart("a cache is made of their results")
    heads = [node.attributes.get_int(f"{kind}_num_heads", 0) for kind in ("q", "kv", "kv")]
    moved = [given(node, n) for n in range(3) if _layout(node, n) != "BSH"]
    if moved or 0 in heads:
        between = next((op(producer(value)) for value in moved if _is_of_projection(value, a)), "")
        if between:
            raise _Apart(f"{between} stands between them and the operator")
        return [], []
    found = [_projection_or_reason(node, n, a) for n in range(3)]
    sources = [p.source if isinstance(p, _Projection) else None for p in found]
    group = max(([n for n in range(3) if sources[n] is s] for s in sources if s is not None), key=len, default=[])
    if len(group) < 2:
        reasons = [why for why in found if isinstance(why, str)]
        raise _Apart(reasons[-1] if reasons else "they are made from different tensors")
    parts = {n: p for n in group if isinstance(p := found[n], _Projection)}
    sizes = [_head_size(parts.get(n), node.inputs[n], heads[n], a) for n in range(3)]
    if sizes[0] != sizes[1]:
        raise _Apart("their columns are not those of whole heads")
    _insert(node, parts, sizes, Builder(a.opset), names)
    return [ROLES[n] for n in group], [why for why in found if isinstance(why, str)]


def _head_size(part: _Projection | None, value: ir.Value | None, heads: int, a: Analysis) -> int:
    """Columns of a head. Raises _Apart."""
    shape = a.shape(value)
    width = part.width if part is not None else shape[-1].const if shape else None
    if width is None or width % heads:
        raise _Apart("their columns are not those of whole heads")
    return width // heads


def _is_of_projection(value: ir.Value, a: Analysis) -> bool:
    """Does a product with stored weights stand in front of it?"""
    node = producer(value)
    for _ in range(_FAR):
        if node is None:
            return False
        if op(node) == "MatMul":
            return _is_weight(given(node, 1), a)
        node = producer(next((v for v in node.inputs if v is not None and not a.is_static(v)), None))
    return False


def _projection_or_reason(node: ir.Node, n: int, a: Analysis) -> _Projection | str:
    try:
        return _projection(node, n, ROLES[n], a)
    except _Apart as why:
        return str(why)


def _layout(node: ir.Node, n: int) -> str:
    word = node.attributes.get_string(LAYOUTS[n], "")
    shape = given(node, n).shape
    return word or ("BSH" if shape is not None and len(shape) == 3 else "")


def _projection(node: ir.Node, n: int, role: str, a: Analysis) -> _Projection:
    """Reads the product behind an input of the operator. Raises _Apart."""
    result = given(node, n)
    last = producer(result)
    product, bias = last, None
    if last is not None and op(last) == "Add":
        sides = [(x, y) for x, y in (last.inputs, reversed(last.inputs)) if op(producer(x)) == "MatMul"]
        if not sides:
            raise _Apart(f"the {role} are not the result of a product")
        product, bias = producer(sides[0][0]), sides[0][1]
    if product is None or op(product) != "MatMul":
        raise _Apart(f"the {role} are not the result of a product")
    weight = given(product, 1)
    shape, dtype = a.shape(weight), a.dtype(weight)
    if not _is_weight(weight, a) or dtype is None or shape is None or len(shape) != 2 or shape[1].const is None:
        raise _Apart(f"the weight of the {role} is quantized, given by the caller or computed")
    if len(list(weight.uses())) > 1:
        raise _Apart(f"the weight of the {role} is used elsewhere too")
    width = shape[1].const
    if bias is not None:
        sizes = a.shape(bias)
        if sizes is None or len(sizes) != 1 or sizes[0].const != width or not _is_weight(bias, a):
            raise _Apart(f"what is added to the {role} is no stored bias of one number a column")
    for value in dict.fromkeys((result, product.outputs[0])):
        if len(list(value.uses())) > 1 or value.is_graph_output():
            raise _Apart(f"the projected {role} are used elsewhere too")
    return _Projection(result, given(product, 0), weight, bias, width, dtype)


def _is_weight(value: ir.Value, a: Analysis) -> bool:
    """Stored in the file, and no caller can give another."""
    while (tensor := a.tensor(value)) is None:
        node = producer(value)
        if node is None or op(node) not in _KEEPS_WEIGHT:
            return False
        value = given(node, 0)
    return tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _insert(
    node: ir.Node, parts: Mapping[int, _Projection], sizes: Sequence[int], build: Builder, names: Names
) -> None:
    """Puts the one product in front of the operator. `parts`: by number of the operator's input; `sizes`: columns of a
    head of queries, keys and values."""
    first = next(iter(parts.values()))
    dtype, width = first.dtype, sum(p.width for p in parts.values())
    weights = build.add("Concat", [p.weight for p in parts.values()], dtype, axis=1)
    packed = build.add("MatMul", [first.source, weights], dtype)
    if any(p.bias is not None for p in parts.values()):
        packed.shape = _widened(first.result.shape, width)
        biases = [p.bias if p.bias is not None else _zeros(build, p) for p in parts.values()]
        packed = build.add("Add", [packed, build.add("Concat", biases, dtype, axis=0)], dtype)
    packed.shape = _widened(first.result.shape, width)
    insert_in_front(node, build.nodes, f"{node.name}_projection", names)
    columns: list[int] = []
    start = 0
    for n, size in enumerate(sizes):
        columns += [start if n in parts else 0, size]
        if n in parts:
            start += parts[n].width
            node.replace_input_with(n, packed)
            node.attributes[LAYOUTS[n]] = ir.AttrString(LAYOUTS[n], "BSH")
    node.attributes["packed_columns"] = ir.AttrInt64s("packed_columns", columns)
    node.attributes["head_dim"] = ir.AttrInt64("head_dim", sizes[0])
    node.attributes["head_dim_v"] = ir.AttrInt64("head_dim_v", sizes[2])
    remove_dead([p.result.producer() for p in parts.values()])


def _zeros(build: Builder, part: _Projection) -> ir.Value:
    return build.constant(np.zeros(part.width, part.dtype.numpy()))


def _widened(shape: ir.Shape | None, width: int) -> ir.Shape | None:
    return None if shape is None else ir.Shape([*list(shape)[:-1], width])
