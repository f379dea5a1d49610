# SPDX-License-Identifier: Apache-2.0
"""Runs `faexport bench` on whole models: BERT-base on padded batches, and layers of GPT-3 1.3B on prompts.

Models of model_table.py as PyTorch's exporter writes them, float16, random weights; they are made where --models has
none. The command's JSON and pictures are kept; docs/faexport.md's tables are made from those of a recorded run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import results_file
import skeletons

EXPORTS = ("dynamo", "eager")  # the first that there is; that of PyTorch's default exporter is made
FILE = "float16 unfused"


@dataclasses.dataclass(frozen=True)
class Example:
    name: str  # in model_table.MODELS
    sizes: tuple[tuple[int, int], ...]  # batch size, length
    padded: bool = False


EXAMPLES = (
    Example("bert", ((8, 128), (8, 512), (8, 2048)), padded=True),
    Example("gpt3", ((1, 512), (1, 1024), (1, 2048))),
)


def whole_model(name: str, folder: pathlib.Path, target: pathlib.Path, layers: int) -> tuple[str, str]:
    """Writes the model with its weights, and returns how it was exported, and by what. Raises SystemExit."""
    skeletons_by_export = {how: folder / f"{name} {how} {FILE}.onnx" for how in EXPORTS}
    how = next((how for how, path in skeletons_by_export.items() if path.exists()), EXPORTS[0])
    if not skeletons_by_export[how].exists():
        import encoder_models

        folder.mkdir(parents=True, exist_ok=True)
        encoder_models.write_files(name, how, folder, layers, only=[FILE])
    if not skeletons_by_export[how].exists():
        raise SystemExit((folder / f"{name} {how}.json").read_text())
    target.write_bytes(skeletons.Weights(folder / f"{name}.weights.json").restored(skeletons_by_export[how]))
    return how, skeletons.exporters([skeletons_by_export[how]])[0]


def run(example: Example, model: pathlib.Path, picture: pathlib.Path, options: argparse.Namespace) -> dict:
    """The JSON of the command."""
    command = [sys.executable, "-m", "faexport", "bench", model, "--json", "--svg", picture]
    command += ["--device", options.device, "--runs", str(options.runs), "--quiet"]
    command += [f"--shape=input_ids:{batch_size}x{length}" for batch_size, length in example.sizes]
    command += ["--padded"] if example.padded else []
    done = subprocess.run(list(map(os.fspath, command)), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"faexport bench ended with {done.returncode}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=pathlib.Path, help="folder of the files; they are made where it has none")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=0, help="of each model, to try this out; 0: all (%(default)s)")
    parser.add_argument("--longest", type=int, default=1 << 20, help="leave longer ones out, to try this out")
    parser.add_argument("--runs", type=int, default=20, help="of each model at each size (default: %(default)s)")
    results_file.add_options(parser)
    options = parser.parse_args()
    packages = ("torch", "transformers", "onnxruntime-gpu", "onnxruntime")
    document = results_file.environment(*packages, commit=options.commit) | {"models": [], "exported_by": []}
    if options.device == "cuda":
        import torch

        document["gpu"] = torch.cuda.get_device_name()
    from model_table import MODELS

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.models or pathlib.Path(temporary)
        for example in EXAMPLES:
            model = pathlib.Path(temporary) / f"{example.name}.onnx"
            how, exporter = whole_model(example.name, folder, model, options.layers)
            sizes = tuple(size for size in example.sizes if size[1] <= options.longest)
            picture = pathlib.Path(temporary) / f"{example.name}.svg"
            found = run(dataclasses.replace(example, sizes=sizes), model, picture, options)
            said = {
                "title": MODELS[example.name].name,
                "dtype": "float16",
                "export": how,
                "picture": f"bench_{picture.name}",
            }
            document["models"].append(said | found | {"model": model.name})
            document["exported_by"] = sorted({*document["exported_by"], exporter})
            path = results_file.write("bench", document, options.record)
            path.with_name(said["picture"]).write_text(picture.read_text())
            model.unlink()
    print(f"written: {path}")


if __name__ == "__main__":
    main()
