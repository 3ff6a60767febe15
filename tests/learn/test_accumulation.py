"""Steps of several batches: losses weighted by tokens, initial losses found by what is in a batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from fractions import Fraction

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.small_trainer import a_model, a_trainer, logits_of, some_batches, under_masks, uneven_batches

import maskpro_kernels as mk
from maskpro_kernels.learn.step_batches import loss_tokens, weighted_mean, weights_of

pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.mark.parametrize("draws", [1, 2])
def test_steps_of_several_batches_are_worked_by_hand(draws):
    model, batches, lr, seed = a_model(), uneven_batches(), 2.0, 11
    trainer = a_trainer(model, seed, batches=batches, estimator=mk.Reinforce(lr, 1.0, draws=draws), accumulate=3)
    initial = [mk.top_n_mask(logits, "2:4") for logits in logits_of(model)]
    expected = logits_of(model)
    for step in range(3):
        seen = [batches[(3 * step + place) % 5] for place in range(3)]
        tokens = [batch.numel() for batch in seen]

        def loss(codes, seen=seen, tokens=tokens):
            return sum(n * under_masks(model, batch, codes) for n, batch in zip(tokens, seen, strict=True)) / sum(
                tokens
            )

        losses = []
        for draw in range(draws):
            counters = [{"seed": seed, "step": step, "layer": layer, "draw": draw} for layer in range(2)]
            losses.append(loss([mk.sample_mask(z, "2:4", **c) for z, c in zip(expected, counters, strict=True)]))
        baselines = [loss(initial)] if draws == 1 else losses[::-1]
        coefs = [lr * (one - other) / draws for one, other in zip(losses, baselines, strict=True)]
        for layer, logits in enumerate(expected):
            ids = list(range(draws))
            mk.score_update_(logits, coefs, pattern="2:4", seed=seed, step=step, layer=layer, draw=ids)
        record = trainer.step()
        assert record.tokens == sum(tokens)
        assert record.loss == pytest.approx(sum(losses) / draws, rel=1e-12)
        if draws == 1:
            assert record.residual == pytest.approx(losses[0] - baselines[0], rel=1e-9)
        for ours, hand in zip(logits_of(model), expected, strict=True):
            torch.testing.assert_close(ours, hand, rtol=1e-5, atol=1e-6)


IDS = torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        (IDS, 6),
        ((IDS, torch.zeros(9)), 6),
        ({"input_ids": IDS}, 6),
        ({"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}, 4),
        ({"input_ids": IDS, "attention_mask": torch.tensor([[True, True, False], [True, False, False]])}, 3),
        ({"input_ids": IDS, "attention_mask": IDS, "labels": torch.tensor([[7, -100, 0], [-100, -100, 1]])}, 3),
        ({"input_ids": IDS, "labels": None}, 6),
        ("text", 0),
    ],
)
def test_tokens_of_a_loss(batch, tokens):
    assert loss_tokens(batch) == tokens


def test_weights_are_shares_of_the_tokens():
    ignored = {"labels": torch.full((2, 3), -100)}
    assert weights_of([IDS, IDS[:1], {"input_ids": IDS[:1]}]) == [Fraction(1, 2), Fraction(1, 4), Fraction(1, 4)]
    assert weights_of([IDS, ignored]) == [1, 0]
    assert weights_of([ignored, ignored]) == weights_of(["one", "two"]) == [Fraction(1, 2)] * 2
    assert weights_of([ignored]) == [1]


def test_a_mean_is_correctly_rounded_in_any_order():
    losses = [1e16, 1.0, -1e16, 3.0, 0.1]
    weights = [Fraction(n, 10) for n in (1, 2, 1, 5, 1)]
    pairs = list(zip(losses, weights, strict=True))
    means = {weighted_mean(*zip(*order, strict=True)) for order in itertools.permutations(pairs)}
    assert means == {float((Fraction(1) * 2 + Fraction(3) * 5 + Fraction(0.1)) / 10)}
    assert weighted_mean([0.1] * 3, [Fraction(1, 3)] * 3) == 0.1
    assert weighted_mean([math.inf], [Fraction(1)]) == math.inf
    assert math.isnan(weighted_mean([1.0, math.inf], [Fraction(1, 2)] * 2))


def counting(trainer: mk.MaskTrainer) -> list:
    """The batches that forwards under the initial masks see."""
    seen, real = [], trainer.loss_fn

    def loss_fn(model, batch):
        if not any(layer.training for layer in trainer.layers.values()):
            seen.append(batch)
        return real(model, batch)

    trainer.loss_fn = loss_fn
    return seen


@pytest.mark.parametrize("accumulate", [1, 2])
def test_initial_losses_are_found_by_what_is_in_a_batch(accumulate):
    # no mask flips, so that a residual is 0 where both losses are of the same batch
    one, two, three = some_batches(3)
    batches = [one, two, one.clone(), three]
    trainer = a_trainer(a_model(gap=26.0), batches=batches, accumulate=accumulate)
    seen = counting(trainer)
    records = trainer.run(3, progress=False)
    batches[:] = [three.clone(), one, one, two]
    records += trainer.run(4, progress=False)
    assert [record.residual for record in records] == [0.0] * 7
    assert len({record.loss for record in records}) == 4 - accumulate
    assert len(seen) == 3
    before = logits_of(trainer.model)
    batches[:] = [one + 1.0] * 4
    with pytest.raises(ValueError, match="^batches: expected those of the first step, got another one at index "):
        trainer.step()
    assert_same_bits(logits_of(trainer.model), before)


class Opaque:
    """Nothing of it can be compared."""

    def __init__(self, scale: float):
        self.scale = scale


def scaled(batch) -> float:
    if isinstance(batch, Mapping):
        return scaled(batch["scale"])
    if isinstance(batch, list):
        return scaled(batch[0])
    return batch.scale if isinstance(batch, Opaque) else float(batch)


@pytest.mark.parametrize(
    "batches",
    [
        ["1.0", "2.0", "3.0"],
        [{"scale": 1.0}, {"scale": 2.0}, {"scale": 3}],
        [{"scale": Opaque(1.0)}, {"scale": Opaque(2.0)}, {"scale": Opaque(3.0)}],
        [[1.0, IDS], [2.0, IDS], [3.0, IDS]],
    ],
    ids=["text", "numbers", "objects", "beside a tensor"],
)
def test_batches_that_are_not_tensors_alone_differ(batches):
    def loss_fn(model, batch):
        return model(torch.ones(16)).square().mean() * scaled(batch)

    trainer = a_trainer(a_model(gap=26.0), batches=batches, loss_fn=loss_fn)
    seen = counting(trainer)
    records = trainer.run(6, progress=False)
    assert len(seen) == 3 and len({record.loss for record in records}) == 3
    assert [record.residual for record in records] == [0.0] * 6


def test_accumulation_belongs_to_a_run(tmp_path):
    whole = a_trainer(a_model(), accumulate=2)
    whole.run(4, progress=False)
    trainer = a_trainer(a_model(), accumulate=2, output_dir=tmp_path)
    trainer.step()
    trainer.step()
    trainer.close()
    with pytest.raises(ValueError, match="output_dir: expected a run with accumulate 1, got 2"):
        a_trainer(a_model(), output_dir=tmp_path).resume()
    again = a_trainer(a_model(), accumulate=2, output_dir=tmp_path)
    assert again.resume() == 2
    again.run(2, progress=False)
    assert_same_bits(logits_of(again.model), logits_of(whole.model))


def test_slopes_are_weighted_by_tokens():
    """Without curvature, whose estimate is no sum over tokens, as one batch of all."""
    batches, models = uneven_batches()[-2:], []
    for parts in (batches, [torch.cat(batches)]):
        models.append(a_model())
        estimator = mk.StraightThrough(lr=0.3, curvature=0.0)
        trainer = a_trainer(models[-1], batches=parts, estimator=estimator, accumulate=len(parts))
        losses = [record.loss for record in trainer.run(3, progress=False)]
        assert len(losses) == 3
    for several, one in zip(*map(logits_of, models), strict=True):
        torch.testing.assert_close(several, one, rtol=1e-4, atol=1e-5)


def test_the_curvature_of_a_batch_is_that_of_its_own_loss():
    models = []
    for accumulate in (1, 2):
        models.append(a_model())
        estimator = mk.StraightThrough(lr=0.3, curvature=1.0)
        batches = some_batches(1)
        a_trainer(models[-1], batches=batches, estimator=estimator, accumulate=accumulate).run(3, progress=False)
    for one, twice in zip(*map(logits_of, models), strict=True):
        assert_same_bits(one, twice)
