# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="faplugin" against eager attention, loss and gradients; skipped without transformers."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from faplugin import torch as fatorch  # noqa: E402

fatorch.register_transformers()
IDS = torch.randint(5, 90, (2, 24), generator=torch.Generator().manual_seed(0))
RIGHT, LEFT = torch.ones(2, 24, dtype=torch.long), torch.ones(2, 24, dtype=torch.long)
RIGHT[1, 17:] = 0
LEFT[0, :6] = 0
PACKED = torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, -1)
SMALL = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = dict(num_key_value_heads=2, **SMALL)
GPT2 = {
    "vocab_size": 99,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
T5 = {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
FAMILIES = {
    "bert, right padding": ("BertConfig", "BertModel", {"attention_mask": RIGHT}, NO_DROPOUT | SMALL),
    "roberta": ("RobertaConfig", "RobertaModel", {"attention_mask": RIGHT}, NO_DROPOUT | SMALL),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"attention_mask": RIGHT}, GPT2),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}, GROUPED),
    "llama, packed": ("LlamaConfig", "LlamaForCausalLM", {"position_ids": PACKED, "use_cache": False}, GROUPED),
    "mistral, window, right": (
        "MistralConfig", "MistralForCausalLM", {"attention_mask": RIGHT}, dict(sliding_window=8, **GROUPED)),
    "mistral, window, left": (
        "MistralConfig", "MistralForCausalLM", {"attention_mask": LEFT}, dict(sliding_window=8, **GROUPED)),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"attention_mask": RIGHT}, GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"attention_mask": LEFT}, dict(head_dim=16, **GROUPED)),
    "gemma2, softcap and window": (
        "Gemma2Config", "Gemma2ForCausalLM", {"attention_mask": RIGHT},
        dict(head_dim=16, sliding_window=8, attn_logit_softcapping=5.0, query_pre_attn_scalar=16, **GROUPED)),
    "gpt-oss, sinks and window": (
        "GptOssConfig", "GptOssForCausalLM", {"attention_mask": RIGHT},
        dict(head_dim=16, sliding_window=8, num_local_experts=4, num_experts_per_tok=2, **GROUPED)),
    "t5, position bias": ("T5Config", "T5EncoderModel", {"attention_mask": RIGHT}, T5),
    "modernbert": (
        "ModernBertConfig", "ModernBertModel", {"attention_mask": RIGHT},
        dict(local_attention=8, pad_token_id=0, **SMALL)),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {"attention_mask": RIGHT}, dict(pad_token_id=0, **GROUPED)),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"attention_mask": RIGHT}, dict(pad_token_id=0, **GROUPED)),
}  # fmt: skip


def build(config_name: str, model_name: str, options: dict):
    """The same model twice: eager, and ours."""
    torch.manual_seed(0)
    config, kind = getattr(transformers, config_name)(**options), getattr(transformers, model_name)
    models = [
        kind._from_config(copy.deepcopy(config), attn_implementation=name).train() for name in ("eager", "faplugin")
    ]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return models


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_eager(family):
    config_name, model_name, inputs, options = FAMILIES[family]
    if not hasattr(transformers, model_name):
        pytest.skip(f"this transformers has no {model_name}")
    models = build(config_name, model_name, options)
    results = []
    for model in models:
        outputs = model(input_ids=IDS, **inputs)
        results.append(outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state)
    weights = torch.randn_like(results[0])
    if "attention_mask" in inputs:  # what padding computes counts nowhere
        weights = weights * inputs["attention_mask"][..., None]
    losses = [(result * weights).sum() for result in results]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(results[1] * (weights != 0), results[0] * (weights != 0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-3)
    ours = dict(models[1].named_parameters())
    for name, parameter in models[0].named_parameters():
        assert (parameter.grad is None) == (ours[name].grad is None), name
        if parameter.grad is not None:
            error = (parameter.grad - ours[name].grad).abs().max()
            assert error <= 1e-4 * parameter.grad.abs().max() + 1e-5, (name, float(error))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
def test_generation_with_a_cache(options):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)).eval()
    tokens = []
    for name in ("eager", "faplugin"):
        model.set_attn_implementation(name)
        tokens.append(
            model.generate(
                input_ids=IDS, attention_mask=LEFT, max_new_tokens=8, do_sample=False, pad_token_id=0, **options
            )
        )
    assert torch.equal(*tokens)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("family", ["Mistral", "Mixtral"])
def test_generation_with_a_window_whose_cache_drops_keys(family, options):
    """Weights are large enough for attention to matter in the logits, and entries have padding on the left."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(sliding_window=8, initializer_range=0.3, **GROUPED)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    found = []
    for name in ("eager", "faplugin"):
        model.set_attn_implementation(name)
        answer = model.generate(
            input_ids=IDS, attention_mask=LEFT, max_new_tokens=6, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True, **options,
        )  # fmt: skip
        found.append(torch.stack(answer.logits))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_models_with_attention_of_their_own_are_refused():
    """Bloom asks for a mask by transformers' interface, and not for attention."""
    config = transformers.BloomConfig(vocab_size=99, hidden_size=64, n_layer=1, n_head=4)
    model = transformers.BloomModel._from_config(config, attn_implementation="faplugin")
    with pytest.raises(ValueError, match="BloomConfig computes attention itself, not by transformers' attention"):
        model(input_ids=IDS, attention_mask=RIGHT)


@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks", "head_mask"])
def test_what_eager_attention_would_compute_with_is_refused(name):
    attention = transformers.AttentionInterface().get_interface("faplugin", None)
    x = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match=f"^{name} is given; expected None"):
        attention(torch.nn.Identity(), x, x, x, None, **{name: x})


def test_dropout_is_refused_while_training():
    model, _ = build("BertConfig", "BertModel", SMALL)
    model.set_attn_implementation("faplugin")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    with pytest.raises(ValueError, match=r"attention dropout is 0\.1; expected 0"):
        model(input_ids=IDS)
