# SPDX-License-Identifier: Apache-2.0
"""What is asked of an array's own framework: memory for results, and the stream it works on. Imports no framework."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import numpy as np

_LONGEST = 120  # characters of a value that a sentence tells


def framework_of(array: Any) -> str:
    """The top package of an array's type: "numpy", "torch", "cupy", …"""
    return type(array).__module__.partition(".")[0]


def told(value: Any) -> str:
    """A value for a sentence of one line: arrays, and what takes several lines, by their kind."""
    text = repr(value) if isinstance(value, np.generic) or not hasattr(value, "shape") else ""
    if not text or "\n" in text:
        return f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def refuse_negative_bit(name: str, tensor: Any) -> None:
    """Raises ValueError where the memory of a PyTorch tensor holds the negatives of its numbers, as that of the
    imaginary part of a conjugate does: DLPack's C exchange API doesn't tell."""
    if tensor.is_neg():
        raise ValueError(
            f"{name} has PyTorch's negative bit, so its memory holds other numbers; expected resolve_neg() of it"
        )


def readable(name: str, array: Any) -> Any:
    """The array in a form that hands out its memory: a PyTorch tensor leaves its autograd graph, a scalar of NumPy
    becomes an array. Raises ValueError as refuse_negative_bit()."""
    if isinstance(array, np.generic):
        return np.asarray(array)
    if framework_of(array) != "torch":
        return array
    refuse_negative_bit(name, array)
    return array.detach()


def current_stream(array: Any) -> int:
    """The CUDA stream on which the array's framework works now, as an integer; 0 on the CPU and where it is unknown."""
    framework = framework_of(array)
    if framework == "torch" and array.is_cuda:
        return sys.modules["torch"].cuda.current_stream(array.device).cuda_stream
    if framework == "cupy":
        return sys.modules["cupy"].cuda.get_current_stream().ptr
    return 0


def allocates(array: Any) -> bool:
    """Can the array's framework be asked for memory?"""
    return framework_of(array) in ("torch", "cupy")


def address(array: Any) -> int:
    """Of an array of such a framework."""
    return array.data_ptr() if framework_of(array) == "torch" else array.data.ptr


def shape_of(name: str, array: Any) -> tuple[int, ...]:
    """The shape, also of an array that does no more than hand out its memory, or of a specification.

    Raises:
        TypeError: NumPy can't read that.
    """
    shape = array[0] if isinstance(array, tuple) else getattr(array, "shape", None)
    try:
        return np.from_dlpack(array).shape if shape is None else tuple(shape)
    except Exception as error:
        raise TypeError(f"{name} doesn't tell its shape; give its gradient's memory with out=") from error


def empty(like: Any, shape: tuple[int, ...], dtype: str, device: str, stream: int | None) -> Any:
    """Uninitialised memory from the framework of `like`, on its device, for use on `stream` (None: its current one).

    Raises:
        TypeError: the framework is not known and the array is not on the CPU.
    """
    framework = framework_of(like)
    if framework == "torch":
        torch = sys.modules["torch"]
        other = device == "cuda" and stream is not None and stream != current_stream(like)
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, like.device)) if other else contextlib.nullcontext():
            return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    if framework == "cupy":
        cupy = sys.modules["cupy"]
        stream = current_stream(like) if stream is None else stream
        with cupy.cuda.Device(like.device.id), cupy.cuda.ExternalStream(stream):
            return cupy.empty(shape, dtype=dtype)
    if device != "cpu":
        raise TypeError(f"results can't be allocated as arrays of {framework}; give them with out=")
    return np.empty(shape, _numpy_dtype(like, dtype))


def _numpy_dtype(like: Any, name: str) -> np.dtype:
    """NumPy's dtype of this name. Those of ml_dtypes are known by the array alone, or where the caller has that module.

    Raises:
        TypeError: NumPy has no such dtype and ml_dtypes has not been imported.
    """
    if framework_of(like) == "numpy" and str(like.dtype) == name:
        return like.dtype
    ml_dtypes = sys.modules.get("ml_dtypes")
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        raise TypeError(f"NumPy has no {name}; import ml_dtypes, or give the result's memory with out=") from None
