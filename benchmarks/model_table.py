# SPDX-License-Identifier: Apache-2.0
"""The models that encoders.py and models.py time: what each is built from, its inputs and its sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import transformers

VOCABULARY = 1000  # small, as embeddings are not measured
TEXT = ((1, 128), (8, 128), (32, 128), (8, 384), (8, 512), (2, 2048))
ALL_EXPORTS = ("eager", "sdpa", "dynamo")  # TorchScript's exporter with either attention; torch.export's with sdpa
TWO_EXPORTS = ("eager", "dynamo")  # the one that onnxruntime's optimizer knows, and PyTorch's default
Inputs = dict[str, torch.Tensor]


def text(batch_size: int, length: int) -> Inputs:
    """Token ids and a mask of random lengths from a quarter of the sequence on, one of them whole."""
    lengths = torch.randint(length // 4, length + 1, (batch_size, 1))
    lengths[0] = length
    mask = (torch.arange(length)[None] < lengths).long()
    return {"input_ids": torch.randint(3, VOCABULARY, (batch_size, length)), "attention_mask": mask}


def pixels(batch_size: int, length: int) -> Inputs:
    return {"pixel_values": torch.randn(batch_size, 3, length, length)}


def sound(batch_size: int, length: int) -> Inputs:
    return {"input_features": torch.randn(batch_size, 80, length)}


def fine_sound(batch_size: int, length: int) -> Inputs:
    return {"input_features": torch.randn(batch_size, 128, length)}


def latents(batch_size: int, length: int) -> Inputs:
    """An image of length x length in 640 channels, and the prompt's 77 tokens."""
    states = torch.randn(batch_size, 640, length, length)
    return {"hidden_states": states, "encoder_hidden_states": torch.randn(batch_size, 77, 2048)}


def image_and_prompt(batch_size: int, length: int) -> Inputs:
    """`length` tokens, 512 of them the prompt's."""
    side = int((length - 512) ** 0.5)
    places = torch.arange(side, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(torch.zeros(1), places, places, indexing="ij"), -1)
    return {
        "hidden_states": torch.randn(batch_size, side * side, 64),
        "encoder_hidden_states": torch.randn(batch_size, 512, 4096),
        "pooled_projections": torch.randn(batch_size, 768),
        "timestep": torch.rand(batch_size),
        "img_ids": grid.reshape(-1, 3),
        "txt_ids": torch.zeros(512, 3),
    }


@dataclasses.dataclass(frozen=True)
class Model:
    title: str
    layers: int
    config: Callable[[int], Any]  # argument: layers
    model: Callable[[Any], torch.nn.Module]  # argument: the config, whose _attn_implementation is "eager" or "sdpa"
    inputs: Callable[[int, int], Inputs]  # arguments: batch size, length
    optimizer: str  # what onnxruntime's optimizer calls such a model
    heads: int
    width: int
    sizes: Sequence[tuple[int, int]]  # batch size, length
    cpu_sizes: Sequence[tuple[int, int]] = ()
    exports: Sequence[str] = ALL_EXPORTS
    longest: int = 2048  # that a model of text takes
    layers_of_all: int = 0  # where `layers` is a part, so that a file stays under 2 GB
    batch_axes: Sequence[str] = ()  # the inputs whose first axis is the batch, where that isn't all

    @property
    def name(self) -> str:
        """The title, and how much of the model it is."""
        return f"{self.title}, {self.layers} of {self.layers_of_all} layers" if self.layers_of_all else self.title

    @property
    def is_text(self) -> bool:
        return self.inputs is text

    def num_scores(self, batch_size: int, length: int) -> int:
        """Elements of a layer's scores, of text; 0: not known."""
        return batch_size * self.heads * length**2 if self.is_text else 0


def _bert(title: str, layers: int, width: int, heads: int, sizes: Sequence[tuple[int, int]], **others: Any) -> Model:
    longest = max(2048, *(length for _, length in sizes))
    return Model(
        title,
        layers,
        lambda count: transformers.BertConfig(
            vocab_size=VOCABULARY, num_hidden_layers=count, hidden_size=width, num_attention_heads=heads,
            intermediate_size=4 * width, max_position_embeddings=longest,
        ),
        lambda config: transformers.BertModel(config, add_pooling_layer=False),
        *(text, "bert", heads, width, sizes),
        longest=longest,
        **others,
    )  # fmt: skip


def _vit(title: str, layers: int, width: int, heads: int, sizes: Sequence[tuple[int, int]], **others: Any) -> Model:
    """Of one image size, which its table of positions has; `patch` is 16 but where the others say so."""
    patch = others.pop("patch", 16)
    return Model(
        title,
        layers,
        lambda count: transformers.ViTConfig(
            num_hidden_layers=count, hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width,
            image_size=sizes[0][1], patch_size=patch,
        ),
        lambda config: transformers.ViTModel(config, add_pooling_layer=False),
        *(pixels, "vit", heads, width, sizes),
        **others,
    )  # fmt: skip


def _clip_text(title: str, width: int, heads: int, sizes: Sequence[tuple[int, int]], **others: Any) -> Model:
    return Model(
        title,
        12,
        lambda count: transformers.CLIPTextConfig(
            vocab_size=VOCABULARY, num_hidden_layers=count, hidden_size=width, num_attention_heads=heads,
            intermediate_size=4 * width,
        ),
        transformers.CLIPTextModel,
        *(text, "clip", heads, width, sizes),
        longest=77,
        **others,
    )  # fmt: skip


def _whisper(title: str, layers: int, width: int, heads: int, inputs: Callable, **others: Any) -> Model:
    return Model(
        title,
        layers,
        lambda count: transformers.WhisperConfig(
            vocab_size=VOCABULARY, d_model=width, encoder_layers=count, encoder_attention_heads=heads,
            encoder_ffn_dim=4 * width, decoder_layers=1, decoder_attention_heads=heads, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1, num_mel_bins=inputs(1, 2)["input_features"].shape[1],
        ),
        lambda config: transformers.WhisperModel(config).encoder,
        *(inputs, "bart", heads, width, ((1, 3000), (8, 3000))),
        **others,
    )  # fmt: skip


ENCODERS = {
    "bert": _bert("BERT-base", 12, 768, 12, TEXT, cpu_sizes=((1, 128), (1, 512))),
    "minilm": _bert("MiniLM-L6 sentence encoder", 6, 384, 12, TEXT, cpu_sizes=((1, 128), (1, 512))),
    "distilbert": Model(
        "DistilBERT",
        6,
        lambda count: transformers.DistilBertConfig(
            vocab_size=VOCABULARY, n_layers=count, max_position_embeddings=2048
        ),
        transformers.DistilBertModel,
        *(text, "bert", 12, 768, TEXT, ((1, 128), (1, 512))),
    ),
    "vit": _vit("ViT-B/16", 12, 768, 12, ((1, 224), (8, 224), (32, 224)), cpu_sizes=((1, 224),)),
    "clip_text": _clip_text("CLIP text", 512, 8, ((1, 77), (8, 77), (32, 77)), cpu_sizes=((1, 77),)),
    "whisper": _whisper("Whisper-base encoder", 6, 512, 8, sound, cpu_sizes=((1, 3000),)),
    "t5": Model(
        "T5-base encoder",
        12,
        lambda count: transformers.T5Config(
            vocab_size=VOCABULARY, d_model=768, d_kv=64, d_ff=3072, num_heads=12, num_layers=count
        ),
        transformers.T5EncoderModel,
        *(text, "t5", 12, 768, TEXT, ((1, 128), (1, 512))),
    ),
}


def _two_layers_of_unet(config: SimpleNamespace) -> torch.nn.Module:
    from diffusers import Transformer2DModel
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    made = Transformer2DModel(
        num_attention_heads=10, attention_head_dim=64, in_channels=640, num_layers=config.layers,
        cross_attention_dim=2048, use_linear_projection=True,
    )  # fmt: skip
    for module in made.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor() if config._attn_implementation == "eager" else AttnProcessor2_0())
    return made


def _flux(config: SimpleNamespace) -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(num_layers=config.layers, num_single_layers=0)


# The models of FlashAttention's claims, and what people export beside them.
CLAIMS = {
    "bert_large": _bert("BERT-large", 24, 1024, 16, ((8, 128), (8, 512)), exports=TWO_EXPORTS),
    "vit_large_224": _vit("ViT-L/16", 8, 1024, 16, ((8, 224),), exports=TWO_EXPORTS, layers_of_all=24),
    "vit_large_384": _vit("ViT-L/16", 8, 1024, 16, ((8, 384),), exports=TWO_EXPORTS, layers_of_all=24),
    "vit_large_518": _vit("ViT-L/14", 8, 1024, 16, ((8, 518),), patch=14, exports=TWO_EXPORTS, layers_of_all=24),
    "clip_text_large": _clip_text("CLIP-L text", 768, 12, ((8, 77),), exports=TWO_EXPORTS),
    "whisper_large": _whisper("Whisper-large encoder", 8, 1280, 20, fine_sound, exports=TWO_EXPORTS, layers_of_all=32),
    "sam": Model(
        "SAM-B image encoder",
        12,
        lambda count: transformers.SamVisionConfig(
            num_hidden_layers=count,
            global_attn_indexes=list(range(2, 12, 3)) if count == 12 else [count - 1],
            initializer_range=0.02,  # by default 1e-10: weights that are as good as zero
        ),
        transformers.SamVisionModel,
        *(pixels, "vit", 12, 768, ((1, 1024),)),
        exports=TWO_EXPORTS,
    ),
    "sdxl": Model(
        "SDXL attention blocks",
        2,
        lambda count: SimpleNamespace(layers=count),
        _two_layers_of_unet,
        *(latents, "unet", 10, 640, ((2, 64),)),
        exports=TWO_EXPORTS,
    ),
    "flux": Model(
        "Flux block of two streams",
        1,
        lambda count: SimpleNamespace(layers=count),
        _flux,
        *(image_and_prompt, "mmdit", 24, 3072, ((1, 4608),)),
        exports=("dynamo",),  # it has one attention, PyTorch's
        batch_axes=("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
    ),
    "swin": Model(
        "Swin-B",
        24,
        lambda count: transformers.SwinConfig(
            embed_dim=128, depths=[2, 2, 18, 2] if count == 24 else [2, 2, 2, 2], num_heads=[4, 8, 16, 32]
        ),
        lambda config: transformers.SwinModel(config, add_pooling_layer=False),
        *(pixels, "swin", 4, 128, ((8, 224),)),
        exports=TWO_EXPORTS,
    ),
    "long_range": _bert("Long-range encoder", 2, 64, 2, ((16, 1024), (16, 2048), (16, 4096)), exports=TWO_EXPORTS),
    "gpt3": Model(
        "GPT-3 1.3B",
        4,
        lambda count: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_layer=count, n_embd=2048, n_head=16, n_positions=2048, use_cache=False
        ),
        transformers.GPT2Model,
        *(text, "gpt2", 16, 2048, ((1, 2048),)),
        exports=TWO_EXPORTS,
        layers_of_all=24,
    ),
    "mistral": Model(
        "Mistral-7B",
        1,
        lambda count: transformers.MistralConfig(
            vocab_size=VOCABULARY, num_hidden_layers=count, sliding_window=4096, use_cache=False
        ),
        transformers.MistralModel,
        *(text, "gpt2", 32, 4096, ((1, 4096), (1, 16384), (1, 32768))),
        exports=TWO_EXPORTS,
        longest=32768,
        layers_of_all=32,
    ),
}
TABLES = {"encoders": ENCODERS, "models": CLAIMS}
MODELS = ENCODERS | CLAIMS
