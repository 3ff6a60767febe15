"""A model of two layers, batches for it, and a trainer: what tests of learning run on."""

from __future__ import annotations

import torch
from torch import nn

import maskpro_kernels as mk

GAP = 2.0

ESTIMATORS = {
    "reinforce": lambda: mk.Reinforce(lr=2.0, alpha=0.75),
    "normalized": lambda: mk.Reinforce(lr=2.0, alpha=0.75, normalize=True),
    "refreshed": lambda: mk.Reinforce(lr=10.0, alpha=0.75, refresh=True),
    "two draws": lambda: mk.Reinforce(lr=2.0, draws=2),
    "three draws": lambda: mk.Reinforce(lr=2.0, draws=3),
    "four draws": lambda: mk.Reinforce(lr=2.0, draws=4),
    "straight-through": lambda: mk.StraightThrough(lr=0.3),
    "trained weights": lambda: mk.StraightThrough(lr=0.3, train_weights=0.01, masks_until=1.0),
    "fixed masks": lambda: mk.StraightThrough(train_weights=0.01),
}


def a_model(gap: float = GAP) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    mk.convert(model, "2:4", gap=gap)
    return model


def some_batches(count: int = 3) -> list[torch.Tensor]:
    return list(torch.randn(count, 5, 16, generator=torch.Generator().manual_seed(1)))


def uneven_batches() -> list[torch.Tensor]:
    """The last one is smaller."""
    *whole, last = some_batches(5)
    return [*whole, last[:2]]


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def a_trainer(model: nn.Module | None = None, seed: int = 11, how: str = "reinforce", **arguments) -> mk.MaskTrainer:
    """Make a trainer, by default of ``a_model()`` and with the estimator of that name."""
    estimator = arguments.pop("estimator", None) or ESTIMATORS[how]()
    loss, batches = arguments.pop("loss_fn", loss_fn), arguments.pop("batches", some_batches())
    return mk.MaskTrainer(a_model() if model is None else model, loss, batches, estimator, seed=seed, **arguments)


def a_trainer_in(folder, how: str = "reinforce", model: nn.Module | None = None, **arguments) -> mk.MaskTrainer:
    """One that writes a folder."""
    return a_trainer(model, how=how, output_dir=folder, **arguments)


def logits_of(model: nn.Module) -> list[torch.Tensor]:
    return [module.logits.detach().clone() for module in model.modules() if isinstance(module, mk.MaskedLinear)]


def under_masks(model: nn.Module, batch: torch.Tensor, codes: list[torch.Tensor]) -> float:
    """The loss with the masks of those codes, by torch alone."""
    first, second = model[0], model[2]
    weights = [layer.weight * mk.expand_mask(c, "2:4") for layer, c in zip((first, second), codes, strict=True)]
    hidden = nn.functional.linear(batch, weights[0], first.bias)
    return float(nn.functional.linear(hidden, weights[1], second.bias).square().mean())
