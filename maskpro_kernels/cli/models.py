"""Models in and out; transformers takes seconds to import, and a wrong argument or --help does not wait for it."""

from __future__ import annotations

from pathlib import Path

import torch

from ..text.data import Text, check_vocabulary, cut, tokens_of
from .arguments import DTYPES, telling


def load(name: str, dtype: str, device: torch.device, bars: bool):
    """(model, tokenizer), see ``hf.load_model``.

    Args:
        bars: whether transformers draws its bars, here and when the model is saved.
    """
    from ..hf import load_model, show_bars

    show_bars(bars)
    model, tokenizer = load_model(name, DTYPES[dtype])
    return model.to(device), tokenizer


def is_path_of_model(name: str) -> bool:
    """Whether a model is taken from a path, by the rules of ``hf.load_model``."""
    from ..hf import SMOLLM2

    return name != SMOLLM2 and Path(name).exists()


def save(model: torch.nn.Module, tokenizer, folder: Path) -> None:
    """See ``hf.save_model``."""
    from ..hf import save_model

    with telling("output"):
        save_model(model, tokenizer, folder)


def windows_of(text: Text, model: torch.nn.Module, tokenizer, length: int, data: str, option: str) -> torch.Tensor:
    """``data.windows`` for a model.

    Args:
        data: the argument that the text comes from, for errors.
        option: that of the length.

    Raises:
        ValueError: if the text is too short, it is chats and the tokenizer has no template for them, or the model does
            not know one of its tokens.
    """
    with telling(data):
        tokens = tokens_of(text, tokenizer)
    with telling(data, f"give a longer text, or a smaller {option}"):
        found = cut(tokens, length)
    check_vocabulary(found, model.get_input_embeddings().num_embeddings)
    return found
