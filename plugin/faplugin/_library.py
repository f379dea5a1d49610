# SPDX-License-Identifier: Apache-2.0
"""Where the compiled libraries are: in the package, or in the CMake build tree that FAPLUGIN_LIBRARY_DIR names."""

from __future__ import annotations

import functools
import os
import pathlib
import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime

CUDA = "CUDAExecutionProvider"
# Where a build for the CPU has less than one for GPUs.
_GPU_BUILD = "install the wheel faplugin_cu13-….whl in place of faplugin, or build with nvcc"
_HINTS = {"libfa_trt.so": f"; {_GPU_BUILD}", "libfa_trt_registrar.so": f"; {_GPU_BUILD}"}
_registered: weakref.WeakSet[onnxruntime.SessionOptions] = weakref.WeakSet()
FOLDER_VARIABLE = "FAPLUGIN_LIBRARY_DIR"


def find_library(name: str) -> pathlib.Path:
    """The path of a compiled library, e.g. "libfa_ort.so".

    Raises:
        FileNotFoundError: it was not built, with a sentence that says where it was looked for.
    """
    folders = _folders()
    for path in _candidates(folders, name):
        if path.exists():
            return path.resolve()
    hint = _HINTS.get(name, "")
    raise FileNotFoundError(f"{name} is not in {' or '.join(folders)}: this faplugin was built without it{hint}")


def _folders() -> list[str]:
    """Those of an editable installation are two: the sources', and the one with what was compiled."""
    folder = os.environ.get(FOLDER_VARIABLE)
    return [folder] if folder else list(sys.modules[__package__].__path__)


def _candidates(folders: list[str], name: str) -> Iterator[pathlib.Path]:
    for folder in map(pathlib.Path, folders):
        yield folder / name
        if os.environ.get(FOLDER_VARIABLE):
            yield from sorted(folder.rglob(name))


def library_path() -> str:
    """The path of libfa_ort.so, the library for onnxruntime's `register_custom_ops_library`.

    Raises:
        FileNotFoundError: it was not built.
    """
    return os.fspath(find_library("libfa_ort.so"))


def register(session_options: onnxruntime.SessionOptions) -> None:
    """Makes sessions with these options know faexport::FlashAttention, on the CPU and, where there is one, on CUDA.

    For the second time it does nothing, since onnxruntime refuses to create a session with the same operators twice.
    Warns where this onnxruntime has CUDA and the library was built without CUDA kernels.

    Raises:
        FileNotFoundError: the library was not built.
        TypeError: these are no options of a session.
        onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented: onnxruntime is older than 1.18.
    """
    import onnxruntime

    register_for(session_options, onnxruntime.get_available_providers(), stacklevel=3)


def register_for(session_options: onnxruntime.SessionOptions, providers: Iterable[str], stacklevel: int) -> None:
    """register() for sessions on these providers. On CUDA a library without kernels for it would be slow without a
    word: onnxruntime runs the node on the CPU then, between copies of its tensors."""
    if not hasattr(session_options, "register_custom_ops_library"):
        raise TypeError(f"session_options is {session_options!r}; expected onnxruntime.SessionOptions")
    if session_options not in _registered:
        session_options.register_custom_ops_library(library_path())
        _registered.add(session_options)
    if CUDA in providers and _lacks_cuda_kernels():
        warnings.warn(
            f"this faplugin was built without CUDA kernels: sessions on CUDA run attention on the CPU; {_GPU_BUILD}",
            stacklevel=stacklevel,
        )


@functools.cache
def _lacks_cuda_kernels() -> bool:
    """Is it known to have none?"""
    from faplugin._attention import explain

    spec = ((1, 1, 1, 64), "float16")
    try:
        return "no CUDA kernels" in explain(spec, spec, spec, device="sm_80")
    except (ImportError, OSError, ValueError):  # a build without its Python part
        return False
