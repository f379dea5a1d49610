# SPDX-License-Identifier: Apache-2.0
"""Times contestants on one GPU: warm, in turn, medians over CUDA events, several sets of inputs where one fits L2.

Calls are replayed from a CUDA graph where they can be captured. The GPU is kept busy until the host has enqueued
the replay, or the calls. So it is the GPU's time that counts, and not the host's to launch it, which would decide
short rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

ROUND_MS = 2.0  # what one contestant runs for in a round
LEAD_MS = 2.0  # what the GPU waits for the host at least
CYCLES_PER_MS = 2_000_000  # of the fastest GPU clock
Call = Callable[[int], object]  # argument: which set of inputs
Run = Callable[[], object]


def num_sets(num_bytes: int) -> int:
    """How many sets of inputs are needed, so that a set is no longer in L2 when its turn comes again."""
    return max(1, min(16, -(-3 * torch.cuda.get_device_properties(0).L2_cache_size // max(1, num_bytes))))


def _elapsed(run: Run, lead_ms: float) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(lead_ms * CYCLES_PER_MS))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _lead_ms(run: Run) -> float:
    """How long the GPU must wait so that the host has enqueued all of `run` by then, with a margin for a busy host."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    enqueued = time.perf_counter() - begin
    torch.cuda.synchronize()
    return max(LEAD_MS, 2e3 * enqueued)


def _repeated(call: Call, count: int, sets: int) -> Run:
    def run() -> None:
        for i in range(count):
            call(i % sets)

    return run


def _graph(run: Run) -> Run | None:
    """A replay of `run`, or None where it can't be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except Exception:  # each library has its own reason
        torch.cuda.synchronize()
        return None
    graph.replay()
    return graph.replay


def in_turn(calls: dict[str, Call], sets: int, rounds: int, capture: bool) -> tuple[dict[str, list[float]], list[str]]:
    """Milliseconds of a call in each round, by name; and who was replayed from a graph."""
    runs: dict[str, tuple[Run, int, float]] = {}
    replayed = []
    for name, call in calls.items():
        for i in range(sets + 2):
            call(i % sets)
        torch.cuda.synchronize()
        once = min(_elapsed(_repeated(call, sets, sets), LEAD_MS) / sets for _ in range(2))
        count = sets * max(1, round(ROUND_MS / max(once, 1e-3) / sets))
        run = _repeated(call, count, sets)
        replay = _graph(run) if capture else None
        runs[name] = (replay or run, count, _lead_ms(replay or run))
        if replay:
            replayed.append(name)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, (run, count, lead_ms) in runs.items():
            elapsed = _elapsed(run, lead_ms) / count
            if turn > 0:
                times[name].append(elapsed)
    return times, replayed


def summary(times: list[float]) -> dict[str, float]:
    """The median, and beside it the spread: the middle half of the times, the least and the largest."""
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"median_ms": median, "q1_ms": lower, "q3_ms": upper, "min_ms": min(times), "max_ms": max(times)}
