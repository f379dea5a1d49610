# SPDX-License-Identifier: Apache-2.0
"""Random decoders: sequences of steps with a cache, and what each step must store and return (docs/operator.md).

A Decoder is a description with a readable id. `run(decoder, attention)` plays it with a function that computes one
step, as faplugin.attention does, and checks after each step in float64 that the new rows lie where they belong, with
one rounding to the cache's type, that everything else in use is untouched, and that the output is the attention to what
is stored. At the end the same rows go in once more as one prompt: that must leave the same cache.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import ml_dtypes
import numpy as np

from tests import cases

COUNT = int(os.environ.get("RANDOM_DECODERS", "200"))  # of those that a device plays, in chunks
CHUNK = 20
CHUNKS = -(-COUNT // CHUNK)
POSITIONS = 96  # rows of cos_cache, and the longest sequence
QUANTIZED = {"int8": np.dtype(np.int8), "int4": np.dtype(np.uint8), "float8": np.dtype(ml_dtypes.float8_e4m3fn)}
LARGEST = {"int8": 127, "int4": 7, "float8": 448}
TOLERANCE = {
    "float32": 2e-5,
    "float16": 2e-3,
    "bfloat16": 2e-2,
}  # of outputs, relative to the largest value in the cache


@dataclasses.dataclass(frozen=True)
class Decoder:
    """One layer's attention and its cache. Sizes are those of docs/operator.md."""

    mode: str = "write"
    dtype: str = "float32"
    batch_size: int = 2
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    head_dim_v: int = 16
    capacity: int = 40  # rows of a cache; of pages all of a sequence's
    page_rows: int = 8
    window_left: int = -1
    rotary: str = ""  # "half" or "interleaved"; with "-partial", "-ids" (position_ids), "-rows" (cos by row) behind it
    norm: bool = False
    quantized: str = ""  # a key of QUANTIZED
    per_channel: bool = False
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    mask: bool = False  # a bool mask over positions; not in pages
    layout: str = "BSH"  # of the new rows
    cache_layout: str = "BHSD"
    in_place: bool = True
    lengths: str = "nonpad_kv_seqlen"  # or write_indices, or both
    slots: bool = False  # slot_mapping is given
    index_dtype: str = "int64"
    seed: int = 0

    @property
    def id(self) -> str:
        """The fields that are not the default."""
        words = [self.mode]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "mode" and value != field.default:
                words.append(field.name if value is True else f"{field.name}={value}")
        return "-".join(words)

    def __str__(self) -> str:
        return self.id


def randomized(count: int, seed: int) -> list[Decoder]:
    """`count` decoders, drawn over everything at once; equal for equal seeds."""
    rng = np.random.default_rng(seed)

    def pick(*options):
        return options[int(rng.integers(len(options)))]

    found = []
    for i in range(count):
        mode = pick("append", "write", "write", "window", "paged")
        kv_heads = pick(1, 2, 3)
        head_dim = pick(8, 16, 32, 40, 64)
        layout = pick("BHSD", "BSHD", "BSH")
        window = pick(-1, -1, 0, 3, 9) if mode != "window" else pick(0, 3, 7, 15)
        found.append(Decoder(
            mode, pick("float32", "float32", "float16", "bfloat16"), pick(1, 2, 3), kv_heads * pick(1, 2, 4), kv_heads,
            head_dim, pick(head_dim, head_dim, 24, 7), pick(40, 64) if mode != "window" else window + 1 + pick(0, 1, 5),
            pick(1, 4, 8, 16), window,
            pick("", "half", "interleaved") and pick("half", "interleaved") + pick("", "-partial", "-ids", "-rows"),
            pick(False, True), pick("", "", "int8", "int4", "float8"), pick(False, True), pick(0.0, 5.0),
            pick(False, True), pick(False, True), mode != "paged" and pick(False, True), layout,
            pick("BHSD", "BSHD", "BSH"), mode != "append" and pick(False, True),
            pick("nonpad_kv_seqlen", "write_indices", "both"), pick(False, True), pick("int64", "int32"),
            seed * count + i,
        ))  # fmt: skip
    return found


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


class _Player:
    """The state of one run. History is what each sequence's cache holds, from its first position on, in float64."""

    def __init__(self, decoder: Decoder, attention: Callable):
        self.d, self.attention = decoder, attention
        self.rng = np.random.default_rng([decoder.seed, 7])
        self.dtype = cases.DTYPES[decoder.dtype]
        self.cache_dtype = QUANTIZED.get(decoder.quantized, self.dtype)
        d, kv, quant = decoder, decoder.num_kv_heads, decoder.quantized
        self.columns = tuple((n + 1) // 2 if quant == "int4" else n for n in (d.head_dim, d.head_dim_v))
        self.scales: list[np.ndarray | None] = [None, None]
        if quant:
            shapes = [(1, kv, 1, n) if d.per_channel else (1,) for n in (d.head_dim, d.head_dim_v)]
            self.scales = [self.rng.uniform(3, 4, s).astype(np.float32) / LARGEST[quant] for s in shapes]
        self.weights = [(1 + 0.2 * _normal(self.rng, d.head_dim)).astype(self.dtype) for _ in range(2)]
        half = (d.head_dim // 4 if "partial" in d.rotary else d.head_dim // 2) if d.rotary else 0
        angles = np.arange(POSITIONS)[:, None] / 50.0 ** (np.arange(half) / max(half, 1))
        self.cos, self.sin = np.cos(angles).astype(self.dtype), np.sin(angles).astype(self.dtype)
        self.sinks = _normal(self.rng, d.num_q_heads)
        self.slopes = self.rng.uniform(0.01, 0.2, d.num_q_heads).astype(np.float32)
        self.hidden = self.rng.random((d.batch_size, 1, 1, POSITIONS)) < 0.2
        self.reset()

    def reset(self) -> None:
        """Empty caches."""
        d = self.d
        self.history = [
            [np.zeros((d.num_kv_heads, 0, n)) for n in (d.head_dim, d.head_dim_v)] for _ in range(d.batch_size)
        ]
        self.lengths = [0] * d.batch_size
        rows = 0 if d.mode == "append" else d.capacity
        self.table = None
        if d.mode == "paged":
            pages = -(-d.capacity // d.page_rows)
            order = np.random.default_rng(d.seed).permutation(d.batch_size * pages + 2)[: d.batch_size * pages]
            self.table = order.reshape(d.batch_size, pages).astype(d.index_dtype)
            shapes = [(d.batch_size * pages + 2, d.page_rows, d.num_kv_heads, n) for n in self.columns]
        else:
            shapes = [self._to_cache_layout_shape(rows, n) for n in self.columns]
        # What was never written must have no part in any result.
        poison = np.nan if self.d.quantized in ("", "float8") else 5
        self.caches = [np.full(shape, poison, np.float32).astype(self.cache_dtype) for shape in shapes]

    def _to_cache_layout_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        b, h = self.d.batch_size, self.d.num_kv_heads
        return {"BHSD": (b, h, rows, columns), "BSHD": (b, rows, h, columns), "BSH": (b, rows, h * columns)}[
            self.d.cache_layout
        ]

    def draw(self, length: int) -> list[np.ndarray]:
        """Query, key and value rows of one sequence: [heads, length, columns]."""
        d = self.d
        sizes = ((d.num_q_heads, d.head_dim), (d.num_kv_heads, d.head_dim), (d.num_kv_heads, d.head_dim_v))
        return [_normal(self.rng, heads, length, columns).astype(self.dtype) for heads, columns in sizes]

    # ------------------------------------------------------------------------------------------ one step

    def step(self, rows: list[list[np.ndarray]]) -> list[np.ndarray]:
        """New rows of each sequence, as draw() gives them; the outputs [H_q, rows, D_v], checked."""
        d = self.d
        starts = np.array([h[0].shape[1] for h in self.history])
        counts = np.array([r[0].shape[1] for r in rows])
        arguments, widest = self._arguments(starts, counts), max(1, int(counts.max()))
        if d.mode == "paged":
            query, key, value = (np.concatenate([r[i] for r in rows], axis=1)[None] for i in range(3))
        else:
            query, key, value = (
                np.stack(
                    [np.pad(r[i], ((0, 0), (0, widest - r[i].shape[1]), (0, 0)), constant_values=np.nan) for r in rows]
                )
                for i in range(3)
            )
        query, key, value = (self._lay_out(x) for x in (query, key, value))
        before = [cache.copy() for cache in self.caches]
        outputs = self.attention(query, key, value, **arguments)
        if d.mode == "paged":
            output = outputs
        else:
            output, *self.caches = outputs
            if d.in_place:
                assert all(
                    x is y for x, y in zip(self.caches, (arguments["past_key"], arguments["past_value"]), strict=True)
                )
            else:
                assert all(
                    np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in zip(before, self.pasts, strict=True)
                )
        output = self._from_layout(np.asarray(output)).astype(np.float64)
        results, first = [], 0
        for b, new in enumerate(rows):
            self._check_stored(b, new, int(starts[b]))
            out = output[0, :, first : first + counts[b]] if d.mode == "paged" else output[b, :, : counts[b]]
            first += counts[b]
            self._check_output(b, new[0], int(starts[b]), out)
            results.append(out)
            if d.mode != "paged":
                assert not output[b, :, counts[b] :].any(), "rows beyond a length are 0"
        return results

    def _arguments(self, starts: np.ndarray, counts: np.ndarray) -> dict:
        d, index = self.d, self.d.index_dtype
        self.pasts = list(self.caches)
        given: dict = {"past_key": self.caches[0], "past_value": self.caches[1], "cache": d.mode, "is_causal": True,
                       "left_window_size": d.window_left, "softcap": d.softcap}  # fmt: skip
        if d.mode != "append":
            if d.lengths in ("nonpad_kv_seqlen", "both"):
                given["nonpad_kv_seqlen"] = (starts + counts).astype(index)
            if d.lengths in ("write_indices", "both"):
                given["write_indices"] = starts.astype(index)
        widest = max(1, int(counts.max()))
        if d.mode == "paged":
            given |= {
                "cu_seqlens_q": np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
                "block_table": self.table,
            }
            if d.slots:
                given["slot_mapping"] = np.array(
                    [self._slot(b, starts[b] + i) for b in range(d.batch_size) for i in range(counts[b])], index
                )
        else:
            given |= {"query_lengths": counts.astype(index), "cache_layout": d.cache_layout, "return_present": True}
            if d.in_place:
                given["out"] = {"present_key": self.caches[0], "present_value": self.caches[1]}
        if d.layout == "BSH":
            given |= {"q_num_heads": d.num_q_heads, "kv_num_heads": d.num_kv_heads}
        else:
            given |= {f"{name}_layout": d.layout for name in ("query", "key", "value")}
        if d.norm:
            given |= {"q_norm_weight": self.weights[0], "k_norm_weight": self.weights[1], "k_norm_epsilon": 1e-3}
        if d.quantized:
            given |= {
                "k_scale": self.scales[0],
                "v_scale": self.scales[1],
                "kv_cache_bit_width": 4 if d.quantized == "int4" else 8,
            }
        given |= {"sinks": self.sinks} if d.sinks else {}
        given |= {"alibi_slopes": self.slopes} if d.alibi else {}
        if d.mask:
            columns = int((starts + counts).max()) if d.mode in ("append", "window") else d.capacity
            given["attn_mask"] = ~self.hidden[..., :columns]
        return given | (self._rotary(starts, counts, widest) if d.rotary else {})

    def _rotary(self, starts: np.ndarray, counts: np.ndarray, widest: int) -> dict:
        d = self.d
        given = {"cos_cache": self.cos, "sin_cache": self.sin, "rotary_interleaved": "interleaved" in d.rotary}
        if "ids" in d.rotary or "rows" in d.rotary:
            if d.mode == "paged":
                ids = np.concatenate([s + np.arange(c) for s, c in zip(starts, counts, strict=True)])[None]
            else:
                ids = np.minimum(starts[:, None] + np.arange(widest), POSITIONS - 1)
            if "ids" in d.rotary:
                given["position_ids"] = ids.astype(d.index_dtype)
            else:
                given |= {"cos_cache": self.cos[ids], "sin_cache": self.sin[ids]}
        return given

    def _slot(self, b: int, position: int) -> int:
        return int(self.table[b, position // self.d.page_rows]) * self.d.page_rows + position % self.d.page_rows

    def _lay_out(self, x: np.ndarray) -> np.ndarray:
        if self.d.layout == "BHSD":
            return np.ascontiguousarray(x)
        x = np.ascontiguousarray(x.transpose(0, 2, 1, 3))
        return x if self.d.layout == "BSHD" else x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])

    def _from_layout(self, x: np.ndarray) -> np.ndarray:
        if self.d.layout == "BHSD":
            return x
        return x.reshape(*x.shape[:2], self.d.num_q_heads, self.d.head_dim_v).transpose(0, 2, 1, 3)

    # ------------------------------------------------------------------------------------------ what must be

    def transformed(self, x: np.ndarray, which: int, start: int) -> np.ndarray:
        """Rows of queries (0) or keys (1) after norm and rotary embedding, float64."""
        x = x.astype(np.float64)
        if self.d.norm:
            epsilon = (1e-6, 1e-3)[which]
            x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * self.weights[which].astype(np.float64)
        if not self.d.rotary:
            return x
        positions = start + np.arange(x.shape[1])
        cos, sin = (t[positions].astype(np.float64) for t in (self.cos, self.sin))
        half = cos.shape[1]
        step = "interleaved" in self.d.rotary
        first = slice(0, 2 * half, 2) if step else slice(0, half)
        second = slice(1, 2 * half, 2) if step else slice(half, 2 * half)
        rotated = x.copy()
        rotated[..., first] = x[..., first] * cos - x[..., second] * sin
        rotated[..., second] = x[..., second] * cos + x[..., first] * sin
        return rotated

    def all_stored(self) -> list[tuple[int, np.ndarray]]:
        return [self.stored(b, which) for b in range(self.d.batch_size) for which in (0, 1)]

    def stored(self, b: int, which: int) -> tuple[int, np.ndarray]:
        """First position of what a sequence's cache should hold, and its rows dequantized: [H_kv, rows, columns]."""
        d, cache, length = self.d, self.caches[which], self.lengths[b]
        first = 0
        if d.mode == "paged":
            slots = np.array([self._slot(b, position) for position in range(length)], int)
            rows = cache[slots // d.page_rows, slots % d.page_rows].transpose(1, 0, 2)
        else:
            entry = cache[b]
            if d.cache_layout == "BSH":
                entry = entry.reshape(entry.shape[0], d.num_kv_heads, -1)
            entry = entry if d.cache_layout == "BHSD" else entry.transpose(1, 0, 2)
            resident = length
            if d.mode == "window" and length > d.capacity:
                freed = d.capacity - d.window_left
                resident = length - freed * -(-(length - d.capacity) // freed)
            first, rows = length - resident, entry[:, :resident]
        return first, self._dequantized(rows, which)

    def _dequantized(self, rows: np.ndarray, which: int) -> np.ndarray:
        if not self.d.quantized:
            return rows.astype(np.float64)
        columns = (self.d.head_dim, self.d.head_dim_v)[which]
        if self.d.quantized == "int4":
            numbers = (
                np.stack([rows & 15, rows >> 4], axis=-1).reshape(*rows.shape[:-1], -1)[..., :columns].astype(np.int64)
                - 8
            )
        else:
            numbers = rows.astype(np.float64)
        scale = self.scales[which]
        return numbers * scale.reshape(scale.shape[-3:] if scale.ndim > 1 else ()).astype(np.float64)

    def _check_stored(self, b: int, new: list[np.ndarray], start: int) -> None:
        count = new[1].shape[1]
        self.lengths[b] = start + count
        self.unsure = False  # is a row gone that float32 may have rounded the other way?
        for which, rows in enumerate((self.transformed(new[1], 1, start), new[2].astype(np.float64))):
            first, found = self.stored(b, which)
            known = np.concatenate(
                [self.history[b][which], found[:, max(0, start - first) :][:, -count:] if count else found[:, :0]], 1
            )
            if count > found.shape[1]:  # more rows went in than stayed: those that are gone were seen by nobody else
                gone = self.rounded(rows[:, : count - found.shape[1]], which)
                near = [self.rounded(rows[:, : count - found.shape[1]] * (1 + x), which) for x in (-1e-5, 1e-5)]
                self.unsure |= bool(self.d.quantized) and not np.array_equal(*near)
                known = np.concatenate([self.history[b][which], gone, found], axis=1)
            assert known.shape[1] == self.lengths[b]
            assert np.array_equal(found, known[:, first:]), (
                f"{'key' if which == 0 else 'value'} rows that were there have changed"
            )
            error = np.abs(known[:, start:] - rows)
            assert (error <= self.allowed(rows, which)).all(), f"new rows {which} of entry {b}: error {error.max():.3g}"
            self.history[b][which] = known

    def rounded(self, rows: np.ndarray, which: int) -> np.ndarray:
        """Rows as a cache holds them, but for one rounding that went the other way."""
        if not self.d.quantized:
            return rows.astype(self.dtype).astype(np.float64)
        scale = self.scales[which]
        scale = scale.reshape(scale.shape[-3:] if scale.ndim > 1 else ()).astype(np.float64)
        if self.d.quantized == "float8":
            return np.clip(rows / scale, -448, 448).astype(QUANTIZED["float8"]).astype(np.float64) * scale
        low, high = (-128, 127) if self.d.quantized == "int8" else (-8, 7)
        return np.clip(np.round(rows / scale), low, high) * scale

    def allowed(self, rows: np.ndarray, which: int) -> np.ndarray:
        """Half a step of the cache's type, and what float32 arithmetic adds to it."""
        own = 1e-5 * np.maximum(1, np.abs(rows))
        return np.abs(self.rounded(rows, which) - rows) + own + (0 if self.d.quantized else 1e-7)

    def _check_output(self, b: int, query: np.ndarray, start: int, found: np.ndarray) -> None:
        d = self.d
        keys, values = self.history[b]
        q = self.transformed(query, 0, start)
        group = d.num_q_heads // d.num_kv_heads
        largest = max(1.0, float(np.abs(values).max(initial=0)))
        if self.unsure:  # one step of a scale in one column
            largest += max(float(scale.max()) for scale in self.scales) / TOLERANCE[d.dtype]
        for i in range(q.shape[1]):
            position = start + i
            j = np.arange(position + 1)
            seen = (j >= position - d.window_left) if d.window_left >= 0 else np.ones(len(j), bool)
            if d.mask:
                seen = seen & ~self.hidden[b, 0, 0, : len(j)]
            for h in range(d.num_q_heads):
                scores = keys[h // group, : len(j)] @ q[h, i] / np.sqrt(d.head_dim)
                scores = d.softcap * np.tanh(scores / d.softcap) if d.softcap else scores
                scores = scores - float(self.slopes[h]) * (position - j) if d.alibi else scores
                scores = np.where(seen, scores, -np.inf)
                top = max(scores.max(), float(self.sinks[h]) if d.sinks else -np.inf)
                want = np.zeros(d.head_dim_v)
                if np.isfinite(top):
                    weights = np.exp(scores - top)
                    total = weights.sum() + (np.exp(float(self.sinks[h]) - top) if d.sinks else 0)
                    want = weights @ values[h // group, : len(j)] / total
                error = np.abs(found[h, i] - want).max()
                assert error <= TOLERANCE[d.dtype] * largest, (
                    f"output of entry {b}, head {h}, row {i}: error {error:.3g}"
                )


def run(decoder: Decoder, attention: Callable[..., object], steps: int = 6) -> None:
    """Plays a prompt and decode steps, then the same rows as one prompt. Raises AssertionError where one is wrong."""
    player = _Player(decoder, attention)
    rng = np.random.default_rng([decoder.seed, 11])
    limit = min(decoder.capacity if decoder.mode != "window" else POSITIONS, POSITIONS)
    ragged = decoder.mode != "append"
    written: list[list[list[np.ndarray]]] = [[] for _ in range(decoder.batch_size)]
    for step in range(steps):
        widest = int(rng.integers(1, 14)) if step == 0 else int(rng.integers(1, 4)) if rng.random() < 0.3 else 1
        counts = [
            int(rng.integers(0 if step else 1, widest + 1)) if ragged else widest for _ in range(decoder.batch_size)
        ]
        rows = []
        for b, count in enumerate(counts):
            rows.append(player.draw(min(count, limit - sum(r[0].shape[1] for r in written[b]))))
            written[b].append(rows[-1])
        player.step(rows)
    stepwise = player.all_stored()
    player.reset()
    player.step([[np.concatenate([r[i] for r in sequence], axis=1) for i in range(3)] for sequence in written])
    for (first, rows), (first_again, rows_again) in zip(stepwise, player.all_stored(), strict=True):
        assert first == first_again and np.array_equal(rows, rows_again), (
            "one prompt leaves another cache than its steps"
        )


def run_chunk(chunk: int, attention: Callable[..., object]) -> None:
    """Plays one chunk of the random decoders; a failure names its decoder."""
    for decoder in randomized(CHUNK, seed=chunk):
        try:
            run(decoder, attention, steps=12)
        except Exception as error:
            raise AssertionError(f"{decoder}: {error}") from error


def wild_step(rng: np.random.Generator, mode: str, limit: int) -> tuple[list[np.ndarray], dict]:
    """Query, key and value, and further arguments of a step whose lengths, positions and blocks point anywhere up to
    `limit`: nothing outside of its arrays may be touched, and its results are finite."""

    def wild(*shape: int) -> np.ndarray:
        return rng.integers(-limit, limit, shape)

    rows = int(rng.integers(1, 5))
    new = [rng.standard_normal((2, 1, rows, 8), dtype=np.float32) for _ in range(3)]
    past = [np.zeros((2, 1, 7, 8), np.float32) for _ in range(2)]
    given = {"write_indices": wild(2), "position_ids": wild(2, rows), "left_window_size": 4, "is_causal": True}
    given |= {"cos_cache": np.ones((9, 4), np.float32), "sin_cache": np.ones((9, 4), np.float32)}
    if mode == "paged":
        new, past = [x.reshape(1, 1, 2 * rows, 8) for x in new], [x.reshape(2, 7, 1, 8) for x in past]
        given |= {"cu_seqlens_q": np.array([0, rows, 2 * rows], np.int32), "block_table": wild(2, 3)}
        given |= {"slot_mapping": wild(2 * rows)} if rng.random() < 0.5 else {}
        given["position_ids"] = wild(1, 2 * rows)
    else:
        given |= {"nonpad_kv_seqlen": wild(2), "return_present": True}
    return new, given | {"past_key": past[0], "past_value": past[1], "cache": mode}


def assert_finite(results: object) -> None:
    assert all(np.isfinite(x).all() for x in (results if isinstance(results, tuple) else [results]))
