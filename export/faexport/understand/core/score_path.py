# SPDX-License-Identifier: Apache-2.0
"""The way from a softmax up to the product of queries and keys: what each node on it may do to the scores.

Adds and Wheres fork the search. Whether all of that is attention, score_chain.py says, which replays it. Called by
match/softmax_core.py. The graph is not changed.
"""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from faexport.graph.nodes import FLOATS, attribute, given, op, producer
from faexport.spec import RefusalKind
from faexport.understand.core.choices import added_where_chosen
from faexport.understand.core.clamps import clamped_input
from faexport.understand.core.fills import padded_column
from faexport.understand.core.reductions import subtracts_own_maximum
from faexport.understand.core.regions import added_in_part
from faexport.understand.core.rounding import rounding_at, why_quantized, why_quantized_product
from faexport.understand.core.softmax import Softmax
from faexport.understand.core.writes import Writes
from faexport.understand.layout import view_ops
from faexport.understand.layout.products import PRODUCT_OPS, QUANTIZED, Product, product_of
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.einsum import einsum_equation
from faexport.understand.shapes.rules import resolve_axis

MAX_PATH = 40  # nodes between product and softmax
BY_WEIGHTS = "its input is a projection by weights, not a product of queries and keys"
RESHAPES = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten")
UNCHANGED = ("pass", "max", "rounding")  # kinds of steps that are no part of what the operator computes


@dataclasses.dataclass(frozen=True)
class Step:
    """One node on the way, what it does to the scores, and which input the scores come in by."""

    node: ir.Node
    kind: str  # pass, scale, factor, tanh, add, sub, from (what is subtracted from), where, clamp, min, max, sink,
    # view, rounding (DequantizeLinear: the numbers in front of its QuantizeLinear, rounded)
    index: int = 0
    factor: float = 1.0  # scale, from: what it multiplies by
    also: tuple[ir.Node, ...] = ()  # nodes beside the path that belong to it


@dataclasses.dataclass
class Path:
    product: Product
    steps: list[Step]  # from the product to the softmax
    together: int = 0  # steps whose scores have two labels of the product in one axis (rows_of_heads.py)


@dataclasses.dataclass
class Blocked:
    """The search ended at a node that attention doesn't have."""

    node: ir.Node | None
    why: str
    kind: RefusalKind = RefusalKind.OTHER
    consent_may_help: bool = False  # rounding.CONSENT


def find_scores(softmax: Softmax, a: Analysis, writes: Writes) -> Path | Blocked:
    """The path from a product of two computed tensors to the softmax, or from one of a computed tensor and a constant,
    as learnt queries are."""
    found = _Search(softmax.axis, a, writes, weights=False).path(softmax.scores)
    if isinstance(found, Blocked):
        by_weights = _Search(softmax.axis, a, writes, weights=True).path(softmax.scores)
        return by_weights if isinstance(by_weights, Path) else found
    return found


@dataclasses.dataclass
class _Search:
    axis: int  # that the softmax normalises over
    a: Analysis
    writes: Writes
    weights: bool  # one of what is multiplied may be a constant
    dead: set[ir.Value] = dataclasses.field(default_factory=set)  # behind no such product

    def path(self, value: ir.Value, depth: int = 0) -> Path | Blocked:
        node, a = producer(value), self.a
        if depth > MAX_PATH:
            return Blocked(node, f"no product of queries and keys stands within {MAX_PATH} nodes in front of it")
        if node is None or value in self.dead:
            return Blocked(node, "its input is no product of queries and keys")
        if op(node) in PRODUCT_OPS:
            product = product_of(node, a)
            if product is None:
                if op(node) == "Einsum" and (equation := einsum_equation(node, a)) is not None:
                    return Blocked(node, f"an Einsum of this form ({equation}) is no product of queries and keys")
                return Blocked(node, "the shapes of the score product are not known", RefusalKind.UNKNOWN_SIZES)
            static = a.is_static(product.left.value), a.is_static(product.right.value)
            if all(static) or (any(static) and not self.weights):
                return Blocked(node, BY_WEIGHTS)
            return Path(product, [])
        likely: Blocked | None = None
        for step in self._steps(node):
            found = self.path(given(step.node, step.index), depth + 1)
            if isinstance(found, Path):
                found.steps.append(step)
                return found
            likely = likely or (found if found.node is not None else None)
        self.dead.add(value)
        return likely or self._blocked(node)

    def _blocked(self, node: ir.Node) -> Blocked:
        name = op(node)
        if name.endswith(("QuantizeLinear", "DequantizeLinear")):
            why, may_help = why_quantized(node)
            return Blocked(node, why, RefusalKind.QUANTIZED, may_help)
        if name in QUANTIZED and not all(self.a.is_static(node.inputs[i]) for i in QUANTIZED[name]):
            why, may_help = why_quantized_product(node)
            return Blocked(node, why, RefusalKind.QUANTIZED, may_help)
        if name == "ScatterND":
            return Blocked(node, "elements of the scores are written anew (ScatterND), which attention doesn't have")
        return Blocked(node, f"the scores pass through {name}, which attention doesn't have")

    def _steps(self, node: ir.Node) -> list[Step]:
        """What `node` may do to scores that come in by one of its inputs."""
        name, a = op(node), self.a
        if name == "Identity" or (name == "Dropout" and not view_ops.is_training(node, a)):
            return [Step(node, "pass")]
        if name == "ScatterND":
            if self.writes.writes_everything(node):
                return [Step(node, "pass", 2)]
            part = added_in_part(node, self.writes, a)
            return [] if part is None else [Step(part[0], "add", also=part[1])]
        if name == "Cast":
            return [Step(node, "pass")] if ir.DataType(attribute(node, "to")) in FLOATS else []
        if name in (*RESHAPES, "Expand"):
            return [Step(node, "view")]
        if rounding := rounding_at(node, a):
            return [Step(node, "rounding" if node is rounding.dequantize else "pass")]
        if name == "Tanh":
            return [Step(node, "tanh")]
        if name == "Neg":
            return [Step(node, "scale", factor=-1.0)]
        if name == "Add":
            choice = added_where_chosen(node, a)
            if choice is not None:
                return [Step(choice[0], op(choice[0]).lower(), also=choice[1])]
            return [Step(node, "add", i) for i in _by_promise(node, a)]
        if name == "Sub":
            maximum = subtracts_own_maximum(node, self.axis, a)
            if maximum:
                return [Step(node, "max", 0, also=maximum.nodes)]
            return [Step(node, "sub" if i == 0 else "from", i, -1.0 if i else 1.0) for i in _by_promise(node, a)]
        if name in ("Mul", "Div"):
            return _scale_steps(node, a)
        if name == "Where":
            return [Step(node, "where", i) for i in (2, 1) if a.scalar(node.inputs[i]) is None]
        if name == "Min" and len(node.inputs) == 2:
            return [Step(node, "min", i) for i in _by_promise(node, a)]
        if name in ("Max", "Clip"):
            index = clamped_input(node, a)
            return [] if index is None else [Step(node, "clamp", index)]
        return self._sink_steps(node)

    def _sink_steps(self, node: ir.Node) -> list[Step]:
        name, a = op(node), self.a
        if (
            name == "Concat"
            and len(node.inputs) == 2
            and resolve_axis(attribute(node, "axis"), a.rank(node.outputs[0]) or 0) == self.axis
        ):
            return [Step(node, "sink", 0), Step(node, "sink", 1)]
        return [Step(node, "sink")] if name == "Pad" and padded_column(node, self.axis, a) else []


def _by_promise(node: ir.Node, a: Analysis) -> list[int]:
    """The inputs of an Add, Sub or Min, those first that look less like a bias."""
    order = [i for i in (0, 1) if not a.is_static(node.inputs[i])]
    return sorted(order, key=lambda i: op(producer(node.inputs[i])) not in (*PRODUCT_OPS, "Mul", "Div"))


def _scale_steps(node: ir.Node, a: Analysis) -> list[Step]:
    for index in (0, 1) if op(node) == "Mul" else (0,):
        factor = a.scalar(node.inputs[1 - index])
        if factor is not None and factor != 0 and math.isfinite(factor):
            return [Step(node, "scale", index, factor if op(node) == "Mul" else 1.0 / factor)]
    if op(node) == "Div":
        return [Step(node, "factor")]
    return [Step(node, "factor", i) for i in _by_size(node, a)]


def _by_size(node: ir.Node, a: Analysis) -> list[int]:
    """The inputs of a Mul that may be the scores, those first that have the size of the result."""
    whole = a.shape(node.outputs[0])
    order = [i for i in (0, 1) if not a.is_static(node.inputs[i])]
    return sorted(order, key=lambda i: a.shape(node.inputs[i]) != whole)
