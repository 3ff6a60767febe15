"""The table of variances: exact figures against all tuples of draws by the estimator itself, samples against both."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
import variance
from helpers.enumerated import set_probabilities
from variance import Listed, Problem

import maskpro_kernels as mk

# In standard errors
LARGEST_DEVIATION = 4.0


@pytest.fixture(scope="module")
def task() -> Problem:
    return variance.problem(gap=2.0, groups=3)


def test_gradients_are_those_of_the_expected_loss(task):
    logits = task.logits.clone().requires_grad_()
    # codes ascend, and the sets are in the order of their weights
    order = torch.tensor([0, 1, 3, 2, 4, 5])
    first, second, third = (set_probabilities(row, 2)[order] for row in logits)
    probabilities = torch.einsum("a,b,c->abc", first, second, third).flatten()
    masks = variance.listed(task)
    torch.testing.assert_close(masks.probabilities, probabilities.detach())
    for batch, losses in enumerate(masks.losses):
        (gradient,) = torch.autograd.grad(probabilities @ losses, logits, retain_graph=True)
        torch.testing.assert_close(masks.gradients[batch], gradient.flatten(), rtol=1e-9, atol=1e-12)
    top = masks.probabilities.argmax()
    torch.testing.assert_close(masks.losses[:, top], task.initial)


def by_all_tuples(task: Problem, masks: Listed, draws: int) -> float:
    """Variance of an update times its forwards, from every tuple of draws."""
    total = 0.0
    for batch, losses in enumerate(masks.losses):
        initial, square = float(task.initial[batch]), 0.0
        for drawn in itertools.product(range(len(masks.probabilities)), repeat=draws):
            drawn = list(drawn)
            # at alpha 1 the tracker stays 0
            advantages = mk.Reinforce(alpha=1.0, draws=draws).advantages(losses[drawn].tolist(), initial)
            update = torch.tensor(advantages, dtype=torch.float64) @ masks.scores[drawn] / draws
            square += float(masks.probabilities[drawn].prod() * update.square().sum())
        total += draws * (square - float(masks.gradients[batch].square().sum()))
    return total / len(masks.losses)


@pytest.mark.parametrize(
    ("name", "draws"), [("1 draw, residual", 1), ("2 draws, leave-one-out", 2), ("4 draws, leave-one-out", 4)]
)
def test_exact_variances_are_those_of_all_tuples(name, draws):
    task = variance.problem(gap=1.0, groups=1, batches=2)
    expected = by_all_tuples(task, variance.listed(task), draws)
    assert variance.exact(task)[name] == pytest.approx(expected, rel=1e-9)


def test_the_variance_with_a_tracker_is_that_of_a_run(task):
    masks, generator, alpha, steps = variance.listed(task), torch.Generator().manual_seed(0), 0.5, 20_000
    drawn = masks.probabilities.multinomial(steps, replacement=True, generator=generator).tolist()
    batches = torch.randint(len(masks.losses), (steps,), generator=generator).tolist()
    estimator, squares = mk.Reinforce(alpha=alpha), []
    norms, signal = masks.scores.square().sum(1).tolist(), masks.gradients.square().sum(1).tolist()
    losses, initial = masks.losses.tolist(), task.initial.tolist()
    for mask, batch in zip(drawn, batches, strict=True):
        (advantage,) = estimator.advantages([losses[batch][mask]], initial[batch])
        squares.append(advantage**2 * norms[mask] - signal[batch])
    found = torch.tensor(squares[100:], dtype=torch.float64).view(-1, 100).mean(1)
    expected = variance.exact(task, alpha)["1 draw, residual and tracker"]
    assert abs(found.mean() - expected) < LARGEST_DEVIATION * found.std() / len(found) ** 0.5
    # the tracker's own noise shows
    assert expected > 1.2 * variance.exact(task)["1 draw, residual and tracker"]


@pytest.mark.parametrize("antithetic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_samples_agree_with_what_is_exact(task, antithetic):
    samples, seeds, gradients = 15_000, range(4), variance.listed(task).gradients
    runs = [variance.sampled(task, antithetic, samples, seed) for seed in seeds]
    exactly = variance.exact(task, alpha=1.0)
    expected = {
        "2 draws, residual and settled tracker": exactly["1 draw, residual and tracker"],
        "4 draws, leave-one-out": exactly["4 draws, leave-one-out"],
    }
    for name, exact in expected.items():
        values, errors, means = zip(*[run[name] for run in runs], strict=True)
        value, error = sum(values) / len(runs), sum(e * e for e in errors) ** 0.5 / len(runs)
        # squared error of the mean, of which unbiased estimates have this much
        noise = value / int(name[0]) / samples
        found = sum(float((mean - gradients).square().sum(1).mean()) for mean in means) / len(runs)
        assert 0.5 * noise < found < 2.0 * noise
        if not antithetic:
            assert abs(value - exact) < LARGEST_DEVIATION * error
        assert 0 < error < 0.03 * value


def test_the_tables_are_printed(capsys, monkeypatch):
    arguments = ["--gaps", "2", "--sampled-gaps", "2", "--many", "8", "--samples", "50"]
    monkeypatch.setattr(sys, "argv", ["variance.py", *arguments])
    variance.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line][2:7] == list(variance.exact(variance.problem(2.0)))
    assert sum("+-" in line for line in lines) == 4
