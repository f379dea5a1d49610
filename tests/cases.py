# SPDX-License-Identifier: Apache-2.0
"""The only generator of attention cases: adapters and kernels are all tested on these, in the operator's own form.

`quick()` is for one CPU within a minute, `full()` (over 3,000) for a GPU. A Case is a description with a readable id;
`case.problem()` draws its tensors (docs/operator.md). What a kernel must not use (keys beyond a length, rows beyond a
query length) is NaN. A NaN that it must use (`nan`) reaches the rows that see it and no others.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
HEAD_DIMS = (1, 2, 3, 5, 8, 16, 17, 24, 32, 33, 40, 48, 64, 72, 80, 96, 100, 111, 128, 129, 160, 192, 200, 255, 256)
SEQLENS = (1, 7, 113, 128, 129, 1023, 4097)
OUTSIDE = (3, 70)  # rows in front of all packed sequences, and behind them
BROADCASTS = ("BHQK", "1HQK", "B1QK", "11QK", "B11K", "BHQ1", "1H1K", "HQK", "1QK", "QK", "1K", "K")
# what may come on top of a plain problem; the words are fields of Case
MASKS: dict[str, dict] = {
    "none": {},
    "causal": {"is_causal": True},
    "causal_bottom_right": {"is_causal": True, "alignment": "bottom_right"},
    "causal_offset": {"is_causal": True, "query_offset": "1"},
    "causal_offsets": {"is_causal": True, "query_offset": "B"},
    "window_left": {"is_causal": True, "window_left": 40, "alignment": "bottom_right"},
    "window_both": {"window_left": 17, "window_right": 5},
    "window_right": {"window_right": 33, "alignment": "bottom_right"},
    "window_self": {"window_left": 0, "window_right": 0, "alignment": "bottom_right"},
    "lengths": {"kv_lengths": True},
    "lengths_causal": {"kv_lengths": True, "is_causal": True},
    "lengths_both": {"kv_lengths": True, "query_lengths": True, "is_causal": True, "alignment": "bottom_right"},
    "query_lengths": {"query_lengths": True},
    "mask": {"mask": "BHQK"},
    "mask_padding": {"mask": "B11K"},
    "mask_causal": {"mask": "B11K", "is_causal": True, "alignment": "bottom_right"},
    "mask_short": {"mask": "B1QK", "short": True},
    "mask_empty": {"mask": "B1QK", "empty": True},
    "mask_empty_mean": {"mask": "B1QK", "empty": True, "empty_row": "mean"},
    "mean_window": {"window_left": 3, "window_right": 3, "empty_row": "mean", "query_offset": "B"},
    "mean_lengths": {"kv_lengths": True, "is_causal": True, "empty_row": "mean"},
    "bias": {"bias": "BHQK"},
    "bias_heads": {"bias": "1HQK", "is_causal": True},
    "bias_as_mask": {"bias": "11QK", "bias_input": "attn_mask"},
    "bias_short": {"bias": "1HQK", "short": True},
    "bias_inf": {"bias": "B1QK", "bias_values": "inf", "empty": True},
    "bias_min": {"bias": "B1QK", "bias_values": "min", "empty": True},
    "bias_and_mask": {"bias": "1HQK", "mask": "B11K"},
    "bias_lengths": {"bias": "BHQK", "kv_lengths": True, "window_left": 50, "window_right": 50},
    "alibi": {"alibi": "H"},
    "alibi_causal": {"alibi": "BH", "is_causal": True, "alignment": "bottom_right"},
    "softcap": {"softcap": 15.0},
    "softcap_bias": {"softcap": 3.0, "bias": "11QK", "is_causal": True},
    "sinks": {"sinks": True},
    "sinks_empty": {"sinks": True, "mask": "B1QK", "empty": True},
    "sinks_window": {"sinks": True, "is_causal": True, "window_left": 24, "alignment": "bottom_right"},
    "scale": {"scale": 0.37, "is_causal": True},
    "past": {"past": 31, "is_causal": True},
    "past_window": {"past": 64, "is_causal": True, "window_left": 20, "mask": "B11K"},
    "past_bias": {"past": 9, "bias": "1HQK"},
    "packed": {"packed": True},
    "packed_causal": {"packed": True, "is_causal": True, "alignment": "bottom_right"},
    "packed_outside": {"packed": True, "outside": True, "is_causal": True},
    "packed_window": {"packed": True, "window_left": 30, "window_right": 2, "alibi": "H", "sinks": True},
    "everything": {"softcap": 20.0, "bias": "1HQK", "mask": "B11K", "alibi": "BH", "sinks": True, "is_causal": True,
                   "window_left": 60, "kv_lengths": True, "query_lengths": True, "alignment": "bottom_right"},
}  # fmt: skip


@dataclasses.dataclass
class Problem:
    """One call in the operator's form. `inputs` is in the node's order; `outputs` begins with "output"."""

    attributes: dict
    inputs: dict[str, np.ndarray]
    outputs: list[str]


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention problem without its numbers. `batch_size` counts sequences where they are packed."""

    dtype: str = "float32"
    batch_size: int = 2
    num_q_heads: int = 2
    num_kv_heads: int = 2
    seqlen_q: int = 113
    seqlen_kv: int = 129  # fresh keys; those of the past come in front
    head_dim: int = 64
    head_dim_v: int = 0  # 0: head_dim
    layout: str = (
        "BHSD"  # also BSHD, BSH, QKV and HQKV (one 3-D tensor: heads in groups q, k, v, or q k v in each head)
    )
    output_layout: str = ""
    past: int = 0
    is_causal: bool = False
    window_left: int = -1
    window_right: int = -1
    alignment: str = "onnx"
    query_offset: str = ""  # "1" or "B": the shape of that input
    mask: str = ""  # broadcast of the bool attn_mask: a letter of BHQK or 1 for each axis
    bias: str = ""  # likewise of the float one
    bias_dtype: str = ""  # "": dtype
    bias_input: str = "attn_bias"  # or attn_mask
    bias_values: str = "normal"  # "inf" and "min": some are -inf, or the least finite number
    short: bool = False  # the last axis of mask and bias ends before the keys do
    empty: bool = False  # some rows of mask and bias are wholly masked
    kv_lengths: bool = False
    query_lengths: bool = False
    packed: bool = False
    outside: bool = False  # rows and keys in front of the first packed sequence and behind the last
    alibi: str = ""  # "H" or "BH"
    sinks: bool = False
    softcap: float = 0.0
    scale: float = 0.0
    empty_row: str = "zero"
    float32_precision: str = ""
    nan: str = ""  # a NaN in query, key, value, bias, or "hidden": in a key and value that the mask hides from all rows
    lse: bool = True
    index_dtype: str = "int64"
    seed: int = 0

    @property
    def dim_v(self) -> int:
        return self.head_dim_v or self.head_dim

    @property
    def work(self) -> int:
        """Scores to compute: what a case costs."""
        return self.batch_size * self.num_q_heads * self.seqlen_q * (self.seqlen_kv + self.past)

    @property
    def id(self) -> str:
        """Readable and unique: the shape, then each field that is not the default."""
        words = [
            SHORT[self.dtype],
            f"b{self.batch_size}h{self.num_q_heads}x{self.num_kv_heads}",
            f"q{self.seqlen_q}k{self.seqlen_kv}",
            f"d{self.head_dim}" + (f"v{self.head_dim_v}" if self.head_dim_v else ""),
            self.layout,
        ]
        spoken = {
            "dtype",
            "batch_size",
            "num_q_heads",
            "num_kv_heads",
            "seqlen_q",
            "seqlen_kv",
            "head_dim",
            "head_dim_v",
            "layout",
        }
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in spoken and value != field.default:
                words.append(field.name if value is True else f"{field.name}={value}")
        return "-".join(words)

    def __str__(self) -> str:
        return self.id

    def problem(self) -> Problem:
        """Draws the tensors; equal for equal cases."""
        return _Builder(self).build()


def packed_rows(case: Case, inputs: dict[str, np.ndarray]) -> tuple[int, int]:
    """Rows of query and of key in a case with packed sequences."""
    behind = OUTSIDE[1] if case.outside else 0
    return int(inputs["cu_seqlens_q"][-1]) + behind, int(inputs["cu_seqlens_kv"][-1]) + behind


class _Builder:
    """Makes the tensors and attributes of one case."""

    def __init__(self, case: Case):
        self.case = case
        self.rng = np.random.default_rng([case.seed, *case.id.encode()])
        self.attributes: dict = {}
        self.optional: dict[str, np.ndarray] = {}

    def build(self) -> Problem:
        case = self.case
        self._draw_lengths()
        inputs = self._draw_operands()
        self._draw_masks()
        self._draw_rest()
        for name in ("softcap", "scale"):
            if getattr(case, name):
                self.attributes[name] = float(getattr(case, name))
        if case.is_causal:
            self.attributes["is_causal"] = 1
        if case.window_left >= 0:
            self.attributes["left_window_size"] = case.window_left
        if case.window_right >= 0:
            self.attributes["right_window_size"] = case.window_right
        if case.alignment != "onnx":
            self.attributes["alignment"] = case.alignment
        if case.empty_row != "zero":
            self.attributes["empty_row"] = case.empty_row
        if case.float32_precision:
            self.attributes["float32_precision"] = case.float32_precision
        extra = (["present_key", "present_value"] if case.past else []) + (["lse"] if case.lse else [])
        if self.optional:
            self.attributes["optional_inputs"] = ",".join(self.optional)
        if extra:
            self.attributes["optional_outputs"] = ",".join(extra)
        return Problem(self.attributes, inputs | self.optional, ["output", *extra])

    def _normal(self, *shape: int, dtype: str = "") -> np.ndarray:
        return self.rng.standard_normal(shape, dtype=np.float32).astype(DTYPES[dtype or self.case.dtype])

    def _lengths(self, limit: int, count: int) -> np.ndarray:
        """Lengths from 0 to limit, with the whole length among them."""
        lengths = self.rng.integers(0, limit + 1, count)
        lengths[0] = limit
        return self.rng.permutation(lengths).astype(self.case.index_dtype)

    def _draw_lengths(self) -> None:
        case = self.case
        if case.packed:
            for name, limit in (("cu_seqlens_q", case.seqlen_q), ("cu_seqlens_kv", case.seqlen_kv)):
                lengths = self._lengths(limit, case.batch_size)
                starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
                self.optional[name] = starts + np.int32(OUTSIDE[0]) if case.outside else starts
        if case.kv_lengths:
            self.optional["nonpad_kv_seqlen"] = self._lengths(case.seqlen_kv, case.batch_size)
        if case.query_lengths:
            self.optional["query_lengths"] = self._lengths(case.seqlen_q, case.batch_size)

    def _draw_operands(self) -> dict[str, np.ndarray]:
        case = self.case
        batch, rows_q, rows_kv = case.batch_size, case.seqlen_q, case.seqlen_kv
        if case.packed:
            batch, rows_q, rows_kv = 1, *packed_rows(case, self.optional)
        query = self._normal(batch, case.num_q_heads, rows_q, case.head_dim)
        key = self._normal(batch, case.num_kv_heads, rows_kv, case.head_dim)
        value = self._normal(batch, case.num_kv_heads, rows_kv, case.dim_v)
        if case.outside:
            for array in (query, key, value):
                array[:, :, : OUTSIDE[0]] = array[:, :, -OUTSIDE[1] :] = np.nan
        if case.nan in ("query", "key", "value"):
            drawn = {"query": query, "key": key, "value": value}[case.nan]
            drawn[0, 0, drawn.shape[2] // 3, 0] = drawn[-1, -1, -1, -1] = np.nan
        if case.nan == "hidden":
            key[0, :, rows_kv // 3] = value[0, :, rows_kv // 3] = np.nan
        for b in range(batch):
            if case.kv_lengths and case.empty_row == "zero":
                key[b, :, self.optional["nonpad_kv_seqlen"][b] :] = np.nan
                value[b, :, self.optional["nonpad_kv_seqlen"][b] :] = np.nan
            if case.query_lengths:
                query[b, :, self.optional["query_lengths"][b] :] = np.nan
        if case.past:
            self.optional["past_key"] = self._normal(batch, case.num_kv_heads, case.past, case.head_dim)
            self.optional["past_value"] = self._normal(batch, case.num_kv_heads, case.past, case.dim_v)
        if case.output_layout:
            self.attributes["output_layout"] = case.output_layout
        if case.layout in ("QKV", "HQKV"):
            return self._pack_columns(query, key, value)
        return {
            "query": self._lay_out("query", query),
            "key": self._lay_out("key", key),
            "value": self._lay_out("value", value),
        }

    def _lay_out(self, name: str, array: np.ndarray) -> np.ndarray:
        """[B, H, S, D] to the case's layout, and the attributes that go with it."""
        layout = self.case.layout
        if layout == "BHSD":
            return array
        self.attributes[f"{name}_layout"] = layout
        array = np.ascontiguousarray(array.transpose(0, 2, 1, 3))
        if layout == "BSHD":
            return array
        self.attributes["q_num_heads"] = self.case.num_q_heads
        self.attributes["kv_num_heads"] = self.case.num_kv_heads
        return array.reshape(*array.shape[:2], -1)

    def _pack_columns(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> dict[str, np.ndarray]:
        """One projection [B, S, columns], given three times."""
        case = self.case
        d, dv, hq, hkv = case.head_dim, case.dim_v, case.num_q_heads, case.num_kv_heads
        heads = [array.transpose(0, 2, 1, 3) for array in (query, key, value)]
        if case.layout == "QKV":
            packed = np.concatenate([head.reshape(*head.shape[:2], -1) for head in heads], axis=-1)
            columns = [0, d, hq * d, d, (hq + hkv) * d, dv]
        else:
            packed = np.concatenate(heads, axis=-1).reshape(*heads[0].shape[:2], -1)
            columns = [0, 2 * d + dv, d, 2 * d + dv, 2 * d, 2 * d + dv]
        self.attributes |= {"packed_columns": columns, "head_dim": d, "q_num_heads": hq, "kv_num_heads": hkv}
        if dv != d:
            self.attributes["head_dim_v"] = dv
        return {"query": packed, "key": packed, "value": packed}

    def _mask_shape(self, broadcast: str) -> tuple[int, ...]:
        case = self.case
        keys = case.past + case.seqlen_kv
        if case.short:
            keys = max(2, keys - 1 - keys // 8)
        sizes = {"B": case.batch_size, "H": case.num_q_heads, "Q": case.seqlen_q, "K": keys, "1": 1}
        return tuple(sizes[letter] for letter in broadcast)

    def _empty_rows(self, shape: tuple[int, ...]) -> np.ndarray:
        """True on about a quarter of the rows, always on the first and the last."""
        rows = self.rng.random(shape[:-1] + (1,)) < 0.25
        rows.reshape(-1)[[0, -1]] = True
        return rows

    def _draw_masks(self) -> None:
        case = self.case
        if case.mask:
            shape = self._mask_shape(case.mask)
            mask = self.rng.random(shape) < 0.7
            if case.nan == "hidden":
                mask[0, ..., case.past + case.seqlen_kv // 3] = False
            self.optional["attn_mask"] = mask & ~self._empty_rows(shape) if case.empty else mask
        if case.bias:
            shape = self._mask_shape(case.bias)
            dtype = case.bias_dtype or case.dtype
            bias = self._normal(*shape, dtype=dtype)
            least = {"inf": -np.inf, "min": ml_dtypes.finfo(DTYPES[dtype]).min}
            if case.bias_values != "normal":
                hidden = self.rng.random(shape) < 0.3
                bias[hidden | self._empty_rows(shape) if case.empty else hidden] = least[case.bias_values]
            if case.nan == "bias":
                bias[0, 0, 0, bias.shape[-1] // 3] = np.nan
            self.optional[case.bias_input] = bias

    def _draw_rest(self) -> None:
        case = self.case
        if case.query_offset:
            count = 1 if case.query_offset == "1" else case.batch_size
            low, high = -case.seqlen_q // 2, case.seqlen_kv + case.past
            self.optional["query_offset"] = self.rng.integers(low, high + 1, count).astype(case.index_dtype)
        if case.alibi:
            shape = (case.num_q_heads,) if case.alibi == "H" else (case.batch_size, case.num_q_heads)
            self.optional["alibi_slopes"] = (2.0 ** -self.rng.uniform(1, 8, shape)).astype(np.float32)
        if case.sinks:
            self.optional["sinks"] = self.rng.standard_normal(case.num_q_heads).astype(np.float32)


def _shapes() -> Iterator[Case]:
    """Head sizes and sequence lengths, each dtype."""
    for dtype in DTYPES:
        for d in HEAD_DIMS:
            yield Case(dtype, head_dim=d)
            yield Case(dtype, head_dim=d, layout="BSHD", is_causal=True, alignment="bottom_right", num_kv_heads=1)
        for d, dv in ((64, 32), (32, 64), (192, 128), (96, 17), (17, 96), (8, 256), (256, 8), (1, 64), (64, 1)):
            yield Case(dtype, head_dim=d, head_dim_v=dv)
            yield Case(dtype, head_dim=d, head_dim_v=dv, layout="BSH", is_causal=True, kv_lengths=True)
        for sq, sk in itertools.product(SEQLENS, SEQLENS):
            small = dict(
                seqlen_q=sq,
                seqlen_kv=sk,
                **({"batch_size": 1, "num_q_heads": 1, "num_kv_heads": 1} if sq * sk > 1e6 else {}),
            )
            kinds = ("none", "causal", "causal_bottom_right") if sq * sk < 1e7 else ("causal_bottom_right",)
            for kind in kinds:
                yield Case(dtype, **small, **MASKS[kind])


def _kinds() -> Iterator[Case]:
    """Every kind of mask, on shapes that end inside, at and beyond a tile, in every layout."""
    shapes = ((113, 129), (129, 113), (1, 300), (7, 65), (64, 64), (130, 1023))
    for dtype, (kind, fields), (i, (sq, sk)) in itertools.product(DTYPES, MASKS.items(), enumerate(shapes)):
        layout = ("BHSD", "BSHD", "BSH")[i % 3]
        heads, kv_heads = ((2, 2), (4, 2), (6, 1))[(i + len(kind)) % 3]
        head_dim = (64, 128, 40, 64, 96, 256)[(i + len(kind)) % 6]
        yield Case(dtype, 3, heads, kv_heads, sq, sk, head_dim, 0, layout, **fields)
    for dtype, layout, kind in itertools.product(
        DTYPES, ("QKV", "HQKV"), ("none", "causal", "mask_padding", "bias", "lengths", "everything")
    ):
        kv_heads = 2 if layout == "QKV" else 4
        yield Case(dtype, 2, 4, kv_heads, 129, 129, 64, 0, layout, **MASKS[kind])
        yield Case(dtype, 2, 4, kv_heads, 65, 65, 48, 32, layout, output_layout="BHSD", **MASKS[kind])
    for dtype, broadcast in itertools.product(DTYPES, BROADCASTS):
        yield Case(dtype, 2, 4, 2, mask=broadcast)
        for bias_dtype in DTYPES:
            yield Case(dtype, 2, 4, 2, bias=broadcast, bias_dtype=bias_dtype)
    for dtype, ratio, (sq, sk) in itertools.product(
        DTYPES, ((8, 8), (8, 4), (8, 1), (6, 3), (5, 1)), ((1, 517), (3, 129), (129, 129))
    ):
        yield Case(dtype, 2, *ratio, sq, sk, 64, layout="BSHD", is_causal=True, alignment="bottom_right")


def _tf32() -> Iterator[Case]:
    """Every kind of mask in one TF32 product, and head sizes that fill a bucket or not."""
    shapes = ((113, 129), (129, 113), (300, 300), (7, 65))
    for i, (kind, fields) in enumerate(MASKS.items()):
        for (sq, sk), head_dim in zip(shapes, ((64, 128, 40, 256), (128, 64, 192, 96))[i % 2], strict=True):
            layout, heads = ("BHSD", "BSHD", "BSH")[i % 3], ((2, 2), (4, 2), (6, 1))[(i + len(kind)) % 3]
            yield Case("float32", 3, *heads, sq, sk, head_dim, 0, layout, **fields, float32_precision="tf32")
    for head_dim in HEAD_DIMS:
        yield Case("float32", 2, 4, 2, 130, 200, head_dim, is_causal=True, float32_precision="tf32")


def _nans() -> Iterator[Case]:
    """A NaN in each input: for many rows and for few, for keys in one tile and in several."""
    causal = {"is_causal": True, "alignment": "bottom_right"}
    kinds: tuple[dict, ...] = (
        {"nan": "query"}, {"nan": "query", **causal}, {"nan": "key"}, {"nan": "key", **causal}, {"nan": "value"},
        {"nan": "value", **causal}, {"nan": "key", "mask": "B1QK"}, {"nan": "value", "mask": "B1QK"},
        {"nan": "bias", "bias": "BHQK"}, {"nan": "bias", "bias": "1HQK", **causal}, {"nan": "hidden", "mask": "B11K"},
        {"nan": "hidden", "mask": "B1QK", **causal}, {"nan": "key", "softcap": 15.0}, {"nan": "key", "sinks": True},
        {"nan": "query", "empty_row": "mean", "mask": "B11K"},
    )  # fmt: skip
    for dtype, kind, (sq, sk, dim) in itertools.product(
        DTYPES, kinds, ((113, 129, 64), (1, 300, 128), (7, 2065, 40), (130, 1023, 256))
    ):
        yield Case(dtype, 2, 4, 2, sq, sk, dim, **kind)


def randomized(count: int, seed: int) -> list[Case]:
    """`count` different cases, drawn over everything at once; equal for equal seeds."""
    rng = np.random.default_rng(seed)
    cases: dict[str, Case] = {}
    kinds = list(MASKS.values())
    lengths = (*SEQLENS[:-1], 2, 15, 31, 64, 100, 200, 257, 511)

    def pick(options):
        return options[int(rng.integers(len(options)))]

    while len(cases) < count:
        fields = dict(pick(kinds))
        layout = pick(("BHSD", "BSHD", "BSH", "BSHD", "QKV", "HQKV"))
        sq, sk = pick(lengths), pick(lengths)
        kv_heads = pick((1, 1, 2, 3))
        heads = kv_heads * pick((1, 1, 2, 3, 4))
        if layout in ("QKV", "HQKV"):
            if "packed" in fields:
                layout = "BSH"
            sq = sk
            heads = kv_heads if layout == "HQKV" else heads
        if "bias" in fields:
            fields["bias"], fields["bias_dtype"] = (
                (fields["bias"] if "empty" in fields else pick(BROADCASTS)),
                pick(("", *DTYPES)),
            )
        case = Case(
            pick(list(DTYPES)), pick((1, 2, 3)), heads, kv_heads, sq, sk,
            head_dim=pick(HEAD_DIMS), head_dim_v=pick((0, 0, 0, *HEAD_DIMS)), layout=layout,
            output_layout=pick(("", "", "BHSD", "BSHD", "BSH")), lse=bool(rng.random() < 0.7),
            index_dtype=pick(("int64", "int32")), **fields, seed=int(rng.integers(1 << 16)),
        )  # fmt: skip
        if case.work <= 600_000 and not (case.short and sk < 16):
            cases[case.id] = case
    return list(cases.values())


def wide() -> list[Case]:
    """Heads of more than 256 columns, which CUDA kernels take in 16-bit types."""
    shapes = ((113, 129), (129, 113), (1, 300), (7, 65), (200, 200), (130, 1023))
    dims = ((512, 0), (320, 0), (384, 0), (264, 0), (512, 256), (72, 512))
    found = []
    for i, fields in enumerate(MASKS.values()):
        for j, (sq, sk) in enumerate(shapes[i % 2 :: 2]):
            head_dim, head_dim_v = dims[(i + j) % 6]
            layout, heads = ("BHSD", "BSHD", "BSH")[(i + j) % 3], ((2, 2), (4, 2), (3, 1))[(i + 2 * j) % 3]
            dtype = ("float16", "bfloat16")[(i // 2 + j) % 2]
            found.append(Case(dtype, 3, *heads, sq, sk, head_dim, head_dim_v, layout, **fields))
    for dtype, sq, sk in itertools.product(("float16", "bfloat16"), (1, 64, 129, 700), (1, 128, 257, 1100)):
        found.append(Case(dtype, 1, 1, 1, sq, sk, 512))
        found.append(Case(dtype, 1, 2, 1, sq, sk, 512, is_causal=True, alignment="bottom_right"))
    return found


def systematic() -> list[Case]:
    """The enumeration, without repetitions."""
    return list({case.id: case for case in itertools.chain(_shapes(), _kinds(), _tf32(), _nans(), wide())}.values())


def full() -> list[Case]:
    """For a GPU: over 3,000."""
    return systematic() + randomized(1800, seed=1)


def empty() -> list[Case]:
    """No batch entries, no query rows, no keys: nothing to write, or rows that attend no key."""
    masks = ("none", "causal_bottom_right", "mask_padding", "sinks", "mean_window", "lengths", "packed")
    sizes = [(0, 5, 7), (2, 0, 7), (2, 5, 0), (2, 0, 0)]
    return [
        Case(dtype, batch_size, 4, 2, seqlen_q, seqlen_kv, 64, **MASKS[mask])
        for dtype, (batch_size, seqlen_q, seqlen_kv), mask in itertools.product(DTYPES, sizes, masks)
        if batch_size > 0 or mask not in ("lengths", "packed")  # what the generator can't draw
    ]


def quick() -> list[Case]:
    """For a CPU: every kind once in a small shape, dtypes in turn, head sizes and lengths, some random ones."""
    cases = []
    for i, fields in enumerate(MASKS.values()):
        dtype = list(DTYPES)[i % 3]
        cases.append(
            Case(dtype, 3, 4, 2, (17, 65, 1, 40)[i % 4], (65, 33, 90)[i % 3], (32, 24, 64, 7)[i % 4], **fields)
        )
    for i, d in enumerate(HEAD_DIMS):
        cases.append(Case(list(DTYPES)[i % 3], 1, 2, 1, 19, 37, d, layout=("BSH", "BSHD")[i % 2], is_causal=True))
    for i, (d, dv) in enumerate(((320, 0), (384, 0), (512, 0), (512, 64), (33, 512))):
        cases.append(Case(list(DTYPES)[i % 3], 1, 2, 1, 19, 37, d, dv, is_causal=bool(i % 2)))
    for i, broadcast in enumerate(BROADCASTS):
        cases.append(Case(list(DTYPES)[i % 3], 2, 2, 1, 9, 34, 16, mask=broadcast))
        cases.append(
            Case(list(DTYPES)[i % 3], 2, 2, 1, 9, 34, 16, bias=broadcast, bias_dtype=list(DTYPES)[(i // 3) % 3])
        )
    for i, (sq, sk) in enumerate(((1, 1), (1, 1023), (7, 4097), (129, 128), (1023, 113), (300, 300))):
        cases.append(Case(list(DTYPES)[i % 3], 1, 2, 2, sq, sk, 64, is_causal=bool(i % 2), alignment="bottom_right"))
    for layout in ("QKV", "HQKV"):
        cases.append(Case("float32", 2, 2, 2, 33, 33, 16, layout=layout, is_causal=True))
        cases.append(Case("float16", 2, 2, 2, 33, 33, 16, 8, layout=layout, output_layout="BHSD"))
    cases += list(_nans())[::7]
    cases += [case for case in randomized(150, seed=2) if case.work <= 150_000]
    return list({case.id: case for case in cases}.values())
