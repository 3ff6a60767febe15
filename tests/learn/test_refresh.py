"""Initial masks that are refreshed where the loss has halved."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.enumerated import set_probabilities
from helpers.small_trainer import a_model, a_trainer, logits_of, loss_fn, some_batches, under_masks
from torch import nn

import maskpro_kernels as mk

pytestmark = pytest.mark.usefixtures("eager_reference")


# Of the six masks of a group of four, by the sum of the weights 1, 2, 4, 8 that they keep
TABLE = {3: 8.0, 5: 3.0, 6: 7.0, 9: 4.0, 10: 1.0, 12: 6.0}


def one_group(seed: int, lr: float, refresh: bool = True) -> tuple[mk.MaskTrainer, nn.Linear]:
    """A trainer of a single group, whose loss for each mask is in ``TABLE``, and its layer."""
    linear = nn.Linear(4, 1, bias=False)
    linear.weight.data[:] = torch.tensor([1.0, 2.0, 4.0, 8.0])
    layer = mk.MaskedLinear.from_linear(linear, "2:4")
    # m_0 keeps the first two weights: its loss is 8
    layer.logits.data[:] = torch.tensor([1.0, 0.7, 0.2, -0.1])

    def loss_fn(model, batch):
        return torch.tensor(TABLE[int(model(batch))])

    estimator = mk.Reinforce(lr, 0.75, refresh=refresh)
    return mk.MaskTrainer(nn.Sequential(layer), loss_fn, [torch.ones(4)], estimator, seed=seed), layer


def exact_gradient(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of the expected loss, probabilities of the masks) of the group of ``one_group``, by enumeration."""
    logits = logits.detach().flatten().double().requires_grad_()
    probabilities = set_probabilities(logits, 2)
    # a code has the bits of the weights it keeps
    losses = torch.tensor(list(TABLE.values()), dtype=torch.float64)
    return torch.autograd.grad(probabilities @ losses, logits)[0], probabilities.detach()


def test_initial_masks_are_refreshed_where_the_loss_has_halved():
    """Then the next step is compared with the top-N mask of the logits that have moved."""
    refreshed = []
    for seed in range(12):
        trainer, layer = one_group(seed, lr=0.5)
        initial = 8.0
        for _ in range(6):
            record = trainer.step()
            assert record.residual == record.loss - initial
            if record.loss <= initial / 2:
                initial = TABLE[int(mk.top_n_mask(layer.logits, "2:4"))]
                refreshed.append(initial)
    assert len(refreshed) > 6 and len(set(refreshed)) > 1
    trainer, _ = one_group(0, lr=0.5, refresh=False)
    assert {record.loss - record.residual for record in trainer.run(40, progress=False)} == {8.0}


@pytest.mark.parametrize(
    ("loss", "initial_loss", "refreshes"),
    [(4.0, 8.0, True), (4.5, 8.0, False), (-1.0, 8.0, True), (0.0, 0.0, False), (-9.0, -4.0, False)]
    + [(value, 8.0, False) for value in (math.nan, math.inf, -math.inf)],
)
def test_when_initial_masks_are_refreshed(loss, initial_loss, refreshes):
    assert mk.Reinforce(refresh=True).refreshes(loss, initial_loss) is refreshes
    assert not mk.Reinforce().refreshes(loss, initial_loss)


@pytest.mark.parametrize("after_a_refresh", [False, True])
def test_the_update_is_unbiased_with_initial_masks_that_are_refreshed(after_a_refresh):
    """Steps of all masks of a group, each with its probability, are on average the gradient of the expected loss.

    Some of them refresh the initial mask: their own update must not be against the new one.
    """
    found, steps, expected = {}, 1 + after_a_refresh, None
    for seed in range(2000):
        trainer, layer = one_group(seed, lr=0.25)
        if after_a_refresh:
            # the runs that draw this mask first have the same logits, tracker and initial loss from there on
            if mk.sample_mask(layer.logits, "2:4", seed=seed).item() != 5:
                continue
            trainer.step()
        before = layer.logits.detach().clone()
        code = mk.sample_mask(before, "2:4", seed=seed, step=steps - 1).item()
        if code in found:
            continue
        expected, probabilities = exact_gradient(before)
        record = trainer.step()
        assert record.loss - record.residual == (3.0 if after_a_refresh else 8.0)
        found[code] = (before - layer.logits.detach()).flatten().double() / 0.25
        if len(found) == 6:
            break
    updates = torch.stack([found[code] for code in sorted(found)])
    torch.testing.assert_close(probabilities @ updates, expected, rtol=0, atol=3e-6)


def test_a_refresh_costs_a_forward_for_every_batch():
    model, batches = a_model(), some_batches(3)
    # known again by what is in them
    batches.append(batches[0].clone())
    seen, at = [], []

    def counting(module, batch):
        if not module[0].training:
            seen.append(next(i for i, b in enumerate(batches) if b is batch))
        return loss_fn(module, batch)

    estimator = mk.Reinforce(lr=30.0, alpha=0.75, refresh=True)
    trainer = a_trainer(model, batches=batches, loss_fn=counting, estimator=estimator)
    for _ in range(12):
        record = trainer.step()
        initial = record.loss - record.residual
        if record.loss <= initial / 2:
            at.append(record.step)
            expected = [under_masks(model, b, [mk.top_n_mask(z, "2:4") for z in logits_of(model)]) for b in batches]
            batches[:] = batches[1:] + batches[:1]
            expected = expected[1:] + expected[:1]
        elif at:
            assert initial == pytest.approx(expected[record.step % 4])
    assert at and at[-1] < 11 and len(seen) == 3 * (1 + len(at))
    while trainer._initial_losses.losses is not None:
        trainer.step()
    batches[:] = [batch + 1.0 for batch in batches]
    with pytest.raises(ValueError, match="^batches: expected those of the first step, got others instead of "):
        trainer.step()
