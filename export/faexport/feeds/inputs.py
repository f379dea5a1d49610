# SPDX-License-Identifier: Apache-2.0
"""The inputs of a model and random values for them that it accepts: ids inside their tables, masks of 0 and 1, lengths
and positions that fit one another.

settings.py decides what is drawn; model_check.py and the zoo benchmark run it. What can't be drawn (a sequence, a
string) is an UnsupportedInput.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from faexport.sizes.dims import is_expression, is_name

_KEEPS_ELEMENTS = {
    "Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose",
    "Unsqueeze",
}  # fmt: skip
_TO_BOOL = {"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Xor"}
_COMPARES = {"Greater", "GreaterOrEqual", "Less", "LessOrEqual"}
_LARGEST = 1 << 31  # elements of an input that is drawn
_DEFAULT_ID_LIMIT = 2  # where no embedding table is found: 0 and 1 are valid for nearly anything
_WILD = (0, 1, 2, 3, -1, 255, 256, 2**31, 2**32, -(2**32))  # where an integer is only asked whether it is 0


class MaskPattern(enum.StrEnum):
    """Which positions an attention mask keeps, in each row."""

    ONES = "all"
    RIGHT_PADDED = "right-padded"  # the first few
    LEFT_PADDED = "left-padded"  # the last few
    RANDOM = "random"
    FIRST = "the first only"
    LAST = "all but the last"  # in the last row of the batch: no query loses all its keys
    SCATTERED = "scattered"  # some at odd places: of two neighbours, one is kept, also in windows and chunks


class Role(enum.StrEnum):
    """What the numbers of an input mean; of those that belong together, one is drawn to fit the others."""

    NUMBERS = "numbers"
    WEIGHT = "weight"  # a float mask, which 1 - mask turns into a bias or exponentials are multiplied by: 0 and 1
    MASK = "mask"  # integer or bool, or a float mask of rank 2
    FLAGS = "flags"  # other bools
    IDS = "ids"
    POSITIONS = "positions"  # of the new tokens
    PAST_LENGTH = "past length"  # number of tokens in the cache
    WRITE_INDEX = "write index"  # where new rows go in a cache of fixed capacity
    VALID_KEYS = "valid keys"  # past length + new rows, of each batch entry
    LAST_KEY = "last key"  # one less
    TOTAL = "total"  # the largest number of valid keys
    LENGTHS = "lengths"  # compared with positions


# By the operator (domain, op type) and the input's place.
_ROLES = {
    (("", "TensorScatter"), 2): Role.WRITE_INDEX,
    (("", "Attention"), 6): Role.VALID_KEYS,
    (("com.microsoft", "GroupQueryAttention"), 5): Role.LAST_KEY,
    (("com.microsoft", "GroupQueryAttention"), 6): Role.TOTAL,
    (("com.microsoft", "MultiHeadAttention"), 8): Role.WRITE_INDEX,
}
_MASKS = {
    ("", "Attention"): (3,),
    ("com.microsoft", "Attention"): (5,),
    ("com.microsoft", "MultiHeadAttention"): (5,),
}  # of rows and keys, which are its last axes
_PASTS = {
    ("", "Attention"): (4, 5),
    ("com.microsoft", "Attention"): (4,),
    ("com.microsoft", "MultiHeadAttention"): (6, 7),
}  # caches that are full
_CACHES = _PASTS | {("", "TensorScatter"): (0,), ("com.microsoft", "GroupQueryAttention"): (3, 4)}


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
    role: Role = Role.NUMBERS
    id_limit: int | None = None  # exclusive upper limit of values used as indices, where discoverable
    is_cache: bool = False
    is_past: bool = False  # a cache without room for new rows
    of_scores: bool = False  # an attention operator's mask or bias: its last axes are rows and keys
    only_bool: bool = False  # integers that are only compared or cast to bool: any value is valid
    default: np.ndarray | None = None  # the initializer of an input that needn't be given

    @property
    def rows_axis(self) -> int:
        """Of [B, S], [B, S, H * D], [B, H, S, D], [2, B, H, S, D] or, where only this size is open, [B, S, H, D]."""
        rank = len(self.dims)
        if rank < 4:
            return 1
        by_rows = isinstance(self.dims[-2], int) and not isinstance(self.dims[-3], int)
        return rank - 3 if by_rows else rank - 2


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How the values of one set of inputs are drawn."""

    pattern: MaskPattern = MaskPattern.ONES
    scale: float = 1.0  # of floating-point inputs
    overrides: str = ""  # inputs with an initializer get other values where their dtype is of these kinds (as "fb")
    wild: bool = False  # numbers that are no mask's in float masks; where only 0 differs, any integers for a 1


class UnsupportedInput(Exception):
    """A graph input that no random value can be drawn for."""


def input_specs(model: ir.Model) -> list[InputSpec]:
    """All inputs; those that needn't be given have a `default`. Raises UnsupportedInput."""
    specs, taken = [], {str(dim) for value in model.graph.inputs for dim in value.shape or ()}
    instead: dict[str, ir.SymbolicDim] = {}
    for value in model.graph.inputs:
        name, default = value.name or "", value.const_value
        optional = value.is_initializer()
        unknown = (None, ir.DataType.STRING, ir.DataType.UNDEFINED)
        if not isinstance(value.type, ir.TensorType) or value.dtype in unknown or value.shape is None:
            if optional:
                continue
            if isinstance(value.type, ir.TensorType) and value.dtype not in unknown:
                raise UnsupportedInput(f"input '{value.name}' has no shape")
            raise UnsupportedInput(f"no random values can be drawn for input '{value.name}' of type {value.type}")
        if optional and model.ir_version < 4:
            continue  # every initializer is an input there, and can't be given
        dims = tuple(
            dim if isinstance(dim, int) or is_expression(dim.value) else _made_up(dim, f"{name}_{axis}", taken, instead)
            for axis, dim in enumerate(value.shape)
        )
        uses = list(_uses(value))
        kind, limit = value.dtype.numpy().kind, _id_limit(uses)
        grows = any(not isinstance(dim, int) for dim in dims[1:]) and _is_continued(value)
        specs.append(
            InputSpec(
                name,
                value.dtype.numpy(),
                dims,
                _role(name.lower(), kind, len(dims), uses, limit),
                limit,
                grows or _is_past(name) or any(_is_one_of(_CACHES, *use) for use in uses),
                grows or _is_past(name) or any(_is_one_of(_PASTS, *use) for use in uses),
                any(_is_one_of(_MASKS, *use) for use in uses),
                kind in "iu" and bool(uses) and _only_bool(value),
                default.numpy() if optional and default is not None else None,
            )
        )
    return specs


def _made_up(dim: ir.SymbolicDim, place: str, taken: set[str], instead: dict[str, ir.SymbolicDim]) -> ir.SymbolicDim:
    """A name that no other size has, for a size without one. Where a file's own name can't be computed with, as
    Paddle's "DynamicDimension.0", it is the same in all its places, which are remembered in `instead`."""
    own = dim.value if is_name(dim.value) else None
    if own is not None and own in instead:
        return instead[own]
    made = re.sub(r"\W", "_", own or place)
    made = made if made.isidentifier() else f"_{made}"
    while made in taken:
        made += "_"
    taken.add(made)
    return instead.setdefault(own, ir.SymbolicDim(made)) if own is not None else ir.SymbolicDim(made)


def required(specs: Sequence[InputSpec]) -> list[InputSpec]:
    return [spec for spec in specs if spec.default is None]


def symbols(specs: Sequence[InputSpec]) -> list[str]:
    """The names of all sizes that are open."""
    dims = [dim for spec in specs for dim in spec.dims if not isinstance(dim, int)]
    return list(dict.fromkeys(str(symbol) for dim in dims for symbol in dim.free_symbols()))


def past_symbols(specs: Sequence[InputSpec]) -> list[str]:
    """Those that are lengths of a cache."""
    bound = {name: bind(specs, Sizes(2, 3, past)).get(name) for past in (0, 7) for name in symbols(specs)}
    zero = bind(specs, Sizes(2, 3, 0))
    return [name for name in symbols(specs) if zero[name] == 0 and bound[name] == 7]


def bind(specs: Sequence[InputSpec], sizes: Sizes, given: Mapping[str, int] | None = None) -> dict[str, int]:
    """Values for all symbols, those of `given` as they are. A mask over the past and the new positions is as long as
    both together."""
    bound: dict[str, int] = dict(given or {})
    fixed = frozenset(bound)
    has_past = any(spec.is_past for spec in specs)
    new_ones = [s for s in specs if not (s.is_cache or s.of_scores or "mask" in s.name) and len(s.dims) >= 2]
    rows = next((s.dims[1] for s in new_ones if len(s.dims) == 2), None)
    if rows is None and any(s.of_scores for s in specs):
        rows = next((s.dims[-2] for s in new_ones), None)
    new = rows if isinstance(rows, int) else bound.get(str(rows), sizes.length)
    pasts = {str(s.dims[s.rows_axis]) for s in specs if s.is_past and len(s.dims) > 2}
    past = next((bound[name] for name in fixed if "past" in name.lower() or name in pasts), sizes.past)
    places = [(spec, axis, dim) for spec in specs for axis, dim in enumerate(spec.dims) if not isinstance(dim, int)]
    # Sums last: what a name is shows where it stands alone.
    for spec, axis, dim in sorted(places, key=lambda place: not str(place[2]).isidentifier()):
        for symbol in dim.free_symbols():
            name = str(symbol)
            if name in fixed:
                continue
            from_end = len(spec.dims) - axis
            if (axis == 0 and not (spec.of_scores and from_end <= 2)) or "batch" in name.lower():
                bound[name] = sizes.batch
            elif "total" in name.lower() or (
                has_past
                and (from_end == 1 if spec.of_scores else "mask" in spec.name)
                and dim != rows
                and name not in bound
            ):
                bound[name] = past + new
            elif "past" in name.lower() or spec.is_past:
                bound.setdefault(name, sizes.past)
            else:
                bound.setdefault(name, sizes.length)
    return bound


def draw(
    specs: Sequence[InputSpec], bound: Mapping[str, int], drawing: Drawing, random: np.random.Generator
) -> dict[str, np.ndarray]:
    """One set of inputs. Raises UnsupportedInput where a size can't be told from `bound`."""
    return _Draw(specs, bound, drawing, random).all()


class _Draw:
    """The values of one set: what belongs together is remembered here."""

    def __init__(
        self, specs: Sequence[InputSpec], bound: Mapping[str, int], drawing: Drawing, random: np.random.Generator
    ):
        self.specs, self.drawing, self.random = specs, drawing, random
        self.shapes = {spec.name: tuple(_size(dim, bound) for dim in spec.dims) for spec in specs}
        if too_large := [n for n, s in self.shapes.items() if math.prod(s) > _LARGEST]:
            raise UnsupportedInput(f"input '{too_large[0]}' is too large to be tried")
        self.mask: np.ndarray | None = None  # the first mask [B, keys]
        caches = [spec for spec in specs if spec.is_cache and len(spec.dims) >= 3]
        self.capacity = self.shapes[caches[0].name][caches[0].rows_axis] if caches else 0
        plain = [s for s in required(specs) if not s.is_cache and s.role is not Role.MASK and len(s.dims) >= 2]
        self.new_rows = self.shapes[plain[0].name][plain[0].rows_axis] if plain else 1
        self.batch = self.shapes[plain[0].name][0] if plain else 1
        writes = any(spec.role is Role.WRITE_INDEX for spec in specs)
        # Rows in the cache before the new ones: all, or where new ones are written into it, as many as leave room.
        room = max(self.capacity - self.new_rows, 0)
        self.past = random.integers(0, room + 1, self.batch) if writes else np.full(self.batch, self.capacity)

    def all(self) -> dict[str, np.ndarray]:
        drawn = {}
        for spec in sorted(self.specs, key=lambda spec: spec.role is not Role.MASK):
            if spec.default is None:
                value = self._value(spec, self.shapes[spec.name])
            elif spec.dtype.kind in self.drawing.overrides:
                value = self._override(spec.default)
            else:
                continue
            drawn[spec.name] = np.asarray(value).astype(spec.dtype)
            if spec.role is Role.MASK and self.mask is None and value.ndim == 2:
                self.mask = np.asarray(value) != 0
        return {spec.name: drawn[spec.name] for spec in self.specs if spec.name in drawn}

    def _value(self, spec: InputSpec, shape: tuple[int, ...]) -> np.ndarray:
        if self.drawing.wild and spec.only_bool:
            numbers = self.random.choice([n for n in _WILD if _fits(n, spec.dtype)], shape)
            if spec.role is not Role.MASK or self.drawing.pattern is MaskPattern.RANDOM:
                return numbers
            return np.where(_mask(shape, self.drawing.pattern, self.random), np.where(numbers == 0, 1, numbers), 0)
        makers: dict[Role, Callable[[], np.ndarray]] = {
            Role.MASK: lambda: _mask(shape, self.drawing.pattern, self.random),
            Role.WEIGHT: lambda: _mask(shape, self.drawing.pattern, self.random),
            Role.FLAGS: lambda: self.random.random(shape) < 0.5,
            Role.IDS: lambda: self.random.integers(0, spec.id_limit or _DEFAULT_ID_LIMIT, shape),
            Role.POSITIONS: lambda: self._positions(shape) % (spec.id_limit or 2**31 - 1),
            Role.PAST_LENGTH: lambda: self._each(self.past, shape),
            Role.WRITE_INDEX: lambda: self._each(self.past, shape),
            Role.VALID_KEYS: lambda: self._each(self._valid(), shape),
            Role.LAST_KEY: lambda: self._each(self._valid() - 1, shape),
            Role.TOTAL: lambda: np.broadcast_to((self.past + self.new_rows).max(initial=0), shape),
            Role.LENGTHS: lambda: self._lengths(shape),
            Role.NUMBERS: lambda: self.random.standard_normal(shape) * self.drawing.scale,
        }
        return makers[Role.NUMBERS if self.drawing.wild and spec.role is Role.WEIGHT else spec.role]()

    def _each(self, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """One value for each batch entry, or the largest for all."""
        fits = shape and shape[0] == self.batch and np.prod(shape) == self.batch
        return values.reshape(shape) if fits else np.broadcast_to(values.max(initial=0), shape)

    def _valid(self) -> np.ndarray:
        """Keys of each batch entry; fewer than there are only where nothing is in the cache yet."""
        full = self.past + self.new_rows
        if self.capacity or self.drawing.pattern is MaskPattern.ONES or self.batch < 2 or self.new_rows < 2:
            return full
        return np.array([self.new_rows, *self.random.integers(1, self.new_rows + 1, self.batch - 1)])

    def _lengths(self, shape: tuple[int, ...]) -> np.ndarray:
        most = self.capacity + self.new_rows
        drawn = self.random.integers(0 if self.drawing.pattern is MaskPattern.RANDOM else 1, most + 2, shape)
        return np.full(shape, most) if self.drawing.pattern is MaskPattern.ONES else drawn

    def _positions(self, shape: tuple[int, ...]) -> np.ndarray:
        """Those of the mask's kept tokens, where a mask tells; else after the past."""
        if not shape:
            return np.asarray(self.past.max(initial=0))
        if self.mask is not None and len(shape) == 2 and self.mask.shape[0] == shape[0] <= self.mask.shape[1]:
            counted = np.maximum(np.cumsum(self.mask, 1) - 1, 0)
            if counted.shape[1] >= shape[1]:
                return counted[:, counted.shape[1] - shape[1] :]
        each = len(shape) == 2 and shape[0] == self.batch
        start = self.past[:, None] if each else self.past[:1].max(initial=0)
        return np.broadcast_to(np.arange(shape[-1]) + start, shape)

    def _override(self, default: np.ndarray) -> np.ndarray:
        """Other values of the same kind: its own elements elsewhere, or another number."""
        other = self.random.permutation(default.reshape(-1)).reshape(default.shape)
        if not np.array_equal(other, default):
            return other
        if default.dtype.kind == "b":
            return self.random.random(default.shape) < 0.5
        return default + self.random.integers(0, 2, default.shape).astype(default.dtype)


def _fits(number: int, dtype: np.dtype) -> bool:
    return np.iinfo(dtype).min <= number <= np.iinfo(dtype).max


def _mask(shape: tuple[int, ...], pattern: MaskPattern, random: np.random.Generator) -> np.ndarray:
    """bool; the first row of a batch keeps everything, so that a mask that is ignored shows in the others only."""
    if not shape:
        return np.ones(shape, bool)
    if pattern is MaskPattern.ONES:
        return np.ones(shape, bool)
    if pattern is MaskPattern.RANDOM:
        return random.random(shape) < 0.7
    length = shape[-1]
    if pattern is MaskPattern.FIRST:
        return np.broadcast_to(np.arange(length) == 0, shape)
    if pattern is MaskPattern.SCATTERED:
        return (random.random(shape) < 0.4) | (np.arange(length) % 2 == 0)
    if pattern is MaskPattern.LAST:
        kept = np.ones(shape, bool)
        if kept.size:
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
    if not isinstance(size, int) or not 0 <= size <= _LARGEST:
        raise UnsupportedInput(f"the dimension '{dim}' can't be evaluated to a size that can be tried")
    return size


def _is_past(name: str) -> bool:
    return "past" in name.lower()


# ---------------------------------------------------------------------------------------------- uses of an input


def _uses(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The nodes that read the value, and at which input; also behind operations that keep its elements."""
    seen, queue = {value}, [value]
    while queue:
        for node, position in queue.pop().uses():
            yield node, position
            if node.op_type in _KEEPS_ELEMENTS and (position == 0 or node.op_type == "Concat"):
                new = node.outputs[0]
                if new not in seen:
                    seen.add(new)
                    queue.append(new)


def _is_continued(value: ir.Value) -> bool:
    """Is it a cache to which rows are appended: joined with what is computed, and handed out so?"""
    if value.shape is None or len(value.shape) < 3:
        return False
    for node, _ in _uses(value):
        if node.op_type != "Concat" or all(v is value or v is None or v.const_value is not None for v in node.inputs):
            continue
        made = node.outputs[0]
        if made.is_graph_output() or any(out.is_graph_output() for use, _ in _uses(made) for out in _kept(use)):
            return True
    return False


def _kept(node: ir.Node) -> Sequence[ir.Value]:
    return node.outputs if node.op_type in _KEEPS_ELEMENTS else ()


def _role(name: str, kind: str, rank: int, uses: Sequence[tuple[ir.Node, int]], limit: int | None) -> Role:
    """From what reads the input, else from its name. `kind` is that of its NumPy dtype."""
    is_mask = "mask" in name and (kind in "iub" or rank == 2)
    if kind not in "iu":
        by_name = Role.MASK if is_mask else Role.FLAGS if kind == "b" else Role.NUMBERS
        is_weight = any(_is_complement(*use) or _hides_exponentials(*use) for use in uses)
        return Role.WEIGHT if by_name is Role.NUMBERS and is_weight else by_name
    for node, position in uses:
        if role := _ROLES.get((node.op_identifier()[:2], position)):
            return role
    if is_mask:
        return Role.MASK
    if "position" in name:
        return Role.PAST_LENGTH if rank == 0 else Role.POSITIONS
    if _is_past(name) and rank <= 1:
        return Role.PAST_LENGTH
    if rank <= 1 and limit is None and ("len" in name or any(node.op_type in _COMPARES for node, _ in uses)):
        return Role.LENGTHS
    return Role.IDS


def _is_complement(node: ir.Node, position: int) -> bool:
    """Is the value the mask in 1 - mask?"""
    if node.op_type != "Sub" or position != 1:
        return False
    one, hops = node.inputs[0], 0
    made_by = one.producer() if one is not None else None
    while made_by is not None and made_by.op_type == "Cast" and hops < 4:
        one, hops = made_by.inputs[0], hops + 1
        made_by = one.producer() if one is not None else None
    constant = one.const_value if one is not None else None
    if constant is None and made_by is not None and made_by.op_type == "Constant":
        constant = next((a.as_tensor() for a in made_by.attributes.values() if a.type == ir.AttributeType.TENSOR), None)
    return constant is not None and constant.size == 1 and float(constant.numpy().reshape(-1)[0]) == 1.0


def _hides_exponentials(node: ir.Node, position: int) -> bool:
    """Are exponentials multiplied by the value?"""
    other = node.inputs[1 - position] if node.op_type == "Mul" else None
    made_by = other.producer() if other is not None else None
    return made_by is not None and made_by.op_type == "Exp"


def _is_one_of(places: Mapping[tuple[str, str], tuple[int, ...]], node: ir.Node, position: int) -> bool:
    return position in places.get(node.op_identifier()[:2], ())


def _only_bool(value: ir.Value) -> bool:
    """Is nothing of its elements used but by comparisons and casts to bool or between integers?"""
    seen, queue = {value}, [value]
    while queue:
        current = queue.pop()
        if current.is_graph_output():
            return False
        for node, position in current.uses():
            if node.op_type in _TO_BOOL or node.op_type == "Shape":
                continue
            if node.op_type == "Cast":
                target = ir.DataType(node.attributes.get_int("to", 1))
                if target == ir.DataType.BOOL:
                    continue
                if target.numpy().kind not in "iu":
                    return False
            elif node.op_type not in _KEEPS_ELEMENTS - {"Concat"} or position != 0:
                return False
            if node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                queue.append(node.outputs[0])
    return True


def _id_limit(uses: Sequence[tuple[ir.Node, int]]) -> int | None:
    """The smallest table that the value indexes."""
    limits = []
    for node, position in uses:
        if node.op_type == "Gather" and position == 1 and node.inputs[0] is not None:
            table, axis = node.inputs[0].shape, node.attributes.get_int("axis", 0)
            if table is not None and isinstance(size := table[axis], int):
                limits.append(size)
    return min(limits, default=None)
