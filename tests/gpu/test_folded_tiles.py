# SPDX-License-Identifier: Apache-2.0
"""Causal problems of so few tiles that each thread block has one: tiles are of early rows and late ones then."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests import cases

torch = pytest.importorskip("torch")
from tests.gpu import arrays, test_attention  # noqa: E402

pytestmark = pytest.mark.gpu

# Heads, rows, keys and head_dim for which 16-bit tensors have folded tiles on 132 multiprocessors: each form of tile
# that may be folded, of so many times 64 rows, the first of which may be missing.
SHAPES = (
    (16, 2048, 2048, 64),  # 4
    (40, 500, 700, 48),  # 3
    (40, 500, 500, 96),  # 3
    (44, 500, 500, 128),  # 3
    (20, 700, 700, 80),  # 2, as from here on
    (30, 500, 500, 128),
    (8, 2000, 2000, 128),
    (100, 65, 65, 128),
    (30, 512, 3000, 128),  # with 128 keys a tile
    (6, 1000, 1000, 192),
    (8, 1000, 1000, 256),
    (30, 300, 300, 256),  # with 32 keys a tile
)
KINDS = (("float16", ""), ("bfloat16", ""), ("float32", "tf32"), ("float32", "tf32x3"), ("float8_e4m3fn", ""))


def folded() -> list[cases.Case]:
    return [
        cases.Case(
            "float32" if i % 3 == 0 else ("float16", "bfloat16")[i % 2],
            *(1, heads, heads // 2 if heads % 2 == 0 else heads, rows, keys, head_dim),
            is_causal=True,
            alignment="bottom_right",
            sinks=i % 2 == 0,
            float32_precision=("tf32", "tf32x3")[i % 2] if i % 3 == 0 else "",
        )
        for i, (heads, rows, keys, head_dim) in enumerate(SHAPES)
    ]


@pytest.mark.parametrize("case", folded(), ids=str)
def test_case(case: cases.Case, expected) -> None:
    test_attention.check(case.problem(), expected(case))


@pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_tiles_of_neighbouring_rows(dtype: str, precision: str, shape: tuple[int, ...]) -> None:
    """Where sequences have lengths, even if they are full ones, tiles are not folded. The last values are NaN: all rows
    but the last are mended."""
    import faplugin

    heads, rows, keys, head_dim = shape
    torch.manual_seed(rows)
    inputs = {
        name: torch.randn(1, heads, length, head_dim, device="cuda").to(getattr(torch, dtype))
        for name, length in (("query", rows), ("key", keys), ("value", keys))
    }
    inputs["value"][:, :, -1] = float("nan")
    readable = {name: arrays.exported(x) for name, x in inputs.items()}
    attributes = {"is_causal": True, "alignment": "bottom_right"}
    if precision:
        attributes["float32_precision"] = precision
    if dtype == "float8_e4m3fn":
        attributes["output_dtype"] = "float32"
    lengths = torch.full((1,), keys, device="cuda")
    out = {}
    for name, given in (("folded", {}), ("neighbours", {"nonpad_kv_seqlen": lengths})):
        memory = arrays.poisoned(
            (1, heads, rows, head_dim), torch.float32 if "output_dtype" in attributes else inputs["query"].dtype
        )
        faplugin.attention(**readable, **attributes, **given, out={"output": memory})
        torch.cuda.synchronize()
        out[name] = memory
    assert out["folded"][:, :, :-1].isfinite().all()
    assert out["folded"][:, :, -1].isnan().all()
    assert arrays.same_bits(out["folded"], out["neighbours"])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("heads", "rows", "head_dim"),
    [(16, 2048, 64), (40, 500, 96), (30, 500, 128), (8, 1000, 256), (40, 3000, 64), (24, 3000, 128), (40, 2000, 256)],
    ids=str,
)
def test_each_launch_waits_for_those_before_it(dtype: str, heads: int, rows: int, head_dim: int) -> None:
    """Blocks decide on a tile before earlier kernels have ended, and let the next kernel's blocks come.

    In a chain each launch reads what the one before it wrote, and writes where that one read; against the same chain
    with a pause after each link. The last three shapes have more tiles than the GPU has multiprocessors, and a third of
    the launches have lengths, which must be read before a block decides.
    """
    import faplugin

    torch.manual_seed(head_dim)
    start, noise = (torch.randn(1, heads, rows, head_dim, device="cuda", dtype=getattr(torch, dtype)) for _ in range(2))
    lengths = torch.full((1,), rows - 70, device="cuda")
    kinds = ({"is_causal": True}, {}, {"is_causal": True, "nonpad_kv_seqlen": lengths})

    def chain(after_each: Callable[[], None]) -> torch.Tensor:
        x, y = start.clone(), torch.empty_like(start)
        for i in range(30):
            faplugin.attention(x, x, x, **kinds[i // 2 % 3], out={"output": y})
            after_each()
            if i % 3 == 2:
                y.mul_(0.5).add_(noise)
                after_each()
            x, y = y, x
        return x

    assert arrays.check_chain(chain, times=20).isfinite().all()
