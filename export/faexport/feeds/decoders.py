# SPDX-License-Identifier: Apache-2.0
"""What a decoder with caches of its own lengths (onnxruntime's GroupQueryAttention) is verified on: lengths, totals,
capacities, positions and masks that fit together, in prompts and in steps on a cache.

Rows of a cache beyond the length of an entry hold whatever was there, and what onnxruntime computes for rows of a
query beyond it (a prompt padded on the right) depends on which of its kernels runs: both are made 0 before anything is
compared. That nothing reads them is not taken for granted: reference.py runs the original with other numbers there too.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from faexport.feeds import inputs
from faexport.feeds.inputs import Drawing, InputSpec, Role
from faexport.feeds.settings import LARGE, InputSet
from faexport.graph.nodes import attribute, op, operand, producer
from faexport.understand.shapes.analysis import Analysis

GROUPED = "com.microsoft::GroupQueryAttention"
_LONGEST = 600  # keys of a step that is to reach beyond a window
_PADDINGS = 2  # prompts, and steps, that the original runs on once more with other numbers in their padding
_KEEPS = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Gather", "Slice")


@dataclasses.dataclass(frozen=True)
class Cache:
    """An input that holds rows of earlier steps, [B, H_kv, C, D]."""

    head_dim: int  # of what is stored: half a head's columns where two numbers lie in one element
    window: int  # rows that a cache keeps at least which keeps the last ones only; 0: it keeps all


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The inputs and outputs of a model that belong to its caches."""

    lengths: str  # this input tells how many keys each entry has
    counted: bool  # ... as the number of its elements that aren't 0; else as the last key's index
    total: str  # this input is total_sequence_length; "": the last axis of `lengths` is
    query_lengths: str  # this input tells how many rows of each entry are new; "": all
    pasts: Mapping[str, Cache]
    presents: Mapping[str, str]  # outputs: the pasts that they continue
    windows: tuple[int, ...]  # of all layers, besides 0
    tokens: str = ""  # an input with a row for each new token
    states: frozenset[str] = frozenset()  # other outputs with no row for each: of an entry's last token, padding or not

    def keys(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Keys in use of each entry, after the step."""
        given = np.asarray(tensors[self.lengths])
        return (given != 0).sum(1) if self.counted else given.reshape(-1).astype(np.int64) + 1

    def settled(self, outputs: dict[str, np.ndarray], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs, with 0 wherever nothing is said of an element."""
        if self.lengths not in tensors:
            return outputs
        keys, found = self.keys(tensors), dict(outputs)
        for name, past in self.presents.items():
            if name not in outputs:
                continue
            rows = outputs[name].shape[2]
            used = rows_kept(keys, rows, self.pasts[past].window)
            found[name] = np.where((np.arange(rows) < used[:, None])[:, None, :, None], outputs[name], 0).astype(
                outputs[name].dtype
            )
        new = np.asarray(tensors[self.query_lengths]).reshape(-1) if self.query_lengths in tensors else keys
        rows = np.minimum(new, keys)[:, None]  # of a prompt that is padded on the right, no more than its keys
        for name in self.states & outputs.keys() if self.tokens in tensors else ():
            array, whole = outputs[name], rows >= tensors[self.tokens].shape[1]
            found[name] = np.where(whole.reshape(-1, *[1] * (array.ndim - 1)), array, 0).astype(array.dtype)
        for name, array in outputs.items():
            if name in self.states:
                continue
            if name not in self.presents and array.ndim > 1 and len(array) == len(rows):
                used = np.arange(array.shape[1]) < rows
                found[name] = np.where(used.reshape(*used.shape, *[1] * (array.ndim - 2)), array, 0).astype(array.dtype)
        return found


def rows_kept(keys: np.ndarray, capacity: int, window: int) -> np.ndarray:
    """Rows of a cache that hold something (docs/operator.md, "Windows")."""
    if not window:
        return keys
    group = capacity - window + 1
    return keys - group * -(-np.maximum(keys - capacity, 0) // group)


def read(model: ir.Model) -> Decoder | None:
    """None where the model has no such caches, or where their lengths can't be followed to one input."""
    nodes = [n for n in model.graph if op(n) == GROUPED and operand(n, 3) is not None]
    given = {v.name: v for v in model.graph.inputs}
    if not nodes:
        return None
    analysis = Analysis(model)
    sources = {_lengths(operand(n, 5), given) for n in nodes}
    totals = {_total(operand(n, 6), given) for n in nodes}
    chunks = {_source(operand(n, 16)) for n in nodes}
    (lengths, *more), (total, *more_totals), (chunk, *more_chunks) = sources, totals, chunks
    if lengths is None or total is None or more or more_totals or more_chunks:
        return None
    if (chunk is not None and chunk.name not in given) or (total not in given and total != ""):
        return None
    pasts: dict[str, Cache] = {}
    presents: dict[str, str] = {}
    windows: set[int] = set()
    for node in nodes:
        head_dim = _head_dim(node, analysis)
        window = attribute(node, "local_window_size", -1)
        windows.add(max(window, 0))
        ring = max(window, 0) if attribute(node, "sliding_window_cache", 0) else 0
        for index in (3, 4):
            past = operand(node, index)
            if past is None or past.name is None or past.name not in given or head_dim is None:
                return None
            halves = 2 if past.dtype == ir.DataType.UINT8 else 1
            pasts[past.name] = Cache(head_dim // halves, ring)
            present = node.outputs[index - 2] if index - 2 < len(node.outputs) else None
            if present is not None and present.is_graph_output():
                presents[present.name or ""] = past.name
    name, counted = lengths
    query_lengths, ordered = chunk.name or "" if chunk is not None else "", tuple(sorted(windows - {0}))
    own = {name, total, query_lengths, *pasts}
    tokens = next((v.name or "" for v in model.graph.inputs if v.name not in own and _has_rows(v)), "")
    others = [v for v in model.graph.outputs if v.name not in presents and v.shape is not None and len(v.shape) > 1]
    states = frozenset(v.name or "" for v in others if not _has_rows(v))
    return Decoder(name, counted, total, query_lengths, pasts, presents, ordered, tokens, states)


def _has_rows(value: ir.Value) -> bool:
    """Is it [B, rows, …] with a number of rows that is open?"""
    return value.shape is not None and len(value.shape) > 1 and not isinstance(value.shape[1], int)


def _head_dim(node: ir.Node, a: Analysis) -> int | None:
    shape, heads, kv_heads = a.shape(node.inputs[0]), attribute(node, "num_heads"), attribute(node, "kv_num_heads")
    width = shape[-1].const if shape else None
    parts = heads if operand(node, 1) is not None else heads + 2 * kv_heads
    return None if width is None else width // parts


def _source(value: ir.Value | None) -> ir.Value | None:
    """What a value is read from, through nodes that keep its elements."""
    while value is not None and (node := producer(value)) is not None and op(node) in _KEEPS:
        value = node.inputs[0]
    return value


def _lengths(value: ir.Value | None, given: Mapping[str | None, ir.Value]) -> tuple[str, bool] | None:
    """The input that seqlens_k comes from; true: as the sum of its elements less 1."""
    source = _source(value)
    if source is None or source.name in given:
        return None if source is None or source.name is None else (source.name, False)
    node = producer(source)
    summed = producer(_source(node.inputs[0])) if op(node) == "Sub" and node is not None else None
    mask = _source(summed.inputs[0]) if summed is not None and op(summed) == "ReduceSum" else None
    return (mask.name, True) if mask is not None and mask.name in given and mask.name is not None else None


def _total(value: ir.Value | None, given: Mapping[str | None, ir.Value]) -> str | None:
    """The input that total_sequence_length is; "" where it is the size of something."""
    source = _source(value)
    if source is None:
        return None
    if source.name in given:
        return source.name
    return "" if op(producer(source)) == "Shape" else None


# ------------------------------------------------------------------------------------------ what is drawn


@dataclasses.dataclass(frozen=True)
class _Step:
    batch: int
    rows: int  # new ones
    capacity: int  # rows of the caches
    total: int  # keys of the longest entry
    scale: float = 1.0
    room: int = 0  # columns of the mask, and of total, beyond `total`: it is as long as the cache

    @property
    def is_prompt(self) -> bool:
        return self.rows == self.total

    @property
    def label(self) -> str:
        kind = "prompt" if self.is_prompt else "step"
        large = ", large inputs" if self.scale != 1 else ""
        return f"{kind} of {self.batch} × {self.rows} rows, {self.total} keys, {self.capacity} rows of cache{large}"


_STEPS = (
    _Step(2, 16, 0, 16),
    _Step(3, 33, 40, 33),
    _Step(3, 1, 11, 12),
    _Step(3, 1, 24, 12),
    _Step(2, 1, 24, 20, room=4),
    _Step(1, 5, 8, 13),
    _Step(1, 5, 30, 13),
    _Step(1, 1, 0, 1),
    _Step(2, 1, 6, 1),
    _Step(2, 16, 20, 16, LARGE),
    _Step(3, 1, 24, 12, LARGE),
)


def steps(decoder: Decoder, specs: Sequence[InputSpec], random: np.random.Generator) -> Iterator[InputSet]:
    """Sets of inputs. What the model's own sizes don't allow is left out."""
    longer = [window for window in decoder.windows if 2 * window + 5 <= _LONGEST]
    beyond = [
        step
        for w in longer
        for step in (
            _Step(1, 2 * w + 3, 0, 2 * w + 3),  # of one entry: its logits are many
            _Step(3, 1, 2 * w + 4, 2 * w + 3),
            _Step(1, 4, 2 * w + 9, w + 3),
        )
    ]
    tried: collections.Counter[bool] = collections.Counter()
    for number, step in enumerate((*_STEPS, *beyond)):
        draw = _Draw(decoder, specs, step, random, left=number % 3 == 2)
        drawn = draw.tensors()
        if drawn is not None:
            other = draw.with_other_padding(drawn) if tried[step.is_prompt] < _PADDINGS else None
            tried[step.is_prompt] += other is not None
            yield InputSet(step.label, drawn, other)


def _others(array: np.ndarray) -> np.ndarray:
    """As many other numbers."""
    return ~array if array.dtype.kind in "iu" else (array * -1.5).astype(array.dtype)


class _Draw:
    """The tensors of one step."""

    def __init__(
        self, decoder: Decoder, specs: Sequence[InputSpec], step: _Step, random: np.random.Generator, left: bool
    ):
        self.decoder, self.specs, self.step, self.random, self.left = decoder, specs, step, random, left
        rings = any(cache.window for cache in decoder.pasts.values())
        least = step.rows if not step.is_prompt or rings else 1  # onnxruntime takes padded prompts in whole caches only
        self.keys = random.integers(least, step.total + 1, step.batch)
        self.keys[0] = step.total

    def tensors(self) -> dict[str, np.ndarray] | None:
        sizes = self._sizes()
        try:
            drawn = inputs.draw(self.specs, sizes, Drawing(scale=self.step.scale), self.random)
        except inputs.UnsupportedInput:
            return None
        fits = all(self._fill(spec, drawn) for spec in self.specs if spec.name in drawn)
        return drawn if fits else None

    def with_other_padding(self, drawn: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
        """The same tensors with other numbers in free rows of caches, and other tokens (the first entry's, backwards)
        in rows of padding; None where there are no such rows."""
        step, changed = self.step, dict(drawn)
        past = 0 * self.keys if step.is_prompt else self.keys - step.rows
        for name, cache in self.decoder.pasts.items():
            rows = drawn[name].shape[2]
            free = (np.arange(rows) >= rows_kept(past, rows, cache.window)[:, None])[:, None, :, None]
            changed[name] = np.where(free, _others(drawn[name]), drawn[name])
        own = {self.decoder.lengths, self.decoder.total, self.decoder.query_lengths, *self.decoder.pasts}
        for spec in self.specs:
            array = drawn.get(spec.name)
            is_token = spec.name not in own and spec.role in (Role.IDS, Role.NUMBERS)
            if not is_token or array is None or array.shape[:2] != (step.batch, step.rows):
                continue
            padding = np.arange(step.rows) >= np.minimum(self.keys, step.rows)[:, None]
            padding = padding.reshape(*padding.shape, *[1] * (array.ndim - 2))
            others = np.flip(array[:1], 1) if spec.role is Role.IDS else _others(array)
            changed[spec.name] = np.where(padding, others, array)
        same = all(np.array_equal(changed[name], drawn[name]) for name in drawn)
        return None if same else changed

    def _sizes(self) -> dict[str, int]:
        """Values of the symbols: those of the caches and the lengths first, then those of other inputs."""
        step, decoder = self.step, self.decoder
        known: dict[str, int] = {}
        for spec in sorted(self.specs, key=self._order):
            if spec.name in decoder.pasts:
                cache = decoder.pasts[spec.name]
                rows = max(step.capacity, cache.window and cache.window + step.capacity % 4)
                wanted: Iterable[int | None] = (step.batch, None, rows, cache.head_dim)
            elif spec.name == decoder.lengths and decoder.counted:
                wanted = (step.batch, step.total + step.room)
            elif spec.name == decoder.lengths or spec.name == decoder.query_lengths:
                wanted = (step.batch, 1)[: len(spec.dims)]
            elif spec.name == decoder.total:
                wanted = [1] * len(spec.dims)
            else:
                wanted = (step.batch, step.rows)
            for dim, size in zip(spec.dims, wanted, strict=False):
                if not isinstance(dim, int) and dim.value is not None and size is not None:
                    known.setdefault(str(dim), size)
        bound = inputs.bind(self.specs, inputs.Sizes(step.batch, step.rows, step.capacity), known)
        return bound | known

    def _order(self, spec: InputSpec) -> int:
        if spec.name in self.decoder.pasts:
            return 1 if self.decoder.pasts[spec.name].window else 2  # a window needs its rows
        return 0 if spec.name in (self.decoder.lengths, self.decoder.total) else 3

    def _fill(self, spec: InputSpec, drawn: dict[str, np.ndarray]) -> bool:
        """Puts in what belongs together; false where it doesn't fit the model's sizes."""
        step, decoder, shape = self.step, self.decoder, drawn[spec.name].shape
        if spec.name in decoder.pasts:
            if spec.dtype.kind in "iu":
                limits = np.iinfo(spec.dtype)
                drawn[spec.name] = self.random.integers(limits.min, limits.max + 1, shape).astype(spec.dtype)
            return shape[0] == step.batch and shape[2] >= decoder.pasts[spec.name].window
        value: np.ndarray | None = None
        if spec.name == decoder.lengths and decoder.counted:
            columns = np.arange(step.total + step.room)
            start = len(columns) - self.keys[:, None] if self.left else 0 * self.keys[:, None]
            value = (columns >= start) & (columns < start + self.keys[:, None])
        elif spec.name == decoder.lengths:
            value = (self.keys - 1).reshape(-1, *[1] * (len(shape) - 1))
        elif spec.name == decoder.total:
            value = np.full(shape, step.total + step.room)
        elif spec.name == decoder.query_lengths:
            value = np.minimum(self.keys, step.rows).reshape(-1, *[1] * (len(shape) - 1))
        elif spec.role is Role.POSITIONS and len(shape) == 2:
            first = 0 * self.keys if step.is_prompt else np.maximum(self.keys - step.rows, 0)
            value = np.broadcast_to(first[:, None] + np.arange(step.rows), (step.batch, step.rows))
        if value is not None:
            if value.shape != shape:
                return False
            drawn[spec.name] = value.astype(spec.dtype)
        return True
