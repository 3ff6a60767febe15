"""Masked layers in the place of nn.Linear layers that fully_shard has cut over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing

import torch
from torch import Tensor, nn

from ..digests import digest_of_named
from ..fsdp import is_distributed, like_shards, part_of, resharded
from ..learn.batches import content
from ..modules import CounterState, MaskedLinear, initial_logits
from ..pattern import NMPattern
from ..ranks import Ranks
from .calibration import check_calibration
from .initial_masks import Init, Progress, check_given, given, initial_codes, refitted_masks
from .reconstruction import Reconstruction
from .refit import refit_layers

# Of what is refused
CUT = "in a model that is cut over ranks"
# What ranks find without one that has whole layers
FOUND_BY_RANKS = ("magnitude", "random", "wanda", "reconstruction")
# Of these, what runs the model
CALIBRATED = ("wanda", "reconstruction")


def is_cut(model: nn.Module) -> bool:
    """Whether a parameter is a DTensor. The model has its shards then: FSDP2 may have kept gathered what ran last."""
    resharded(model)
    return any(map(is_distributed, model.parameters()))


def has_shards(layers: Mapping[str, nn.Module]) -> bool:
    """Whether the weight of a layer is a DTensor."""
    return any(is_distributed(layer.weight) for layer in layers.values())


def agreed_calibration(model: nn.Module, calibration: Iterable | None) -> Iterable | None:
    """The batches. Of a model that is cut all ranks have them alike, ahead of any forward to which they have to come.

    Raises:
        TypeError, ValueError: they are no batches, or ranks have others.
    """
    if not is_cut(model):
        return calibration

    def batches() -> list | None:
        if calibration is None:
            return None
        check_calibration(calibration)
        return list(calibration)

    with closing(Ranks()) as ranks:
        ranks.connect()
        found = ranks.all_of(batches)
        ranks.agree({"calibration": found and [content(batch, index) for index, batch in enumerate(found)]})
    return found


def masks_of_shards(
    layers: Mapping[str, nn.Linear],
    pattern: NMPattern,
    init: Init,
    refit: str,
    model: nn.Module,
    calibration: Iterable | None,
    logits_device: torch.device | None,
    seed: int,
    progress: Progress | None,
) -> Reconstruction:
    """Group codes [rows, columns / M] of the initial masks of what this rank has, and refitted weights, by name.

    Args:
        layers: by name.
        init: one of ``FOUND_BY_RANKS``; or group codes [out, K / M] by name, for exactly these layers.
        calibration: of ``agreed_calibration``.
        logits_device: as for ``convert``; None, for logits lie with the weights that are cut.
        The others: as for ``convert``.

    Raises:
        TypeError, ValueError: an argument is not as above, or ranks have others.
    """
    if logits_device is not None:
        raise ValueError(f"logits_device: expected None {CUT}, got {logits_device}; convert it ahead of fully_shard")
    with closing(Ranks()) as ranks:
        ranks.connect()
        # ahead of what all ranks have to come to: one may not see the file
        known = ranks.all_of(lambda: _known_by(init, layers, pattern))
        ranks.agree({"init": known, "refit": refit, "seed": seed})
        with ranks.naming_lost():
            batches = calibration and list(calibration)
            if refit != "none":
                check_given(f'batches for refit="{refit}"', model, batches)
            if refit != "none" or init in CALIBRATED:
                _check_all_cut(layers)
            if init == "reconstruction":
                return refitted_masks(layers, pattern, init, refit, model, batches, progress)
            if isinstance(init, Mapping):
                whole = given(layers, pattern, init)
                codes = {name: part_of(whole[name], layer.weight, pattern.m) for name, layer in layers.items()}
            else:
                codes = initial_codes(layers, pattern, init, model, batches, progress, seed)
            if refit == "none":
                return Reconstruction(codes, {})
            patterns = dict.fromkeys(layers, pattern)
            weights, _ = refit_layers(model, layers, codes, patterns, batches, refit, progress=progress)
            return Reconstruction(codes, weights)


def _check_all_cut(layers: Mapping[str, nn.Linear]) -> None:
    """Raise ValueError if a layer is whole beside others that are cut, or two share a weight."""
    cut = next(name for name, layer in layers.items() if is_distributed(layer.weight))
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        if not is_distributed(layer.weight):
            raise ValueError(
                f"targets: expected layers that are all cut over ranks, or none, got {cut}, which is cut, and {name}, "
                "which is not"
            )
        if owners.setdefault(id(layer.weight), name) != name:
            raise ValueError(
                f"targets: expected layers with a weight of their own {CUT}, got one weight in "
                f"{owners[id(layer.weight)]} and {name}"
            )


def _known_by(init: Init, layers: Mapping[str, nn.Linear], pattern: NMPattern) -> str:
    """What tells the initial mask that is given on this rank from others."""
    if isinstance(init, Mapping):
        return digest_of_named(given(layers, pattern, init))
    if init in FOUND_BY_RANKS:
        return init
    raise ValueError(
        f"init: expected one of {', '.join(FOUND_BY_RANKS)}, or group codes {CUT}, got {init!r}; convert it ahead of "
        "fully_shard"
    )


def masked_linear_of_shards(
    linear: nn.Linear,
    pattern: NMPattern,
    codes: Tensor,
    *,
    gap: float,
    logits_dtype: torch.dtype,
    layer: int,
    counter_state: CounterState,
) -> MaskedLinear:
    """A MaskedLinear with the shards of a layer's weight and bias, frozen, and logits on the same mesh.

    FSDP2 knows nothing of the logits. ``masked_layers`` leads what it gathers to the new layer.

    Args:
        codes: group codes [rows, columns / M] of this rank.
        The others: as for ``MaskedLinear.from_linear``.
    """
    weight, bias, device = linear.weight, linear.bias, linear.weight.device
    empty = (torch.empty(x.shape, dtype=x.dtype, device="meta") if x is not None else None for x in (weight, bias))
    logits = torch.empty(weight.shape, dtype=logits_dtype, device="meta")
    masked = MaskedLinear(*empty, logits, pattern, layer=layer, counter_state=counter_state)
    # the very parameters: FSDP2 knows them by these objects
    masked.weight, masked.bias = weight.requires_grad_(False), None if bias is None else bias.requires_grad_(False)
    masked.logits = nn.Parameter(like_shards(initial_logits(codes, pattern, gap, logits_dtype), weight))
    masked.layer_id = torch.empty((), dtype=torch.int64, device=device)
    masked.layer = layer
    return masked.train(linear.training)
