"""What REINFORCE's baselines are worth: forwards until the noise of its update is as small as the gradient.

    python benchmarks/variance.py

One output of a Linear at 2:4; the logits are those of a converted model, the gap on the magnitude mask. The loss of a
batch is the mean squared error against the dense output. A step of K draws makes K forwards and gives an estimate of
the gradient. K times its variance, summed over the logits, over the squared norm of the gradient, both as means over
the batches, is what is printed: so many forwards bring the standard deviation of their mean estimate down to the norm
of the gradient. The forwards under the initial mask, made once in a run, are not counted.

With six groups all 46,656 masks are listed, and the figures are exact, in float64. Antithetic pairs, whose second draw
has the complement of the first one's noise, are sampled, with standard errors, beside independent draws.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

N, M = 2, 4
SETS = list(combinations(range(M), N))
KEPT = torch.tensor([[i in kept for i in range(M)] for kept in SETS], dtype=torch.float64)
TOKENS = 16
ALPHA = 0.99
DRAWS = (2, 4, 8)
# Elements that a chunk of samples holds for each draw
CHUNK = 1 << 20


class Problem(NamedTuple):
    """Groups whose masks have a loss, in float64.

    Attributes:
        weight, logits: [groups, M].
        inputs: [batches, TOKENS, groups * M].
        initial: losses under the magnitude mask, [batches].
        probabilities: of each of the sets of a group, [groups, sets].
        scores: of each of the sets of a group, [groups, sets, M].
    """

    weight: Tensor
    logits: Tensor
    inputs: Tensor
    initial: Tensor
    probabilities: Tensor
    scores: Tensor


class Listed(NamedTuple):
    """All masks of a problem: their probabilities [masks], scores [masks, groups * M], losses [batches, masks]."""

    probabilities: Tensor
    scores: Tensor
    losses: Tensor

    @property
    def gradients(self) -> Tensor:
        """Of the expected loss of each batch, [batches, groups * M]."""
        return (self.losses * self.probabilities) @ self.scores


def set_probabilities(logits: Tensor) -> Tensor:
    """Of the ``SETS`` of a group [M]: its two weights are drawn in the one order or in the other."""
    p = logits.softmax(0)
    return torch.stack([p[a] * p[b] * (1 / (1 - p[a]) + 1 / (1 - p[b])) for a, b in SETS])


def losses_of(weight: Tensor, inputs: Tensor, kept: Tensor) -> Tensor:
    """[batches, ...] of masks [..., groups, M]."""
    lost = (weight * (kept - 1.0)).flatten(-2)
    return torch.stack([(lost @ x.T).square().mean(-1) for x in inputs])


def problem(gap: float, groups: int = 6, batches: int = 4, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, M, dtype=torch.float64, generator=generator)
    mixing = torch.randn(groups * M, groups * M, dtype=torch.float64, generator=generator) / math.sqrt(groups * M)
    inputs = torch.randn(batches, TOKENS, groups * M, dtype=torch.float64, generator=generator) @ mixing
    # batches differ in scale, as texts do in difficulty
    inputs *= torch.linspace(0.5, 1.5, batches, dtype=torch.float64)[:, None, None]
    initial = torch.zeros_like(weight).scatter_(1, weight.abs().topk(N).indices, 1.0)
    logits = gap * initial

    def log_probabilities(row: Tensor) -> Tensor:
        return set_probabilities(row).log()

    return Problem(
        weight,
        logits,
        inputs,
        losses_of(weight, inputs, initial),
        torch.stack([set_probabilities(row) for row in logits]),
        torch.stack([torch.autograd.functional.jacobian(log_probabilities, row) for row in logits]),
    )


def listed(task: Problem) -> Listed:
    groups = torch.arange(len(task.weight))
    # [masks, groups]: which set each group has
    places = torch.cartesian_prod(*[torch.arange(len(SETS))] * len(groups)).view(-1, len(groups))
    losses = losses_of(task.weight, task.inputs, KEPT[places])
    return Listed(task.probabilities[groups, places].prod(1), task.scores[groups, places].flatten(1), losses)


def exact(task: Problem, alpha: float = ALPHA) -> dict[str, float]:
    """Variance of an estimate times its forwards, by estimator.

    The tracker is that of a long run at these logits, over batches in random order: its mean is that of the residuals,
    its variance theirs times (1 - alpha) / (1 + alpha).
    """
    masks = listed(task)
    p, squares, signal = masks.probabilities, masks.scores.square().sum(1), masks.gradients.square().sum(1)
    residuals = masks.losses - task.initial[:, None]
    determined = (residuals @ p).mean()
    spread = ((residuals - determined).square() @ p).mean() * (1 - alpha) / (1 + alpha)

    def of_one_draw(tracker: Tensor | float, spread: Tensor | float) -> float:
        return float((((residuals - tracker).square() + spread) @ (p * squares) - signal).mean())

    found = {"1 draw, residual": of_one_draw(0.0, 0.0), "1 draw, residual and tracker": of_one_draw(determined, spread)}
    centred = masks.losses - (masks.losses @ p)[:, None]
    own, others = centred.square() @ (p * squares), (centred.square() @ p) * (p @ squares)
    for draws in DRAWS:
        # two draws have each other's loss in their baselines
        together = (draws - 1) * signal * (1 + 1 / (draws - 1) ** 2)
        found[f"{draws} draws, leave-one-out"] = float((own + others / (draws - 1) + together - draws * signal).mean())
    return found


class Sampled(NamedTuple):
    """Of an estimator by samples: variance times forwards, its standard error, mean estimate [batches, groups * M]."""

    variance: float
    error: float
    mean: Tensor


def sampled(task: Problem, antithetic: bool, samples: int, seed: int = 0) -> dict[str, Sampled]:
    """Two draws against initial loss and a tracker that has determined; four, each against the others.

    Of antithetic draws the others are those of the other pair: the own partner would bias the estimate.
    """
    generator, groups = torch.Generator().manual_seed(seed), torch.arange(len(task.weight))
    table = torch.zeros(M, M, dtype=torch.int64)
    for place, (a, b) in enumerate(SETS):
        table[a, b] = table[b, a] = place

    def draw(size: int) -> tuple[Tensor, Tensor]:
        """(losses [batches, size, 4], sets [size, 4, groups])."""
        shape = (size, 2 if antithetic else 4, *task.logits.shape)
        noise = torch.rand(shape, dtype=torch.float64, generator=generator)
        noise = torch.stack([noise, 1.0 - noise], 2).flatten(1, 2) if antithetic else noise
        first, second = (task.logits - (-noise.log()).log()).topk(N).indices.unbind(-1)
        places = table[first, second]
        return losses_of(task.weight, task.inputs, KEPT[places]), places

    size = max(CHUNK // task.logits.numel(), 1)
    against = task.initial + (draw(size)[0].mean((1, 2)) - task.initial).mean()
    squares: dict[str, list[Tensor]] = {}
    sums: dict[str, Tensor | float] = {}
    for begin in range(0, samples, size):
        losses, places = draw(min(size, samples - begin))
        if antithetic:
            others = losses.unflatten(2, (2, 2)).mean(3).flip(2).repeat_interleave(2, 2)
        else:
            others = (losses.sum(2, keepdim=True) - losses) / 3
        scores = task.scores[groups, places].flatten(2)
        for name, advantages in {
            "2 draws, residual and settled tracker": losses[..., :2] - against[:, None, None],
            "4 draws, leave-one-out": losses - others,
        }.items():
            count = advantages.shape[2]
            estimates = torch.einsum("bsk,skw->bsw", advantages, scores[:, :count]) / count
            squares.setdefault(name, []).append(count * estimates.square().sum(2).mean(0))
            sums[name] = sums.get(name, 0.0) + estimates.sum(1)
    found = {}
    for name, parts in squares.items():
        whole, mean, count = torch.cat(parts), sums[name] / samples, int(name[0])
        variance = float(whole.mean() - count * mean.square().sum(1).mean()) * samples / (samples - 1)
        found[name] = Sampled(variance, float(whole.std()) / math.sqrt(samples), mean)
    return found


def print_table(title: str, gaps: Sequence[float], rows: dict[str, list[str]]) -> None:
    print(f"| {title} | " + " | ".join(f"gap {gap:g}" for gap in gaps) + " |")
    print("|---|" + "---:|" * len(gaps))
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description="forwards until noise is as small as the gradient, by estimator")
    parser.add_argument("--gaps", type=float, nargs="+", default=[2.0, 5.0, 10.0])
    parser.add_argument("--many", type=int, default=300, help="groups of the problem that is sampled alone")
    parser.add_argument(
        "--sampled-gaps", type=float, nargs="+", default=[2.0, 5.0], help="rare flips need more samples"
    )
    parser.add_argument("--samples", type=int, default=20_000, help="with that many groups; with six 40 times as many")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rows: dict[str, list[str]] = {}
    for gap in args.gaps:
        task = problem(gap, seed=args.seed)
        signal = float(listed(task).gradients.square().sum(1).mean())
        for name, variance in exact(task).items():
            rows.setdefault(name, []).append(f"{variance / signal:.4g}")
    print_table("forwards, 6 groups", args.gaps, rows)

    rows = {}
    for groups, samples in ((6, 40 * args.samples), (args.many, args.samples)):
        for gap in args.sampled_gaps:
            task = problem(gap, groups, seed=args.seed)
            independent, pairs = (sampled(task, antithetic, samples, args.seed) for antithetic in (False, True))
            for name, pair in pairs.items():
                ratio = pair.variance / independent[name].variance
                error = ratio * math.hypot(
                    pair.error / pair.variance, independent[name].error / independent[name].variance
                )
                rows.setdefault(f"{name}, {groups} groups", []).append(f"{ratio:.3f} +- {error:.3f}")
    print()
    print_table("variance of antithetic pairs over that of independent draws", args.sampled_gaps, rows)


if __name__ == "__main__":
    main()
