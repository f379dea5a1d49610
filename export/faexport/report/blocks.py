# SPDX-License-Identifier: Apache-2.0
"""One attention block before and after: the nodes that the rewriting took away, and those it put there. Called where a
report is drawn.

A node of the original went if no node of the rewritten model gives its output. From the block's result, whose name both
models have, the nodes that went are followed upwards until a value that both have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from faexport.graph.nodes import graphs_of, name_of, op
from faexport.spec import DOMAIN, OP_TYPE


@dataclasses.dataclass(frozen=True)
class Box:
    """A node, or a value that comes from outside (then `op_type` is empty)."""

    name: str
    op_type: str


@dataclasses.dataclass
class Block:
    """Boxes, and arrows between them by their indices. Constants are left out."""

    boxes: list[Box] = dataclasses.field(default_factory=list)
    arrows: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    @property
    def num_nodes(self) -> int:
        return sum(bool(box.op_type) for box in self.boxes)


def find_blocks(original: ir.Model, fused: ir.Model) -> dict[str, tuple[Block, Block]]:
    """By the name of each node of the original that went: its block before and after."""
    before, after = _by_output(original), _by_output(fused)
    found: dict[str, tuple[Block, Block]] = {}
    for name, node in after.items():
        if (node.domain, node.op_type) != (DOMAIN, OP_TYPE):
            continue
        result = _known_result(name, after, before)
        if result is None:
            continue
        old, new = _upwards(result, before, after), _upwards(result, after, before)
        for box in old.boxes:
            if box.op_type:
                found.setdefault(box.name, (old, new))
    return found


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph, _ in graphs_of(model):
        yield from graph


def _by_output(model: ir.Model) -> dict[str, ir.Node]:
    """The node of each value that one computes."""
    return {value.name: node for node in _nodes(model) for value in node.outputs if value.name}


def _known_result(name: str, fused: dict[str, ir.Node], before: dict[str, ir.Node]) -> str | None:
    """From an operator's output downwards, along nodes that are new: the first value that the original has too."""
    pending, seen = [name], {name}
    while pending:
        current = pending.pop(0)
        if current in before:
            return current
        uses = [use.node for value in fused[current].outputs if value.name == current for use in value.uses()]
        for user in uses:
            outputs = [value.name for value in user.outputs if value.name in fused and value.name not in seen]
            seen.update(outputs)
            pending += _upper_first([output for output in outputs if output in before], before, fused)
            pending += [output for output in outputs if output not in before]
    return None


def _upper_first(results: list[str], before: dict[str, ir.Node], fused: dict[str, ir.Node]) -> list[str]:
    """Results of one node, those first that the original makes others of: a sum before its normalization."""

    def made_of_others(result: str) -> bool:
        return any(not box.op_type and box.name in results for box in _upwards(result, before, fused).boxes)

    return sorted(results, key=made_of_others) if results[1:] else results


def _upwards(result: str, own: dict[str, ir.Node], other: dict[str, ir.Node]) -> Block:
    """The node that gives `result`, and what it needs of the nodes that the other model doesn't have."""
    block, index, pending = Block(), {}, [own[result]]
    index[own[result]] = _add(block, name_of(own[result]), op(own[result]))
    outside: dict[str, int] = {}
    while pending:
        node = pending.pop()
        for value in dict.fromkeys(node.inputs):
            above = value.producer() if value is not None else None
            if value is None or not value.name or value.is_initializer() or op(above) == "Constant":
                continue
            if above is None or value.name in other:
                if value.name not in outside:
                    outside[value.name] = _add(block, value.name, "")
                source = outside[value.name]
            else:
                if above not in index:
                    index[above] = _add(block, name_of(above), op(above))
                    pending.append(above)
                source = index[above]
            block.arrows.append((source, index[node]))
    return block


def _add(block: Block, name: str, op_type: str) -> int:
    block.boxes.append(Box(name, op_type))
    return len(block.boxes) - 1
