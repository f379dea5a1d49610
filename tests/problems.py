# SPDX-License-Identifier: Apache-2.0
"""One attention case and its tensors, in the operator's own form (docs/operator.md). cases.py has the lists of them.

What a kernel must not use (keys beyond a length, rows beyond a query length) is NaN. A NaN that it must use (`nan`)
reaches the rows that see it and no others.
"""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
ELEMENTS = DTYPES | {"float8": FLOAT8, "float8_e4m3fn": FLOAT8}  # a Case's word for it, and the operator's
SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float8": "f8"}
OUTSIDE = (259, 70)  # rows in front of all packed sequences, more than a tile of any kernel, and behind them


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
    bias_dtype: str = ""  # "": dtype, or float16 beside float8
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
    query_bias: bool = False
    softcap: float = 0.0
    scale: float = 0.0
    empty_row: str = "zero"  # "value": zero, and empty_row_value is given
    descale: str = ""  # of a float8 query, key and value: "1", "H" or "BH"; "": none
    output_dtype: str = ""  # of a float8 query
    output_scale: str = ""  # likewise of a float8 output
    float32_precision: str = ""
    # A NaN in query, key, value, bias, or "hidden": in a key and value that the mask hides from all rows of the first
    # batch entry; "infinite": infinity in these.
    nan: str = ""
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
        if case.empty_row == "mean":
            self.attributes["empty_row"] = case.empty_row
        if case.output_dtype:
            self.attributes["output_dtype"] = case.output_dtype
        if case.float32_precision:
            self.attributes["float32_precision"] = case.float32_precision
        extra = (["present_key", "present_value"] if case.past else []) + (["lse"] if case.lse else [])
        if self.optional:
            self.attributes["optional_inputs"] = ",".join(self.optional)
        if extra:
            self.attributes["optional_outputs"] = ",".join(extra)
        return Problem(self.attributes, inputs | self.optional, ["output", *extra])

    def _normal(self, *shape: int, dtype: str = "") -> np.ndarray:
        return self.rng.standard_normal(shape, dtype=np.float32).astype(ELEMENTS[dtype or self.case.dtype])

    def _operand(self, *shape: int) -> np.ndarray:
        """Of query, key, value or past: normally distributed, where it is to be descaled in units of 1/16."""
        if not self.case.descale:
            return self._normal(*shape)
        return (16 * self.rng.standard_normal(shape, dtype=np.float32)).astype(ELEMENTS[self.case.dtype])

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
        query = self._operand(batch, case.num_q_heads, rows_q, case.head_dim)
        key = self._operand(batch, case.num_kv_heads, rows_kv, case.head_dim)
        value = self._operand(batch, case.num_kv_heads, rows_kv, case.dim_v)
        if case.outside:
            for array in (query, key, value):
                array[:, :, : OUTSIDE[0]] = array[:, :, -OUTSIDE[1] :] = np.nan
        if case.nan in ("query", "key", "value"):
            drawn = {"query": query, "key": key, "value": value}[case.nan]
            drawn[0, 0, drawn.shape[2] // 3, 0] = drawn[-1, -1, -1, -1] = np.nan
        if case.nan in ("hidden", "infinite"):
            key[0, :, rows_kv // 3] = value[0, :, rows_kv // 3] = np.nan if case.nan == "hidden" else np.inf
        for b in range(batch):
            if case.kv_lengths and case.empty_row != "mean":
                key[b, :, self.optional["nonpad_kv_seqlen"][b] :] = np.nan
                value[b, :, self.optional["nonpad_kv_seqlen"][b] :] = np.nan
            if case.query_lengths:
                query[b, :, self.optional["query_lengths"][b] :] = np.nan
        if case.past:
            self.optional["past_key"] = self._operand(batch, case.num_kv_heads, case.past, case.head_dim)
            self.optional["past_value"] = self._operand(batch, case.num_kv_heads, case.past, case.dim_v)
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
            if case.nan in ("hidden", "infinite"):
                mask[0, ..., case.past + case.seqlen_kv // 3] = False
            self.optional["attn_mask"] = mask & ~self._empty_rows(shape) if case.empty else mask
        if case.bias:
            shape = self._mask_shape(case.bias)
            dtype = case.bias_dtype or ("float16" if case.dtype == "float8" else case.dtype)
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
        heads_of = {"query": case.num_q_heads, "key": case.num_kv_heads, "value": case.num_kv_heads}
        for name, heads in heads_of.items():
            if case.descale:
                self.optional[f"{name}_descale"] = self._factors(case.descale, heads, 1 / 16)
        if case.output_scale:
            self.optional["output_scale"] = self._factors(case.output_scale, case.num_q_heads, 1 / 64)
        if case.empty_row == "value":
            self.optional["empty_row_value"] = self._normal(case.num_q_heads, case.dim_v)
        if case.query_bias:
            self.optional["query_bias"] = self._normal(case.num_q_heads, case.head_dim)
        if case.sinks:
            self.optional["sinks"] = self.rng.standard_normal(case.num_q_heads).astype(np.float32)

    def _factors(self, kind: str, heads: int, around: float) -> np.ndarray:
        """Numbers around `around`: one ("1"), one for each head ("H"), or for each sequence and head ("BH")."""
        shape = {"1": (), "H": (heads,), "BH": (self.case.batch_size, heads)}[kind]
        return np.asarray(around * self.rng.uniform(0.7, 1.4, shape), np.float32)
