# SPDX-License-Identifier: Apache-2.0
"""The rows that benchmarks/attention.py measures, by suite, and the tensors of a row, random everywhere."""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclasses.dataclass(frozen=True)
class Row:
    """One problem. Tensors are [B, S, H, D] (BSHD)."""

    batch_size: int
    num_heads: int
    seqlen: int
    head_dim: int
    is_causal: bool = False
    window: int = -1  # neighbours before the own position; with is_causal
    mask: str = ""  # "lengths", "mask" (bool [B, 1, 1, S]), "bias_1HSS", "bias_B1SS"
    shortest: float = 0.25  # of those lengths, as a part of the longest; 0: 1
    num_kv_heads: int = 0  # 0: num_heads
    seqlen_kv: int = 0  # 0: seqlen
    dtype: str = "bfloat16"
    in_ort: bool = False  # measured inside onnxruntime
    unfused: bool = False  # PyTorch's MatMul, Softmax, MatMul is a peer too
    backward: bool = False  # the backward pass, of the bias too; not the forward, unless `both`
    both: bool = False  # with backward

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def kv_len(self) -> int:
        return self.seqlen_kv or self.seqlen

    @property
    def name(self) -> str:
        heads = f"h{self.num_heads}" + (f"/{self.num_kv_heads}" if self.num_kv_heads else "")
        length = f"s{self.seqlen}" + (f"x{self.seqlen_kv}" if self.seqlen_kv else "")
        words = [f"b{self.batch_size}", heads, length, f"d{self.head_dim}"]
        words += ["causal"] * self.is_causal + ([f"window{self.window}"] if self.window >= 0 else []) + [self.mask]
        words += ["from 1"] * (self.mask in ("lengths", "mask") and self.shortest == 0)
        words += ["float32"] * (self.dtype == "float32") + ["float8"] * (self.dtype == "float8_e4m3fn")
        words += [("forward and " if self.both else "") + "backward"] * self.backward
        return " ".join(filter(None, words))

    @property
    def pairs(self) -> float:
        """Visible (query, key) pairs of a head, lengths and bool masks not counted."""
        if self.window >= 0:
            before = self.kv_len - self.seqlen  # keys in front of the first row
            return float(sum(min(before + i, self.window) + 1 for i in range(self.seqlen)))
        return self.seqlen * (self.kv_len - self.seqlen / 2 if self.is_causal else self.kv_len)

    @property
    def flops(self) -> float:
        """Of two products; of the backward pass's five."""
        products = (5 if self.backward else 0) + (2 if self.both or not self.backward else 0)
        return 2.0 * products * self.batch_size * self.num_heads * self.pairs * self.head_dim

    @property
    def kv_bytes(self) -> float:
        """What has to be read, lengths and bool masks not counted."""
        keys = min(self.kv_len, self.window + self.seqlen) if self.window >= 0 else self.kv_len
        return 4.0 * self.batch_size * self.kv_heads * keys * self.head_dim


@dataclasses.dataclass
class Tensors:
    query: torch.Tensor  # [B, S, H, D]
    key: torch.Tensor  # [B, S_kv, H_kv, D]
    value: torch.Tensor
    out: torch.Tensor
    lengths: torch.Tensor | None = None  # int64 [B]
    mask: torch.Tensor | None = None  # bool [B, 1, 1, S], the same keys
    bias: torch.Tensor | None = None  # [1 or B, H or 1, S, S]
    d_out: torch.Tensor | None = None  # gradient of out
    # For peers whose form of lengths is packed sequences: the keys and values of `lengths` without the padding
    # [sum of lengths, H_kv, D], and where each sequence's rows and keys begin, int32 [B + 1].
    packed_key: torch.Tensor | None = None
    packed_value: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_kv: torch.Tensor | None = None
    in_bfloat16: Tensors | None = None  # the same numbers, of float8 tensors


def _uniform_lengths(count: int, longest: int, shortest: float) -> torch.Tensor:
    """From the part `shortest` of `longest` on (at least 1), in random order. One length is drawn from each of `count`
    equal parts of that span, because the total work of a few independent draws would differ from run to run."""
    share = (torch.arange(count, device="cuda") + torch.rand(count, device="cuda")) / count
    lengths = (longest * (shortest + (1 - shortest) * share)).round().long().clamp(min=1)
    return lengths[torch.randperm(count, device="cuda")]


def draw(row: Row) -> Tensors:
    dtype = getattr(torch, row.dtype)
    is_float8 = dtype == torch.float8_e4m3fn

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16 if is_float8 else dtype).to(dtype)

    b, s, h, d = row.batch_size, row.seqlen, row.num_heads, row.head_dim
    tensors = Tensors(
        normal(b, s, h, d),
        normal(b, row.kv_len, row.kv_heads, d),
        normal(b, row.kv_len, row.kv_heads, d),
        normal(b, s, h, d),
    )
    if is_float8:
        tensors.out = tensors.out.bfloat16()
        wide = (t.bfloat16() for t in (tensors.query, tensors.key, tensors.value))
        tensors.in_bfloat16 = Tensors(*wide, torch.empty_like(tensors.out))
    if row.backward:
        tensors.d_out = normal(b, s, h, d)
    if row.mask in ("lengths", "mask"):
        tensors.lengths = _uniform_lengths(b, row.kv_len, row.shortest)
        keys = torch.arange(row.kv_len, device="cuda")
        tensors.mask = keys[None, None, None] < tensors.lengths[:, None, None, None]
        _pack(row, tensors)
    elif row.mask:
        tensors.bias = normal(*((1, h) if row.mask == "bias_1HSS" else (b, 1)), s, row.kv_len)
    return tensors


def _pack(row: Row, tensors: Tensors) -> None:
    """The same keys and values without the padding."""
    used = tensors.mask[:, 0, 0]
    tensors.packed_key, tensors.packed_value = tensors.key[used], tensors.value[used]
    starts = torch.zeros(row.batch_size + 1, dtype=torch.int32, device="cuda")
    starts[1:] = tensors.lengths.cumsum(0)
    tensors.cu_seqlens_kv = starts
    tensors.cu_seqlens_q = torch.arange(row.batch_size + 1, dtype=torch.int32, device="cuda") * row.seqlen


def expected(row: Row, tensors: Tensors, rows: torch.Tensor, heads: int) -> torch.Tensor:
    """float64 [B, len(rows), heads, D] of some rows of the first heads."""
    group = row.num_heads // row.kv_heads
    query = tensors.query[:, rows, :heads].double()
    used = (t[:, :, : -(-heads // group)].double() for t in (tensors.key, tensors.value))
    key, value = (t.repeat_interleave(group, 2)[:, :, :heads] for t in used)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * row.head_dim**-0.5
    if tensors.bias is not None:
        scores += tensors.bias[:, :heads, rows].double()
    keys = torch.arange(row.kv_len, device="cuda")
    hidden = torch.zeros(1, 1, len(rows), row.kv_len, dtype=torch.bool, device="cuda")
    if row.is_causal:
        distance = rows[:, None] + (row.kv_len - row.seqlen) - keys[None]
        hidden = hidden | (distance < 0)
        if row.window >= 0:
            hidden = hidden | (distance > row.window)
    if tensors.lengths is not None:
        hidden = hidden | (keys[None, None, None] >= tensors.lengths[:, None, None, None])
    scores.masked_fill_(hidden, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


def _tokens(length: int, **others) -> Row:
    return Row(16384 // length, seqlen=length, **others)


def _plain(head_dims: tuple[int, ...]) -> list[Row]:
    return [
        _tokens(s, num_heads=2048 // d, head_dim=d, is_causal=c)
        for d, c, s in itertools.product(head_dims, (False, True), LENGTHS)
    ]


def _float8() -> list[Row]:
    return [dataclasses.replace(row, dtype="float8_e4m3fn") for row in _plain((64, 128, 256)) if row.seqlen >= 1024]


def _in_ort() -> list[Row]:
    plain = [Row(4, 16, s, d, dtype="float16", in_ort=True) for d in (64, 128) for s in LENGTHS[:5]]
    masks = ("lengths", "mask", "bias_1HSS")
    masked = [Row(4, 16, 2048, d, mask=mask, dtype="float16", in_ort=True) for d in (64, 128) for mask in masks]
    return plain + masked + [Row(4, 16, 2048, d, is_causal=True, dtype="float16", in_ort=True) for d in (64, 128)]


def _padding() -> list[Row]:
    cases = itertools.product((64, 128), (512, 2048), ("lengths", "mask"))
    return [_tokens(s, num_heads=2048 // d, head_dim=d, mask=mask) for d, s, mask in cases]


def _bias() -> list[Row]:
    cases = itertools.product((64, 128), (1024, 4096), ("bias_1HSS", "bias_B1SS"))
    return [_tokens(s, num_heads=2048 // d, head_dim=d, mask=mask) for d, s, mask in cases]


def _short() -> list[Row]:
    shapes = ((32, 12, 197, 64), (8, 16, 577, 64), (64, 12, 128, 32), (4, 16, 1024, 80), (4, 16, 1024, 72))
    shapes += ((2, 8, 4096, 40), (4, 32, 1024, 96), (8, 16, 333, 96), (1, 16, 640, 80))
    swin = Row(64, 4, 49, 32, mask="bias_1HSS")
    return [*(Row(*shape) for shape in shapes), swin]


def _prompt() -> list[Row]:
    """One causal prompt of a decoder, whose tiles are fewer than the GPU's multiprocessors."""
    shapes = (
        (32, 8, 256, 128),
        (32, 8, 512, 128),
        (28, 4, 512, 128),
        (16, 2, 1024, 128),
        (32, 8, 512, 64),
        (8, 4, 1024, 256),
    )
    return [Row(1, heads, s, d, is_causal=True, num_kv_heads=kv_heads) for heads, kv_heads, s, d in shapes]


def _wide() -> list[Row]:
    """One head of 512, as the autoencoders of diffusion models have it."""
    shapes = ((1, 1, 1024), (1, 1, 4096), (1, 1, 9216), (1, 1, 16384), (4, 1, 4096), (4, 8, 1024))
    return [Row(*shape, 512, unfused=True) for shape in shapes]


def _decode() -> list[Row]:
    sizes = ((1, 1024), (1, 4096), (1, 8192), (1, 32768), (1, 131072), (4, 8192), (16, 4096), (64, 2048), (8, 32768))
    plain = [Row(b, 32, 1, 128, num_kv_heads=8, seqlen_kv=s) for b, s in sizes]
    heads = ((1, 64, 8, 64, 16384), (32, 32, 32, 128, 1024), (2, 16, 1, 256, 8192))
    others = [Row(b, h, 1, d, num_kv_heads=k, seqlen_kv=s) for b, h, k, d, s in heads]
    several = Row(8, 32, 4, 128, num_kv_heads=8, seqlen_kv=8192, is_causal=True)
    ragged = [
        Row(64, 32, 1, 128, num_kv_heads=8, seqlen_kv=s, mask="lengths", shortest=shortest)
        for s, shortest in ((4096, 0.25), (32768, 0.0))
    ]
    window = Row(8, 32, 1, 128, is_causal=True, window=1023, num_kv_heads=8, seqlen_kv=32768)
    as_long = Row(8, 32, 1, 128, num_kv_heads=8, seqlen_kv=1024)  # what the window is held against
    chunk = Row(1, 32, 512, 128, is_causal=True, num_kv_heads=8, seqlen_kv=8192)
    return [*plain, *others, several, *ragged, window, as_long, chunk]


# Batch, heads, length and head_dim of the float32 rows: what exports of encoders and of longer models have.
FLOAT32 = (
    (8, 12, 128, 64),
    (8, 12, 512, 64),
    (4, 16, 512, 128),
    (4, 16, 2048, 64),
    (4, 16, 2048, 128),
    (2, 16, 4096, 128),
    (1, 16, 8192, 64),
    (1, 16, 8192, 128),
)


def _float32(in_ort: bool) -> list[Row]:
    options = {"dtype": "float32", "in_ort": in_ort, "unfused": True}
    rows = [Row(*shape, mask=mask, **options) for shape in FLOAT32 for mask in ("", "mask")]
    return [*rows, Row(4, 16, 2048, 64, is_causal=True, **options), Row(4, 16, 2048, 128, is_causal=True, **options)]


def _backward() -> list[Row]:
    rows = [dataclasses.replace(row, backward=True) for row in _plain((64, 128, 256))]
    rows += [dataclasses.replace(row, both=True) for row in rows if row.seqlen in (512, 2048, 8192)]
    rows += [_tokens(16384, num_heads=16, head_dim=128, is_causal=True, window=4095, backward=True)]
    biased = [Row(b, 16, s, 64, mask="bias_1HSS", backward=True) for b, s in ((8, 1024), (1, 4096))]
    return rows + biased + _float32_backward()


def _float32_backward() -> list[Row]:
    options = {"dtype": "float32", "backward": True}
    shapes = itertools.product(((8, 16, 1024), (2, 16, 4096)), (64, 128), (False, True))
    rows = [Row(*shape, head_dim, is_causal=is_causal, **options) for shape, head_dim, is_causal in shapes]
    return [*rows, Row(2, 8, 4096, 256, **options), Row(8, 16, 1024, 64, mask="bias_1HSS", **options)]


SUITES: dict[str, list[Row]] = {
    "plain": _plain((64, 128, 256)),  # 16k tokens, full and causal
    "backward": _backward(),
    "window": [_tokens(s, num_heads=16, head_dim=128, is_causal=True, window=1024) for s in (4096, 16384)],
    "bias": _bias(),
    "padding": _padding(),
    "decode": _decode(),
    "ort": _in_ort(),  # inside onnxruntime
    "short": _short(),
    "prompt": _prompt(),
    "wide": _wide(),
    "fp8": _float8(),
    "float32": _float32(in_ort=False),
    "float32_ort": _float32(in_ort=True),
}
