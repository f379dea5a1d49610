# SPDX-License-Identifier: Apache-2.0
"""From the product of queries and keys down to a softmax: scale, softcap, masks and biases, casts, sinks, changes of
shape.

`read_scores` replays the path that score_path.py found, with labelled axes. Called by match/softmax_core.py. The graph
is not changed.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Sequence

import onnx_ir as ir

from faexport.graph.nodes import given, name_of, op
from faexport.sizes.dims import Dim
from faexport.spec import MaskTerm, Refusal, RefusalKind, TermKind
from faexport.understand.core.factors import Weight, fits, is_gate, weighed
from faexport.understand.core.fills import is_nothing, padded_column
from faexport.understand.core.score_path import UNCHANGED, Path, Step
from faexport.understand.core.softmax import Softmax
from faexport.understand.core.split_bias import SplitBias
from faexport.understand.core.widening import Order, Widen, as_view, followed, widened
from faexport.understand.layout import view_ops
from faexport.understand.layout.heads import is_lossless
from faexport.understand.layout.products import Factor, Product
from faexport.understand.layout.shape_uses import ShapeUse, uses_of
from faexport.understand.layout.views import Axis, View, merged
from faexport.understand.shapes.analysis import Analysis


@dataclasses.dataclass
class Scores:
    """What `read_scores` learnt: softmax(softcap(scale * product) with terms) over the columns of `product`."""

    product: Product  # left rows are queries, right columns are keys
    shape: tuple[Dim, ...]  # of the product's result, as it was known when it was read, or widened
    wider: tuple[Factor, ...]  # what it was widened by: labels are the product's
    view: View  # of the softmax's input over the axes of the product's result; the sink column is left out
    scale: float
    softcap: float
    terms: list[MaskTerm]
    sink: ir.Value | None
    sink_axes: tuple[str, ...]  # letters of the axes that the sink column was concatenated along
    sink_first: bool  # is the column in front of the scores, not behind?
    nodes: list[ir.Node]
    shape_uses: list[ShapeUse]  # Shape nodes that read the scores
    query_weights: list[Weight]  # what the queries are to be multiplied by; axes as those of `product`
    key_weights: list[Weight]  # likewise the keys
    splits: list[Dim]  # sizes of axis 1 of 4-D forms met on the way: the number of heads where the product is 3-D


class _Reader:
    """Replays a Path forward."""

    def __init__(self, path: Path, softmax: Softmax, gates: bool, widen: Widen, a: Analysis):
        self.a, self.path, self.softmax, self.gates = a, path, softmax, gates
        self.factors = _later_factors(path.steps)
        shape, self.wider = widened(path.product, path.steps, widen, a)
        self.shape = shape
        self.view = View.whole(shape)
        self.order: Order | None = tuple(range(len(shape)))  # of the axes, while nothing wider has met the scores
        self.names = letters(path.product)
        self.terms: list[MaskTerm] = []
        self.nodes: list[ir.Node] = [path.product.node]
        self.splits: list[Dim] = []
        self.sink: ir.Value | None = None
        self.sink_axes: tuple[str, ...] = ()
        self.sink_first = False
        self.scale, self.softcap = path.product.scale, 0.0
        self.partial = path.product.scale  # of all numbers that the scores were multiplied by
        self.query_weights: list[Weight] = []
        self.key_weights: list[Weight] = []
        self.maximum: ir.Node | None = None  # that was subtracted from a whole row
        self.split: SplitBias | None = None  # biases added while rows or columns are split
        self.together = tuple(a.known_shape(path.product.node.outputs[0])) if path.product.shape else shape
        self.shape_uses = self._told_by(path.product.node.outputs[0], self.together)

    def run(self) -> Refusal | None:
        for count, (step, factor) in enumerate(zip(self.path.steps, self.factors, strict=True)):
            self.nodes += [step.node, *step.also]
            apart = count >= self.path.together
            refusal = self._take(step, factor) if apart or step.kind != "pass" else None
            if refusal is not None:
                return refusal
            if apart and self.a.rank(step.node.outputs[0]) not in (len(self.view.axes), None):
                return Refusal("the scores get more axes from what meets them", name_of(step.node))
            if self.sink is None:
                self.shape_uses += self._told_by(step.node.outputs[0], self.view.shape if apart else self.together)
        return self._not_understood(self.path.steps[-1].node) if self.split else None

    def _told_by(self, value: ir.Value, sizes: tuple[Dim, ...]) -> list[ShapeUse]:
        """Shape nodes that read the value, which has these sizes; in front of what widens the scores, it has its
        own."""
        with self.a.without_learnt():  # of values in front of that, too, the wider sizes are learnt
            own = self.a.shape(value) if self.wider else None
        return uses_of(value, sizes if own is None else own)

    @staticmethod
    def _not_understood(node: ir.Node) -> Refusal:
        return Refusal("a mask or bias meets the scores in a shape that is not understood", name_of(node))

    def _take(self, step: Step, factor: float) -> Refusal | None:
        node = step.node
        if self.split and step.kind not in ("view", "add", "pass"):
            return self._not_understood(node)
        if step.kind == "view":
            return self._take_view(node)
        if step.kind in ("scale", "from"):
            return self._take_scale(step, factor)
        if step.kind == "factor":
            return self._take_factor(step)
        elif step.kind == "tanh":
            return self._take_tanh(step, factor)
        elif step.kind == "sink":
            if self.maximum:
                return self._from_maximum(self.maximum)
            self.sink_axes, padded = self._axes() or (), padded_column(node, len(self.view.axes) - 1, self.a)
            self.sink, self.sink_first = padded or (node.inputs[1 - step.index], step.index == 1)
            if (sizes := self.a.shape(self.sink)) and sizes[-1].const not in (None, 1):
                return Refusal("the scores are put beside others (Concat), which attention doesn't have", name_of(node))
            if self.path.steps[-1] is not step and any(s.kind not in UNCHANGED for s in self._after(step)):
                return Refusal("the scores are changed after the attention sink was put beside them", name_of(node))
        elif step.kind not in UNCHANGED:
            return self._take_term(step, factor)
        else:
            self.maximum = node if step.kind == "max" else self.maximum
            if self.maximum and self.softmax.logit:
                return self._from_maximum(self.maximum)
            self.a.learn(node.outputs[0], self.view.shape)
        return None

    def _take_view(self, node: ir.Node) -> Refusal | None:
        view = view_ops.apply(node.outputs[0], self.view, self.a)
        plain = self.path.product.shape_of(self.a)
        if self.wider and plain is not None and self.order is not None and not self.terms and not self.query_weights:
            self.order = followed(node, self.order, plain, self.a)
            view = view if view is not None or self.order is None else as_view(self.order, self.shape)
        if view is None or (op(node) == "Expand" and view != self.view):
            return self._lost(node)
        before, self.view = self.view, view
        if len(view.axes) == 4:
            self.splits.append(view.shape[1])
        if self.split is not None:
            if not self.split.follow(node, before.shape, view.shape):
                return self._not_understood(node)
            axes = self._axes()
            if axes is not None:
                dims = tuple(view.shape)
                self.terms.append(
                    MaskTerm(TermKind.ADD, self.split.sum, node, "".join(axes), dims, factor=self.split.factor)
                )
                self.split = None
        return None

    def _lost(self, node: ir.Node) -> Refusal:
        """Where the scores' shape is not followed any further."""
        added = next((t for t in reversed(self.terms) if not self._is_known(t.value)), None)
        if added is None:
            return Refusal("the scores change their shape in a way that is not understood", name_of(node))
        why = (
            "the scores may take the size of what is added to them, which the file doesn't tell, and change their shape"
        )
        return Refusal(f"{why} behind it", name_of(added.node), RefusalKind.UNKNOWN_SIZES)

    def _is_known(self, value: ir.Value) -> bool:
        return all(size.is_known for size in self.a.shape(value) or ())

    def _take_scale(self, step: Step, factor: float) -> Refusal | None:
        """A number that the scores are multiplied by; with `from`, -1, since something is added to what is left."""
        if not self.softcap:
            self.scale *= step.factor
        self.partial *= step.factor
        if not is_lossless(self.partial, self.a.dtype(step.node.outputs[0])):
            why = f"on the way to the softmax the scores are multiplied by {self.partial:g}, and may leave their type"
            return Refusal(why, name_of(step.node))
        return self._take_term(step, factor) if step.kind == "from" else None

    def _after(self, step: Step) -> list[Step]:
        return self.path.steps[[each.node for each in self.path.steps].index(step.node) + 1 :]

    def _scales_after(self, step: Step) -> list[float]:
        return [later.factor for later in self._after(step) if later.kind in ("scale", "from")]

    def _take_factor(self, step: Step) -> Refusal | None:
        """A factor without constants: multiplied to the queries or the keys, or a gate that a mask is made of."""
        weight = Weight(given(step.node, 1 - step.index), op(step.node), step.node)
        name, sizes = name_of(step.node), self.a.shape(weight.value)
        if sizes is None:
            return Refusal("the scores are multiplied by a tensor of unknown shape", name, RefusalKind.FACTOR)
        if not weight.is_finite(self.a):
            why = "the scores are multiplied by infinity or NaN, or by a number above 2^64"
            return Refusal(why, name, RefusalKind.FACTOR)
        for_keys = bool(sizes) and sizes[-1] != 1 and weight.op_type == "Mul"
        if for_keys and self.gates and is_gate(weight.value, self.a):
            return self._take_term(dataclasses.replace(step, kind="gate"), self.factors[self.path.steps.index(step)])
        if not fits(weight.value, self.view.shape, self.a):
            return Refusal(
                "the scores are multiplied by a tensor that may give them another shape", name, RefusalKind.FACTOR
            )
        if self.softcap:
            return Refusal("the scores are multiplied by a tensor behind the softcap (Tanh)", name, RefusalKind.SOFTCAP)
        whole = self.view == View.whole(self.shape)
        if not weight.is_single(self.a) and not whole:
            return Refusal(
                "the scores are multiplied by a tensor in a shape that is not understood", name, RefusalKind.FACTOR
            )
        labels = self.path.product.labels
        wide = {x for x, size in zip(reversed(labels), reversed(sizes), strict=False) if size != 1}
        if {"row", "column"} <= wide:
            return Refusal("the scores are multiplied by a tensor of rows and keys", name, RefusalKind.FACTOR)
        if "column" in wide and self.maximum:
            return self._from_maximum(self.maximum)
        if "column" in wide and weight.op_type == "Div":
            return Refusal("the scores are divided by a tensor of keys, which may hold 0", name, RefusalKind.FACTOR)
        if self.terms and not self._weigh_terms(weight):
            return Refusal(
                "the scores are multiplied by a tensor after a mask was put on them", name, RefusalKind.FACTOR
            )
        (self.key_weights if "column" in wide else self.query_weights).append(weight)
        return None

    def _weigh_terms(self, weight: Weight) -> bool:
        """(scores + bias) * w is scores * w + bias * w. False where what was done to the scores is no such sum."""
        axes, dims = "".join(self._axes() or ()), tuple(self.view.shape)
        if not all((t.kind, t.axes, t.dims) == (TermKind.ADD, axes, dims) for t in self.terms):
            return False
        self.terms = [dataclasses.replace(t, value=weighed(t.value, weight, self.a)) for t in self.terms]
        return True

    @staticmethod
    def _from_maximum(maximum: ir.Node) -> Refusal:
        """A softmax doesn't notice what is subtracted from a whole row, but for what makes other numbers of it."""
        what = "of a softcap (Tanh), a factor of keys or an attention sink, which counts from it then"
        return Refusal(f"a maximum of the scores is subtracted in front {what}", name_of(maximum))

    def _take_tanh(self, step: Step, factor: float) -> Refusal | None:
        if self.maximum:
            return self._from_maximum(self.maximum)
        if self.terms or self.softcap:
            return Refusal("a mask or bias is added before the softcap (Tanh)", name_of(step.node), RefusalKind.SOFTCAP)
        if factor <= 0:
            return Refusal("the softcap (Tanh) is not multiplied back", name_of(step.node), RefusalKind.SOFTCAP)
        self.softcap = factor
        self.scale *= factor
        return None

    def _take_term(self, step: Step, factor: float) -> Refusal | None:
        axes = self._axes()
        node = step.node
        if max(map(abs, itertools.accumulate(self._scales_after(step), operator.mul)), default=1) > max(1, abs(factor)):
            why = "a number of its mask may leave its type, as its scores are multiplied and then divided again"
            return Refusal(why, name_of(node))
        if axes is None:
            return self._take_split(step, factor)
        dims = tuple(self.view.shape)
        letters = "".join(axes)
        if step.kind in ("add", "sub", "from"):
            value = given(node, 1 - step.index)
            if is_nothing(value, self.a) and fits(value, self.view.shape, self.a):
                return None
            sign = -1.0 if step.kind == "sub" else 1.0
            term = MaskTerm(TermKind.ADD, value, node, letters, dims, factor=sign * factor)
        elif step.kind == "where":
            fill = node.inputs[3 - step.index]
            kept = step.index == 1
            term = MaskTerm(TermKind.WHERE, given(node, 0), node, letters, dims, kept, fill, factor)
        elif step.kind in ("clamp", "min"):
            if factor <= 0:
                return Refusal("the scores are negated after they were clamped", name_of(node))
            kind = TermKind.CLAMP if step.kind == "clamp" else TermKind.MIN
            term = MaskTerm(kind, given(node, 1 - step.index), node, letters, dims, factor=factor)
        else:
            term = MaskTerm(TermKind.GATE, given(node, 1 - step.index), node, letters, dims, factor=factor)
        if not self._fits(term):
            return Refusal(
                "a mask or bias gives the scores more rows, heads or batch entries",
                name_of(node),
                RefusalKind.UNLIKE_SIZES,
            )
        self.terms.append(term)
        self.a.learn(node.outputs[0], self.view.shape)
        return None

    def _take_split(self, step: Step, factor: float) -> Refusal | None:
        """A bias that is added in a shape without names."""
        value = given(step.node, 1 - step.index)
        self.split = self.split or SplitBias(self.a)
        if step.kind != "add" or not self.split.add(step.node, value, factor, self.view.shape):
            return self._not_understood(step.node)
        self.a.learn(step.node.outputs[0], self.view.shape)
        return None

    def _fits(self, term: MaskTerm) -> bool:
        """Does the operand leave the shape of the scores as it is?"""
        for value in (term.value, term.fill):
            shape = self.a.shape(value) if value is not None else ()
            if shape is None:
                continue
            if len(shape) > len(self.view.axes):
                return False
            for size, scores in zip(shape[::-1], self.view.shape[::-1], strict=False):
                if size != 1 and size.const is not None and scores.const is not None and size != scores:
                    return False
        return True

    def _axes(self) -> tuple[str, ...] | None:
        return label_axes(self.view, self.names, self.shape)


def _later_factors(steps: list[Step]) -> list[float]:
    """For each step, the product of the scales that come after it and before the softmax."""
    factors, factor = [], 1.0
    for step in reversed(steps):
        factors.append(factor)
        if step.kind in ("scale", "from"):
            factor *= step.factor
    return factors[::-1]


def letters(product: Product) -> list[str]:
    """Letters of spec.MaskTerm.axes for the axes of the product's result."""
    leads = {0: "", 1: "N", 2: "BH", 3: "BKG"}.get(len(product.leads))
    if leads is None:
        leads = "".join(chr(ord("a") + i) for i in range(len(product.leads)))
    names = dict(zip(product.leads, leads, strict=True)) | {"row": "S", "column": "T"}
    return [names[label] for label in product.labels]


def label_axes(view: View, names: list[str], shape: tuple[Dim, ...]) -> tuple[str, ...] | None:
    """A letter for each axis of `view`, whose source has axes called `names`; None where an axis is a mixture without
    name.

    An axis that is part of B is called M (outer) or W (inner); part of H, K or G; H inside B is N. Which of several
    axes of size 1 is the one of the keys can't be told: none is, since what has more than 1 element there may give the
    scores more of anything else.
    """
    unused = [n for n, d in zip(names, shape, strict=True) if d == 1 and n != "T"]
    result: list[str] = []
    axes = [merged(axis) for axis in view.axes]
    for axis in axes:
        if not axis:
            result.append(unused.pop(0) if unused else "1")
            continue
        parts = [names[x.axis] if x.axis is not None else "?" for x in axis]
        whole = [x.axis is not None and x.size == shape[x.axis] for x in axis]
        if len(parts) == 1:
            result.append(parts[0] if whole[0] else {"N": "n", "B": "b", "H": "h"}.get(parts[0], "?"))
        else:
            result.append(
                "N" if parts == ["B", "H"] and all(whole) else "H" if parts == ["K", "G"] and all(whole) else "?"
            )
    return _name_parts(result, axes)


def _name_parts(letters: list[str], axes: Sequence[Axis]) -> tuple[str, ...] | None:
    pairs = {"n": ("B", "H"), "b": ("M", "W"), "h": ("K", "G")}
    for part, (outer, inner) in pairs.items():
        places = [i for i, letter in enumerate(letters) if letter == part]
        if len(places) == 2:
            if len(merged(axes[places[0]] + axes[places[1]])) > 1:  # a Transpose has exchanged them
                places.reverse()
            if len(merged(axes[places[0]] + axes[places[1]])) > 1:
                return None
            letters[places[0]], letters[places[1]] = outer, inner
    return None if any(x in "?nbh" for x in letters) else tuple(letters)


def view_of_scores(path: Path, a: Analysis) -> View | None:
    """The softmax's input as a view of the product, without the sink's column."""
    shape = path.product.shape_of(a)
    view = None if shape is None else View.whole(shape)
    for step in path.steps:
        if step.kind == "view" and view is not None:
            is_whole = a.rank(step.node.inputs[0]) in (len(view.axes), None)  # what met it may have more axes
            view = view_ops.apply(step.node.outputs[0], view, a) if is_whole else None
    return view


def read_scores(
    path: Path, softmax: Softmax, a: Analysis, gates: bool = True, widen: Widen = Widen.NOTHING
) -> Scores | Refusal:
    """Replays the path from the product to the softmax. With `gates`, scores times 0 or 1 are taken for a part of a
    mask, else for scores with a factor. `widen`: which sizes of what meets them the scores may take."""
    if path.product.shape_of(a) is None:
        return Refusal("the shape of the scores is not known", name_of(path.product.node), RefusalKind.UNKNOWN_SIZES)
    reader = _Reader(path, softmax, gates, widen, a)
    refusal = reader.run()
    if refusal is not None:
        return refusal
    return Scores(
        path.product,
        reader.shape,
        reader.wider,
        reader.view,
        reader.scale,
        reader.softcap,
        reader.terms,
        reader.sink,
        reader.sink_axes,
        reader.sink_first,
        reader.nodes,
        reader.shape_uses,
        reader.query_weights,
        reader.key_weights,
        reader.splits,
    )
