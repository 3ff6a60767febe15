"""Runs of sharded layers in a folder: they continue with another number of ranks, and as one process."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.in_ranks import all_in_ranks, in_ranks
from helpers.rank_jobs import rank_trainer
from helpers.sharded_jobs import a_sharded_model, learn_sharded

import maskpro_kernels as mk
from maskpro_kernels.learn import journal
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.shards import local

STEPS = 4
HOW = {
    "reinforce": {"how": "reinforce", "accumulate": 2},
    "straight-through": {"how": "straight-through", "accumulate": 2},
}


def learn_in_turn(rank: int, folders: dict[str, str], mesh: list[int] | None, steps: int) -> dict[str, list]:
    """Whole logits of runs in their folders that take steps up to so many, by name."""
    found = {}
    for name, folder in folders.items():
        found[name], _ = learn_sharded(rank, mesh, steps=steps, output_dir=Path(folder), **HOW[name])
    return found


def test_runs_continue_sharded_and_as_one_process(tmp_path, eager_reference):
    """Two steps sharded and two more alone, and the other way round, where the journal alone has two steps."""
    first, second = ({name: str(tmp_path / order / name) for name in HOW} for order in ("sharded first", "alone first"))
    all_in_ranks(2, learn_in_turn, folders=first, mesh=[2], steps=2)
    learn_in_turn(0, second, None, 2)
    # each rank takes its steps again, on its own rows
    newest_of(second["reinforce"]).unlink()
    sharded = all_in_ranks(2, learn_in_turn, folders=second, mesh=[2], steps=STEPS)
    alone = learn_in_turn(0, first, None, STEPS)
    for name, how in HOW.items():
        logits, _ = learn_sharded(0, None, steps=STEPS, **how)
        for theirs in (*(result[name] for result in sharded), alone[name]):
            if name == "reinforce":
                assert_same_bits(theirs, logits)
            else:
                for one, other in zip(theirs, logits, strict=True):
                    assert (one - other).abs().max() < 1e-5
    reported = [journal.read_journal(Path(folders["reinforce"]) / "journal")[1] for folders in (first, second)]
    assert reported[0] == reported[1] and len(reported[0]) == STEPS


def newest_of(folder: str) -> Path:
    return max(Path(folder).glob("snapshot-*"))


def lose_a_rank(rank: int, folder: Path, how: str) -> None:
    """A run in which rank 1 ends in its third step."""

    def loss_fn(model, batch):
        if rank == 1 and trainer.steps_done == 2:
            os._exit(1)
        return model(batch).square().mean()

    model = a_sharded_model([2])
    trainer = rank_trainer(how, model=model, loss_fn=loss_fn, accumulate=2, output_dir=folder, snapshot_minutes=0.0)
    trainer.run(3, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["reinforce", "straight-through"])
def test_a_run_continues_after_a_lost_rank(how, tmp_path, eager_reference):
    error, *_ = in_ranks(2, lose_a_rank, folder=tmp_path, how=how)
    assert isinstance(error, RuntimeError), error
    resumed, _ = learn_sharded(0, None, how=how, steps=STEPS, accumulate=2, output_dir=tmp_path)
    logits, _ = learn_sharded(0, None, how=how, steps=STEPS, accumulate=2)
    assert (resumed[0] - logits[0]).abs().max() < 1e-5


def begin_where_no_mask_changes(rank: int) -> list[str]:
    """Error or warning of `begin` on this rank; one group of rank 1 may be near."""
    reported = []
    for near, estimator in ((False, mk.Reinforce()), (False, mk.StraightThrough(steps=3)), (True, mk.Reinforce())):
        model = a_sharded_model([2])
        with torch.no_grad():
            for layer in masked_layers(model).values():
                own = local(layer.logits)
                own.copy_((own > 0) * 40.0)
            if near and rank == 1:
                own.view(-1, 4)[-1] *= 0.5
        trainer = rank_trainer(model=model, estimator=estimator, accumulate=2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                trainer.begin()
                reported.append(
                    " ".join(str(warning.message) for warning in caught if "no mask" in str(warning.message))
                )
            except ValueError as error:
                reported.append(str(error))
    return reported


def test_ranks_see_together_that_no_mask_can_change(eager_reference):
    first, second = all_in_ranks(2, begin_where_no_mask_changes)
    assert first[0] == second[0] and "at most 26 apart, got at least 40" in first[0]
    assert first[1].startswith("no mask will change: ") and second[1] == ""
    assert first[2] == second[2] == ""
