# SPDX-License-Identifier: Apache-2.0
"""From the probabilities of a softmax down to the product with the values. Called by match/softmax_core.py.

On the way stand Casts, dropout that drops nothing, the IsNaN guard, the removal of the sink's column, and changes of
shape.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from faexport.nodes import FLOATS, attribute, data_users, name_of, op
from faexport.spec import MaskTerm, Refusal, TermKind
from faexport.understand.core.nan_guard import nan_guard
from faexport.understand.core.row_guard import row_guard
from faexport.understand.core.score_chain import RESHAPES, Scores, label_axes
from faexport.understand.layout import view_ops
from faexport.understand.layout.products import PRODUCT_OPS, Product, product_of, with_row
from faexport.understand.layout.shape_uses import ShapeUse, uses_of
from faexport.understand.layout.views import View, merged, size_of
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.dims import Dim, plain
from faexport.understand.shapes.rules import slice_of

MAX_PATH = 24


@dataclasses.dataclass
class Values:
    """Where the probabilities meet the values."""

    product: Product  # left: the probabilities, rows are queries, the sum runs over the keys
    lead_sizes: list[Dim]  # of the product's leading labels
    terms: list[MaskTerm]  # ZERO, and EMPTY_ROW once past the guard
    nan_guard: bool
    nodes: list[ir.Node]
    shape_uses: list[ShapeUse]  # Shape nodes that read the probabilities
    result: ir.Value  # the product's output, or that of the guard behind it
    guard: MaskTerm | None  # EMPTY_ROW, where one stands behind `result`

    def past_guard(self) -> Values:
        """The same with the guard taken for a part of attention."""
        return dataclasses.replace(self, terms=[*self.terms, self.guard], result=self.guard.node.outputs[0], guard=None)


class _Walker:
    def __init__(self, scores: Scores, value: ir.Value, names: list[str], shape, a: Analysis):
        self.a, self.scores, self.value, self.names, self.shape = a, scores, value, names, shape
        self.view: View = scores.view
        self.has_sink = scores.sink is not None
        self.terms: list[MaskTerm] = []
        self.nan_guard = False
        self.nodes: list[ir.Node] = []
        self.shape_uses: list[ShapeUse] = []

    def run(self) -> tuple[ir.Node, ir.Value] | Refusal:
        """Walks on to the product; returns it and the probabilities that it reads."""
        for _ in range(MAX_PATH):
            users = data_users(self.value)
            self.shape_uses += uses_of(self.value, () if self.has_sink else self.view.shape)
            if self.value.is_graph_output():
                return Refusal("the attention weights are also an output of the model", self.value.name or "")
            guard = nan_guard(self.value, self.a)
            if guard is not None:
                self.nan_guard = self.nan_guard or guard.replaces_nan
                self.nodes += guard.nodes
                self._advance(guard.where)
                continue
            if len(users) != 1:
                return self._several(users)
            node = users[0]
            if op(node) in PRODUCT_OPS:
                return (node, self.value)
            refusal = self._step(node)
            if refusal is not None:
                return refusal
        return Refusal("no product with values follows the softmax", name_of(self.nodes[-1]))

    def _several(self, users: list[ir.Node]) -> Refusal:
        if not users:
            return Refusal("nothing uses the attention weights", "")
        products = [u for u in users if op(u) in PRODUCT_OPS]
        other = next((u for u in users if u not in products), users[-1])
        return Refusal(f"the attention weights are used twice: also by {op(other)}", name_of(other))

    def _advance(self, node: ir.Node) -> None:
        self.nodes.append(node)
        self.value = node.outputs[0]

    def _step(self, node: ir.Node) -> Refusal | None:
        name = op(node)
        if name == "Cast" and ir.DataType(attribute(node, "to")) not in FLOATS:
            return Refusal("the attention weights are cast to integers", name_of(node))
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
        elif name == "Dropout" and view_ops.is_training(node, self.a):
            return Refusal("Dropout is in training mode", name_of(node))
        elif name in ("QuantizeLinear", "DynamicQuantizeLinear"):
            return Refusal("the attention weights are quantized (QuantizeLinear) inside the block", name_of(node))
        elif name not in ("Cast", "Identity", "Dropout"):
            return Refusal(
                f"the attention weights pass through {name} after the softmax, which attention doesn't have",
                name_of(node),
            )
        self._advance(node)
        return None

    def _drops_sink(self, node: ir.Node) -> bool:
        shape = self.a.shape(node.inputs[0])
        pieces = None if shape is None else slice_of(node, self.a, shape)
        if pieces is None or len(pieces) != 1:
            return False
        axis, start, size, step = pieces[0]
        kept = (1 if self.scores.sink_first else 0, 1, shape[-1] - 1)
        return axis == len(shape) - 1 and (start, step, size) == kept

    def _zero(self, node: ir.Node) -> Refusal | None:
        """Where(condition, p, 0) or Where(condition, 0, p)."""
        axes = label_axes(self.view, self.names, self.shape)
        index = 1 if node.inputs[1] is self.value else 2
        if axes is None or self.a.scalar(node.inputs[3 - index]) != 0 or node.inputs[0] is self.value:
            return Refusal("the attention weights are replaced by other numbers after the softmax", name_of(node))
        dims = tuple(plain(d) for d in self.view.shape)
        self.terms.append(MaskTerm(TermKind.ZERO, node.inputs[0], node, "".join(axes), dims, keep_when=index == 1))
        if not self.has_sink:
            self.a.learn(node.outputs[0], self.view.shape)
        return None


def find_values(scores: Scores, probabilities: ir.Value, names: list[str], a: Analysis) -> Values | Refusal:
    """Walks from the probabilities to their product with the values and checks which axis is summed."""
    shape = a.shape(scores.product.node.outputs[0])
    walker = _Walker(scores, probabilities, names, shape, a)
    found = walker.run()
    if isinstance(found, Refusal):
        return found
    node, value = found
    if walker.has_sink:
        return Refusal("the sink's column is not dropped after the softmax", name_of(node))
    product = product_of(node, a)
    if product is None:
        return Refusal("the product with the values has a form or shape that is not understood", name_of(node))
    if product.scale != 1.0:
        return Refusal("the product with the values is scaled (alpha), which attention doesn't have", name_of(node))
    if product.left.value is product.right.value:
        return Refusal("the attention weights are multiplied with themselves", name_of(node))
    if product.right.value is value:
        product = product.swapped()
    axes = dict(zip(product.left.labels, map(merged, walker.view.axes), strict=True))
    column, row = (_atom_axis(scores.product, label, shape) for label in ("column", "row"))
    if axes["sum"] != column:
        return Refusal("the product after the softmax does not sum over the softmax's axis", name_of(node))
    if axes["row"] != row:
        other = next((x for x in product.leads if axes.get(x) == row and x not in product.right.labels), None)
        if other is not None:
            product = with_row(product, other)
            axes = dict(zip(product.left.labels, map(merged, walker.view.axes), strict=True))
    if axes["row"] != row:
        return Refusal("the rows of the attention weights are not those of the scores", name_of(node))
    if a.is_static(product.right.value):
        return Refusal("the attention weights are multiplied by a constant instead of values", name_of(node))
    leads = [axes.get(label, ()) for label in product.leads]
    if merged([x for axis in leads for x in axis]) != _whole_leads(scores.product, shape):
        return Refusal("batch and heads are exchanged between scores and values", name_of(node))
    walker.nodes.append(node)
    return Values(
        product,
        [size_of(x) for x in leads],
        walker.terms,
        walker.nan_guard,
        walker.nodes,
        walker.shape_uses,
        node.outputs[0],
        _guard_of(product, walker, a),
    )


def _guard_of(product: Product, walker: _Walker, a: Analysis) -> MaskTerm | None:
    """The guard behind the product, if the product's axes are in the order of the probabilities'."""
    ordered = list(product.leads)
    if list(product.labels) != [*ordered, "row", "column"] or list(product.left.labels) != [*ordered, "row", "sum"]:
        return None
    axes = label_axes(walker.view, walker.names, walker.shape)
    if axes is None or axes[-1] != "T":
        return None
    return row_guard(product.node.outputs[0], "".join(axes), tuple(plain(d) for d in walker.view.shape), a)


def _whole_leads(product: Product, shape) -> tuple:
    """The leading axes of the scores, entire and in their order."""
    axes = View.whole(shape).axes
    return tuple(x for label in product.leads for x in axes[product.labels.index(label)])


def _atom_axis(product: Product, label: str, shape) -> tuple:
    position = product.labels.index(label)
    return View.whole(shape).axes[position]


def feeds_product(value: ir.Value, a: Analysis) -> bool:
    """Do the probabilities run into a product with a computed tensor? Then attention was probably meant."""
    for _ in range(MAX_PATH):
        users = data_users(value)
        node = next((u for u in users if op(u) in PRODUCT_OPS), users[0] if users else None)
        if node is None:
            return False
        if op(node) in PRODUCT_OPS:
            return not any(a.is_static(v) for v in node.inputs[:2])
        if op(node) not in ("Cast", "Identity", "Dropout", "Where", "IsNaN", "Slice", "Mul", "Add", *RESHAPES):
            return False
        value = node.outputs[0]
    return False
