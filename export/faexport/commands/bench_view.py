# SPDX-License-Identifier: Apache-2.0
"""What `faexport bench` measured, as a table and as a picture."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import rich.box
import rich.markup
import rich.table

from faexport.commands.bench_data import Row, Timing, bench_label

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 420, 280, 60, 40, 50  # px of one of the two panels
COLOURS = {"original": "#8a5a00", "fused": "#0b57d0"}


def table(rows: Sequence[Row]) -> rich.table.Table:
    """One row a size: times in milliseconds with half the width of the middle half of the runs."""
    shown = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("inputs", overflow="fold")
    with_shares = any(one.rewritten is not None for row in rows for one in (row.original, row.fused))
    for heading in ("original ms", "fused ms", "speed", "memory MB", *(["rewritten"] if with_shares else [])):
        shown.add_column(heading, justify="right")
    for row in rows:
        both = (row.original, row.fused)
        memory = " → ".join("?" if one.bytes is None else f"{one.bytes / 1e6:.0f}" for one in both)
        shares = " → ".join("?" if one.rewritten is None else f"{one.rewritten:.0%}" for one in both)
        cells = (bench_label(row.sizes), *(_milliseconds(one.seconds) for one in both), _speed(row), memory)
        cells += (shares,) if with_shares else ()
        shown.add_row(*map(rich.markup.escape, cells))
    return shown


def line(row: Row) -> str:
    """The times at one size, e.g. "input_ids 1x512: 12 ±0.3 ms, fused 8.1 ±0.2 ms, 1.48 ×"."""
    return f"{_times(row)}, {_speed(row)}"


def _times(row: Row) -> str:
    original, fused = (_milliseconds(one.seconds) for one in (row.original, row.fused))
    return f"{bench_label(row.sizes)}: {original} ms, fused {fused} ms"


def _speed(row: Row) -> str:
    return f"{row.times_as_fast:.2f} ×" if row.gained else f"{row.times_as_fast:.2f} × (even)"


def _milliseconds(timing: Timing) -> str:
    return f"{timing.median * 1e3:.3g} ±{(timing.high - timing.low) / 2 * 1e3:.2g}"


def picture(rows: Sequence[Row], title: str) -> str:
    """SVG: time, and memory, against the number of elements of the first input, both axes logarithmic."""
    elements = [max(1, math.prod(next(iter(row.sizes.values()), [1]))) for row in rows]
    panels = [
        ("milliseconds (median)", [[getattr(r, m).seconds.median * 1e3 for r in rows] for m in COLOURS]),
    ]
    if all(one.bytes is not None for row in rows for one in (row.original, row.fused)):
        memory = [[max(getattr(r, m).bytes, 1e5) / 1e6 for r in rows] for m in COLOURS]
        panels.append(("memory of a run, MB", memory))
    spoken = "; ".join(map(_times, rows))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(f"{title}: {spoken}")}" '
        f'width="{2 * WIDTH}" height="{HEIGHT}" viewBox="0 0 {2 * WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="8" y="18" font-weight="bold">{html.escape(title)}</text>'
    ]
    for index, (name, series) in enumerate(panels):
        parts.append(
            _panel(index * WIDTH, name, elements, series, [bench_label(row.sizes).split()[-1] for row in rows])
        )
    return "".join([*parts, "</svg>\n"])


def _panel(x0: int, name: str, x: Sequence[float], series: Sequence[Sequence[float]], labels: Sequence[str]) -> str:
    values = [max(value, 1e-3) for one in series for value in one]
    low, high = 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values) * 1.001))
    width, height = WIDTH - LEFT - 20, HEIGHT - TOP - BOTTOM

    def at_x(value: float) -> float:
        span = math.log(x[-1] / x[0]) if x[-1] > x[0] else 1.0
        return x0 + LEFT + width * (math.log(value / x[0]) / span if x[-1] > x[0] else 0.5)

    def at_y(value: float) -> float:
        return TOP + height * (1 - math.log(max(value, 1e-3) / low) / math.log(high / low))

    parts = [f'<text x="{x0 + LEFT}" y="{TOP - 6}">{html.escape(name)}</text>']
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        y = at_y(10**power)
        parts.append(f'<path d="M{x0 + LEFT} {y:.1f}h{width}" stroke="#ccc"/>')
        parts.append(f'<text x="{x0 + LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10**power:g}</text>')
    for value, label in zip(x, labels, strict=True):
        place = f'x="{at_x(value):.1f}" y="{HEIGHT - BOTTOM + 16}"'
        parts.append(f'<text {place} text-anchor="middle" font-size="10">{html.escape(label)}</text>')
    for index, ((kind, colour), one) in enumerate(zip(COLOURS.items(), series, strict=True)):
        points = [(at_x(a), at_y(b)) for a, b in zip(x, one, strict=True)]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
        legend = f'x="{x0 + LEFT + 8 + 90 * index}" y="{HEIGHT - 8}" fill="{colour}"'
        parts.append(f"<text {legend}>{kind}</text>")
    return "".join(parts)
