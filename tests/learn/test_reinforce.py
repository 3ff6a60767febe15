"""REINFORCE: what it subtracts from a loss, and its steps worked by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.enumerated import set_probabilities
from helpers.small_trainer import a_model, a_trainer, logits_of, some_batches, under_masks

import maskpro_kernels as mk

pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"lr": 0.0}, ValueError, "lr"),
        ({"lr": math.nan}, ValueError, "lr"),
        ({"lr": "50"}, TypeError, "lr"),
        ({"lr": True}, TypeError, "lr"),
        ({"alpha": 1.1}, ValueError, "alpha"),
        ({"draws": 0}, ValueError, "draws"),
        ({"draws": 2.0}, TypeError, "draws"),
        ({"draws": (1 << 16) + 1}, ValueError, "draws"),
        ({"tracker": "during"}, ValueError, "tracker"),
        ({"refresh": 1}, TypeError, "refresh"),
        ({"refresh": True, "draws": 2}, ValueError, "refresh"),
        ({"tracker": "before", "draws": 2}, ValueError, "tracker"),
    ],
)
def test_estimator_refuses(arguments, error, name):
    with pytest.raises(error, match=f"^{name}: expected .*got "):
        mk.Reinforce(**arguments)


@pytest.mark.parametrize(
    ("tracker", "alpha", "advantages", "deltas"),
    [
        # residuals 1, 2, -4; all values are exact in binary
        ("after", 0.75, [1.0, 1.75, -4.6875], [0.25, 0.6875, -0.484375]),
        ("before", 0.75, [0.75, 1.3125, -3.515625], [0.25, 0.6875, -0.484375]),
        ("after", 0.0, [1.0, 1.0, -6.0], [1.0, 2.0, -4.0]),
        ("before", 0.0, [0.0, 0.0, 0.0], [1.0, 2.0, -4.0]),
        ("after", 1.0, [1.0, 2.0, -4.0], [0.0, 0.0, 0.0]),
        ("before", 1.0, [1.0, 2.0, -4.0], [0.0, 0.0, 0.0]),
    ],
)
def test_tracker_by_hand(tracker, alpha, advantages, deltas):
    estimator = mk.Reinforce(lr=1.0, alpha=alpha, tracker=tracker)
    assert estimator.delta == 0.0
    for residual, advantage, delta in zip([1.0, 2.0, -4.0], advantages, deltas, strict=True):
        assert estimator.advantage(residual) == advantage
        assert estimator.delta == delta


@pytest.mark.parametrize("tracker", ["after", "before"])
def test_steps_are_the_updates_worked_by_hand(tracker):
    model, batches, lr, alpha, seed = a_model(), some_batches(2), 2.0, 0.75, 11
    trainer = a_trainer(model, seed, batches=batches, estimator=mk.Reinforce(lr, alpha, tracker))
    initial = [mk.top_n_mask(logits, "2:4") for logits in logits_of(model)]
    expected, delta = logits_of(model), 0.0
    for step in range(3):
        batch = batches[step % 2]
        counters = [{"seed": seed, "step": step, "layer": layer} for layer in range(2)]
        drawn = [mk.sample_mask(z, "2:4", **counter) for z, counter in zip(expected, counters, strict=True)]
        residual = under_masks(model, batch, drawn) - under_masks(model, batch, initial)
        moved = alpha * delta + (1 - alpha) * residual
        advantage = residual - (delta if tracker == "after" else moved)
        delta = moved
        watched = step % 2
        flip_rate = float((drawn[watched] != mk.top_n_mask(expected[watched], "2:4")).float().mean())
        for logits, counter in zip(expected, counters, strict=True):
            mk.score_update_(logits, lr * advantage, pattern="2:4", **counter)

        record = trainer.step()
        assert_same_bits(logits_of(model), expected)
        assert (record.step, record.tokens) == (step, batch.numel())
        assert record.loss == under_masks(model, batch, drawn)
        assert (record.residual, record.advantage, record.tracker) == (residual, advantage, delta)
        assert record.flip_rate == flip_rate
        assert record.seconds > 0
        assert advantage != 0 and flip_rate > 0
        assert int(model[0].counter_state.step) == step + 1


def test_residual_is_zero_when_no_group_flips():
    model = a_model(gap=26.0)
    before = logits_of(model)
    for record in a_trainer(model).run(4, progress=False):
        assert record.residual == record.advantage == record.tracker == record.flip_rate == 0.0
    assert_same_bits(logits_of(model), before)


def test_a_normalized_advantage_has_no_scale_and_is_bounded():
    residuals = [0.5, -0.3, 0.1, 0.4, 100.0, -0.2]
    plain, small, large = (mk.Reinforce(alpha=0.9, normalize=normalize) for normalize in (False, True, True))
    bare = [plain.advantage(r) for r in residuals]
    found = [small.advantage(r) for r in residuals]
    assert found == pytest.approx([large.advantage(1000 * r) for r in residuals])
    mean_square = bare[0] ** 2
    for raw, advantage in zip(bare, found, strict=True):
        mean_square = 0.9 * mean_square + 0.1 * raw**2
        assert advantage == pytest.approx(min(raw / math.sqrt(mean_square), 3.0))
    assert found[4] == 3.0
    assert mk.Reinforce(normalize=True).advantage(0.0) == 0.0
    with pytest.raises(TypeError, match="normalize: expected a bool, got 1"):
        mk.Reinforce(normalize=1)


@pytest.mark.parametrize("draws", [2, 3])
def test_the_update_of_several_draws_is_unbiased(draws):
    """Over all tuples of masks of one group, each with its probability: the gradient of the expected loss."""
    logits = torch.tensor([0.7, -0.3, 0.1, -1.2], dtype=torch.float64, requires_grad=True)
    losses = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0], dtype=torch.float64)
    probabilities = set_probabilities(logits, 2)
    (gradient,) = torch.autograd.grad(probabilities @ losses, logits, retain_graph=True)
    scores = torch.stack([torch.autograd.grad(p.log(), logits, retain_graph=True)[0] for p in probabilities])
    expected = torch.zeros(4, dtype=torch.float64)
    for drawn in itertools.product(range(6), repeat=draws):
        drawn = list(drawn)
        advantages = mk.Reinforce(lr=1.0, draws=draws).advantages(losses[drawn].tolist())
        update = sum(a / draws * scores[i] for a, i in zip(advantages, drawn, strict=True))
        expected += probabilities[drawn].prod().detach() * update
    torch.testing.assert_close(expected, gradient, rtol=1e-10, atol=1e-12)


def test_several_draws_are_worked_by_hand():
    model, batches, lr, seed = a_model(), some_batches(2), 2.0, 11
    trainer = a_trainer(model, seed, batches=batches, estimator=mk.Reinforce(lr, draws=3))
    expected = logits_of(model)
    for step in range(3):
        batch, losses = batches[step % 2], []
        for draw in range(3):
            counters = [{"seed": seed, "step": step, "layer": layer, "draw": draw} for layer in range(2)]
            codes = [mk.sample_mask(z, "2:4", **counter) for z, counter in zip(expected, counters, strict=True)]
            losses.append(under_masks(model, batch, codes))
        coefs = [lr / 3 * (loss - (sum(losses) - loss) / 2) for loss in losses]
        for layer, logits in enumerate(expected):
            mk.score_update_(logits, coefs, pattern="2:4", seed=seed, step=step, layer=layer, draw=[0, 1, 2])
        record = trainer.step()
        assert record.loss == pytest.approx(sum(losses) / 3)
        assert record.residual is record.advantage is record.tracker is None
        for ours, hand in zip(logits_of(model), expected, strict=True):
            torch.testing.assert_close(ours, hand, rtol=1e-5, atol=1e-6)


def test_normalized_advantages_of_several_draws_are_bounded():
    estimator = mk.Reinforce(lr=1.0, alpha=0.5, normalize=True, draws=2)
    assert estimator.advantages([1.0, 3.0]) == [-1.0, 1.0]
    assert estimator.advantages([0.0, 0.0]) == [0.0, 0.0]
    assert max(estimator.advantages([0.0, 1e6])) <= 3.0
    assert mk.Reinforce(lr=1.0, normalize=True, draws=2).advantages([1.0, 1.0]) == [0.0, 0.0]


def test_an_interrupted_step_does_not_change_the_estimator(tmp_path, monkeypatch):
    trainer = a_trainer(how="normalized", output_dir=tmp_path)
    trainer.step()
    before = trainer.estimator.state()
    assert before["delta"] and before["mean_square"]

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(trainer._folder, "add_entry", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.step()
    assert trainer.estimator.state() == before
