"""Straight-through learning on several ranks: the sums of one process, inside backward where all take the same way."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.in_ranks import all_in_ranks, in_ranks
from helpers.rank_jobs import rank_trainer
from helpers.small_trainer import a_model, logits_of, some_batches
from torch import nn
from torch.utils.checkpoint import checkpoint

import maskpro_kernels as mk
from maskpro_kernels.learn import backward as backward_file


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
    """Of equal shapes, so that the slopes of one would fit another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))


class Auxiliary(ThreeLayers):
    """Uses all layers for all batches, but the second one has a gradient only in batches of five rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ys = [layer(x) for layer in (self.first, self.second, self.third)]
        return torch.cat([ys[0] - 1, ys[1] if len(x) == 5 else ys[1].detach(), ys[2] - 2])


class Unreached(ThreeLayers):
    """The last two layers have no gradient in any batch, and the last is not even used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x).detach()


class Twice(ThreeLayers):
    """One layer is used twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.first(self.second(torch.relu(self.first(x)))))


class Checkpointed(ThreeLayers):
    """Computes the first layers again in backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(checkpoint(lambda x: self.second(torch.relu(self.first(x))), x, use_reentrant=False))


def straight_through(rank: int, accumulate: int, steps: int, kind: type[nn.Module] | None = None, expected_turns=None):
    """(logits, losses, most slopes held at a sum over the ranks, how many of these sums a step)."""
    model = a_model() if kind is None else kind()
    if kind is not None:
        mk.convert(model, "2:4", gap=2.0)
    if expected_turns is not None:
        backward_file._reached = lambda loss, descents: list(expected_turns)
    trainer = rank_trainer("straight-through", model=model, accumulate=accumulate)
    held, real = [], trainer.ranks.all_reduce

    def summed(tensor):
        descents = trainer.estimator._updaters.values()
        held.append(sum(descent.slopes is not None for descent in descents))
        real(tensor)

    trainer.ranks.all_reduce = summed
    losses = [record.loss for record in trainer.run(steps, progress=False)]
    return logits_of(model), losses, max(held, default=0), len(held) / steps


def assert_that_of_one_process(results: list, **steps) -> None:
    logits, losses, *_ = straight_through(0, **steps)
    for theirs, seen, *_ in results:
        assert_same_bits(theirs, results[0][0])
        for one, other in zip(theirs, logits, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert seen == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    ("world", "accumulate", "kind", "most_held", "sums"),
    [
        # inside backward, a layer at a time, where each rank has one batch and takes the same way
        (2, 2, None, 1, 2),
        (2, 2, Checkpointed, 1, 3),
        (2, 2, Unreached, 1, 1),
        # with that of a layer that has two gradients in backward
        (2, 2, Twice, 2, 3),
        # else when backward has ended: always, or in the one step of the four whose batches differ
        (2, 4, None, 2, 2),
        (2, 2, TwoWays, 2, 2.25),
        (2, 2, Auxiliary, 3, 3),
    ],
)
def test_straight_through_on_ranks_is_that_of_one_process(world, accumulate, kind, most_held, sums, eager_reference):
    steps = {"accumulate": accumulate, "steps": 4, "kind": kind}
    results = all_in_ranks(world, straight_through, **steps)
    assert_that_of_one_process(results, **steps)
    assert max(held for _, _, held, _ in results) == most_held
    assert all(count == sums for *_, count in results)


@pytest.mark.parametrize("expected_turns", [["third", "second", "first"], slow(["second"])], ids=str)
def test_turns_that_backward_does_not_take_cost_memory_alone(expected_turns, eager_reference):
    """Layers are not mixed up even if all ranks expect wrong layers, or a wrong order, in backward."""
    steps = {"accumulate": 2, "steps": 4, "kind": Auxiliary}
    results = all_in_ranks(2, straight_through, expected_turns=expected_turns, **steps)
    assert_that_of_one_process(results, **steps)


def trained_weights(rank: int, how: str, accumulate: int, kind: type[nn.Module], folder=None):
    """(weights, logits, what the weights learn by) after two steps, and after two more of a trainer that resumes."""
    held = []
    for _ in range(2):
        model = kind()
        mk.convert(model, "2:4", gap=2.0)
        trainer = rank_trainer(how, model=model, accumulate=accumulate, output_dir=folder)
        if held:
            # the model has the weights of the start; rank 0 alone reads the folder
            assert trainer.resume() == 2
        trainer.run(2, progress=False)
        weights = [layer.weight.detach().clone() for layer in trainer.layers.values()]
        learned_by = [tensor.clone() for tensor in trainer.estimator.tensors().values()]
        held.append([weights, logits_of(model), learned_by])
        trainer.close()
    return held


@pytest.mark.parametrize("how", ["trained weights", "fixed masks"])
def test_weights_that_learn_on_ranks_are_those_of_one_process(how, tmp_path, eager_reference):
    """A layer moves in its turn, or after backward where it is used twice; a resumed run gives its weights to all."""
    steps = {"how": how, "accumulate": 2, "kind": Twice}
    one, other = all_in_ranks(2, trained_weights, folder=tmp_path / "ranks", **steps)
    alone = trained_weights(0, folder=tmp_path / "alone", **steps)
    for ours, theirs, expected in zip(one, other, alone, strict=True):
        for a, b, c in zip(ours, theirs, expected, strict=True):
            assert_same_bits(a, b)
            torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)
    assert not torch.equal(one[0][0][0], one[1][0][0])


def streamed(rank: int, folder=None, other: int | None = None, resume: bool = False):
    """Logits of a run on batches of a generator; those of rank 1 begin elsewhere where ``other`` says so."""
    rows = some_batches(12)[other if rank and other else 0 :]
    trainer = rank_trainer("straight-through", batches=iter(rows), accumulate=2, output_dir=folder)
    try:
        done = trainer.resume() if resume else 0
        trainer.run(2 if folder and not resume else 4 - done, progress=False)
        return logits_of(trainer.model)
    finally:
        trainer.close()


def test_ranks_with_other_batches_that_are_no_sequence_are_reported(tmp_path):
    for error in in_ranks(2, streamed, other=1):
        assert isinstance(error, ValueError) and "got other batches on rank 1" in str(error)
    all_in_ranks(2, streamed, folder=tmp_path)
    for error in in_ranks(2, streamed, folder=tmp_path, other=1, resume=True):
        assert isinstance(error, ValueError) and "expected those of the run's first 2 steps" in str(error)
