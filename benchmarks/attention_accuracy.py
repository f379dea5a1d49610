# SPDX-License-Identifier: Apache-2.0
"""The error of float8 attention against float64, ours and FlashAttention-3's, on data of several kinds.

Tensors are rounded to float8 with a factor for each head, its largest element over 448. Errors are root mean squares
over that of the output: to float64 of the rounded tensors, which is the kernel's own, and of those before rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import faplugin
import rich.box
import rich.console
import rich.table
import torch

HEADS, HEAD_DIM, LARGEST = 4, 128, 448
Drawn = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def normal(seqlen: int, scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
    return offset + scale * torch.randn(1, HEADS, seqlen, HEAD_DIM, device="cuda")


def with_outliers(seqlen: int) -> Drawn:
    """One column of the keys and one of the values are 20 times as large."""
    query, key, value = (normal(seqlen) for _ in range(3))
    key[..., 3] *= 20
    value[..., 5] *= 20
    return query, key, value


KINDS: dict[str, tuple[tuple[int, ...], Callable[[int], Drawn]]] = {
    "gaussian": ((1024, 8192, 65536), lambda s: (normal(s), normal(s), normal(s))),
    "outliers": ((8192,), with_outliers),
    "keys with a common part": ((8192,), lambda s: (normal(s), normal(s) + 4 * normal(1), normal(s))),
    "flat": ((8192,), lambda s: (normal(s, 0.05), normal(s), normal(s))),
    "peaked": ((8192,), lambda s: (normal(s, 3.0), normal(s), normal(s))),
    "values of one sign": ((8192, 32768), lambda s: (normal(s), normal(s), normal(s, 0.2, 1.0))),
}


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8 and the factor of each head."""
    factors = x.abs().amax((0, 2, 3)) / LARGEST
    return (x / factors[None, :, None, None]).to(torch.float8_e4m3fn), factors


def ours(operands: list[torch.Tensor], factors: list[torch.Tensor]) -> torch.Tensor:
    descales = {f"{name}_descale": x for name, x in zip(("query", "key", "value"), factors, strict=True)}
    return faplugin.attention(*operands, **descales, output_dtype="float32")


def flash_attention_3(operands: list[torch.Tensor], factors: list[torch.Tensor]) -> torch.Tensor:
    from fa3_fwd_interface import flash_attn_func

    query, key, value = (x.transpose(1, 2).view(torch.uint8).contiguous().view(x.dtype) for x in operands)
    descales = {f"{name}_descale": x[None].contiguous() for name, x in zip("qkv", factors, strict=True)}
    result = flash_attn_func(query, key, value, **descales)
    return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    scores = query[:, :, rows].double() @ key.double().transpose(-1, -2) * HEAD_DIM**-0.5
    return scores.softmax(-1) @ value.double()


def error(out: torch.Tensor, want: torch.Tensor) -> str:
    return f"{100 * ((out.double() - want).norm() / want.norm()).item():.2f} %"


def main() -> None:
    table = rich.table.Table(title="error to float64 (of the tensors before rounding)", box=rich.box.SIMPLE_HEAD)
    for heading in ("data", "S", "ours", "FA3"):
        table.add_column(heading)
    for kind, (lengths, draw) in KINDS.items():
        for seqlen in lengths:
            torch.manual_seed(1)
            drawn = draw(seqlen)
            operands, factors = map(list, zip(*map(rounded, drawn), strict=True))
            rows = torch.linspace(0, seqlen - 1, 48, device="cuda").long()
            stood_for = (x.double() * f.double()[None, :, None, None] for x, f in zip(operands, factors, strict=True))
            want, original = exact(*stood_for, rows), exact(*drawn, rows)
            cells = []
            for contestant in (ours, flash_attention_3):
                try:
                    out = contestant(operands, factors)[:, :, rows]
                    cells.append(f"{error(out, want)} ({error(out, original)})")
                except ImportError:
                    cells.append("–")
            table.add_row(kind, str(seqlen), *cells)
    rich.console.Console(width=100).print(table)


if __name__ == "__main__":
    main()
