"""Several processes that learn one mask: they have the bits of one, and an error of one of them ends all."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.bits import assert_same_bits
from helpers.children import environment
from helpers.in_ranks import LONGEST, Ended, all_in_ranks, in_ranks
from helpers.rank_jobs import learn_on_rank, rank_trainer
from helpers.small_trainer import a_model, logits_of, loss_fn, some_batches, uneven_batches
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels import ranks
from maskpro_kernels.files import digest
from maskpro_kernels.learn import journal


@pytest.mark.parametrize("how", ["two draws", pytest.param("normalized", marks=pytest.mark.slow)])
def test_ranks_have_the_bits_of_one_process(how, tmp_path, eager_reference):
    steps = {"how": how, "steps": 3, "accumulate": 4}
    logits, records = learn_on_rank(0, folder=tmp_path / "1", **steps)
    assert records[-1]["loss"] != records[0]["loss"] and not torch.equal(logits[0], logits_of(a_model())[0])
    for world in (2, 4):
        for theirs, seen in all_in_ranks(world, learn_on_rank, folder=tmp_path / str(world), **steps):
            assert_same_bits(theirs, logits)
            assert seen == records
        assert in_journal(tmp_path / str(world)) == in_journal(tmp_path / "1")
        assert (tmp_path / str(world) / "metrics.jsonl").read_bytes().count(b"\n") == 3


def in_journal(folder: Path):
    """(header, entries), without the id, which each run has of its own."""
    found = journal.read_journal(folder / "journal")
    del found.header["run"]["id"]
    return found.header, found.entries


def learn_across_a_refresh(rank: int, folder: Path):
    """(logits, residuals, how many forwards under initial masks) of a run that is interrupted between two steps."""
    seen, residuals = [], []

    def loss_fn(model, batch):
        if not model[0].training:
            seen.append(batch)
        return model(batch).square().mean()

    for steps in (1, 16):
        trainer = rank_trainer("refreshed", loss_fn=loss_fn, seed=1, output_dir=folder, accumulate=2)
        if steps > 1:
            trainer.resume()
        residuals += [one.residual for one in trainer.run(steps - trainer.steps_done, progress=False)]
        trainer.close()
    return logits_of(trainer.model), residuals, len(seen)


def test_ranks_refresh_initial_masks_together(tmp_path, eager_reference):
    logits, residuals, forwards = learn_across_a_refresh(0, tmp_path / "1")
    # the losses of steps 0 and 13 are half of those under the initial masks
    assert forwards == 3 * 5
    results = all_in_ranks(2, learn_across_a_refresh, folder=tmp_path / "2")
    for theirs, seen, _ in results:
        assert_same_bits(theirs, logits)
        assert seen == residuals
    # each batch on one of them
    assert sum(count for _, _, count in results) == forwards and max(count for _, _, count in results) < forwards
    assert in_journal(tmp_path / "1") == in_journal(tmp_path / "2")


def count_bytes(rank: int) -> tuple[int, int]:
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


def test_a_step_of_reinforce_moves_numbers_alone():
    for given, counted in all_in_ranks(2, count_bytes):
        assert 0 < given == counted < 1024


def break_rank(rank: int, folder: Path, how: str):
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
    (losses, logits), (others, theirs) = all_in_ranks(2, break_rank, folder=tmp_path, how=how)
    assert [math.isfinite(loss) for loss in losses] == [math.isfinite(loss) for loss in others]
    assert [math.isfinite(loss) for loss in losses] == [True, True, False, True]
    assert_same_bits(logits, theirs)


def differ(rank: int, folder: Path) -> dict[str, str]:
    """Messages of the trainers of ranks that differ in one thing each."""
    heavier, other, biased = a_model(), a_model(), a_model()
    heavier[0].weight.data[0, 0] += rank
    other[0].logits.data[0, 0] += rank
    biased[2].bias.data[3] += rank
    sparse = a_model()
    sparse.register_buffer("graph", (torch.eye(4) * (1 + rank)).to_sparse())
    wider = nn.Sequential(nn.Linear(16, 8 + 4 * rank), nn.Linear(8 + 4 * rank, 4))
    mk.convert(wider, "2:4", gap=2.0)
    trainers = {
        "weights, seed": rank_trainer(model=biased, seed=rank, accumulate=2),
        "weights, loss_fn": rank_trainer(model=sparse, loss_fn=(lambda *_: None) if rank else loss_fn, accumulate=2),
        "seed": rank_trainer(seed=rank, accumulate=2),
        "batches": rank_trainer(batches=[*uneven_batches(), *some_batches(rank)], accumulate=2),
        "weights": rank_trainer(model=heavier, accumulate=2),
        "logits": rank_trainer(model=other, accumulate=2),
        "accumulate": rank_trainer(accumulate=2 + 2 * rank),
        "settings": rank_trainer("two draws" if rank else "reinforce", accumulate=2),
        # with a folder: nothing is written there
        "layers, weights": rank_trainer(model=wider, accumulate=2, output_dir=folder),
    }
    found = {}
    for name, trainer in trainers.items():
        with pytest.raises(ValueError) as caught:
            trainer.begin()
        found[name] = str(caught.value)
    with pytest.raises(ValueError) as caught:
        rank_trainer(accumulate=3)
    assert str(caught.value) == "accumulate: expected a multiple of the 2 ranks, got 3"
    return found


def test_ranks_that_differ_are_named_on_all(tmp_path):
    one, other = all_in_ranks(2, differ, folder=tmp_path / "run")
    assert one == other
    for name, message in one.items():
        begin, end = "ranks: expected the settings of rank 0 on all of them, got other ", " on rank 1"
        assert message.startswith(begin) and message.endswith(end)
        found = message.removeprefix(begin).removesuffix(end).split(", ")
        assert set(name.split(", ")) <= set(found) <= {*name.split(", "), "logits", "weights"}
    assert not (tmp_path / "run").exists()


def stop_on_one(rank: int):
    trainer = rank_trainer(accumulate=3, timeout=1.0)

    def after(record):
        # the others wait longer for what rank 0 does here than in a step
        time.sleep(2.0 if rank == 0 and record.step == 1 else 0.0)
        return rank == 1 and record.step == 2

    records = trainer.run(9, progress=False, after_step=after)
    return len(records), logits_of(trainer.model)


def test_all_ranks_stop_where_one_does():
    results = all_in_ranks(3, stop_on_one)
    assert [steps for steps, _ in results] == [3, 3, 3]
    assert_same_bits(results[0][1], results[2][1])


def learn_apart(rank: int, folder: Path, resume: bool):
    """Of each rank its own folder: that of rank 0 alone is used."""
    model = a_model()
    if rank and resume:
        # a run's logits come from its folder
        model[0].logits.data.add_(1.0)
    trainer = rank_trainer("reinforce", model=model, output_dir=folder / str(rank), accumulate=2)
    if resume:
        trainer.resume()
    else:
        with pytest.raises(ValueError, match="^output_dir: expected a folder with a journal, got .*/0'"):
            trainer.resume()
    trainer.run(2, progress=False)
    trainer.close()
    with pytest.raises(RuntimeError):
        trainer.step()
    return logits_of(model)


def test_rank_0_alone_reads_and_writes(tmp_path, eager_reference):
    all_in_ranks(2, learn_apart, folder=tmp_path, resume=False)
    logits, others = all_in_ranks(2, learn_apart, folder=tmp_path, resume=True)
    assert not (tmp_path / "1").exists()
    whole, _ = learn_on_rank(0, "reinforce", 4, accumulate=2)
    assert_same_bits(logits, whole)
    assert_same_bits(others, whole)
    # the folder holds a run by now
    for error in in_ranks(2, learn_on_rank, how="reinforce", steps=2, folder=tmp_path / "0", accumulate=2):
        assert str(error).startswith("output_dir: expected a folder without a run, got ")


def raise_on(raising: Sequence[int], kind: type[Exception], rank: int, first: bool) -> tuple[str, str] | int:
    """(kind, message) of what each rank gets of a call that raises on some, or what the call gives."""
    together = ranks.Ranks()
    together.connect()

    def call() -> int:
        if rank in raising:
            raise kind(f"of {rank}")
        return 10 + rank

    try:
        return together.run_on_main(call) if first else together.run_on_all(call)
    except Exception as error:
        return type(error).__name__, str(error)


def raised(rank: int) -> list:
    """Of a call on rank 0, then on all ranks."""
    of_first = [((), OSError), ((0,), ValueError), ((0,), OSError)]
    of_all = [((), OSError), ((1,), ValueError), ((1, 2), OSError)]
    return [[raise_on(*how, rank, True) for how in of_first], [raise_on(*how, rank, False) for how in of_all]]


def test_what_is_raised_on_one_rank_is_raised_on_all():
    for rank, (first, all_of) in enumerate(all_in_ranks(3, raised)):
        assert first == [
            10,
            ("ValueError", "of 0"),
            ("OSError", "of 0") if rank == 0 else ("FailedRank", "rank 0: OSError: of 0"),
        ]
        assert all_of == [
            10 + rank,
            ("ValueError", "of 1" if rank == 1 else "rank 1: of 1"),
            ("OSError", f"of {rank}") if rank else ("FailedRank", "rank 1: OSError: of 1"),
        ]


def drift(rank: int) -> None:
    trainer = rank_trainer(accumulate=2)
    trainer.begin()
    for layer in trainer.layers.values():
        layer.logits.data.mul_(1.0 if rank else 8.0)
    with pytest.raises(
        RuntimeError, match="^ranks: expected the flip rate of rank 0 on all of them, 0, got by rank {1"
    ):
        trainer.step()


def test_logits_that_drift_apart_end_the_run():
    all_in_ranks(2, drift)


def learn_until_killed(rank: int, victim: int, folder: Path) -> None:
    trainers: list = []

    def loss_fn(model, batch):
        if rank == victim and trainers and trainers[0].steps_done == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return model(batch).square().mean()

    trainers.append(rank_trainer(loss_fn=loss_fn, output_dir=folder, accumulate=4))
    trainers[0].run(4, progress=False)


@pytest.mark.parametrize(("victim", "resumed"), [(0, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_the_others_end_where_a_rank_is_killed_and_the_run_continues(victim, resumed, tmp_path, eager_reference):
    logits, _ = learn_on_rank(0, "reinforce", 4, accumulate=4)
    results = in_ranks(2, learn_until_killed, victim=victim, folder=tmp_path)
    assert isinstance(results.pop(victim), Ended)
    assert all(isinstance(error, RuntimeError) for error in results)
    assert len(journal.read_journal(tmp_path / "journal")[1]) == 2
    for theirs, records in all_in_ranks(
        resumed, learn_on_rank, how="reinforce", steps=4, folder=tmp_path, resume=True, accumulate=4
    ):
        assert [record["step"] for record in records] == [2, 3]
        assert_same_bits(theirs, logits)


def come_late(rank: int) -> list[list[float]]:
    """Rank 1 loads its model for longer than an exchange may take."""
    time.sleep(2.5 * rank)
    late = ranks.Ranks(timeout=1.0)
    late.connect()
    return late.all_gather_numbers([rank])


def test_ranks_that_load_for_long_meet():
    assert all_in_ranks(2, come_late) == [[[0.0], [1.0]]] * 2


def hang(rank: int) -> None:
    """Rank 1 is late for the exchange of losses."""

    def loss_fn(model, batch):
        time.sleep(4.0 if rank == 1 and trainer.steps_done == 1 else 0.0)
        return model(batch).square().mean()

    trainer = rank_trainer(loss_fn=loss_fn, accumulate=2, timeout=1.0)
    with pytest.raises(RuntimeError):
        trainer.run(3, progress=False)


def test_a_rank_that_hangs_in_a_step_ends_the_others_in_time():
    all_in_ranks(2, hang)


TORCHRUN = """
import os
import torch
torch.set_num_threads(1)
from helpers.rank_jobs import rank_trainer
from helpers.small_trainer import logits_of
from maskpro_kernels.files import digest
from maskpro_kernels.ranks import under_torchrun
with under_torchrun():
    trainer = rank_trainer(accumulate=2)
    trainer.run(3, progress=False)
    trainer.close()
    # a line at once, between those of other ranks
    ranks = trainer.ranks
    os.write(1, f"rank {ranks.rank} of {ranks.world_size} {digest(logits_of(trainer.model))}\\n".encode())
"""


@pytest.mark.slow
def test_torchrun_starts_ranks(eager_reference):
    logits, _ = learn_on_rank(0, "reinforce", 3, accumulate=2)
    options = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [sys.executable, *options, sys.executable, "-c", TORCHRUN]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LONGEST, check=True)
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} of 2 {digest(logits)}" for rank in range(2)]
