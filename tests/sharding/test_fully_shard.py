"""Layers whose rows fully_shard shares out over ranks: they learn by the bits of one process."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.in_ranks import all_in_ranks
from helpers.sharded_jobs import learn_each, learn_sharded

STEPS = 3
# Of each the masks that its logits have made likeliest are those of one process; of REINFORCE all bits are
RUNS = {
    "reinforce": {"how": "reinforce", "accumulate": 2},
    "reinforce, converted behind": {"how": "reinforce", "accumulate": 2, "behind": True},
    "several draws": {"how": "two draws", "accumulate": 2},
    "straight-through": {"how": "straight-through", "accumulate": 2},
    "straight-through, two passes a rank": {"how": "straight-through", "accumulate": 4, "behind": True},
}


def assert_learns_as_one_process(world: int, mesh: list[int], runs: dict[str, dict], steps: int) -> None:
    on_mesh = {name: {"mesh": mesh, "steps": steps, **how} for name, how in runs.items()}
    results = all_in_ranks(world, learn_each, runs=on_mesh)
    for name, how in runs.items():
        logits, records = learn_sharded(0, None, steps=steps, **how)
        for theirs, seen in (result[name] for result in results):
            if how["how"] == "straight-through":
                assert_same_bits(theirs, results[0][name][0])
                for one, other in zip(theirs, logits, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
                assert [row["loss"] for row in seen] == pytest.approx([row["loss"] for row in records], rel=1e-5)
            else:
                assert_same_bits(theirs, logits)
                assert seen == records


def test_sharded_layers_learn_by_the_bits_of_one_process(eager_reference):
    assert_learns_as_one_process(2, [2], RUNS, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [[2, 2], [4], [3]], ids=str)
def test_meshes_of_more_ranks_learn_by_the_bits_of_one_process(mesh, eager_reference):
    """The last two have ranks with fewer rows than others, or with none."""
    world = 3 if mesh == [3] else 4
    runs = {name: how | {"accumulate": how["accumulate"] // 2 * world} for name, how in RUNS.items()}
    assert_learns_as_one_process(world, mesh, runs, 20)
