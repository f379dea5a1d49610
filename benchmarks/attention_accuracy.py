# SPDX-License-Identifier: Apache-2.0
"""The error of float8 attention against float64 on data of several kinds: ours, FlashAttention-3's and cuDNN's.

Tensors are rounded to float8 with a factor for each head, its largest element over 448. Errors are root mean squares
over that of the output: to float64 of the rounded tensors, which is the kernel's own, and of those before rounding.
cuDNN has one factor for a tensor, so it is given one head after the other. On Hopper it writes float8 only, here with a
factor that fits a tenth more than the largest element of 1,024 exact rows; its errors hold that rounding too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import faplugin
import results_file
import rich.box
import rich.console
import rich.progress
import rich.table
import torch
from attention import driver

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


def ours(operands: list[torch.Tensor], factors: list[torch.Tensor], largest: torch.Tensor) -> torch.Tensor:
    descales = {f"{name}_descale": x for name, x in zip(("query", "key", "value"), factors, strict=True)}
    return faplugin.attention(*operands, **descales, output_dtype="float32")


def flash_attention_3(operands: list[torch.Tensor], factors: list[torch.Tensor], largest: torch.Tensor) -> torch.Tensor:
    from fa3_fwd_interface import flash_attn_func

    query, key, value = (x.transpose(1, 2).view(torch.uint8).contiguous().view(x.dtype) for x in operands)
    descales = {f"{name}_descale": x[None].contiguous() for name, x in zip("qkv", factors, strict=True)}
    result = flash_attn_func(query, key, value, **descales)
    return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)


def cudnn(operands: list[torch.Tensor], factors: list[torch.Tensor], largest: torch.Tensor) -> torch.Tensor:
    from attention_float8 import cudnn_graph

    heads = []
    for head in range(HEADS):
        query, key, value = (x[:, head, :, None].contiguous() for x in operands)  # [1, S, 1, D]
        run = cudnn_graph(query, key, value, HEAD_DIM**-0.5, is_causal=False)
        scales = {f"descale_{name}": x[head] for name, x in zip("qkv", factors, strict=True)}
        scales |= {"scale_s": LARGEST, "descale_s": 1 / LARGEST, "scale_o": LARGEST / largest[head]}
        heads.append(run(query, key, value, scales).float() * (largest[head] / LARGEST))
    return torch.cat(heads, 2).transpose(1, 2)


CONTESTANTS = {"ours": ours, "FA3": flash_attention_3, "cuDNN": cudnn}


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    scores = query[:, :, rows].double() @ key.double().transpose(-1, -2) * HEAD_DIM**-0.5
    return scores.softmax(-1) @ value.double()


def error(out: torch.Tensor, want: torch.Tensor) -> float:
    """Root mean square over that of `want`, in percent."""
    return round(100 * ((out.double() - want).norm() / want.norm()).item(), 4)


def measure(kind: str, seqlen: int, draw: Callable[[int], Drawn]) -> dict:
    """Each contestant's errors, on 48 rows spread over the sequence."""
    torch.manual_seed(1)
    drawn = draw(seqlen)
    operands, factors = map(list, zip(*map(rounded, drawn), strict=True))
    rows = torch.linspace(0, seqlen - 1, 48, device="cuda").long()
    stood_for = [x.double() * f.double()[None, :, None, None] for x, f in zip(operands, factors, strict=True)]
    want, original = exact(*stood_for, rows), exact(*drawn, rows)
    sample = torch.arange(0, seqlen, max(1, seqlen // 1024), device="cuda")
    largest = 1.1 * exact(*stood_for, sample).abs().amax((0, 2, 3)).float()
    found: dict[str, dict] = {}
    for name, contestant in CONTESTANTS.items():
        try:
            out = contestant(operands, factors, largest)[:, :, rows]
        except ImportError:
            continue
        found[name] = {"error_percent": error(out, want), "error_before_rounding_percent": error(out, original)}
    return {"data": kind, "seqlen": seqlen, "contestants": found}


def table_of(rows: list[dict]) -> rich.table.Table:
    title = "error to float64, % (of the tensors before rounding)"
    table = rich.table.Table("data", "S", *CONTESTANTS, title=title, box=rich.box.SIMPLE_HEAD)
    for row in rows:
        found = [row["contestants"].get(name) for name in CONTESTANTS]
        cells = [f"{x['error_percent']:.2f} ({x['error_before_rounding_percent']:.2f})" if x else "–" for x in found]
        table.add_row(row["data"], str(row["seqlen"]), *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    results_file.add_options(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device")
    packages = ("torch", "fa3-fwd", "nvidia-cudnn-cu13", "nvidia-cudnn-frontend")
    gpu = {"gpu": torch.cuda.get_device_name(), "driver": driver(), "cudnn": torch.backends.cudnn.version()}
    document = {**gpu, **results_file.environment(*packages, commit=options.commit), "head_dim": HEAD_DIM, "rows": []}
    console = rich.console.Console(width=100)
    cases = [(kind, seqlen, draw) for kind, (lengths, draw) in KINDS.items() for seqlen in lengths]
    for case in rich.progress.track(cases, "measuring", console=console, disable=not console.is_terminal):
        document["rows"].append(measure(*case))
    console.print(table_of(document["rows"]))
    console.print(f"written: {results_file.write('fp8_accuracy', document, options.record)}")


if __name__ == "__main__":
    main()
