"""``convert``, which replaces a model's nn.Linear layers by masked ones."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from ..files import digest_of_named
from ..fsdp import gathering_modules, reshard
from ..functional.checks import (
    LARGEST_GAP,
    check_device,
    check_gap,
    check_int,
    check_no_flat_parameters,
    check_one_of,
    in_a_line,
)
from ..learn.step_batches import content
from ..modules import CounterState, MaskedLinear, initial_logits
from ..ops.pattern import NMPattern
from ..packed import REPLACING, SPARSE
from ..ranks import Ranks
from ..shards import is_distributed
from ..unfuse import (
    as_built,
    check_not_merged,
    fit_adapters,
    in_linear_form,
    lost_with,
    refuse_merging,
    replace_modules,
)
from .calibration import check_calibration
from .initial_masks import Init, Progress, check_initial_mask, given, refitted_masks
from .reconstruction import Reconstruction
from .refit import FITS, put_weights
from .selection import MOST_OF_A_MODEL, coverage, first_call, layers_to_convert, reasons_by_name

# A part of error messages
CUT = "in a model that is cut over ranks"
# Initial masks that ranks compute together, each for its rows of the layers
OF_SHARDS = ("magnitude", "random", "wanda", "reconstruction")

DEFAULT_GAP = 10.0


@dataclass
class Conversion:
    """Result of ``convert``: names of the layers with and without a mask, and the gap.

    Attributes:
        converted: names of the layers that are MaskedLinear now, in the order of their layer ids.
        skipped: names of the unchanged layers, each with the reason; also names of modules that could have been
            unfused.
        gap: the gap between kept and dropped logits.
        masked_share: the share of the model's matrix weights that have a mask now. A matrix is any parameter of two or
            more dimensions; embeddings and the output head do not count.
        unmasked: names of all matrices without a mask, such as convolutions, each with the reason.
    """

    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    gap: float = DEFAULT_GAP
    masked_share: float = 1.0
    unmasked: dict[str, str] = field(default_factory=dict)


def convert(model: nn.Module, pattern: str | NMPattern, targets: Sequence[str] | None = None,
            init: Init = "magnitude", gap: float = DEFAULT_GAP, flip_rate: float | None = None,
            calibration: Iterable | None = None, logits_dtype: torch.dtype = torch.float32,
            logits_device: torch.device | str | None = None, refit: str = "none", seed: int = 0,
            progress: Progress | None = None) -> Conversion:  # fmt: skip
    """Replace the nn.Linear layers of a model by MaskedLinear, in place; weights that are not refitted are shared.

    Transformers' Conv1D and mixtures of experts become nn.Linear layers first, see ``unfuse``; their transposed weights
    are copied. nn.MultiheadAttention is left out. Logits, seed and step are on the device of each weight, also if a
    model uses several devices. Hooks of accelerate's ``dispatch_model`` move to the new layers.

    Args:
        model: any module that contains nn.Linear layers, or modules that ``unfuse`` can turn into them.
        pattern: "N:M" or NMPattern.
        targets: fnmatch patterns on module names, each of which must match an nn.Linear. Default: all but the output
            head, layers that share a weight but not the bias, layers with forward hooks, layers that the pattern does
            not fit, and layers whose weight other code reads directly, see ``read_elsewhere``.
        init: "magnitude" or "random"; with ``calibration`` also "wanda", "reconstruction" or "sparsegpt"; the path of a
            mask file, a run or a sparse checkpoint, see ``stored_mask``; or {name: group codes, or bool mask [out, K]}.
            If ``fully_shard`` has cut the model, all ranks pass the same, and neither "sparsegpt" nor a path.
        gap: initial logit of a kept weight; that of a dropped one is 0.
        flip_rate: instead of ``gap``: the share of groups whose draw differs from the initial mask.
        calibration: batches, each a tensor, a tuple or a mapping of arguments of the model; the same on all ranks.
        logits_dtype: float32, bfloat16 or float16; in 16 bits updates are rounded stochastically.
        logits_device: device of all logits, such as "cpu" if they do not fit beside the weights. Each use then copies a
            layer's logits to its weight. Default: with the weights. ``model.to`` moves both.
        refit: "scales" or "weights" refit the weights under the initial mask to the ``calibration`` batches, see
            ``refit``. With init="reconstruction" one pass does both, and masks are chosen for the refit.
        seed: of init="random", in [0, 2**63). Use another one to convert a model a second time.
        progress: called with (layers done, layers in all) by masks and refits that take minutes.

    Returns:
        The layers with a mask, those without and why, and the gap.

    Warns:
        UserWarning: without ``targets``, if under 90% of the matrix weights have a mask; if experts got no token.

    Raises:
        TypeError, ValueError: an argument is not as above, a weight is not finite or not in memory, or there is nothing
            to convert. The model is then unchanged.
    """
    pattern = NMPattern(pattern)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected nn.Module, got {type(model).__name__}")
    reshard(model)
    cut = any(map(is_distributed, model.parameters()))
    if not cut:
        # for cut models all ranks check it together
        check_initial_mask(init)
    check_one_of("refit", refit, ("none", *FITS))
    check_int("seed", seed, 1 << 63)
    check_gap(gap, logits_dtype)
    if flip_rate is not None:
        if gap != DEFAULT_GAP:
            raise ValueError(f"flip_rate: expected gap or flip_rate, not both, got gap={gap}, flip_rate={flip_rate}")
        gap = gap_for_flip_rate(flip_rate, pattern)
    device = None if logits_device is None else check_device("logits_device", logits_device)
    check_no_flat_parameters("model", model)
    # all parameters, before the model runs
    gathering_modules(model, {})
    check_replaceable(model)
    call, calibration = first_call(_agreed_calibration(calibration) if cut else calibration)
    with one_layer_a_weight(model), in_linear_form(model) as left_out:
        layers, skipped = layers_to_convert(model, pattern, targets, call)
        modules = gathering_modules(model, {name: layer.weight for name, layer in layers.items()})
        if modules and device is not None:
            raise ValueError(f"logits_device: expected None {CUT}, got {device}; convert it before fully_shard")
        find = _masks_of_shards if modules else refitted_masks
        masks = find(layers, pattern, init, refit, model, calibration, progress, seed)
        # layers of an earlier conversion keep their ids: two layers with one id would draw the same noise
        earlier = [module for module in model.modules() if isinstance(module, MaskedLinear)]
        states = {layer.weight.device: layer.counter_state for layer in earlier}
        first_id = max((layer.layer + 1 for layer in earlier), default=0)
        replacements = {}
        logits_of_shards = {}
        for layer_id, (name, layer) in enumerate(layers.items(), start=first_id):
            place = layer.weight.device
            if place not in states:
                states[place] = CounterState(device=place)
            codes = masks.codes.pop(name)
            keywords = {"layer": layer_id, "counter_state": states[place]}
            if name in modules:
                logits_of_shards[name] = initial_logits(codes, pattern, gap, logits_dtype), keywords
                continue
            keywords |= {"gap": gap, "logits_dtype": logits_dtype, "logits_device": device}
            replacements[id(layer)] = MaskedLinear.from_linear(layer, pattern, codes, **keywords)
        for name, (logits, keywords) in logits_of_shards.items():
            layer = layers[name]
            replacements[id(layer)] = MaskedLinear.from_shards(layer, pattern, logits, modules[name], **keywords)
        put_weights({name: replacements[id(layers[name])] for name in masks.weights}, masks.weights)
        replace_layers(model, replacements)
    skipped = reasons_by_name(model, skipped | left_out)
    share, unmasked = coverage(model, skipped)
    if targets is None and share < MOST_OF_A_MODEL:
        largest, reason = next(iter(unmasked.items()))
        warnings.warn(
            f"model: {share:.1%} of its matrix weights have a mask, embeddings and the output head not counted; "
            f"{len(unmasked)} matrices have none, such as {largest} ({reason}); Conversion.unmasked lists all",
            stacklevel=2,
        )
    return Conversion(list(layers), skipped, gap, share, unmasked)


@contextmanager
def one_layer_a_weight(model: nn.Module) -> Iterator[None]:
    """Put one nn.Linear in all places that share weight and bias, as in Zamba2, so that these have one mask.

    Places that are not converted get their own layer back.
    """
    owners = {}
    joined = {}
    for module in model.modules():
        if type(module) is nn.Linear and not is_distributed(module.weight) and lost_with(module) is None:
            joined[id(module)] = owners.setdefault((id(module.weight), id(module.bias)), module)
    places = [
        (parent, name, child, joined[id(child)])
        for parent in model.modules()
        for name, child in parent._modules.items()
        if joined.get(id(child), child) is not child
    ]
    for parent, name, _, owner in places:
        setattr(parent, name, owner)
    try:
        yield
    finally:
        for parent, name, child, owner in places:
            if getattr(parent, name) is owner:
                setattr(parent, name, child)


def _agreed_calibration(calibration: Iterable | None) -> list | None:
    """Return the batches; before any forward, raise TypeError or ValueError unless all ranks have the same."""

    def batches() -> list | None:
        if calibration is None:
            return None
        check_calibration(calibration)
        return list(calibration)

    with closing(Ranks()) as ranks:
        ranks.connect()
        loaded = ranks.run_on_all(batches)
        ranks.agree({"calibration": loaded and [content(batch, index) for index, batch in enumerate(loaded)]})
    return loaded


def _masks_of_shards(layers: Mapping[str, nn.Linear], pattern: NMPattern, init: Init, refit: str, model: nn.Module,
                     calibration: Iterable | None, progress: Progress | None,
                     seed: int) -> Reconstruction:  # fmt: skip
    """``refitted_masks`` for this rank, after a check that all ranks got the same."""

    def described() -> str:
        if isinstance(init, Mapping):
            return digest_of_named(given(layers, pattern, init))
        if init in OF_SHARDS:
            return init
        raise ValueError(
            f"init: expected one of {', '.join(OF_SHARDS)}, or group codes {CUT}, got {init!r}; convert it before "
            "fully_shard"
        )

    with closing(Ranks()) as ranks:
        ranks.connect()
        ranks.agree({"init": ranks.run_on_all(described), "refit": refit, "seed": seed})
        return refitted_masks(layers, pattern, init, refit, model, calibration, progress, seed)


def check_replaceable(model: nn.Module) -> None:
    """Raise unless the model's config can name its new layers and no adapter of peft is merged."""
    check_not_merged(model)
    if _of_transformers(model):
        from ..hf import check_not_quantized

        check_not_quantized(model)


def replace_layers(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Replace layers, see ``replace_modules``, and update adapters and the model's config.

    Adapters refuse to merge into sparse layers. The config of a transformers model lists its sparse layers. An unfused
    module is fused again once none of its layers is sparse.
    """
    replace_modules(model, replacements)
    if not any(isinstance(layer, SPARSE) for layer in replacements.values()):
        as_built(model)
    fit_adapters(model)
    refuse_merging(model, REPLACING)
    if _of_transformers(model):
        from ..hf import describe

        describe(model)


def _of_transformers(model: nn.Module) -> bool:
    return "transformers" in sys.modules and any(hasattr(module, "save_pretrained") for module in model.modules())


def flip_rate(gap: float, pattern: str | NMPattern) -> float:
    """Probability that a group's draw differs from its initial mask, with N logits at ``gap`` and M - N at 0.

    p(stay) = prod over k < N of (N - k) e^gap / ((N - k) e^gap + M - N).
    """
    pattern = NMPattern(pattern)
    dropped = (pattern.m - pattern.n) * math.exp(-gap)
    return -math.expm1(-sum(math.log1p(dropped / k) for k in range(1, pattern.n + 1)))


def gap_for_flip_rate(rate: float, pattern: str | NMPattern) -> float:
    """Gap at which a draw changes the initial mask of a share ``rate`` of the groups.

    Raises:
        ValueError: if ``rate`` is not a flip rate of any gap from 0 to 26.
    """
    low = 0.0
    high = LARGEST_GAP
    rarest = flip_rate(high, pattern)
    commonest = flip_rate(low, pattern)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rarest <= rate <= commonest:
        raise ValueError(f"flip_rate: expected a float in [{rarest:.2g}, {commonest:.4g}], got {in_a_line(rate)}")
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if flip_rate(middle, pattern) > rate else (low, middle)
    return (low + high) / 2
