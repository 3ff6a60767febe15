"""Random initial masks: uniform, of the seed alone, and of draws that no run makes."""

from __future__ import annotations

from itertools import combinations
from math import comb

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.routes import take_route
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.learn.trainer import MaskTrainer
from maskpro_kernels.ops.philox import MAX_STEPS
from maskpro_kernels.prune.initial_masks import initial_codes


def two_layers(rows=8, k=64, dtype=torch.float32):
    return nn.ModuleDict({name: nn.Linear(k, rows, dtype=dtype) for name in ("a", "b")})


def found(layers, pattern, **seed):
    return initial_codes(layers, pattern, "random", **seed)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "3:4", "4:8"])
def test_each_mask_is_as_frequent_as_any_other(pattern, eager_reference):
    """By a chi-square, and of two neighbouring groups and of two layers each pair of masks as well."""
    n, m = map(int, pattern.split(":"))
    masks = [sum(1 << place for place in kept) for kept in combinations(range(m), n)]
    codes = found(two_layers(500, 24 * m), pattern)
    index = torch.full((1 << m,), -1)
    index[torch.tensor(masks)] = torch.arange(len(masks))
    first, second = (index[codes[name].long()] for name in ("a", "b"))
    assert min(int(first.min()), int(second.min())) == 0

    def check(outcomes, count):
        observed = torch.bincount(outcomes.flatten(), minlength=count).double()
        expected = outcomes.numel() / count
        statistic = float(((observed - expected) ** 2 / expected).sum())
        # five standard deviations of a chi-square
        assert abs(statistic - (count - 1)) < 5 * (2 * (count - 1)) ** 0.5

    assert len(masks) == comb(m, n)
    check(first, len(masks))
    if len(masks) < 10:
        check(first[:, ::2] * len(masks) + first[:, 1::2], len(masks) ** 2)
        check(first * len(masks) + second, len(masks) ** 2)


def test_the_seed_alone_decides(eager_reference):
    weights = two_layers()
    expected = found(weights, "2:4", seed=3)
    torch.manual_seed(1)
    assert_same_bits(found(two_layers(dtype=torch.bfloat16), "2:4", seed=3), expected)
    assert not torch.equal(expected["a"], expected["b"])
    assert not torch.equal(found(weights, "2:4", seed=4)["a"], expected["a"])
    assert_same_bits(found(weights, "2:4"), found(weights, "2:4", seed=0))
    # what is drawn, and where no trainer draws
    zeros = torch.zeros(8, 64)
    assert_same_bits(expected["b"], mk.sample_mask(zeros, "2:4", seed=3, step=MAX_STEPS - 1, layer=1))


def test_no_run_takes_the_step_that_it_is_drawn_at(eager_reference):
    model = nn.Sequential(nn.Linear(8, 8))
    mk.convert(model, "2:4", init="random", seed=5)
    trainer = MaskTrainer(model, lambda model, x: model(x).square().mean(), [torch.ones(2, 8)], mk.Reinforce(), seed=5)
    with pytest.raises(ValueError, match=f"^steps: expected at most {MAX_STEPS - 1} more"):
        trainer.run(MAX_STEPS)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:16"])
def test_all_routes_draw_the_same_masks(pattern, monkeypatch, launched):
    codes = {}
    for route in ("eager", "compiled", "kernels"):
        take_route(monkeypatch, route)
        codes[route] = found(two_layers(), pattern, seed=(1 << 63) - 1)
        assert launched["sample_mask"] == (2 if route == "kernels" else 0)
    assert_same_bits(codes["compiled"], codes["eager"])
    assert_same_bits(codes["kernels"], codes["eager"])


def test_convert_takes_the_seed(eager_reference):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    expected = found({"0": model[0], "1": model[1]}, "2:4", seed=7)
    mk.convert(model, "2:4", init="random", seed=7)
    for name, codes in expected.items():
        assert_same_bits(mk.top_n_mask(model.get_submodule(name).logits.detach(), "2:4"), codes)
