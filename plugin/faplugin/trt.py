# SPDX-License-Identifier: Apache-2.0
"""FlashAttention for TensorRT 10 and 11: libfa_trt.so, and its registration with the TensorRT of this process.

import faplugin.trt
faplugin.trt.register()          # before parsing a model that faexport has rewritten, or loading an engine of it
"""

from __future__ import annotations

import importlib
import os
import types
from typing import Any

from faplugin._library import find_library

NAME, VERSION, NAMESPACE = "FlashAttention", "1", ""
MAJORS = (10, 11)


def library_path() -> str:
    """The path of libfa_trt.so, for `trtexec --dynamicPlugins` and `IPluginRegistry.load_library`.

    Raises:
        FileNotFoundError: it was not built.
    """
    return os.fspath(find_library("libfa_trt.so"))


def registrar_path() -> str:
    """The path of libfa_trt_registrar.so, for hosts that only dlopen libraries (onnxruntime's TensorRT provider).

    Raises:
        FileNotFoundError: it was not built.
    """
    return os.fspath(find_library("libfa_trt_registrar.so"))


def register(tensorrt: types.ModuleType | None = None) -> None:
    """Enters the plugin in TensorRT's registry. A second call does nothing.

    Args:
        tensorrt: the module to use, for one that is not called `tensorrt` (`tensorrt_lean`, `tensorrt_dispatch`).

    Raises:
        ImportError: TensorRT is not installed.
        FileNotFoundError: the library was not built.
        RuntimeError: TensorRT is of a version that the plugin was not made for, or refuses the library, or has another
            plugin of this name.
    """
    module = tensorrt or _import()
    if not isinstance(module, types.ModuleType):
        raise TypeError(f"tensorrt is {module!r}; expected the module")
    major = module.__version__.split(".")[0]
    if not major.isdigit() or int(major) not in MAJORS:
        raise RuntimeError(f"{module.__name__} is version {module.__version__}; the plugin is for TensorRT 10 and 11")
    registry = module.get_plugin_registry()
    if (there := registry.get_creator(NAME, VERSION, NAMESPACE)) is not None:
        _check_is_ours(there)
        return
    path = library_path()
    registry.load_library(path)
    if registry.get_creator(NAME, VERSION, NAMESPACE) is None:
        raise RuntimeError(f"{module.__name__} {module.__version__} refused {path}; its log says why")


def _import() -> types.ModuleType:
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise ImportError(f"TensorRT can't be imported ({error}); install it with pip install tensorrt") from error


def _check_is_ours(creator: Any) -> None:
    names = {field.name for field in creator.field_names}
    if "optional_inputs" not in names:
        raise RuntimeError(f"another plugin {NAME}, version {VERSION}, is registered already: unload it first")
