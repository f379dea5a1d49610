# SPDX-License-Identifier: Apache-2.0
"""Finds attention in ONNX models, proves what it computes, and replaces it by one flash attention operator."""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from faexport.errors import ModelError, NotVerifiedError
    from faexport.jobs import optimize
    from faexport.options import Options
    from faexport.report.data import Report

# What is slow to import is looked up when it is asked for.
_LATER = {
    "ModelError": "errors",
    "NotVerifiedError": "errors",
    "Options": "options",
    "Report": "report.data",
    "optimize": "jobs",
}
_MODULES = {"model_io": "files.model_io", "schema": "schema"}  # documented as parts of this package
__version__: str
__all__ = ["ModelError", "NotVerifiedError", "Options", "Report", "__version__", "fuse", "optimize"]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{_MODULES[name]}")
    if name in _LATER:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from faexport.version import version

    return version()


@overload
def fuse(model: onnx.ModelProto, *, options: Options | None = None) -> tuple[onnx.ModelProto, Report]: ...
@overload
def fuse(model: ir.Model | str | os.PathLike[str], *, options: Options | None = None) -> tuple[ir.Model, Report]: ...
def fuse(
    model: onnx.ModelProto | ir.Model | str | os.PathLike[str], *, options: Options | None = None
) -> tuple[onnx.ModelProto | ir.Model, Report]:
    """Replaces all attention of a model that is understood by faexport::FlashAttention (docs/operator.md).

    `model` is an onnx_ir.Model, which is changed in place, an onnx.ModelProto, which is not, or the path of a file,
    which gives an onnx_ir.Model (weights stay on disk until they are read). Returns the model, in the type that was
    given, and the report of every site: fused or refused, and why. Raises ValueError with one sentence where a file is
    no usable model, or where the options ask for fp16 or bf16, which optimize() does.
    """
    import onnx
    import onnx_ir as ir

    from faexport import diagnosis, pipeline
    from faexport.files import model_io
    from faexport.options import named_as_in_python

    options = options or pipeline.Options()
    if options.half:
        raise ValueError("fp16 and bf16 take measuring on inputs, which fuse() doesn't have; use optimize()")
    if isinstance(model, ir.Model):
        return pipeline.run(model, options)
    if isinstance(model, onnx.ModelProto):
        fused, report = pipeline.run(model_io.load(model), options)
        return ir.to_proto(fused), report
    with named_as_in_python():
        return diagnosis.fuse(model_io.load(model), options, pathlib.Path(model))
