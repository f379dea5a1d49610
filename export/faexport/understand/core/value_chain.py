# SPDX-License-Identifier: Apache-2.0
"""From the probabilities of a softmax down to the product with the values. Called by match/softmax_core.py.

On the way stand Casts, dropout that drops nothing, the IsNaN guard, the removal of the sink's column, and changes of
shape.
"""

from __future__ import annotations

import collections
import copy
import dataclasses

import onnx_ir as ir

from faexport.graph.nodes import FLOATS, attribute, data_users, given, maker, name_of, op, operand, producer
from faexport.sizes.dims import Dim
from faexport.spec import MaskTerm, Refusal, RefusalKind, TermKind
from faexport.understand.core.factors import Weight, division_by, fits
from faexport.understand.core.fills import is_nothing
from faexport.understand.core.nan_guard import nan_guard
from faexport.understand.core.rounding import QUANTIZING, Rounding, rounding_at
from faexport.understand.core.row_guard import row_guard
from faexport.understand.core.rows_of_heads import with_heads_apart
from faexport.understand.core.score_chain import Scores, label_axes
from faexport.understand.core.score_path import RESHAPES
from faexport.understand.core.softmax import Softmax
from faexport.understand.layout import view_ops
from faexport.understand.layout.products import PRODUCT_OPS, QUANTIZED, Product, product_of, with_row
from faexport.understand.layout.shape_uses import ShapeUse, uses_of
from faexport.understand.layout.views import View, merged, size_of
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.rules import slice_of

MAX_PATH = 24
# What may stand between a softmax and the product with the values, also where it makes the block no attention.
PASSING = frozenset(
    (*RESHAPES, "Cast", "Identity", "Dropout", "Where", "IsNaN", "Slice", "Mul", "Div", "Add", "Sub", "Max", "Min")
    + ("Clip", "Concat", "Expand", "Pad", "Gather", "ScatterND", "Split", "Tile", "Round", "Floor", "Sqrt", "Pow")
    + ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
    + tuple(f"{domain}::{kind}Linear" for domain in ("com.microsoft", "trt") for kind in ("Quantize", "Dequantize"))
    + ("trt::TRT_FP8QuantizeLinear", "trt::TRT_FP8DequantizeLinear")
    + tuple(f"com.microsoft::QLinear{name}" for name in ("Add", "Mul", "Concat", "Where"))
    + ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Erf", "Gelu", "Exp", "Log", "Neg", "Abs", "Sign", "Reciprocal", "Ceil")
)
LAYERS = ("Conv", *(f"{kind}Normalization" for kind in ("Batch", "Instance", "Group", "Layer")))
PAIRS = "the scores are a product of what has rows and keys already, and not of queries with keys"
_MOST_NODES = 4096  # that are looked at for a product


@dataclasses.dataclass
class Values:
    """Where the probabilities meet the values."""

    product: Product  # left: the probabilities, rows are queries, the sum runs over the keys
    lead_sizes: list[Dim]  # of the product's leading labels
    terms: list[MaskTerm]  # ZERO, and EMPTY_ROW once past the guard
    nan_guard: bool
    nodes: list[ir.Node]
    shape_uses: list[ShapeUse]  # Shape nodes that read the probabilities
    result: ir.Value  # the product's output, or that of the division or the guard behind it
    guard: MaskTerm | None  # EMPTY_ROW, where one stands behind `result`
    weights: list[Weight]  # what the probabilities are multiplied by, the same for all rows: so are the values then
    roundings: list[Rounding]  # of the probabilities
    axes: str  # letters of the probabilities' axes, where the product's are in the same order; else ""
    rows: tuple[OfRows, ...]  # what is done to rows of probabilities: it is done to those of the result instead

    def past_guard(self) -> Values:
        """The same with the guard taken for a part of attention."""
        assert self.guard is not None
        return dataclasses.replace(self, terms=[*self.terms, self.guard], result=self.guard.node.outputs[0], guard=None)

    def rows_apart(self, a: Analysis) -> Values | None:
        """The same with rows of probabilities that are set to 0 taken for rows of the result; None without such."""
        whole = [t for t in self.terms if t.kind is TermKind.ZERO and t.axes[-1:] == "T" and _is_of_rows(t.value, a)]
        places = [_place(term) for term in whole]
        dtypes = {a.dtype(value) for value in (self.result, *(term.node.outputs[0] for term in whole))}
        is_divided = self.result is not self.product.node.outputs[0]  # by the sum of what may be 0 then
        if not whole or None in places or len(dtypes) > 1 or is_divided or any(t.axes != self.axes for t in whole):
            return None
        with a.without_learnt():  # _zeroed() took it for granted, since the proof of a mask asks again
            if not all(fits(t.value, t.dims, a) for t in whole):
                return None
        rows = [OfRows(term.node, place) for term, place in zip(whole, places, strict=True) if place is not None]
        return dataclasses.replace(self, terms=[t for t in self.terms if t not in whole], rows=(*self.rows, *rows))


@dataclasses.dataclass(frozen=True)
class OfRows:
    """A node that does something to rows of probabilities, whatever the keys: a product with numbers of the rows, or a
    choice between them and 0."""

    node: ir.Node
    index: int  # of the input that is the probabilities


def _is_of_rows(value: ir.Value, a: Analysis) -> bool:
    """Has the tensor size 1 along the keys, its last axis?"""
    shape = a.shape(value)
    return shape is not None and (not shape or shape[-1] == 1)


def _place(zero: MaskTerm) -> int | None:
    """Which input of the node that puts 0 into probabilities they are."""
    if op(zero.node) == "Where":
        return 1 if zero.keep_when else 2
    makers = [producer(v) for v in zero.node.inputs]  # before the probabilities may stand a choice by the same mask
    mask = [i for i, m in enumerate(makers) if m is not None and op(m) == "Cast" and operand(m, 0) is zero.value]
    return 1 - mask[0] if mask else None


class _Walker:
    """What was met on the way so far. Where the probabilities are read several times, each way goes on with a copy."""

    def __init__(self, scores: Scores, softmax: Softmax, names: list[str], shape: tuple[Dim, ...], a: Analysis):
        self.a, self.scores, self.softmax, self.names, self.shape = a, scores, softmax, names, shape
        self.value = softmax.probabilities
        self.view: View = scores.view
        self.has_sink = scores.sink is not None
        self.terms: list[MaskTerm] = []
        self.weights: list[Weight] = []
        self.roundings: list[Rounding] = []
        self.rows: list[OfRows] = []
        self.nan_guard = False
        self.nodes: list[ir.Node] = []
        self.shape_uses: list[ShapeUse] = []

    def _copy(self) -> _Walker:
        other = copy.copy(self)
        for name in ("terms", "weights", "roundings", "rows", "nodes", "shape_uses"):
            setattr(other, name, list(getattr(self, name)))
        return other

    def run(self) -> list[tuple[_Walker, ir.Node]] | Refusal:
        """Walks on to the products that read the probabilities: each, and the walker that stands in front of it."""
        while len(self.nodes) <= MAX_PATH:
            users = [u for u in data_users(self.value) if u not in self.softmax.inner]
            self.shape_uses += uses_of(self.value, () if self.has_sink else self.view.shape)
            if self.value.is_graph_output():
                return Refusal(
                    "the attention weights are also an output of the model",
                    self.value.name or "",
                    RefusalKind.SCORES_READ,
                )
            guard = nan_guard(self.value, self.a) if self._is_from_0_to_1() else None
            if guard is not None:
                self.nan_guard = self.nan_guard or guard.replaces_nan
                self.nodes += guard.nodes
                self._advance(guard.where)
                continue
            if not users:
                return Refusal("nothing uses the attention weights", name_of(maker(self.value)))
            if len(users) > 1:
                return self._several(users)
            if op(users[0]) in PRODUCT_OPS:
                return [(self, users[0])]
            refusal = self._step(users[0]) or self._widened(users[0])
            if refusal is not None:
                return refusal
        why = f"more than {MAX_PATH} nodes stand between the softmax and a product with values"
        return Refusal(why, name_of(self.nodes[-1]))

    def _is_from_0_to_1(self) -> bool:
        return not self.weights and not self.rows and self.softmax.total is None

    def _several(self, users: list[ir.Node]) -> list[tuple[_Walker, ir.Node]] | Refusal:
        """The products behind all users, if each of them leads to some."""
        ends: list[tuple[_Walker, ir.Node]] = []
        for user in users:
            way = self._copy()
            found = [(way, user)] if op(user) in PRODUCT_OPS else way._step(user) or way._widened(user) or way.run()
            if isinstance(found, Refusal):
                return Refusal(
                    f"the attention weights are used twice: also by {op(user)}", name_of(user), RefusalKind.SCORES_READ
                )
            ends += found
        return ends

    def _widened(self, node: ir.Node) -> Refusal | None:
        if self.a.rank(self.value) in (len(self.view.axes), None):
            return None
        return Refusal("the attention weights get more axes from what meets them", name_of(node))

    def _advance(self, node: ir.Node) -> None:
        self.nodes.append(node)
        self.value = node.outputs[0]

    def _step(self, node: ir.Node) -> Refusal | None:
        name = op(node)
        if name == "Cast" and ir.DataType(attribute(node, "to")) not in FLOATS:
            return Refusal("the attention weights are cast to integers", name_of(node), RefusalKind.QUANTIZED)
        if name in RESHAPES:
            view = view_ops.apply(node.outputs[0], self.view, self.a) if not self.has_sink else None
            if view is None:
                return Refusal(
                    "the attention weights change their shape in a way that is not understood", name_of(node)
                )
            self.view = view
        elif name == "Slice" and self.has_sink:
            if not self._drops_sink(node):
                return Refusal(
                    "a column was put beside the scores and is not simply dropped after the softmax", name_of(node)
                )
            self.has_sink = False
        elif name == "Where":
            refusal = self._zero(node)
            if refusal is not None:
                return refusal
        elif name in ("Mul", "Div"):
            refusal = self._weigh(node)
            if refusal is not None:
                return refusal
        elif name == "Add" and self._adds_nothing(node):
            pass
        elif name == "Dropout" and view_ops.is_training(node, self.a):
            return Refusal("Dropout is in training mode", name_of(node), RefusalKind.RANDOM)
        elif name in QUANTIZING:
            rounding = rounding_at(node, self.a)
            if rounding is None:
                return Refusal(
                    "the attention weights are quantized (QuantizeLinear) inside the block",
                    name_of(node),
                    RefusalKind.QUANTIZED,
                )
            holds = rounding.holds_weights and self._is_from_0_to_1()
            self.roundings.append(dataclasses.replace(rounding, holds_weights=holds))
            self.nodes.append(node)
            self._advance(rounding.dequantize)
            return None
        elif name not in ("Cast", "Identity", "Dropout"):
            return Refusal(
                f"the attention weights pass through {name} after the softmax, which attention doesn't have",
                name_of(node),
            )
        self._advance(node)
        return None

    def _weigh(self, node: ir.Node) -> Refusal | None:
        """A factor that is the same for all rows may as well be multiplied to the values."""
        index = 0 if node.inputs[0] is self.value else 1
        weight = given(node, 1 - index)
        one_way = weight is not self.value and (op(node) == "Mul" or (index == 0 and self.a.scalar(weight)))
        whole = self.view == View.whole(self.shape) and not self.has_sink
        if not one_way or not whole or not fits(weight, self.shape, self.a) or not self._skips_rows(weight):
            cast = producer(weight)
            condition = operand(cast, 0) if cast is not None and op(cast) == "Cast" and op(node) == "Mul" else None
            if condition is not None and self.a.dtype(condition) is ir.DataType.BOOL:
                if self._zeroed(node, condition, keep_when=True):
                    return None
            if one_way and whole and fits(weight, self.shape, self.a) and self._is_of_rows(weight):
                self.rows.append(OfRows(node, index))
                return self._infinite(Weight(weight, op(node), node))
            return Refusal(
                f"the attention weights pass through {op(node)} after the softmax, and what they are multiplied by "
                "is not known to be the same for all rows, nor for all keys",
                name_of(node),
                RefusalKind.FACTOR,
            )
        self.weights.append(Weight(weight, op(node), node))
        return self._infinite(self.weights[-1])

    def _infinite(self, factor: Weight) -> Refusal | None:
        why = "the attention weights are multiplied by infinity or NaN, or by a number above 2^64"
        return None if factor.is_finite(self.a) else Refusal(why, name_of(factor.node), RefusalKind.FACTOR)

    def _skips_rows(self, weight: ir.Value) -> bool:
        """Has the factor size 1 along the rows?"""
        labels = self.scores.product.labels
        sizes = dict(zip(reversed(labels), reversed(self.a.known_shape(weight)), strict=False))
        return sizes.get("row", 1) == 1

    def _is_of_rows(self, weight: ir.Value) -> bool:
        labels = self.scores.product.labels
        return labels[-1] == "column" and self.softmax.total is None and _is_of_rows(weight, self.a)

    def _drops_sink(self, node: ir.Node) -> bool:
        with self.a.without_learnt():  # a mask of more keys than one is cut off with the sink, and nothing fails
            shape = self.a.shape(node.inputs[0])
            pieces = None if shape is None else slice_of(node, self.a, shape)
        if shape is None or pieces is None or len(pieces) != 1:
            return False
        axis, start, size, step = pieces[0]
        kept = (1 if self.scores.sink_first else 0, 1, shape[-1] - 1)
        return axis == len(shape) - 1 and (start, step, size) == kept

    def _zero(self, node: ir.Node) -> Refusal | None:
        """Where(condition, p, 0) or Where(condition, 0, p)."""
        index = 1 if node.inputs[1] is self.value else 2
        is_zero = self.a.scalar(node.inputs[3 - index]) == 0 and node.inputs[0] is not self.value
        if not is_zero or not self._zeroed(node, given(node, 0), keep_when=index == 1):
            return Refusal("the attention weights are replaced by other numbers after the softmax", name_of(node))
        return None

    def _adds_nothing(self, node: ir.Node) -> bool:
        """Is it p + 0 in the shape of p, as behind p * m + 0 * (1 - m), which tf2onnx writes for where(m, p, 0)?"""
        zero = given(node, 1 if node.inputs[0] is self.value else 0)
        if zero is self.value or not is_nothing(zero, self.a, times_finite=True):
            return False
        axes, own = label_axes(self.view, self.names, self.shape), self.a.shape(zero)
        alike = [t for t in self.terms if t.kind is TermKind.ZERO and t.axes == "".join(axes or ())]
        return own is not None and (
            any(self.a.shape(term.value) == own for term in alike) or fits(zero, self.view.shape, self.a)
        )

    def _zeroed(self, node: ir.Node, condition: ir.Value, keep_when: bool) -> bool:
        """Notes that `node` puts 0 where a condition doesn't hold; False where the weights' axes have no names."""
        axes = label_axes(self.view, self.names, self.shape)
        if axes is None:
            return False
        dims = tuple(self.view.shape)
        self.terms.append(MaskTerm(TermKind.ZERO, condition, node, "".join(axes), dims, keep_when=keep_when))
        if not self.has_sink:
            self.a.learn(node.outputs[0], self.view.shape)
        return True


def find_values(scores: Scores, softmax: Softmax, names: list[str], a: Analysis) -> list[Values] | Refusal:
    """Walks from the probabilities to their products with values, and checks for each which axis is summed."""
    ends = _Walker(scores, softmax, names, scores.shape, a).run()
    if isinstance(ends, Refusal):
        return ends
    found: list[Values] = []
    for walker, node in ends:
        values = _values(walker, node)
        if isinstance(values, Refusal):
            return values
        found.append(values)
    return found


def _values(walker: _Walker, node: ir.Node) -> Values | Refusal:
    """What the product with values at `node`, which the walker stands in front of, computes."""
    product = _product_of_weights(walker, node)
    if isinstance(product, Refusal):
        return product
    aligned = _aligned(product, walker, node)
    if isinstance(aligned, Refusal):
        return aligned
    product, axes = aligned
    a, scores, shape = walker.a, walker.scores, walker.shape
    if a.is_static(product.right.value):
        return Refusal("the attention weights are multiplied by a constant instead of values", name_of(node))
    leads = [axes.get(label, ()) for label in product.leads]
    if merged([x for axis in leads for x in axis]) != _whole_leads(scores.product, shape):
        return Refusal("batch and heads are exchanged between scores and values", name_of(node))
    sizes = [size_of(x) for x in leads]
    whole = a.shape(node.outputs[0])
    if whole is not None and len(leads) == len(scores.product.leads) and walker.view == View.whole(shape):
        sizes = [whole[product.labels.index(x)] for x in product.leads]  # the values may have more than the scores
    division = _division(product, walker)
    if isinstance(division, Refusal):
        return division
    nodes = [*walker.nodes, node, *division]
    named = label_axes(walker.view, walker.names, shape) if _is_ordered(product) else None
    if walker.rows and (named is None or walker.view != View.whole(shape)):
        why = "rows of the attention weights are multiplied by numbers, and the product with the values turns its axes"
        return Refusal(why, name_of(walker.rows[0].node), RefusalKind.FACTOR)
    if any(a.dtype(done.node.outputs[0]) != a.dtype(nodes[-1].outputs[0]) for done in walker.rows):
        why = "rows of the attention weights are multiplied by numbers in another type than the output"
        return Refusal(why, name_of(walker.rows[0].node), RefusalKind.FACTOR)
    return Values(
        product,
        sizes,
        walker.terms,
        walker.nan_guard,
        nodes,
        walker.shape_uses,
        nodes[-1].outputs[0],
        None if division or walker.rows else _guard_of(product, walker, a),
        walker.weights,
        walker.roundings,
        "".join(named or ()),
        tuple(walker.rows),
    )


def _is_ordered(product: Product) -> bool:
    """Are the axes of the probabilities and of the product those of the operator, in its order?"""
    leads = product.leads
    return product.labels == (*leads, "row", "column") and product.left.labels == (*leads, "row", "sum")


def _product_of_weights(walker: _Walker, node: ir.Node) -> Product | Refusal:
    """The product at `node`, with the attention weights on its left."""
    if walker.has_sink:
        return Refusal("the sink's column is not dropped after the softmax", name_of(node))
    product = product_of(node, walker.a)
    if product is None:
        return Refusal("the product with the values has a form or shape that is not understood", name_of(node))
    if product.scale != 1.0:
        return Refusal("the product with the values is scaled (alpha), which attention doesn't have", name_of(node))
    if product.left.value is product.right.value:
        return Refusal("the attention weights are multiplied with themselves", name_of(node))
    return product.swapped() if product.right.value is walker.value else product


def _aligned(product: Product, walker: _Walker, node: ir.Node) -> tuple[Product, dict[str, tuple]] | Refusal:
    """The product as one whose sum runs over the keys and whose rows are those of the scores, and which axes of the
    scores each label of the attention weights stands for."""
    a, scores, shape = walker.a, walker.scores.product, walker.shape
    axes = dict(zip(product.left.labels, map(merged, walker.view.axes), strict=True))
    column, row = (_atom_axis(scores, label, shape) for label in ("column", "row"))
    if axes["sum"] != column:
        if _is_of_scores(scores, a):
            return Refusal(PAIRS, name_of(scores.node), RefusalKind.MIXED)
        return _wrong_sum(scores, axes["sum"], row, shape, name_of(node))
    if axes["row"] != row and (apart := with_heads_apart(product, axes["row"], scores, shape, a)):
        product = apart
        split = [axis for x, axis in axes.items() for axis in ([(atom,) for atom in axis] if x == "row" else [axis])]
        axes = dict(zip(product.left.labels, split, strict=True))
    if axes["row"] != row:
        other = next((x for x in product.leads if axes.get(x) == row and x not in product.right.labels), None)
        if other is not None:
            product = with_row(product, other)
            axes = dict(zip(product.left.labels, map(merged, walker.view.axes), strict=True))
    if axes["row"] == row:
        return product, axes
    if _has_pairs(scores, axes["row"], shape):
        return Refusal(PAIRS, name_of(scores.node), RefusalKind.MIXED)
    return Refusal("the rows of the attention weights are not those of the scores", name_of(node))


def _division(product: Product, walker: _Walker) -> list[ir.Node] | Refusal:
    """The nodes that divide what the product gives by the sum of the exponentials, if nothing did so before it."""
    softmax = walker.softmax
    return division_by(softmax.total, softmax.axis, walker.view, product, walker.a) if softmax.total is not None else []


def _wrong_sum(product: Product, summed: tuple, row: tuple, shape: tuple[Dim, ...], node: str) -> Refusal:
    """What the product after the softmax does, which sums over other axes of the scores than the keys."""
    leads = {atom for label in product.leads for atom in _atom_axis(product, label, shape)}
    if summed and set(summed) <= leads:
        why = "the weights of different heads or batch entries are mixed after the softmax"
        return Refusal(why, node, RefusalKind.MIXED)
    over = ", but over the rows" if summed == row else ""
    why = f"the product after the softmax does not sum over the softmax's axis{over}"
    return Refusal(why, node, RefusalKind.NO_ATTENTION)


def _has_pairs(product: Product, rows: tuple, shape: tuple[Dim, ...]) -> bool:
    """Have both the keys and the rows of the weights their axes in one operand of the scores' product, as where heads
    are mixed before the softmax, and in additive attention?"""
    leads = {label for label in product.leads if _atom_axis(product, label, shape) == rows}
    return bool(leads & set(product.right.labels)) and not leads & set(product.left.labels)


def _is_of_scores(product: Product, a: Analysis) -> bool:
    """Does a layer of weights make these scores of a product of two computed tensors, as where heads are mixed before
    the softmax?"""
    by_weights = [a.is_static(factor.value) for factor in (product.left, product.right)]
    if not any(by_weights):
        return False
    node = producer((product.right if by_weights[0] else product.left).value)
    for _ in range(MAX_PATH):
        if node is None or op(node) in PRODUCT_OPS or op(node) not in (*RESHAPES, "Mul", "Div", "Add", "Cast"):
            break
        node = producer(node.inputs[0])
    made = None if node is None or op(node) not in PRODUCT_OPS else product_of(node, a)
    return made is not None and not any(a.is_static(factor.value) for factor in (made.left, made.right))


def _guard_of(product: Product, walker: _Walker, a: Analysis) -> MaskTerm | None:
    """The guard behind the product, if the product's axes are in the order of the probabilities'."""
    if not _is_ordered(product):
        return None
    axes = label_axes(walker.view, walker.names, walker.shape)
    if axes is None or axes[-1] != "T":
        return None
    return row_guard(product.node.outputs[0], "".join(axes), tuple(walker.view.shape), a)


def _whole_leads(product: Product, shape: tuple[Dim, ...]) -> tuple:
    """The leading axes of the scores, entire and in their order."""
    axes = View.whole(shape).axes
    return tuple(x for label in product.leads for x in axes[product.labels.index(label)])


def _atom_axis(product: Product, label: str, shape: tuple[Dim, ...]) -> tuple:
    position = product.labels.index(label)
    return View.whole(shape).axes[position]


def feeds_product(softmax: Softmax, a: Analysis, of_product: bool = False) -> bool:
    """Do the probabilities run into a product with a computed tensor? Then attention was probably meant. Where the
    scores are a product themselves (`of_product`), one with a constant counts as well, also behind a layer."""
    pending = collections.deque([softmax.probabilities])
    seen: set[ir.Node] = set()
    while pending and len(seen) < _MOST_NODES:
        value = pending.popleft()
        for node in data_users(value):
            if node in seen or node in softmax.inner:
                continue
            seen.add(node)
            if op(node) in (*PRODUCT_OPS, *QUANTIZED):
                multiplied = QUANTIZED.get(op(node), (0, 1))
                if of_product or not any(a.is_static(node.inputs[i]) for i in multiplied if i < len(node.inputs)):
                    return True
            elif op(node) in PASSING or (of_product and op(node) in LAYERS):
                pending += node.outputs
    return False
