"""What a run of `maskpro learn` leaves at its end: checkpoint, logits, pictures and report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..checkpoints.logits import save_logits
from ..digests import digest
from ..files import sync, write_whole
from ..functional.masks import top_n_mask
from ..learn.masks import least_margin
from ..learn.run import newest_snapshot
from ..modules import masked_layers
from ..pattern import NMPattern
from ..prune.finalize import finalize
from ..report.parting import parting
from ..report.plots import draw_perplexity, draw_residual
from .baselines import top_n_codes
from .changed_weights import name_over, told_weights, told_weights_of
from .estimator_options import class_of
from .inputs import Inputs
from .models import save
from .perplexities import table_row
from .progress import tell, tell_as
from .run_files import (
    LOGITS,
    PERPLEXITY_PICTURE,
    PROGRESS,
    REPORT,
    RESIDUAL_PICTURE,
    digest_of_weights,
    logits_metadata,
)
from .run_settings import reported_settings, stored_settings
from .start_mask import name_of_init
from .versions import versions


def write_results(
    args: argparse.Namespace,
    inputs: Inputs,
    start: Mapping,
    records: Sequence[Mapping],
    validation: Sequence[Mapping],
    better: Mapping | None,
    seconds: float,
) -> dict:
    """Write what a run leaves that has taken its last step; gives its report.

    Args:
        args: the settings, complete.
        inputs: with the model that has learned, whose masked layers become plain ones.
        start: what was known before the first step.
        records: metrics of each step.
        validation: validation perplexities by step.
        better: an earlier mask, where the last one is worse on the validation text.
        seconds: from the dense model to the learned mask.

    Raises:
        OSError: if something cannot be written. The report is not there then: the run can be gone on with.
    """
    model, output, pattern = inputs.model, Path(args.output), NMPattern(args.pattern)
    weights = told_weights_of(model, args.refit, start)
    learned = name_over(args.estimator, weights)
    table = [*start["table"], table_row(learned, model, inputs.tests, seconds, args.bars)]
    save_run_logits(args, model, start)
    groups = _groups_of(model, output / PROGRESS, pattern)
    _warn_of_no_move(args, model, groups, ended=len(records) == args.steps)
    save(finalize(model), inputs.tokenizer, args, args.model, str(pattern), table)
    draw_perplexity({learned: validation}, output / PERPLEXITY_PICTURE)
    if any(record["residual"] is not None for record in records):
        draw_residual(records, output / RESIDUAL_PICTURE)
    report = {
        **_settings_of(args),
        "initial_mask": start.get("initial_mask"),
        "weights": weights,
        "versions": versions(),
        "eval_tokens": inputs.tests["perplexity"].numel(),
        "eval_digest": digest([inputs.tests["perplexity"]]),
        "validation_digest": digest([inputs.validation]),
        "learned_texts": inputs.learned_texts,
        "table": table,
        "parting": parting(table),
        "validation": validation,
        "better_mask": better,
        **groups,
        "converted": start["converted"],
        "skipped": start["skipped"],
        "steps": records,
    }
    # Last, and behind all else on the disk too: a folder with a report is a run that ended.
    for written in (*filter(Path.is_file, output.iterdir()), output):
        sync(written)
    write_whole(output / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    return report


def _settings_of(args: argparse.Namespace) -> dict:
    """What a report tells of how the run was asked for."""
    return {
        "model": stored_settings(args)["model"],
        "pattern": str(NMPattern(args.pattern)),
        "settings": reported_settings(args),
        "gap": args.gap,
        "start": name_over(name_of_init(args.init), told_weights(args.refit)),
    }


def save_run_logits(args: argparse.Namespace, model: torch.nn.Module, start: Mapping) -> None:
    """Write the logits of a run into its folder, with the weights where these have changed."""
    weights_are = told_weights_of(model, args.refit, start)
    of = digest_of_weights(model), start["dense_weights"], weights_are, start["run"]
    metadata = logits_metadata(stored_settings(args), *of)
    save_logits(model, Path(args.output) / LOGITS, metadata)


def _groups_of(model: torch.nn.Module, progress: Path, pattern: NMPattern) -> dict:
    """What a report tells of the groups: how many there are, how many have changed, and a digest of their logits.

    Where it is not known which have changed, their number is None, and that by layer empty.
    """
    masked = masked_layers(model)
    learned = top_n_codes(masked, pattern)
    flips = _flips(progress, learned, pattern)
    return {
        "groups": sum(code.numel() for code in learned.values()),
        "groups_by_layer": {name: code.numel() for name, code in learned.items()},
        "flipped_groups": sum(flips.values()) if flips else None,
        "flipped_groups_by_layer": flips,
        # What a replay prints
        "logits": digest(masked[name].logits for name in sorted(masked)),
    }


def _warn_of_no_move(args: argparse.Namespace, model: torch.nn.Module, groups: Mapping, ended: bool) -> None:
    """Tell of a run that has changed no mask, and has taken all of its steps, how near it came."""
    if not ended or groups["flipped_groups"] or not groups["flipped_groups_by_layer"]:
        return
    nearest = least_margin(masked_layers(model))
    faster = "a higher --lr or " if any(option.name == "lr" for option in class_of(args).options) else ""
    tell_as(
        "warning",
        f"no group has left the initial mask: the nearest dropped logit is still {nearest:.3g} below a kept one, with "
        f"a gap of {args.gap:g}; take more --steps, {faster}a smaller --gap",
    )


def _flips(progress: Path, learned: Mapping[str, torch.Tensor], pattern: NMPattern) -> dict[str, int]:
    """How many groups of each layer differ from the mask that learning began with."""
    try:
        _, initial, _, _ = newest_snapshot(progress, at_most=0)
    except ValueError as error:
        tell(f"how many groups differ from the initial mask is not known: {error}")
        return {}
    return {name: int((codes.cpu() != top_n_mask(initial[name], pattern)).sum()) for name, codes in learned.items()}
