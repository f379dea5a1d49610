# SPDX-License-Identifier: Apache-2.0
"""A bias that is the sum of one for the rows and one for the columns of an image of keys, as Segment Anything and
ViTDet have it ("decomposed relative positions", Li et al. 2022): it becomes further columns of queries and keys.

    score(i, j) = scale * q(i) . k(j) + rows(i, y(j)) + columns(i, x(j))
                = scale * [q(i), rows(i), columns(i)] . [k(j), e(y(j)) / scale, e(x(j)) / scale]

with unit vectors e. The keys are divided by the scale, since rows(i) / scale may be too large for half precision.
So the bias, whose memory grows with the square of the tokens, is not made at all. That is for a GPU, whose kernels
take wider heads in little more time than they read such a bias, and for half precision, or float32 that is multiplied
as such; on a CPU products are what takes time.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from faexport.cuda_heads import widest
from faexport.graph.nodes import VIEWS, dtype_name, name_of, op, producer
from faexport.graph.surgery import Missing
from faexport.match import Context, refiner
from faexport.sizes.dims import product
from faexport.spec import AttentionSpec, Fact, Layout
from faexport.understand.shapes.analysis import Analysis

FEWEST_KEYS = 128  # below, the bias is small and wider heads gain nothing
SCALES = (2.0**-14, 2.0**14)  # whose inverses float16 has at full precision
ALIGNED = 8  # columns: rows of 16 bytes in half precision
_MOVES = (*VIEWS, "Transpose", "Cast")
_PRODUCTS = ("Einsum", "MatMul", "Gemm")  # finite for finite operands


@dataclasses.dataclass(frozen=True)
class _Parts:
    """bias = rows [..., Y] for each row of the image and columns [..., X] for each column, of Y * X keys."""

    rows: ir.Value
    columns: ir.Value
    num_rows: int
    num_columns: int


@refiner
def bias_in_columns(spec: AttentionSpec, context: Context) -> AttentionSpec:
    """The spec without its bias, where that is such a sum."""
    a, options = context.analysis, context.options
    sides, dtype = (spec.query, spec.key), a.dtype(spec.query.value)
    is_plain = spec.past_key is None and not (spec.further_inputs or spec.softcap or options.float8)
    if options.target != "cuda" or options.dtype is not None or not is_plain or spec.mask.attn_bias is None:
        return spec
    if dtype == ir.DataType.FLOAT and not options.half and options.float32 != "tf32x3":
        return spec  # one product in TF32 would round the bias, too, which the graph adds in float32
    if any(side.layout is not Layout.BHSD or side.column_start is not None for side in sides) or dtype is None:
        return spec
    parts, shape = _parts_of(spec, a), a.shape(spec.query.value)
    if parts is None or shape is None or shape[3].const is None or not SCALES[0] <= spec.softmax_scale <= SCALES[1]:
        return spec
    width = shape[3].const + parts.num_rows + parts.num_columns
    if width + -width % ALIGNED > widest().get(dtype_name(dtype) or "", 0) or a.dtype(parts.rows) != dtype:
        return spec
    try:
        return _in_columns(spec, parts, -width % ALIGNED, dtype, context)
    except Missing:
        return spec


def _parts_of(spec: AttentionSpec, a: Analysis) -> _Parts | None:
    total, query, key = producer(spec.mask.attn_bias), a.shape(spec.query.value), a.shape(spec.key.value)
    while total is not None and op(total) in VIEWS:
        total = producer(total.inputs[0])
    whole = a.shape(total.outputs[0]) if total is not None and op(total) == "Add" else None
    if total is None or whole is None or len(whole) < 3 or query is None or key is None:
        return None
    num_rows, num_columns = whole[-2].const, whole[-1].const
    if not num_rows or not num_columns or key[2] != num_rows * num_columns or num_rows * num_columns < FEWEST_KEYS:
        return None
    if product(whole[:-2]) != product(query[:3]):  # it is broadcast
        return None
    for first, second in (total.inputs, total.inputs[::-1]):
        if first is None or second is None or not (_is_product(first) and _is_product(second)):
            continue
        if a.shape(first) == (*whole[:-1], 1) and a.shape(second) == (*whole[:-2], 1, whole[-1]):
            return _Parts(first, second, num_rows, num_columns)
    return None


def _is_product(value: ir.Value | None) -> bool:
    """Is it a view of a matrix product? What may be infinite, as a mask may, must not be multiplied by 0."""
    node = producer(value)
    while node is not None and op(node) in _MOVES:
        node = producer(node.inputs[0])
    return node is not None and op(node) in _PRODUCTS


def _in_columns(
    spec: AttentionSpec, parts: _Parts, padding: int, dtype: ir.DataType, context: Context
) -> AttentionSpec:
    """With so many columns of zeros behind."""
    shared, a = context.masks.nodes(context.graph), context.analysis
    query, key, bias = spec.query.value, spec.key.value, spec.mask.attn_bias
    leads = shared.add("Shape", [query], ir.DataType.INT64, start=0, end=3)
    counts = (parts.num_rows, parts.num_columns)
    further = [
        shared.add("Reshape", [value, shared.add("Concat", [leads, shared.constant([count])], axis=0)], dtype)
        for value, count in zip((parts.rows, parts.columns), counts, strict=True)
    ]
    if padding:
        shape = shared.add("Concat", [leads, shared.constant([padding])], axis=0)
        further.append(shared.add("Expand", [shared.constant(np.zeros((), dtype.numpy())), shape], dtype))
    units = np.concatenate([np.repeat(np.eye(counts[0]), counts[1], 0), np.tile(np.eye(counts[1]), (counts[0], 1))], 1)
    units = np.pad(units, ((0, 0), (0, padding))) / spec.softmax_scale
    groups = shared.add("Shape", [key], ir.DataType.INT64, start=0, end=2)
    heads = shared.add("Concat", [groups, shared.constant([1, 1])], axis=0)
    places = shared.add("Expand", [shared.constant(units[None, None].astype(dtype.numpy())), heads], dtype)
    wide = [shared.add("Concat", [query, *further], dtype, axis=3), shared.add("Concat", [key, places], dtype, axis=3)]
    for value, old in zip(wide, (query, key), strict=True):
        a.define(value, (*a.known_shape(old)[:3], a.known_shape(old)[3] + units.shape[1]))
    assert bias is not None
    made = dict.fromkeys(n for value in wide for n in shared.nodes[value])
    names = tuple(name_of(n) for v in (bias, parts.rows, parts.columns) if (n := producer(v)) is not None)
    fact = Fact("the bias, of rows and columns of an image, is further columns of queries and keys", names)
    mask = dataclasses.replace(
        spec.mask, attn_bias=None, facts=tuple(x for x in spec.mask.facts if "bias" not in x.text)
    )
    mask.new_nodes = tuple(dict.fromkeys(n for value in mask.values for n in shared.nodes.get(value, ())))
    return dataclasses.replace(
        spec,
        query=dataclasses.replace(spec.query, value=wide[0], head_dim=None),
        key=dataclasses.replace(spec.key, value=wide[1], head_dim=None),
        mask=mask,
        new_nodes=(*spec.new_nodes, *(n for n in made if n not in spec.new_nodes)),
        facts=(*(x for x in spec.facts if "bias" not in x.text), fact),
    )
