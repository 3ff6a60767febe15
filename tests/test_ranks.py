"""Several processes that learn one mask have the bits of one process."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from helpers.bits import assert_same_bits
from helpers.in_ranks import all_in_ranks
from helpers.rank_jobs import learn_on_rank, rank_trainer
from helpers.small_trainer import a_model, logits_of

from maskpro_kernels.learn import run


@pytest.mark.parametrize(
    "how",
    ["reinforce", "two draws", pytest.param("normalized", marks=pytest.mark.slow)],
)
def test_ranks_have_the_bits_of_one_process(how, tmp_path, eager_reference):
    steps = {"how": how, "steps": 3, "accumulate": 4}
    logits, records = learn_on_rank(0, folder=tmp_path / "1", **steps)
    assert records[-1]["loss"] != records[0]["loss"] and not torch.equal(logits[0], logits_of(a_model())[0])
    for world in (2, 4):
        for theirs, seen in all_in_ranks(world, learn_on_rank, folder=tmp_path / str(world), **steps):
            assert_same_bits(theirs, logits)
            assert seen == records
        assert told_by_journal(tmp_path / str(world)) == told_by_journal(tmp_path / "1")
        lines = [(tmp_path / str(number) / "metrics.jsonl").read_bytes().count(b"\n") for number in (1, world)]
        assert lines == [3, 3]


def told_by_journal(folder):
    """(header, entries), without the id, which each run has of its own."""
    found = run.read_journal(folder / "journal")
    del found.header["run"]["id"]
    return found.header, found.entries


def learn_across_a_refresh(rank: int, folder, **arguments):
    """(logits, residuals, how many forwards under initial masks) of a run that is broken off between two steps.

    The losses of step 0 are half of those under the initial masks, and so are those of step 13.
    """
    seen = []

    def loss_fn(model, batch):
        if not model[0].training:
            seen.append(batch)
        return model(batch).square().mean()

    residuals = []
    for steps in (1, 16):
        trainer = rank_trainer("refreshed", loss_fn=loss_fn, seed=1, output_dir=folder, **arguments)
        if steps > 1:
            trainer.resume()
        residuals += [one.residual for one in trainer.run(steps - trainer.steps_done, progress=False)]
        trainer.close()
    return logits_of(trainer.model), residuals, len(seen)


def test_ranks_refresh_initial_masks_together(tmp_path, eager_reference):
    logits, residuals, forwards = learn_across_a_refresh(0, tmp_path / "1", accumulate=2)
    assert forwards == 3 * 5
    results = all_in_ranks(2, learn_across_a_refresh, folder=tmp_path / "2", accumulate=2)
    for theirs, seen, _ in results:
        assert_same_bits(theirs, logits)
        assert seen == residuals
    # each batch on one of them
    assert sum(count for _, _, count in results) == forwards and max(count for _, _, count in results) < forwards
    assert told_by_journal(tmp_path / "1") == told_by_journal(tmp_path / "2")


def count_bytes(rank: int):
    """(bytes of all tensors that a step gives to collectives, those counted)."""
    given = []

    def counting(collective, at):
        def counted(*args, **kwargs):
            given.append(args[at].nbytes)
            return collective(*args, **kwargs)

        return counted

    trainer = rank_trainer(accumulate=64)
    trainer.begin()
    for name, at in {"all_gather": 1, "all_reduce": 0, "broadcast": 0, "all_gather_into_tensor": 1}.items():
        setattr(dist, name, counting(getattr(dist, name), at))
    before = trainer.ranks.bytes_sent
    trainer.step()
    return sum(given), trainer.ranks.bytes_sent - before


def test_a_step_moves_numbers_alone():
    for given, counted in all_in_ranks(2, count_bytes):
        assert 0 < given == counted < 1024


def spoil(rank: int, folder, how: str):
    """Steps whose loss is not finite on rank 1 in step 2."""
    trainers = []

    def loss_fn(model, batch):
        bad = rank == 1 and trainers and trainers[0].steps_done == 2
        return model(batch).square().mean() * (math.inf if bad else 1.0)

    trainers.append(rank_trainer(how, loss_fn=loss_fn, output_dir=folder, max_skipped=1, accumulate=2))
    records = trainers[0].run(4, progress=False)
    return [record.loss for record in records], logits_of(trainers[0].model)


@pytest.mark.parametrize("how", ["reinforce", "straight-through"])
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all(how, tmp_path):
    (losses, logits), (others, theirs) = all_in_ranks(2, spoil, folder=tmp_path, how=how)
    assert [math.isfinite(loss) for loss in losses] == [math.isfinite(loss) for loss in others]
    assert [math.isfinite(loss) for loss in losses] == [True, True, False, True]
    if how != "straight-through":
        assert [entry.skipped for entry in run.read_journal(tmp_path / "journal")[1]] == [False, False, True, False]
    assert_same_bits(logits, theirs)
