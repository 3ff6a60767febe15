"""Masked layers in the place of nn.Linear layers that fully_shard, or a tensor-parallel plan, has cut over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn

from ..digests import digest_of_named
from ..functional.masks import top_n_mask
from ..modules import CounterState, MaskedLinear, initial_logits
from ..pattern import NMPattern
from ..ranks import Ranks
from ..shards import is_distributed, like_shards, local, part_of
from .initial_masks import INITIAL_MASKS, Init, given
from .reconstruction import Reconstruction
from .stored_mask import opened_mask_file, stored_mask

# Of what is refused
CUT = "in a model that is cut over ranks; convert it ahead of fully_shard, or give codes"


def has_shards(layers: Mapping[str, nn.Module]) -> bool:
    """Whether the weight of a layer is a DTensor."""
    return any(is_distributed(layer.weight) for layer in layers.values())


def masks_of_shards(
    layers: Mapping[str, nn.Linear],
    pattern: NMPattern,
    init: Init,
    refit: str,
    logits_device: torch.device | None,
) -> Reconstruction:
    """Group codes [rows, columns / M] of the initial masks of what this rank has, by name; weights stay as they are.

    Args:
        layers: by name.
        init: "magnitude"; the path of a mask file, of which a rank holds the codes of one layer at a time and those of
            its rows; or group codes [out, K / M] by name, for exactly these layers.
        refit, logits_device: as for ``convert``, of which sharded layers take the defaults alone.

    Raises:
        TypeError, ValueError: an argument is not as above, or ranks have another ``init``.
        OSError: if a mask file cannot be read.
    """
    if refit != "none":
        raise ValueError(f'refit: expected "none" {CUT}, got {refit!r}')
    if logits_device is not None:
        raise ValueError(f"logits_device: expected None {CUT}, got {logits_device}")
    with closing(Ranks()) as ranks:
        ranks.connect()
        # ahead of what all ranks have to come to: one may not see the file
        ranks.agree({"init": ranks.all_of(lambda: _known_by(init, layers, pattern))})
    if isinstance(init, Mapping):
        whole = given(layers, pattern, init)
        codes = {name: part_of(whole[name], layer.weight, pattern.m) for name, layer in layers.items()}
    elif init != "magnitude":
        codes = stored_mask(init, layers, pattern).codes
        codes = {name: codes[name].to(local(layer.weight).device) for name, layer in layers.items()}
    else:
        codes = {name: top_n_mask(local(layer.weight.detach()).abs(), pattern) for name, layer in layers.items()}
    return Reconstruction(codes, {})


def _known_by(init: Init, layers: Mapping[str, nn.Linear], pattern: NMPattern) -> str:
    """What tells the initial mask that is given on this rank from others."""
    if isinstance(init, Mapping):
        return digest_of_named(given(layers, pattern, init))
    if init == "magnitude":
        return init
    if init in INITIAL_MASKS or not isinstance(init, (str, Path)) or not Path(init).is_file():
        raise ValueError(f'init: expected "magnitude", a mask file or group codes {CUT}, got {init!r}')
    with opened_mask_file(init) as mask:
        return mask.digest


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
