# SPDX-License-Identifier: Apache-2.0
"""The guard behind a softmax: Where(condition on the weights themselves, number, weights), as for NaN and infinities.

Called by value_chain.py. A softmax yields numbers from 0 to 1, or a row of NaN. So a condition is evaluated for both:
one that is false of all numbers replaces nothing but NaN.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import onnx_ir as ir

from faexport.understand.nodes import live_users, op, producer

if TYPE_CHECKING:
    from faexport.understand.shapes import Analysis

COMPARISONS = {"Less": (False, False), "Greater": (True, False), "LessOrEqual": (False, True)}
COMPARISONS |= {"GreaterOrEqual": (True, True)}  # (is it larger that is asked for, or equal)


@dataclasses.dataclass(frozen=True)
class Truth:
    """Of a condition on the weights: for every number from 0 to 1 (None: it depends), and for NaN."""

    numbers: bool | None
    nan: bool


@dataclasses.dataclass(frozen=True)
class Guard:
    where: ir.Node
    tests: tuple[ir.Node, ...]  # the nodes that compute its condition
    replaces_nan: bool


def nan_guard(weights: ir.Value, a: Analysis) -> Guard | None:
    """The guard that all uses of `weights` belong to. NaN may become 0; what is put in the place of anything else never
    gets there."""
    users = live_users(weights)
    for node in users:
        if op(node) != "Where" or node.inputs[2] is not weights or node.inputs[0] is weights:
            continue
        tests: dict[ir.Node, None] = {}
        truth = _truth(node.inputs[0], weights, tests, a)
        if truth is None or truth.numbers is not False or (truth.nan and a.scalar(node.inputs[1]) != 0):
            continue
        inside = {*tests, node}
        outputs = [value for test in tests for value in test.outputs]
        if all(user in inside for value in (weights, *outputs) for user in live_users(value)):
            if not any(value.is_graph_output() for value in outputs):
                return Guard(node, tuple(tests), truth.nan)
    return None


def _truth(value: ir.Value, weights: ir.Value, tests: dict[ir.Node, None], a: Analysis) -> Truth | None:
    """What `value` says of the weights; None where it depends on anything else. Notes the nodes on the way."""
    node = producer(value)
    if node is None or len(tests) > 16:
        return None
    tests[node] = None
    name = op(node)
    if name in ("IsNaN", "IsInf"):
        return Truth(False, name == "IsNaN") if _is_copy(node.inputs[0], weights, tests) else None
    if name == "Equal" and node.inputs[0] is weights and node.inputs[1] is weights:
        return Truth(True, False)
    if name in COMPARISONS:
        bound = a.scalar(node.inputs[1])
        known = bound is not None and _is_copy(node.inputs[0], weights, tests)
        return Truth(_compared(name, bound), False) if known else None
    if name not in ("Cast", "Identity", "Not", "And", "Or"):
        return None
    parts = [_truth(x, weights, tests, a) for x in node.inputs]
    return None if None in parts else _combined(name, parts)


def _combined(name: str, parts: list[Truth]) -> Truth:
    numbers, nan = [p.numbers for p in parts], [p.nan for p in parts]
    if name == "Not":
        return Truth(None if numbers[0] is None else not numbers[0], not nan[0])
    decides = name == "Or"  # one such part is enough
    both = decides if decides in numbers else None if None in numbers else not decides
    return Truth(both, any(nan) if decides else all(nan))


def _compared(name: str, bound: float) -> bool | None:
    larger, equal = COMPARISONS[name]
    if bound < 0 or (bound == 0 and larger == equal):
        return larger
    if bound > 1 or (bound == 1 and larger != equal):
        return not larger
    return None


def _is_copy(value: ir.Value, weights: ir.Value, tests: dict[ir.Node, None]) -> bool:
    """Is it the weights, perhaps in another float type?"""
    while value is not weights and op(producer(value)) in ("Cast", "Identity"):
        node = producer(value)
        tests[node] = None
        value = node.inputs[0]
    return value is weights
