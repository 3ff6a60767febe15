"""Mask files on the command line: `maskpro export --to mask`, `maskpro import`, and those that a run keeps."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.mask_file import MaskFile, MaskHeader, base_layers, check_fingerprint, save_masks
from ..digests import digest_of_named
from ..functional.masks import top_n_mask
from ..modules import masked_layers
from ..pattern import NMPattern
from ..prune.convert import convert
from ..prune.finalize import finalize
from ..unfuse import in_linear_form
from .arguments import telling, values_kind
from .changed_weights import changes_weights
from .models import load, save
from .origins import base_name, origin_of_mask_file
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
        save_masks(path, triples, args.pattern, model=base_name(args.model), provenance=told).close()


def mask_of_step(args: argparse.Namespace, progress: Path, step: int, perplexity: float, run: str) -> Path | None:
    """The file that ``save_mask_of_step`` has left; None where it did not, or where it is damaged."""
    path = progress / _file_of_step(step)
    try:
        with closing(MaskFile(path)) as mask:
            return path if mask.provenance == _told_of_step(args, step, perplexity, run) else None
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
    size = output.stat().st_size
    print(f"{pattern} mask of {name} written to {output}: {told_mask_size(size, mask)}; base {mask.base}, "
          f"masks {digest_of_named(codes)}, file digest {mask.digest}")  # fmt: skip


def told_mask_size(size: int, mask: MaskHeader) -> str:
    """What a mask file of that many bytes takes, and the masks in it: most of a small file tells what they are."""
    bits = 8 * mask.mask_bytes / mask.groups
    return f"{size / 1e6:.2f} MB, of which {mask.mask_bytes:,} bytes are masks, {bits:.3f} bits a group"


def apply(args: argparse.Namespace, source: Path) -> None:
    """Write the checkpoint that a mask file makes of its base model."""
    output, mask = Path(args.output), MaskFile(source)
    dtype = str(mask.dtype).removeprefix("torch.")
    origin = origin_of_mask_file(mask.provenance, args.model, str(mask.pattern))
    model, tokenizer = load(args.model, dtype, torch.device("cpu"), args)
    put_masks(mask, model)
    finalize(model, to=args.to, values=values_kind(args))
    save(model, tokenizer, args, origin)
    print(
        f"{args.to} {mask.pattern} checkpoint of {args.model} under the masks of the file of digest {mask.digest} "
        f"written to {output}"
    )


def put_masks(mask: MaskFile, model: nn.Module) -> None:
    """Convert the base model of a mask file, in place.

    Raises:
        ValueError: if the model has other weights than the masks were learned on. It is then as it was.
    """
    with in_linear_form(model):
        weights = {
            name: module.weight.detach() for name, module in model.named_modules() if isinstance(module, nn.Linear)
        }
        found = ((name, weights[name]) for name in mask.layers if name in weights)
        check_fingerprint(mask, base_layers(found, mask.dtype))
        codes = {name: mask.codes(name, weights[name]) for name in mask.layers}
    convert(model, mask.pattern, targets=list(codes), init=codes)
