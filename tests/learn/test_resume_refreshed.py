"""A run broken off while its initial masks are refreshed goes on to the bits of a whole one."""

from __future__ import annotations

import pytest
from helpers.bits import assert_same_bits
from helpers.small_trainer import a_trainer_in, logits_of

import maskpro_kernels as mk
from maskpro_kernels.learn import journal, reinforce, run_folder, score_updates, snapshots
from maskpro_kernels.learn.journal import Journal
from maskpro_kernels.learn.model_masks import ModelMasks

pytestmark = pytest.mark.usefixtures("eager_reference")


# Steps of the run "refreshed" whose losses are half of those under the initial masks
HALVED = [4, 16]


def broken_off(trainer: mk.MaskTrainer, where: str, patched: pytest.MonkeyPatch) -> None:
    """Let a run end at some moment between a step of half the loss and the record of the next."""

    def broken(*_, **__):
        raise KeyboardInterrupt

    def behind(real):
        def called(*args):
            real(*args)
            raise KeyboardInterrupt

        return called

    def only(real, when, instead):
        return lambda *args: instead(*args) if when(*args) else real(*args)

    append, save, loss = Journal.append, run_folder.save_snapshot, trainer.loss_fn
    layer = trainer.layers["0"]
    if where == "before its record":
        patched.setattr(Journal, "append", only(append, lambda _, one: one.step == HALVED[0], broken))
    elif where == "before its update":
        patched.setattr(Journal, "append", only(append, lambda _, one: one.step == HALVED[0], behind(append)))
    elif where == "in its update":
        replayed = only(score_updates.replay, lambda *args: args[2].step == HALVED[0], broken)
        patched.setattr(reinforce, "replay", replayed)
    elif where == "in a forward of the new masks":
        last = trainer.batches[-1]
        trainer.loss_fn = only(loss, lambda _, b: trainer.steps_done and not layer.training and b is last, broken)
    elif where == "before the losses are on disk":
        patched.setattr(run_folder, "save_snapshot", only(save, lambda folder, *_: "losses" in folder.name, broken))
    elif where == "behind them":
        losses_alone = only(save, lambda folder, *_: "losses" in folder.name, behind(save))
        patched.setattr(run_folder, "save_snapshot", losses_alone)
    elif where == "in the forward of the next step":
        trainer.loss_fn = only(loss, lambda *_: layer.training and trainer.steps_done == HALVED[0] + 1, broken)
    elif where == "before the next record":
        patched.setattr(Journal, "append", only(append, lambda _, one: one.step == HALVED[0] + 1, broken))


@pytest.mark.parametrize(
    ("where", "steps"),
    [
        ("before its record", 4),
        pytest.param("before its update", 5, marks=pytest.mark.slow),
        ("in its update", 5),
        pytest.param("in a forward of the new masks", 5, marks=pytest.mark.slow),
        ("before the losses are on disk", 5),
        pytest.param("behind them", 5, marks=pytest.mark.slow),
        pytest.param("in the forward of the next step", 5, marks=pytest.mark.slow),
        ("before the next record", 5),
    ],
)
def test_a_run_broken_off_while_its_initial_masks_are_refreshed(tmp_path, where, steps):
    whole = a_trainer_in(tmp_path / "whole", "refreshed")
    records = whole.run(20, progress=False)
    assert [one.step for one in records if one.loss <= (one.loss - one.residual) / 2] == HALVED
    trainer = a_trainer_in(tmp_path / "run", "refreshed")
    with pytest.MonkeyPatch.context() as patched:
        broken_off(trainer, where, patched)
        with pytest.raises(KeyboardInterrupt):
            trainer.run(20, progress=False)
    trainer.close()
    again = a_trainer_in(tmp_path / "run", "refreshed")
    assert again.resume() == steps
    rest = again.run(20 - steps, progress=False)
    assert [(r.loss, r.residual, r.tracker) for r in rest] == [(r.loss, r.residual, r.tracker) for r in records[steps:]]
    assert_same_bits(logits_of(again.model), logits_of(whole.model))
    # the journal alone tells the logits
    header, entries, *_ = journal.read(tmp_path / "run" / "journal")
    replayed = a_trainer_in(None, "refreshed")
    for one in entries:
        score_updates.replay(ModelMasks(replayed.layers), header["run"]["seed"], one)
    assert_same_bits(logits_of(replayed.model), logits_of(whole.model))


def test_losses_under_refreshed_masks_are_read_not_computed(tmp_path):
    trainer = a_trainer_in(tmp_path, "refreshed")
    trainer.run(10, progress=False)
    expected = trainer._initial_losses.losses
    trainer.close()
    again = a_trainer_in(tmp_path, "refreshed")
    assert again.resume() == 10
    again.loss_fn = None
    assert again._losses_of_initial_masks(progress=False) == expected
    again.close()
    (path,) = snapshots.snapshots_in(tmp_path / "initial-losses")
    path.write_bytes(path.read_bytes()[:-1])
    damaged = a_trainer_in(tmp_path, "refreshed")
    before = logits_of(damaged.model)
    with pytest.raises(ValueError, match="^output_dir: expected the initial losses from step 5 on in .*, got none or"):
        damaged.resume()
    assert_same_bits(logits_of(damaged.model), before)


@pytest.mark.parametrize("damage", ["record", "losses"])
def test_what_a_refresh_left_is_not_trusted(tmp_path, damage):
    """The last record may be damaged where the losses that it asked for are there already, and they themselves."""
    whole = a_trainer_in(tmp_path / "whole", "refreshed")
    whole.run(20, progress=False)
    trainer = a_trainer_in(tmp_path / "run", "refreshed")
    trainer.run(HALVED[1] + 1, progress=False)
    trainer._losses_of_initial_masks(progress=False)
    trainer.close()
    first, second = snapshots.snapshots_in(tmp_path / "run" / "initial-losses")
    assert [snapshots.step_of(path) for path in (first, second)] == [step + 1 for step in HALVED]
    if damage == "record":
        path = tmp_path / "run" / "journal"
        path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    else:
        second.write_bytes(b"")
    again = a_trainer_in(tmp_path / "run", "refreshed")
    if damage == "record":
        with pytest.warns(UserWarning, match="taken again"):
            assert again.resume() == HALVED[1]
    else:
        assert again.resume() == HALVED[1] + 1
    again.run(20 - again.steps_done, progress=False)
    assert_same_bits(logits_of(again.model), logits_of(whole.model))


def test_the_losses_before_the_last_refresh_are_kept(tmp_path):
    def a_run(folder):
        trainer = a_trainer_in(folder, "refreshed")
        real = trainer.loss_fn
        # less than half of what it was at the step before: every other step has a refresh behind it
        trainer.loss_fn = lambda model, batch: real(model, batch) * 0.1**trainer.steps_done
        return trainer

    whole = a_run(tmp_path / "whole")
    whole.run(9, progress=False)
    trainer = a_run(tmp_path / "run")
    trainer.run(6, progress=False)
    trainer._losses_of_initial_masks(progress=False)
    trainer.close()
    path = tmp_path / "run" / "journal"
    path.write_bytes(path.read_bytes()[:-1])
    again = a_run(tmp_path / "run")
    with pytest.warns(UserWarning, match="taken again"):
        assert again.resume() == 5
    again.run(4, progress=False)
    kept = snapshots.snapshots_in(tmp_path / "whole" / "initial-losses")
    assert [snapshots.step_of(one) for one in kept] == [2, 6, 8]
    assert_same_bits(logits_of(again.model), logits_of(whole.model))
