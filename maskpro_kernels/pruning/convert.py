"""Masked layers into a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..functional.checks import LOGIT_DTYPES
from ..modules import CounterState, MaskedLinear, check_gap, check_in_memory, device_of_logits
from ..pattern import NMPattern
from .gap import gap_for_flip_rate
from .initial_masks import check_calibration, initial_codes
from .reconstruction import reconstruct
from .replacement import _replace

DEFAULT_GAP = 10.0
INITIAL_MASKS = ("magnitude", "wanda", "reconstruction")

BYPASSED = "the fast path of nn.TransformerEncoderLayer reads the weight past the mask"


@dataclass
class Conversion:
    """What ``convert`` did.

    Attributes:
        converted: names of the layers that are MaskedLinear now, in the order of their layer ids.
        skipped: names of the nn.Linear layers left as they were, each with the reason.
        gap: the gap between kept and dropped logits.
    """

    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    gap: float = DEFAULT_GAP


def convert(
    model: nn.Module,
    pattern: str | NMPattern,
    targets: Sequence[str] | None = None,
    init: str | Mapping[str, Tensor] = "magnitude",
    gap: float = DEFAULT_GAP,
    flip_rate: float | None = None,
    calibration: Iterable | None = None,
    logits_dtype: torch.dtype = torch.float32,
    logits_device: torch.device | str | None = None,
) -> Conversion:
    """Replace the nn.Linear layers of a model by MaskedLinear, in place; weights are shared, not copied.

    A model may be spread over several devices: logits, seed and step live with each weight. What accelerate's
    ``dispatch_model`` has hooked to a layer to bring its inputs there is hooked to its replacement.

    Args:
        model: any module that contains nn.Linear layers.
        pattern: "N:M" or NMPattern.
        targets: fnmatch patterns on module names, each of which must match an nn.Linear. Default: all
            but the output head, layers whose weight is shared, layers with forward hooks, and layers that the
            pattern does not fit.
        init: "magnitude", "wanda" or "reconstruction" (these need ``calibration``), or {name: group codes}; see
            ``initial_codes`` and ``reconstruct``, which starts from Wanda's mask.
        gap: logits are ``gap`` where the initial mask keeps and 0 where it drops.
        flip_rate: in place of ``gap``: the share of groups that leave the initial mask in a draw.
        calibration: batches, each a tensor, a tuple or a mapping given to the model.
        logits_dtype: float32, bfloat16 or float16; in 16 bits updates are rounded stochastically.
        logits_device: where all logits live, such as "cpu" where the devices of the weights have no room for them; each
            layer's are then copied to its weight for each use. Default: with the weights. ``model.to`` moves both.

    Returns:
        A Conversion: names converted, names left out with the reason, and the gap.

    Raises:
        TypeError, ValueError: an argument is not as above, a weight is not finite or not in memory, or nothing is left
            to convert. The model is then as it was.
    """
    pattern = NMPattern(pattern)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected nn.Module, got {type(model).__name__}")
    if isinstance(init, str) and init not in INITIAL_MASKS:
        raise ValueError(f"init: expected one of {INITIAL_MASKS} or a mapping of names to group codes, got {init!r}")
    check_gap(gap, logits_dtype)
    if logits_device is not None:
        logits_device = device_of_logits(logits_device)
    if flip_rate is not None:
        if gap != DEFAULT_GAP:
            raise ValueError(f"flip_rate: expected gap or flip_rate, not both, got gap={gap}, flip_rate={flip_rate}")
        gap = gap_for_flip_rate(flip_rate, pattern)
    layers, skipped = layers_to_convert(model, pattern, targets)
    if init == "reconstruction":
        if calibration is None:
            raise ValueError('calibration: expected batches for init="reconstruction", got none')
        check_calibration(calibration)
        calibration = list(calibration)
        codes = initial_codes(layers, pattern, "wanda", model, calibration)
        codes = reconstruct(model, layers, codes, pattern, calibration)
    else:
        codes = initial_codes(layers, pattern, init, model, calibration)

    # layers of an earlier conversion keep their ids: two layers with one id would draw the same noise
    earlier = [module for module in model.modules() if isinstance(module, MaskedLinear)]
    all_states = {layer.weight.device: layer.counter_state for layer in earlier}
    first_id = max((layer.layer + 1 for layer in earlier), default=0)
    replacements = {}
    for layer_id, (name, layer) in enumerate(layers.items(), start=first_id):
        device = layer.weight.device
        if device not in all_states:
            all_states[device] = CounterState(device=device)
        replacements[id(layer)] = MaskedLinear.from_linear(
            layer,
            pattern,
            codes.pop(name),
            gap,
            logits_dtype=logits_dtype,
            logits_device=logits_device,
            layer=layer_id,
            counter_state=all_states[device],
        )
    _replace(model, replacements)
    return Conversion(list(layers), skipped, gap)


def layers_to_convert(
    model: nn.Module, pattern: str | NMPattern, targets: Sequence[str] | None = None
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The layers that ``convert`` would replace, by name, and why it would leave out the others.

    Raises:
        TypeError, ValueError: an argument is not as in ``convert``, a weight is not finite or not in memory, or nothing
            is left to convert.
    """
    layers, skipped = _select(model, NMPattern(pattern), targets)
    for name, layer in layers.items():
        check_in_memory("model", layer, name)
        if layer.weight.dtype not in LOGIT_DTYPES:
            raise TypeError(f"model: expected weights in {LOGIT_DTYPES}, got {layer.weight.dtype} in {name}")
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"model: expected finite weights, got NaN or infinity in {name}")
    return layers, skipped


def _select(
    model: nn.Module, pattern: NMPattern, targets: Sequence[str] | None
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """(layers to convert by name, reason by name of the layers left out)."""
    everything = {name: module for name, module in model.named_modules() if name and isinstance(module, nn.Linear)}
    linears = {name: module for name, module in everything.items() if type(module) is nn.Linear}
    if not linears:
        told = "model: expected a module that contains nn.Linear layers, got none"
        if any(isinstance(module, MaskedLinear) for module in model.modules()):
            told += ", but MaskedLinear: it has been converted; finalize it first"
        elif isinstance(model, nn.Linear):
            told += "; a single layer is converted by MaskedLinear.from_linear"
        raise ValueError(told)
    # they compute something else than x @ w.T + b, or rely on their type
    subclasses = {
        name: f"subclass of nn.Linear: {type(module).__name__}"
        for name, module in everything.items()
        if name not in linears
    }
    bypassed = _bypassed(model)
    if targets is None:
        reasons = {
            name: BYPASSED if name in bypassed else _reason_against(model, module, pattern)
            for name, module in linears.items()
        }
        skipped = {name: reason for name, reason in reasons.items() if reason}
        chosen = {name: module for name, module in linears.items() if name not in skipped}
        if not chosen:
            reasons = ", ".join(sorted(set(skipped.values())))
            raise ValueError(f"model: expected an nn.Linear that {pattern} fits, all were left out: {reasons}")
        return chosen, skipped | subclasses
    if isinstance(targets, str):
        raise TypeError(f"targets: expected a sequence of fnmatch patterns, got the str {targets!r}")
    if not isinstance(targets, Sequence):
        raise TypeError(f"targets: expected a sequence of fnmatch patterns, got {type(targets).__name__} {targets!r}")
    for target in targets:
        if not isinstance(target, str):
            raise TypeError(f"targets: expected a sequence of str, got {type(target).__name__} {target!r} in it")
    # a layer that stands in several places answers to each of its names
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    matched = set()
    for target in targets:
        found = [n for n, module in linears.items() if any(fnmatchcase(name, target) for name in names[id(module)])]
        if not found:
            raise ValueError(f"targets: expected each to match an nn.Linear, {target!r} matches none")
        matched.update(found)
    if not matched:
        raise ValueError(f"targets: expected at least one pattern, got {targets!r}")
    chosen = {name: module for name, module in linears.items() if name in matched}
    for name, module in chosen.items():
        if name in bypassed:
            raise ValueError(f"targets: expected layers that run as modules, got {name}: {BYPASSED}")
        if module.in_features % pattern.m:
            raise ValueError(
                f"targets: expected in_features divisible by {pattern.m}, got {module.in_features} in {name}"
            )
    return chosen, {name: "matches no target" for name in linears if name not in chosen} | subclasses


def _bypassed(model: nn.Module) -> set[str]:
    """Names of layers whose weights a parent reads past the module."""
    return {
        f"{name}.{child}" if name else child
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer)
        for child in ("linear1", "linear2")
    }


def _reason_against(model: nn.Module, linear: nn.Linear, pattern: NMPattern) -> str | None:
    """Why a layer is not converted by default."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if linear is head:
        return "output head"
    embeddings = (module.weight for module in model.modules() if isinstance(module, nn.Embedding))
    if any(weight is linear.weight for weight in embeddings):
        return "weight tied to an embedding"
    others = (module for module in model.modules() if isinstance(module, nn.Linear) and module is not linear)
    if any(other.weight is linear.weight for other in others):
        return "weight tied to another layer"
    if linear._forward_hooks or linear._forward_pre_hooks:
        return "has forward hooks, which its replacement would lose"
    if linear.in_features % pattern.m:
        return f"in_features {linear.in_features} not divisible by {pattern.m}"
    return None
