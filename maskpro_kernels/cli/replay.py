"""`maskpro replay`: the logits of a run again, from its journal."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from ..checkpoints.logits import Learned, load_weights, write_learned
from ..digests import digest
from ..learn.journal import read as read_journal
from ..learn.model_masks import ModelMasks, ReplayedLayer
from ..learn.run_folder import JOURNAL
from ..learn.score_updates import replay as replay_step
from ..learn.snapshots import newest_snapshot
from ..pattern import NMPattern
from ..report import FROZEN
from .arguments import device_of, new_file, telling
from .changed_weights import told_weights
from .progress import followed, tell
from .run_files import LOGITS, PROGRESS, REPORT, SETTINGS, START_WEIGHTS, logits_metadata, read_own, read_settings

CURE = f"restore the folder from a copy; the logits that were learned are in its {LOGITS}, too"


def replay(args: argparse.Namespace) -> None:
    """Rebuild the logits, print their digest, and write them where asked for."""
    progress = Path(args.source) / PROGRESS
    if not Path(args.source).is_dir():
        raise ValueError(
            f"run: expected the folder of a run with a journal, got {args.source!r}: there is none; check its name"
        )
    if not (progress / JOURNAL).exists():
        raise ValueError(
            f"run: expected the folder of a run with a journal, got {args.source!r}, without one; a run whose "
            f"estimator keeps none cannot be replayed, its logits are in its {LOGITS}"
        )
    with telling("run", CURE):
        records = read_journal(progress / JOURNAL)
    run, entries = records.header["run"], records.entries
    steps = getattr(args, "steps", len(entries))
    if not 0 <= steps <= len(entries):
        raise ValueError(f"steps: expected 0 to {len(entries)}, those of the journal, got {steps}")
    output = new_file(args, "output")
    device = device_of(args.device)
    with telling("run", CURE):
        _, tensors, _, _ = newest_snapshot(progress, at_most=0, run=run)
    metadata = _metadata(Path(args.source), run)
    weights = {} if output is None else _start_weights(progress, run, metadata)
    if records.torn:
        tell(f"the last record is cut short by a crash: {records.torn} bytes are left out")
    layers = {
        name: ReplayedLayer(tensors[name].to(device), NMPattern(pattern), layer, *place)
        for name, (layer, pattern, _, _, *place) in run["layers"].items()
    }
    masks = ModelMasks(layers)
    for entry in followed(entries[:steps], "replaying", args.bars):
        replay_step(masks, run["seed"], entry)
    logits = {name: layer.logits.cpu() for name, layer in layers.items()}
    found = digest(logits[name] for name in sorted(logits))
    try:
        if output is not None:
            with telling("output"):
                write_learned(Learned(logits, weights, metadata), output)
    finally:
        # also where the file could not be written
        print(f"{steps} steps of {len(entries)}, logits {found}")
    if steps == len(entries):
        _tell_difference(Path(args.source), found)
    if (progress / START_WEIGHTS).exists():
        print("its masks are nothing without the refitted weights of the run")


def _tell_difference(source: Path, found: str) -> None:
    """Tell where a run that has ended reported other logits than those with this digest."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        reported = read_own(source / REPORT)["logits"]
        if reported != found:
            tell(f"{REPORT} tells of other logits, {reported}: the journal is not all of the run")


def _start_weights(progress: Path, run: Mapping, metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights that a run began with; none where they were those of the dense model.

    Args:
        metadata: of ``_metadata``.

    Raises:
        ValueError: if they were refitted, or that is not known, and they are damaged or lost: its masks are nothing
            without them.
    """
    start = progress / START_WEIGHTS
    if not start.exists():
        if not metadata:
            raise ValueError(
                f"run: expected {SETTINGS}, which tells whether weights were refitted, in {str(progress.parent)!r}, "
                "got none that can be read; restore it from a copy, or replay without --output"
            )
        if metadata["weights_are"] == FROZEN:
            return {}
    with telling("run", CURE):
        weights = load_weights(start)
        # in the order of layer ids, as the run took it
        if digest(weights[name] for name in sorted(run["layers"], key=run["layers"].get)) != run["weights"]:
            raise ValueError(f"expected the weights that the run began with in {str(start)!r}, got others")
    return weights


def _metadata(source: Path, run: Mapping) -> dict[str, str]:
    """As it stands beside the logits of the run; empty where it is not known."""
    try:
        start = read_settings(source)
        settings, weights_are = start["settings"], told_weights(start["settings"]["refit"])
        return logits_metadata(settings, run["weights"], start["dense_weights"], weights_are, run["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
