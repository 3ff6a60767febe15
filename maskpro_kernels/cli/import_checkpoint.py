"""`maskpro import`: a checkpoint from what other programs store."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from ..checkpoints.importers.compressed_tensors import decompress
from ..checkpoints.importers.learned_masks import read_masks
from ..files import check_output
from ..functional.masks import top_n_mask
from ..linear_form import in_linear_form
from ..pattern import NMPattern
from ..pruning.convert import convert
from ..pruning.finalize import finalize, pack, unpack
from .arguments import DTYPE, DTYPES, telling
from .models import load, save
from .progress import tell


def import_(args: argparse.Namespace) -> None:
    """Write a checkpoint from what another program has stored."""
    output, source, pattern = Path(args.output), Path(args.source), NMPattern(args.pattern)
    check_output(output)
    if not source.exists():
        raise ValueError(f"source: expected a file or folder, got {args.source!r}: there is none of that name")
    dtype = getattr(args, "dtype", None) or _stored_dtype(getattr(args, "model", args.source))
    if hasattr(args, "model"):
        model, tokenizer = load(args.model, dtype, torch.device("cpu"), args.bars)
        with in_linear_form(model):
            layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
            masks = read_masks(source, layers, pattern)
            for name, mask in masks.items():
                # a group may keep fewer than N: what it drops is zero, whether or not it is stored
                layers[name].weight.data.mul_(mask).add_(0.0)
            codes = {name: top_n_mask(mask.float(), pattern) for name, mask in masks.items()}
            convert(model, pattern, targets=list(codes), init=codes)
        save(finalize(model, to=args.to), tokenizer, output)
        print(f"{args.to} {pattern} checkpoint of {args.model} with {len(codes)} masks written to {output}")
        return
    if not source.is_dir():
        raise ValueError(f"model: expected the model that the masks in {args.source!r} are of, got none; add --model")
    with tempfile.TemporaryDirectory(
        dir=output.absolute().parent if output.absolute().parent.is_dir() else None
    ) as tmp:
        decompressed = decompress(source, Path(tmp))
        model, tokenizer = load(tmp if decompressed else args.source, dtype, torch.device("cpu"), args.bars)
    with telling("pattern", "`maskpro validate` tells which they follow"):
        conversion = pack(model, pattern)
    for name, reason in conversion.skipped.items():
        tell(f"left dense: {name} ({reason})")
    if args.to == "dense":
        unpack(model)
    save(model, tokenizer, output)
    print(f"{args.to} {pattern} checkpoint with {len(conversion.converted)} sparse layers written to {output}")


def _stored_dtype(folder: str) -> str:
    """The dtype that a checkpoint's config tells, else DTYPE."""
    config = Path(folder) / "config.json"
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        stored = str(settings.get("dtype", settings.get("torch_dtype", DTYPE))).removeprefix("torch.")
    except (OSError, ValueError, AttributeError):
        return DTYPE
    return stored if stored in DTYPES else DTYPE
