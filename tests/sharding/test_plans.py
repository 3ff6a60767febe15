"""Layers whose rows and columns a tensor-parallel plan shares out over ranks: they learn as on one process."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.in_ranks import all_in_ranks, in_ranks
from helpers.rank_jobs import rank_trainer
from helpers.tensor_jobs import Signed, a_loss, a_split_model, batches_of_whole_numbers, learn_each_split, learn_split

from maskpro_kernels.ranks import MissingRanks

STEPS = 3
# Seconds: longer than the others wait
HANGS = 20

RUNS = {
    "reinforce": {"how": "reinforce"},
    "several draws": {"how": "two draws", "accumulate": 2},
    "straight-through": {"how": "straight-through"},
    "straight-through, Fisher passes": {"how": "straight-through", "loss_fn": Signed()},
    "straight-through, two passes": {"how": "straight-through", "accumulate": 4},
}


def assert_learns_as_one_process(world: int, mesh: list[int], steps: int, runs: dict[str, dict]) -> None:
    on_mesh = {name: {"mesh": mesh, "steps": steps, **how} for name, how in runs.items()}
    results = all_in_ranks(world, learn_each_split, runs=on_mesh)
    for name, how in runs.items():
        logits, records = learn_split(0, None, steps=steps, **how)
        for theirs, seen in (result[name] for result in results):
            assert [row["loss"] for row in seen] == [row["loss"] for row in records]
            if how["how"] == "straight-through":
                assert_same_bits(theirs, results[0][name][0])
                for one, other in zip(theirs, logits, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
            else:
                assert_same_bits(theirs, logits)
                assert seen == records


def test_layers_that_a_plan_has_cut_learn_by_the_bits_of_one_process(eager_reference):
    names = ["reinforce", "straight-through, Fisher passes"]
    assert_learns_as_one_process(2, [2], STEPS, {name: RUNS[name] for name in names})


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [[4], [2, 2]], ids=str)
def test_meshes_of_more_ranks_learn_by_the_bits_of_one_process(mesh, eager_reference):
    runs = {name: {"accumulate": 2} | how for name, how in RUNS.items()}
    assert_learns_as_one_process(4, mesh, 20, runs)


def lose_a_rank(rank: int, folder: Path, how: str, ends: bool) -> None:
    """A run in which rank 1 ends in its third step, or hangs there."""

    def loss_fn(model, batch):
        if rank == 1 and trainer.steps_done == 2:
            if ends:
                os._exit(1)
            time.sleep(HANGS)
        return a_loss(model, batch)

    of = {"model": a_split_model([2]), "batches": batches_of_whole_numbers(), "loss_fn": loss_fn}
    trainer = rank_trainer(how, **of, output_dir=folder, snapshot_minutes=0.0, timeout=60.0 if ends else 2.0)
    trainer.run(3, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("ends", [True, False], ids=["dead", "hung"])
@pytest.mark.parametrize("how", ["reinforce", "straight-through"])
def test_a_lost_rank_is_named_and_the_run_goes_on(how, ends, tmp_path, eager_reference):
    error, *_ = in_ranks(2, lose_a_rank, folder=tmp_path, how=how, ends=ends)
    assert isinstance(error, MissingRanks) and error.missing == [1], error
    resumed, _ = learn_split(0, None, how=how, steps=STEPS, output_dir=tmp_path)
    logits, _ = learn_split(0, None, how=how, steps=STEPS)
    for one, other in zip(resumed, logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def lose_a_copy(rank: int) -> None:
    """Rank 3 ends before the first step, in which all ranks make a mesh of the copies of layers."""
    of = {"model": a_split_model([2, 2]), "batches": batches_of_whole_numbers(), "loss_fn": a_loss}
    trainer = rank_trainer("straight-through", **of, accumulate=2, timeout=10.0)
    trainer.begin()
    if rank == 3:
        os._exit(1)
    trainer.run(1, progress=False)


@pytest.mark.slow
def test_a_rank_that_is_lost_before_the_first_step_is_named(eager_reference):
    for error in in_ranks(4, lose_a_copy)[:3]:
        assert isinstance(error, MissingRanks) and error.missing == [3], error


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [[2, 2], [4, 1], [1, 4]], ids=str)
def test_parts_that_fully_shard_cuts_again_learn_by_the_bits_of_one_process(mesh, eager_reference):
    runs = {name: how | {"accumulate": 4, "grid": "before"} for name, how in RUNS.items()}
    runs["converted first"] = RUNS["straight-through"] | {"accumulate": 4, "grid": "behind"}
    assert_learns_as_one_process(4, mesh, 20, runs)
