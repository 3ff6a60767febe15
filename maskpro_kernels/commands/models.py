"""Models in and out; transformers takes seconds to import, and a wrong argument or --help does not wait for it."""

from __future__ import annotations

from pathlib import Path

import torch

from .arguments import DTYPES


def load(name: str, dtype: str, device: torch.device):
    """(model, tokenizer), see ``hf.load_model``."""
    from ..hf import load_model

    model, tokenizer = load_model(name, DTYPES[dtype])
    return model.to(device), tokenizer


def save(model: torch.nn.Module, tokenizer, folder: Path) -> None:
    """See ``hf.save_model``."""
    from ..hf import save_model

    save_model(model, tokenizer, folder)
