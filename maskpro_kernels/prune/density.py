"""Layers to leave dense: those whose masks cost most for their size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..functional.masks import expand_mask
from ..modules import evaluating
from ..ops.pattern import NMPattern
from .reconstruction import Reconstruction


def costliest_layers(model: nn.Module, layers: Mapping[str, nn.Module], masks: Reconstruction, pattern: NMPattern,
                     loss_fn: Callable[[nn.Module, Tensor], Tensor], batches: Iterable[Tensor],
                     density: float) -> list[str]:  # fmt: skip
    """Choose the layers that stay dense in a model of a density: those first whose masks cost most for each weight.

    The cost of a layer's mask is g . (v - w), with its dense weight w, its masked and refitted weight v, and the
    gradient g of the loss at v, where all layers have masks. It is the first-order estimate of how far the loss falls
    if w returns. It includes the errors of the other masks, which the gradients of the dense model do not.

    Args:
        model: dense; afterwards as before.
        layers: of the model, by name, each with a dense ``weight`` [out, K].
        masks: of the layers, with the weights of a refit if there was one.
        loss_fn: called as ``loss_fn(model, batch)``, for a mean over tokens.
        batches: int64 [windows, length], all of the same shape.
        density: share of all these weights that is kept, from N / M to 1.

    Raises:
        FloatingPointError: if a cost is not finite.
    """
    costs = dict.fromkeys(layers, 0.0)
    dense = {name: layer.weight.data for name, layer in layers.items()}

    def collector(name: str) -> Callable[[nn.Parameter], None]:
        def add(weight: nn.Parameter) -> None:
            difference = weight.detach().float() - dense[name].float()
            costs[name] += (weight.grad.float() * difference).sum().item()
            weight.grad = None

        return add

    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    handles = []
    try:
        model.requires_grad_(False)
        for name, layer in layers.items():
            layer.weight.data = masks.weights.get(name, dense[name]) * expand_mask(masks.codes[name], pattern)
            handles.append(layer.weight.requires_grad_().register_post_accumulate_grad_hook(collector(name)))
        with evaluating(model, checkpointing=True), torch.enable_grad():
            for batch in batches:
                loss_fn(model, batch).backward()
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            layer.weight.data = dense[name]
        for parameter, before in wanted:
            parameter.requires_grad_(before)
    if bad := [name for name, cost in costs.items() if not math.isfinite(cost)]:
        raise FloatingPointError(f"density: expected finite gradients, got others in {len(bad)} layers, first {bad[0]}")
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    least = pattern.n / pattern.m
    budget = round((density - least) / (1 - least) * sum(sizes.values()))
    chosen = []
    for name in sorted(layers, key=lambda name: -costs[name] / sizes[name]):
        if sizes[name] <= budget:
            chosen.append(name)
            budget -= sizes[name]
    return chosen
