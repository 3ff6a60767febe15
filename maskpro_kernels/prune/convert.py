"""Masked layers into a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..fsdp import check_no_flat_parameters, is_distributed
from ..functional.checks import check_gap, check_int, describe
from ..functional.logits_device import device_of_logits
from ..modules import CounterState, MaskedLinear
from ..pattern import NMPattern
from ..unfuse import in_linear_form
from .bypassed import first_call
from .coverage import MOST_OF_A_MODEL, coverage, reasons_by_name
from .gap import gap_for_flip_rate
from .initial_masks import Init, Progress, check_initial_mask, refitted_masks
from .reconstruction import Reconstruction, check_refit
from .refit import put_weights
from .replacement import check_replaceable, replace_layers
from .selection import layers_to_convert
from .sharded import agreed_calibration, has_shards, is_cut, masked_linear_of_shards, masks_of_shards

DEFAULT_GAP = 10.0


@dataclass
class Conversion:
    """What ``convert`` did.

    Attributes:
        converted: names of the layers that are MaskedLinear now, in the order of their layer ids.
        skipped: names of the layers left as they were, each with the reason; of a module that could have been taken
            apart, its own name.
        gap: the gap between kept and dropped logits.
        masked_share: the share of the model's matrix weights that have a mask now, embeddings and the output head
            apart. A matrix is any parameter of two or more dimensions.
        unmasked: names of all matrices without a mask, such as convolutions, each with the reason.
    """

    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    gap: float = DEFAULT_GAP
    masked_share: float = 1.0
    unmasked: dict[str, str] = field(default_factory=dict)


def convert(
    model: nn.Module,
    pattern: str | NMPattern,
    targets: Sequence[str] | None = None,
    init: Init = "magnitude",
    gap: float = DEFAULT_GAP,
    flip_rate: float | None = None,
    calibration: Iterable | None = None,
    logits_dtype: torch.dtype = torch.float32,
    logits_device: torch.device | str | None = None,
    refit: str = "none",
    seed: int = 0,
    progress: Progress | None = None,
) -> Conversion:
    """Replace the nn.Linear layers of a model by MaskedLinear, in place; weights that are not refitted are shared.

    Transformers' Conv1D and mixtures of experts are taken apart into layers first, see ``unfuse``. Weights that they
    hold transposed are copied. nn.MultiheadAttention is left out. Logits, seed and step live with each weight, be it on
    several devices. Hooks by which accelerate's ``dispatch_model`` brings inputs to a layer go to its replacement.

    Args:
        model: any module that contains nn.Linear layers, or what can be taken apart into such.
        pattern: "N:M" or NMPattern.
        targets: fnmatch patterns on module names, each of which must match an nn.Linear. Default: all but the output
            head, layers whose weight is shared, layers with forward hooks, layers that the pattern does not fit, and
            those whose weight other code reads past the module, see ``read_elsewhere``.
        init: "magnitude", "random", or of those that need ``calibration`` "wanda", "reconstruction" or "sparsegpt"; the
            path of a mask file, a run or a sparse checkpoint, see ``stored_mask``; or {name: group codes}. Where
            ``fully_shard`` has cut the model all ranks give the same; neither "sparsegpt" nor a path.
        gap: logits are ``gap`` where the initial mask keeps and 0 where it drops.
        flip_rate: in place of ``gap``: the share of groups that leave the initial mask in a draw.
        calibration: batches, each a tensor, a tuple or a mapping given to the model; the same ones on all ranks.
        logits_dtype: float32, bfloat16 or float16; in 16 bits updates are rounded stochastically.
        logits_device: where all logits live, such as "cpu" if the devices of the weights have no room for them. Each
            use then copies a layer's logits to its weight. Default: with the weights. ``model.to`` moves both.
        refit: "scales" or "weights" refit the weights under the initial mask, by the batches of ``calibration``, see
            ``refit``. With init="reconstruction" it is one pass, and the masks are chosen for the refit.
        seed: of init="random", in [0, 2**63). A second conversion of a model takes another one.
        progress: called by masks and refits that take minutes, with how many layers are done, and of how many.

    Returns:
        What has a mask now, what was left out and why, and the gap.

    Warns:
        UserWarning: without ``targets``, if under 90% of the matrix weights have a mask; if experts saw no token.

    Raises:
        TypeError, ValueError: an argument is not as above, a weight is not finite or in memory, or there is nothing
            to convert; the model is then as it was.
    """
    pattern = NMPattern(pattern)
    _check(model, init, refit, seed, progress)
    how = _logits(gap, flip_rate, pattern, logits_dtype, logits_device)
    call, calibration = first_call(agreed_calibration(model, calibration))
    with in_linear_form(model) as left_out:
        layers, skipped = layers_to_convert(model, pattern, targets, call)
        codes, weights = _masks(layers, pattern, init, refit, model, calibration, logits_device, seed, progress)
        replace_layers(model, _masked_linears(model, layers, codes, weights, pattern, **how))
    return _conversion(model, list(layers), skipped | left_out, how["gap"], warn=targets is None)


def _masks(
    layers: Mapping[str, nn.Linear],
    pattern: NMPattern,
    init: Init,
    refit: str,
    model: nn.Module,
    calibration: Iterable | None,
    logits_device: torch.device | str | None,
    seed: int,
    progress: Progress | None,
) -> Reconstruction:
    """Group codes, and weights that were refitted, by name: of whole layers, or of the part of this rank."""
    if is_cut(model) and has_shards(layers):
        return masks_of_shards(layers, pattern, init, refit, model, calibration, logits_device, seed, progress)
    return refitted_masks(layers, pattern, init, refit, model, calibration, progress, seed)


def _check(model: nn.Module, init: Init, refit: str, seed: int, progress: Progress | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected nn.Module, got {type(model).__name__}")
    if not is_cut(model):
        # else all ranks check it together, for one may not see a file
        check_initial_mask(init)
    check_refit(refit)
    check_int("seed", seed, 1 << 63)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: expected a function of two counts, got {describe(progress)}")
    check_no_flat_parameters("model", model)
    check_replaceable(model)


def _conversion(
    model: nn.Module, converted: list[str], skipped: Mapping[str, str], gap: float, warn: bool
) -> Conversion:
    skipped = reasons_by_name(model, skipped)
    found = coverage(model, skipped)
    if warn and found.share < MOST_OF_A_MODEL:
        largest, reason = next(iter(found.unmasked.items()))
        warnings.warn(
            f"model: {found.share:.1%} of its matrix weights have a mask, embeddings and the output head apart; "
            f"{len(found.unmasked)} matrices have none, such as {largest} ({reason}); Conversion.unmasked holds all",
            stacklevel=3,
        )
    return Conversion(converted, skipped, gap, found.share, found.unmasked)


def _logits(
    gap: float,
    flip_rate: float | None,
    pattern: NMPattern,
    logits_dtype: torch.dtype,
    logits_device: torch.device | str | None,
) -> dict:
    """How logits are made, checked: with the gap that was given, or the one of the flip rate."""
    check_gap(gap, logits_dtype)
    if flip_rate is not None:
        if gap != DEFAULT_GAP:
            raise ValueError(f"flip_rate: expected gap or flip_rate, not both, got gap={gap}, flip_rate={flip_rate}")
        gap = gap_for_flip_rate(flip_rate, pattern)
    device = None if logits_device is None else device_of_logits(logits_device)
    return {"gap": gap, "logits_dtype": logits_dtype, "logits_device": device}


def _masked_linears(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    codes: dict[str, Tensor],
    weights: Mapping[str, Tensor],
    pattern: NMPattern,
    **how,
) -> dict[int, MaskedLinear]:
    """The replacements by id of the layers; empties ``codes``.

    Args:
        weights: those that were refitted, by name.
        how: goes to ``MaskedLinear.from_linear``.
    """
    # layers of an earlier conversion keep their ids: two layers with one id would draw the same noise
    earlier = [module for module in model.modules() if isinstance(module, MaskedLinear)]
    states = {layer.weight.device: layer.counter_state for layer in earlier}
    first_id = max((layer.layer + 1 for layer in earlier), default=0)
    replacements = {}
    for layer_id, (name, layer) in enumerate(layers.items(), start=first_id):
        device = layer.weight.device
        if device not in states:
            states[device] = CounterState(device=device)
        of_layer = {"layer": layer_id, "counter_state": states[device], "gap": how["gap"]}
        if is_distributed(layer.weight):
            dtype = how["logits_dtype"]
            masked = masked_linear_of_shards(layer, pattern, codes.pop(name), logits_dtype=dtype, **of_layer)
        else:
            masked = MaskedLinear.from_linear(layer, pattern, codes.pop(name), **of_layer | how)
        replacements[id(layer)] = masked
    put_weights({name: replacements[id(layers[name])] for name in weights}, weights)
    return replacements
