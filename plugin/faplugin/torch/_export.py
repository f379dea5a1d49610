# SPDX-License-Identifier: Apache-2.0
"""What torch.onnx.export, both of them, makes of a call: one node faexport::FlashAttention."""

from __future__ import annotations

from typing import Any

import torch

from faplugin.torch._call import EXTRAS, LAYOUTS, OPTIONAL, SETTINGS, Tensors


def _attributes(names: list[str], settings: tuple) -> dict[str, Any]:
    attributes = dict(zip(SETTINGS, settings, strict=True))
    attributes["is_causal"] = int(attributes["is_causal"])
    return {**LAYOUTS, **attributes, "optional_inputs": ",".join(names)}


def exported(operands: Tensors, optional: Tensors, settings: tuple) -> Any:
    """The output of a node."""
    query, _, value = operands
    if torch.jit.is_tracing():  # with the operator's own values
        with torch.no_grad():
            return torch.ops.faplugin.attention_output(*operands, *optional, *settings)
    given = {n: t for n, t in zip(OPTIONAL, optional, strict=True) if t is not None}
    return torch.onnx.ops.symbolic(
        "faexport::FlashAttention",
        [*operands, *given.values()],
        _attributes(list(given), settings),
        dtype=query.dtype,
        shape=(*query.shape[:3], value.shape[-1]),
        version=1,
    )


def _node(g: Any, query: Any, key: Any, value: Any, bias: Any, sinks: Any, *rest: Any) -> Any:
    """For the TorchScript exporter: the traced op as a node, with its type, which would be lost otherwise."""
    from torch.onnx import symbolic_helper

    tensors = zip(OPTIONAL, (bias, sinks, *rest[: len(EXTRAS)]), strict=True)
    given = {n: t for n, t in tensors if not symbolic_helper._is_none(t)}
    kinds = (kind[0] for kind in SETTINGS.values())  # "f", "b", "i", "s"
    settings = tuple(
        symbolic_helper._maybe_get_const(x, kind) for x, kind in zip(rest[len(EXTRAS) :], kinds, strict=True)
    )
    suffixes = {str: "s", int: "i", float: "f"}
    attributes = {f"{n}_{suffixes[type(x)]}": x for n, x in _attributes(list(given), settings).items()}
    output = g.op("faexport::FlashAttention", query, key, value, *given.values(), **attributes)
    rows, columns = query.type().sizes() or [None] * 4, value.type().sizes() or [None] * 4
    output.setType(query.type().with_sizes([*rows[:3], columns[3]]))
    return output


torch.onnx.register_custom_op_symbolic("faplugin::attention_output", _node, 17)
