"""The samples of the dense model that a run learns from: drawn once, and kept in its folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from ..digests import digest
from ..files import discard, make_folder, unfinished, write_tensors
from ..learn.run import LOCK
from ..text.samples import TOGETHER, sample_windows, start_token
from .progress import Progress, tell
from .run_files import PROGRESS

SAMPLES = "samples.safetensors"


def run_samples(args: argparse.Namespace, model: torch.nn.Module, tokenizer, windows: int) -> torch.Tensor:
    """int64 [windows, --seq-len], of a model that is not converted yet; those in the run's folder are not drawn again.

    Raises:
        ValueError: if the samples in the folder are damaged or of other settings, another process is at it, or the
            model's logits are not finite.
        OSError: if they cannot be written.
    """
    of = {
        "start": start_token(tokenizer),
        "windows": windows,
        "length": args.seq_len,
        "together": TOGETHER,
        "seed": args.seed,
        "weights": digest(parameter for _, parameter in sorted(model.named_parameters())),
    }
    progress = Path(args.output) / PROGRESS
    make_folder(progress)
    try:
        with FileLock(progress / LOCK, blocking=False):
            return _kept(args, model, progress / SAMPLES, of)
    except Timeout:
        raise ValueError(
            f"output: expected a folder that no other process is at, got {args.output!r}; wait for it, or give another"
        ) from None


def _kept(args: argparse.Namespace, model: torch.nn.Module, path: Path, of: dict) -> torch.Tensor:
    """The samples of these settings: those in the file, or else drawn and written to it."""
    for half in unfinished(path.parent):
        discard(half)
    if path.exists():
        return _read(path, of)
    tell(f"drawing {of['windows']} windows of {of['length']} tokens from the dense model; they are kept in {path}")
    found = sample_windows(
        model,
        of["start"],
        of["windows"],
        of["length"],
        batch_size=of["together"],
        seed=of["seed"],
        progress=Progress("samples", "step", args.bars),
    )
    write_tensors({"tokens": found}, path, {"of": json.dumps(of), "digest": digest([found])})
    return found


def _read(path: Path, of: dict) -> torch.Tensor:
    """The samples in a file; ValueError unless they are of these settings."""
    cure = "give another --output, or remove the file to draw them anew"
    try:
        with safe_open(path, framework="pt") as file:
            metadata, tokens = file.metadata() or {}, file.get_tensor("tokens")
        drawn, sound = json.loads(metadata["of"]), metadata["digest"] == digest([tokens])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"samples: expected whole ones in {str(path)!r}, got {error!r}; {cure}") from error
    if not sound:
        raise ValueError(f"samples: expected those of their digest in {str(path)!r}, got others; {cure}")
    others = sorted(name for name in of if drawn.get(name) != of[name])
    if others:
        raise ValueError(
            f"samples: expected those of this run in {str(path)!r}, got some of other {', '.join(others)}; {cure}"
        )
    return tokens
