"""Layers that are drawn and updated together, one after another."""

from . import gumbel_top_k, plackett_luce


def draw_layers_(group, inv_temperature, seed, step, draw, sample_mask=gumbel_top_k.sample_mask):
    """Set the codes of a ``LayerGroup``; ``sample_mask`` draws those of one layer."""
    for layer, codes in zip(group.layers, group.codes, strict=True):
        counter = group.counter_of(layer, seed, step, draw.view(()))
        codes.copy_(sample_mask(layer.logits, group.n, group.m, inv_temperature, counter))


def update_layers_(
    group, coef, inv_temperature, seed, step, draws, by_codes, score_update_=plackett_luce.score_update_
):
    """Update the logits of a ``LayerGroup``; ``score_update_`` draws a layer again and updates it."""
    for layer in group.layers:
        counter = group.counter_of(layer, seed, step, draws)
        score_update_(layer.logits, coef, group.n, group.m, inv_temperature, counter)
