# SPDX-License-Identifier: Apache-2.0
"""Between the NumPy arrays of tests/cases.py and CUDA tensors, and running a problem on a named kernel."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable, Iterator, Sequence

import faplugin
import ml_dtypes
import numpy as np
import torch

from tests.problems import Problem

_ATTRIBUTES = {"optional_inputs", "optional_outputs"}  # faplugin.attention makes them itself


# What NumPy has no place for: its dtype there, PyTorch's, and an integer of as many bits.
_FOREIGN = (
    (np.dtype(ml_dtypes.bfloat16), torch.bfloat16, np.int16, torch.int16),
    (np.dtype(ml_dtypes.float8_e4m3fn), torch.float8_e4m3fn, np.uint8, torch.uint8),
)


def to_cuda(array: np.ndarray) -> torch.Tensor:
    for dtype, torch_dtype, integer, _ in _FOREIGN:
        if array.dtype == dtype:
            return torch.from_numpy(array.view(integer)).cuda().view(torch_dtype)
    return torch.from_numpy(array).cuda()


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    for dtype, torch_dtype, _, torch_integer in _FOREIGN:
        if tensor.dtype == torch_dtype:
            return tensor.view(torch_integer).cpu().numpy().view(dtype)
    return tensor.cpu().numpy()


def exported(tensor: torch.Tensor) -> object:
    """What faplugin reads: not every version of PyTorch offers float8 through DLPack."""
    return Exported(tensor) if tensor.dtype == torch.float8_e4m3fn else tensor


def poisoned(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cuda") -> torch.Tensor:
    """All bits set: NaN, where the dtype has one."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    tensor.flatten().view(torch.uint8).fill_(255)
    return tensor


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@contextlib.contextmanager
def captured_by(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
    """torch.cuda.graph() without a garbage collection in it, which newer versions of PyTorch leave to chance: a session
    or a graph that another test has left in a cycle would end then, and might end the capture."""
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.graph(graph, stream=stream):
            yield
    finally:
        gc.enable()


def check_chain(chain: Callable[[Callable[[], None]], torch.Tensor], times: int) -> torch.Tensor:
    """Launches in a row, `times` in a stream and from a CUDA graph, give the bits of those with a pause after each.

    `chain` calls its argument behind each launch. Returns what it gives.
    """
    want = chain(torch.cuda.synchronize)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(times):
            assert same_bits(chain(lambda: None), want)
        with captured_by(graph, stream):
            captured = chain(lambda: None)
        for _ in range(times):
            captured.zero_()
            graph.replay()
            stream.synchronize()
            assert same_bits(captured, want)
    return want


def kernels_for(inputs: dict[str, torch.Tensor], attributes: dict) -> list[str]:
    """Kernels of the dispatch table that can compute the problem; the first is the one that dispatch chooses."""
    readable = {name: exported(x) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    text = faplugin.explain(**readable, **_arguments(attributes), device="cuda")
    return re.findall(r"^(\w+): (?:runs this problem|could run it)", text, re.MULTILINE)


def _arguments(attributes: dict) -> dict:
    return {name: x for name, x in attributes.items() if name not in _ATTRIBUTES}


def run(problem: Problem, inputs: dict, kernel: str) -> dict[str, torch.Tensor]:
    """The problem's outputs, written over NaN."""
    arguments = _arguments(problem.attributes)
    wanted = {"return_lse": "lse" in problem.outputs, "return_present": "present_key" in problem.outputs}
    readable = {name: exported(x) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    specs = faplugin._attention.bind({**readable, **arguments, **wanted}, 0).outputs
    out = {name: poisoned(shape, getattr(torch, dtype), inputs["query"].device) for name, shape, dtype in specs}
    memory = {name: exported(x) for name, x in out.items()}
    torch.cuda.synchronize()  # the memory is written on PyTorch's stream, which an exported query does not tell
    faplugin.attention(**readable, **arguments, **wanted, kernel=kernel, out=memory)
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


class Exported:
    """A CUDA tensor as DLPack, of any dtype and with the strides that are given."""

    def __init__(self, tensor: torch.Tensor, strides: Sequence[int] | None = None):
        self._tensor = tensor
        codes = {torch.bfloat16: 4, torch.bool: 6, torch.float8_e4m3fn: 10}
        code = codes.get(tensor.dtype, 2 if tensor.is_floating_point() else 0)
        strides = tensor.stride() if strides is None else strides
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


class CorruptedStrides(Exported):
    """A CUDA tensor with meaningless strides on axes of size 1. PyTorch's DLPack makes them 1."""

    def __init__(self, tensor: torch.Tensor):
        pairs = zip(tensor.stride(), tensor.shape, strict=True)
        super().__init__(tensor, [stride if size != 1 else (1 << 40) + 13 for stride, size in pairs])
