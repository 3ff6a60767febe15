"""Layers that are drawn and updated together, one after another."""

from __future__ import annotations

from ..dispatch import table


def draw_layers_(group, inv_temperature, seed, step, draw):
    """Set the codes of a ``LayerGroup`` by ``sample_mask``."""
    sample_mask = table(seed.device.type).sample_mask
    for layer, codes in zip(group.layers, group.codes, strict=True):
        counter = group.counter_of(layer, seed, step, draw.view(()))
        codes.copy_(sample_mask(layer.logits, group.n, group.m, inv_temperature, counter))


def update_layers_(group, coef, inv_temperature, seed, step, draws, by_codes):
    """Update the logits of a ``LayerGroup`` by ``score_update_``, which draws again."""
    score_update_ = table(seed.device.type).score_update_
    for layer in group.layers:
        counter = group.counter_of(layer, seed, step, draws)
        score_update_(layer.logits, coef, group.n, group.m, inv_temperature, counter)
