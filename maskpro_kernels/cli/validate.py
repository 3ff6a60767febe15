"""`maskpro validate`."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from ..checkpoints.survey import survey
from ..safetensors_files import tensor_files, weight_files
from ..stored_digests import CONFIG, check_checkpoint, digests_are_checked, has_digests, stored_digests
from .run_files import LOGITS
from .told_mask import print_mask_file, taken_for_a_mask_file


def validate(args: argparse.Namespace) -> None:
    """Print which patterns the matrices of a checkpoint follow, or what a mask file holds."""
    if taken_for_a_mask_file(Path(args.checkpoint)):
        print_mask_file(Path(args.checkpoint))
        return
    files = weight_files(args.checkpoint)
    # in the folder of a run the logits stand beside the checkpoint
    files = [file for file in files if file.name != LOGITS] or files
    rows = list(survey(files))
    if not rows:
        raise ValueError(f"checkpoint: expected matrices of floats, got none in {args.checkpoint!r}")
    compared = _check_digests(files, Path(args.checkpoint).is_dir())
    width = max(len(row.name) for row in rows)
    print(f"{'weight':<{width}}  {'shape':>14}  {'density':>8}  {'-0.0':>6}  {'aligned':>7}  follows")
    for row in rows:
        shape = f"{row.shape[0]}x{row.shape[1]}"
        follows = ", ".join(row.patterns) or "none"
        stored = " (packed)" if row.packed else ""
        if row.packed and row.stored == torch.int8:
            stored = " (packed, int8)"
        print(
            f"{row.name:<{width}}  {shape:>14}  {row.density:>8.2%}  {row.negative_zeros:>6}  {row.alignment:>7}  "
            f"{follows}{stored}"
        )
    if compared:
        print(f"all {compared} tensors have the digests that they were saved with")
    for patterns, count in Counter(row.patterns for row in rows).most_common():
        print(f"{count} of {len(rows)} follow {', '.join(patterns) or 'no pattern'}")


def _check_digests(files: Sequence[Path], whole: bool) -> int:
    """How many tensors have the digests that they were saved with; 0 of a checkpoint that is saved without.

    Args:
        files: of the folder, or one of them.
        whole: whether it is the folder.

    Raises:
        ValueError: see ``check_checkpoint``.
    """
    config = files[0].parent / CONFIG
    if not digests_are_checked() or not has_digests(config):
        return 0
    stored, where = stored_digests(config)[0], tensor_files(files)
    # others may lie beside them
    own = sorted({where[name] for name in stored if name in where})
    if stored and not own and not whole:
        return 0
    return check_checkpoint(own or files, whole)
