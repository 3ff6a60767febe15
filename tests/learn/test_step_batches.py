"""Batches that are no sequence: DataLoaders, generators; which of them a step takes, and how a run continues."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.small_trainer import a_trainer, a_trainer_in, logits_of, loss_fn, some_batches
from torch.utils.data import DataLoader, IterableDataset

import maskpro_kernels as mk

pytestmark = pytest.mark.usefixtures("eager_reference")

STRAIGHT = "straight-through"


class Endless(IterableDataset):
    """Rows without an end and without a length, the same each time."""

    def __init__(self, seed: int = 5):
        self.seed = seed

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield torch.randn(16, generator=generator)


def endless(seed: int = 5) -> DataLoader:
    return DataLoader(Endless(seed), batch_size=5)


def watched(batches, seen):
    """A loss that notes the batches it is asked for."""

    def loss(model, batch):
        seen.append(batch)
        return loss_fn(model, batch)

    return loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loader_gives_what_a_list_of_its_batches_gives(accumulate):
    batches = list(itertools.islice(endless(), 6 * accumulate))
    expected = a_trainer(how=STRAIGHT, batches=batches, accumulate=accumulate)
    trainer = a_trainer(how=STRAIGHT, batches=endless(), accumulate=accumulate)
    assert expected.run(6, progress=False)[-1].loss == trainer.run(6, progress=False)[-1].loss
    assert_same_bits(logits_of(trainer.model), logits_of(expected.model))


def test_batches_are_taken_when_their_step_comes():
    taken = []

    def batches():
        for batch in some_batches(9):
            taken.append(batch)
            yield batch

    trainer = a_trainer(how=STRAIGHT, batches=batches())
    assert not taken
    trainer.run(3, progress=False)
    assert len(taken) == 3
    trainer.run(6, progress=False)
    before = logits_of(trainer.model)
    for _ in range(2):
        with pytest.raises(ValueError, match="^batches: .* an iterator that ended after 9; pass an"):
            trainer.step()
    # such a step has changed nothing, and is no broken one
    assert trainer.steps_done == 9 and not trainer.broken
    assert_same_bits(logits_of(trainer.model), before)


def test_iterables_that_can_start_again_do():
    loader = DataLoader(torch.cat(some_batches(3)), batch_size=5)
    seen = []
    a_trainer(how=STRAIGHT, batches=loader, loss_fn=watched(loader, seen)).run(7, progress=False)
    assert_same_bits(seen, [some_batches(3)[index % 3] for index in range(7)])
    empty = DataLoader(Endless(), batch_size=5)
    empty = type("Empty", (), {"__iter__": lambda self: iter(())})()
    with pytest.raises(ValueError, match="^batches: expected at least one batch, got none"):
        a_trainer(how=STRAIGHT, batches=empty).step()


def test_a_step_that_fails_takes_its_batches_again():
    seen, failing = [], [True]

    def loss(model, batch):
        seen.append(batch)
        if failing.pop() if failing else False:
            raise RuntimeError("no")
        return loss_fn(model, batch)

    trainer = a_trainer(how=STRAIGHT, batches=endless(), loss_fn=loss)
    with pytest.raises(RuntimeError, match="no"):
        trainer.step()
    trainer.step()
    assert_same_bits(seen[0], seen[1])


@pytest.mark.parametrize("options", [{}, {"refresh": True}, {"draws": 3}])
def test_reinforce_takes_the_batches_of_all_steps_beforehand(options):
    batches = list(itertools.islice(endless(), 8))
    expected = a_trainer(batches=batches, estimator=mk.Reinforce(lr=2.0, **options), accumulate=2)
    trainer = a_trainer(batches=endless(), estimator=mk.Reinforce(lr=2.0, steps=4, **options), accumulate=2)
    expected.run(4, progress=False)
    trainer.run(4, progress=False)
    assert_same_bits(logits_of(trainer.model), logits_of(expected.model))
    with pytest.raises(ValueError, match="steps: expected at most 0 more of Reinforce's 4, got 1"):
        trainer.step()
    for steps, error in ((0, ValueError), (1.0, TypeError)):
        with pytest.raises(error, match="^steps: "):
            mk.Reinforce(steps=steps)


@pytest.mark.parametrize("estimator", [lambda: mk.StraightThrough(lr=0.3), lambda: mk.Reinforce(lr=2.0, steps=9)])
@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_resumed_run_sees_the_batches_of_a_whole_one(tmp_path, estimator, accumulate):
    def trainer_in(name, seen):
        loss = watched(None, seen)
        return a_trainer_in(
            tmp_path / name, batches=endless(), estimator=estimator(), accumulate=accumulate, loss_fn=loss
        )

    all_seen, seen = [], []
    whole = trainer_in("whole", all_seen)
    whole.run(9, progress=False)
    first = trainer_in("run", seen)
    first.run(4, progress=False)
    first.close()
    second = trainer_in("run", seen)
    assert second.resume() == 4
    second.run(5, progress=False)
    assert_same_bits(logits_of(second.model), logits_of(whole.model))
    if "Straight" in type(second.estimator).__name__:
        assert_same_bits(seen, all_seen)


def test_a_snapshot_after_a_failed_step_has_the_batches_of_the_steps_that_are_done(tmp_path):
    failing = []

    def loss(model, batch):
        if failing:
            raise RuntimeError("no")
        return loss_fn(model, batch)

    first = a_trainer_in(tmp_path, STRAIGHT, batches=endless(), loss_fn=loss)
    first.run(2, progress=False)
    failing.append(True)
    with pytest.raises(RuntimeError, match="no"):
        first.run(2, progress=False)
    first.close()
    failing.clear()
    assert a_trainer_in(tmp_path, STRAIGHT, batches=endless(), loss_fn=loss).resume() == 2


OTHERS = {
    "another seed": (lambda: endless(6), "expected those of the run's first 3 steps, .* got others; pass an"),
    "one that has ended": (lambda: iter(some_batches(2)), "an iterator that ended after 2"),
    "none": (lambda: iter([]), "an iterator that ended after 0"),
    "a sequence": (lambda: list(itertools.islice(endless(), 3)), "expected a run with batches of this trainer"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_batches_are_refused_and_nothing_changes(tmp_path, name):
    others, message = OTHERS[name]
    first = a_trainer_in(tmp_path, STRAIGHT, batches=endless())
    first.run(3, progress=False)
    first.close()
    (tmp_path / f"journal.{1:016x}.tmp").write_bytes(b"half")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    second = a_trainer_in(tmp_path, STRAIGHT, batches=others())
    logits = logits_of(second.model)
    with pytest.raises(ValueError, match=message):
        second.resume()
    assert_same_bits(logits_of(second.model), logits)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    # whoever gives those of the run continues
    assert a_trainer_in(tmp_path, STRAIGHT, batches=endless()).resume() == 3
