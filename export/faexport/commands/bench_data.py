# SPDX-License-Identifier: Apache-2.0
"""What `faexport bench` measures: data that bench.py fills in and bench_view.py shows."""

from __future__ import annotations

import dataclasses

CLEARLY = 1.03  # times as fast, and the middle halves of the times don't meet: else nothing is gained


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds: the median, and the quarters of the runs below and above which a quarter lies."""

    median: float
    low: float
    high: float
    num_runs: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model at one size. `bytes`: of one run, above the loaded model. `rewritten`: share of the
    nodes' time that attention takes, with its projections where they became one."""

    seconds: Timing
    bytes: int | None
    rewritten: float | None


@dataclasses.dataclass(frozen=True)
class Row:
    """Both models at one size."""

    sizes: dict[str, list[int]]  # shapes of the inputs by name
    original: Measured
    fused: Measured

    @property
    def times_as_fast(self) -> float:
        return self.original.seconds.median / self.fused.seconds.median

    @property
    def gained(self) -> bool:
        apart = self.fused.seconds.high < self.original.seconds.low
        return apart and self.times_as_fast >= CLEARLY


def bench_label(sizes: dict[str, list[int]]) -> str:
    """The first input's name and shape, e.g. "input_ids 1x512"."""
    name, shape = next(iter(sizes.items()), ("no inputs", []))
    return f"{name} {'x'.join(map(str, shape))}".strip()
