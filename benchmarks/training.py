# SPDX-License-Identifier: Apache-2.0
"""Times steps of training on one GPU: models whose attention is ours, eager, a backend of PyTorch or FlashAttention-4.

Each model starts from the same weights and sees the same batches, in bfloat16 by autocast, with AdamW. Steps are timed,
host and GPU together, and their peak of memory is taken; the losses of ours and of eager attention are compared over
50 steps. Beside it stands the memory of both passes of one attention, by length.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import time

import results_file
import rich.box
import rich.console
import rich.table
import torch
import training_models
from training_models import Model, Shape

COMPARED = ("ours", "eager")  # whose losses are
LEARNING_RATE = 3e-4
MEMORY_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
LONGEST_EAGER = 8192  # its matrices of scores need 20 GB at 4096, 80 GB at 8192


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def train(shape: Shape, attention: training_models.Attention, num_steps: int, timed: int) -> dict:
    """Losses of all steps; milliseconds of one, the median of the last `timed`; the peak of memory in MB."""
    release()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Model(shape, attention)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True)
    losses, times = [], []
    for step in range(num_steps):
        given, wanted = training_models.batch(shape, step)
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(given).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
        losses.append(round(loss.item(), 5))
    peak = torch.cuda.max_memory_allocated() / 1e6
    return {"step_ms": round(statistics.median(times[-timed:]), 3), "peak_mb": round(peak), "losses": losses}


def without_attention(shape: Shape) -> float:
    """Milliseconds of a step whose attention is its values: what no kernel can save."""

    def values(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.repeat_interleave(shape.heads // shape.kv_heads, 2) + query + key.sum()

    return train(shape, values, 6, 3)["step_ms"]


def steps_of(shape: Shape, options: argparse.Namespace) -> int:
    """Of the runs whose losses are compared. Eager attention would take half a minute for the longest model's."""
    return min(options.steps, 15) if options.quick and shape.rows > 8192 else options.steps


def measure(shape: Shape, wanted: list[str], num_steps: int, timed: int) -> dict:
    """One model by all contestants."""
    result: dict = {"model": shape.name, **dataclasses.asdict(shape), "contestants": {}, "refused": {}}
    result["without_attention_ms"] = without_attention(shape)
    for name, attention in training_models.contestants(shape).items():
        if wanted and name not in wanted:
            continue
        try:
            steps = num_steps if name in COMPARED else timed + 3
            result["contestants"][name] = train(shape, attention, steps, timed)
        except Exception as error:  # each peer refuses in its own way, and eager attention for want of memory
            result["refused"][name] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    found = result["contestants"]
    if all(name in found for name in COMPARED):
        pairs = zip(*(found[name]["losses"] for name in COMPARED), strict=True)
        result["largest_loss_difference"] = round(max(abs(a - b) / b for a, b in pairs), 5)
    release()
    return result


def memory_of(attention: training_models.Attention, rows: int) -> float:
    """MB at the peak of both passes of 16 × 8 heads of 64, inputs and gradients included."""
    release()
    size = (16, rows, 8, 64)
    query, key, value = (torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    output = attention(query, key, value)
    output.backward(torch.ones_like(output))
    return round(torch.cuda.max_memory_allocated() / 1e6, 1)


def memory_by_length(wanted: list[str], longest: int) -> dict[str, dict[int, float]]:
    """MB by contestant and length."""
    found: dict[str, dict[int, float]] = {}
    for rows in MEMORY_LENGTHS:
        shape = Shape("", 1, 512, 0, 8, 8, rows, 16)
        for name, attention in training_models.contestants(shape).items():
            if rows > longest or (wanted and name not in wanted) or (name == "eager" and rows > LONGEST_EAGER):
                continue
            try:
                found.setdefault(name, {})[rows] = memory_of(attention, rows)
            except Exception as error:  # what one can't do at this length, it can't do at a greater
                print(f"{name} at {rows}: {str(error).splitlines()[0][:200]}")
    release()
    return found


def print_results(console: rich.console.Console, document: dict) -> None:
    for unit, key in (("milliseconds of a step", "step_ms"), ("MB at the peak", "peak_mb")):
        names = list(dict.fromkeys(name for result in document["models"] for name in result["contestants"]))
        table = rich.table.Table("model", *names, title=unit, box=rich.box.SIMPLE_HEAD)
        for result in document["models"]:
            cells = (str(result["contestants"].get(name, {}).get(key, "–")) for name in names)
            table.add_row(f"{result['model']} ({result['layers']} layers)", *cells)
        console.print(table)
    for result in document["models"]:
        difference = result.get("largest_loss_difference")
        console.print(
            f"{result['model']}: losses of ours and eager differ by {difference} at most; {result['refused']}"
        )
    console.print("MB of both passes by length:", document["memory"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="three models of a few layers, memory up to 16384: a minute"
    )
    parser.add_argument("--match", default="", help="only models whose name contains this")
    parser.add_argument("--contestants", nargs="*", default=[], help="ours eager FA2 cuDNN efficient FA4; all if none")
    parser.add_argument("--steps", type=int, default=50, help="of the runs whose losses are compared")
    parser.add_argument("--timed", type=int, default=7, help="steps whose median counts")
    results_file.add_options(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device")
    return options


def main() -> None:
    options = parse()
    console = rich.console.Console(width=180)
    shapes = [shape for shape in training_models.SHAPES if options.match in shape.name]
    if options.quick:
        quick = training_models.QUICK
        shapes = [dataclasses.replace(s, layers=quick[s.name]) for s in shapes if s.name in quick]
    environment = results_file.environment("torch", "flash-attn-4", "nvidia-cudnn-cu13", commit=options.commit)
    document: dict = {"gpu": torch.cuda.get_device_name(), **environment, "quick": options.quick, "models": []}
    document["memory"] = memory_by_length(options.contestants, 16384 if options.quick else MEMORY_LENGTHS[-1])
    for shape in shapes:
        document["models"].append(measure(shape, options.contestants, steps_of(shape, options), options.timed))
        path = results_file.write("training", document, options.record)  # model by model, for an interrupted run
        console.print(shape.name, {n: c["step_ms"] for n, c in document["models"][-1]["contestants"].items()})
    print_results(console, document)
    console.print(f"written: {path}" if shapes else "no model matches")


if __name__ == "__main__":
    main()
