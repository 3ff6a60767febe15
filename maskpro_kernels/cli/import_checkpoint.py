"""`maskpro import`: a checkpoint from files of other programs, or from a mask file and its base model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..checkpoints.importers import read_masks, write_plain
from ..checkpoints.mask_file import is_mask_file, load_masks
from ..files import check_output
from ..functional.masks import top_n_mask
from ..ops.pattern import NMPattern
from ..packed import KEEP, NMLinear
from ..prune.convert import convert
from ..prune.finalize import finalize, pack, repack, unpack
from ..prune.selection import layers_to_convert
from ..unfuse import in_linear_form
from .config import Import
from .inputs import load, naming, packed_size, report, save


def import_checkpoint(options: Import, source: str) -> None:
    """Write a checkpoint from a file, a folder, or an id on the hub."""
    if options.output is None:
        raise ValueError("output: expected --output, the folder to write, got none")
    if options.values != KEEP and options.to != "packed":
        raise ValueError(f"values: expected none without --to packed, got {options.values!r}")
    requested = NMPattern(options.pattern or "2:4")
    check_output(options.output)
    from ..hf import fetch

    path = fetch(source, ("*.npz", "*.pt")) if options.model else fetch(source)
    if path.is_file() and is_mask_file(path):
        if options.model is None:
            raise ValueError(f"model: expected the base model of the mask file {source!r}, got none; add --model")
        pattern, layers, model, tokenizer = _masked(options, path)
    elif options.model is not None:
        layers, model, tokenizer = _with_learned_masks(options, path, requested)
        pattern = requested
    else:
        pattern, layers, model, tokenizer = _with_zeros(options, path, requested)
    if options.pattern is not None and str(pattern) != str(requested):
        raise ValueError(f"pattern: expected {pattern}, as {source!r} is stored, got {requested}")
    save(model, tokenizer, options.output, options.model or source, str(pattern))
    print(f"{options.to} {pattern} checkpoint of {layers} sparse layers written to {options.output}")
    if options.to == "packed":
        print(packed_size(model))


def _masked(options: Import, path: Path):
    """(pattern, layers, model, tokenizer) of a mask file over its base model."""
    masks = load_masks(path)
    if options.dtype is not None:
        raise ValueError(f"dtype: expected none with a mask file, which has that of its base, got {options.dtype!r}")
    dtype = str(masks.dtype).removeprefix("torch.")
    model, tokenizer = load(options.model, dtype, "cpu")
    # compares the fingerprint of the base
    convert(model, masks.pattern, targets=list(masks.layers), init=str(path))
    finalize(model, to=options.to, values=options.values)
    return masks.pattern, len(masks.layers), model, tokenizer


def _with_learned_masks(options: Import, path: Path, pattern: NMPattern):
    """(layers, model, tokenizer) of masks that another program has learned."""
    model, tokenizer = load(options.model, options.dtype, "cpu")
    with in_linear_form(model):
        layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        masks = read_masks(path, layers, pattern)
        for name, mask in masks.items():
            # a group may keep fewer than N: all other weights become zero
            layers[name].weight.data.mul_(mask).add_(0.0)
        codes = {name: top_n_mask(mask.float(), pattern) for name, mask in masks.items()}
        convert(model, pattern, targets=list(codes), init=codes)
    finalize(model, to=options.to, values=options.values)
    return len(codes), model, tokenizer


def _with_zeros(options: Import, path: Path, pattern: NMPattern):
    """(pattern, layers, model, tokenizer) of a checkpoint with zeros in its weights, or with packed weights."""
    if not path.is_dir():
        raise ValueError(f"model: expected the model of the masks in {str(path)!r}, got none; add --model")
    parent = Path(options.output).absolute().parent
    with tempfile.TemporaryDirectory(dir=parent if parent.is_dir() else None) as folder:
        with _renaming(folder, options.output):
            checkpoint = Path(folder) if write_plain(path, folder) else path
        with _renaming(folder, path):
            model, tokenizer = load(str(checkpoint), options.dtype, "cpu", title=str(path))
    # its card has the license
    model.name_or_path = str(path)
    layers = [module for module in model.modules() if isinstance(module, NMLinear)]
    if not layers:
        if options.values != KEEP:
            _check_finite(model, pattern)
        with naming("pattern", "give the pattern of its zeros"):
            conversion = pack(model, pattern, options.values)
        for name, reason in conversion.skipped.items():
            report(f"left dense: {name} ({reason})")
        count = len(conversion.converted)
    else:
        count = len(layers)
        kinds = {layer.kind for layer in layers}
        pattern = " and ".join(sorted({str(layer.pattern) for layer in layers}))
        if options.to == "packed" and kinds == {options.values}:
            raise ValueError(f"source: expected weights with zeros, got {str(path)!r}, which is packed already")
        if options.to == "packed":
            repack(model, options.values)
    if options.to == "dense":
        unpack(model)
    return pattern, count, model, tokenizer


def _check_finite(model: torch.nn.Module, pattern: NMPattern) -> None:
    # before the pattern is compared: layers with NaN follow none
    try:
        with in_linear_form(model):
            layers_to_convert(model, pattern)
    except ValueError as error:
        raise ValueError(f"source: {str(error).removeprefix('model: ')}") from error


@contextmanager
def _renaming(folder: str, path: str | Path) -> Iterator[None]:
    """Name a path of the user in errors that name a temporary folder."""
    try:
        yield
    except (ValueError, OSError) as error:
        if folder not in str(error):
            raise
        raise (OSError if isinstance(error, OSError) else ValueError)(str(error).replace(folder, str(path))) from error
