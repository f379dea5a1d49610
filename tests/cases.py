# SPDX-License-Identifier: Apache-2.0
"""The lists of attention cases: adapters and kernels are all tested on these, in the operator's own form.

`quick()` is for one CPU within a minute, `full()` (over 3,000) for a GPU. A Case is a description with a readable id;
`case.problem()` draws its tensors (problems.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from tests.problems import DTYPES, Case

HEAD_DIMS = (1, 2, 3, 5, 8, 16, 17, 24, 32, 33, 40, 48, 64, 72, 80, 96, 100, 111, 128, 129, 160, 192, 200, 255, 256)
SEQLENS = (1, 7, 113, 128, 129, 1023, 4097)
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
    "mean_padding": {"mask": "B11K", "empty": True, "empty_row": "mean"},
}  # fmt: skip


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
    """A NaN in each input: for many rows and few, for keys in one tile and in several, for each kind of instance."""
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
    hidden = (
        {"nan": "value", **causal}, {"nan": "value", "window_left": 9},
        {"nan": "value", "mask": "B1QK", "lse": False},
        {"nan": "hidden", "mask": "B11K", "sinks": True}, {"nan": "infinite", "mask": "B11K"},
        {"nan": "infinite", "mask": "B1QK", "empty": True, "empty_row": "mean"},
        {"nan": "value", "bias": "BHQK", **causal},
        {"nan": "value", "alibi": "H", **causal}, {"nan": "value", "softcap": 15.0, **causal},
    )  # fmt: skip
    shapes = ((200, 200, 32), (113, 129, 64), (129, 300, 80), (300, 300, 128), (130, 1023, 192), (65, 257, 256))
    for i, (dtype, kind) in enumerate(itertools.product((*DTYPES, "tf32"), hidden)):
        precision = {"float32_precision": "tf32"} if dtype == "tf32" else {}
        for j, shape in enumerate(shapes[i % 2 :: 2]):
            layout = ("BHSD", "BSHD", "BSH")[(i + j) % 3]
            yield Case("float32" if precision else dtype, 2, 4, 2, *shape, 0, layout, **kind, **precision)


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
    # Tiles that 2 or 4 pairs of blocks share over several steps, in each of the ways of prefill_sm90_wide (shape.h).
    for i, kind in enumerate(("none", "lengths_both", "mask_padding", "bias", "packed_causal", "sinks_window")):
        for j, (heads, sq, sk) in enumerate(((2, 130, 900), (10, 130, 600), (2, 130, 1300), (10, 130, 2100))):
            head_dim = (512, 320, 448)[(i + j) % 3]
            dtype, batch_size = ("float16", "bfloat16")[(i + j) % 2], 2 if heads == 2 else 1
            found.append(Case(dtype, batch_size, heads, heads // 2, sq, sk, head_dim, **MASKS[kind]))
    nans = ({"nan": "value", "is_causal": True}, {"nan": "hidden", "mask": "B11K"}, {"nan": "infinite", "mask": "B1QK"})
    for i, ((sq, sk), kind) in enumerate(itertools.product(((129, 129), (130, 1023), (3, 300), (130, 1300)), nans)):
        found.append(Case(("float16", "bfloat16")[i % 2], 1 + i % 2, 2, 1, sq, sk, (512, 320)[i % 2], **kind))
    return found


def has_gradients(case: Case) -> bool:
    """Has it a backward pass, and gradients that are numbers?"""
    forward_only = case.past or case.query_bias or case.dtype == "float8" or case.empty_row != "zero"
    return not forward_only and case.nan not in ("query", "key", "value", "bias")


def query_biases() -> list[Case]:
    """A bias that is added to the query: head sizes and layouts, with what makes kernels choose other instances."""
    kinds = (
        "none", "causal_bottom_right", "mask_padding", "mean_padding", "bias", "lengths_both", "packed_causal",
        "softcap", "past", "sinks_window", "mask_causal", "bias_heads", "alibi", "packed_outside",
    )  # fmt: skip
    shapes = ((113, 129), (300, 300), (1, 300), (7, 65), (64, 64), (130, 1023), (197, 197))
    found = []
    for i, (kind, dtype) in enumerate(itertools.product(kinds, (*DTYPES, "tf32"))):
        precision = {"float32_precision": "tf32"} if dtype == "tf32" else {}
        for j, head_dim in enumerate((64, 32, 128, 40, 96, 256, 80, 192, 33, 48, 320)):
            if head_dim > 256 and dtype in ("float32", "tf32"):  # no CUDA kernel
                continue
            layout, heads = ("BHSD", "BSHD", "BSH")[(i + j) % 3], ((2, 2), (4, 2), (6, 1))[(i + 2 * j) % 3]
            shape = (3, *heads, *shapes[(i + 3 * j) % 7], head_dim, 0, layout)
            found.append(Case("float32" if precision else dtype, *shape, **MASKS[kind], **precision, query_bias=True))
    for dtype, layout, kind in itertools.product(DTYPES, ("QKV", "HQKV"), ("none", "mask_padding", "causal")):
        found.append(Case(dtype, 2, 4, 4, 129, 129, 64, 0, layout, **MASKS[kind], query_bias=True))
    nans = ({"nan": "hidden", "mask": "B11K"}, {"nan": "value", "is_causal": True}, {"nan": "query"})
    for dtype, nan, (rows, dim) in itertools.product(DTYPES, nans, ((113, 64), (200, 128), (130, 256))):
        found.append(Case(dtype, 2, 4, 2, rows, rows, dim, **nan, query_bias=True))
    return found


def empty_row_values() -> list[Case]:
    """A value for rows that attend no key: where they are, in all kernels."""
    kinds = (
        "mask_empty", "mean_padding", "mean_window", "mean_lengths", "bias_inf", "sinks_empty", "lengths_both",
        "causal_bottom_right", "packed", "none",
    )  # fmt: skip
    shapes = ((113, 129), (129, 113), (1, 300), (7, 65), (300, 300), (130, 1023))
    found = []
    for i, (kind, dtype) in enumerate(itertools.product(kinds, (*DTYPES, "tf32"))):
        precision = {"float32_precision": "tf32"} if dtype == "tf32" else {}
        for j, (head_dim, head_dim_v) in enumerate(((64, 0), (128, 0), (40, 24), (96, 0), (256, 0), (33, 17))):
            layout, heads = ("BHSD", "BSHD", "BSH")[(i + j) % 3], ((2, 2), (4, 2), (6, 1))[(i + 2 * j) % 3]
            shape = (3, *heads, *shapes[(i + 5 * j) % 6], head_dim, head_dim_v, layout)
            fields = MASKS[kind] | precision | {"empty_row": "value"}
            found.append(Case("float32" if precision else dtype, *shape, **fields, query_bias=j % 2 == 0))
    return found


def systematic() -> list[Case]:
    """The enumeration, without repetitions."""
    lists = (_shapes(), _kinds(), _tf32(), _nans(), wide(), query_biases(), empty_row_values())
    return list({case.id: case for case in itertools.chain(*lists)}.values())


def full() -> list[Case]:
    """For a GPU: over 3,000. Of float8 those that a kernel takes, whose heads have a multiple of 16 columns."""
    return systematic() + [case for case in float8() if fits_float8_kernel(case)] + randomized(1800, seed=1)


def empty() -> list[Case]:
    """No batch entries, no query rows, no keys: nothing to write, or rows that attend no key."""
    masks = ("none", "causal_bottom_right", "mask_padding", "sinks", "mean_window", "lengths", "packed")
    sizes = [(0, 5, 7), (2, 0, 7), (2, 5, 0), (2, 0, 0)]
    return [
        Case(dtype, batch_size, 4, 2, seqlen_q, seqlen_kv, 64, **MASKS[mask])
        for dtype, (batch_size, seqlen_q, seqlen_kv), mask in itertools.product(DTYPES, sizes, masks)
        if batch_size > 0 or mask not in ("lengths", "packed")  # what the generator can't draw
    ] + [
        Case(dtype, *sizes, 64, query_bias=True, empty_row="value")
        for dtype in DTYPES
        for sizes in ((2, 4, 2, 5, 0), (2, 4, 4, 0, 7))
    ]


def _float8_options(i: int) -> dict:
    """Each shape of descale and type of output in turn, some with log-sum-exp, which has instances of its own."""
    output = ("float32", "float16", "", "float8_e4m3fn")[i % 4]
    scale = ("1", "", "H", "BH")[i // 4 % 4] if output == "float8_e4m3fn" else ""
    descale = ("H", "", "BH", "1")[i // 2 % 4]
    return {"descale": descale, "output_dtype": output, "output_scale": scale, "lse": i % 3 == 0}


def float8() -> list[Case]:
    """Query, key and value in float8: every kind of mask, head sizes, lengths, NaN."""
    shapes = ((113, 129), (129, 113), (300, 300), (7, 65), (64, 64), (130, 1023))
    dims = ((64, 128, 40, 256, 128, 96), (128, 64, 192, 96, 48, 128))
    found = []
    for i, fields in enumerate(MASKS.values()):
        for j, (sq, sk) in enumerate(shapes[i % 2 :: 2]):
            layout, heads = ("BHSD", "BSHD", "BSH")[(i + j) % 3], ((2, 2), (4, 2), (6, 1))[(i + 2 * j) % 3]
            shape = (3, *heads, sq, sk, dims[i % 2][2 * j + i % 2], 0, layout)
            found.append(Case("float8", *shape, **fields, **_float8_options(i + j)))
    for i, head_dim in enumerate(HEAD_DIMS):
        found.append(Case("float8", 2, 4, 2, 130, 200, head_dim, is_causal=True, **_float8_options(i)))
    for i, (sq, sk) in enumerate(itertools.product((1, 64, 129, 700), (1, 128, 257, 1100))):
        found.append(Case("float8", 1, 2, 1, sq, sk, 128, **_float8_options(i)))
        causal = {"is_causal": True, "alignment": "bottom_right"}
        found.append(Case("float8", 1, 2, 1, sq, sk, (64, 256)[i % 2], **causal, **_float8_options(i + 1)))
    for i, layout in enumerate(("QKV", "HQKV")):
        found.append(Case("float8", 2, 4, 4, 129, 129, 64, 0, layout, is_causal=True, **_float8_options(i)))
    kinds: tuple[dict, ...] = (
        {"nan": "query"}, {"nan": "key", "is_causal": True}, {"nan": "value", "is_causal": True},
        {"nan": "hidden", "mask": "B11K"}, {"nan": "value", "mask": "B1QK"}, {"nan": "bias", "bias": "BHQK"},
    )  # fmt: skip
    for i, (kind, (sq, sk, dim)) in enumerate(
        itertools.product(kinds, ((113, 129, 64), (300, 300, 128), (65, 257, 256)))
    ):
        found.append(Case("float8", 2, 4, 2, sq, sk, dim, **kind, **_float8_options(i)))
    return found


def fits_float8_kernel(case: Case) -> bool:
    """Heads of a multiple of 16 columns, as far as the kernel for float8 goes."""
    return case.head_dim % 16 == 0 and case.dim_v % 16 == 0


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
    cases += [case for case in query_biases() if case.work <= 60_000][::9]
    cases += [case for case in empty_row_values() if case.work <= 60_000][::6]
    cases += [case for case in randomized(150, seed=2) if case.work <= 150_000]
    cases += [case for case in float8() if case.work <= 60_000][::2]
    return list({case.id: case for case in cases}.values())
