# SPDX-License-Identifier: Apache-2.0
"""The files that encoders.py and models.py time: models of model_table.py as PyTorch's exporters write them, with
random weights, and what onnxruntime's optimizer, onnxscript and faexport make of each, in float32 and float16.

All of one model and export is made by one process, `write_files`; what fails there is written down, and the rest goes
on.
"""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from collections.abc import Sequence

import half_files
import onnx
import skeletons
import torch
from model_table import MODELS, Inputs, Model

FILES = ("unfused", "onnxruntime", "onnxscript", "ours")
DTYPES = ("float16", "float32")
LONGEST_EXAMPLE = 512  # tokens


class _Wrapped(torch.nn.Module):
    """The model with positional inputs and one output."""

    def __init__(self, model: torch.nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model.eval(), names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True)))[0]


def built(model: Model, how: str, layers: int) -> _Wrapped:
    """With equal small weights for each way; the large ones are skeletons.py's."""
    config = model.config(layers or model.layers)
    config._attn_implementation = "eager" if how == "eager" else "sdpa"
    torch.manual_seed(0)
    return _Wrapped(model.model(config), list(example(model)))


def example(model: Model, batch_size: int = 2) -> Inputs:
    """No longer than a processor can take."""
    length = model.sizes[0][1]
    return model.inputs(batch_size, min(length, LONGEST_EXAMPLE) if model.is_text else length)


def _dynamic_axes(model: Model, name: str) -> dict[int, str]:
    if model.batch_axes and name not in model.batch_axes:
        return {}
    return {0: "batch", 1: "rows"} if model.is_text else {0: "batch"}


def _export(wrapped: _Wrapped, model: Model, how: str, path: pathlib.Path) -> None:
    inputs = example(model)
    arguments = {"input_names": list(inputs), "output_names": ["output"]}
    if how == "dynamo":
        sizes = {
            "batch": torch.export.Dim("batch", min=1, max=4096),
            "rows": torch.export.Dim("rows", min=2, max=model.longest),
        }
        axes = [{axis: sizes[size] for axis, size in _dynamic_axes(model, name).items()} for name in inputs]
        torch.onnx.export(
            wrapped, tuple(inputs.values()), os.fspath(path), dynamo=True, opset_version=18, verbose=False,
            dynamic_shapes=(tuple(axes),), external_data=False, **arguments,
        )  # fmt: skip
        return
    dynamic = {name: _dynamic_axes(model, name) for name in inputs}
    dynamic["output"] = {0: "batch", 1: "rows"} if model.is_text else {0: "batch"}
    torch.onnx.export(
        wrapped,
        tuple(inputs.values()),
        os.fspath(path),
        dynamo=False,
        opset_version=17,
        dynamic_axes=dynamic,
        **arguments,
    )


def write_files(name: str, how: str, folder: pathlib.Path, layers: int, only: Sequence[str] = ()) -> None:
    """Writes what is missing of "MODEL EXPORT DTYPE FILE.onnx" as skeletons (skeletons.py), and "MODEL EXPORT.json"
    with the sentences of those that could not be made. `only`: these of "DTYPE FILE", where not all are wanted."""
    model = MODELS[name]
    listed, said = folder / f"{name} {how}.json", {"failed": {}}
    wrapped = built(model, how, layers)
    known = skeletons.Known(wrapped.model, skeletons.fill(wrapped.model))
    known.write(folder / f"{name}.weights.json")
    with tempfile.TemporaryDirectory(prefix="encoder-") as temporary:
        exported = pathlib.Path(temporary) / "exported.onnx"
        kept = folder / f"{name} {how}.onnx"
        try:
            if kept.exists():
                exported.write_bytes(skeletons.Weights(folder / f"{name}.weights.json").restored(kept))
            else:
                with torch.no_grad():
                    _export(wrapped, model, how, exported)
                known.strip(exported, kept)
        except Exception as error:
            said["failed"] = dict.fromkeys((f"{dtype} {file}" for dtype in DTYPES for file in FILES), _sentence(error))
            exported.unlink(missing_ok=True)
        for title, path in missing(name, how, folder).items() if exported.exists() else ():
            if only and title not in only:
                continue
            dtype, file = title.split()
            full = pathlib.Path(temporary) / "made.onnx"
            try:
                MAKERS[file](exported, full, model, dtype == "float16")
                known.strip(full, path)
            except Exception as error:  # each tool fails in its own way
                said["failed"][title] = _sentence(error)
    listed.write_text(json.dumps(said, indent=1))


def missing(name: str, how: str, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The files of a model and export that are not there, by dtype and tool."""
    paths = {f"{dtype} {file}": folder / f"{name} {how} {dtype} {file}.onnx" for dtype in DTYPES for file in FILES}
    return {title: path for title, path in paths.items() if not path.exists()}


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _unfused(source: pathlib.Path, target: pathlib.Path, model: Model, half: bool) -> None:
    exported = onnx.load(source)
    onnx.save(half_files.in_half(exported) if half else exported, target)


def _onnxruntime(source: pathlib.Path, target: pathlib.Path, model: Model, half: bool) -> None:
    from onnxruntime.transformers import optimizer

    made = optimizer.optimize_model(
        os.fspath(source), model.optimizer, model.heads, model.width, opt_level=0, use_gpu=True
    )
    if half:
        made.convert_float_to_float16(keep_io_types=False, node_block_list=half_files.angles(made.model))
        made.initialize(half_files.join_casts(made.model))
    made.save_model_to_file(os.fspath(target))


def _onnxscript(source: pathlib.Path, target: pathlib.Path, model: Model, half: bool) -> None:
    import onnx_ir as ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    made, _ = optimize_for_ort(ir.load(source))
    proto = ir.to_proto(made)
    onnx.save(half_files.in_half(proto) if half else proto, target)


def _ours(source: pathlib.Path, target: pathlib.Path, model: Model, half: bool) -> None:
    """With the command's defaults, in float16 with `--target cuda`, as GPUs are timed with it. To become float16 it is
    measured on one set of inputs here and not on the command's many, which would take minutes; encoders.py compares
    what comes out."""
    import faexport
    from faexport import pipeline
    from faexport.feeds.settings import InputSet
    from faexport.files import model_io
    from faexport.precision import half_check
    from faexport.runtimes import ort_session
    from faexport.verify.reference import Reference

    options = faexport.Options(target="cuda" if half else "onnxruntime", fp16=half)
    fused, _ = pipeline.run(model_io.load(source), options)  # which is asked for fp16, unlike faexport.fuse()
    model_io.save(fused, target, source=source)
    if not half:
        return
    tensors = {n: x.numpy() for n, x in example(model, 2 if model.is_text else 1).items()}
    job = ort_session.Job(os.fspath(source), [tensors])
    reference = Reference(os.fspath(source), model_io.load(source), ort_session.SessionHere)
    reference.sets.append(InputSet("one set", tensors))
    reference.outputs += ort_session.run_here(job).outputs
    model_io.save(half_check.make(reference, target, keep_io_types=False).model, target)


MAKERS = {"unfused": _unfused, "onnxruntime": _onnxruntime, "onnxscript": _onnxscript, "ours": _ours}
