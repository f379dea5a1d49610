# SPDX-License-Identifier: Apache-2.0
"""docs/torch.md's tables of training, from results/training.json; called by readme.py."""

from __future__ import annotations

WAYS = {"ours": "ours", "eager": "eager", "FA2": "FA2", "cuDNN": "cuDNN", "efficient": "memory-efficient", "FA4": "FA4"}


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _table(title: str, ways: list[str], rows: list[str]) -> list[str]:
    return ["", title, "", _row("", [WAYS[way] for way in ways]), "|---" * (len(ways) + 1) + "|", *rows]


def _step(contestant: dict | None) -> str:
    return f"{contestant['step_ms']:.1f} ({contestant['peak_mb'] / 1000:.1f})" if contestant else "–"


def training_tables(data: dict) -> str:
    """Milliseconds and memory of a step of each model; memory of both passes by length. A way of which the run has
    nothing has no column."""
    ways = [way for way in WAYS if way in data["memory"]]
    steps = [
        _row(f"{model['name']}: {model['layers']} layers, batch {model['batch_size']}",
             [_step(model["contestants"].get(way)) for way in ways])
        for model in data["models"]
    ]  # fmt: skip
    lengths = sorted({int(length) for found in data["memory"].values() for length in found})
    memory = [
        _row(f"S {length}", [f"{found[str(length)]:.0f}" if str(length) in found else "–" for found in columns])
        for columns in [[data["memory"][way] for way in ways]]
        for length in lengths
    ]
    differences = [
        f"{model['largest_loss_difference']:.1e} ({model['name']})"
        for model in data["models"]
        if model.get("largest_loss_difference") is not None
    ]
    parts = [
        f"{data['gpu']}, PyTorch {data['versions']['torch']}, commit {data['commit']}, {data['date'][:10]}; bfloat16, "
        f"the attention of every model by each way\n(`benchmarks/training.py{' --quick' * data['quick']}`; widths and "
        "heads as the models have them, random weights and data).",
        *_table("A step's milliseconds, in brackets its GB at the peak; –: refused, or out of memory:", ways, steps),
        *_table("MB of both passes, batch 16, 8 heads of 64:", ways, memory),
        "",
        f"Over 50 steps the losses of ours and of eager attention differ by at most {', '.join(differences)}.",
    ]
    return "\n".join(parts) + "\n"
