"""A random two-layer Llama, its word tokenizer and a text for them: what the tests of the command run on."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(30)]


def tiny_model(**others) -> LlamaForCausalLM:
    """The model, or one with other settings in its config."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(WORDS) + 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | others)).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["[UNK]", "[PAD]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


def tiny_text(paragraphs: int = 50, words: int = 20, seed: int = 0) -> str:
    draw = random.Random(seed)
    return "\n\n".join(" ".join(draw.choices(WORDS, k=words)) for _ in range(paragraphs))


def write_inputs(folder: Path) -> Path:
    """Write the model with its tokenizer, `model`, and a text, `text.txt`, into a folder, and return the folder."""
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(tiny_text(), encoding="utf-8")
    return folder
