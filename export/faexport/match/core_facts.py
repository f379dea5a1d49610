# SPDX-License-Identifier: Apache-2.0
"""What the report says of attention written out, beside what was proven of its mask. Called by softmax_core.py."""

from __future__ import annotations

import onnx_ir as ir

from faexport.graph.nodes import name_of
from faexport.spec import Assumption, Fact
from faexport.understand.core.hiding import is_mask
from faexport.understand.core.score_chain import Scores
from faexport.understand.core.softmax import Softmax
from faexport.understand.core.structure import Structure, in_graph
from faexport.understand.core.value_chain import Values
from faexport.understand.shapes.analysis import Analysis


def assumed_of(softmax: Softmax, a: Analysis) -> tuple[Assumption, ...]:
    """What is assumed where a mask sets exponentials to 0."""
    hiding = softmax.hiding
    if hiding is None:
        return ()
    texts = [
        "where a mask sets exponentials to 0, a score that stays is less than 80 below the row's largest, hidden ones "
        "among them"
    ]
    if not is_mask(hiding.value, a):
        texts.append(f"'{hiding.value.name}', which the exponentials are multiplied by, holds 0 and 1 only")
    return tuple(Assumption(text, (name_of(hiding.node),)) for text in texts)


def facts_of(structure: Structure, scores: Scores, values: Values, has_sinks: bool, a: Analysis) -> tuple[Fact, ...]:
    """What was proven of everything but the mask, and what is assumed of it."""
    facts: list[Fact] = []
    query, key = structure.query, structure.key
    dtype = a.dtype(query.operand.value)
    if key.heads != structure.heads and None not in (key.heads.const, structure.heads.const):
        facts.append(Fact(f"{structure.heads} query heads on {key.heads} kv heads"))
    if query.operand.column_start is not None:
        facts.append(Fact("packed QKV read in place"))
    if scores.wider:
        tensors = (v for factor in scores.wider for v in in_graph(factor.value) if not a.is_static(v))
        wider = ", ".join(f"'{name}'" for name in dict.fromkeys(v.name for v in tensors))
        facts.append(
            Fact(f"operands are copied to the size of {wider}, which has names of its own: equal, or one of both is 1")
        )
    if scores.softcap:
        facts.append(Fact(f"softcap {scores.softcap:g}"))
    if has_sinks:
        facts.append(Fact("attention sinks"))
    if values.nan_guard:
        facts.append(Assumption("no score is NaN or +inf, which the guard behind the softmax would hide"))
    for operand, weights in zip(
        ("queries", "keys", "values"), (scores.query_weights, scores.key_weights, values.weights), strict=True
    ):
        if weights:
            what = "weights" if operand == "values" else "scores"
            below = (Assumption, ", where their product stays below 65504")
            made, limit = below if dtype is ir.DataType.FLOAT16 else (Fact, "")
            names = tuple(name_of(weight.node) for weight in weights)
            facts.append(made(f"a factor of the {what}, multiplied to the {operand}{limit}", names))
    return tuple(facts)
