# SPDX-License-Identifier: Apache-2.0
"""Times steps of a decoder whose cache is int8 or float8 beside the same step with a bfloat16 cache.

One new row of bfloat16 is stored in place (cache "write") and attends all rows; 32 query heads on 8 key heads of 128,
one scale for each tensor, or one for each channel. Replays of a CUDA graph; the contestants take turns, medians count.
"""

from __future__ import annotations

import argparse
import itertools

import faplugin
import gpu_timer
import results_file
import rich.box
import rich.console
import rich.table
import torch
from attention import document_of
from decode_cpu import HEAD_DIM, NUM_KV_HEADS, NUM_Q_HEADS
from decode_ort import QUANTIZED

SIZES = ((1, 1024), (1, 4096), (1, 32768), (8, 4096), (16, 4096), (64, 2048), (8, 32768))  # batch, rows
SCALES = ("tensor", "channel")
LIMIT = 0.05  # ||a - b|| / ||b|| of the outputs with a quantized cache and with the other: float8 has four bits


class Contestant:
    """A step on each of `sets` caches, which hold the same numbers as other contestants', as far as they can."""

    def __init__(self, batch: int, rows: int, sets: int, quantized: str = "", scales: str = ""):
        torch.manual_seed(batch + rows)
        self.calls = [self._call(batch, rows, quantized, scales) for _ in range(sets)]

    @staticmethod
    def _call(batch: int, rows: int, quantized: str, scales: str):
        new = [
            torch.randn(batch, heads, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
            for heads in (NUM_Q_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
        ]
        shape = (batch, NUM_KV_HEADS, rows, HEAD_DIM)
        caches = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        given = {"nonpad_kv_seqlen": torch.full((batch,), rows, device="cuda"), "cache": "write", "is_causal": True}
        if quantized:
            dtype, largest = QUANTIZED[quantized]
            per = (1, NUM_KV_HEADS, 1, HEAD_DIM) if scales == "channel" else (1,)
            step = torch.full(per, 5 / largest, device="cuda")
            for which, cache in enumerate(caches):
                numbers = (cache / step).clamp(-largest, largest)
                caches[which] = (numbers if dtype.is_floating_point else numbers.round()).to(dtype)
            given |= {"k_scale": step, "v_scale": step, "kv_cache_bit_width": 8}
        output = torch.empty_like(new[0])
        out = {"output": output, "present_key": caches[0], "present_value": caches[1]}
        places = {"past_key": caches[0], "past_value": caches[1], "return_present": True, "out": out}

        def call() -> torch.Tensor:
            faplugin.attention(*new, **given, **places)
            return output

        return call

    def __call__(self, i: int) -> torch.Tensor:
        return self.calls[i]()


def measure(batch: int, rows: int, rounds: int) -> dict:
    """One row of the results."""
    cache_bytes = 2 * batch * NUM_KV_HEADS * rows * HEAD_DIM  # of a quantized one
    sets = gpu_timer.num_sets(cache_bytes)
    calls = {"bfloat16": Contestant(batch, rows, sets)}
    for quantized, scales in itertools.product(QUANTIZED, SCALES):
        calls[f"{quantized} by {scales}"] = Contestant(batch, rows, sets, quantized, scales)
    result: dict = {"batch_size": batch, "seqlen": rows, "contestants": {}, "over_bfloat16": {}, "refused": {}}
    wanted = calls["bfloat16"](0).double()
    for name, call in list(calls.items()):
        difference = ((call(0).double() - wanted).norm() / wanted.norm()).item()
        if not difference <= LIMIT:
            result["refused"][name] = f"differs from bfloat16 by {difference:.2g}"
            del calls[name]
    times, replayed = gpu_timer.in_turn(calls, sets, rounds, capture=True)
    for name, milliseconds in times.items():
        summary = {key: round(x, 5) for key, x in gpu_timer.summary(milliseconds).items()}
        held = cache_bytes * (2 if name == "bfloat16" else 1)
        summary |= {"tb_per_s": round(held / summary["median_ms"] / 1e9, 3), "replayed": name in replayed}
        result["contestants"][name] = summary
        whole = gpu_timer.summary(times["bfloat16"])["median_ms"]
        result["over_bfloat16"][name] = round(summary["median_ms"] / whole, 3)
    return result


def show(console: rich.console.Console, rows: list[dict]) -> None:
    table = rich.table.Table(title="A decode step, H32/8 D128", box=rich.box.SIMPLE_HEAD)
    for name in ("batch", "rows", "cache", "µs", "TB/s", "of bfloat16's time"):
        table.add_column(name, justify="left" if name == "cache" else "right")
    for row in rows:
        size = (str(row["batch_size"]), str(row["seqlen"]))
        for name, times in row["contestants"].items():
            cells = (name, f"{times['median_ms'] * 1e3:.1f}", f"{times['tb_per_s']:.2f}")
            table.add_row(*size, *cells, str(row["over_bfloat16"][name]))
        for name, why in row["refused"].items():
            table.add_row(*size, name, "–", "–", why)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of the contestants (%(default)s)")
    results_file.add_options(parser, name="decode_quantized")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device")
    torch.cuda.set_stream(torch.cuda.Stream())
    console, document = rich.console.Console(width=120), document_of(options)
    for batch, rows in SIZES:
        document["rows"].append(measure(batch, rows, options.rounds))
        path = results_file.write(options.name, document, options.record)
        torch.cuda.empty_cache()
    show(console, document["rows"])
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
