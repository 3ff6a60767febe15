"""Losses and gradients that no logits can learn from: they are named, and change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.bits import assert_same_bits, first_difference
from helpers.straight_through import (
    Broken,
    assert_detached,
    batches_of_tokens,
    learn_straight_through,
    logits_by_name,
    masked_llama,
    squares_of,
    two_masked_layers,
)

import maskpro_kernels as mk
from maskpro_kernels.text.perplexity import causal_lm_loss


def test_a_gradient_that_is_not_finite_is_reported_and_spoils_nothing(eager_reference):
    model = masked_llama()
    trainer, _ = learn_straight_through(model, 1)
    before, squares, step = (
        logits_by_name(model),
        squares_of(trainer),
        int(next(iter(trainer.layers.values())).counter_state.step),
    )
    trainer.loss_fn = lambda model, batch: Broken.apply(causal_lm_loss(model, batch), math.nan)
    with pytest.raises(FloatingPointError, match="gradients of step 1: .*q_proj"):
        trainer.step()
    assert_same_bits(before, logits_by_name(model))
    assert squares_of(trainer) == squares
    # the draw is spent: in other layers logits may have learned from it
    assert trainer.steps_done == 2 and int(next(iter(trainer.layers.values())).counter_state.step) == step + 1
    assert_detached(model)
    assert all(d.slopes is None and d.latest is None for d in trainer.estimator._updaters.values())
    trainer.loss_fn = causal_lm_loss
    trainer.step()
    assert first_difference(before, logits_by_name(model))


def test_a_run_bears_gradients_that_are_not_finite(eager_reference, tmp_path):
    """Each of ``max_skipped`` is reported; one more ends the run, and is not taken again after a resume."""

    def a_trainer():
        arguments = {"seed": 3, "output_dir": tmp_path, "max_skipped": 1}
        return mk.MaskTrainer(masked_llama(), causal_lm_loss, batches_of_tokens(), mk.StraightThrough(), **arguments)

    trainer = a_trainer()
    trainer.step()
    before, squares = logits_by_name(trainer.model), squares_of(trainer)
    trainer.loss_fn = lambda model, batch: Broken.apply(causal_lm_loss(model, batch), math.nan)
    with pytest.warns(UserWarning, match="^gradients of step 1: .*q_proj.*; these layers moved only in part"):
        assert math.isfinite(trainer.step().loss)
    with pytest.raises(FloatingPointError, match="gradients of step 2: .*q_proj.*, after 1 others in a row"):
        trainer.run(1, progress=False)
    assert_same_bits(before, logits_by_name(trainer.model))
    assert squares_of(trainer) == squares
    trainer.close()
    again = a_trainer()
    assert again.resume() == 3
    assert_same_bits(before, logits_by_name(again.model))
    assert squares_of(again) == squares
    again.step()
    assert first_difference(before, logits_by_name(again.model))


def test_a_layer_learns_though_another_ones_gradient_is_not_finite(eager_reference):
    model, x = two_masked_layers()
    before = logits_by_name(model)

    def loss(model, x):
        hidden = Broken.apply(model[0](x), math.nan)
        return model[2](torch.relu(hidden)).square().mean()

    with pytest.raises(FloatingPointError, match=r"got others in \['0'\]"):
        learn_straight_through(model, 1, loss, [x])
    after = logits_by_name(model)
    assert torch.equal(before["0"], after["0"]) and not torch.equal(before["2"], after["2"])


def test_losses_that_gradients_do_not_take_to_the_masks(eager_reference):
    model, x = two_masked_layers()
    before = logits_by_name(model)

    def reentrant(model, x):
        x = x.clone().requires_grad_()
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True).square().mean()

    with pytest.raises(ValueError, match="loss_fn: .*use_reentrant=False"):
        learn_straight_through(model, 1, reentrant, [x])
    assert_same_bits(before, logits_by_name(model))
    assert_detached(model)

    def regularised(model, x):
        return model(x).square().mean() + 1e-3 * mk.log_prob(model)

    with pytest.raises(ValueError, match=r"loss_fn: .*only by masks, not so \['0', '2'\]"):
        learn_straight_through(model, 1, regularised, [x])
    assert_detached(model)
    model[2].logits.requires_grad_(False)
    with pytest.raises(ValueError, match="model: expected logits that require a gradient, got frozen ones in 2"):
        learn_straight_through(model, 1, regularised, [x])
    model[2].logits.requires_grad_(True).data = model[2].logits.data.t().contiguous().t()
    with pytest.raises(ValueError, match="model: expected contiguous logits, got .* in 2"):
        learn_straight_through(model, 1, regularised, [x])


class InParts(torch.autograd.Function):
    """A layer whose use the forward hides from its hooks, and whose backward has two parts."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer.forward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            for part, grad_of_part in zip(x.chunk(2), grad.chunk(2), strict=True):
                ctx.layer.forward(part.detach()).backward(grad_of_part)
        return torch.zeros_like(x), None


def test_a_gradient_after_a_layer_has_moved_is_reported(eager_reference):
    model, x = two_masked_layers()

    def loss(model, x):
        return model[2](InParts.apply(torch.relu(model[0](x)), model[2])[:, :1].expand(-1, 16)).square().mean()

    with pytest.raises(ValueError, match="loss_fn: .* another one after the layer has moved"):
        learn_straight_through(model, 1, loss, [x])
    assert_detached(model)


def test_losses_that_cannot_be_learned_from(eager_reference):
    model = masked_llama()
    before = logits_by_name(model)
    for loss_fn, error, message in (
        (lambda model, batch: causal_lm_loss(model, batch).item(), ValueError, "loss_fn: expected a loss with a grad"),
        (
            lambda model, batch: causal_lm_loss(model, batch).detach(),
            ValueError,
            "loss_fn: expected a loss with a grad",
        ),
        (
            lambda model, batch: causal_lm_loss(model, batch) * torch.ones(2),
            ValueError,
            r"loss_fn: expected a 0-dim tensor or a number, got a tensor \[2\]",
        ),
        (lambda model, batch: causal_lm_loss(model, batch) * torch.inf, FloatingPointError, "loss of step 0"),
        (lambda model, batch: 1 / (causal_lm_loss(model, batch).item() * 0), ZeroDivisionError, "division"),
    ):
        with pytest.raises(error, match=message):
            learn_straight_through(model, 1, loss_fn)
        assert_same_bits(before, logits_by_name(model))
        assert_detached(model)
