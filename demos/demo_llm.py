# SPDX-License-Identifier: Apache-2.0
"""A decoder in onnxruntime-genai, before and after: `make demo-llm`.

Builds a small Llama of random weights with genai's own model builder, rewrites its folder with faexport, and generates
from both with the same program. Exits 1 where a token differs, or a logit by more than 1e-3.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import common
import numpy as np
import onnxruntime_genai as genai
import rich.box
import rich.console
import rich.table

VOCABULARY = 1000
PROMPTS = ((17, 4, 250, 9, 88, 31, 5), (6, 7), (400, 41, 42, 43))  # shorter ones are padded on the right
MAX_DIFFERENCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Generated:
    tokens: list[list[int]]
    logits: np.ndarray  # [steps, B, 1, V] or as genai gives them
    tokens_per_second: float


def checkpoint(folder: pathlib.Path) -> None:
    """A model of four layers, 8 query heads on 2 key heads of 64, and a tokenizer of made-up words."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    special = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 3}
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        **special,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    words = {f"word{index}": index for index in range(VOCABULARY - 3)} | {"<pad>": 997, "<s>": 998, "</s>": 999}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def build(folder: pathlib.Path, precision: str) -> None:
    """The model as genai wants it, unless it is there from an earlier run."""
    if (folder / "genai_config.json").exists():
        return
    source = folder.with_name(f"{folder.name}_checkpoint")
    print(f"building {folder} with genai's model builder", flush=True)
    checkpoint(source)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", folder, "-p", precision]
    command += ["-e", "cpu", "-c", folder.with_name("genai_cache")]
    done = subprocess.run(list(map(os.fspath, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: genai's model builder failed:\n{done.stderr[-2000:]}")


def rewrite(folder: pathlib.Path) -> tuple[pathlib.Path, dict]:
    """Runs `faexport FOLDER`, as a user would. Returns the new folder and the report."""
    target = folder.with_name(f"{folder.name}.fa")
    shutil.rmtree(target, ignore_errors=True)
    report = folder.with_name(f"{folder.name}.json")
    print(f"$ faexport {folder}", flush=True)
    command = [sys.executable, "-m", "faexport", os.fspath(folder), "--report", os.fspath(report)]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)
    return target, json.loads(report.read_text("utf-8"))


def generate(folder: pathlib.Path, batch: int, steps: int) -> Generated:
    """Greedy tokens. The same program for any folder."""
    model = genai.Model(os.fspath(folder))
    longest = max(map(len, PROMPTS[:batch]))
    prompts = [[*prompt, *[VOCABULARY - 3] * (longest - len(prompt))] for prompt in PROMPTS[:batch]]
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=longest + steps + 1, batch_size=batch)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(prompts, np.int32))
    generator.generate_next_token()
    logits, start = [], time.perf_counter()
    for _ in range(steps - 1):
        if generator.is_done():
            break
        generator.generate_next_token()
        logits.append(np.array(generator.get_logits()))
    seconds = time.perf_counter() - start
    tokens = [[int(token) for token in generator.get_sequence(index)] for index in range(batch)]
    return Generated(tokens, np.stack(logits), batch * len(logits) / seconds)


def compare(before: pathlib.Path, after: pathlib.Path, steps: int) -> bool:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for title in ("batch", "tokens", "same", "largest difference of a logit", "tokens/s before", "after"):
        table.add_column(title, justify="right")
    good = True
    for batch in (1, len(PROMPTS)):
        old, new = (generate(folder, batch, steps) for folder in (before, after))
        same = old.tokens == new.tokens and old.logits.shape == new.logits.shape
        difference = float(np.abs(old.logits - new.logits).max()) if same else float("inf")
        good &= same and difference <= MAX_DIFFERENCE
        rates = (f"{run.tokens_per_second:.0f}" for run in (old, new))
        table.add_row(str(batch), str(batch * len(old.logits)), "yes" if same else "NO", f"{difference:.1e}", *rates)
    rich.console.Console(highlight=False).print(table)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=pathlib.Path, default=common.OUTPUT, help="folder for the results (default: %(default)s)"
    )
    parser.add_argument("--precision", choices=["fp32", "int4"], default="fp32", help="of the weights")
    parser.add_argument("--steps", type=int, default=128, help="tokens to generate (default: %(default)s)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    folder = options.output / f"llama_{options.precision}"
    build(folder, options.precision)
    target, report = rewrite(folder)
    good = compare(folder, target, options.steps)
    return common.verdict(good and report["num_refused"] == 0)


if __name__ == "__main__":
    sys.exit(main())
