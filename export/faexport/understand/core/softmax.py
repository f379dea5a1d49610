# SPDX-License-Identifier: Apache-2.0
"""Finds softmaxes: a Softmax node, or one written by hand as exp and sum, whose division may stand behind the product
with the values. Called by match/softmax_core.py.

What looks like a softmax and isn't the one of attention is found too, with the sentence that says why.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import attribute, data_users, given, op, operand, producer
from faexport.spec import RefusalKind
from faexport.understand.core.one_more import Logit, one_more_of
from faexport.understand.core.reductions import SUMS, Reduction, reduction_of, subtracts_own_maximum
from faexport.understand.layout.products import PRODUCT_OPS
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.rules import reduced_axes, resolve_axis

FLATTENED = "this Softmax normalises over axes {first} to {last} together (opset {opset}), not over the keys alone"
ALTERED = "the sum of the exponentials is changed ({op}) before they are divided by it"
ALTERED_EACH = "the exponentials are changed ({op}) before they are summed"
CHANGING = ("Cast", "Identity", "Mul", "Add", "Where", "Max", "Clip", "Unsqueeze", "Reshape", "Dropout")
MAX_CHANGES = 4
RENORMALIZED = (
    "weights are set to 0 behind the softmax and divided by what is left of them: nothing is left where a hidden score "
    "is far above the others; a mask that meets the scores in front of the softmax is fused"
)
UNKNOWN_RANK = "the shape of the scores is not known, since that of '{}' isn't: not even how many axes it has"
NOT_DIVIDED = "the exponentials are not divided by their sum in a way that is understood"


@dataclasses.dataclass(frozen=True)
class Hiding:
    """Exponentials are kept or become 0 in front of their sum: as if their scores were minus infinity."""

    value: ir.Value  # bool, or to be proven to hold 0 and 1 only
    node: ir.Node  # Mul or Where
    keep_when: bool = True


@dataclasses.dataclass(frozen=True)
class Softmax:
    node: ir.Node  # the one that yields the probabilities
    scores: ir.Value
    axis: int  # not negative
    probabilities: ir.Value  # with `total`, the exponentials
    inner: tuple[ir.Node, ...]  # all nodes that belong to it
    total: ir.Value | None = None  # the sums that the product with the values is yet to be divided by
    flaw: str = ""  # why this can't be the softmax of attention
    flaw_kind: RefusalKind = RefusalKind.NO_ATTENTION
    hiding: Hiding | None = None  # what the exponentials are multiplied by before they are summed
    logit: Logit | None = None  # one more exponential in the sum
    divisor: ir.Value | None = None  # the sum, where it is written out: it may overflow, or be 0


def softmax_of(node: ir.Node, a: Analysis) -> Softmax | None:
    """`node` as the end of a softmax over one axis, or None."""
    name = op(node)
    if name == "Softmax":
        return None if _is_inside_another(node, a) else _softmax_node(node, a)
    if name == "Exp":
        return _exponential(node, a)
    if name == "Div":
        return _renormalized(node, a) or _written_out(node, given(node, 0), given(node, 1), (), a)
    if name == "Mul":
        for exp, inverse in (node.inputs, node.inputs[::-1]):
            divisor, maker = divisor_of(inverse, a), producer(inverse)
            if exp is None or divisor is None or maker is None:
                continue
            found = _written_out(node, exp, divisor, (maker,), a)
            if found is not None:
                return found
    return None


def divisor_of(value: ir.Value | None, a: Analysis) -> ir.Value | None:
    """x, where the value is 1 / x."""
    node = producer(value)
    if node is None:
        return None
    if op(node) == "Reciprocal":
        return node.inputs[0]
    return node.inputs[1] if op(node) == "Div" and a.scalar(node.inputs[0]) == 1 else None


def _softmax_node(node: ir.Node, a: Analysis) -> Softmax:
    scores = given(node, 0)
    shape = a.shape(scores)
    axis = attribute(node, "axis", -1 if a.opset >= 13 else 1)
    flaw, kind = "", RefusalKind.NO_ATTENTION
    if shape is None:
        axis, flaw, kind = 0, UNKNOWN_RANK.format(_first_unknown(scores, a)), RefusalKind.UNKNOWN_SIZES
    else:
        last = len(shape) - 1
        axis = resolve_axis(axis, len(shape))
        if a.opset < 13 and any(d != 1 for d in shape[axis:last]):
            flaw = FLATTENED.format(first=axis, last=last, opset=a.opset)
        if a.opset < 13:
            axis = last
    return Softmax(node, scores, axis, node.outputs[0], (node,), flaw=flaw, flaw_kind=kind)


def _first_unknown(value: ir.Value, a: Analysis) -> str:
    """The first tensor in front of this one of whose shape nothing is known, and nothing in front of it lacks one."""
    while (node := producer(value)) is not None:
        before = next((v for v in node.inputs if v is not None and a.shape(v) is None), None)
        if before is None:
            break
        value = before
    return value.name or "?"


def _exponential(node: ir.Node, a: Analysis) -> Softmax | None:
    before = producer(node.inputs[0])
    if before is not None and op(before) == "LogSoftmax":
        inner = _softmax_node(before, a)
        return dataclasses.replace(inner, node=node, probabilities=node.outputs[0], inner=(before, node))
    return _by_log_sum(node, before, a) or _divided_late(node, a)


def _written_out(
    node: ir.Node, exp_value: ir.Value, total_value: ir.Value, more: tuple[ir.Node, ...], a: Analysis
) -> Softmax | None:
    """exp(x) / sum(exp(x))."""
    exp, hiding = _exponentials(exp_value, a)
    if exp is None:
        return _changed(node, exp_value, total_value, a)
    total, changes = _sum_of(total_value, a)
    if total is None or total.source is not exp_value or len(total.axes) != 1:
        return _with_one_more(node, exp_value, total_value, more, a) or _changed(node, exp_value, total_value, a)
    inner = (exp, *_of(hiding), *total.nodes, *changes, *more, node)
    axis, weights = total.axes[0], node.outputs[0]
    found = Softmax(node, given(exp, 0), axis, weights, inner, hiding=hiding, divisor=total_value)
    if not changes or (hiding is None and _is_harmless(changes, exp, total, a)):
        return found
    with_logit = _with_one_more(node, exp_value, total_value, more, a)
    return with_logit or dataclasses.replace(found, flaw=ALTERED.format(op=op(changes[-1])))


def _with_one_more(
    node: ir.Node, exp_value: ir.Value, total_value: ir.Value, more: tuple[ir.Node, ...], a: Analysis
) -> Softmax | None:
    """exp(x) / (sum(exp(x)) + one more exponential)."""
    exp, hiding = _exponentials(exp_value, a)
    found = None if exp is None else one_more_of(exp, exp_value, total_value, a)
    if exp is None or found is None:
        return None
    inner = (exp, *_of(hiding), *found.nodes, *more, node)
    made = Softmax(node, found.scores, found.axis, node.outputs[0], inner, hiding=hiding, divisor=total_value)
    return dataclasses.replace(made, logit=found.logit)


def _of(hiding: Hiding | None) -> tuple[ir.Node, ...]:
    return () if hiding is None else (hiding.node,)


def _exponentials(value: ir.Value, a: Analysis, kind: str = "Exp") -> tuple[ir.Node | None, Hiding | None]:
    """The Exp whose output this is, and what keeps or hides each of its elements."""
    node = producer(value)
    if node is None or op(node) == kind:
        return node, None
    if op(node) == "Mul":
        ways = [(0, 1, True), (1, 0, True)]
    elif op(node) == "Where" and any(a.scalar(v) == 0 for v in node.inputs[1:]):
        ways = [(1, 0, True)] if a.scalar(node.inputs[2]) == 0 else [(2, 0, False)]
    else:
        return None, None
    for kept, by, keep_when in ways:
        exp = producer(node.inputs[kept])
        if exp is not None and op(exp) == kind and a.shape(node.outputs[0]) == a.shape(exp.outputs[0]):
            return exp, Hiding(given(node, by), node, keep_when)
    return None, None


def _renormalized(node: ir.Node, a: Analysis) -> Softmax | None:
    """Weights that a mask sets to 0 in part, divided by what is left of them, as jax2onnx writes windows. With large
    scores that is another softmax than that of the scores that are left."""
    softmax, hiding = _exponentials(given(node, 0), a, "Softmax")
    divisor = given(node, 1)
    chosen = producer(divisor)
    total = reduction_of(given(chosen, 1) if chosen is not None and op(chosen) == "Where" else divisor, a)
    if softmax is None or hiding is None or total is None or total.name not in SUMS:
        return None
    if total.source is not given(node, 0):
        return None
    inner, axis = (softmax, hiding.node, *total.nodes, node), (a.rank(node.outputs[0]) or 1) - 1
    return Softmax(
        node, given(softmax, 0), axis, node.outputs[0], inner, flaw=RENORMALIZED, flaw_kind=RefusalKind.OTHER
    )


def _is_inside_another(softmax: ir.Node, a: Analysis) -> bool:
    """Is it the first part of what _renormalized reads?"""
    hidden = [user for user in data_users(softmax.outputs[0]) if op(user) in ("Mul", "Where")]
    ends = (user for hide in hidden for user in data_users(hide.outputs[0]) if op(user) == "Div")
    return any(found is not None and softmax in found.inner for found in (_renormalized(end, a) for end in ends))


def _changed(node: ir.Node, exp_value: ir.Value, total_value: ir.Value, a: Analysis) -> Softmax | None:
    """Exponentials that are divided by a sum of theirs, where one or the other is changed before."""
    exp, above = _behind(exp_value, ("Exp",))
    total, below = _behind(total_value, SUMS)
    if exp is None or total is None or _behind(total.inputs[0], ("Exp",))[0] is not exp:
        return None
    other = next((n for n in (*above, *below) if op(n) not in ("Cast", "Identity")), None)
    flaw = (
        NOT_DIVIDED if other is None else f"the exponentials or their sum are changed ({op(other)}) before the division"
    )
    axis = (a.rank(exp.outputs[0]) or 1) - 1
    return Softmax(node, given(exp, 0), axis, node.outputs[0], (exp, *above, total, *below, node), flaw=flaw)


def _behind(value: ir.Value | None, wanted: tuple[str, ...]) -> tuple[ir.Node | None, list[ir.Node]]:
    """The nearest node of one of these kinds that the value is made of, element by element, and the nodes between."""
    node = producer(value)
    nodes: list[ir.Node] = []
    while node is not None and op(node) not in wanted and len(nodes) < MAX_CHANGES:
        if op(node) not in CHANGING:
            return None, []
        nodes.append(node)
        makers = [maker for v in node.inputs if (maker := producer(v)) is not None]
        node = next((n for n in makers if op(n) in wanted), None) or next(
            (n for n in makers if op(n) in CHANGING), None
        )
    return (node, nodes) if node is not None and op(node) in wanted else (None, [])


def _divided_late(exp: ir.Node, a: Analysis) -> Softmax | None:
    """exp(x), whose sums divide what is made of it."""
    users, value, hiding = data_users(exp.outputs[0]), exp.outputs[0], None
    if len(users) == 1 and op(users[0]) in CHANGING:
        later = data_users(users[0].outputs[0])
        if any(op(u) in SUMS for u in later) and any(op(u) in PRODUCT_OPS for u in later):
            value = users[0].outputs[0]
            hiding = _exponentials(value, a)[1]
            if hiding is None:
                flaw, axis = ALTERED_EACH.format(op=op(users[0])), (a.rank(exp.outputs[0]) or 1) - 1
                return Softmax(exp, given(exp, 0), axis, value, (exp, users[0]), flaw=flaw)
            users = later
    sums = [u for u in users if op(u) in SUMS]
    if not sums or all(op(u) in (*SUMS, "Div", "Mul") for u in users):  # divided in front of the product
        return None
    rank, inner = a.rank(value), (exp, *_of(hiding), *sums)
    axes = None if rank is None else reduced_axes(sums[0], a, rank)
    if len(sums) > 1 or axes is None or len(axes) != 1:
        return Softmax(exp, given(exp, 0), (rank or 1) - 1, value, inner, flaw=NOT_DIVIDED)
    total = sums[0].outputs[0]
    added = data_users(total)
    more = one_more_of(exp, value, added[0].outputs[0], a) if len(added) == 1 else None
    if more is not None:
        total, nodes = added[0].outputs[0], (exp, *_of(hiding), *more.nodes)
        found = Softmax(exp, more.scores, more.axis, value, nodes, total, hiding=hiding, divisor=total)
        return dataclasses.replace(found, logit=more.logit)
    return Softmax(exp, given(exp, 0), axes[0], value, inner, total, hiding=hiding, divisor=total)


def _sum_of(value: ir.Value, a: Analysis) -> tuple[Reduction | None, tuple[ir.Node, ...]]:
    """The value as sums, and the nodes that then change them."""
    changes: list[ir.Node] = []
    while len(changes) < 3:
        found = reduction_of(value, a)
        if found is not None and found.name in SUMS:
            return found, tuple(changes[::-1])
        node = producer(value)
        if node is None or op(node) not in ("Add", "Max", "Clip"):
            return None, ()
        changes.append(node)
        others = [v for v in node.inputs if v is not None and a.constant(v) is None]
        if len(others) != 1:
            return None, ()
        value = others[0]
    return None, ()


def _is_harmless(changes: tuple[ir.Node, ...], exp: ir.Node, total: Reduction, a: Analysis) -> bool:
    """Do the changes leave a sum of at least 1 as it is? It is that where the row's own maximum was subtracted before:
    beside one of more rows its exponentials may be as small as the changes."""
    before, dtype = producer(exp.inputs[0]), a.dtype(exp.outputs[0])
    maximum = None if before is None else subtracts_own_maximum(before, total.axes[0], a)
    if dtype is None or maximum is None or maximum.axes != total.axes:
        return False
    return all(_keeps(node, dtype, a) for node in changes)


def _keeps(node: ir.Node, dtype: ir.DataType, a: Analysis) -> bool:
    constants = [v for v in node.inputs if v is not None and a.constant(v) is not None]
    numbers = [number for v in constants if (number := a.scalar(v)) is not None]
    if len(numbers) != len(constants) or not numbers:
        return False
    if op(node) == "Add":  # less than half of the distance between 1 and the next number is rounded away
        return 0 <= numbers[0] < _epsilon(dtype) / 2
    return len(numbers) == 1 and numbers[0] <= 1 and (op(node) == "Max" or operand(node, 2) is None)


def _epsilon(dtype: ir.DataType) -> float:
    """The distance from 1 to the next number of a float type."""
    return {ir.DataType.BFLOAT16: 2.0**-7}.get(dtype) or float(np.finfo(dtype.numpy()).eps)


def _by_log_sum(exp: ir.Node, difference: ir.Node | None, a: Analysis) -> Softmax | None:
    """exp(x - log(sum(exp(x))))."""
    if difference is None or op(difference) != "Sub":
        return None
    source = given(difference, 0)
    total = reduction_of(difference.inputs[1], a)
    if total is None or len(total.axes) != 1:
        return None
    nodes = total.nodes
    if total.name != "ReduceLogSumExp":
        inner = producer(total.source)
        if inner is None or total.name not in ("ReduceLogSum", "log of ReduceSum") or op(inner) != "Exp":
            return None
        nodes = (inner, *nodes)
        if inner.inputs[0] is not source:
            return None
    elif total.source is not source:
        return None
    return Softmax(exp, source, total.axes[0], exp.outputs[0], (difference, *nodes, exp))
