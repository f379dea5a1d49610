# SPDX-License-Identifier: Apache-2.0
"""Times contestants on one GPU: warm, in turn, medians over CUDA events; several sets of inputs where one fits L2; CUDA
graphs where a call is so short that the host's time to launch it would be measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

SHORT_MS = 0.05  # below, a row is timed as CUDA-graph replays
ROUND_MS = 2.0  # what one contestant runs for in a round
Call = Callable[[int], object]  # argument: which set of inputs


def num_sets(num_bytes: int) -> int:
    """How many sets of inputs are needed, so that a set is no longer in L2 when its turn comes again."""
    return max(1, min(16, -(-3 * torch.cuda.get_device_properties(0).L2_cache_size // max(1, num_bytes))))


def _elapsed(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _repeated(call: Call, count: int, sets: int) -> Callable[[], object]:
    def run() -> None:
        for i in range(count):
            call(i % sets)

    return run


def _graph(call: Call, sets: int) -> tuple[Callable[[], object], int]:
    """A replay of one call on each set, several times over; and the number of calls in it."""
    count = sets * max(1, 20 // sets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i % sets)
    return graph.replay, count


def in_turn(
    calls: dict[str, Call], sets: int, rounds: int, capturable: Sequence[str]
) -> tuple[dict[str, list[float]], bool]:
    """Milliseconds of a call in each round, by name, and whether graphs were replayed."""
    once = {}
    for name, call in calls.items():
        for i in range(sets + 2):
            call(i % sets)
        torch.cuda.synchronize()
        once[name] = min(_elapsed(_repeated(call, 4, sets)) / 4 for _ in range(3))
    use_graph = min(once.values()) < SHORT_MS and set(calls) <= set(capturable)
    runs = {}
    for name, call in calls.items():
        if use_graph:
            run, count = _graph(call, sets)
        else:
            count = max(1, round(ROUND_MS / max(once[name], 1e-3)))
            run = _repeated(call, count, sets)
        runs[name] = (run, count)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, (run, count) in runs.items():
            elapsed = _elapsed(run) / count
            if turn > 0:
                times[name].append(elapsed)
    return times, use_graph


def summary(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {"median_ms": statistics.median(ordered), "min_ms": ordered[0], "max_ms": ordered[-1]}
