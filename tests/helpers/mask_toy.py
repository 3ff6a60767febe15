"""One layer whose best mask is known by enumeration, and is neither that of magnitude nor that of Wanda."""

from __future__ import annotations

from itertools import combinations, product

import torch
from torch import Tensor, nn

import maskpro_kernels as mk


def inputs(batches: int = 4, tokens: int = 64) -> list[Tensor]:
    """[tokens, 8] each: in each group the last two are much alike."""
    generator = torch.Generator().manual_seed(3)
    columns = []
    for _ in range(2):
        first, second, third, own = torch.randn(4, batches, tokens, generator=generator)
        columns += [first, second, third, 0.9 * third + 0.44 * own]
    return list(torch.stack(columns, -1))


def toy() -> nn.Sequential:
    """A layer in which magnitude drops the two weights with equal inputs, whose outputs are then both lost."""
    layer = nn.Linear(8, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, 1.0, 0.95, 0.85], [-1.0, 2.0, -0.8, -0.95]]).repeat(1, 2))
    return nn.Sequential(layer)


def errors(weight: Tensor, xs: list[Tensor]) -> dict[tuple, Tensor]:
    """Squared error of the outputs of each row, by the mask that all rows have: kept places of its two groups."""
    gram = sum((x.T @ x).double() for x in xs)
    found = {}
    for first, second in product(combinations(range(4), 2), repeat=2):
        kept = torch.zeros(8, dtype=torch.float64)
        kept[list(first)] = kept[[4 + place for place in second]] = 1.0
        lost = weight.detach().double() * (kept - 1.0)
        found[first, second] = ((lost @ gram) * lost).sum(1)
    return found


def best_mask(weight: Tensor, xs: list[Tensor]) -> Tensor:
    """bool [rows, 8]."""
    found = errors(weight, xs)
    masks, costs = list(found), torch.stack(list(found.values()))
    best = torch.zeros(len(weight), 8, dtype=torch.bool)
    for row, place in enumerate(costs.argmin(0).tolist()):
        first, second = masks[place]
        best[row, [*first, *(4 + at for at in second)]] = True
    return best


def learned_mask(layer: mk.MaskedLinear) -> Tensor:
    return mk.expand_mask(mk.top_n_mask(layer.logits.detach(), layer.pattern), layer.pattern)
