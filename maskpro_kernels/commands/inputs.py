"""What a run learns from: texts as windows of tokens, and the model."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from ..data import batches, load_text, windows
from .arguments import device_of, naming
from .models import load


@dataclass
class Inputs:
    """A model, its tokenizer, and windows of tokens by their use."""

    model: torch.nn.Module
    tokenizer: object
    tests: dict[str, torch.Tensor]
    validation: torch.Tensor
    initial_batches: list[torch.Tensor]
    calibration: list[torch.Tensor]


def read_inputs(args: argparse.Namespace) -> Inputs:
    """Load the texts and the model that the arguments of ``learn`` name."""
    with naming("data"):
        texts = load_text(args.data)
    other = None
    if hasattr(args, "other_data"):
        with naming("other_data"):
            other = load_text(args.other_data)["test"]
    device = device_of(args.device)
    model, tokenizer = load(args.model, args.dtype, device)

    def held_out_windows(text: str) -> torch.Tensor:
        return windows(text, tokenizer, args.eval_length)[: args.eval_windows]

    tests = {"perplexity": held_out_windows(texts["test"])}
    if other is not None:
        with naming("other_data"):
            tests["other_perplexity"] = held_out_windows(other)
    calibration = windows(texts["calibration"], tokenizer, args.seq_len).to(device)
    calibration = batches(calibration, args.batch_size, args.seed)
    return Inputs(
        model,
        tokenizer,
        tests,
        held_out_windows(texts["validation"]),
        calibration[: args.init_batches],
        calibration[: args.calibration_batches],
    )
