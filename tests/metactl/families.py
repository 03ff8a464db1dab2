"""Small models of other people's families, for the adapters' tests."""

import copy

import torch
import transformers

from metactl.adapters.trial import make_trial

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 1}
FAMILIES = {
    "llama": transformers.LlamaConfig(**GROUPED),
    "mistral": transformers.MistralConfig(**GROUPED),
    "qwen2": transformers.Qwen2Config(**GROUPED),
    "qwen3": transformers.Qwen3Config(**GROUPED, head_dim=8),
    "gemma": transformers.GemmaConfig(**GROUPED, head_dim=8),
    "gemma3": transformers.Gemma3TextConfig(**{**GROUPED, "num_hidden_layers": 6}, head_dim=8),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL, rotary_pct=0.5),
    "gpt2": transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=64),
}
WITH_ROPE = [name for name in FAMILIES if name != "gpt2"]


def build(family, attention="eager"):
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.train()


def output(model, training=False):
    return make_trial(model)(training)
