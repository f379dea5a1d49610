# SPDX-License-Identifier: Apache-2.0
"""Between the NumPy arrays of tests/cases.py and CUDA tensors, and running a problem on a named kernel."""

from __future__ import annotations

import ctypes
import re

import faplugin
import ml_dtypes
import numpy as np
import torch

from tests.problems import Problem

_ATTRIBUTES = {"optional_inputs", "optional_outputs"}  # faplugin.attention makes them itself


def to_cuda(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
    return torch.from_numpy(array).cuda()


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)
    return tensor.cpu().numpy()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def kernels_for(inputs: dict[str, torch.Tensor], attributes: dict) -> list[str]:
    """Kernels of the dispatch table that can compute the problem; the first is the one that dispatch chooses."""
    text = faplugin.explain(**inputs, **_arguments(attributes), device="cuda")
    return re.findall(r"^(\w+): (?:runs this problem|could run it)", text, re.MULTILINE)


def _arguments(attributes: dict) -> dict:
    return {name: x for name, x in attributes.items() if name not in _ATTRIBUTES}


def run(problem: Problem, inputs: dict, kernel: str) -> dict[str, torch.Tensor]:
    """The problem's outputs, written over NaN."""
    arguments = _arguments(problem.attributes)
    wanted = {"return_lse": "lse" in problem.outputs, "return_present": "present_key" in problem.outputs}
    example = faplugin.attention(**inputs, **arguments, **wanted, kernel=kernel)
    example = example if isinstance(example, tuple) else (example,)
    out = {name: torch.full_like(t, float("nan")) for name, t in zip(problem.outputs, example, strict=True)}
    faplugin.attention(**inputs, **arguments, **wanted, kernel=kernel, out=out)
    torch.cuda.synchronize()
    return out


class _DLDevice(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    _fields_ = [("tensor", _DLTensor), ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class CorruptedStrides:
    """A CUDA tensor as DLPack with meaningless strides on axes of size 1. PyTorch's DLPack makes them 1."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor
        code = {torch.bfloat16: 4, torch.bool: 6}.get(tensor.dtype, 2 if tensor.is_floating_point() else 0)
        strides = [s if size != 1 else (1 << 40) + 13 for s, size in zip(tensor.stride(), tensor.shape, strict=True)]
        self._shape = (ctypes.c_int64 * tensor.ndim)(*tensor.shape)
        self._strides = (ctypes.c_int64 * tensor.ndim)(*strides)
        device = _DLDevice(2, tensor.device.index)
        bits = 8 * tensor.element_size()
        view = _DLTensor(tensor.data_ptr(), device, tensor.ndim, code, bits, 1, self._shape, self._strides, 0)
        self._managed = _DLManagedTensor(view, None, None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self._tensor.device.index

    def __dlpack__(self, **_: object):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self._managed), b"dltensor", None)
