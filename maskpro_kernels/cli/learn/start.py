"""The masks that a run starts from: computed and evaluated for a new run, restored for a resumed one."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoints.logits import load_logits
from ...functional.masks import top_n_mask
from ...learn.estimator import LossFn
from ...modules import MaskedLinear, initial_logits, masked_layers
from ...ops.pattern import NMPattern
from ...prune.convert import convert
from ...prune.density import costliest_layers
from ...prune.initial_masks import INITIAL_MASKS, initial_codes, refitted_masks
from ...prune.reconstruction import Reconstruction
from ...prune.refit import put_weights
from ...ranks import Ranks
from ...text.perplexity import causal_lm_loss
from ..config import Learn
from ..inputs import PROGRESS, Progress, digest_of_weights, naming, report, report_as, wants_bars
from .data import Data, Dense
from .evaluation import changes_of_weights, name_in_table, table_row
from .options import with_absolute_paths

# Refitted weights with which a run begins
START_WEIGHTS = "start-weights.safetensors"
# Reason that a layer stays dense because of --density
COSTLY = "the mask would cost most for its size"
# Initial masks that are always in the table
BASELINES = ("magnitude", "wanda")


@dataclass
class InitialMask:
    """An initial mask, its refitted weights, and the seconds from the dense model to it."""

    mask: Reconstruction
    seconds: float


def codes_of_init(options: Learn, dense: Dense) -> str | dict[str, Tensor]:
    """Name of the initial mask, or group codes by layer if ``--init`` is a path."""
    if options.init in INITIAL_MASKS:
        return options.init
    return initial_codes(dense.layers, options.pattern, options.init)


def choose_masks(
    options: Learn, ranks: Ranks, dense: Dense, data: Data, init: str | dict[str, Tensor], loss_fn: LossFn
) -> dict:
    """Convert the model to the initial mask of a new run; ``init`` is of ``codes_of_init``.

    Returns:
        Results before the first step, which ``start.json`` has: the table, the seconds from the dense model to this
        mask, names, digests.
    """
    if getattr(loss_fn, "cache", None) is not None:
        report(f"computing the dense model's outputs for {len(data.calibration)} batches, since weights will change")
        batches_of_rank = data.calibration[ranks.rank :: ranks.world_size]
        ranks.run_on_all(loss_fn.fill, dense.model, batches_of_rank, progress=wants_bars())
    for name, reason in dense.skipped.items():
        report(f"left dense: {name} ({reason})")
    start = ranks.run_on_main(_convert_and_evaluate, options, dense, data, init)
    if ranks.world_size > 1:
        ranks.run_on_all(_convert_other_ranks, options, ranks, dense.model, start["targets"])
        _broadcast_masks(options, dense.model, ranks)
    costly = {name: COSTLY for name in dense.layers if name not in start["converted"]}
    return start | {
        "base": dense.base,
        "evaluated": data.evaluated,
        "skipped": dense.skipped | costly,
        "options": with_absolute_paths(options),
    }


def restore_masks(options: Learn, ranks: Ranks, dense: Dense, start: Mapping) -> None:
    """Convert the model as at the start of a run, with its refitted weights; the trainer restores the logits."""
    targets = start["targets"]
    ranks.run_on_all(convert, dense.model, options.pattern, targets, init="magnitude", gap=options.gap)
    if options.refit != "none":
        ranks.run_on_main(_restore_weights, dense.model, Path(options.output) / PROGRESS / START_WEIGHTS, start)
        _broadcast_weights(dense.model, ranks)


def _restore_weights(model: nn.Module, path: Path, start: Mapping) -> None:
    with naming("resume", "restore it from a copy"):
        put_weights(masked_layers(model), load_logits(path).weights)
    if digest_of_weights(model) != start["start_weights"]:
        raise ValueError(f"resume: expected the refitted weights in {str(path)!r}, got others")


def _convert_and_evaluate(options: Learn, dense: Dense, data: Data, init: str | dict[str, Tensor]) -> dict:
    """Evaluate the dense model and initial masks; the model keeps the mask of ``--init``, with its weights."""
    model = dense.model
    pattern = NMPattern(options.pattern)
    dense_row = _evaluated("dense", options, dense, data, 0.0)
    method = options.init if options.init in INITIAL_MASKS else f"mask of {Path(options.init).name}"
    chosen = name_in_table(method, options, changes_of_weights(options))
    masks = _initial_masks(options, dense, data.initial, chosen, init)
    codes = masks[chosen].mask.codes
    targets = None
    if options.density is not None:
        began = time.perf_counter()
        targets = _layers_to_mask(options, dense, data.initial, masks[chosen].mask)
        codes = {name: codes[name] for name in targets}
        masks[chosen].seconds += time.perf_counter() - began
    conversion = convert(model, pattern, targets, init=codes, gap=options.gap)
    dense_weights = digest_of_weights(model)
    rows = {}
    # last the mask that learning starts from, so that its logits and weights stay
    for name in (*(name for name in masks if name != chosen), chosen):
        _put_mask(masked_layers(model), masks[name].mask, options)
        rows[name] = _evaluated(name, options, dense, data, masks[name].seconds)
    in_order = [name_in_table(name, options) for name in INITIAL_MASKS] + [chosen]
    return {
        "table": [dense_row, *(rows[name] for name in dict.fromkeys(in_order) if name in rows)],
        "seconds": masks[chosen].seconds,
        "targets": targets,
        "converted": list(conversion.converted),
        "dense_weights": dense_weights,
        "start_weights": digest_of_weights(model),
    }


def _initial_masks(
    options: Learn, dense: Dense, batches: Sequence[Tensor], chosen: str, init: str | dict[str, Tensor]
) -> dict[str, InitialMask]:
    """Compute the masks of the table, by name: baselines, and the one of ``--init``."""
    wanted = {name_in_table(name, options): (name, "none") for name in BASELINES}
    # the same mask is computed once
    wanted.setdefault(chosen, (init, options.refit))
    masks = {}
    for name, (method, refit) in wanted.items():
        began = time.perf_counter()
        progress = Progress(name, "layer")
        mask = refitted_masks(
            dense.layers, NMPattern(options.pattern), method, refit, dense.model, batches, progress, options.seed
        )
        masks[name] = InitialMask(mask, time.perf_counter() - began)
    return masks


def _layers_to_mask(options: Learn, dense: Dense, batches: Sequence[Tensor], mask: Reconstruction) -> list[str]:
    """Names of the layers that get a mask in a model of the density: not those whose masks cost most."""
    layers = dense.layers
    report(f"computing by {len(batches)} batches which masks cost most")
    pattern = NMPattern(options.pattern)
    costly = costliest_layers(dense.model, layers, mask, pattern, causal_lm_loss, batches, options.density)
    report(f"left dense: {len(costly)} of {len(layers)} layers ({COSTLY})")
    if not costly:
        report_as("warning", f"no matrix is small enough to stay dense within --density {options.density:.7g}")
    return [name for name in layers if name not in costly]


def _evaluated(method: str, options: Learn, dense: Dense, data: Data, seconds: float) -> dict:
    """Evaluate the model before the first step, and report its perplexity: a row of the table."""
    row = table_row(method, dense.model, data.tests, seconds)
    if method == "dense" and math.isnan(row["perplexity"]):
        raise ValueError(f"model: expected a finite loss, got nan in {options.dtype}; use --dtype float32")
    if not wants_bars():
        from_dense = "" if method == "dense" else f", {seconds:.1f} seconds from the dense model"
        report(f"{method}: test perplexity {row['perplexity']:.2f}{from_dense}")
    return row


def _put_mask(layers: Mapping[str, MaskedLinear], mask: Reconstruction, options: Learn) -> None:
    _set_logits(layers, mask.codes, options)
    put_weights(layers, {name: weight for name, weight in mask.weights.items() if name in layers})


@torch.no_grad()
def _set_logits(layers: Mapping[str, MaskedLinear], codes: Mapping[str, Tensor], options: Learn) -> None:
    for name, layer in layers.items():
        layer.logits.copy_(initial_logits(codes[name], NMPattern(options.pattern), options.gap))


def _convert_other_ranks(options: Learn, ranks: Ranks, model: nn.Module, targets: Sequence[str] | None) -> None:
    if not ranks.is_main_process:
        convert(model, options.pattern, targets, init="magnitude", gap=options.gap)


def _broadcast_masks(options: Learn, model: nn.Module, ranks: Ranks) -> None:
    """Send the mask and the weights of rank 0 to all ranks: another processor may compute others."""
    layers = masked_layers(model)
    codes = {name: top_n_mask(layer.logits.detach(), layer.pattern) for name, layer in layers.items()}
    for layer_codes in codes.values():
        ranks.broadcast(layer_codes)
    _set_logits(layers, codes, options)
    if options.refit != "none":
        _broadcast_weights(model, ranks)


def _broadcast_weights(model: nn.Module, ranks: Ranks) -> None:
    if ranks.world_size > 1:
        for layer in masked_layers(model).values():
            weight = layer.weight.detach().clone()
            ranks.broadcast(weight)
            layer.weight.data = weight
            layer.weight_changed = True
