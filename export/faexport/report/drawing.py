# SPDX-License-Identifier: Apache-2.0
"""Draws a block of a graph as SVG: layers from top to bottom, each node below all that it reads. Called by
html_page.py.

The layout is Sugiyama's: layers by the longest path, points where an arrow passes a layer, order by the mean of the
neighbours' places.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from faexport.report.blocks import Block

CHAR, PADDING, HEIGHT, GAP_X, GAP_Y = 7.0, 10.0, 26.0, 14.0, 26.0  # px; CHAR of a 12 px monospaced letter
LONGEST = 28  # letters of a name
SWEEPS = 6
OWN = "faexport::"


def svg(block: Block, label: str) -> str:
    """A drawing for people; `label` is what a screen reader says in its place."""
    layers, arrows, num = _layers(block)
    widths = [_width(block, node) for node in range(num)]
    place = _places(layers, arrows, widths)
    width = max(x + widths[node] / 2 for node, (x, _) in place.items()) + 2
    height = len(layers) * (HEIGHT + GAP_Y) - GAP_Y + 4
    parts = [
        f'<svg role="img" aria-label="{html.escape(label)}" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" xmlns="http://www.w3.org/2000/svg">'
    ]
    for start, end in arrows:
        (x1, y1), (x2, y2) = place[start], place[end]
        y1, y2 = (
            (y1 + HEIGHT / 2 if start < len(block.boxes) else y1),
            (y2 - HEIGHT / 2 if end < len(block.boxes) else y2),
        )
        middle = (y1 + y2) / 2
        parts.append(f'<path d="M{x1:.1f} {y1:.1f}C{x1:.1f} {middle:.1f} {x2:.1f} {middle:.1f} {x2:.1f} {y2:.1f}"/>')
    for node, box in enumerate(block.boxes):
        x, y = place[node]
        kind = "own" if box.op_type.startswith(OWN) else "node" if box.op_type else "value"
        parts.append(
            f'<g class="{kind}"><title>{html.escape(f"{box.op_type} {box.name}".strip())}</title>'
            f'<rect x="{x - widths[node] / 2:.1f}" y="{y - HEIGHT / 2:.1f}" width="{widths[node]:.1f}" '
            f'height="{HEIGHT:.0f}" rx="5"/>'
            f'<text x="{x:.1f}" y="{y + 4:.1f}">{html.escape(_text(block, node))}</text></g>'
        )
    return "".join([*parts, "</svg>"])


def _text(block: Block, node: int) -> str:
    box = block.boxes[node]
    text = box.op_type.removeprefix(OWN) or box.name
    return text if len(text) <= LONGEST else f"…{text[1 - LONGEST :]}"


def _width(block: Block, node: int) -> float:
    return len(_text(block, node)) * CHAR + 2 * PADDING if node < len(block.boxes) else 4.0


def _layers(block: Block) -> tuple[list[list[int]], list[tuple[int, int]], int]:
    """Nodes by layer, arrows of one layer each, and how many nodes there are: those behind the block's boxes are points
    where an arrow passes a layer."""
    num = len(block.boxes)
    below: dict[int, list[int]] = {node: [] for node in range(num)}
    for start, end in block.arrows:
        below[start].append(end)
    depth: dict[int, int] = {}  # from the bottom, so that inputs stand near their use
    pending = list(range(num))
    while pending:
        node = pending[-1]
        missing = [end for end in below[node] if end not in depth]
        if missing and node not in depth:
            pending += missing
        else:
            depth.setdefault(node, 1 + max((depth[end] for end in below[node]), default=-1))
            pending.pop()
    highest = max(depth.values())
    layers: list[list[int]] = [[] for _ in range(highest + 1)]
    for node in range(num):
        layers[highest - depth[node]].append(node)
    arrows = []
    for start, end in block.arrows:
        last = start
        for layer in range(highest - depth[start] + 1, highest - depth[end]):
            layers[layer].append(num)
            arrows.append((last, num))
            last, num = num, num + 1
        arrows.append((last, end))
    return layers, arrows, num


def _places(
    layers: Sequence[list[int]], arrows: Sequence[tuple[int, int]], widths: Sequence[float]
) -> dict[int, tuple[float, float]]:
    """The centre of each node. Sorts the layers."""
    neighbours: dict[int, list[int]] = {node: [] for layer in layers for node in layer}
    for start, end in arrows:
        neighbours[start].append(end)
        neighbours[end].append(start)
    x: dict[int, float] = {}
    for layer in layers:
        _spread(layer, x, widths)
    for sweep in range(SWEEPS):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            wanted = {
                node: sum(x[other] for other in neighbours[node]) / len(neighbours[node])
                if neighbours[node]
                else x[node]
                for node in layer
            }
            layer.sort(key=lambda node: wanted[node])
            x.update(wanted)
            _spread(layer, x, widths)
    left = min(x[node] - widths[node] / 2 for node in x) - 2
    return {
        node: (x[node] - left, 2 + HEIGHT / 2 + row * (HEIGHT + GAP_Y))
        for row, layer in enumerate(layers)
        for node in layer
    }


def _spread(layer: Sequence[int], x: dict[int, float], widths: Sequence[float]) -> None:
    """Moves the nodes of a layer apart, as little as keeps their order, around their common mean."""
    if not layer:
        return
    wanted = [x.get(node, 0.0) for node in layer]
    edge = -1e9
    for node, middle in zip(layer, wanted, strict=True):
        x[node] = max(middle, edge + widths[node] / 2)
        edge = x[node] + widths[node] / 2 + GAP_X
    shift = sum(wanted) / len(layer) - sum(x[node] for node in layer) / len(layer)
    for node in layer:
        x[node] += shift
