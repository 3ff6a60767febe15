"""Mask files on the command line: `maskpro export --to mask`, `maskpro import`, and those that a run keeps."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.mask_file import load_masks, save_masks
from ..functional.masks import top_n_mask
from ..modules import masked_layers
from ..pattern import NMPattern
from ..prune.convert import convert
from ..prune.finalize import finalize
from .arguments import telling, values_kind
from .changed_weights import changes_weights
from .models import base_name, load, save
from .progress import tell
from .run_files import BEST_MASK, INITIAL_MASK
from .start_mask import told_init

# Of `maskpro export`, without effect on a mask file
OF_CHECKPOINTS = ("values", "dtype", "max_shard_size", "push_to_hub", "private")


def check_mask_options(args: argparse.Namespace) -> None:
    """Raise ValueError where options of `maskpro export` do not go with what is written."""
    if args.to != "mask":
        return
    for name in OF_CHECKPOINTS:
        if hasattr(args, name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{name}: expected none with --to mask, which holds no weights; leave {option} out")


def save_mask_of_step(
    args: argparse.Namespace, model: nn.Module, progress: Path, step: int, perplexity: float, run: str
) -> None:
    """Keep the mask of a run behind a step, unless weights change: no base would be there to put it on.

    Args:
        perplexity: of the validation text behind that step.
        run: its id.
    """
    if changes_weights(args):
        return
    layers = masked_layers(model)
    if len({layer.weight.dtype for layer in layers.values()}) > 1:
        if step == 0:
            tell("weights with masks have several dtypes: no mask of the run is kept as a file")
        return
    triples = (
        (name, top_n_mask(layer.logits_on_device().detach(), layer.pattern), layer.weight.detach())
        for name, layer in layers.items()
    )
    told = _told_of_step(args, step, perplexity, run)
    with telling("output"):
        path = progress / _file_of_step(step)
        save_masks(path, triples, args.pattern, model=base_name(args.model), provenance=told)


def mask_of_step(args: argparse.Namespace, progress: Path, step: int, perplexity: float, run: str) -> Path | None:
    """The file that ``save_mask_of_step`` has left; None where it did not, or where it is damaged."""
    path = progress / _file_of_step(step)
    try:
        return path if load_masks(path).provenance == _told_of_step(args, step, perplexity, run) else None
    except (ValueError, OSError):
        return None


def _file_of_step(step: int) -> str:
    return BEST_MASK if step else INITIAL_MASK


def _told_of_step(args: argparse.Namespace, step: int, perplexity: float, run: str) -> dict[str, str]:
    if step == 0:
        return {"of": f"the {told_init(args.init)} that a run began with"}
    return {"of": f"the mask behind step {step} of the run {run}, validation perplexity {perplexity!r}"}


def write_mask(
    output: Path,
    model: nn.Module,
    codes: Mapping[str, Tensor],
    pattern: NMPattern,
    name: str,
    provenance: Mapping[str, object],
) -> None:
    """Write the mask file of a run, and tell its size.

    Args:
        model: the base, converted.
        codes: by name of the layer.
        name: of the base model.
    """
    weights = {key: layer.weight.detach() for key, layer in masked_layers(model).items()}
    layers = ((key, found, weights[key]) for key, found in codes.items())
    try:
        mask = save_masks(output, layers, pattern, model=name, provenance=provenance)
    except OSError as error:
        raise OSError(f"output: {error}") from error
    size = output.stat().st_size / 1e6
    print(f"{pattern} mask of {name} written to {output}: {size:.2f} MB; base {mask.base}, checksum {mask.checksum}")


def apply(args: argparse.Namespace, source: Path) -> None:
    """Write the checkpoint that a mask file makes of its base model."""
    output, mask = Path(args.output), load_masks(source)
    dtype = str(mask.dtype).removeprefix("torch.")
    model, tokenizer = load(args.model, dtype, torch.device("cpu"), args)
    convert(model, mask.pattern, targets=list(mask.layers), init=source)
    finalize(model, to=args.to, values=values_kind(args))
    save(model, tokenizer, args, args.model, str(mask.pattern))
    print(f"{args.to} {mask.pattern} checkpoint of {args.model} under the masks of {source} written to {output}")
