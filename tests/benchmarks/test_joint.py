"""Methods that learn masks and weights together: what each moves, and the rows of an interrupted run."""

from __future__ import annotations

import json
import math

import joint
import pytest
import rows
import torch
from magnitudes import CAST, SRSTE
from masks_and_weights import CORRECTED, GRADIENT, STILL, MasksAndWeights

from maskpro_kernels import convert
from maskpro_kernels.functional.masks import expand_mask, top_n_mask
from maskpro_kernels.learn.trainer import MaskTrainer

pytestmark = pytest.mark.usefixtures("eager_reference")

OUT, K, TOKENS = 4, 16, 8


class Killed(BaseException):
    pass


@pytest.fixture
def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(K, OUT, bias=False))


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(TOKENS, K), torch.randn(TOKENS, OUT)) for _ in range(6)]


def loss_fn(model, batch) -> torch.Tensor:
    x, target = batch
    return (model(x) - target).square().mean()


def gradient(weight: torch.Tensor, batch) -> torch.Tensor:
    """Gradient of ``loss_fn`` with a layer of this weight [OUT, K], by its formula."""
    x, target = batch
    return 2.0 * (x @ weight.T - target).T @ x / target.numel()


def trained(model, batches, estimator, steps: int):
    """The layer after so many steps."""
    codes = {"0": top_n_mask(model[0].weight.detach().abs(), "2:4")}
    convert(model, "2:4", init=codes, gap=15.0)
    trainer = MaskTrainer(model, loss_fn, batches, estimator, seed=0)
    trainer.run(steps, progress=False)
    trainer.close()
    return model[0]


def mask_of(weight: torch.Tensor) -> torch.Tensor:
    return expand_mask(top_n_mask(weight.abs(), "2:4"), "2:4")


def test_sr_ste_moves_dropped_weights_by_the_gradient_and_the_decay(model, batches):
    weight = model[0].weight.detach().clone()
    estimator = SRSTE(3, lr=0.05, decay=0.3)
    layer = trained(model, batches, estimator, 3)
    mean = torch.zeros_like(weight)
    square = torch.zeros_like(weight)
    for step, batch in enumerate(batches[:3]):
        mask = mask_of(weight)
        grad = gradient(weight * mask, batch) + 0.3 * weight * ~mask
        mean = 0.9 * mean + 0.1 * grad
        square = 0.999 * square + 0.001 * grad.square()
        moved = mean / (1 - 0.9 ** (step + 1)) / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        weight = weight - 0.05 * (1 - step / 3) * moved
    torch.testing.assert_close(estimator.learned["0"].detach(), weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(estimator.sparse_weights({"0": layer})["0"], weight * mask_of(weight))
    assert torch.equal(layer.mask, mask_of(weight))


def test_cast_brings_dropped_weights_to_zero(model, batches):
    dense = model[0].weight.detach().clone()
    estimator = CAST(40, lr=0.02, decay=100.0, rising=0.25)
    layer = trained(model, batches, estimator, 40)
    learned = estimator.learned["0"].detach()
    weight = estimator.dense(layer, learned)
    assert learned.shape == (OUT, K + 1)
    mask = mask_of(weight)
    assert weight[~mask].abs().max() < 1e-4 < dense[~mask].abs().min()
    assert (learned[:, K:] != 1.0).all()
    # what is left without the dropped weights is the whole weight
    torch.testing.assert_close(estimator.sparse_weights({"0": layer})["0"], weight, rtol=0.0, atol=1e-4)
    assert [estimator.decay_at(step) for step in (0, 9, 39)] == [10.0, 100.0, 100.0]


def test_cast_without_decay_takes_steps_of_adam(model, batches):
    weight = model[0].weight.detach().clone()
    estimator = CAST(1, lr=0.01, decay=0.0)
    trained(model, batches, estimator, 1)
    # the first step of Adam has the length of the rate, nearly; AdamS takes the square of the moment
    grad = gradient(weight, batches[0])
    expected = weight - 0.01 * grad.sign() * math.sqrt(1.0 - 0.999) / math.sqrt(0.001)
    torch.testing.assert_close(estimator.learned["0"].detach()[:, :K], expected, rtol=1e-4, atol=1e-5)


def test_masks_and_weights_learn_in_their_shares_of_the_steps(model, batches):
    estimator = MasksAndWeights(10, lr=0.3, train_weights=0.01, masks_until=0.5, weights_from=0.2)
    assert [estimator.lr_at(step) for step in (0, 4, 5, 9)] == pytest.approx([0.3, 0.06, 0.0, 0.0])
    rates = [estimator.weight_lr_at(step) for step in (0, 1, 2, 9)]
    assert rates == pytest.approx([0.0, 0.0, 0.01, 0.01 / 8])
    fixed = MasksAndWeights(4, masks_until=0.0)
    weight = model[0].weight.detach().clone()
    layer = trained(model, batches, fixed, 4)
    assert torch.equal(layer.mask, mask_of(weight))
    moved = layer.weight != weight
    assert torch.equal(moved, layer.mask)


@pytest.mark.parametrize("dropped", [STILL, GRADIENT, CORRECTED])
def test_dropped_weights_learn_as_they_are_let(model, batches, dropped):
    weight = model[0].weight.detach().clone()
    mask = mask_of(weight)
    layer = trained(model, batches, MasksAndWeights(4, masks_until=0.0, dropped=dropped), 1)
    grad = gradient(weight * mask, batches[0])
    if dropped == CORRECTED:
        x, target = batches[0]
        of_y = 2.0 * (x @ (weight * mask).T - target) / target.numel()
        # F of the slopes, of a loss that is a mean over the tokens
        grad += weight * ~mask * torch.outer(of_y.square().sum(0), x.square().sum(0))
    if dropped == STILL:
        grad *= mask
    torch.testing.assert_close(layer.weight.detach(), weight - 6e-4 * grad.sign(), rtol=1e-5, atol=1e-6)


def test_wrong_settings_are_refused():
    for settings in ({"masks_until": 1.5}, {"weights_from": -0.1}, {"dropped": "all"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            MasksAndWeights(4, **settings)


def figures(folder) -> list[dict]:
    """The rows, without seconds."""
    lines = (folder / rows.ROWS).read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines[1:]]


def test_an_interrupted_comparison_has_the_rows_of_a_whole_one(arguments, tmp_path, monkeypatch):
    short = {
        name: joint.Joint(learner.kind, learner.options, learner.search[:1], learner.gap, learner.start, learner.loss)
        for name, learner in joint.METHODS.items()
    }
    monkeypatch.setattr(joint, "METHODS", short)
    sizes = "--steps 3 5".split()
    whole = tmp_path / "whole"
    joint.main([*arguments, "--output", str(whole), *sizes])
    of_whole = figures(whole)
    assert [row["method"] for row in of_whole[:3]] == ["dense", joint.DENSE, joint.REFITTED]
    for name in short:
        of_method = [row for row in of_whole if row["method"] == name]
        assert [row["steps"] for row in of_method] == [3, 3, 5]
        chosen = min(of_method[:2], key=lambda row: row["validation"])["settings"]
        assert of_method[2]["settings"] == chosen and all(row["weights"] == "own" for row in of_method)
    again = tmp_path / "again"
    step = MaskTrainer.step
    for interrupted in (2, 9, 10):
        steps_before = iter(range(interrupted))

        def killed_step(trainer, steps_before=steps_before):
            if next(steps_before, None) is None:
                raise Killed
            return step(trainer)

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(MaskTrainer, "step", killed_step)
            joint.main([*arguments, "--output", str(again), *sizes])
    joint.main([*arguments, "--output", str(again), *sizes])
    assert figures(again) == of_whole
    assert not [path for path in again.iterdir() if path.is_dir()]
