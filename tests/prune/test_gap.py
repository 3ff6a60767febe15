"""The gap of initial logits, and the rate at which draws flip a group at it."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.enumerated import set_probabilities
from helpers.nets import codes_of
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.prune.convert import flip_rate, gap_for_flip_rate

pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "2:4", "3:4", "2:8", "4:8", "8:16"])
@pytest.mark.parametrize("gap", [0.0, 1.0, 7.0, 20.0])
def test_flip_rate_of_a_gap_is_that_of_the_enumerated_sets(pattern, gap):
    n, m = map(int, pattern.split(":"))
    logits = torch.tensor([gap] * n + [0.0] * (m - n))
    # the sum over the other sets: 1 - p would leave few digits at large gaps
    others = set_probabilities(logits, n)[1:].sum().item()
    assert flip_rate(gap, pattern) == pytest.approx(others, rel=1e-10)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "8:16"])
@pytest.mark.parametrize("gap", [0.0, 0.5, 10.0, 25.9])
def test_gap_for_flip_rate_is_the_inverse(pattern, gap):
    assert gap_for_flip_rate(flip_rate(gap, pattern), pattern) == pytest.approx(gap, abs=1e-6)


@pytest.mark.parametrize("rate", [0.0, 1e-12, 0.9, 1.0, -0.1, math.nan, "0.1", True, None])
def test_flip_rate_out_of_reach_is_refused(rate):
    with pytest.raises((TypeError, ValueError), match="^flip_rate: "):
        gap_for_flip_rate(rate, "2:4")


def test_draws_flip_at_the_rate_asked_for():
    rate, groups = 0.02, 40_000
    model = nn.Sequential(nn.Linear(400, 400))
    conversion = mk.convert(model, "2:4", flip_rate=rate)
    assert flip_rate(conversion.gap, "2:4") == pytest.approx(rate, rel=1e-6)
    flipped = int((model[0].drawn_codes() != codes_of(model[0])).sum())
    assert abs(flipped - rate * groups) < 4 * math.sqrt(groups * rate * (1 - rate))
