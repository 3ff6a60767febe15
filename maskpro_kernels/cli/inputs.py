"""What a run learns from: texts as windows of tokens, and the model."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from ..pruning.selection import layers_to_convert
from ..text.data import batches, load_text
from .arguments import device_of, telling
from .models import load, windows_of


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
    """Load the texts and the model that the arguments of ``learn`` name.

    Raises:
        ValueError, OSError, TypeError: if one is missing or unfit, or the texts are too short.
    """
    with telling("data"):
        texts = load_text(args.data)
    other = None
    if hasattr(args, "other_data"):
        with telling("other_data"):
            other = load_text(args.other_data)["test"]
    device = device_of(args.device)
    model, tokenizer = load(args.model, args.dtype, device, args.bars)
    with telling("model", "take another --pattern, --dtype or model"):
        # told now, not after the evaluation of the dense model
        layers_to_convert(model, args.pattern)

    def evaluation_windows(text: str, data: str = "data") -> torch.Tensor:
        return windows_of(text, model, tokenizer, args.eval_length, data, "--eval-length")[: args.eval_windows]

    tests = {"perplexity": evaluation_windows(texts["test"])}
    if other is not None:
        tests["other_perplexity"] = evaluation_windows(other, "other_data")
    calibration = windows_of(texts["calibration"], model, tokenizer, args.seq_len, "data", "--seq-len").to(device)
    with telling("data", "give a longer text, or a smaller --batch-size or --seq-len"):
        calibration = batches(calibration, args.batch_size, args.seed)
    return Inputs(
        model,
        tokenizer,
        tests,
        evaluation_windows(texts["validation"]),
        calibration[: args.init_batches],
        calibration[: args.calibration_batches],
    )
