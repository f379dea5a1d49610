# SPDX-License-Identifier: Apache-2.0
"""Random inputs that a model accepts: sizes for its symbolic dimensions, ids inside its tables, masks of 0 and 1.

verify.py and the zoo benchmark draw from here. What can't be told from the model (a length that must divide by a patch
size) is tried by the caller with other sizes; what can't be drawn (a sequence, a string) is an UnsupportedInput.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

_KEEPS_IDS = {
    "Cast",
    "Concat",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
}
_DEFAULT_ID_LIMIT = 2  # where no embedding table is found: 0 and 1 are valid for nearly anything


class MaskPattern(enum.StrEnum):
    """Which positions an attention mask keeps, in each row."""

    ONES = "all"
    RIGHT_PADDED = "right-padded"  # the first few
    LEFT_PADDED = "left-padded"  # the last few
    RANDOM = "random"
    LAST = "all but the last"  # in the last row of the batch: no query loses all its keys
    SCATTERED = "scattered"  # some at odd places: of two neighbours, one is kept, also in windows and chunks


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Values for symbolic dimensions: axis 0 is the batch, past lengths are `past`, all others `length`."""

    batch: int = 2
    length: int = 16
    past: int = 5


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """A graph input: dims are sizes, names of symbols, or names made up for unknown ones."""

    name: str
    dtype: np.dtype
    dims: tuple[int | ir.SymbolicDim, ...]
    id_limit: int | None  # exclusive upper limit of values used as indices, where discoverable


class UnsupportedInput(Exception):
    """A graph input that no random value can be drawn for."""


def input_specs(model: ir.Model) -> list[InputSpec]:
    """The inputs that a caller must give (not those with an initializer). Raises UnsupportedInput."""
    specs = []
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        if not isinstance(value.type, ir.TensorType) or value.dtype in (
            None,
            ir.DataType.STRING,
            ir.DataType.UNDEFINED,
        ):
            raise UnsupportedInput(f"no random values can be drawn for input '{value.name}' of type {value.type}")
        if value.shape is None:
            raise UnsupportedInput(f"input '{value.name}' has no shape")
        dims = tuple(
            dim if isinstance(dim, int) or _is_expression(dim) else ir.SymbolicDim(f"{value.name}_{axis}")
            for axis, dim in enumerate(value.shape)
        )
        specs.append(InputSpec(value.name, value.dtype.numpy(), dims, _id_limit(value)))
    return specs


def _is_expression(dim: ir.SymbolicDim) -> bool:
    """Is it a name or sum of names? Some exporters call every unknown size "?"."""
    try:
        return dim.value is not None and dim.free_symbols() is not None
    except ValueError:
        return False


def is_dynamic(specs: Sequence[InputSpec]) -> bool:
    return any(not isinstance(dim, int) for spec in specs for dim in spec.dims)


def bind(specs: Sequence[InputSpec], sizes: Sizes) -> dict[str, int]:
    """Values for all symbols. A mask over the past and the new positions is as long as both together."""
    bound: dict[str, int] = {}
    has_past = any(_is_past(spec.name) for spec in specs)
    rows = next((spec.dims[1] for spec in specs if len(spec.dims) == 2 and "mask" not in spec.name), None)
    for spec in specs:
        for axis, dim in enumerate(spec.dims):
            if isinstance(dim, int):
                continue
            for symbol in dim.free_symbols():
                name = str(symbol)
                if axis == 0 or "batch" in name.lower():
                    bound[name] = sizes.batch
                elif "total" in name.lower() or (
                    has_past and "mask" in spec.name and dim != rows and name not in bound
                ):
                    bound[name] = sizes.past + (rows if isinstance(rows, int) else sizes.length)
                elif "past" in name.lower() or _is_past(spec.name):
                    bound.setdefault(name, sizes.past)
                else:
                    bound.setdefault(name, sizes.length)
    return bound


def draw(
    specs: Sequence[InputSpec], bound: Mapping[str, int], pattern: MaskPattern, random: np.random.Generator
) -> dict[str, np.ndarray]:
    """One set of inputs."""
    return {
        spec.name: _draw_one(spec, tuple(_size(dim, bound) for dim in spec.dims), pattern, random) for spec in specs
    }


def _draw_one(spec: InputSpec, shape: tuple[int, ...], pattern: MaskPattern, random: np.random.Generator) -> np.ndarray:
    name = spec.name.lower()
    if "mask" in name and (spec.dtype.kind in "iub" or len(shape) == 2):
        return _mask(shape, pattern, random).astype(spec.dtype)
    if spec.dtype.kind == "b":
        return random.random(shape) < 0.5
    if spec.dtype.kind in "iu":
        limit = spec.id_limit or _DEFAULT_ID_LIMIT
        if "position" in name and len(shape) >= 1:
            return np.broadcast_to(np.arange(shape[-1]) % limit, shape).astype(spec.dtype)
        return random.integers(0, limit, shape).astype(spec.dtype)
    return random.standard_normal(shape).astype(spec.dtype)


def _mask(shape: tuple[int, ...], pattern: MaskPattern, random: np.random.Generator) -> np.ndarray:
    """bool; the first row of a batch keeps everything, so that a mask that is ignored shows in the others only."""
    if not shape:
        return np.ones(shape, bool)
    if pattern is MaskPattern.ONES:
        return np.ones(shape, bool)
    if pattern is MaskPattern.RANDOM:
        return random.random(shape) < 0.7
    length = shape[-1]
    if pattern is MaskPattern.SCATTERED:
        return (random.random(shape) < 0.4) | (np.arange(length) % 2 == 0)
    if pattern is MaskPattern.LAST:
        kept = np.ones(shape, bool)
        kept[(-1,) * len(shape)] = length == 1
        return kept
    kept = (
        random.integers(max(1, length // 3), max(2, length), (*shape[:-1], 1))
        if length > 1
        else np.ones((*shape[:-1], 1), int)
    )
    if len(shape) > 1 and shape[0] > 1:
        kept[0] = length
    positions = np.arange(length)
    return positions < kept if pattern is MaskPattern.RIGHT_PADDED else positions >= length - kept


def _size(dim: int | ir.SymbolicDim, bound: Mapping[str, int]) -> int:
    size = dim if isinstance(dim, int) else dim.evaluate(bound)
    if not isinstance(size, int):
        raise UnsupportedInput(f"the dimension '{dim}' can't be evaluated")
    return size


def _is_past(name: str) -> bool:
    return "past" in name.lower()


def _id_limit(value: ir.Value) -> int | None:
    """The smallest table that the value indexes, through operations that keep its elements."""
    limits: list[int] = []
    seen, queue = {id(value)}, [value]
    while queue:
        current = queue.pop()
        for node, position in current.uses():
            if node.op_type == "Gather" and position == 1:
                axis = node.attributes.get_int("axis", 0)
                table = node.inputs[0].shape
                if table is not None and isinstance(table[axis], int):
                    limits.append(table[axis])
            elif node.op_type in _KEEPS_IDS and id(node.outputs[0]) not in seen:
                seen.add(id(node.outputs[0]))
                queue.append(node.outputs[0])
    return min(limits, default=None)
