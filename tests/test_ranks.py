"""Several processes that learn one mask: the bits of one process, and what happens where one of them ends."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.children import environment
from helpers.in_ranks import LONGEST, Ended, all_in_ranks, in_ranks
from helpers.small_trainer import a_model, assert_equal_logits, logits_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import maskpro_kernels as mk
from maskpro_kernels import ranks
from maskpro_kernels.training import journal, snapshots
from maskpro_kernels.training import straight_through as straight_through_file
from maskpro_kernels.training.sharing import PARALLEL


def some_batches(count: int = 5) -> list[torch.Tensor]:
    """The last one is smaller."""
    batches = list(torch.randn(count, 5, 16, generator=torch.Generator().manual_seed(1)))
    return [*batches[:-1], batches[-1][:2]]


def a_trainer(how: str = "reinforce", loss_fn=None, batches=None, model=None, seed=11, **arguments) -> mk.MaskTrainer:
    estimators = {
        "reinforce": lambda: mk.Reinforce(lr=2.0, alpha=0.75),
        "normalized": lambda: mk.Reinforce(lr=2.0, alpha=0.75, normalize=True),
        "refreshed": lambda: mk.Reinforce(lr=10.0, alpha=0.75, refresh=True),
        "two draws": lambda: mk.Reinforce(lr=2.0, draws=2),
        "four draws": lambda: mk.Reinforce(lr=2.0, draws=4),
        "straight-through": lambda: mk.StraightThrough(lr=0.3),
    }

    def square(model, batch):
        return model(batch).square().mean()

    model = a_model() if model is None else model
    return mk.MaskTrainer(
        model, loss_fn or square, batches or some_batches(), estimators[how](), seed=seed, **arguments
    )


def learn(rank: int, how: str, steps: int, folder=None, resume=False, **arguments):
    """(logits, records without their seconds) of a run."""
    trainer = a_trainer(how, output_dir=folder, **arguments)
    if resume:
        trainer.resume()
    records = trainer.run(steps - trainer.steps_done, progress=False)
    trainer.close()
    return logits_of(trainer.model), [vars(record) | {"seconds": 0.0} for record in records]


@pytest.mark.parametrize(
    ("how", "parallel", "accumulate"),
    [
        ("reinforce", "data", 4),
        ("four draws", "draws", 2),
        ("normalized", "data", 4),
        ("two draws", "data", 4),
        ("four draws", "draws", 1),
    ],
)
def test_ranks_have_the_bits_of_one_process(how, parallel, accumulate, tmp_path, eager_reference):
    steps = {"how": how, "steps": 3, "parallel": parallel, "accumulate": accumulate}
    logits, records = learn(0, folder=tmp_path / "1", **steps)
    assert records[-1]["loss"] != records[0]["loss"] and not torch.equal(logits[0], logits_of(a_model())[0])
    for world in (2, 4):
        for theirs, seen in all_in_ranks(world, learn, folder=tmp_path / str(world), **steps):
            assert_equal_logits(theirs, logits)
            assert seen == records
        for name in ("journal", "metrics.jsonl"):
            one, other = ((tmp_path / str(number) / name).read_bytes() for number in (1, world))
            if name == "journal":
                assert one == other
            else:
                assert one.count(b"\n") == other.count(b"\n") == 3


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
        trainer = a_trainer("refreshed", loss_fn, seed=1, output_dir=folder, **arguments)
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
        assert_equal_logits(theirs, logits)
        assert seen == residuals
    # each batch on one of them
    assert sum(count for _, _, count in results) == forwards and max(count for _, _, count in results) < forwards
    one, two = ((tmp_path / number / "journal").read_bytes() for number in ("1", "2"))
    assert one == two
    for step in (1, 14):
        found = [snapshots.newest_snapshot(tmp_path / number / "initial-losses", step)[:2] for number in ("1", "2")]
        assert found[0][0] == found[1][0] == step and torch.equal(found[0][1]["losses"], found[1][1]["losses"])


def test_own_masks_on_two_ranks_are_two_draws_of_one_process(eager_reference):
    logits, records = learn(0, "two draws", 3)
    for theirs, seen in all_in_ranks(2, learn, how="two draws", steps=3, parallel="draws"):
        assert_equal_logits(theirs, logits)
        assert seen == records


def count_bytes(rank: int, how: str, accumulate: int, parallel: str):
    """(bytes of all tensors that a step gives to collectives, those counted)."""
    given = []

    def counting(collective, at):
        def counted(*args, **kwargs):
            given.append(args[at].nbytes)
            return collective(*args, **kwargs)

        return counted

    trainer = a_trainer(how, accumulate=accumulate, parallel=parallel)
    trainer.begin()
    for name, at in {"all_gather": 1, "all_reduce": 0, "broadcast": 0, "all_gather_into_tensor": 1}.items():
        setattr(dist, name, counting(getattr(dist, name), at))
    before = trainer.ranks.bytes_sent
    trainer.step()
    return sum(given), trainer.ranks.bytes_sent - before, trainer.accumulate


@pytest.mark.parametrize(("how", "accumulate", "parallel"), [("reinforce", 64, "data"), ("two draws", 16, "draws")])
def test_a_step_moves_numbers_alone(how, accumulate, parallel):
    for given, counted, _ in all_in_ranks(2, count_bytes, how=how, accumulate=accumulate, parallel=parallel):
        assert 0 < given == counted < 1024


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
    trainers.append(a_trainer(how, loss_fn=slow, output_dir=folder, **arguments))
    began = time.monotonic()
    try:
        trainers[0].run(4, progress=False)
    except RuntimeError as error:
        # as by the end of the process
        trainers[0].close()
        return type(error), str(error), error.missing, time.monotonic() - began
    return None


@pytest.mark.parametrize(
    ("how", "parallel", "victim", "resumed"),
    [
        ("reinforce", "data", 2, 2),
        ("reinforce", "data", 0, 1),
        ("four draws", "draws", 3, 4),
    ],
)
def test_a_rank_that_is_killed_is_named_and_the_run_goes_on(how, parallel, victim, resumed, tmp_path, eager_reference):
    steps = {"parallel": parallel, "accumulate": 4 if parallel == "data" else 1}
    logits, _ = learn(0, how, 4, **steps)
    results = in_ranks(4, learn_until_killed, how=how, victim=victim, folder=tmp_path, **steps)
    assert isinstance(results.pop(victim), Ended)
    for error, message, missing, seconds in results:
        assert error is ranks.MissingRanks and issubclass(error, RuntimeError)
        assert missing == [victim] and f"rank {victim} of 4 ended" in message
        assert seconds < LONGEST / 4
    assert len(journal.read(tmp_path / "journal")[1]) == 2
    results = all_in_ranks(resumed, learn, how=how, steps=4, folder=tmp_path, resume=True, **steps)
    assert len(results) == resumed
    for theirs, records in results:
        assert [record["step"] for record in records] == [2, 3]
        assert_equal_logits(theirs, logits)


def learn_until_some_moment(rank: int, folder: Path, victim: int, seconds: float):
    ranks.ANSWER = 0.5
    trainer = a_trainer(output_dir=folder, accumulate=4)
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
    steps = len(journal.read(tmp_path / "journal")[1]) + 5
    results = all_in_ranks(2, learn, how="reinforce", steps=steps, folder=tmp_path, resume=True, accumulate=4)
    whole, _ = learn(0, "reinforce", steps, accumulate=4)
    for logits, _ in results:
        assert_equal_logits(logits, whole)


def test_a_rank_that_is_slow_is_not_taken_for_one_that_has_ended(tmp_path):
    results = in_ranks(3, learn_until_killed, how="reinforce", victim=2, folder=tmp_path, wait=1.5, accumulate=3)
    assert [result[2] for result in results[:2]] == [[2], [2]]


PRELUDE = """
import os, signal
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from helpers.small_trainer import logits_of
from tests.test_ranks import a_trainer
from maskpro_kernels import ranks
from maskpro_kernels.training.batches import digest
"""

HANGING = """
ranks.ANSWER = 0.5
dist.init_process_group("gloo")
def loss_fn(model, batch):
    if dist.get_rank() == 1 and trainer.steps_done == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return model(batch).square().mean()
trainer = a_trainer(loss_fn=loss_fn, accumulate=2, timeout=0.5)
trainer.step()
try:
    trainer.step()
except ranks.MissingRanks:
    trainer.step()
"""

TORCHRUN = """
with ranks.under_torchrun():
    trainer = a_trainer(accumulate=2)
    trainer.run(3, progress=False)
    trainer.close()
    # a line at once, between those of other ranks
    os.write(1, f"rank {trainer.ranks.rank} of {trainer.ranks.world} {digest(logits_of(trainer.model))}\\n".encode())
"""


def test_a_rank_that_hangs_is_named_in_time_and_the_others_end():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # as torchrun says that the store is there already
    around = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PRELUDE + HANGING],
            env=environment() | around | {"WORLD_SIZE": "2", "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, told = processes[0].communicate(timeout=LONGEST)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == 1
    named = "MissingRanks: ranks: rank 1 of 2 did not come within 0.5 s; this is rank 0"
    assert told.rstrip().splitlines()[-1].endswith(named)


def test_torchrun_starts_ranks():
    code = [sys.executable, "-c", PRELUDE + TORCHRUN]
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    told = [
        subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LONGEST, check=True).stdout
        for command in (code, [sys.executable, *run, *code])
    ]
    (alone,), together = told[0].splitlines(), sorted(told[1].splitlines())
    assert alone.startswith("rank 0 of 1 ")
    bits = alone.split()[-1]
    assert together == [f"rank {rank} of 2 {bits}" for rank in range(2)]


def spoil(rank: int, folder, how: str, **arguments):
    """Steps whose loss is not finite on rank 1 in step 2."""
    trainers = []

    def loss_fn(model, batch):
        bad = rank == 1 and trainers and trainers[0].steps_done == 2
        return model(batch).square().mean() * (math.inf if bad else 1.0)

    trainers.append(a_trainer(how, loss_fn=loss_fn, output_dir=folder, max_skipped=1, **arguments))
    records = trainers[0].run(4, progress=False)
    return [record.loss for record in records], logits_of(trainers[0].model)


@pytest.mark.parametrize(
    ("how", "arguments"),
    [("reinforce", {"accumulate": 2}), ("two draws", {"parallel": "draws"}), ("straight-through", {"accumulate": 2})],
    ids=[*PARALLEL, "straight-through"],
)
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all(how, arguments, tmp_path):
    (losses, logits), (others, theirs) = all_in_ranks(2, spoil, folder=tmp_path, how=how, **arguments)
    assert [math.isfinite(loss) for loss in losses] == [math.isfinite(loss) for loss in others]
    assert [math.isfinite(loss) for loss in losses] == [True, True, False, True]
    if how != "straight-through":
        assert [entry.skipped for entry in journal.read(tmp_path / "journal")[1]] == [False, False, True, False]
    assert_equal_logits(logits, theirs)


def differ(rank: int, folder) -> dict[str, str]:
    """Messages of the trainers of ranks that differ in one thing each."""
    heavier, other = a_model(), a_model()
    heavier[0].weight.data[0, 0] += rank
    with torch.no_grad():
        other[0].logits[0, 0] += rank
    trainers = {
        "seed": a_trainer(seed=rank, accumulate=2),
        "batches, batch_contents": a_trainer(batches=some_batches(5 + rank), accumulate=2),
        "batch_contents": a_trainer(batches=[[0, 1], [2, 3 + rank]], accumulate=2),
        "weights": a_trainer(model=heavier, accumulate=2),
        "logits": a_trainer(model=other, accumulate=2),
        "accumulate": a_trainer(accumulate=2 + 2 * rank),
        "settings": a_trainer("two draws" if rank else "reinforce", accumulate=2),
        "parallel": a_trainer("two draws", accumulate=2, parallel=PARALLEL[rank]),
        # with a folder: nothing is written there
        "layers, weights": a_trainer(model=mk_model(8 + 4 * rank), accumulate=2, output_dir=folder),
    }
    told = {}
    for name, trainer in trainers.items():
        with pytest.raises(ValueError) as caught:
            trainer.begin()
        told[name] = str(caught.value)
    return told


def mk_model(width: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, width), nn.Linear(width, 4))
    mk.convert(model, "2:4", gap=2.0)
    return model


def test_ranks_that_differ_are_named_on_all(tmp_path):
    one, other = all_in_ranks(2, differ, folder=tmp_path / "run")
    assert one == other and len(one) == 9
    for name, message in one.items():
        assert message.startswith("ranks: expected what rank 0 has on all of them, got other ")
        assert message.endswith(" on rank 1")
        found = message.removesuffix(" on rank 1").split("got other ")[1].split(", ")
        assert set(name.split(", ")) <= set(found) <= {*name.split(", "), "logits"}
    assert not (tmp_path / "run").exists()


def refuse(rank: int) -> list[str]:
    told = []
    for how, arguments in (
        ("reinforce", {}),
        ("reinforce", {"accumulate": 3}),
        ("reinforce", {"parallel": "draws", "accumulate": 2}),
        ("straight-through", {"parallel": "draws"}),
    ):
        with pytest.raises(ValueError) as caught:
            a_trainer(how, **arguments)
        told.append(str(caught.value))
    return told


def test_work_that_cannot_be_shared_is_refused():
    for told in all_in_ranks(2, refuse):
        assert told == [
            'accumulate: expected a multiple of the 2 ranks with parallel="data", got 1',
            'accumulate: expected a multiple of the 2 ranks with parallel="data", got 3',
            'draws: expected a multiple of the 2 ranks with parallel="draws", got 1',
            'draws: expected a multiple of the 2 ranks with parallel="draws", got 1',
        ]


def stop_on_one(rank: int):
    trainer = a_trainer(accumulate=3)

    def after(record):
        # the others wait for what rank 0 does here, longer than in a step
        time.sleep(1.2 if rank == 0 and record.step == 1 else 0.0)
        return rank == 1 and record.step == 2

    trainer.ranks.timeout = 0.1
    records = trainer.run(9, progress=False, after_step=after)
    return len(records), logits_of(trainer.model)


def test_all_ranks_stop_where_one_does():
    results = all_in_ranks(3, stop_on_one)
    assert [steps for steps, _ in results] == [3, 3, 3]
    assert_equal_logits(results[0][1], results[2][1])


def learn_apart(rank: int, folder: Path, resume: bool):
    """Of each rank its own folder: that of rank 0 alone is used."""
    folder = folder / str(rank)
    model = a_model()
    if rank and resume:
        # a run's logits come from its folder
        with torch.no_grad():
            model[0].logits.add_(1.0)
    trainer = a_trainer("reinforce", model=model, output_dir=folder, accumulate=2)
    told = None
    if resume:
        trainer.resume()
    else:
        with pytest.raises(ValueError) as caught:
            trainer.resume()
        told = str(caught.value)
    trainer.run(2, progress=False)
    trainer.close()
    with pytest.raises(RuntimeError):
        trainer.step()
    return told, logits_of(model)


def test_rank_0_alone_reads_and_writes(tmp_path, eager_reference):
    for told, _ in all_in_ranks(2, learn_apart, folder=tmp_path, resume=False):
        assert told == f"output_dir: expected a folder with a journal, got {str(tmp_path / '0')!r}"
    assert not (tmp_path / "1").exists()
    (_, logits), (_, others) = all_in_ranks(2, learn_apart, folder=tmp_path, resume=True)
    assert not (tmp_path / "1").exists()
    whole, _ = learn(0, "reinforce", 4, accumulate=2)
    assert_equal_logits(logits, whole)
    assert_equal_logits(others, whole)
    # the folder holds a run by now
    for error in in_ranks(2, learn, how="reinforce", steps=2, folder=tmp_path / "0", accumulate=2):
        assert str(error).startswith("output_dir: expected a folder without a run, or resume, got ")


def raise_on(raising: Sequence[int], kind: type[Exception], rank: int, first: bool) -> tuple[str, str] | int:
    """(kind, message) of what each rank gets of a call that raises on some, or what the call gives."""
    together = ranks.Ranks()
    together.connect()

    def call() -> int:
        if rank in raising:
            raise kind(f"of {rank}")
        return 10 + rank

    try:
        return together.first(call) if first else together.all_of(call)
    except Exception as error:
        return type(error).__name__, str(error)


def raised(rank: int) -> list:
    """Of a call on rank 0, then on all ranks."""
    return [
        [raise_on(raising, kind, rank, first) for raising, kind in (((), OSError), ((0,), ValueError), ((0,), OSError))]
        for first in (True, False)
    ] + [[raise_on(raising, kind, rank, False) for raising in ((1,), (1, 2)) for kind in (ValueError, OSError)]]


def test_what_is_raised_on_one_rank_is_raised_on_all():
    results = all_in_ranks(3, raised)
    for rank, (first, all_of, others) in enumerate(results):
        own = ("OSError", "of 0") if rank == 0 else ("FailedRank", "rank 0: OSError: of 0")
        assert first == [10, ("ValueError", "of 0"), own]
        assert all_of == [10 + rank, ("ValueError", "of 0"), own]
        failed = ("FailedRank", "rank 1: OSError: of 1")
        assert others == [
            ("ValueError", "of 1" if rank == 1 else "rank 1: of 1"),
            ("OSError", "of 1") if rank == 1 else failed,
            ("ValueError", f"of {rank}" if rank else "rank 1: of 1"),
            ("OSError", f"of {rank}") if rank else failed,
        ]


def drift(rank: int) -> str:
    trainer = a_trainer(accumulate=2)
    trainer.begin()
    with torch.no_grad():
        for layer in trainer.layers.values():
            layer.logits.mul_(1.0 if rank else 8.0)
    with pytest.raises(RuntimeError) as caught:
        trainer.step()
    return str(caught.value)


def test_logits_that_drift_apart_end_the_run():
    for message in all_in_ranks(2, drift):
        assert message.startswith("ranks: expected the flip rate of rank 0 on all of them, 0, got by rank {1: 0.")


class TwoWays(nn.Module):
    """Takes one layer for batches of five rows, the other one for smaller ones."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.ways = nn.ModuleList([nn.Linear(16, 8), nn.Linear(16, 8)])
        self.out = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.ways[len(x) == 5](x))


class ThreeLayers(nn.Module):
    """Of equal shapes, so that one's slopes could be taken for another's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))


class Auxiliary(ThreeLayers):
    """Uses all layers for all batches, but the gradient comes to the second one in those of five rows alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ys = [layer(x) for layer in (self.first, self.second, self.third)]
        return torch.cat([ys[0] - 1, ys[1] if len(x) == 5 else ys[1].detach(), ys[2] - 2])


class Unreached(ThreeLayers):
    """The gradient comes to the last two layers in no batch, the last of which is not even used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x).detach()


class Twice(ThreeLayers):
    """One layer is used twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.first(self.second(torch.relu(self.first(x)))))


class Checkpointed(ThreeLayers):
    """Computes the first layers anew in backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(checkpoint(lambda x: self.second(torch.relu(self.first(x))), x, use_reentrant=False))


def straight_through(rank: int, accumulate: int, steps: int, kind: type[nn.Module] | None = None, taken_for=None):
    """(logits, losses, most slopes held at a sum over the ranks, how many of these sums a step)."""
    model = a_model() if kind is None else kind()
    if kind is not None:
        mk.convert(model, "2:4", gap=2.0)
    if taken_for is not None:
        straight_through_file._reached = lambda loss, descents: list(taken_for)
    trainer = a_trainer("straight-through", model=model, accumulate=accumulate)
    held, real = [], trainer.ranks.sum_

    def summed(tensor):
        descents = trainer.estimator._updaters.values()
        held.append(sum(descent.slopes is not None for descent in descents))
        real(tensor)

    trainer.ranks.sum_ = summed
    losses = [record.loss for record in trainer.run(steps, progress=False)]
    return logits_of(model), losses, max(held, default=0), len(held) / steps


def assert_that_of_one_process(results: list, **steps) -> None:
    logits, losses, *_ = straight_through(0, **steps)
    for theirs, seen, *_ in results:
        assert_equal_logits(theirs, results[0][0])
        for one, other in zip(theirs, logits, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert seen == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    ("world", "accumulate", "kind", "most_held", "sums"),
    [
        # inside backward, a layer at a time, where each rank has one batch and takes the same way
        (2, 2, None, 1, 2),
        (4, 4, None, 1, 2),
        (2, 2, Checkpointed, 1, 3),
        (2, 2, Unreached, 1, 1),
        # with that of a layer which backward comes to twice
        (2, 2, Twice, 2, 3),
        # else when backward has ended: always, or in the one step of the four whose batches differ
        (2, 4, None, 2, 2),
        (2, 4, Auxiliary, 3, 3),
        (2, 2, TwoWays, 3, 2.25),
        (2, 2, Auxiliary, 3, 3),
    ],
)
def test_straight_through_on_ranks_is_that_of_one_process(world, accumulate, kind, most_held, sums, eager_reference):
    steps = {"accumulate": accumulate, "steps": 4, "kind": kind}
    results = all_in_ranks(world, straight_through, **steps)
    assert_that_of_one_process(results, **steps)
    assert max(held for _, _, held, _ in results) == most_held
    assert all(count == sums for *_, count in results)


@pytest.mark.parametrize("taken_for", [["third", "second", "first"], ["first", "third", "second"], ["second"]], ids=str)
def test_turns_that_backward_does_not_take_cost_memory_alone(taken_for, eager_reference):
    """Layers are not mixed up where all ranks are mistaken about what their backwards come to, and when."""
    steps = {"accumulate": 2, "steps": 4, "kind": Auxiliary}
    results = all_in_ranks(2, straight_through, taken_for=taken_for, **steps)
    assert_that_of_one_process(results, **steps)


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

    trainer = a_trainer("refreshed", loss_fn, seed=1, accumulate=2, timeout=0.5)
    if where == "update":
        trainer.estimator.advantages = advantages
    with pytest.raises(ranks.MissingRanks) as caught:
        trainer.run(3, progress=False)
    return caught.value.missing


@pytest.mark.parametrize("where", ["begin", "refresh", "update"])
def test_a_rank_that_hangs_outside_of_the_forwards_of_a_step_is_named_in_time(where):
    assert all_in_ranks(2, hang, where=where)[0] == [1]


def test_more_ranks_than_fit_a_queue_see_a_sign_of_life(monkeypatch):
    monkeypatch.setattr(ranks, "QUEUE", 64)
    sign = ranks.SignOfLife()
    address = ("127.0.0.1", sign.port)
    assert [ranks._connects(address) for _ in range(400)] == [True] * 400
    sign.close()
    assert ranks._connects(address) is False


def learn_until_killed_in_backward(rank: int, folder):
    trainer = a_trainer("straight-through", output_dir=folder, accumulate=3)
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
    logits, _ = learn(0, "straight-through", 5, accumulate=3)
    ((theirs, _),) = all_in_ranks(1, learn, how="straight-through", steps=5, folder=tmp_path, resume=True, accumulate=3)
    for one, other in zip(theirs, logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4
