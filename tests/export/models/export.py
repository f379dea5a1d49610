# SPDX-License-Identifier: Apache-2.0
"""Makes the models of this folder: architectures of transformers with random weights, as small as they go.

    python tests/export/models/export.py    (needs torch and transformers; what it writes is committed)

Tests only read them: mutations.py.
"""

from __future__ import annotations

import pathlib

import onnx
import torch
import transformers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

FOLDER = pathlib.Path(__file__).parent
IDS = torch.arange(10).reshape(2, 5) % 11
MASK = torch.ones(2, 5, dtype=torch.int64)
TEXT = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}}


class First(torch.nn.Module):
    """The first output alone, whatever a model returns."""

    def __init__(self, model: torch.nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=False)[0]


def export(name: str, model: torch.nn.Module, inputs: dict[str, torch.Tensor], axes: dict, **how: object) -> None:
    module = First(model.eval(), list(inputs)).eval()
    if how["dynamo"]:
        how["dynamic_shapes"] = {"inputs": tuple(axes[key] for key in inputs)}
    else:
        how["dynamic_axes"] = {key: axes[key] for key in inputs}
    torch.onnx.export(
        module, tuple(inputs.values()), FOLDER / f"{name}.onnx", input_names=list(inputs), output_names=["output"],
        external_data=False, **how,
    )  # fmt: skip
    made = onnx.load(FOLDER / f"{name}.onnx")
    for part in (made, made.graph, *made.graph.node, *made.graph.value_info, *made.graph.input, *made.graph.output):
        part.ClearField("metadata_props")  # where in the Python source a node comes from
        part.ClearField("doc_string")
    onnx.save(made, FOLDER / f"{name}.onnx")


def main() -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    text = {"vocab_size": 11, "max_position_embeddings": 12}
    both = {"input_ids": IDS, "attention_mask": MASK}
    script, dynamo = {"dynamo": False, "opset_version": 14}, {"dynamo": True, "opset_version": 18}
    bert = BertModel(BertConfig(**small, **text, attn_implementation="eager"), add_pooling_layer=False)
    export("bert", bert, both, TEXT, **script)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=12, n_embd=8, n_layer=1, n_head=2, use_cache=False))
    export("gpt2", gpt2, both, TEXT, **script)
    llama = LlamaModel(LlamaConfig(**small, **text, num_key_value_heads=1, use_cache=False))
    export("llama", llama, both, TEXT, **dynamo)
    t5 = T5EncoderModel(T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    export("t5", t5, both, TEXT, **script)
    vit = ViTModel(ViTConfig(**small, image_size=8, patch_size=4), add_pooling_layer=False)
    export("vit", vit, {"pixel_values": torch.rand(2, 3, 8, 8)}, {"pixel_values": {0: "batch"}}, **dynamo)
    print(torch.__version__, transformers.__version__)


if __name__ == "__main__":
    main()
