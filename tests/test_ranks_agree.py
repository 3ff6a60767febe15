"""What all ranks must have alike, and what one of them raises or decides for all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.in_ranks import all_in_ranks, in_ranks
from helpers.rank_jobs import learn_on_rank, rank_trainer
from helpers.small_trainer import a_model, logits_of, some_batches, uneven_batches
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels import ranks


def differ(rank: int, folder) -> dict[str, str]:
    """Messages of the trainers of ranks that differ in one thing each."""
    heavier, other = a_model(), a_model()
    heavier[0].weight.data[0, 0] += rank
    with torch.no_grad():
        other[0].logits[0, 0] += rank
    biased, normed, sparse = a_model(), nn.Sequential(a_model(), nn.BatchNorm1d(4)), a_model()
    biased[2].bias.data[3] += rank
    normed[1].running_mean[1] += rank
    for name, rows in {"coo": torch.eye(3).to_sparse(), "csr": torch.eye(3).to_sparse_csr()}.items():
        sparse.register_buffer(name, rows * (1 + rank))
    # the same values on all ranks, in another order
    order = [rank, 1 - rank]
    same = torch.sparse_coo_tensor([order, order], torch.tensor([1.0, 2.0])[order], (2, 2))
    sparse.register_buffer("same", same)
    sparse.register_buffer("phase", torch.tensor([1.0 + 2.0j * (1 + rank)]).conj())
    trainers = {
        "2.bias of the model": rank_trainer(model=biased, accumulate=2),
        "1.running_mean of the model": rank_trainer(model=normed, accumulate=2),
        "coo of the model, csr of the model, phase of the model": rank_trainer(model=sparse, accumulate=2),
        "loss_fn": rank_trainer(loss_fn=absolute if rank else squared, accumulate=2),
        "loss_fn ": rank_trainer(loss_fn=partial(Loss(rank).first if rank else Loss(rank).second), accumulate=2),
        "seed": rank_trainer(seed=rank, accumulate=2),
        "batches, batch_contents": rank_trainer(batches=[*uneven_batches(), *some_batches(rank)], accumulate=2),
        "batch_contents": rank_trainer(batches=[[0, 1], [2, 3 + rank]], accumulate=2),
        "weights": rank_trainer(model=heavier, accumulate=2),
        "logits": rank_trainer(model=other, accumulate=2),
        "accumulate": rank_trainer(accumulate=2 + 2 * rank),
        "settings": rank_trainer("two draws" if rank else "reinforce", accumulate=2),
        # with a folder: nothing is written there
        "layers, weights": rank_trainer(model=mk_model(8 + 4 * rank), accumulate=2, output_dir=folder),
    }
    told = {}
    for name, trainer in trainers.items():
        with pytest.raises(ValueError) as caught:
            trainer.begin()
        told[name] = str(caught.value)
    return told


def squared(model, batch):
    return model(batch).square().mean()


def absolute(model, batch):
    return model(batch).abs().mean()


class Loss:
    """What it holds may be of the rank, and is not compared."""

    def __init__(self, rank: int):
        self.rank = rank

    def first(self, model, batch):
        return sum(part.square().mean() for part in model(batch))

    def second(self, model, batch):
        return sum(part.square().sum() for part in model(batch))

    def __call__(self, model, batch):
        return self.first(model, batch) if len(batch) in {5, 2, "two"} else self.second(model, batch)


def mk_model(width: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, width), nn.Linear(width, 4))
    mk.convert(model, "2:4", gap=2.0)
    return model


def test_ranks_that_differ_are_named_on_all(tmp_path):
    one, other = all_in_ranks(2, differ, folder=tmp_path / "run")
    assert one == other and len(one) == 13
    for name, message in one.items():
        name = name.strip()
        assert message.startswith("ranks: expected what rank 0 has on all of them, got other ")
        assert message.endswith(" on rank 1")
        found = message.removesuffix(" on rank 1").split("got other ")[1].split(", ")
        rest = {part for part in found if part.endswith(" of the model")}
        assert set(name.split(", ")) <= set(found) <= {*name.split(", "), "logits", *rest}
        assert rest == {part for part in name.split(", ") if part.endswith(" of the model")} or "layers" in found
    assert not (tmp_path / "run").exists()


def hold_something_of_the_rank(rank: int) -> int:
    trainer = rank_trainer(loss_fn=Loss(rank), accumulate=2)
    trainer.begin()
    return trainer.steps_done


def test_what_a_loss_holds_may_differ():
    assert all_in_ranks(2, hold_something_of_the_rank) == [0, 0]


def refuse(rank: int) -> list[str]:
    told = []
    for how, arguments in (
        ("reinforce", {}),
        ("reinforce", {"accumulate": 3}),
    ):
        with pytest.raises(ValueError) as caught:
            rank_trainer(how, **arguments)
        told.append(str(caught.value))
    return told


def test_work_that_cannot_be_shared_is_refused():
    for told in all_in_ranks(2, refuse):
        assert told == [
            "accumulate: expected a multiple of the 2 ranks, got 1",
            "accumulate: expected a multiple of the 2 ranks, got 3",
        ]


def stop_on_one(rank: int):
    trainer = rank_trainer(accumulate=3)

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
    assert_same_bits(results[0][1], results[2][1])


def learn_apart(rank: int, folder: Path, resume: bool):
    """Of each rank its own folder: that of rank 0 alone is used."""
    folder = folder / str(rank)
    model = a_model()
    if rank and resume:
        # a run's logits come from its folder
        with torch.no_grad():
            model[0].logits.add_(1.0)
    trainer = rank_trainer("reinforce", model=model, output_dir=folder, accumulate=2)
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
    trainer = rank_trainer(accumulate=2)
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
