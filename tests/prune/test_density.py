"""Layers that stay dense: costs by the definition, and a choice within the density."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.tiny_llama import tiny_model

import maskpro_kernels as mk
from maskpro_kernels.prune.density import costliest_layers
from maskpro_kernels.prune.initial_masks import refitted_masks
from maskpro_kernels.prune.selection import layers_to_convert
from maskpro_kernels.text.perplexity import causal_lm_loss

pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def batches():
    return list(torch.randint(0, 30, (3, 2, 16), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("refit", ["none", "weights"])
def test_the_costs_are_those_of_the_definition(model, batches, refit):
    pattern = mk.NMPattern("2:4")
    layers, _ = layers_to_convert(model, pattern)
    masks = refitted_masks(layers, pattern, "wanda", refit, model, batches)
    dense = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    masked = copy.deepcopy(model)
    for name in layers:
        weight = masks.weights.get(name, dense[name]) * mk.expand_mask(masks.codes[name], pattern)
        masked.get_submodule(name).weight.data.copy_(weight)
    costs = dict.fromkeys(layers, 0.0)
    for batch in batches:
        causal_lm_loss(masked, batch).backward()
    for name in layers:
        weight = masked.get_submodule(name).weight
        costs[name] = (weight.grad * (weight.detach() - dense[name])).sum().item()
    total = sum(layer.weight.numel() for layer in layers.values())
    for density in (0.5, 0.55, 0.7, 0.9):
        chosen = costliest_layers(model, layers, masks, pattern, causal_lm_loss, batches, density)
        budget = 2 * (density - 0.5) * total
        expected = []
        for name in sorted(layers, key=lambda name: costs[name] / layers[name].weight.numel(), reverse=True):
            if layers[name].weight.numel() <= budget:
                expected.append(name)
                budget -= layers[name].weight.numel()
        assert chosen == expected
        kept = sum(layer.weight.numel() * (1.0 if name in chosen else 0.5) for name, layer in layers.items())
        assert kept / total <= density and bool(chosen) == (density > 0.5)


def test_the_cost_is_the_fall_of_the_loss_if_the_dense_weight_returns(model, batches):
    """To first order; other masks are nearly dense, so that a small step from each weight is a small step of all."""
    pattern = mk.NMPattern("2:4")
    layers, _ = layers_to_convert(model, pattern)
    masks = refitted_masks(layers, pattern, "magnitude", "none", model, None)
    model.double()
    for name, layer in layers.items():
        layer.weight.data.mul_(torch.where(mk.expand_mask(masks.codes[name], pattern), 1.0, 0.01))

    def loss_fn(model, batch):
        return torch.nn.functional.cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    @torch.no_grad()
    def loss(dense=()):
        masked = copy.deepcopy(model)
        for name in layers.keys() - set(dense):
            masked.get_submodule(name).weight.data.mul_(mk.expand_mask(masks.codes[name], pattern))
        return sum(loss_fn(masked, batch).item() for batch in batches)

    chosen = costliest_layers(model, layers, masks, pattern, loss_fn, batches, 0.9)
    falls = {name: (loss() - loss([name])) / layers[name].weight.numel() for name in layers}
    assert falls[chosen[0]] == max(falls.values()) > 0


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_unchanged_afterwards(model, batches, fails):
    pattern = mk.NMPattern("2:4")
    frozen = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers, _ = layers_to_convert(model, pattern)
    masks = refitted_masks(layers, pattern, "magnitude", "none", model, None)

    def loss_fn(model, batch):
        return causal_lm_loss(model, batch) * (math.nan if fails else 1.0)

    with pytest.raises(FloatingPointError, match="density: .* 14 layers, .*q_proj") if fails else nullcontext():
        costliest_layers(model, layers, masks, pattern, loss_fn, batches, 0.6)
    assert_same_bits(model.state_dict(), before)
    assert model.training and not frozen.requires_grad
    assert all(weight.requires_grad for weight in model.parameters() if weight is not frozen)
    assert all(weight.grad is None and not weight._post_accumulate_grad_hooks for weight in model.parameters())
