from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_llama import WORDS, tiny_model

from maskpro_kernels.text.perplexity import causal_lm_loss, perplexity


def ids(rows, length, seed=0):
    return torch.randint(len(WORDS), (rows, length), generator=torch.Generator().manual_seed(seed))


def test_loss_is_that_of_transformers():
    model, batch = tiny_model(), ids(5, 17)
    loss = causal_lm_loss(model, batch)
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(batch, labels=batch).loss)


def test_loss_is_differentiable():
    model, batch = tiny_model(), ids(2, 9)
    (ours,) = torch.autograd.grad(causal_lm_loss(model, batch), model.model.norm.weight)
    (theirs,) = torch.autograd.grad(model(batch, labels=batch).loss, model.model.norm.weight)
    torch.testing.assert_close(ours, theirs)


def test_loss_of_16_bit_logits_is_taken_in_float32():
    model, batch = tiny_model().to(torch.bfloat16), ids(3, 33)
    logits = model(batch).logits
    assert logits.dtype == torch.bfloat16
    expected = -logits.double().log_softmax(-1)[:, :-1].gather(-1, batch[:, 1:, None]).mean()
    assert abs(causal_lm_loss(model, batch).item() - expected.item()) < 1e-6


def test_perplexity_weighs_tokens_alike_and_leaves_the_mode():
    model, cut = tiny_model().train(), ids(7, 12)
    with torch.no_grad():
        expected = math.exp(sum(causal_lm_loss(model, row[None]).item() for row in cut) / 7)
    assert perplexity(model, cut, batch_size=4) == pytest.approx(expected, rel=1e-6)
    assert model.training and model.model.layers[0].training
    assert perplexity(model.eval(), cut, batch_size=7) == pytest.approx(expected, rel=1e-6)
    assert not model.training
    model.train().model.layers[1].eval()
    perplexity(model, cut)
    assert model.training and not model.model.layers[1].training


def test_perplexity_evaluates_in_eval_mode_without_gradients():
    class Model(torch.nn.Linear):
        def forward(self, input_ids, use_cache):
            assert not self.training and torch.is_inference_mode_enabled() and use_cache is False
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4))

    assert perplexity(Model(1, 1).train(), ids(2, 5) % 4) == pytest.approx(4)


def test_perplexity_beyond_float_is_infinite():
    class Model(torch.nn.Linear):
        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=torch.tensor([1e4, 0.0]).expand(*input_ids.shape, 2))

    assert perplexity(Model(1, 1), torch.ones(1, 3, dtype=torch.int64)) == math.inf


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 1), (1, 2, 3)])
def test_bad_shapes(shape):
    model, wrong = tiny_model(), torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match="input_ids: expected .*got"):
        causal_lm_loss(model, wrong)
    with pytest.raises(ValueError, match="windows: expected .*got"):
        perplexity(model, wrong)


def test_bad_batch_size():
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        perplexity(tiny_model(), ids(2, 5), batch_size=0)
