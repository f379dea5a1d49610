# SPDX-License-Identifier: Apache-2.0
"""How products name and order the axes of their operands: Einsum's equation, FusedMatMul's transposed batches."""

from __future__ import annotations

import string

import onnx_ir as ir

from faexport.graph.nodes import attribute
from faexport.understand.shapes.known import Known


def einsum_equation(node: ir.Node, a: Known) -> str | None:
    """The equation with a letter for each axis that "..." stands for; None where it states no result or a rank is not
    known."""
    equation = attribute(node, "equation", "").replace(" ", "")
    if "->" not in equation or "..." not in equation:
        return equation if "->" in equation else None
    inputs, out = equation.split("->")
    ranks = [rank for v in node.inputs if (rank := a.rank(v)) is not None]
    if len(ranks) != len(node.inputs):
        return None
    terms = inputs.split(",")
    counts = [rank - len(term) + 3 for rank, term in zip(ranks, terms, strict=True) if "..." in term]
    unused = [letter for letter in string.ascii_letters if letter not in equation][: max(counts)]
    dots = iter(counts)
    parts = [
        term.replace("...", "".join(unused[len(unused) - next(dots) :])) if "..." in term else term for term in terms
    ]
    return f"{','.join(parts)}->{out.replace('...', ''.join(unused))}"


def multiplied_order(node: ir.Node, side: str, rank: int) -> list[int]:
    """The axes of operand A or B in the order in which they are multiplied: FusedMatMul's transBatchA takes the first
    behind the batch, then transA swaps the last two."""
    order = list(range(rank))
    if attribute(node, f"transBatch{side}", 0):
        order = [*order[1:-1], 0, rank - 1]
    if attribute(node, f"trans{side}", 0):
        order[-2:] = order[:-3:-1]
    return order
