"""`maskpro replay`: the logits of a run again, from its journal."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from ..checkpoints.logits import CHANGED, load_weights, save_weights, weights_beside
from ..files import write_whole
from ..pattern import NMPattern
from ..training.batches import digest
from ..training.journal import read as read_journal
from ..training.run_folder import JOURNAL
from ..training.score_updates import ReplayedLayer
from ..training.score_updates import replay as replay_step
from ..training.snapshots import newest_snapshot
from .arguments import device_of, new_file, telling
from .changed_weights import told_weights
from .progress import followed, tell
from .run_files import FROZEN, LOGITS, PROGRESS, SETTINGS, START_WEIGHTS, logits_metadata

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
        header, entries, torn = read_journal(progress / JOURNAL)
    run = header["run"]
    steps = getattr(args, "steps", len(entries))
    if not 0 <= steps <= len(entries):
        raise ValueError(f"steps: expected 0 to {len(entries)}, those of the journal, got {steps}")
    output = new_file(args, "output")
    device = device_of(args.device)
    with telling("run", CURE):
        _, tensors, _, _ = newest_snapshot(progress, at_most=0, run=run)
    weights = {} if output is None else _start_weights(Path(args.source), run)
    if weights and weights_beside(output).exists():
        raise ValueError(
            f"output: expected a name beside which {weights_beside(output).name} is free for the refitted weights, got "
            f"{str(output)!r}; give another name"
        )
    if torn:
        tell(f"the last record is cut short by a crash: {torn} bytes are left out")
    layers = {
        name: ReplayedLayer(tensors[name].to(device), NMPattern(pattern), layer, *place)
        for name, (layer, pattern, _, _, *place) in run["layers"].items()
    }
    for entry in followed(entries[:steps], "replaying", args.bars):
        replay_step(layers, run["seed"], entry)
    logits = {name: layer.logits.cpu() for name, layer in layers.items()}
    if output is not None:
        metadata = _metadata(Path(args.source), run)
        if weights:
            metadata |= {CHANGED: save_weights(weights, weights_beside(output))}
        write_whole(output, save(logits, metadata=metadata))
    print(f"{steps} steps of {len(entries)}, logits {digest(logits[name] for name in sorted(logits))}")
    if (progress / START_WEIGHTS).exists():
        print("its masks are nothing without the refitted weights of the run")


def _start_weights(source: Path, run: Mapping) -> dict[str, Tensor]:
    """The weights that a run began with; none where they were those of the dense model.

    Raises:
        ValueError: if they were refitted, and are damaged or lost: its masks are nothing without them.
    """
    start = source / PROGRESS / START_WEIGHTS
    if not start.exists() and _metadata(source, run).get("weights_are", FROZEN) == FROZEN:
        return {}
    with telling("run", CURE):
        weights, _ = load_weights(start)
        # in the order of layer ids, as the run took it
        if digest(weights[name] for name in sorted(run["layers"], key=run["layers"].get)) != run["weights"]:
            raise ValueError(f"expected the weights that the run began with in {str(start)!r}, got others")
    return weights


def _metadata(source: Path, run: Mapping) -> dict[str, str]:
    """As it stands beside the logits of the run; empty where it is not known."""
    try:
        start = json.loads((source / SETTINGS).read_text(encoding="utf-8"))
        settings = start["settings"]
        return logits_metadata(settings, run["weights"], start["dense_weights"], told_weights(settings["refit"]))
    except (OSError, ValueError, KeyError, TypeError):
        return {}
