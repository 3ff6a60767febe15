"""Layers whose rows fully_shard splits over ranks: they learn by the bits of one process."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.in_ranks import all_in_ranks
from helpers.rank_jobs import rank_trainer
from helpers.sharded_jobs import (
    Blocks,
    a_mesh,
    a_sharded_model,
    learn_each,
    learn_sharded,
    logits_of,
    resets,
    shard,
    whole_logits,
)
from helpers.tiny_llama import tiny_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import maskpro_kernels as mk

STEPS = 3
# Of each the masks that its logits have made likeliest are those of one process; of REINFORCE all bits are
RUNS = {
    "reinforce": {"how": "reinforce", "accumulate": 2},
    "reinforce, converted after": {"how": "reinforce", "accumulate": 2, "after": True},
    "several draws": {"how": "two draws", "accumulate": 2},
    "straight-through": {"how": "straight-through", "accumulate": 2},
    "straight-through, two passes a rank": {"how": "straight-through", "accumulate": 4, "after": True},
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
    names = ["reinforce", "reinforce, converted after", "straight-through, two passes a rank"]
    assert_learns_as_one_process(2, [2], {name: RUNS[name] for name in names}, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [[2, 2], [4]], ids=str)
def test_meshes_of_more_ranks_learn_by_the_bits_of_one_process(mesh, eager_reference):
    runs = {name: how | {"accumulate": 2 * how["accumulate"]} for name, how in RUNS.items()}
    assert_learns_as_one_process(4, mesh, runs, 20)


class Fails(RuntimeError):
    """Error that a model raises once."""


def learn_after_errors(mesh: list[int] | None, how: str, after: bool) -> list[torch.Tensor]:
    """Logits of a run whose second step fails on all ranks, in a forward or in the first of two backwards."""
    model = a_sharded_model(mesh)
    trainer = rank_trainer(how, model=model, accumulate=4)
    trainer.run(1, progress=False)

    def fail(*_):
        handle.remove()
        raise Fails

    inner = model.blocks[1][2]
    handle = inner.register_full_backward_hook(fail) if after else inner.register_forward_hook(fail)
    with pytest.raises(Fails):
        trainer.step()
    # none stays gathered, the outermost layer among them
    for parameter in model.parameters() if mesh is not None else ():
        assert isinstance(parameter, DTensor)
    trainer.run(2, progress=False)
    trainer.close()
    return whole_logits(model)


FAILING = {"reinforce": False, "straight-through": True}


def learn_each_after_errors(rank: int, mesh: list[int] | None) -> dict[str, list[torch.Tensor]]:
    return {how: learn_after_errors(mesh, how, after) for how, after in FAILING.items()}


@resets
def test_an_error_inside_a_step_leaves_nothing_gathered(eager_reference):
    alone = learn_each_after_errors(0, None)
    for theirs in all_in_ranks(2, learn_each_after_errors, mesh=[2]):
        for how, logits in theirs.items():
            for one, other in zip(logits, alone[how], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


class EndsEarly(Blocks):
    """The last layer, which FSDP2 keeps gathered, takes batches of some sizes alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.out(x) if len(x) % 2 else x


def learn_with_an_unused_layer(rank: int, mesh: list[int] | None, how: str) -> list[torch.Tensor]:
    model = EndsEarly()
    mk.convert(model, "2:4", targets=["*"], gap=2.0)
    if mesh is not None:
        shard(model, mesh)
    batches = [torch.randn(3 + place % 2, 16, generator=torch.Generator().manual_seed(place)) for place in range(4)]
    trainer = rank_trainer(how, model=model, batches=batches, accumulate=2)
    trainer.run(STEPS, progress=False)
    trainer.close()
    return whole_logits(model)


@pytest.mark.slow
def test_a_layer_that_some_ranks_do_not_use_keeps_none_waiting(eager_reference):
    for how in ("reinforce", "straight-through"):
        alone = learn_with_an_unused_layer(0, None, how)
        for theirs in all_in_ranks(2, learn_with_an_unused_layer, mesh=[2], how=how):
            for one, other in zip(theirs, alone, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def language_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch, use_cache=False).loss.float()


def learn_llama(rank: int, mesh: list[int] | None, how: str, steps: int, ranks: int) -> list[torch.Tensor]:
    """Whole logits of a LLaMA whose blocks are sharded, and computed again in backward."""
    model = tiny_model()
    if how == "straight-through":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mk.convert(model, "2:4", gap=2.0)
    if mesh is not None:
        settings = {"mesh": a_mesh(mesh), "ignored_params": logits_of(model)}
        for block in model.model.layers:
            fully_shard(block, **settings)
        fully_shard(model, **settings)
    tokens = torch.randint(2, 32, (2 * ranks, 2, 12), generator=torch.Generator().manual_seed(3))
    batches = [{"input_ids": ids, "labels": ids} for ids in tokens]
    trainer = rank_trainer(how, model=model, batches=batches, loss_fn=language_loss, accumulate=ranks)
    trainer.run(steps, progress=False)
    trainer.close()
    logits, ids = whole_logits(model), {"input_ids": tokens[0]}
    with torch.no_grad():
        masked = model.eval()(**ids).logits
        assert_same_bits(mk.finalize(model)(**ids).logits, masked)
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("how", ["reinforce", "straight-through"])
@pytest.mark.parametrize("mesh", [[2], [2, 2]], ids=str)
def test_llamas_learn_the_masks_of_one_process(mesh, how, eager_reference):
    of = {"how": how, "steps": 20, "ranks": math.prod(mesh)}
    logits = learn_llama(0, None, **of)
    for theirs in all_in_ranks(of["ranks"], learn_llama, mesh=mesh, **of):
        if how == "reinforce":
            assert_same_bits(theirs, logits)
            continue
        for one, other in zip(theirs, logits, strict=True):
            # a weight near a bound may take the other side of it
            assert ((one - other).abs() < 1e-3).float().mean() > 0.99
            assert (mk.top_n_mask(one, "2:4") == mk.top_n_mask(other, "2:4")).float().mean() > 0.99
