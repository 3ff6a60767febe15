"""Ranks that are killed or hang: the others end in time and name them, and the run goes on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.bits import assert_same_bits
from helpers.children import environment
from helpers.in_ranks import LONGEST, Ended, all_in_ranks, in_ranks
from helpers.rank_jobs import learn_on_rank, rank_trainer

import maskpro_kernels as mk
from maskpro_kernels import ranks
from maskpro_kernels.digests import digest
from maskpro_kernels.learn import run


def killed_in(step: int, victim: int, rank: int, trainer_of: list):
    """A loss whose process is killed in the last forward of a step."""

    def loss_fn(model, batch):
        trainer = trainer_of[0] if trainer_of else None
        if rank == victim and trainer is not None and trainer.steps_done == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return model(batch).square().mean()

    return loss_fn


def learn_until_killed(rank: int, how: str, victim: int, folder, wait: float = 0.0, **arguments):
    trainers: list = []
    loss_fn = killed_in(2, victim, rank, trainers)

    def slow(model, batch):
        if trainers and rank == 1 and trainers[0].steps_done == 2:
            time.sleep(wait)
        return loss_fn(model, batch)

    ranks.ANSWER = 0.5
    trainers.append(rank_trainer(how, loss_fn=slow, output_dir=folder, **arguments))
    began = time.monotonic()
    try:
        trainers[0].run(4, progress=False)
    except RuntimeError as error:
        # as by the end of the process
        trainers[0].close()
        return type(error), str(error), error.missing, time.monotonic() - began
    return None


@pytest.mark.parametrize(
    ("how", "victim", "resumed"),
    [pytest.param("reinforce", 2, 2, marks=pytest.mark.slow), ("reinforce", 0, 1)],
)
def test_a_rank_that_is_killed_is_named_and_the_run_goes_on(how, victim, resumed, tmp_path, eager_reference):
    steps = {"accumulate": 4}
    logits, _ = learn_on_rank(0, how, 4, **steps)
    results = in_ranks(4, learn_until_killed, how=how, victim=victim, folder=tmp_path, **steps)
    assert isinstance(results.pop(victim), Ended)
    for error, message, missing, seconds in results:
        assert error is ranks.MissingRanks and issubclass(error, RuntimeError)
        assert missing == [victim] and f"rank {victim} of 4 ended" in message
        assert seconds < LONGEST / 4
    assert len(run.read_journal(tmp_path / "journal")[1]) == 2
    results = all_in_ranks(resumed, learn_on_rank, how=how, steps=4, folder=tmp_path, resume=True, **steps)
    assert len(results) == resumed
    for theirs, records in results:
        assert [record["step"] for record in records] == [2, 3]
        assert_same_bits(theirs, logits)


def learn_until_some_moment(rank: int, folder: Path, victim: int, seconds: float):
    ranks.ANSWER = 0.5
    trainer = rank_trainer(output_dir=folder, accumulate=4)
    if (folder / "journal").exists():
        trainer.resume()
    else:
        trainer.begin()
    if rank == victim:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    # more than any machine takes until then
    trainer.run(1_000_000, progress=False)


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_run_whose_ranks_are_killed_again_and_again_has_the_bits_of_a_whole_one(kills, tmp_path, eager_reference):
    generator = torch.Generator().manual_seed(kills)
    for _ in range(kills):
        world = [2, 4][int(torch.randint(2, (), generator=generator))]
        victim = int(torch.randint(world, (), generator=generator))
        moment = {"seconds": float(torch.rand((), generator=generator)) * 3 / kills, "victim": victim}
        results = in_ranks(world, learn_until_some_moment, folder=tmp_path, **moment)
        assert isinstance(results.pop(victim), Ended)
        assert all(result.missing == [victim] for result in results), results
    steps = len(run.read_journal(tmp_path / "journal")[1]) + 5
    results = all_in_ranks(2, learn_on_rank, how="reinforce", steps=steps, folder=tmp_path, resume=True, accumulate=4)
    whole, _ = learn_on_rank(0, "reinforce", steps, accumulate=4)
    for logits, _ in results:
        assert_same_bits(logits, whole)


def test_a_rank_that_is_slow_is_not_taken_for_one_that_has_ended(tmp_path):
    results = in_ranks(3, learn_until_killed, how="reinforce", victim=2, folder=tmp_path, wait=1.5, accumulate=3)
    assert [result[2] for result in results[:2]] == [[2], [2]]


PRELUDE = """
import os, signal
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from helpers.rank_jobs import rank_trainer
from helpers.small_trainer import logits_of
from maskpro_kernels import ranks
from maskpro_kernels.digests import digest
"""

FREEZING = """
import sys
victim, where, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
ranks.ANSWER = 0.5
dist.init_process_group("gloo")
def freeze(here):
    if dist.get_rank() == victim and here == where and trainer.steps_done == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
def loss_fn(model, batch):
    freeze("in a step")
    return model(batch).square().mean()
trainer = rank_trainer(loss_fn=loss_fn, accumulate=2, timeout=0.5, output_dir=folder)
try:
    trainer.run(3, progress=False, after_step=lambda _: freeze("between steps"))
except ranks.MissingRanks:
    trainer.step()
"""
# Seconds beyond the timeout in which the others have ended as processes; here a machine may be busy
MARGIN = 20.0

TORCHRUN = """
with ranks.under_torchrun():
    trainer = rank_trainer(accumulate=2)
    trainer.run(3, progress=False)
    trainer.close()
    # a line at once, between those of other ranks
    os.write(1, f"rank {trainer.ranks.rank} of {trainer.ranks.world} {digest(logits_of(trainer.model))}\\n".encode())
"""


@contextmanager
def two_processes(code: str, store: str, *arguments):
    """Two ranks, as scripts start them: the store is in rank 0, or as with torchrun in neither."""
    around = {"MASTER_ADDR": "127.0.0.1"}
    if store == "of torchrun":
        kept = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        around |= {"MASTER_PORT": str(kept.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    else:
        with socket.create_server(("127.0.0.1", 0)) as free:
            around["MASTER_PORT"] = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PRELUDE + code, *map(str, arguments)],
            env=environment() | around | {"WORLD_SIZE": "2", "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_until_frozen(process: subprocess.Popen) -> None:
    limit = time.monotonic() + LONGEST
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert process.poll() is None and time.monotonic() < limit, process.stderr.read()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("victim", "where", "store"),
    [
        (0, "between steps", "in rank 0"),
        pytest.param(1, "in a step", "of torchrun", marks=pytest.mark.slow),
        pytest.param(0, "in a step", "in rank 0", marks=pytest.mark.slow),
        pytest.param(0, "between steps", "of torchrun", marks=pytest.mark.slow),
        pytest.param(0, "in a step", "of torchrun", marks=pytest.mark.slow),
        pytest.param(1, "between steps", "in rank 0", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_frozen_is_named_in_time_and_the_others_end(victim, where, store, tmp_path, eager_reference):
    """Also that which holds the store; nothing is answered by it, and no connection to it ends."""
    with two_processes(FREEZING, store, victim, where, tmp_path) as processes:
        wait_until_frozen(processes[victim])
        began = time.monotonic()
        _, told = processes[1 - victim].communicate(timeout=LONGEST)
        seconds = time.monotonic() - began
    assert processes[1 - victim].returncode == 1
    named = f"MissingRanks: ranks: rank {victim} of 2 did not come within 0.5 s; this is rank {1 - victim}"
    assert told.rstrip().splitlines()[-1].endswith(named)
    assert seconds < 0.5 + MARGIN
    resumed, _ = learn_on_rank(0, "reinforce", 3, tmp_path, resume=True, accumulate=2)
    whole, _ = learn_on_rank(0, "reinforce", 3, accumulate=2)
    assert_same_bits(resumed, whole)


def test_torchrun_starts_ranks(eager_reference):
    logits, _ = learn_on_rank(0, "reinforce", 3, accumulate=2)
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [sys.executable, *run, sys.executable, "-c", PRELUDE + TORCHRUN]
    told = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LONGEST, check=True)
    assert sorted(told.stdout.splitlines()) == [f"rank {rank} of 2 {digest(logits)}" for rank in range(2)]


def hang(rank: int, where: str):
    """The ranks that each is missing where rank 1 hangs for longer than that is told in."""
    ranks.LOOK, ranks.ANSWER = 0.1, 0.5

    def hanging() -> None:
        if rank == 1:
            time.sleep(3.0)

    def loss_fn(model, batch):
        if not model[0].training and trainer.steps_done == {"begin": 0, "refresh": 1}.get(where):
            hanging()
        return model(batch).square().mean()

    def advantages(*losses):
        hanging()
        return mk.Reinforce.advantages(trainer.estimator, *losses)

    trainer = rank_trainer("refreshed", loss_fn=loss_fn, seed=1, accumulate=2, timeout=0.5)
    if where == "update":
        trainer.estimator.advantages = advantages
    with pytest.raises(ranks.MissingRanks) as caught:
        trainer.run(3, progress=False)
    return caught.value.missing


@pytest.mark.parametrize(
    "where", [pytest.param("begin", marks=pytest.mark.slow), pytest.param("refresh", marks=pytest.mark.slow), "update"]
)
def test_a_rank_that_hangs_outside_of_the_forwards_of_a_step_is_named_in_time(where):
    assert all_in_ranks(2, hang, where=where)[0] == [1]


def meet_without_an_answer(rank: int):
    ranks.MEETING, ranks.ANSWER = 0.5, 0.1
    if rank == 0:
        # comes too late
        time.sleep(3.0)
    with pytest.raises(Exception) as caught:
        ranks.Ranks().connect()
    return type(caught.value).__name__


def meet_late(rank: int) -> tuple[float, float]:
    """(When rank 1 came to meet, when this rank was through), of a clock that all processes share."""
    own = ranks.Ranks()
    own.connect()
    if rank == 1:
        time.sleep(0.5)
    came = time.monotonic()
    own.meet()
    return came, time.monotonic()


def test_ranks_that_meet_wait_for_the_last():
    (_, through), (came, _) = all_in_ranks(2, meet_late)
    assert through >= came


def test_a_meeting_has_a_limit_too():
    began = time.monotonic()
    assert all(in_ranks(2, meet_without_an_answer))
    assert time.monotonic() - began < LONGEST / 2


def learn_until_killed_in_backward(rank: int, folder):
    trainer = rank_trainer("straight-through", output_dir=folder, accumulate=3)
    ranks.ANSWER = 0.5
    trainer.run(2, progress=False)
    if rank == 1:
        sums, real = [], trainer.ranks.sum_

        def summed(tensor):
            if sums:
                os.kill(os.getpid(), signal.SIGKILL)
            sums.append(real(tensor))

        trainer.ranks.sum_ = summed
    with pytest.raises(ranks.MissingRanks) as caught:
        trainer.step()
    return caught.value.missing


def test_a_rank_that_is_killed_in_backward_is_named(tmp_path, eager_reference):
    results = in_ranks(3, learn_until_killed_in_backward, folder=tmp_path)
    assert isinstance(results.pop(1), Ended) and results == [[1], [1]]
    logits, _ = learn_on_rank(0, "straight-through", 5, accumulate=3)
    ((theirs, _),) = all_in_ranks(
        1, learn_on_rank, how="straight-through", steps=5, folder=tmp_path, resume=True, accumulate=3
    )
    for one, other in zip(theirs, logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4


def connect_behind_a_firewall(rank: int) -> list[str]:
    """The warnings of a rank, where rank 1 cannot reach the other."""
    if rank == 1:
        ranks.reachable = lambda addresses, seconds: {}
    together = ranks.Ranks()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        together.connect()
    together.close()
    return [str(warning.message) for warning in caught if str(warning.message).startswith("ranks: ")]


def test_a_connection_that_cannot_be_had_is_told_on_all_ranks():
    told = all_in_ranks(2, connect_behind_a_firewall)
    assert told[0] == told[1]
    ((message,),) = {tuple(lines) for lines in told}
    assert message.startswith("ranks: no connection from rank 1 to rank 0, as behind a firewall; ")


def close_behind_an_interrupt(rank: int) -> float:
    """Seconds that a rank takes to part from another one that never comes to what it waits for."""
    together = ranks.Ranks()
    together.connect()

    def interrupted():
        raise KeyboardInterrupt

    if rank == 0:
        together._called = interrupted
        with pytest.raises(KeyboardInterrupt):
            together.gather([1.0])
    else:
        time.sleep(3.0)
    began = time.monotonic()
    together.close()
    return time.monotonic() - began


def test_an_interrupt_waits_for_nobody():
    assert all_in_ranks(2, close_behind_an_interrupt)[0] < 1.0
