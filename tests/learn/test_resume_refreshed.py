"""A run interrupted while its initial masks are refreshed ends with the bits of a whole one."""

from __future__ import annotations

import pytest
from helpers.bits import assert_same_bits
from helpers.small_trainer import a_trainer_in, logits_of

import maskpro_kernels as mk
from maskpro_kernels.learn import estimator, reinforce, run
from maskpro_kernels.learn.journal import Journal

pytestmark = pytest.mark.usefixtures("eager_reference")

# Steps of the run "refreshed" whose losses are half of those under the initial masks
HALVED = [4, 16]


def interrupted(trainer: mk.MaskTrainer, where: str, patched: pytest.MonkeyPatch) -> None:
    """Let a run end at some moment between a step of half the loss and the record of the next."""

    def broken(*_, **__):
        raise KeyboardInterrupt

    def after(real):
        def called(*args):
            real(*args)
            raise KeyboardInterrupt

        return called

    def only(real, when, instead):
        return lambda *args: instead(*args) if when(*args) else real(*args)

    append, loss = Journal.append, trainer.loss_fn
    layer = trainer.layers["0"]
    if where == "before its record":
        patched.setattr(Journal, "append", only(append, lambda _, one: one.step == HALVED[0], broken))
    elif where == "before its update":
        patched.setattr(Journal, "append", only(append, lambda _, one: one.step == HALVED[0], after(append)))
    elif where == "in its update":
        patched.setattr(reinforce, "replay", only(estimator.replay, lambda *args: args[2].step == HALVED[0], broken))
    elif where == "in a forward of the new masks":
        last = trainer.batches[-1]
        trainer.loss_fn = only(loss, lambda _, b: trainer.steps_done and not layer.training and b is last, broken)
    elif where == "in the forward of the next step":
        trainer.loss_fn = only(loss, lambda *_: layer.training and trainer.steps_done == HALVED[0] + 1, broken)
    elif where == "before the next record":
        patched.setattr(Journal, "append", only(append, lambda _, one: one.step == HALVED[0] + 1, broken))
    elif where == "steps later":
        patched.setattr(Journal, "append", only(append, lambda _, one: one.step == HALVED[0] + 4, broken))


@pytest.mark.parametrize("minutes", [10.0, 0.0], ids=["from the first snapshot", "from the last snapshot"])
@pytest.mark.parametrize(
    ("where", "steps"),
    [
        pytest.param("before its record", 4, marks=pytest.mark.slow),
        pytest.param("before its update", 5, marks=pytest.mark.slow),
        ("in its update", 5),
        pytest.param("in a forward of the new masks", 5, marks=pytest.mark.slow),
        pytest.param("in the forward of the next step", 5, marks=pytest.mark.slow),
        pytest.param("before the next record", 5, marks=pytest.mark.slow),
        ("steps later", 8),
    ],
)
def test_a_run_interrupted_while_its_initial_masks_are_refreshed(tmp_path, where, steps, minutes):
    whole = a_trainer_in(tmp_path / "whole", "refreshed")
    records = whole.run(20, progress=False)
    assert [one.step for one in records if one.loss <= (one.loss - one.residual) / 2] == HALVED
    trainer = a_trainer_in(tmp_path / "run", "refreshed", snapshot_minutes=minutes)
    with pytest.MonkeyPatch.context() as patched:
        interrupted(trainer, where, patched)
        with pytest.raises(KeyboardInterrupt):
            trainer.run(20, progress=False)
    trainer.close()
    again = a_trainer_in(tmp_path / "run", "refreshed")
    assert again.resume() == steps
    rest = again.run(20 - steps, progress=False)
    assert [(r.loss, r.residual, r.tracker) for r in rest] == [(r.loss, r.residual, r.tracker) for r in records[steps:]]
    assert_same_bits(logits_of(again.model), logits_of(whole.model))
    again.close()
    # the journal alone determines the logits
    replayed = run.replay_run(tmp_path / "run")
    assert_same_bits([replayed[name] for name in again.layers], logits_of(whole.model))


def test_losses_under_refreshed_masks_are_read_where_a_snapshot_holds_them(tmp_path):
    trainer = a_trainer_in(tmp_path, "refreshed")
    trainer.run(10, progress=False)
    expected = trainer._initial_losses.losses
    trainer.close()
    again = a_trainer_in(tmp_path, "refreshed")
    again.loss_fn = None
    assert again.resume() == 10
    assert again._losses_of_initial_masks(progress=False) == expected
