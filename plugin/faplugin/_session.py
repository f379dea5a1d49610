# SPDX-License-Identifier: Apache-2.0
"""A session of onnxruntime with the operator's library and the options that matter, in one call."""

from __future__ import annotations

import numbers
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from faplugin._frameworks import told
from faplugin._library import CUDA, register_for

if TYPE_CHECKING:
    import onnxruntime

CPU = "CPUExecutionProvider"


def session(
    path: str | bytes | os.PathLike[str],
    *,
    providers: Sequence[str | tuple[str, dict]] | None = None,
    num_threads: int | None = None,
    cuda_graph: bool = False,
    options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    """An `onnxruntime.InferenceSession` that runs models which faexport has rewritten (and others).

    Args:
        path: the .onnx file, or what is in it as bytes.
        providers: as onnxruntime takes them; default: CUDA where this onnxruntime has it, then the CPU.
        num_threads: of the CPU that one run uses; default: one for each physical core.
        cuda_graph: capture each run on CUDA into a graph and replay it, which saves the time of the launches. Shapes
            and the addresses of inputs and outputs must stay then, so runs go through `io_binding()`
            (docs/onnxruntime.md).
        options: your own; it is changed, since the library is registered in it.

    Warns as `register` does, where the session is on CUDA.

    Raises:
        ImportError: onnxruntime isn't installed.
        TypeError: an argument is of another type.
        ValueError: `cuda_graph` without the CUDA provider, or fewer threads than one.
        FileNotFoundError: the operator's library was not built.
    """
    import onnxruntime

    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(f"path is {told(path)}; expected that of an .onnx file")
    if num_threads is not None and not isinstance(num_threads, numbers.Integral):
        raise TypeError(f"num_threads is {told(num_threads)}; expected a whole number")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}; give 1 or more, or leave it out")
    available = onnxruntime.get_available_providers()
    if providers is None:
        providers = [name for name in (CUDA, CPU) if name in available]
    chosen = _pairs(providers)
    if cuda_graph:
        on_cuda = [given for name, given in chosen if name == CUDA]
        if not on_cuda:
            raise ValueError(f"cuda_graph needs {CUDA}; the providers are {', '.join(name for name, _ in chosen)}")
        on_cuda[0]["enable_cuda_graph"] = "1"
    options = onnxruntime.SessionOptions() if options is None else options
    if num_threads is not None:
        options.intra_op_num_threads = int(num_threads)
    register_for(options, [name for name, _ in chosen if name in available], stacklevel=3)
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=chosen)


def _pairs(providers: Sequence[str | tuple[str, dict]]) -> list[tuple[str, dict]]:
    """The providers, each with its options."""
    try:
        if not isinstance(providers, str):
            return [(p, {}) if isinstance(p, str) else (str(p[0]), dict(p[1])) for p in providers]
    except (TypeError, ValueError, LookupError):
        pass
    raise TypeError(f"providers is {told(providers)}; expected a list of names, or of pairs (name, options)")
