"""A tiny Qwen-MoE."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

EXPERTS = "model.layers.0.mlp.experts"


def a_mixture() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.2}
    tokens = {"max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes | heads | experts | tokens))


def write_checkpoint(folder: Path) -> str:
    a_mixture().save_pretrained(folder)
    return str(folder)
