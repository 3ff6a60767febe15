"""What the weights of a run are: those of the dense model, refitted, or trained; and the refitted ones on disk."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..checkpoints.logits import changed_weights
from ..files import write_tensors
from ..modules import MaskedLinear, masked_layers
from ..prune.refit import put_weights
from ..ranks import Ranks
from ..report import FROZEN
from .run_files import START_WEIGHTS, digest_of_weights

# What the masks of a run were learned over, by its --refit
REFITTED = {"none": (), "scales": ("scales refitted",), "weights": ("weights refitted",)}


def changes_weights(args: argparse.Namespace) -> bool:
    """Whether the weights of a run change, so that the dense model will be gone."""
    return args.refit != "none" or getattr(args, "train_weights", None) is not None


def told_weights(refit: str, trained: bool = False) -> str:
    """What became of the weights, in words."""
    return ", ".join((*REFITTED[refit], *(("weights trained",) if trained else ()))) or FROZEN


def name_over(method: str, weights: str) -> str:
    """The name of a row in a table of perplexities: of a mask over weights, which ``told_weights`` tells."""
    return method if weights == FROZEN else f"{method}, {weights}"


def told_weights_of(model: torch.nn.Module, refit: str, start: Mapping) -> str:
    """What became of the weights of a run by now.

    Args:
        model: its model, with masked layers.
        refit: of the settings.
        start: what was known before its first step.
    """
    return told_weights(refit, trained=digest_of_weights(model) != start["start_weights"])


def save_start_weights(model: torch.nn.Module, progress: Path) -> None:
    """Keep the weights that a run begins with, where they are not those of the dense model."""
    changed = changed_weights(masked_layers(model))
    if changed:
        write_tensors(
            {name: weight.cpu().contiguous() for name, weight in changed.items()}, progress / START_WEIGHTS, {}
        )


def put_back_start_weights(model: torch.nn.Module, progress: Path, start: Mapping, ranks: Ranks) -> None:
    """Give a converted model the refitted weights that a run began with.

    Rank 0 alone reads them; the others take its.

    Raises:
        ValueError: if the model has other weights than the one they were refitted from, or the file is not there or
            damaged.
    """

    def put_back() -> None:
        if digest_of_weights(model) != start["dense_weights"]:
            raise ValueError("resume: expected the model whose weights were refitted, got other weights; put it back")
        path = progress / START_WEIGHTS
        if not path.is_file():
            raise ValueError(f"resume: expected the weights that the run began with in {str(path)!r}, got no file")
        put_weights(masked_layers(model), load_file(path))
        if digest_of_weights(model) != start["start_weights"]:
            raise ValueError(f"resume: expected the weights that the run began with in {str(path)!r}, got others")

    ranks.first(put_back)
    spread_weights(masked_layers(model), ranks)


def spread_weights(layers: Mapping[str, MaskedLinear], ranks: Ranks) -> None:
    """Give the layers of all ranks the changed weights of rank 0."""
    if ranks.world == 1:
        return
    for layer in layers.values():
        weight = layer.weight.detach().clone()
        ranks.spread_(weight)
        layer.weight.data, layer.weight_changed = weight, True
