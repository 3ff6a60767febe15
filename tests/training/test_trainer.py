"""REINFORCE with residual and tracker, and the loop around it."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from helpers.enumerated import set_probabilities
from helpers.small_trainer import a_model, a_trainer, assert_equal_logits, logits_of, loss_fn, some_batches, under_masks
from torch import nn

import maskpro_kernels as mk

pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"lr": 0.0}, ValueError, "lr"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"lr": math.inf}, ValueError, "lr"),
        ({"lr": math.nan}, ValueError, "lr"),
        ({"lr": "50"}, TypeError, "lr"),
        ({"lr": True}, TypeError, "lr"),
        ({"lr": None}, TypeError, "lr"),
        ({"alpha": -0.1}, ValueError, "alpha"),
        ({"alpha": 1.1}, ValueError, "alpha"),
        ({"alpha": math.nan}, ValueError, "alpha"),
        ({"alpha": "0.9"}, TypeError, "alpha"),
        ({"draws": 0}, ValueError, "draws"),
        ({"draws": 2.0}, ValueError, "draws"),
        ({"draws": (1 << 16) + 1}, ValueError, "draws"),
        ({"tracker": "during"}, ValueError, "tracker"),
        ({"tracker": None}, ValueError, "tracker"),
        ({"refresh": 1}, TypeError, "refresh"),
        ({"refresh": True, "draws": 2}, ValueError, "refresh"),
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


def test_defaults_are_the_papers():
    estimator = mk.Reinforce()
    assert (estimator.lr, estimator.alpha, estimator.tracker) == (50.0, 0.99, "after")


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
        assert_equal_logits(logits_of(model), expected)
        assert (record.step, record.tokens) == (step, batch.numel())
        assert record.loss == under_masks(model, batch, drawn)
        assert (record.residual, record.advantage, record.tracker) == (residual, advantage, delta)
        assert record.flip_rate == flip_rate
        assert record.seconds > 0
        assert advantage != 0 and flip_rate > 0
        assert int(model[0].counter_state.step) == step + 1


def test_same_seed_same_bits_another_seed_not():
    runs = []
    for seed in (5, 5, 6):
        model = a_model()
        losses = [record.loss for record in a_trainer(model, seed).run(4, progress=False)]
        runs.append((losses, logits_of(model)))
    assert runs[0][0] == runs[1][0]
    assert_equal_logits(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]
    assert not any(torch.equal(a, b) for a, b in zip(runs[0][1], runs[2][1], strict=True))


def test_construction_sets_the_clock():
    model = a_model()
    mk.advance(model)
    a_trainer(model, seed=-(1 << 63))
    assert (int(model[0].counter_state.seed), int(model[0].counter_state.step)) == (-(1 << 63), 0)


def test_initial_losses_come_once_a_batch_before_the_logits_move():
    model, batches = a_model(), some_batches(3)
    start, initial, drawn = logits_of(model), [], []

    def recording(module, batch):
        index = next(i for i, b in enumerate(batches) if b is batch)
        if module[0].training:
            drawn.append(index)
        else:
            initial.append(index)
            assert_equal_logits(logits_of(module), start)
        return loss_fn(module, batch)

    trainer = a_trainer(model, batches=batches, loss_fn=recording)
    trainer.run(4, progress=False)
    trainer.step()
    assert initial == [0, 1, 2]
    assert drawn == [0, 1, 2, 0, 1]


def test_steps_alone_and_in_a_run_are_the_same():
    one, other = a_model(), a_model()
    trainer = a_trainer(one)
    stepped = [trainer.step() for _ in range(4)]
    ran = a_trainer(other).run(4, progress=False)
    assert [(r.step, r.loss, r.advantage) for r in stepped] == [(r.step, r.loss, r.advantage) for r in ran]
    assert_equal_logits(logits_of(one), logits_of(other))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_changes_nothing(value):
    model, bad = a_model(), []
    trainer = a_trainer(model, loss_fn=lambda m, b: loss_fn(m, b) + (value if bad else 0.0))
    trainer.run(2, progress=False)
    before, delta = logits_of(model), trainer.estimator.delta
    assert delta != 0
    bad.append(True)
    with pytest.raises(FloatingPointError, match="loss of step 2: expected a finite number"):
        trainer.step()
    assert_equal_logits(logits_of(model), before)
    assert trainer.estimator.delta == delta
    # it counts: the same mask would give the same loss again
    assert trainer.steps_done == int(model[0].counter_state.step) == 3
    bad.clear()
    assert trainer.step().step == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_initial_loss_that_is_not_finite_names_the_batch(value):
    model, batches = a_model(), some_batches(3)
    before = logits_of(model)
    trainer = a_trainer(model, batches=batches, loss_fn=lambda m, b: loss_fn(m, b) + (value if b is batches[1] else 0))
    with pytest.raises(FloatingPointError, match=r"initial masks: expected finite numbers, batches \[1\]"):
        trainer.step()
    assert_equal_logits(logits_of(model), before)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_stays_off_and_modes_are_restored(training):
    model = a_model().train(training)
    model[2].train(not training)
    modes = [module.training for module in model.modules()]
    seen = []

    def watching(module, batch):
        seen.append((module.training, module[0].training, module[1].training, module[2].training))
        return loss_fn(module, batch)

    trainer = a_trainer(model, batches=some_batches(1), loss_fn=watching)
    trainer.step()
    assert seen == [(False, False, False, False), (False, True, False, True)]
    assert [module.training for module in model.modules()] == modes


def test_modes_are_restored_after_an_error_in_the_loss():
    model = a_model().train()

    def failing(module, batch):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        a_trainer(model, loss_fn=failing).step()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("loss", [torch.ones(2), [1.0], None])
def test_a_loss_that_is_no_number_is_refused(loss):
    model, losses = a_model(), []
    before = logits_of(model)
    trainer = a_trainer(model, loss_fn=lambda m, b: losses.pop(0) if losses else loss)
    with pytest.raises(ValueError, match="^loss_fn: expected a 0-dim tensor or a number, got "):
        trainer.step()
    losses += [0.5] * 3
    with pytest.raises(ValueError, match="^loss_fn: expected a 0-dim tensor or a number, got "):
        trainer.step()
    assert_equal_logits(logits_of(model), before)


def test_forwards_run_under_inference_mode():
    model, seen = a_model(), []

    def watching(module, batch):
        y = module(batch)
        seen.append((torch.is_inference_mode_enabled(), y.is_inference()))
        return y.square().mean()

    a_trainer(model, batches=some_batches(1), loss_fn=watching).run(2, progress=False)
    assert seen == [(True, True)] * 3
    # the logits stay what autograd and a checkpoint can use
    assert not model[0].logits.is_inference() and model[0].logits.requires_grad
    mk.log_prob(model).backward()
    assert model[0].logits.grad.abs().sum() > 0


def test_residual_is_zero_when_no_group_flips():
    model = a_model(gap=60.0)
    before = logits_of(model)
    for record in a_trainer(model).run(4, progress=False):
        assert record.residual == record.advantage == record.tracker == record.flip_rate == 0.0
    assert_equal_logits(logits_of(model), before)


def test_weights_and_biases_never_move():
    model = a_model()
    frozen = {name: t.clone() for name, t in model.state_dict().items() if name.endswith(("weight", "bias"))}
    a_trainer(model).run(3, progress=False)
    assert len(frozen) == 4
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in frozen.items())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": nn.Sequential(nn.Linear(4, 4))}, ValueError, "^model: expected a model with MaskedLinear"),
        ({"loss_fn": None}, TypeError, "^loss_fn: "),
        ({"batches": []}, ValueError, "^batches: expected at least one batch"),
        ({"batches": iter(some_batches())}, TypeError, "^batches: expected a sequence"),
        ({"batches": (b for b in some_batches())}, TypeError, "^batches: expected a sequence"),
        ({"batches": None}, TypeError, "^batches: expected a sequence"),
        ({"estimator": object()}, TypeError, "^estimator: "),
        ({"estimator": mk.Reinforce}, TypeError, "^estimator: "),
        ({"seed": 1 << 63}, ValueError, "^seed: "),
        ({"seed": -(1 << 63) - 1}, ValueError, "^seed: "),
        ({"seed": 1.0}, (TypeError, ValueError), "^seed: "),
        ({"seed": True}, (TypeError, ValueError), "^seed: "),
        ({"seed": None}, (TypeError, ValueError), "^seed: "),
    ],
)
def test_trainer_refuses(arguments, error, message, tmp_path):
    model = a_model()
    mk.advance(model)
    folder = tmp_path / "out"
    with pytest.raises(error, match=message):
        a_trainer(**{"model": model, "output_dir": folder} | arguments)
    assert not folder.exists()
    assert (int(model[0].counter_state.seed), int(model[0].counter_state.step)) == (0, 1)


def test_layers_that_would_draw_the_same_noise_are_refused():
    linear = nn.Linear(8, 8)
    model = nn.Sequential(*(mk.MaskedLinear.from_linear(linear, "2:4") for _ in range(2)))
    with pytest.raises(ValueError, match="^model: expected another layer id in each layer.*got 0 in 0 and 1"):
        a_trainer(model)
    model[1].layer = 1
    a_trainer(model)


@pytest.mark.parametrize("estimator", [mk.Reinforce, mk.StraightThrough])
def test_an_estimator_belongs_to_one_trainer(estimator):
    estimator = estimator()
    with pytest.raises(TypeError, match="^loss_fn"):
        a_trainer(a_model(), estimator=estimator, loss_fn=None)
    a_trainer(a_model(), estimator=estimator)
    with pytest.raises(ValueError, match="^estimator: expected a new one"):
        a_trainer(a_model(), estimator=estimator)


def test_no_step_is_taken_at_a_learning_rate_that_has_fallen_to_nothing():
    model = a_model()
    trainer = a_trainer(model, estimator=mk.StraightThrough(steps=3))
    trainer.run(2, progress=False)
    before = logits_of(model)
    with pytest.raises(ValueError, match="^steps: expected at most 1 more of StraightThrough's 3, got 2"):
        trainer.run(2, progress=False)
    assert_equal_logits(logits_of(model), before)
    trainer.step()
    with pytest.raises(ValueError, match="^steps: expected at most 0 more"):
        trainer.step()
    assert trainer.steps_done == 3


def test_metrics_of_two_trainers_are_not_mixed(tmp_path):
    a_trainer(a_model(), output_dir=tmp_path).step()
    written = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="^output_dir: expected a folder without a run, or resume"):
        a_trainer(a_model(), output_dir=tmp_path).step()
    assert (tmp_path / "metrics.jsonl").read_text() == written


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(value, tmp_path):
    model = a_model()
    with torch.no_grad():
        model[2].logits[1, 2] = value
    with pytest.raises(ValueError, match="^model: expected finite logits.* in 2$"):
        a_trainer(model, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("steps", [0, -1, 1.0, True, None, "3"])
def test_run_refuses_wrong_steps(steps):
    model = a_model()
    before = logits_of(model)
    with pytest.raises((TypeError, ValueError), match="^steps: expected an int of at least 1"):
        a_trainer(model).run(steps)
    assert_equal_logits(logits_of(model), before)


def test_metrics_are_written_a_line_a_step(tmp_path):
    folder = tmp_path / "runs" / "one"
    trainer = a_trainer(a_model(), output_dir=folder)
    records = [*trainer.run(2, progress=False), trainer.step()]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == [vars(record) for record in records]
    assert [line["step"] for line in lines] == [0, 1, 2]


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_trainer(a_model()).run(2, progress=False)
    assert not list(tmp_path.iterdir())


def test_progress_shows_what_the_step_saw(capsys):
    a_trainer(a_model()).run(2)
    shown = capsys.readouterr().err
    for word in ("initial losses", "learning", "loss=", "residual=", "advantage=", "flips=", "tokens_per_s="):
        assert word in shown


@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        (torch.zeros(2, 3), 6),
        ((torch.zeros(2, 3), torch.zeros(9)), 6),
        ({"labels": torch.zeros(9), "input_ids": torch.zeros(2, 3)}, 6),
        ({"x": torch.zeros(2, 3), "y": torch.zeros(9)}, 6),
        ("text", 0),
    ],
    ids=["tensor", "tuple", "input_ids", "first_value", "no_tensor"],
)
def test_tokens_of_a_batch(batch, tokens):
    trainer = a_trainer(a_model(), batches=[batch], loss_fn=lambda model, _: model(torch.ones(16)).sum())
    assert trainer.step().tokens == tokens


@pytest.mark.parametrize("batch", [(), [], {}], ids=["tuple", "list", "mapping"])
def test_an_empty_batch_has_no_tokens(batch):
    trainer = a_trainer(a_model(), batches=[batch], loss_fn=lambda model, _: model(torch.ones(16)).sum())
    assert trainer.step().tokens == 0


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


# Of the six masks of a group of four, by the sum of the weights 1, 2, 4, 8 that they keep
TABLE = {3: 8.0, 5: 3.0, 6: 7.0, 9: 4.0, 10: 1.0, 12: 6.0}


def one_group(seed: int, lr: float, refresh: bool = True) -> tuple[mk.MaskTrainer, nn.Linear]:
    """A trainer of a single group, whose loss stands in ``TABLE`` for each mask, and its layer."""
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
    with pytest.raises(ValueError, match="^batches: expected those of the first step, got others in place of "):
        trainer.step()
