"""`maskpro import`: a checkpoint from what other programs store."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from ..checkpoints.importers import read_masks, write_plain
from ..checkpoints.mask_file import is_mask_file
from ..files import check_output
from ..functional.masks import top_n_mask
from ..packed import INT8, KEEP, NMLinear
from ..pattern import NMPattern
from ..prune.convert import convert
from ..prune.finalize import finalize, pack, repack, unpack
from ..unfuse import in_linear_form
from .arguments import telling, values_kind
from .mask_files import apply
from .models import check_saving, load, save, told_size
from .progress import tell


def import_(args: argparse.Namespace) -> None:
    """Write a checkpoint from what another program has stored."""
    if not hasattr(args, "output"):
        raise ValueError("output: expected --output, the folder to write, got none")
    values_kind(args)
    pattern = NMPattern(args.pattern)
    check_output(args.output)
    check_saving(args)
    source = _source(args)
    if hasattr(args, "model") and is_mask_file(source):
        apply(args, source)
    elif hasattr(args, "model"):
        _import_masks(args, source, pattern)
    else:
        _import_checkpoint(args, source, pattern)


def _source(args: argparse.Namespace) -> Path:
    """The path of what is read, or of what the hub has of an id."""
    from ..hf import fetch, show_bars

    show_bars(args.bars)
    return fetch(args.source, ("*.npz", "*.pt")) if hasattr(args, "model") else fetch(args.source)


def _import_masks(args: argparse.Namespace, source: Path, pattern: NMPattern) -> None:
    """Write a model under masks that another program has learned."""
    model, tokenizer = load(args.model, getattr(args, "dtype", None), torch.device("cpu"), args)
    with in_linear_form(model):
        layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        masks = read_masks(source, layers, pattern)
        for name, mask in masks.items():
            # a group may keep fewer than N: what it drops is zero, whether or not it is stored
            layers[name].weight.data.mul_(mask).add_(0.0)
        codes = {name: top_n_mask(mask.float(), pattern) for name, mask in masks.items()}
        convert(model, pattern, targets=list(codes), init=codes)
    finalize(model, to=args.to, values=values_kind(args))
    save(model, tokenizer, args, args.model, str(pattern))
    print(f"{args.to} {pattern} checkpoint of {args.model} with {len(codes)} masks written to {args.output}")
    _tell_size(args, model)


def _import_checkpoint(args: argparse.Namespace, source: Path, pattern: NMPattern) -> None:
    """Write a checkpoint whose weights hold zeros in the pattern."""
    if not source.is_dir():
        raise ValueError(f"model: expected the model that the masks in {args.source!r} are of, got none; add --model")
    above = Path(args.output).absolute().parent
    with tempfile.TemporaryDirectory(dir=above if above.is_dir() else None) as tmp:
        plain = Path(tmp) if write_plain(source, tmp) else source
        model, tokenizer = load(str(plain), getattr(args, "dtype", None), torch.device("cpu"), args)
    layers = [module for module in model.modules() if isinstance(module, NMLinear)]
    _check_pattern(args, pattern, layers)
    patterns = " and ".join(sorted({str(layer.pattern) for layer in layers})) or str(pattern)
    kinds = {layer.kind for layer in layers}
    if layers and args.to == "packed":
        _repack(model, args, kinds)
    sparse = len(layers)
    if not layers:
        with telling("pattern", "give the one that its zeros follow"):
            conversion = pack(model, pattern, values_kind(args))
        sparse = len(conversion.converted)
        for name, reason in conversion.skipped.items():
            tell(f"left dense: {name} ({reason})")
    if args.to == "dense":
        unpack(model)
    save(model, tokenizer, args, args.source, patterns)
    print(f"{args.to} {patterns} checkpoint with {sparse} sparse layers written to {args.output}")
    _tell_size(args, model)


def _check_pattern(args: argparse.Namespace, pattern: NMPattern, layers: list[NMLinear]) -> None:
    """Raise ValueError if a pattern is given that is not the one of packed layers."""
    found = sorted({str(layer.pattern) for layer in layers})
    if found not in ([], [str(pattern)]) and "--pattern" in args.given:
        raise ValueError(
            f"pattern: expected that of the packed layers in {args.source!r}, {' and '.join(found)}, got {pattern}; "
            "leave it out"
        )


def _repack(model: torch.nn.Module, args: argparse.Namespace, kinds: set[str]) -> None:
    """Store the values of a model that is packed already as ``--values`` says; ValueError unless that changes some."""
    if not hasattr(args, "values") or kinds == {args.values}:
        raise ValueError(
            f"source: expected weights with zeros in them, got {args.source!r}, which is packed already; `--to dense` "
            f"unpacks it, and `--values {KEEP if INT8 in kinds else INT8}` stores its values otherwise"
        )
    repack(model, args.values)


def _tell_size(args: argparse.Namespace, model: torch.nn.Module) -> None:
    if args.to == "packed":
        print(told_size(model))
