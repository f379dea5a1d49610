# SPDX-License-Identifier: Apache-2.0
"""The operator's library for onnxruntime, and the sentence that says what to install for what, where there is none.

Each package with the library, for the CPU or with GPU kernels, brings it in a module called faplugin.
"""

from __future__ import annotations

import pathlib

from faexport.errors import ModelError

NAME = "libfa_ort.so"
GPU_WHEEL = "install the wheel faplugin_cu13-….whl in place of faplugin, or build with nvcc"
MISSING = (
    "the operator's library is not installed: install the wheel faplugin-….whl for the CPU, "
    "or faplugin_cu13-….whl for NVIDIA GPUs and TensorRT too"
)


def path() -> pathlib.Path:
    """Of libfa_ort.so. Raises ModelError."""
    try:
        import faplugin
    except ImportError:
        raise ModelError(MISSING) from None
    try:
        return pathlib.Path(faplugin.library_path())
    except FileNotFoundError as error:
        raise ModelError(f"the operator's library is not there: {error}") from error


def without_cuda_kernels() -> str:
    """A sentence where the library has none, or ""."""
    return "" if has_cuda_kernels() else f"{path()} was built without CUDA kernels; {GPU_WHEEL}"


def has_cuda_kernels() -> bool:
    """Is it known to have kernels for GPUs, or not known to lack them?"""
    import faplugin

    spec = ((1, 1, 1, 64), "float16")
    try:
        return "prefill" in faplugin.explain(spec, spec, spec, device="sm_80")
    except (ImportError, ValueError):  # a build without its Python part
        return True
