"""The masks that learning can start from, each with its perplexity."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping

import torch

from ..functional.masks import top_n_mask
from ..modules import MaskedLinear, initial_logits, masked_layers
from ..pattern import NMPattern
from ..prune.convert import convert
from ..prune.initial_masks import INITIAL_MASKS, refitted_masks
from ..prune.refit import put_weights
from ..prune.selection import layers_to_convert
from ..ranks import Ranks
from .changed_weights import name_over, spread_weights, told_weights
from .inputs import Inputs
from .perplexities import table_row
from .progress import Progress, tell
from .run_files import digest_of_weights
from .run_settings import logits_of
from .start_mask import StartMask, name_of_init

# The initial masks that the table shows, whichever learning starts from
BASELINES = ("magnitude", "wanda")


def initial_masks(args: argparse.Namespace, inputs: Inputs, mask: StartMask, ranks: Ranks) -> dict:
    """Convert the model, evaluate the initial masks and leave that of ``--init``: the rows of the table, and more.

    ``mask`` was read on rank 0 alone.

    With ``--refit`` the weights under that mask are refitted. Rank 0 does so; the others take its mask and weights,
    since another processor may find others.

    Raises:
        ValueError: if the dense model has no perplexity.
    """
    found = ranks.first(lambda: _evaluated(args, inputs, mask))
    if ranks.world > 1:
        pattern = NMPattern(args.pattern)
        # of a rank that cannot, all are to know
        ranks.all_of(lambda: ranks.rank == 0 or convert(inputs.model, pattern, init="magnitude", **logits_of(args)))
        masked = masked_layers(inputs.model)
        codes = top_n_codes(masked, pattern)
        for code in codes.values():
            ranks.spread_(code)
        _set_logits(masked, codes, pattern, args.gap)
        if args.refit != "none":
            spread_weights(masked, ranks)
    return found


def _evaluated(args: argparse.Namespace, inputs: Inputs, mask: StartMask) -> dict:
    """The same on one rank."""
    pattern, model, tests = NMPattern(args.pattern), inputs.model, inputs.tests

    def row(method: str, seconds: float) -> dict:
        found = table_row(method, model, tests, seconds, args.bars)
        if method == "dense" and math.isnan(found["perplexity"]):
            cure = "copy or download it again" if args.dtype == "float32" else "take --dtype float32"
            raise ValueError(f"model: expected a finite loss, got nan in {args.dtype}; {cure}")
        if not args.bars:
            tell(f"{method}: test perplexity {found['perplexity']:.2f}, {seconds:.1f} seconds from the dense model")
        return found

    table = [row("dense", 0.0)]
    layers, skipped = layers_to_convert(model, pattern)
    for name, reason in skipped.items():
        tell(f"left dense: {name} ({reason})")
    start = name_over(name_of_init(args.init), told_weights(args.refit))
    found, seconds = {}, {}
    for name, init, refit in [*((init, init, "none") for init in BASELINES), (start, mask.init, args.refit)]:
        if name not in found:
            began, progress = time.perf_counter(), Progress(name, "layer", args.bars)
            found[name] = refitted_masks(
                layers, pattern, init, refit, model, inputs.initial_batches, progress, args.seed
            )
            seconds[name] = time.perf_counter() - began
    conversion = convert(model, pattern, init=found[start].codes, **logits_of(args))
    masked = masked_layers(model)
    dense_weights = digest_of_weights(model)
    # The mask that learning starts from goes last, so that its logits stay, and its weights.
    rows = {}
    for name in sorted(found, key=lambda name: name == start):
        _set_logits(masked, found[name].codes, pattern, conversion.gap)
        put_weights(masked, found[name].weights)
        rows[name] = row(name, seconds[name])
    table += [rows[name] for name in dict.fromkeys((*INITIAL_MASKS, start)) if name in rows]
    return {
        "table": table,
        "seconds": seconds[start],
        "converted": list(conversion.converted),
        "skipped": dict(conversion.skipped),
        "dense_weights": dense_weights,
        "start_weights": digest_of_weights(model),
        "initial_mask": mask.by_codes_by,
    }


def top_n_codes(masked: Mapping[str, MaskedLinear], pattern: NMPattern) -> dict[str, torch.Tensor]:
    """Group codes of the most likely masks."""
    return {name: top_n_mask(module.logits.detach(), pattern) for name, module in masked.items()}


@torch.no_grad()
def _set_logits(
    masked: Mapping[str, MaskedLinear], codes: Mapping[str, torch.Tensor], pattern: NMPattern, gap: float
) -> None:
    for name, module in masked.items():
        module.logits.copy_(initial_logits(codes[name], pattern, gap))
