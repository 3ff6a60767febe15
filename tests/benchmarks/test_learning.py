"""The peers of the comparison as estimators: strict masks, the formulas of each paper, known masks."""

from __future__ import annotations

import math
from itertools import product

import maskllm
import proxsparse
import pytest
import relaxed
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.mask_toy import best_mask, inputs, learned_mask, toy
from helpers.small_trainer import a_trainer, some_batches
from maskllm import MaskLLM
from proxsparse import ProxSparse
from relaxed_top_k import RelaxedTopK, relaxed_top_k
from torch import nn

import maskpro_kernels as mk

pytestmark = pytest.mark.usefixtures("eager_reference")

PEERS = {"maskllm": MaskLLM, "relaxed-top-k": RelaxedTopK, "proxsparse": ProxSparse}
# So that steps of the small model swap something
FAST = {"maskllm": {"lr": 0.02}, "relaxed-top-k": {"lr": 1.0}, "proxsparse": {"lr": 0.1, "frozen": 0.01}}


def a_peer(name: str, steps: int) -> relaxed.RelaxedMask:
    return PEERS[name](steps=steps, **{**PEERS[name].options, **FAST[name]})


@pytest.mark.parametrize(("name", "pattern"), list(product(PEERS, ["1:4", "2:4", "4:8"])))
def test_steps_move_strict_masks_and_leave_the_weights(name, pattern):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    dense = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    mk.convert(model, pattern)
    before = [learned_mask(layer) for layer in (model[0], model[2])]
    a_trainer(model, estimator=a_peer(name, 4)).run(4, progress=False)
    layers, n, m = (model[0], model[2]), *map(int, pattern.split(":"))
    for layer, weight in zip(layers, dense, strict=True):
        kept = layer.logits.detach() != 0
        assert (kept.view(-1, m).sum(1) == n).all()
        assert set(layer.logits.unique().tolist()) == {0.0, relaxed.WRITTEN_GAP}
        assert_same_bits(layer.weight.detach(), weight)
        assert "forward" not in vars(layer)
        assert torch.equal(layer.eval().masked_weight(), weight * kept)
    assert any((learned_mask(layer) != mask).any() for layer, mask in zip(layers, before, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


KNOWN = {
    "maskllm": (100, lambda steps: MaskLLM(steps, lr=3e-3)),
    "relaxed-top-k": (300, lambda steps: RelaxedTopK(steps, lr=0.03)),
    "proxsparse": (300, lambda steps: ProxSparse(steps, lr=0.03, strength=0.003)),
    # the curvature is for losses in nats
    "straight-through": (100, lambda steps: mk.StraightThrough(0.1, steps, curvature=0.0)),
    "reinforce": (150, lambda steps: mk.Reinforce(lr=5.0, draws=4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_a_learner_finds_the_best_mask(name):
    model, xs = toy(), inputs()
    best = best_mask(model[0].weight, xs)
    batches = [(x, model(x).detach()) for x in xs]
    mk.convert(model, "2:4", gap=3.0)
    assert not (learned_mask(model[0]) == best).all(1).any()
    steps, make = KNOWN[name]

    def loss_fn(model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    mk.MaskTrainer(model, loss_fn, batches, make(steps), seed=1).run(steps, progress=False)
    assert (learned_mask(model[0]) == best).all()


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8"])
def test_maskllm_has_a_distribution_over_all_masks(pattern):
    model = nn.Sequential(nn.Linear(32, 16))
    mk.convert(model, pattern)
    (layer,), estimator, n = model, MaskLLM(10), layer_n(pattern)
    masks = maskllm.masks_of(layer.pattern)
    assert len(masks.unique(dim=0)) == math.comb(layer.pattern.m, n) and (masks.sum(1) == n).all()
    estimator.begin({"0": layer})
    learned = estimator.learned["0"].detach()
    for step in (0, 9):
        p = estimator.probabilities(learned, step)
        torch.testing.assert_close(p.sum(0), torch.ones(p.shape[1:]))
        assert (p > 0).any(0).all()
    # pi_i - pi_j is the prior's, but for noise: here that of the initial mask over the farthest one
    kept = (layer.logits.detach() > 0).float().view(16, -1, layer.pattern.m)
    alike = (kept @ masks.T).movedim(-1, 0)
    farthest = alike == alike.amin(0)
    prior = (learned * (alike == n)).sum(0) - (learned * farthest).sum(0) / farthest.sum(0)
    expected = 3.0 * maskllm.SIGMA * (n - float(alike.min()))
    assert abs(prior.mean() - expected) < 4 * 1.5 * maskllm.SIGMA / math.sqrt(prior.numel())


def layer_n(pattern: str) -> int:
    return int(pattern.split(":")[0])


def test_maskllm_draws_by_its_probabilities():
    """At a low temperature a relaxed mask is one of the masks, drawn by softmax(kappa pi)."""
    layer = mk.MaskedLinear.from_linear(nn.Linear(4, 20_000), "2:4")
    estimator = MaskLLM(2)
    pi = torch.tensor([0.01, 0.0, -0.01, 0.02, 0.0, 0.005])
    learned = pi[:, None, None].expand(6, 20_000, 1)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        weight = estimator.weight(layer, learned, 1, relaxed.generator(layer, 0, 1))
    masks = maskllm.masks_of(layer.pattern)
    torch.testing.assert_close(weight.sum(1), torch.full((20_000,), 2.0))
    drawn = torch.cdist(weight, masks).argmin(1).bincount(minlength=6)
    p = (500.0 * pi).softmax(0)
    assert ((drawn / 20_000 - p).abs() < 4 * (p * (1 - p) / 20_000).sqrt() + 1e-9).all()


def test_the_norm_of_the_masked_weights_is_rewarded():
    """The gradient is that of the text's loss less the squared norm, for the same noise."""
    torch.manual_seed(0)
    (batch,), layer = some_batches(1), nn.Linear(16, 8)
    model = nn.Sequential(layer)
    mk.convert(model, "2:4")
    estimator = MaskLLM(3, regularization=0.5)
    trainer = a_trainer(model, estimator=estimator, batches=[batch])
    trainer.begin()
    learned = estimator.learned["0"].detach().clone().requires_grad_()
    weight = estimator.weight(model[0], learned, 0, relaxed.generator(model[0], trainer.seed, 0))
    loss = nn.functional.linear(batch, weight, model[0].bias).square().mean()
    (loss - 0.5 * weight.square().sum()).backward()
    nn.utils.clip_grad_norm_(learned, 1.0)
    torch.optim.AdamW([learned], lr=5e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1).step()
    assert trainer.step().loss == pytest.approx(float(loss.detach()), rel=1e-6)
    torch.testing.assert_close(estimator.learned["0"].detach(), learned.detach(), rtol=1e-5, atol=1e-7)
    factors = [-float(estimator.penalty(model[0], learned, torch.ones(2), step)) / 2 for step in range(3)]
    assert factors == pytest.approx([0.5, 1 / 3, 1 / 6])


def test_adamw_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(7, generator=generator)
    expected = value.clone().requires_grad_()
    optimizer = torch.optim.AdamW([expected], lr=0.03, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    mean, square = torch.zeros(7), torch.zeros(7)
    for count in range(1, 6):
        expected.grad = torch.randn(7, generator=generator)
        relaxed.adamw_(value, expected.grad, mean, square, count, 0.03, (0.8, 0.9), 1e-6, 0.2)
        optimizer.step()
    torch.testing.assert_close(value, expected.detach())


@pytest.mark.parametrize("n", [1, 2, 4])
def test_relaxed_top_k(n):
    keys = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for temperature in (0.05, 1.0):
        taken = relaxed_top_k(keys.T, n, temperature)
        torch.testing.assert_close(taken.sum(0), torch.full((50,), float(n), dtype=torch.float64))
        assert (taken >= 0).all()
    cold = relaxed_top_k(keys.T, n, 1e-3).T
    clear = keys.sort(descending=True).values.diff().abs().amin(1) > 0.02
    expected = torch.zeros_like(keys).scatter_(1, keys.topk(n).indices, 1.0)
    torch.testing.assert_close(cold[clear], expected[clear], atol=1e-6, rtol=0)
    torch.autograd.gradcheck(lambda x: relaxed_top_k(x, n, 0.7), keys[:3].T.requires_grad_())


def test_relaxed_top_k_has_finite_gradients_where_one_key_is_far_above():
    keys = torch.tensor([[90.0], [0.0], [1.0], [-90.0]], requires_grad=True)
    relaxed_top_k(keys, 2, 0.1).square().sum().backward()
    assert keys.grad.isfinite().all()


def numerically(v: torch.Tensor, strength: float, n: int, starts: int = 30) -> torch.Tensor:
    """Least |x - v|^2 / 2 + strength * e_{N+1}(|x|) by projected gradient descent from many starts."""
    y, generator = v.abs(), torch.Generator().manual_seed(1)

    def value(x):
        e = proxsparse.symmetric_polynomials(list(x.unbind(-1)), n + 1)[-1]
        return (x - y).square().sum(-1) / 2 + strength * e

    x = y * torch.rand(starts, *y.shape, dtype=y.dtype, generator=generator)
    # a third of the starts with zeros, which other starts only come near to
    x[::3] *= torch.rand(x[::3].shape, dtype=y.dtype, generator=generator) > 0.4
    for _ in range(400):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(value(x).sum(), x)
        x = (x.detach() - 0.04 / (1 + strength) * gradient).clamp_min(0.0)
    return value(x).amin(0)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), slow(4, 8)])
@pytest.mark.parametrize("strength", [slow(0.05), 0.5, slow(3.0)])
def test_the_proximal_operator_minimizes(n, m, strength):
    v = torch.randn(60, m, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = proxsparse.proximal(v, strength, n)
    assert (x.abs() <= v.abs()).all() and ((x == 0) | (x.sign() == v.sign())).all()
    e = proxsparse.symmetric_polynomials(list(x.abs().unbind(-1)), n + 1)[-1]
    found = (x - v).square().sum(-1) / 2 + strength * e
    # the numerical one comes near from above
    assert (found <= numerically(v, strength, n) + 1e-9).all()
    torch.testing.assert_close(proxsparse.proximal(v, 0.0, n), v)


def test_the_regularizer_at_2_4_is_the_papers():
    w = torch.rand(5, 4, dtype=torch.float64)
    a, b, c, d = w.unbind(1)
    paper = a * b * c + b * c * d + c * d * a + d * a * b
    torch.testing.assert_close(proxsparse.symmetric_polynomials([a, b, c, d], 3)[3], paper)


def test_a_strong_regularizer_leaves_strict_groups():
    v = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)).double()
    x = proxsparse.proximal(v, 1e4, 4)
    assert ((x != 0).sum(1) <= 4).all()
    torch.testing.assert_close(x, v * mk.expand_mask(mk.top_n_mask(v.abs().float(), "4:8"), "4:8"))
