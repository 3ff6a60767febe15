"""The samples of the dense model that a run learns from: drawn once, and kept in its folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from ..digests import digest
from ..files import clear_unfinished, make_folder, write_tensors
from ..learn.run_folder import LOCK
from ..text.samples import TOGETHER, sample_windows, start_token
from .progress import Progress, tell
from .run_files import PROGRESS
from .shared_work import Found, SharedWork, digest_of_parameters

SAMPLES = "samples.safetensors"
# What the batches are called that runs share
SHARED_SAMPLES = "samples"


def run_samples(
    args: argparse.Namespace, model: torch.nn.Module, tokenizer, windows: int, shared: SharedWork | None
) -> torch.Tensor:
    """int64 [windows, --seq-len], of a model that is not converted yet; those in the run's folder are not drawn again.

    Each batch is written as soon as it is drawn: whoever was ended goes on behind the last one. Batches that another
    run has drawn are taken from ``shared``, and those drawn here are given to it.

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
        "weights": digest_of_parameters(model) if shared is None else shared.parameters,
    }
    progress = Path(args.output) / PROGRESS
    make_folder(progress)
    try:
        with FileLock(progress / LOCK, blocking=False):
            return _kept(args, model, progress / SAMPLES, of, shared)
    except KeyboardInterrupt:
        tell(f"the same command goes on with the samples that are kept, whole batches of {TOGETHER} windows")
        raise
    except Timeout:
        raise ValueError(
            f"output: expected a folder that no other process is at, got {args.output!r}; wait for it, or give another"
        ) from None


def _kept(
    args: argparse.Namespace, model: torch.nn.Module, path: Path, of: dict, shared: SharedWork | None
) -> torch.Tensor:
    """The samples of these settings: those in the file, and the others drawn and added to it."""
    clear_unfinished(path.parent)
    known = _read(path, of) if path.exists() else torch.empty(0, of["length"], dtype=torch.int64)

    def keep(found: torch.Tensor) -> None:
        write_tensors({"tokens": found}, path, {"of": json.dumps(of), "digest": digest([found])})

    def keep_drawn(found: torch.Tensor) -> None:
        if shared is not None:
            begin = (len(found) - 1) // of["together"] * of["together"]
            shared.write(SHARED_SAMPLES, _batch(of, begin), Found({"tokens": found[begin:]}))
        keep(found)

    if shared is not None:
        drawn = _drawn_by_others(shared, of, known)
        if len(drawn) > len(known):
            tell(f"{len(drawn) - len(known)} windows were drawn by an earlier run of the sweep")
            keep(drawn)
        known = drawn
    if len(known) == of["windows"]:
        return known
    tell(f"drawing {of['windows']} windows of {of['length']} tokens from the dense model; they are kept in {path}")
    return sample_windows(
        model,
        of["start"],
        of["windows"],
        of["length"],
        batch_size=of["together"],
        seed=of["seed"],
        known=known,
        keep=keep_drawn,
        progress=Progress("samples", "step", args.bars),
    )


def _drawn_by_others(shared: SharedWork, of: dict, known: torch.Tensor) -> torch.Tensor:
    """Samples with all batches behind them that another run has drawn."""
    while len(known) < of["windows"]:
        found = shared.read(SHARED_SAMPLES, _batch(of, len(known)))
        if found is None:
            break
        known = torch.cat([known, found.tensors["tokens"]])
    return known


def _batch(of: dict, begin: int) -> dict:
    """What a batch follows from, by its first window: not from how many there are behind it."""
    rows = min(of["together"], of["windows"] - begin)
    return {name: value for name, value in of.items() if name != "windows"} | {"begin": begin, "rows": rows}


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
