"""Methods that learn masks and weights together: what each moves, and the rows of an interrupted run."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math

import joint
import pytest
import rows
import torch
from magnitudes import CAST, SRSTE
from masks_and_weights import CORRECTED, GRADIENT, STILL, AllWeights, MasksAndWeights

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


def test_cast_takes_steps_of_adam_with_a_decay_that_rises(model, batches):
    steps = 12
    weight = model[0].weight.detach().clone()
    # weights at 0 have no decay, and learn
    weight[0, :2] = 0.0
    model[0].weight.data.copy_(weight)
    scales = torch.ones(OUT, 1)
    estimator = CAST(steps, lr=0.05, decay=0.2, rising=0.5)
    layer = trained(model, batches, estimator, steps)
    mask = mask_of(weight)
    means = [torch.zeros_like(weight), torch.zeros_like(scales)]
    squares = [torch.zeros_like(weight), torch.zeros_like(scales)]
    for step in range(steps):
        of_whole = gradient(weight * scales, batches[step % len(batches)])
        grads = [of_whole * scales, (of_whole * weight).sum(1, keepdim=True)]
        decay = 0.2 * min((step + 1) / 6, 1.0) * grads[0].square().mean().sqrt()
        moved = []
        for i, (value, grad) in enumerate(zip((weight, scales), grads, strict=True)):
            means[i] = 0.9 * means[i] + 0.1 * grad
            update = means[i] + (decay * weight.sign() * ~mask if i == 0 else 0.0)
            squares[i] = 0.999 * squares[i] + 0.001 * update.square()
            root = (squares[i] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            moved.append(value - 0.05 * (1 - step / steps) / (1 - 0.9 ** (step + 1)) * update / root)
        weight, scales = moved
        if step == 9:
            # another mask than that of the 10 steps before
            assert (mask != mask_of(weight * scales)).any()
            mask = mask_of(weight * scales)
    expected = torch.cat([weight, scales], 1)
    torch.testing.assert_close(estimator.learned["0"].detach(), expected, rtol=1e-3, atol=1e-4)
    sparse = weight * scales * mask_of(weight * scales)
    torch.testing.assert_close(estimator.sparse_weights({"0": layer})["0"], sparse, rtol=1e-3, atol=1e-4)


def test_cast_brings_dropped_weights_near_zero(model, batches):
    dense = model[0].weight.detach().clone()
    estimator = CAST(200, lr=0.01, decay=30.0, rising=0.25)
    layer = trained(model, batches, estimator, 200)
    weight = estimator.dense(layer, estimator.learned["0"].detach())
    mask = mask_of(weight)
    assert weight[~mask].abs().mean() < 0.1 * dense[~mask].abs().mean()
    assert weight[mask].abs().mean() > 0.5 * dense[mask].abs().mean()


def test_refitted_weights_start_with_the_mask_of_reconstruction(arguments, tmp_path):
    comparison = joint.Comparison(joint.parsed([*arguments, "--output", str(tmp_path)]))
    comparison.initial_rows()
    start, _ = comparison.start(joint.REFITTED)
    for kind in (joint.RefittedSRSTE, joint.RefittedCAST):
        comparison.put_start(kind(4))
        for name, layer in comparison.masked.items():
            mask = expand_mask(start.codes[name], comparison.pattern)
            assert torch.equal(top_n_mask(layer.weight.detach().abs(), comparison.pattern), start.codes[name])
            assert torch.equal(layer.weight.detach(), start.weights[name] * mask)


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


def test_dropped_weights_learn_as_they_are_let(model, batches):
    weight = model[0].weight.detach().clone()
    mask = mask_of(weight)
    x, target = batches[0]
    of_y = 2.0 * (x @ (weight * mask).T - target) / target.numel()
    grad = of_y.T @ x
    # F of the slopes, of a loss that is a mean over the tokens
    curvature = torch.outer(of_y.square().sum(0), x.square().sum(0))
    expected = {STILL: grad * mask, GRADIENT: grad, CORRECTED: grad + weight * ~mask * curvature}
    for dropped, gradient_of_weights in expected.items():
        estimator = MasksAndWeights(4, dropped=dropped)
        layer = trained(torch.nn.Sequential(copy.deepcopy(model[0])), batches, estimator, 1)
        first = estimator.tensors()["first/0"]
        torch.testing.assert_close(first, 0.1 * gradient_of_weights, rtol=1e-4, atol=1e-6)
        moved = weight - 6e-4 * gradient_of_weights.sign()
        torch.testing.assert_close(layer.weight.detach(), moved, rtol=1e-5, atol=1e-6)


def test_a_correction_that_is_not_finite_moves_nothing(model, batches):
    before = model[0].weight.detach().clone()
    codes = top_n_mask(before.abs(), "2:4")
    convert(model, "2:4", init={"0": codes}, gap=15.0)
    learner = AllWeights(model[0], 0.0)
    learner.factors = (torch.full((OUT,), 1e30), torch.full((K,), 1e30))
    learner.step(torch.ones_like(before), codes, 0.1, torch.tensor(1.0))
    assert torch.equal(learner.master, before) and learner.count == 0


def test_wrong_settings_are_refused():
    for settings in (
        {"masks_until": 1.5},
        {"masks_until": 0.5, "dropped": GRADIENT},
        {"weights_from": -0.1},
        {"weights_from": 0.6, "masks_until": 0.5},
        {"dropped": "all"},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            MasksAndWeights(4, **settings)


def figures(folder) -> list[dict]:
    """The rows, without seconds."""
    lines = (folder / rows.ROWS).read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines[1:]]


SHORT = {
    SRSTE.name: ({"lr": 0.01},),
    CAST.name: ({"lr": 0.01},),
    joint.RefittedSRSTE.name: ({"lr": 0.01},),
    joint.RefittedCAST.name: ({"lr": 0.01},),
    MasksAndWeights.name: ({"dropped": CORRECTED, "masks_until": 1.0},),
}


@pytest.fixture
def short_search(monkeypatch):
    methods = {name: dataclasses.replace(joint.METHODS[name], search=search) for name, search in SHORT.items()}
    monkeypatch.setattr(joint, "METHODS", methods)


def interrupted_run(arguments, folder, monkeypatch, step: int, saves: bool) -> None:
    """Run until before this step of the call; without a snapshot there if it does not save, as after SIGKILL."""
    steps_before = iter(range(step))
    take_step = MaskTrainer.step

    def killed_step(trainer):
        if next(steps_before, None) is None:
            if not saves:
                patched.setattr(MaskTrainer, "_save_snapshot", lambda trainer: None)
            raise Killed
        return take_step(trainer)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(MaskTrainer, "step", killed_step)
        joint.main([*arguments, "--output", str(folder)])


@pytest.mark.usefixtures("short_search")
def test_an_interrupted_comparison_has_the_rows_of_a_whole_one(arguments, tmp_path, monkeypatch):
    arguments = [*arguments, "--steps", "2", "12"]
    whole = tmp_path / "whole"
    joint.main([*arguments, "--output", str(whole)])
    of_whole = figures(whole)
    assert [row["method"] for row in of_whole[:4]] == ["dense", joint.DENSE, joint.REFITTED, joint.TEACHER]
    for name in SHORT:
        of_method = [row for row in of_whole if row["method"] == name]
        default, other = (row["settings"] for row in of_method[:2])
        chosen = min(of_method[:2], key=lambda row: row["validation"])["settings"]
        goes_on = [default] if chosen == default else [default, chosen]
        assert [row["steps"] for row in of_method] == [2, 2] + [12] * len(goes_on)
        assert [row["settings"] for row in of_method[2:]] == goes_on and other == {**default, **SHORT[name][0]}
        assert all(row["weights"] == "own" for row in of_method)
    again = tmp_path / "again"
    for name in SHORT:
        of_method = [*arguments, "--methods", name]
        # in the first run, and then, after its last step, the second and 11 steps, in one of 12
        interrupted_run(of_method, again, monkeypatch, 1, saves=True)
        interrupted_run(of_method, again, monkeypatch, 1 + 2 + 11, saves=True)
        joint.main([*of_method, "--output", str(again)])
    in_other_order = figures(again)
    assert len(in_other_order) == len(of_whole) and all(row in of_whole for row in in_other_order)
    assert [path.name for path in again.iterdir() if path.is_dir()] == [joint.TEACHER]


def test_the_dense_model_teaches_weights_that_were_refitted(arguments, tmp_path, monkeypatch):
    learner = joint.METHODS[MasksAndWeights.name]
    learner = dataclasses.replace(learner, search=(), loss="kl")
    monkeypatch.setattr(joint, "METHODS", {MasksAndWeights.name: learner})
    joint.main([*arguments, "--steps", "2", "--output", str(tmp_path)])
    *_, teacher, row = figures(tmp_path)
    assert teacher["method"] == joint.TEACHER and teacher["score"] == 1.0
    assert math.isfinite(row["score"])
    # its outputs are computed once, also for fewer steps
    monkeypatch.setattr("maskpro_kernels.text.losses.teacher_logits", None)
    for steps in ("2", "1"):
        joint.main([*arguments, "--steps", steps, "--output", str(tmp_path)])
    *_, again, fewer = figures(tmp_path)
    assert again == row and fewer["method"] == MasksAndWeights.name and fewer["steps"] == 1


@pytest.mark.usefixtures("short_search")
def test_steps_that_are_taken_again_count_once(arguments, tmp_path, monkeypatch):
    arguments = [*arguments, "--steps", "6", "--methods", CAST.name]
    # each look at the clock is a second later
    ticks = itertools.count()
    monkeypatch.setattr("compare.time.process_time", lambda: float(next(ticks)))
    seconds = []
    for folder, interrupted in ((tmp_path / "whole", False), (tmp_path / "again", True)):
        if interrupted:
            interrupted_run(arguments, folder, monkeypatch, 4, saves=False)
        joint.main([*arguments, "--output", str(folder)])
        lines = map(json.loads, (folder / rows.ROWS).read_text(encoding="utf-8").splitlines())
        seconds.append([row["seconds"] for row in lines if row.get("method") == CAST.name])
    assert seconds[0] == seconds[1]


@pytest.mark.usefixtures("short_search")
def test_settings_that_diverge_get_a_row(arguments, tmp_path, monkeypatch):
    arguments = [*arguments, "--steps", "2", "--methods", SRSTE.name]
    take_step = MaskTrainer.step

    def step(trainer):
        if trainer.estimator.lr == 0.01:
            raise FloatingPointError("a step whose loss is not finite")
        return take_step(trainer)

    monkeypatch.setattr(MaskTrainer, "step", step)
    joint.main([*arguments, "--output", str(tmp_path)])
    good, bad = figures(tmp_path)[-2:]
    assert math.isfinite(good["score"]) and bad["score"] == bad["validation"] == math.inf
    assert bad["settings"]["lr"] == 0.01 and math.isnan(bad["changed_groups"])


def test_another_start_is_refused(arguments, tmp_path):
    with pytest.raises(SystemExit, match="^2$"):
        joint.main([*arguments, "--output", str(tmp_path), "--init", "wanda"])
