"""The loop of steps around an estimator: what it sees, counts, restores, writes and refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.small_trainer import a_model, a_trainer, a_trainer_in, logits_of, loss_fn, some_batches
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.learn import model_masks

pytestmark = pytest.mark.usefixtures("eager_reference")


def test_same_seed_same_bits_another_seed_not():
    runs = []
    for seed in (5, 5, 6):
        model = a_model()
        losses = [record.loss for record in a_trainer(model, seed).run(4, progress=False)]
        runs.append((losses, logits_of(model)))
    assert runs[0][0] == runs[1][0]
    assert_same_bits(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]
    assert not any(torch.equal(a, b) for a, b in zip(runs[0][1], runs[2][1], strict=True))


def test_initial_losses_come_once_a_batch_before_the_logits_move():
    model, batches = a_model(), some_batches(3)
    start, initial, drawn = logits_of(model), [], []

    def recording(module, batch):
        index = next(i for i, b in enumerate(batches) if b is batch)
        if module[0].training:
            drawn.append(index)
        else:
            initial.append(index)
            assert_same_bits(logits_of(module), start)
        return loss_fn(module, batch)

    trainer = a_trainer(model, batches=batches, loss_fn=recording)
    records = trainer.run(4, progress=False)
    records.append(trainer.step())
    assert initial == [0, 1, 2]
    assert drawn == [0, 1, 2, 0, 1]
    # with the bits of a forward under the initial masks in each step
    fresh = [float(loss_fn(a_model().eval(), batch)) for batch in batches]
    assert [record.residual for record in records] == [record.loss - fresh[record.step % 3] for record in records]


def test_steps_alone_and_in_a_run_are_the_same():
    one, other = a_model(), a_model()
    trainer = a_trainer(one)
    stepped = [trainer.step() for _ in range(4)]
    ran = a_trainer(other).run(4, progress=False)
    assert [(r.step, r.loss, r.advantage) for r in stepped] == [(r.step, r.loss, r.advantage) for r in ran]
    assert_same_bits(logits_of(one), logits_of(other))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_initial_loss_that_is_not_finite_names_the_batch(value):
    model, batches = a_model(), some_batches(3)
    before = logits_of(model)
    trainer = a_trainer(model, batches=batches, loss_fn=lambda m, b: loss_fn(m, b) + (value if b is batches[1] else 0))
    with pytest.raises(
        FloatingPointError, match=r"initial masks: expected finite numbers, got others of batches \[1\]"
    ):
        trainer.step()
    assert_same_bits(logits_of(model), before)


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
    assert_same_bits(logits_of(model), before)


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


def test_weights_and_biases_never_move():
    model = a_model()
    frozen = {name: t.clone() for name, t in model.state_dict().items() if name.endswith(("weight", "bias"))}
    a_trainer(model).run(3, progress=False)
    assert len(frozen) == 4
    assert_same_bits({name: model.state_dict()[name] for name in frozen}, frozen)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": nn.Sequential(nn.Linear(4, 4))}, ValueError, "^model: expected a model with MaskedLinear"),
        ({"loss_fn": None}, TypeError, "^loss_fn: "),
        ({"batches": []}, ValueError, "^batches: expected at least one batch"),
        ({"batches": iter(some_batches())}, ValueError, r"^estimator: .* as Reinforce\(steps=1000\), .* steps=None"),
        ({"batches": iter([]), "estimator": mk.Reinforce(steps=2)}, ValueError, "^batches: expected at least one"),
        ({"batches": None}, TypeError, "^batches: expected an iterable of batches"),
        ({"batches": some_batches()[0]}, TypeError, "^batches: expected an iterable of batches"),
        ({"batches": {"input_ids": some_batches()}}, TypeError, "^batches: expected an iterable of batches"),
        ({"estimator": mk.Reinforce}, TypeError, "^estimator: "),
        ({"seed": 1 << 63}, ValueError, "^seed: "),
        ({"timeout": "1"}, TypeError, "^timeout: expected a float"),
        ({"timeout": 0}, ValueError, "^timeout: expected a float above 0"),
        ({"accumulate": 0}, ValueError, "^accumulate: expected an int of at least 1"),
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
    assert_same_bits(logits_of(model), before)
    trainer.step()
    with pytest.raises(ValueError, match="^steps: expected at most 0 more"):
        trainer.step()
    assert trainer.steps_done == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(value, tmp_path):
    model = a_model()
    with torch.no_grad():
        model[2].logits[1, 2] = value
    with pytest.raises(ValueError, match="^model: expected finite logits.* in 2$"):
        a_trainer(model, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("steps", [0, 1.0, True])
def test_run_refuses_wrong_steps(steps):
    error = ValueError if type(steps) is int else TypeError
    model = a_model()
    before = logits_of(model)
    with pytest.raises(error, match="^steps: expected an int of at least 1"):
        a_trainer(model).run(steps)
    assert_same_bits(logits_of(model), before)


def test_metrics_are_written_a_line_a_step(tmp_path):
    folder = tmp_path / "runs" / "one"
    trainer = a_trainer(a_model(), output_dir=folder)
    records = [*trainer.run(2, progress=False), trainer.step()]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in row if name != "digest"} for row in lines] == list(map(vars, records))
    assert trainer.metrics == list(map(vars, records))
    assert [line["step"] for line in lines] == [0, 1, 2]


def flip_probability(gap: float, n: int = 2, m: int = 4) -> float:
    """Probability that the first ``n`` draws are not the kept weights."""
    kept, dropped = math.exp(gap), m - n
    return 1 - math.prod((n - k) * kept / ((n - k) * kept + dropped) for k in range(n))


@pytest.mark.parametrize("gap", [1.0, 5.0, 10.0])
def test_it_reports_what_a_draw_flips_on_average_and_warns_below_one_group(gap, caplog, recwarn):
    caplog.set_level("INFO", "maskpro_kernels")
    model = a_model(gap)
    groups = sum(logits.numel() for logits in logits_of(model)) // 4
    trainer = a_trainer(model)
    expected = groups * flip_probability(gap)
    assert trainer.masks.expected_flips() == pytest.approx(expected, rel=1e-5)
    trainer.begin()
    warned = [str(warning.message) for warning in recwarn]
    if expected < 1:
        (line,) = warned
        assert "from which Reinforce learns nothing; convert with a smaller gap, such as that of a flip_rate" in line
    else:
        (line,) = [record.message for record in caplog.records]
        assert not warned and f"a share of {expected / groups:.2g}" in line
    assert f"of {groups} groups on average" in line
    # gradients reach the logits whether or not a draw flips
    recwarn.clear()
    a_trainer(a_model(gap), how="straight-through").begin()
    assert not list(recwarn)


@pytest.mark.parametrize("make", [lambda: mk.Reinforce(lr=500.0, alpha=0.75), mk.StraightThrough])
def test_it_counts_the_groups_that_moved_also_after_a_resume(tmp_path, make, capsys):
    trainer = a_trainer_in(tmp_path, estimator=make())
    before = [mk.top_n_mask(logits, "2:4") for logits in logits_of(trainer.model)]
    assert trainer.moved() is None
    trainer.run(6)
    trainer.close()
    after = [mk.top_n_mask(logits, "2:4") for logits in logits_of(trainer.model)]
    moved = sum(int((one != other).sum()) for one, other in zip(before, after, strict=True))
    assert trainer.moved() == moved > 0
    assert "a draw changes" in capsys.readouterr().err
    again = a_trainer_in(tmp_path, estimator=make())
    again.resume()
    assert again.moved() == moved
    again.close()
    first = next(tmp_path.glob("snapshot-0000000000-*"))
    first.write_bytes(first.read_bytes()[:-1])
    again = a_trainer_in(tmp_path, estimator=make())
    again.resume()
    assert again.moved() is None


@pytest.mark.parametrize("pattern", ["8:16", "4:16", "7:8"])
def test_flips_are_estimated_by_few_groups_where_a_probability_takes_long(pattern, monkeypatch):
    computed = []
    compute = model_masks.mask_log_prob
    monkeypatch.setattr(
        model_masks, "mask_log_prob", lambda logits, *rest: computed.append(len(logits)) or compute(logits, *rest)
    )
    model = nn.Linear(64, 512)
    model = nn.Sequential(model)
    mk.convert(model, pattern, gap=6.0)
    n, m = map(int, pattern.split(":"))
    groups = 64 * 512 // m
    found = model_masks.ModelMasks(model).expected_flips()
    assert sum(computed) < 2 * model_masks.SAMPLED_GROUPS
    assert found == pytest.approx(groups * flip_probability(6.0, n, m), rel=1e-3)


def test_progress_shows_what_the_step_saw(capsys):
    a_trainer(a_model()).run(2)
    shown = capsys.readouterr().err
    for word in ("initial losses", "learning", "loss=", "residual=", "advantage=", "flips=", "tokens_per_s="):
        assert word in shown
