# SPDX-License-Identifier: Apache-2.0
"""Runs the attention core alone in half precision: Casts at the border of the fused node (Options.dtype). Called by
pipeline.py."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from faexport.graph.surgery import Builder
from faexport.spec import AttentionSpec, Fact


def in_precision(spec: AttentionSpec, dtype: ir.DataType, given: ir.DataType | None, opset: int) -> AttentionSpec:
    """The spec with query, key, value and past cast to `dtype`, and the results cast back to `given`, the type they
    had. A cache that is an output of the model keeps its type, so its site does, too."""
    if given != ir.DataType.FLOAT or given == dtype or spec.present_key is not None or spec.present_value is not None:
        return spec
    build = Builder(opset)
    cast: dict[ir.Value, ir.Value] = {}

    def narrow(value: ir.Value) -> ir.Value:
        if value not in cast:
            cast[value] = build.add("Cast", [value], dtype, to=int(dtype))
        return cast[value]

    query, key, value = (dataclasses.replace(o, value=narrow(o.value)) for o in (spec.query, spec.key, spec.value))
    past_key, past_value = (None if past is None else narrow(past) for past in (spec.past_key, spec.past_value))
    entry = ir.Value(type=ir.TensorType(dtype))
    back = Builder(opset)
    wide = back.add("Cast", [entry], given, to=int(given))
    if spec.output_entry is not None:
        spec.output_entry.replace_all_uses_with(wide)
    return dataclasses.replace(
        spec,
        query=query,
        key=key,
        value=value,
        past_key=past_key,
        past_value=past_value,
        new_nodes=(*spec.new_nodes, *build.nodes),
        output_nodes=(*back.nodes, *spec.output_nodes),
        output_entry=entry,
        facts=(*spec.facts, Fact(f"core in {dtype.name.lower()}")),
    )


FLOAT32_PRECISION = "float32_precision"  # the operator's attribute
_FLOAT32_NOTES = {
    "": "on a GPU float32 attention is multiplied as the runtime multiplies matrices: in onnxruntime in TF32 (relative "
    "error about 4e-4), with use_tf32 = 0 in three TF32 products (5e-7); --float32 chooses",
    "tf32": "on a GPU float32 attention is computed in TF32 (relative error about 4e-4)",
    "tf32x3": "on a GPU float32 attention is computed in three TF32 products (relative error about 5e-7)",
}


def float32_note(precision: str) -> str:
    """What the report says of a model with float32 attention. `precision`: the attribute; empty: there is none."""
    return _FLOAT32_NOTES[precision]
