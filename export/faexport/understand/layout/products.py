# SPDX-License-Identifier: Apache-2.0
"""Matrix products in every spelling (MatMul, Einsum, Gemm, com.microsoft FusedMatMul) as one thing: labelled axes.

A label stands for one index of the product: leading labels (batch, heads), "row" and "column" of the result, "sum" for
the contraction.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from faexport.graph.nodes import attribute, op, operand
from faexport.sizes.dims import Dim
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.einsum import einsum_equation, multiplied_order

FUSED = ("com.microsoft::FusedMatMul", "com.microsoft::TransposeMatMul")
PRODUCT_OPS = ("MatMul", "Einsum", "Gemm", *FUSED)
# Products of quantized numbers, and which of their inputs are multiplied. They are known, not read.
QUANTIZED = {
    "MatMulInteger": (0, 1),
    "QLinearMatMul": (0, 3),
    "com.microsoft::QLinearMatMul": (0, 3),
    "com.microsoft::MatMulIntegerToFloat": (0, 1),
    "com.microsoft::DynamicQuantizeMatMul": (0, 1),
}


@dataclasses.dataclass(frozen=True)
class Factor:
    """One operand of a product: its value and the label of each axis. A leading label that it lacks is broadcast."""

    value: ir.Value
    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Product:
    node: ir.Node
    left: Factor  # has "row" and "sum"
    right: Factor  # has "column" and "sum"
    labels: tuple[str, ...]  # of the result
    scale: float = 1.0
    order: tuple[str, ...] = ()  # of the leading labels, batch first, where the result's axes stand in another one
    shape: tuple[Dim, ...] = ()  # of the result by labels, where two of them are one axis of the node's output

    @property
    def leads(self) -> tuple[str, ...]:
        return self.order or tuple(label for label in self.labels if label not in ("row", "column"))

    def shape_of(self, a: Analysis) -> tuple[Dim, ...] | None:
        """The size of each label of the result."""
        return self.shape or a.shape(self.node.outputs[0])

    def swapped(self) -> Product:
        """The same product with left and right (row and column) exchanged."""
        names = {"row": "column", "column": "row"}

        def rename(labels: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(names.get(x, x) for x in labels)

        left, right = (Factor(f.value, rename(f.labels)) for f in (self.right, self.left))
        return dataclasses.replace(self, left=left, right=right, labels=rename(self.labels))


def with_row(product: Product, label: str) -> Product:
    """The same product with another axis of the left operand called the row (of several that the right one lacks)."""
    names = {label: "row", "row": label}

    def rename(labels: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names.get(x, x) for x in labels)

    left = Factor(product.left.value, rename(product.left.labels))
    return dataclasses.replace(product, left=left, labels=rename(product.labels), order=())


def product_of(node: ir.Node, a: Analysis) -> Product | None:
    """`node` as a product, or None where it is none or its ranks are unknown."""
    name = op(node)
    if name == "MatMul" or name in FUSED:
        return _matmul(node, a, attribute(node, "alpha", 1.0))
    if name == "Gemm":
        bias = operand(node, 2)
        if bias is not None and attribute(node, "beta", 1.0) != 0.0 and a.scalar(bias) != 0.0:
            return None
        return _matmul(node, a, attribute(node, "alpha", 1.0))
    return _einsum(node, a) if name == "Einsum" else None


def _matmul(node: ir.Node, a: Analysis, scale: float) -> Product | None:
    left, right = node.inputs[0], node.inputs[1]
    ranks = [rank for value in (left, right) if (rank := a.rank(value)) is not None]
    if left is None or right is None or len(ranks) != 2 or min(ranks) < 2:
        return None
    leads = tuple(f"lead{i}" for i in range(max(ranks) - 2))
    x, y = (
        Factor(value, _stored(node, side, (*leads[len(leads) - rank + 2 :], *last)))
        for value, side, rank, last in (
            (left, "A", ranks[0], ("row", "sum")),
            (right, "B", ranks[1], ("sum", "column")),
        )
    )
    return Product(node, x, y, (*leads, "row", "column"), scale)


def _stored(node: ir.Node, side: str, labels: tuple[str, ...]) -> tuple[str, ...]:
    order = multiplied_order(node, side, len(labels))
    return tuple(labels[order.index(i)] for i in range(len(labels)))


def _einsum(node: ir.Node, a: Analysis) -> Product | None:
    equation = einsum_equation(node, a)
    if len(node.inputs) != 2 or equation is None:
        return None
    first, second = node.inputs
    if first is None or second is None:
        return None
    inputs, out = equation.split("->")
    left, right = inputs.split(",")
    if any(len(set(part)) != len(part) for part in (left, right, out)):
        return None
    summed = [x for x in left if x in right and x not in out]
    alone = [x for x in left + right if x not in out and x not in summed]
    rows = [x for x in out if x in left and x not in right]
    columns = [x for x in out if x in right and x not in left]
    if len(summed) != 1 or alone or not rows or not columns:
        return None
    # Of several axes that one side alone has, the last is row or column; the others are heads or batch that the other
    # side shares.
    names = {summed[0]: "sum", rows[-1]: "row", columns[-1]: "column"}
    names |= {x: f"lead{i}" for i, x in enumerate(x for x in out if x not in names)}
    labels = [tuple(names[x] for x in part) for part in (left, right, out)]
    # The result may have heads in front of the batch ("bthd,bshd->hbts"); the operands' order is the one to go by.
    leads = {x for x in names.values() if x.startswith("lead")}
    orders = [tuple(x for x in part if x in leads) for part in (labels[1], labels[0], labels[2])]
    order = next(x for x in orders if len(x) == len(leads))
    return Product(node, Factor(first, labels[0]), Factor(second, labels[1]), labels[2], order=order)
