# SPDX-License-Identifier: Apache-2.0
"""Times a whole model in onnxruntime's CUDA provider: BERT-base (12 layers, float16) with a padding mask.

Three files: as PyTorch exports it (weights are random), as onnxruntime's own optimizer leaves it, as faexport does.
Their results are compared first.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import tempfile

import attention_ort
import faexport
import gpu_timer
import onnx
import onnxruntime as ort
import results_file
import torch
import transformers

FILES = ("unfused", "onnxruntime", "ours")
VOCABULARY = 1000  # small, as embeddings are not measured


class Encoder(torch.nn.Module):
    def __init__(self, config: transformers.BertConfig):
        super().__init__()
        self.model = transformers.BertModel(config, add_pooling_layer=False).eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def inputs_of(batch_size: int, seqlen: int, device: str) -> dict[str, torch.Tensor]:
    """Ids, and a mask with random lengths from a quarter of the sequence on, one of them whole."""
    lengths = torch.randint(seqlen // 4, seqlen + 1, (batch_size, 1), device=device)
    lengths[0] = seqlen
    mask = (torch.arange(seqlen, device=device)[None] < lengths).long()
    return {"input_ids": torch.randint(VOCABULARY, (batch_size, seqlen), device=device), "attention_mask": mask}


def export(folder: pathlib.Path, layers: int = 12) -> None:
    """Writes the three files, exported in float32 and converted to float16, as is usual with onnxruntime."""
    from onnxruntime.transformers import float16, optimizer

    folder.mkdir(parents=True, exist_ok=True)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, num_hidden_layers=layers, max_position_embeddings=2048, attn_implementation="sdpa"
    )
    axes = {name: {0: "batch", 1: "rows"} for name in ("input_ids", "attention_mask", "output")}
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["output"], "dynamic_axes": axes}
    exported = os.fspath(folder / "float32.onnx")
    inputs = tuple(inputs_of(2, 16, "cpu").values())
    torch.onnx.export(Encoder(config), inputs, exported, opset_version=17, dynamo=False, **names)
    unfused = float16.convert_float_to_float16(onnx.load(exported), disable_shape_infer=True)
    onnx.save(unfused, folder / "unfused.onnx")
    fused, _ = faexport.fuse(unfused)
    print(
        f"faexport fused {[node.op_type for node in fused.graph.node].count('FlashAttention')} of {layers} attentions"
    )
    onnx.save(fused, folder / "ours.onnx")
    optimized = optimizer.optimize_model(exported, "bert", num_heads=12, hidden_size=768, opt_level=0, use_gpu=True)
    print("onnxruntime's optimizer fused", optimized.get_fused_operator_statistics())
    optimized.convert_float_to_float16(keep_io_types=False)
    optimized.save_model_to_file(os.fspath(folder / "onnxruntime.onnx"))


def contestant(path: pathlib.Path, inputs: dict[str, torch.Tensor], ours: bool) -> gpu_timer.Call:
    made = attention_ort.session(str(path), ours)
    output = torch.full((*inputs["input_ids"].shape, 768), float("nan"), device="cuda", dtype=torch.float16)
    binding = attention_ort.bind(made, inputs, {"output": output})
    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def call(_: int) -> torch.Tensor:
        made.run_with_iobinding(binding, options)
        return output

    return call


def measure(folder: pathlib.Path, batch_size: int, seqlen: int, rounds: int) -> dict:
    inputs = inputs_of(batch_size, seqlen, "cuda")
    calls = {name: contestant(folder / f"{name}.onnx", inputs, name == "ours") for name in FILES}
    outputs = {name: call(0).float() for name, call in calls.items()}
    torch.cuda.synchronize()
    used = inputs["attention_mask"].bool()
    expected = outputs["unfused"][used]
    errors = {name: ((x[used] - expected).norm() / expected.norm()).item() for name, x in outputs.items()}
    times, _ = gpu_timer.in_turn(calls, 1, rounds, capture=False)
    row = {"row": f"BERT-base b{batch_size} s{seqlen}", "contestants": {}}
    for name, milliseconds in times.items():
        row["contestants"][name] = gpu_timer.summary(milliseconds) | {"difference_to_unfused": errors[name]}
        median = row["contestants"][name]["median_ms"]
        print(f"{row['row']:<24} {name:<12} {median:8.3f} ms, differs by {errors[name]:.1e}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=pathlib.Path, help="folder of the three files; exported where it has none")
    parser.add_argument("--export-only", action="store_true", help="write the files to --models and stop")
    parser.add_argument("--rounds", type=int, default=10, help="times each contestant's turn comes (%(default)s)")
    parser.add_argument("--commit", default="", help="of the sources, where this is no checkout of it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.models or pathlib.Path(temporary)
        if not all((folder / f"{name}.onnx").exists() for name in FILES):
            export(folder)
        if options.export_only:
            return
        if not torch.cuda.is_available():
            parser.error("PyTorch finds no CUDA device")
        torch.cuda.set_stream(
            torch.cuda.Stream()
        )  # onnxruntime takes none from outside but where it isn't the default one
        rows = [measure(folder, batch_size, seqlen, options.rounds) for batch_size, seqlen in ((8, 512), (2, 2048))]
    environment = results_file.environment("torch", "transformers", "onnxruntime-gpu", commit=options.commit)
    document = {"gpu": torch.cuda.get_device_name(), **environment, "rows": rows}
    print(f"written: {results_file.write('bert', document)}")


if __name__ == "__main__":
    main()
