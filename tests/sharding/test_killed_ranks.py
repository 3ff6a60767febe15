"""Ranks of sharded runs that are killed at any moment: the others end with their name, and runs go on to the same bits.

A moment is an operation of torch on the rank, or one of its calls that open, move or remove files.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers.bits import assert_same_bits
from helpers.in_ranks import Ended, all_in_ranks, in_ranks
from helpers.rank_jobs import rank_trainer
from helpers.sharded_jobs import a_sharded_model, whole_logits
from torch.utils._python_dispatch import TorchDispatchMode

from maskpro_kernels.learn.run import snapshots_in, step_of
from maskpro_kernels.ranks import MissingRanks

WORLD, STEPS, KILLS = 3, 24, 10
# Seconds: what the ranks wait, and what they may take beyond to find out who is gone
TIMEOUT, MORE = 5.0, 20.0
FILES = ("open", "os.rename", "os.remove", "os.mkdir", "shutil.rmtree")


class Moments(TorchDispatchMode):
    """Counts them, and ends the process at one of them."""

    def __init__(self, last: int | None, mark: Path):
        super().__init__()
        self.count, self.last, self.mark = 0, last, mark
        sys.addaudithook(lambda event, _: self.pass_by() if event in FILES else None)

    def pass_by(self) -> None:
        self.count += 1
        if self.count == self.last:
            self.mark.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.pass_by()
        return function(*args, **kwargs or {})


def learn(rank: int, folder: Path, how: str, victim: int = 0, last: int | None = None):
    """(logits, moments before its steps, all) of a run, which goes on where there is one; or what ends it, and when."""
    trainer = rank_trainer(
        how, model=a_sharded_model([WORLD]), accumulate=3, output_dir=folder, snapshot_minutes=0.0, timeout=TIMEOUT
    )
    trainer.ranks.connect()
    begun = trainer.ranks.first(lambda: has_begun(folder, how))
    try:
        with Moments(last if rank == victim else None, folder.with_suffix(".killed")) as moments:
            trainer.resume() if begun else trainer.begin()
            start = moments.count
            trainer.run(STEPS - trainer.steps_done, progress=False)
    except MissingRanks as error:
        return error.missing, time.time()
    trainer.close()
    return whole_logits(trainer.model), start, moments.count


def has_begun(folder: Path, how: str) -> bool:
    return (folder / "journal").exists() if how == "reinforce" else any(folder.glob("snapshot-*"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["reinforce", "straight-through"])
def test_runs_outlive_ranks_that_are_killed_at_any_moment(how, tmp_path):
    """Ten kills each, one behind the other: each run goes on where the last has left it."""
    draw, folder = random.Random(how), tmp_path / "killed"
    unbroken = all_in_ranks(WORLD, learn, folder=tmp_path / "unbroken", how=how)
    (_, start, count), reached = unbroken[0], []
    for kill in range(KILLS):
        # while it begins or is resumed, and in its first steps, with a snapshot behind each
        first, behind = (1, start) if kill % 2 else (start, start + 4 * (count - start) // STEPS)
        victim, last = draw.randrange(WORLD), draw.randrange(first, behind)
        results = in_ranks(WORLD, learn, folder=folder, how=how, victim=victim, last=last)
        assert isinstance(results.pop(victim), Ended)
        killed = float(folder.with_suffix(".killed").read_text())
        for missing, ended in results:
            assert missing == [victim]
            assert ended - killed < TIMEOUT + MORE
        reached.append(max(map(step_of, snapshots_in(folder)), default=0))
    assert 1 < reached[-1] < STEPS, reached
    for result, other in zip(all_in_ranks(WORLD, learn, folder=folder, how=how), unbroken, strict=True):
        assert_same_bits(result[0], other[0])
    assert not list(folder.glob("*.tmp")) and not list(folder.glob("*.aside"))
