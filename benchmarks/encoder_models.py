# SPDX-License-Identifier: Apache-2.0
"""The files that encoders.py times: encoders of transformers as three of PyTorch's exporters write them, with random
weights, and what onnxruntime's optimizer, onnxscript and faexport make of each, in float32 and float16.

All of one encoder and export is made by one process, `write_files`; what fails there is written down, and the rest goes
on.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Callable

import onnx
import skeletons
import torch
import transformers

EXPORTS = ("eager", "sdpa", "dynamo")  # TorchScript's exporter with either attention; torch.export's with sdpa
FILES = ("unfused", "onnxruntime", "onnxscript", "ours")
DTYPES = ("float16", "float32")
VOCABULARY = 1000  # small, as embeddings are not measured
TEXT = ((1, 128), (8, 128), (32, 128), (8, 384), (8, 512), (2, 2048))
FUSED_DOMAINS = ("com.microsoft", "faexport")


@dataclasses.dataclass(frozen=True)
class Encoder:
    title: str
    config: Callable[[int], transformers.PretrainedConfig]  # argument: layers; 0: all that it has
    model: Callable[[transformers.PretrainedConfig], torch.nn.Module]
    kind: str  # text, pixels or sound
    optimizer: str  # what onnxruntime's optimizer calls such a model
    heads: int
    width: int
    sizes: tuple[tuple[int, int], ...]  # batch, length
    cpu_sizes: tuple[tuple[int, int], ...]
    masked: bool = True  # has an attention_mask


def _layers(number: int, default: int) -> int:
    return number or default


ENCODERS = {
    "bert": Encoder(
        "BERT-base",
        lambda layers: transformers.BertConfig(
            vocab_size=VOCABULARY, num_hidden_layers=_layers(layers, 12), max_position_embeddings=2048
        ),
        lambda config: transformers.BertModel(config, add_pooling_layer=False),
        *("text", "bert", 12, 768, TEXT, ((1, 128), (1, 512))),
    ),
    "distilbert": Encoder(
        "DistilBERT",
        lambda layers: transformers.DistilBertConfig(
            vocab_size=VOCABULARY, n_layers=_layers(layers, 6), max_position_embeddings=2048
        ),
        transformers.DistilBertModel,
        *("text", "bert", 12, 768, TEXT, ((1, 128), (1, 512))),
    ),
    "vit": Encoder(
        "ViT-B/16",
        lambda layers: transformers.ViTConfig(num_hidden_layers=_layers(layers, 12)),
        lambda config: transformers.ViTModel(config, add_pooling_layer=False),
        *("pixels", "vit", 12, 768, ((1, 224), (8, 224), (32, 224)), ((1, 224),)),
        masked=False,
    ),
    "clip_text": Encoder(
        "CLIP text",
        lambda layers: transformers.CLIPTextConfig(vocab_size=VOCABULARY, num_hidden_layers=_layers(layers, 12)),
        transformers.CLIPTextModel,
        *("text", "clip", 8, 512, ((1, 77), (8, 77), (32, 77)), ((1, 77),)),
    ),
    "whisper": Encoder(
        "Whisper-base encoder",
        lambda layers: transformers.WhisperConfig(
            vocab_size=VOCABULARY, d_model=512, encoder_layers=_layers(layers, 6), encoder_attention_heads=8,
            encoder_ffn_dim=2048, decoder_layers=1, decoder_attention_heads=8, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1,
        ),
        lambda config: transformers.WhisperModel(config).encoder,
        *("sound", "bart", 8, 512, ((1, 3000), (8, 3000)), ((1, 3000),)),
        masked=False,
    ),
    "t5": Encoder(
        "T5-base encoder",
        lambda layers: transformers.T5Config(
            vocab_size=VOCABULARY, d_model=768, d_kv=64, d_ff=3072, num_heads=12, num_layers=_layers(layers, 12)
        ),
        transformers.T5EncoderModel,
        *("text", "t5", 12, 768, TEXT, ((1, 128), (1, 512))),
    ),
}  # fmt: skip


class _Wrapped(torch.nn.Module):
    """The encoder with positional inputs and one output."""

    def __init__(self, model: torch.nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model.eval(), names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True))).last_hidden_state


def inputs_of(encoder: Encoder, batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """Random inputs; masks have random lengths from a quarter of the sequence on, one of them whole."""
    if encoder.kind == "pixels":
        return {"pixel_values": torch.randn(batch_size, 3, length, length)}
    if encoder.kind == "sound":
        return {"input_features": torch.randn(batch_size, 80, length)}
    lengths = torch.randint(length // 4, length + 1, (batch_size, 1))
    lengths[0] = length
    mask = (torch.arange(length)[None] < lengths).long()
    return {"input_ids": torch.randint(3, VOCABULARY, (batch_size, length)), "attention_mask": mask}


def _model(encoder: Encoder, how: str, layers: int) -> tuple[_Wrapped, list[str], skeletons.Known]:
    """With equal weights for each way; the names of the inputs, and what its weights are known by."""
    config = encoder.config(layers)
    config._attn_implementation = "eager" if how == "eager" else "sdpa"
    names = list(inputs_of(encoder, 1, encoder.sizes[0][1]))
    torch.manual_seed(0)
    model = _Wrapped(encoder.model(config), names)
    return model, names, skeletons.Known(model.model, skeletons.fill(model.model))


def _export(model: _Wrapped, encoder: Encoder, names: list[str], how: str, path: pathlib.Path) -> None:
    inputs = inputs_of(encoder, 2, encoder.sizes[0][1])
    text = encoder.kind == "text"
    arguments = {"input_names": names, "output_names": ["output"]}
    if how == "dynamo":
        batch, rows = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("rows", min=2, max=2048)
        if text and encoder.title == "CLIP text":
            rows = torch.export.Dim("rows", min=2, max=77)
        axes = tuple({0: batch, 1: rows} if text else {0: batch} for _ in names)
        shapes = (axes,)  # of *tensors
        torch.onnx.export(
            model, tuple(inputs.values()), os.fspath(path), dynamo=True, opset_version=18, dynamic_shapes=shapes,
            external_data=False, verbose=False, **arguments,
        )  # fmt: skip
        return
    dynamic = {name: {0: "batch", 1: "rows"} if text else {0: "batch"} for name in (*names, "output")}
    torch.onnx.export(
        model,
        tuple(inputs.values()),
        os.fspath(path),
        dynamo=False,
        opset_version=17,
        dynamic_axes=dynamic,
        **arguments,
    )


def write_files(name: str, how: str, folder: pathlib.Path, layers: int) -> None:
    """Writes what is missing of "ENCODER EXPORT DTYPE FILE.onnx" as skeletons (skeletons.py), and "ENCODER EXPORT.json"
    with the fused operators of each file and the sentences of those that could not be made."""
    encoder = ENCODERS[name]
    listed, said = folder / f"{name} {how}.json", {"fused": {}, "failed": {}}
    if listed.exists():
        said["fused"] = json.loads(listed.read_text())["fused"]
    model, names, known = _model(encoder, how, layers)
    known.write(folder / f"{name}.weights.json")
    with tempfile.TemporaryDirectory(prefix="encoder-") as temporary:
        exported = pathlib.Path(temporary) / "exported.onnx"
        kept = folder / f"{name} {how}.onnx"
        try:
            if kept.exists():
                exported.write_bytes(skeletons.Weights(folder / f"{name}.weights.json").restored(kept))
            else:
                with torch.no_grad():
                    _export(model, encoder, names, how, exported)
                known.strip(exported, kept)
        except Exception as error:
            said["failed"] = dict.fromkeys((f"{dtype} {file}" for dtype in DTYPES for file in FILES), _sentence(error))
            exported.unlink(missing_ok=True)
        for title, path in missing(name, how, folder).items() if exported.exists() else ():
            dtype, file = title.split()
            full = pathlib.Path(temporary) / "made.onnx"
            try:
                MAKERS[file](exported, full, encoder, dtype == "float16")
                known.strip(full, path)
                nodes = onnx.load(path, load_external_data=False).graph.node
                counts = collections.Counter(node.op_type for node in nodes if node.domain in FUSED_DOMAINS)
                said["fused"][title] = dict(sorted(counts.items()))
            except Exception as error:  # each tool fails in its own way
                said["failed"][title] = _sentence(error)
    listed.write_text(json.dumps(said, indent=1))


def missing(name: str, how: str, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The files of an encoder and export that are not there, by dtype and tool."""
    paths = {f"{dtype} {file}": folder / f"{name} {how} {dtype} {file}.onnx" for dtype in DTYPES for file in FILES}
    return {title: path for title, path in paths.items() if not path.exists()}


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _in_half(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.transformers import float16

    return float16.convert_float_to_float16(model, keep_io_types=False)


def _unfused(source: pathlib.Path, target: pathlib.Path, encoder: Encoder, half: bool) -> None:
    model = onnx.load(source)
    onnx.save(_in_half(model) if half else model, target)


def _onnxruntime(source: pathlib.Path, target: pathlib.Path, encoder: Encoder, half: bool) -> None:
    from onnxruntime.transformers import optimizer

    made = optimizer.optimize_model(
        os.fspath(source), encoder.optimizer, encoder.heads, encoder.width, opt_level=0, use_gpu=True
    )
    if half:
        made.convert_float_to_float16(keep_io_types=False)
    made.save_model_to_file(os.fspath(target))


def _onnxscript(source: pathlib.Path, target: pathlib.Path, encoder: Encoder, half: bool) -> None:
    import onnx_ir as ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    made, _ = optimize_for_ort(ir.load(source))
    proto = ir.to_proto(made)
    onnx.save(_in_half(proto) if half else proto, target)


def _ours(source: pathlib.Path, target: pathlib.Path, encoder: Encoder, half: bool) -> None:
    """With the command's defaults. To become float16 it is measured on one set of inputs here and not on the command's
    many, which would take minutes; encoders.py compares what comes out."""
    import faexport
    from faexport import half_check, model_io, ort_session
    from faexport.reference import Reference
    from faexport.settings import InputSet

    fused, _ = faexport.fuse(source)
    model_io.save(fused, target, source=source)
    if not half:
        return
    tensors = {n: x.numpy() for n, x in inputs_of(encoder, 2, encoder.sizes[0][1]).items()}
    job = ort_session.Job(os.fspath(source), [tensors])
    reference = Reference(os.fspath(source), model_io.load(source), ort_session.SessionHere)
    reference.sets.append(InputSet("one set", tensors))
    reference.outputs += ort_session.run_here(job).outputs
    model_io.save(half_check.make(reference, target, keep_io_types=False).model, target)


MAKERS = {"unfused": _unfused, "onnxruntime": _onnxruntime, "onnxscript": _onnxscript, "ours": _ours}
