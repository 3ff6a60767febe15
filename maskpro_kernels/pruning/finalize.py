"""Finished masks out of a model: baked in, packed, and unpacked again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..linear_form import in_linear_form
from ..modules import MaskedLinear, check_in_memory, masked_layers
from ..packed import NMLinear, packed_class
from ..pattern import NMPattern
from .convert import Conversion
from .coverage import coverage, reasons_by_name
from .replacement import check_replaceable, replace_layers
from .selection import select_layers


def finalize(model: nn.Module, to: str = "dense") -> nn.Module:
    """Bake the top-N masks in, in place: every MaskedLinear becomes an nn.Linear with exact zeros, or an NMLinear.

    Dense, modules in the model that ``convert`` took apart are put together again: names and shapes are those of the
    model that was given to it.

    Weights and biases stay frozen where they were; those of packed layers are frozen all.

    Args:
        model: a converted model.
        to: "dense", or "packed" for NMLinear, at 2:4 Sparse24Linear.

    Returns:
        ``model``, or its linear layer where the model itself is a MaskedLinear.

    Raises:
        ValueError: if ``to`` is unknown, the model has no MaskedLinear, or a weight is not in memory.
    """
    if to not in ("dense", "packed"):
        raise ValueError(f'to: expected "dense" or "packed", got {to!r}')
    check_replaceable(model)
    replacements, layers = {}, masked_layers(model)
    for name, layer in layers.items():
        check_in_memory("model", layer, name)
    with torch.no_grad():
        for layer in layers.values():
            if to == "packed":
                replacements[id(layer)] = packed_class(layer.pattern).from_masked(layer)
            else:
                replacements[id(layer)] = _dense(layer, layer.top_n_weight(), layer.weight.requires_grad)
    replace_layers(model, replacements)
    return replacements.get(id(model), model)


def pack(model: nn.Module, pattern: str | NMPattern) -> Conversion:
    """Replace every nn.Linear whose weight follows the pattern by an NMLinear, at 2:4 a Sparse24Linear, in place.

    The output head and layers whose weight is shared stay as they are, as in ``convert``.

    Raises:
        ValueError: if the weight of no layer follows the pattern, or one is not in memory. The model is then as it was.
    """
    pattern = NMPattern(pattern)
    check_replaceable(model)
    replacements, packed = {}, []
    with in_linear_form(model) as left_out:
        layers, skipped = select_layers(model, pattern)
        for name, layer in layers.items():
            check_in_memory("model", layer, name)
            kept = (layer.weight != 0).reshape(layer.out_features, -1, pattern.m).sum(-1)
            if (kept > pattern.n).any():
                skipped[name] = f"{float((kept > pattern.n).float().mean()):.1%} of its groups do not follow {pattern}"
            else:
                replacements[id(layer)] = packed_class(pattern).from_dense(layer, pattern)
                packed.append(name)
        if not packed:
            raise ValueError(f"pattern: expected one that some layer follows, {pattern} is followed by none")
        replace_layers(model, replacements)
    skipped = reasons_by_name(model, skipped | left_out)
    found = coverage(model, skipped)
    return Conversion(packed, skipped, masked_share=found.share, unmasked=found.unmasked)


def unpack(model: nn.Module) -> None:
    """Replace every NMLinear by an nn.Linear with exact zeros, in place."""
    replacements = {}
    for layer in model.modules():
        if isinstance(layer, NMLinear):
            replacements[id(layer)] = _dense(layer, layer.packed.unpack(), layer.values.requires_grad)
    replace_layers(model, replacements)


def _dense(layer: MaskedLinear | NMLinear, weight: Tensor, requires_grad: bool) -> nn.Linear:
    """An nn.Linear with that weight, else as the layer."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=requires_grad)
    linear.bias = layer.bias
    return linear.train(layer.training)
