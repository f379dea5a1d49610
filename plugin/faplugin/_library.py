# SPDX-License-Identifier: Apache-2.0
"""Where the compiled parts are: the pybind11 module and, beside it, the libraries for the runtimes."""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime

FOLDER_VARIABLE = "FAPLUGIN_LIBRARY_DIR"


@functools.cache
def native() -> types.ModuleType:
    """The pybind11 module: the installed one, or that of the CMake build tree which FAPLUGIN_LIBRARY_DIR names.

    Raises:
        ImportError: it was not built, or not for this Python.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        try:
            return importlib.import_module("._native", __package__)
        except ImportError as error:
            raise ImportError(
                f"faplugin's compiled module can't be loaded ({error}); install the package (pip install .), "
                f"or set {FOLDER_VARIABLE} to a CMake build tree"
            ) from error
    files = sorted(pathlib.Path(folder).rglob("_native.*.so"))
    if not files:
        raise ImportError(f"{FOLDER_VARIABLE} is {folder}, but no _native.*.so lies there")
    spec = importlib.util.spec_from_file_location("faplugin._native", files[0])
    assert spec is not None and spec.loader is not None  # Python knows how to load what ends in .so
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def find_library(name: str) -> pathlib.Path:
    """The path of a compiled library, e.g. "libfa_ort.so".

    Raises:
        FileNotFoundError: it was not built, with a sentence that says where it was looked for.
    """
    folder = pathlib.Path(os.environ.get(FOLDER_VARIABLE) or pathlib.Path(str(native().__file__)).parent)
    for path in [folder / name, *sorted(folder.rglob(name))]:
        if path.exists():
            return path.resolve()
    raise FileNotFoundError(f"{name} is not in {folder}: this build of faplugin was made without it")


def library_path() -> str:
    """The path of libfa_ort.so, the library for onnxruntime's `register_custom_ops_library`.

    Raises:
        FileNotFoundError: it was not built.
    """
    return os.fspath(find_library("libfa_ort.so"))


def register(session_options: onnxruntime.SessionOptions) -> None:
    """Makes sessions with these options know faexport::FlashAttention, on the CPU and, where there is one, on CUDA.

    Call it once for each SessionOptions: onnxruntime refuses the same operators twice when it creates the session.

    Raises:
        FileNotFoundError: the library was not built.
        onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented: onnxruntime is older than 1.18.
    """
    session_options.register_custom_ops_library(library_path())
