"""Mask files on the command line: `maskpro export --to mask`, `maskpro apply`, and those that a run keeps."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..checkpoints.mask_file import MAGNITUDE, MaskFile, MaskHeader, base_layers, check_fingerprint, save_masks
from ..checkpoints.masked_copy import can_be_copied, copy_masked
from ..digests import digest_of_named
from ..files import check_output, make_folder
from ..functional.masks import top_n_mask
from ..modules import masked_layers
from ..pattern import NMPattern
from ..prune.convert import convert
from ..prune.finalize import finalize
from ..unfuse import in_linear_form
from .arguments import telling
from .changed_weights import changes_weights
from .models import check_saving, is_path_of_model, load, save, trusts
from .origins import base_name, origin_of_mask_file
from .progress import tell
from .run_files import BEST_MASK, INITIAL_MASK
from .start_mask import told_init

if TYPE_CHECKING:
    from ..hf import Origin

# Of `maskpro export`, without effect on a mask file
OF_CHECKPOINTS = ("values", "dtype", "max_shard_size", "push_to_hub", "private")


def check_mask_options(args: argparse.Namespace) -> None:
    """Raise ValueError where options of `maskpro export` do not go with what is written."""
    if args.to != "mask":
        if hasattr(args, "against"):
            raise ValueError(f"against: expected none without --to mask, got {args.against!r}; leave it out")
        return
    for name in OF_CHECKPOINTS:
        if hasattr(args, name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{name}: expected none with --to mask, which holds no weights; leave {option} out")


def initial_mask(name: str) -> MaskFile | str:
    """What ``--against`` names."""
    if name == MAGNITUDE:
        return name
    try:
        return MaskFile(name)
    except (ValueError, OSError) as error:
        told = str(error).removeprefix("mask: ").removeprefix("against: ")
        raise type(error)(f"against: {told}; give a mask file that needs no other") from error


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
    against: MaskFile | str | None,
    provenance: Mapping[str, object],
) -> None:
    """Write the mask file of a run, and tell its size.

    Args:
        model: the base, converted.
        codes: by name of the layer.
        name: of the base model.
        against: what ``--against`` names, opened.
    """
    weights = {key: layer.weight.detach() for key, layer in masked_layers(model).items()}
    layers = ((key, found, weights[key]) for key, found in codes.items())
    try:
        mask = save_masks(output, layers, pattern, model=name, against=against, provenance=provenance)
    except OSError as error:
        raise OSError(f"output: {error}") from error
    size = output.stat().st_size
    how = {None: "alone", MAGNITUDE: "against the mask by magnitude"}.get(mask.needs, f"against {mask.needs}")
    # those of the file are others where it is written against an initial mask
    print(f"{pattern} mask of {name}, {how}, written to {output}: {told_mask_size(size, mask)}; base {mask.base}, "
          f"masks {digest_of_named(codes)}, file digest {mask.digest}")  # fmt: skip
    if against is not None and mask.needs is None:
        tell("the initial mask differs in so many groups that the file is smaller without it: it is not needed")


def told_mask_size(size: int, mask: MaskHeader) -> str:
    """What a mask file of that many bytes takes, and the masks in it: most of a small file tells what they are."""
    bits = 8 * mask.mask_bytes / mask.groups
    return f"{size / 1e6:.2f} MB, of which {mask.mask_bytes:,} bytes are masks, {bits:.3f} bits a group"


def apply(args: argparse.Namespace) -> None:
    """Write the checkpoint that a mask file makes of its base model."""
    output = Path(args.output)
    check_output(output)
    check_saving(args)
    against = initial_mask(args.against) if hasattr(args, "against") else None
    mask = MaskFile(args.mask, against)
    if against is not None and mask.needs in (None, MAGNITUDE):
        raise ValueError(f"against: expected none, since {args.mask!r} needs no other mask, got {args.against!r}")
    dtype = str(mask.dtype).removeprefix("torch.")
    origin = origin_of_mask_file(mask.provenance, args.model, str(mask.pattern))
    folder = Path(args.model)
    saved_otherwise = any(hasattr(args, name) for name in ("max_shard_size", "push_to_hub")) or trusts(args)
    if not saved_otherwise and is_path_of_model(args.model) and can_be_copied(mask, folder):
        _copy(mask, folder, output, origin)
    else:
        model, tokenizer = load(args.model, dtype, torch.device("cpu"), args)
        put_masks(mask, model)
        save(model, tokenizer, args, origin)
    print(
        f"dense {mask.pattern} checkpoint of {args.model} under the masks of the file of digest {mask.digest} written "
        f"to {output}"
    )


def _copy(mask: MaskFile, folder: Path, output: Path, origin: Origin) -> None:
    """Write a checkpoint from the files of its base; where that fails, nothing is left."""
    from ..hf import skeleton, write_card

    model, tokenizer = skeleton(folder, mask.dtype)
    made = [path for path in (output, *output.absolute().parents) if not path.exists()]
    try:
        with telling("output"):
            make_folder(output)
            copy_masked(mask, folder, output)
            model.config.save_pretrained(output)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(output)
            tokenizer.save_pretrained(output)
            write_card(model, output, output.resolve().name, origin)
    except BaseException:
        for path in output.glob("*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in filter(Path.exists, made):
            path.rmdir()
        raise


def put_masks(mask: MaskFile, model: nn.Module) -> None:
    """Bake the masks of a file into its base model, in place.

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
    finalize(model)
