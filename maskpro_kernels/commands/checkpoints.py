"""`maskpro export`, `maskpro import` and `maskpro validate`: checkpoints out of runs and other programs."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

import torch

from ..checkpoints import decompress, read_masks, survey, weight_files
from ..convert import convert, finalize, pack, unpack
from ..export import check_output, load_logits
from ..functional import top_n_mask
from ..pattern import NMPattern
from .arguments import DTYPE, DTYPES, telling
from .models import load, save
from .progress import tell
from .runs import LOGITS, check_ended, digest_of_weights


def export(args: argparse.Namespace) -> None:
    """Write the checkpoint of a run again, from its base model and its logits."""
    output = Path(args.output)
    check_output(output)
    source = Path(args.source) / LOGITS
    check_ended(source.parent, LOGITS)
    with telling("run", f"restore {LOGITS} from a copy, or by `maskpro replay --output` of a run by reinforce"):
        logits, pattern, metadata = _learned(source)
        codes = {name: top_n_mask(tensor, pattern) for name, tensor in logits.items()}
    with telling("run", "put back the base model of the run"):
        dtype = getattr(args, "dtype", metadata["dtype"])
        model, tokenizer = load(metadata["model"], dtype, torch.device("cpu"), args.bars)
    with telling("run", f"its logits are those of another model than {metadata['model']!r}"):
        convert(model, pattern, targets=list(codes), init=codes)
    # the logits of earlier runs do not tell
    if "weights" in metadata and dtype == metadata["dtype"] and metadata["weights"] != digest_of_weights(model):
        raise ValueError(
            f"run: expected the weights of {metadata['model']!r} that its masks were learned on, got others; put back "
            "the base model as it was"
        )
    save(finalize(model, to=args.to), tokenizer, output)
    print(f"{args.to} {pattern} checkpoint of {metadata['model']} written to {output}")
    if args.to == "packed":
        print("transformers loads it after `import maskpro_kernels.hf`, and would take random weights without")


def _learned(path: Path) -> tuple[dict[str, torch.Tensor], NMPattern, dict[str, str]]:
    """(logits, pattern, metadata) of a run; ValueError unless they are of one."""
    logits, metadata = load_logits(path)
    missing = {"model", "pattern", "dtype"} - metadata.keys()
    if missing or not logits:
        raise ValueError(f"expected logits of `maskpro learn`, got a file without {sorted(missing) or 'any'}")
    if metadata["dtype"] not in DTYPES:
        raise ValueError(f"expected a dtype among {', '.join(DTYPES)}, got {metadata['dtype']!r}")
    for name, tensor in logits.items():
        if not tensor.is_floating_point() or tensor.dim() != 2 or not torch.isfinite(tensor).all():
            raise ValueError(f"expected finite logits [out, K], got {list(tensor.shape)} of {tensor.dtype} in {name}")
    return logits, NMPattern(metadata["pattern"]), metadata


def import_(args: argparse.Namespace) -> None:
    """Write a checkpoint from what another program has stored."""
    output, source, pattern = Path(args.output), Path(args.source), NMPattern(args.pattern)
    check_output(output)
    if not source.exists():
        raise ValueError(f"source: expected a file or folder, got {args.source!r}: there is none of that name")
    dtype = getattr(args, "dtype", None) or _stored_dtype(getattr(args, "model", args.source))
    if hasattr(args, "model"):
        model, tokenizer = load(args.model, dtype, torch.device("cpu"), args.bars)
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


def validate(args: argparse.Namespace) -> None:
    """Print which patterns the matrices of a checkpoint follow."""
    files = weight_files(args.checkpoint)
    # in the folder of a run the logits stand beside the weights
    rows = list(survey([file for file in files if file.name != LOGITS] or files))
    if not rows:
        raise ValueError(f"checkpoint: expected matrices of floats, got none in {args.checkpoint!r}")
    width = max(len(row.name) for row in rows)
    print(f"{'weight':<{width}}  {'shape':>14}  {'density':>8}  {'-0.0':>6}  {'aligned':>7}  follows")
    for row in rows:
        shape = f"{row.shape[0]}x{row.shape[1]}"
        follows = ", ".join(row.patterns) or "none"
        stored = " (packed)" if row.packed else ""
        print(
            f"{row.name:<{width}}  {shape:>14}  {row.density:>8.2%}  {row.negative_zeros:>6}  {row.alignment:>7}  "
            f"{follows}{stored}"
        )
    for patterns, count in Counter(row.patterns for row in rows).most_common():
        print(f"{count} of {len(rows)} follow {', '.join(patterns) or 'no pattern'}")


def _stored_dtype(folder: str) -> str:
    """The dtype that a checkpoint's config tells, else DTYPE."""
    config = Path(folder) / "config.json"
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        stored = str(settings.get("dtype", settings.get("torch_dtype", DTYPE))).removeprefix("torch.")
    except (OSError, ValueError, AttributeError):
        return DTYPE
    return stored if stored in DTYPES else DTYPE
