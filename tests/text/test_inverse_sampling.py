"""Indices come as often as they are likely."""

from __future__ import annotations

import pytest
import torch

from maskpro_kernels.text.inverse_sampling import BLOCK, drawn_indices


@pytest.mark.parametrize("count", [7, BLOCK, BLOCK + 44])
def test_indices_come_as_often_as_they_are_likely(count):
    """Whether they are a part of a block of sums, one, or more than one."""
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(1, count, generator=generator)
    logits[0, count // 2] = -torch.inf
    probabilities = logits.softmax(-1)
    uniform = torch.rand(1 << 17, generator=generator, dtype=torch.float64)
    uniform[0], uniform[1] = 0.0, 1 - 2**-53
    drawn = torch.cat([drawn_indices(probabilities.expand(len(part), -1), part) for part in uniform.split(1 << 14)])
    assert drawn[:2].tolist() == [0, count - 1]
    expected = probabilities[0].double() * len(drawn)
    counts = torch.bincount(drawn, minlength=count)
    assert counts[count // 2] == 0
    assert ((counts - expected).abs() < 6 * expected.sqrt() + 6).all()
    chi_square = ((counts - expected) ** 2 / expected.clamp(min=1e-9))[expected > 0].sum()
    assert chi_square < count + 6 * (2 * count) ** 0.5


def test_weights_need_not_sum_to_one():
    weights = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0]]).expand(4, -1)
    uniform = torch.tensor([0.0, 0.74, 0.75, 0.99], dtype=torch.float64)
    assert drawn_indices(weights, uniform).tolist() == [1, 1, 3, 3]
