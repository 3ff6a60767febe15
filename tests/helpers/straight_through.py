"""Models that learn straight through."""

from __future__ import annotations

import torch
from torch import nn

import maskpro_kernels as mk
from helpers.tiny_llama import tiny_model
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.text.perplexity import causal_lm_loss


def masked_llama(gap=15.0):
    model = tiny_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    mk.convert(model, "2:4", gap=gap)
    return model


def batches_of_tokens(count=3):
    return list(torch.randint(0, 32, (count, 4, 16), generator=torch.Generator().manual_seed(0)))


def logits_by_name(model):
    return {name: m.logits.detach().clone() for name, m in model.named_modules() if isinstance(m, mk.MaskedLinear)}


def learn_straight_through(model, steps=4, loss_fn=causal_lm_loss, batches=None, **options):
    estimator = mk.StraightThrough(lr=1.0, **options)
    trainer = mk.MaskTrainer(model, loss_fn, batches or batches_of_tokens(), estimator, seed=3)
    return trainer, trainer.run(steps, progress=False)


class Twice(nn.Module):
    """A layer that is used twice, and one that is used once."""

    def __init__(self):
        super().__init__()
        self.shared, self.own = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.shared(torch.relu(self.own(torch.relu(self.shared(x)))))


def assert_detached(model):
    """Layers as before a step: nothing of it is kept in them."""
    for layer in masked_layers(model).values():
        assert layer.logits_backward is None and layer.logits.grad is None
        assert not layer._forward_hooks and "forward" not in vars(layer)


class Broken(torch.autograd.Function):
    """The identity, whose gradient is ``value``."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, ctx.value), None


def squares_of(trainer):
    squares = trainer.estimator.state()["mean_squares"]
    return [squares.get(name) for name in trainer.estimator._updaters]


def two_masked_layers(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    mk.convert(model, "2:4", gap=3.0, **options)
    return model, torch.randn(30, 16)
