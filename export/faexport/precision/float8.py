# SPDX-License-Identifier: Apache-2.0
"""Attention in float8: queries, keys and values of fused nodes become e4m3 numbers with a factor for each head. Called
by float8_check.py, which measures what the factors are made of and what the result is worth.

Where the model has such numbers already (QuantizeLinear and DequantizeLinear in front of the node) they are taken with
their own factor. Else a head's largest number becomes e4m3's largest. From keys a constant of their own for each column
is subtracted first, their mean: it moves all scores of a row by the same amount, which a softmax does not see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from faexport.graph.edits import Names, insert_in_front, remove_dead
from faexport.graph.fused import is_fused, layouts_of, optional_inputs, optional_outputs, set_optional_inputs
from faexport.graph.nodes import op, operand
from faexport.graph.surgery import Builder
from faexport.spec import NUM_REQUIRED, Layout
from faexport.understand.core.rounding import rounding_at
from faexport.understand.layout.view_ops import VIEW_OPS
from faexport.understand.shapes.analysis import Analysis

MINIMUM_OPSET = 19  # the first with float8
LARGEST = 448.0  # of e4m3
ROLES = ("query", "key", "value")
COLUMNS = 16, 256  # CUDA kernels take heads of a multiple, up to the largest
_FLOATS = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
_ALLOWED = {"attn_mask", "attn_bias", "nonpad_kv_seqlen", "query_lengths", "query_offset", "alibi_slopes", "sinks"}
_MOST_VIEWS = 8


@dataclasses.dataclass(frozen=True)
class Spread:
    """Of a tensor's columns, those of all heads side by side, over batch and rows. float64 [columns]."""

    mean: np.ndarray
    largest: np.ndarray  # magnitude
    largest_moved: np.ndarray  # magnitude once the mean is subtracted


@dataclasses.dataclass(frozen=True)
class Operand:
    """One of a node's tensors: where its heads are, and its own factor where it is made of e4m3 numbers."""

    role: str
    value: ir.Value
    layout: Layout
    heads: int
    columns: int  # of a head
    start: int = 0  # of the first head's columns, in a tensor that several operands share
    stride: int = 0  # from head to head there; 0: not shared
    own: ir.Value | None = None  # e4m3 numbers that the value is made of by one factor, or the value itself
    own_scale: float = 0.0

    @property
    def all_columns(self) -> np.ndarray:
        """[heads, columns]: where in the tensor's columns each of a head's is."""
        stride = self.stride or self.columns
        return self.start + stride * np.arange(self.heads)[:, None] + np.arange(self.columns)


@dataclasses.dataclass(frozen=True)
class Site:
    """A fused node and its operands, or why it can't be computed in float8."""

    node: ir.Node
    operands: tuple[Operand, ...] = ()
    left: str = ""

    @property
    def name(self) -> str:
        return self.node.name or self.node.outputs[0].name or "?"

    @property
    def to_measure(self) -> list[Operand]:
        return [x for x in self.operands if x.own is None]

    @property
    def moves_keys(self) -> bool:
        """May a constant be subtracted from the keys? Not where a row's scores matter as they are: in a softcap, beside
        a sink, in the log-sum-exp."""
        attributes = self.node.attributes
        words = {*optional_inputs(self.node), *optional_outputs(self.node)}
        return not {"sinks", "lse"} & words and attributes.get_float("softcap", 0.0) == 0


def site_of(node: ir.Node, a: Analysis) -> Site:
    """What is known of a fused node before anything was measured."""
    words, outputs = set(optional_inputs(node)), set(optional_outputs(node))
    dtypes = {a.dtype(value) for value in node.inputs[:NUM_REQUIRED]}
    if words - _ALLOWED or outputs - {"lse"}:
        return Site(node, left=f"it has {sorted((words - _ALLOWED) | (outputs - {'lse'}))[0]}")
    if not dtypes <= set(_FLOATS):
        return Site(node, left="the type of queries, keys or values is not known")
    operands = []
    for index, (role, layout) in enumerate(zip(ROLES, layouts_of(node), strict=False)):
        found = _operand(node, index, role, layout, a)
        if isinstance(found, str):
            return Site(node, left=found)
        operands.append(found)
    by_tensor = [x for x in operands if x.stride]
    taken = [c for x in by_tensor for c in x.all_columns.reshape(-1)]
    if len(taken) != len(set(taken)):
        return Site(node, left="queries, keys and values share columns of one tensor")
    return Site(node, tuple(operands))


def _operand(node: ir.Node, index: int, role: str, layout: Layout, a: Analysis) -> Operand | str:
    value, attributes = node.inputs[index], node.attributes
    assert value is not None
    shape = a.shape(value)
    heads = attributes.get_int("q_num_heads" if role == "query" else "kv_num_heads", 0)
    packed = attributes.get_ints("packed_columns", ())
    if packed:
        columns = attributes.get_int("head_dim_v" if role == "value" else "head_dim", 0)
        own: tuple[ir.Value | None, float] = (None, 0.0)
    else:
        known = None if shape is None else [size.const for size in shape]
        if layout is not Layout.BSH:
            heads = (known[layout.index("H")] or 0) if known else 0
        width = (known[-1] or 0) if known else 0
        columns = width // max(heads, 1) if layout is Layout.BSH else width
        own = _own_numbers(value, a)
    if not heads or not columns:
        return "the number of its heads, or their size, is not known"
    if columns % COLUMNS[0] or columns > COLUMNS[1]:
        return f"heads have {columns} columns; float8 kernels take multiples of {COLUMNS[0]} up to {COLUMNS[1]}"
    start, stride = packed[2 * index : 2 * index + 2] if packed else (0, 0)
    return Operand(role, value, layout, heads, columns, start, stride, *own)


def _own_numbers(value: ir.Value, a: Analysis) -> tuple[ir.Value | None, float]:
    """The e4m3 numbers behind a tensor, and their one factor: the tensor that a DequantizeLinear reads, or where it is
    rearranged before the node gets it the tensor itself, which is rounded to the same numbers again. Casts in between
    may change none of them: those to float32, and back."""
    source: ir.Value | None = value
    casts: set[ir.DataType | None] = set()
    is_moved = False
    for _ in range(_MOST_VIEWS):
        node = source.producer() if source is not None else None
        one = rounding_at(node, a)
        if node is not None and one is not None:
            scale = a.scalar(operand(node, 1))
            fits = one.dtype is ir.DataType.FLOAT8E4M3FN and one.is_float8 and scale is not None and node.domain == ""
            if not fits or casts - {ir.DataType.FLOAT, a.dtype(source)}:
                return None, 0.0
            return (value if is_moved else node.inputs[0]), float(scale or 0)
        if node is None or op(node) not in VIEW_OPS:
            return None, 0.0
        if op(node) == "Cast":
            casts.add(a.dtype(node.outputs[0]))
        else:
            is_moved = True
        source = node.inputs[0]
    return None, 0.0


def note(model: ir.Model, a: Analysis) -> str:
    """A sentence where queries, keys and values of fused nodes are made of e4m3 numbers, "" where none are."""
    sites = [site_of(node, a) for node in model.graph if is_fused(node)]
    count = sum(bool(site.operands) and not site.to_measure for site in sites)
    if not count:
        return ""
    return (
        f"queries, keys and values of {count} site{'s' * (count > 1)} are made of float8 numbers, which the operator "
        "reads dequantized; --dtype fp8 hands it these numbers, for CPUs and GPUs of compute capability 9.0"
    )


def measure(build: Builder, value: ir.Value, layout: Layout) -> list[ir.Value]:
    """Nodes for a Spread: its three vectors, each a float32 tensor of as many elements as there are columns."""
    wide = build.cast(value, ir.DataType.FLOAT)
    axes = build.ints([i for i, letter in enumerate(layout) if letter in "BS"])
    mean = build.add("ReduceMean", [wide, axes], ir.DataType.FLOAT, keepdims=1)
    moved = build.add("Sub", [wide, mean], ir.DataType.FLOAT)
    sizes = (build.add("Abs", [x], ir.DataType.FLOAT) for x in (wide, moved))
    largest = [build.add("ReduceMax", [x, axes], ir.DataType.FLOAT, keepdims=1) for x in sizes]
    return [build.reshape(x, [-1]) for x in (mean, *largest)]


# ---------------------------------------------------------------------------------------------- writing nodes


@dataclasses.dataclass
class Quantized:
    """The tensors of a node in float8, by nodes that are in no graph yet."""

    values: list[ir.Value]  # query, key, value
    scales: list[np.ndarray]  # of each, float32 [1] or [heads]
    back: list[ir.Value]  # what the e4m3 numbers stand for, in float32


def quantized(build: Builder, site: Site, spreads: Mapping[ir.Value, Spread], a: Analysis) -> Quantized:
    """The node's operands rounded to e4m3. `spreads`: of the tensors to measure."""
    made: dict[tuple[ir.Value, str], tuple[ir.Value, ir.Value]] = {}
    scales: dict[str, np.ndarray] = {}
    for value in dict.fromkeys(x.value for x in site.to_measure):
        sharing = [x for x in site.to_measure if x.value is value]
        for group in [sharing] if sharing[0].stride else [[x] for x in sharing]:
            vectors = _vectors(group, site.moves_keys, spreads[value], scales, a.dtype(value))
            pair = _rounded(build, group[0], *vectors, a)
            made.update({(value, x.role): pair for x in group})
    result = Quantized([], [], [])
    for x in site.operands:
        if x.own is not None:
            scales[x.role] = np.array([x.own_scale], np.float32)
            made[x.value, x.role] = _again(build, x, a)
        number, back = made[x.value, x.role]
        result.values.append(number)
        result.scales.append(scales[x.role])
        result.back.append(back)
    return result


def _vectors(
    group: Sequence[Operand], moves_keys: bool, spread: Spread, scales: dict[str, np.ndarray], dtype: ir.DataType | None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean to subtract and factor of each column of a tensor; the factors of the heads go to `scales`."""
    stored = np.float16 if dtype is ir.DataType.FLOAT16 else np.float32
    mean, factor = np.zeros(len(spread.mean)), np.ones(len(spread.mean), stored)
    for x in group:
        columns = x.all_columns
        moved = x.role == "key" and moves_keys
        largest = (spread.largest_moved if moved else spread.largest)[columns].max(axis=1)
        of_heads = np.where(largest > 0, largest / LARGEST, 1.0)
        rounded = of_heads.astype(stored)
        rounded = np.where(rounded < of_heads, np.nextafter(rounded, stored(np.inf)), rounded)
        factor[columns] = rounded[:, None]
        scales[x.role] = rounded.astype(np.float32)
        if moved:
            mean[columns] = spread.mean[columns]
    return mean, factor


def _rounded(
    build: Builder, x: Operand, mean: np.ndarray, factor: np.ndarray, a: Analysis
) -> tuple[ir.Value, ir.Value]:
    """A tensor's e4m3 numbers, and what they stand for."""
    given = a.dtype(x.value)
    dtype = ir.DataType.FLOAT if given is ir.DataType.BFLOAT16 else given  # onnxruntime quantizes no bfloat16
    assert dtype is not None
    value = x.value if dtype is given else build.add("Cast", [x.value], dtype, to=int(dtype))
    shape = {Layout.BHSD: [x.heads, 1, x.columns], Layout.BSHD: [x.heads, x.columns]}.get(x.layout, [len(mean)])
    middle = mean.astype(dtype.numpy()).reshape(shape)
    moved = bool(middle.any())
    if moved:
        value = build.add("Sub", [value, build.constant(middle)], dtype)
    axis = 2 if x.layout is Layout.BSH else x.layout.index("H")
    scale = factor if x.layout is Layout.BSH else factor.reshape(x.heads, x.columns)[:, 0]
    number, back = _pair(build, value, scale.astype(dtype.numpy()), axis)
    if moved:
        back = build.add("Add", [back, build.constant(middle.astype(np.float32))], ir.DataType.FLOAT)
    return number, back


def _again(build: Builder, x: Operand, a: Analysis) -> tuple[ir.Value, ir.Value]:
    """The e4m3 numbers that an operand is made of, and what they stand for."""
    assert x.own is not None
    dtype = a.dtype(x.value)
    assert dtype is not None
    scale = np.array(x.own_scale, dtype.numpy())
    if x.own is x.value:
        return _pair(build, x.value, scale, 0)
    return x.own, _dequantized(build, x.own, scale, 0)


def _pair(build: Builder, value: ir.Value, scale: np.ndarray, axis: int) -> tuple[ir.Value, ir.Value]:
    inputs = [value, build.constant(scale), build.constant(np.zeros(scale.shape, ml_dtypes.float8_e4m3fn))]
    number = build.add("QuantizeLinear", inputs, ir.DataType.FLOAT8E4M3FN, axis=axis)
    return number, _dequantized(build, number, scale, axis)


def _dequantized(build: Builder, number: ir.Value, scale: np.ndarray, axis: int) -> ir.Value:
    """In float32, in which all e4m3 numbers times a factor are exact."""
    factor = build.constant(scale.astype(np.float32))
    return build.add("DequantizeLinear", [number, factor], ir.DataType.FLOAT, axis=axis)


def set_operands(node: ir.Node, made: Quantized, build: Builder, dtype: ir.DataType) -> None:
    """Gives a fused node its tensors in float8. `dtype` is what they were, and what the output stays."""
    for index, value in enumerate(made.values):
        node.replace_input_with(index, value)
    named: list[tuple[str, ir.Value | None]] = list(zip(optional_inputs(node), node.inputs[NUM_REQUIRED:], strict=True))
    named += [(f"{role}_descale", build.constant(scale)) for role, scale in zip(ROLES, made.scales, strict=True)]
    set_optional_inputs(node, named)
    node.attributes["output_dtype"] = ir.AttrString("output_dtype", _FLOATS[dtype])


def convert(model: ir.Model, sites: Sequence[Site], spreads: Mapping[str, Spread], a: Analysis) -> None:
    """These sites of a model in float8, in place. `spreads`: of the tensors to measure, by their names."""
    names = Names(model)
    for site in sites:
        node, build, dtype = site.node, Builder(a.opset), a.dtype(site.node.inputs[0])
        assert dtype is not None
        made = quantized(build, site, {x.value: spreads[x.value.name or ""] for x in site.to_measure}, a)
        for value, x in zip(made.values, site.operands, strict=True):
            value.shape = value.shape or x.value.shape
        before = [x.value for x in site.operands]
        set_operands(node, made, build, dtype)
        insert_in_front(node, build.nodes, node.name or "", names)
        remove_dead([value.producer() for value in (*made.back, *before)])
