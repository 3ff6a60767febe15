"""Finished masks out of a model: baked in, packed, and unpacked again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..fsdp import check_in_memory, check_not_sharded, check_not_wrapped
from ..modules import masked_layers
from ..ops.pattern import NMPattern
from ..packed import KEEP, NMLinear, check_values_kind, dense_layer, hold_in_huge_pages, packed_class
from ..unfuse import in_linear_form, taken_apart
from .convert import Conversion, check_replaceable, replace_layers
from .selection import coverage, reasons_by_name, select_layers


def finalize(model: nn.Module, to: str = "dense", values: str = KEEP) -> nn.Module:
    """Bake the top-N masks in, in place: every MaskedLinear becomes an nn.Linear with exact zeros, or an NMLinear.

    Dense, modules in the model that ``convert`` took apart are put together again: names and shapes are those of the
    model that was given to it.

    Weights and biases stay frozen where they were; those of packed layers are frozen all. Of layers that are cut over
    ranks, dense weights are the DTensors that there were, with zeros in them; these are not packed.

    Args:
        model: a converted model.
        to: "dense", or "packed" for NMLinear, at 2:4 Sparse24Linear.
        values: of packed layers: "keep" as they are, or rounded to "int8", see ``pack_nm``.

    Returns:
        ``model``, or its linear layer where the model itself is a MaskedLinear.

    Raises:
        ValueError: if ``to`` or ``values`` is unknown, values of dense layers are to be int8, the model has no
            MaskedLinear, fully_shard was given one by itself, a weight is not in memory, or one that is to become int8
            is not finite. The model is then as it was.
    """
    if to not in ("dense", "packed"):
        raise ValueError(f'to: expected "dense" or "packed", got {to!r}')
    check_values_kind(values)
    if to == "dense" and values != KEEP:
        raise ValueError(f'values: expected "{KEEP}" of dense layers, got {values!r}; pack them, by to="packed"')
    check_replaceable(model)
    replacements, layers = {}, masked_layers(model)
    if to == "packed":
        check_not_sharded(layers, "pack the whole model that a checkpoint of the dense one gives")
    for apart in taken_apart(model):
        cut = {name: layer for name, layer in layers.items() if name == apart or name.startswith(f"{apart}.")}
        reason = f"{apart}, which convert took apart, is put together of whole ones; finalize it in one process"
        check_not_sharded(cut, reason)
    check_not_wrapped(layers)
    for name, layer in layers.items():
        check_in_memory("model", layer, name, sharded=True)
    with torch.no_grad():
        for name, layer in layers.items():
            if to == "packed":
                with _naming(name):
                    replacements[id(layer)] = packed_class(layer.pattern).from_masked(layer, values)
            else:
                replacements[id(layer)] = dense_layer(layer)
    replace_layers(model, replacements)
    model = replacements.get(id(model), model)
    hold_in_huge_pages(model)
    return model


def pack(model: nn.Module, pattern: str | NMPattern, values: str = KEEP) -> Conversion:
    """Replace every nn.Linear whose weight follows the pattern by an NMLinear, at 2:4 a Sparse24Linear, in place.

    The output head and layers whose weight is shared stay as they are, as in ``convert``.

    Args:
        model: with exact zeros.
        pattern: "N:M" or NMPattern.
        values: "keep" as they are, or rounded to "int8", see ``pack_nm``.

    Raises:
        ValueError: if ``values`` is unknown, the weight of no layer follows the pattern, one is not in memory, or one
            that is to become int8 is not finite. The model is then as it was.
    """
    pattern = NMPattern(pattern)
    check_values_kind(values)
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
                with _naming(name):
                    replacements[id(layer)] = packed_class(pattern).from_dense(layer, pattern, values)
                packed.append(name)
        if not packed:
            raise ValueError(f"pattern: expected one that some layer follows, {pattern} is followed by none")
        replace_layers(model, replacements)
    hold_in_huge_pages(model)
    skipped = reasons_by_name(model, skipped | left_out)
    share, unmasked = coverage(model, skipped)
    return Conversion(packed, skipped, masked_share=share, unmasked=unmasked)


def repack(model: nn.Module, values: str) -> int:
    """Store the values of every NMLinear as in ``pack_nm``, in place; gives how many were stored otherwise.

    Raises:
        ValueError: if ``values`` is unknown, a weight is not in memory, or one that is to become int8 is not finite.
            The model is then as it was.
    """
    check_values_kind(values)
    replacements = {}
    for name, layer in model.named_modules():
        if isinstance(layer, NMLinear) and layer.kind != values:
            check_in_memory("model", layer, name, layer.values)
            with _naming(name):
                stored = type(layer)(layer.packed.stored_as(values), layer.bias)
            replacements[id(layer)] = stored.train(layer.training)
    if replacements:
        replace_layers(model, replacements)
        hold_in_huge_pages(model)
    return len(replacements)


def unpack(model: nn.Module) -> None:
    """Replace every NMLinear by an nn.Linear with exact zeros, in place."""
    replace_layers(model, {id(layer): dense_layer(layer) for layer in model.modules() if isinstance(layer, NMLinear)})


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Let errors of a layer's weight name the layer."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"model: {layer}.{error}" if layer else f"model: {error}") from error
