"""Layers whose rows and columns a tensor-parallel plan shares out over ranks: they learn as on one process."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.in_ranks import all_in_ranks
from helpers.tensor_jobs import learn_each_split, learn_split

RUNS = {
    "reinforce": {"how": "reinforce"},
    "several draws": {"how": "two draws", "accumulate": 2},
    "straight-through": {"how": "straight-through"},
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
    assert_learns_as_one_process(2, [2], 3, RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [[4], [2, 2]], ids=str)
def test_meshes_of_more_ranks_learn_by_the_bits_of_one_process(mesh, eager_reference):
    runs = {name: {"accumulate": 2} | how for name, how in RUNS.items()}
    assert_learns_as_one_process(4, mesh, 20, runs)
