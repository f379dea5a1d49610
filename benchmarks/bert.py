# SPDX-License-Identifier: Apache-2.0
"""Times a whole model in onnxruntime's CUDA provider: BERT-base (12 layers) with a padding mask, float16 and float32.

Files: as PyTorch exports it (weights are random), as faexport leaves that, and as onnxruntime's own optimizer leaves it
and an eager export of the same model, on which more of its fusions apply. Their results are compared first.
"""

from __future__ import annotations

import argparse
import json
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

FILES = ("unfused", "onnxruntime", "onnxruntime eager", "ours")
SIZES = {"float16": ((8, 512), (2, 2048)), "float32": ((8, 512), (2, 2048))}
DTYPES = {"float16": torch.float16, "float32": torch.float32}
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


def export_float32(path: pathlib.Path, layers: int, attention: str) -> None:
    """BERT as PyTorch exports it with this implementation of attention ("sdpa" or "eager"); equal weights each time."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, num_hidden_layers=layers, max_position_embeddings=2048, attn_implementation=attention
    )
    axes = {name: {0: "batch", 1: "rows"} for name in ("input_ids", "attention_mask", "output")}
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["output"], "dynamic_axes": axes}
    torch.manual_seed(0)
    encoder, inputs = Encoder(config), tuple(inputs_of(2, 16, "cpu").values())
    torch.onnx.export(encoder, inputs, os.fspath(path), opset_version=17, dynamo=False, **names)


def write_files(folder: pathlib.Path, layers: int = 12) -> dict[str, dict[str, int]]:
    """Writes FILES for each dtype as "DTYPE NAME.onnx"; float16 is converted from float32, as is usual with
    onnxruntime. Returns what was fused, by file."""
    from onnxruntime.transformers import float16, optimizer

    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, dict[str, int]] = {}
    for attention in ("sdpa", "eager"):
        export_float32(folder / f"{attention}.onnx", layers, attention)
    for dtype in DTYPES:
        half = dtype == "float16"
        exported = onnx.load(folder / "sdpa.onnx")  # anew, since the conversion changes it
        unfused = float16.convert_float_to_float16(exported, disable_shape_infer=True) if half else exported
        onnx.save(unfused, folder / f"{dtype} unfused.onnx")
        fused, _ = faexport.fuse(unfused)
        counts[f"{dtype} ours"] = {"FlashAttention": [n.op_type for n in fused.graph.node].count("FlashAttention")}
        onnx.save(fused, folder / f"{dtype} ours.onnx")
        for attention, name in (("sdpa", "onnxruntime"), ("eager", "onnxruntime eager")):
            optimized = optimizer.optimize_model(
                os.fspath(folder / f"{attention}.onnx"),
                "bert",
                num_heads=12,
                hidden_size=768,
                opt_level=0,
                use_gpu=True,
            )
            statistics = optimized.get_fused_operator_statistics()
            counts[f"{dtype} {name}"] = {op: int(count) for op, count in statistics.items() if count}
            if half:
                optimized.convert_float_to_float16(keep_io_types=False)
            optimized.save_model_to_file(os.fspath(folder / f"{dtype} {name}.onnx"))
    (folder / "fused.json").write_text(json.dumps(counts, indent=2))
    return counts


def contestant(path: pathlib.Path, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> gpu_timer.Call:
    made = attention_ort.session(str(path), path.stem.endswith("ours"))
    output = torch.full((*inputs["input_ids"].shape, 768), float("nan"), device="cuda", dtype=dtype)
    binding = attention_ort.bind(made, inputs, {"output": output})
    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def call(_: int) -> torch.Tensor:
        made.run_with_iobinding(binding, options)
        return output

    return call


def measure(folder: pathlib.Path, dtype: str, batch_size: int, seqlen: int, rounds: int) -> dict:
    inputs = inputs_of(batch_size, seqlen, "cuda")
    calls = {name: contestant(folder / f"{dtype} {name}.onnx", inputs, DTYPES[dtype]) for name in FILES}
    outputs = {name: call(0).float() for name, call in calls.items()}
    torch.cuda.synchronize()
    used = inputs["attention_mask"].bool()
    expected = outputs["unfused"][used]
    errors = {name: ((x[used] - expected).norm() / expected.norm()).item() for name, x in outputs.items()}
    times, _ = gpu_timer.in_turn(calls, 1, rounds, capture=False)
    row = {"row": f"BERT-base b{batch_size} s{seqlen}", "dtype": dtype, "contestants": {}}
    for name, milliseconds in times.items():
        row["contestants"][name] = gpu_timer.summary(milliseconds) | {"difference_to_unfused": errors[name]}
        median = row["contestants"][name]["median_ms"]
        print(f"{dtype} {row['row']:<24} {name:<18} {median:8.3f} ms, differs by {errors[name]:.1e}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=pathlib.Path, help="folder of the files; they are made where it has none")
    parser.add_argument("--export-only", action="store_true", help="write the files to --models and stop")
    parser.add_argument("--rounds", type=int, default=10, help="times each contestant's turn comes (%(default)s)")
    parser.add_argument("--commit", default="", help="of the sources, where this is no checkout of it")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results, not to build/benchmarks")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.models or pathlib.Path(temporary)
        counts = folder / "fused.json"  # written last
        fused = json.loads(counts.read_text()) if counts.exists() else write_files(folder)
        print(json.dumps(fused, indent=2))
        if options.export_only:
            return
        if not torch.cuda.is_available():
            parser.error("PyTorch finds no CUDA device")
        # onnxruntime takes a stream from outside only where it isn't the default one.
        torch.cuda.set_stream(torch.cuda.Stream())
        rows = [
            measure(folder, dtype, *size, rounds=options.rounds) for dtype, sizes in SIZES.items() for size in sizes
        ]
    environment = results_file.environment("torch", "transformers", "onnxruntime-gpu", commit=options.commit)
    document = {"gpu": torch.cuda.get_device_name(), **environment, "fused": fused, "rows": rows}
    print(f"written: {results_file.write('bert', document, options.record)}")


if __name__ == "__main__":
    main()
