# SPDX-License-Identifier: Apache-2.0
"""Models of one FlashAttention node, and running them in onnxruntime. Used by all tests of the custom-op library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import faplugin
import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from tests import reference
from tests.problems import FLOAT8, Problem

OUTPUTS = ("output", "present_key", "present_value", "lse")  # in the operator's places
IR_VERSION = 9  # of onnxruntime 1.18
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# What NumPy has no place for, and ONNX's number of it.
_FOREIGN = {_BFLOAT16: TensorProto.BFLOAT16, FLOAT8: TensorProto.FLOAT8E4M3FN}


def element_type(dtype: np.dtype) -> int:
    """ONNX's number of a dtype."""
    return _FOREIGN.get(dtype) or helper.np_dtype_to_tensor_dtype(dtype)


def output_dtype(name: str, inputs: Mapping[str, np.ndarray], attributes: Mapping) -> np.dtype:
    """Of one of the node's outputs."""
    if name == "lse":
        return np.dtype(np.float32)
    if name == "output":
        return reference.output_dtype(Problem(dict(attributes), dict(inputs), []))
    return inputs["past_key" if "past_key" in inputs else "query"].dtype


def make_model(
    inputs: Mapping[str, np.ndarray],
    attributes: Mapping,
    outputs: Sequence[str] = ("output",),
    shapes: Mapping[str, Sequence] | None = None,
    slots: Sequence[str] | None = None,
) -> onnx.ModelProto:
    """One node. bfloat16 and float8, which NumPy has no place for, come and go as float32 through a Cast.

    Args:
        inputs: examples; their dtypes and, where `shapes` has no other (symbols, None), shapes are declared.
        attributes: of the node.
        outputs: names of OUTPUTS.
        shapes: declared shapes by input name.
        slots: the node's inputs where they differ from the names of `inputs`, e.g. with a hole.
    """
    graph_inputs, graph_outputs, before, after, names = [], [], [], [], {}
    for name, array in inputs.items():
        cast = array.dtype in _FOREIGN
        shape = shapes.get(name, array.shape) if shapes else array.shape
        graph_inputs.append(
            helper.make_tensor_value_info(name, TensorProto.FLOAT if cast else element_type(array.dtype), shape)
        )
        names[name] = f"{name}_cast" if cast else name
        if cast:
            before.append(helper.make_node("Cast", [name], [names[name]], to=_FOREIGN[array.dtype]))
    places = []
    for name in OUTPUTS[: max(OUTPUTS.index(name) for name in outputs) + 1]:
        dtype = output_dtype(name, inputs, attributes)
        inner = f"{name}_cast" if dtype in _FOREIGN else name
        places.append(inner if name in outputs else "")
        if name not in outputs:
            continue
        if inner != name:
            after.append(helper.make_node("Cast", [inner], [name], to=TensorProto.FLOAT))
        kind = TensorProto.FLOAT if dtype in _FOREIGN else element_type(dtype)
        graph_outputs.append(helper.make_tensor_value_info(name, kind, None))
    slots = [names.get(slot, slot) for slot in (slots if slots is not None else inputs)]
    node = helper.make_node("FlashAttention", slots, places, name="attention", domain="faexport", **attributes)
    graph = helper.make_graph([*before, node, *after], "one_node", graph_inputs, graph_outputs)
    opsets = [
        helper.make_opsetid("", 19 if inputs["query"].dtype == FLOAT8 else 17),
        helper.make_opsetid("faexport", 1),
    ]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def session(model: onnx.ModelProto, providers: Sequence = ("CPUExecutionProvider",), **options) -> ort.InferenceSession:
    """A session that knows the operator. options: fields of SessionOptions."""
    session_options = ort.SessionOptions()
    session_options.log_severity_level = 4
    for name, value in options.items():
        setattr(session_options, name, value)
    faplugin.register(session_options)
    return ort.InferenceSession(model.SerializeToString(), session_options, providers=list(providers))


def feeds(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a session of make_model takes."""
    return {name: a.astype(np.float32) if a.dtype in _FOREIGN else a for name, a in inputs.items()}


def run(problem: Problem, providers: Sequence = ("CPUExecutionProvider",)) -> dict[str, np.ndarray]:
    """The outputs of a problem of tests/cases.py, computed in onnxruntime."""
    made = session(make_model(problem.inputs, problem.attributes, problem.outputs), providers)
    results = dict(zip([o.name for o in made.get_outputs()], made.run(None, feeds(problem.inputs)), strict=True))
    return {name: a.astype(output_dtype(name, problem.inputs, problem.attributes)) for name, a in results.items()}


def step(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    *,
    out=None,
    return_present=False,
    providers: Sequence = ("CPUExecutionProvider",),
    device: str = "cpu",
    **arguments,
):
    """faplugin.attention, computed by a session of one node. `out`: past and present are bound to one OrtValue."""
    arrays = {name: x for name, x in arguments.items() if isinstance(x, np.ndarray)}
    attributes = {name: int(x) if isinstance(x, bool) else x for name, x in arguments.items() if name not in arrays}
    inputs = {"query": query, "key": key, "value": value, **arrays}
    attributes["optional_inputs"] = ",".join(arrays)
    paged = attributes["cache"] == "paged"
    outputs = ["output", "present_key", "present_value"] if return_present or paged else ["output"]
    attributes["optional_outputs"] = ",".join(outputs[1:])
    made = session(make_model(inputs, attributes, outputs), providers)
    assert made.get_providers()[0] == (providers[0] if isinstance(providers[0], str) else providers[0][0])
    if out is None and not paged:
        return made.run(None, inputs)
    binding, pasts = made.io_binding(), {}
    binding.bind_output("output")
    for name, array in inputs.items():
        bound = ort.OrtValue.ortvalue_from_numpy(array, device, 0)
        binding.bind_ortvalue_input(name, bound)
        if name in ("past_key", "past_value"):
            pasts[name] = bound
            binding.bind_ortvalue_output(name.replace("past", "present"), bound)
    made.run_with_iobinding(binding)
    for name, bound in pasts.items():
        arrays[name][...] = bound.numpy()
    output = binding.get_outputs()[0].numpy()
    return output if paged else [output, arrays["past_key"], arrays["past_value"]]
