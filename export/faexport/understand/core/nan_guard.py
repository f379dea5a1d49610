# SPDX-License-Identifier: Apache-2.0
"""The guard behind a softmax: Where(condition on the weights themselves, number, weights), as for NaN and infinities.

Called by value_chain.py. A softmax yields numbers from 0 to 1, or a row of NaN. So a condition is evaluated for both:
one that is false of all numbers replaces nothing but NaN.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from faexport.graph.nodes import data_users, live_users, maker, op, producer
from faexport.understand.core.fills import fill_of
from faexport.understand.shapes.analysis import Analysis

COMPARISONS = {"Less": (False, False), "Greater": (True, False), "LessOrEqual": (False, True)}
COMPARISONS |= {"GreaterOrEqual": (True, True)}  # (is it larger that is asked for, or equal)


@dataclasses.dataclass(frozen=True)
class Truth:
    """Of a condition on the weights: for every number from 0 to 1 (None: it depends), and for NaN."""

    numbers: bool | None
    nan: bool


@dataclasses.dataclass(frozen=True)
class Guard:
    where: ir.Node  # the last one
    nodes: tuple[ir.Node, ...]  # what else belongs to it
    replaces_nan: bool


def nan_guard(weights: ir.Value, a: Analysis) -> Guard | None:
    """The guards that all uses of `weights` belong to, one behind the other. NaN may become 0; what is put in the place
    of anything else never gets there."""
    copies, current, nan = [weights], weights, False
    nodes: dict[ir.Node, None] = {}
    while (found := _next_where(current, copies, a)) is not None:
        where, tests, replaced = found
        nodes |= dict.fromkeys((*tests, where))
        nan, current = nan or replaced, where.outputs[0]
        copies.append(current)
    if current is weights:
        return None
    inner = [weights, *(value for node in nodes for value in node.outputs if value is not current)]
    if any(value.is_graph_output() for value in inner[1:]):
        return None
    users = [*data_users(weights), *(user for value in inner[1:] for user in live_users(value))]
    if any(user not in nodes for user in users):
        return None
    last = maker(current)
    return Guard(last, tuple(node for node in nodes if node is not last), nan)


def _next_where(
    current: ir.Value, copies: list[ir.Value], a: Analysis
) -> tuple[ir.Node, tuple[ir.Node, ...], bool] | None:
    """(Where, the nodes of its condition, does it replace NaN) for one that reads `current`, else None."""
    for node in live_users(current):
        if op(node) != "Where" or node.inputs[2] is not current or node.inputs[0] is current:
            continue
        tests: dict[ir.Node, None] = {}
        truth = _truth(node.inputs[0], copies, tests, a)
        if truth is not None and truth.numbers is False and (not truth.nan or _is_zero(node.inputs[1], current, a)):
            return node, tuple(tests), truth.nan
    return None


def _is_zero(value: ir.Value | None, weights: ir.Value, a: Analysis) -> bool:
    """Is it 0, as one number or as many as there are weights?"""
    shape, whole = a.shape(value), a.shape(weights)
    if value is None or shape is None or whole is None or fill_of(value, a) != 0:
        return False
    return shape == whole or (len(shape) <= len(whole) and all(size == 1 for size in shape))


def _truth(value: ir.Value | None, weights: list[ir.Value], tests: dict[ir.Node, None], a: Analysis) -> Truth | None:
    """What `value` says of the weights; None where it depends on anything else. Notes the nodes on the way."""
    node = producer(value)
    if node is None or len(tests) > 16:
        return None
    tests[node] = None
    name = op(node)
    if name in ("IsNaN", "IsInf"):
        return Truth(False, name == "IsNaN") if _is_copy(node.inputs[0], weights, tests) else None
    if name == "Equal" and node.inputs[0] is node.inputs[1] and node.inputs[0] in weights:
        return Truth(True, False)
    if name in COMPARISONS:
        bound = a.scalar(node.inputs[1])
        if bound is None or not _is_copy(node.inputs[0], weights, tests):
            return None
        return Truth(_compared(name, bound), False)
    if name not in ("Cast", "Identity", "Not", "And", "Or"):
        return None
    parts = [truth for x in node.inputs if (truth := _truth(x, weights, tests, a)) is not None]
    return _combined(name, parts) if len(parts) == len(node.inputs) else None


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


def _is_copy(value: ir.Value | None, weights: list[ir.Value], tests: dict[ir.Node, None]) -> bool:
    """Is it the weights, perhaps in another float type?"""
    while value not in weights:
        node = producer(value)
        if node is None or op(node) not in ("Cast", "Identity"):
            return False
        tests[node] = None
        value = node.inputs[0]
    return True
