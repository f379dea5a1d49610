# SPDX-License-Identifier: Apache-2.0
"""The backward pass of a case on a named kernel: its tensors, and memory for gradients that shows who writes where."""

from __future__ import annotations

import dataclasses

import faplugin
import numpy as np
import torch

from tests import reference, reference_backward
from tests.gpu import arrays
from tests.problems import Case, Problem

KERNELS = ("backward_sm90", "backward_sm80")
GUARD = 64  # elements in front of a gradient and behind it, which nobody may write


def arguments_of(problem: Problem) -> tuple[dict, dict]:
    """The inputs on the GPU, and the other arguments."""
    inputs = {name: arrays.to_cuda(array) for name, array in problem.inputs.items()}
    return inputs, {name: x for name, x in problem.attributes.items() if not name.startswith("optional_")}


def guarded(like: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory of all NaN: the whole of it, and the tensor of the shape of `like` in its middle."""
    whole = arrays.poisoned((like.numel() + 2 * GUARD,), dtype)
    return whole, whole[GUARD : GUARD + like.numel()].view(like.shape)


def gradients(problem: Problem, inputs: dict, arguments: dict, given: dict, kernel: str) -> dict[str, torch.Tensor]:
    """By the names of the arguments, written over NaN."""
    bias = reference_backward.bias_name(problem)
    names = ["query", "key", "value", *(name for name in (bias, "sinks") if name in inputs)]
    memory = {
        name: guarded(inputs[name], inputs[name].dtype if i < 3 else torch.float32) for i, name in enumerate(names)
    }
    if "packed_columns" in arguments:  # one array, whose gradient is one, too
        memory |= dict.fromkeys(("key", "value"), memory["query"])
    arrays.poisoned((1 << 24,), torch.uint8)  # what the workspace is made of
    out = {name: part for name, (_, part) in memory.items()}
    found = faplugin.attention_backward(**given, **inputs, **arguments, out=out, kernel=kernel)
    torch.cuda.synchronize()
    for name, (whole, _) in memory.items():
        edges = torch.cat([whole[:GUARD], whole[-GUARD:]]).view(torch.uint8)
        assert (edges == 255).all(), f"{kernel}: something was written beside the gradient of {name}"
    return found


def given_for(
    case: Case, problem: Problem, inputs: dict, arguments: dict, forward_kernel: str = ""
) -> dict[str, torch.Tensor]:
    """What a backward pass is given beside the inputs: the forward pass's results, and their gradients."""
    output, lse = faplugin.attention(**inputs, **arguments, kernel=forward_kernel, return_lse=True)
    d_out, d_lse = reference_backward.draw(case, problem)
    attributes = reference.DEFAULTS | problem.attributes
    d_output = reference.to_layout(d_out, attributes, problem.inputs["query"].ndim)
    given = {"d_output": arrays.to_cuda(np.ascontiguousarray(d_output)), "output": output, "lse": lse}
    return given if d_lse is None else given | {"d_lse": arrays.to_cuda(d_lse)}


def takes(kernel: str, problem: Problem, inputs: dict, arguments: dict, given: dict) -> dict[str, torch.Tensor] | None:
    """The gradients, or None where the kernel refuses the problem."""
    try:
        return gradients(problem, inputs, arguments, given, kernel)
    except RuntimeError as refusal:
        assert str(refusal).startswith((f"{kernel}: ", "there is no backward kernel")), refusal
        return None


def by_reference_names(problem: Problem, found: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """[B, H, S, D], and bias and sinks in their shapes."""
    host = {name: arrays.to_numpy(tensor) for name, tensor in found.items()}
    operands = {name: host.pop(name) for name in ("query", "key", "value")}
    as_inputs = dataclasses.replace(problem, inputs=problem.inputs | operands)
    whole = reference.operands(as_inputs, reference.DEFAULTS | problem.attributes)
    bias = reference_backward.bias_name(problem)
    others = {"bias" if name == bias else name: array for name, array in host.items()}
    return dict(zip(operands, whole, strict=True)) | others
