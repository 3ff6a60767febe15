"""REINFORCE with residual and tracker finds a planted mask; without either it does worse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maskpro_kernels import MaskTrainer, Reinforce, convert, expand_mask, top_n_mask
from maskpro_kernels.ops import dispatch

ROWS, GROUPS_A_ROW = 4, 16
COLUMNS = 4 * GROUPS_A_ROW
STEPS, LR, GAP = 8000, 0.04, 0.25


class ZeroInitialLosses(MaskTrainer):
    """A trainer without the residual: its rewards are the bare losses."""

    def _losses_of_initial_masks(self, progress):
        self._initial_losses.losses = [0.0] * len(self.batches)
        return self._initial_losses.losses


def solved(seed: int, alpha: float = 0.99, trainer=MaskTrainer) -> float:
    """Share of the groups that hold the teacher's mask after learning on batches of varying difficulty."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator).sign()
    planted = top_n_mask(torch.rand(ROWS, COLUMNS, generator=generator), "2:4")
    start = top_n_mask(torch.rand(ROWS, COLUMNS, generator=generator), "2:4")
    teacher = weight * expand_mask(planted, "2:4")
    batches = []
    for _ in range(8):
        x = torch.randn(512, COLUMNS, generator=generator)
        difficulty = 10 ** torch.empty(()).uniform_(-1, 0, generator=generator)
        noise = torch.randn(512, ROWS, generator=generator) * difficulty
        batches.append((x, x @ teacher.T + noise))

    linear = nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight = nn.Parameter(weight)
    model = nn.Sequential(linear)
    convert(model, "2:4", init={"0": start}, gap=GAP)

    def loss(model, batch):
        x, y = batch
        return nn.functional.mse_loss(model(x), y)

    trainer(model, loss, batches, Reinforce(lr=LR, alpha=alpha), seed=seed).run(STEPS, progress=False)
    return float((top_n_mask(model[0].logits.detach(), "2:4") == planted).float().mean())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_residual_and_tracker_solve_the_planted_problem_and_each_is_needed(seed, monkeypatch):
    # the compiled reference: 8,000 steps are too many for the interpreter
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    both = solved(seed)
    assert both >= 0.95
    assert solved(seed, trainer=ZeroInitialLosses) < both
    # at alpha = 1 the tracker stays 0
    assert solved(seed, alpha=1.0) < both
