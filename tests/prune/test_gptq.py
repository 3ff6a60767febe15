"""int4 values by GPTQ under a mask: smaller errors of outputs, the mask as it was, scales at their minimum."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.ops.pattern import NMPattern
from maskpro_kernels.prune import gptq as module
from maskpro_kernels.prune.gptq import gptq
from maskpro_kernels.prune.refit import row_errors

pytestmark = pytest.mark.usefixtures("eager_reference")


def problem(pattern: str, k: int, dtype: torch.dtype = torch.float32):
    """(model of one layer, its codes, correlated inputs in two batches)."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(k, 24, bias=False, dtype=dtype))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(24, k, generator=generator))
    inputs = torch.randn(300, k, generator=generator) @ torch.randn(k, k, generator=generator)
    return model, {"0": mk.top_n_mask(model[0].weight.abs(), pattern)}, list(inputs.to(dtype).split(150))


def rounded(pattern: str, k: int, group: int, dtype: torch.dtype = torch.float32):
    """(masked weight, rounded weight, integers, scales, H), all in float32."""
    model, codes, batches = problem(pattern, k, dtype)
    integers, scales = gptq(model, {"0": model[0]}, codes, {"0": NMPattern(pattern)}, batches, group)["0"]
    kept = mk.expand_mask(codes["0"], pattern)
    each = scales.float().repeat_interleave(group, 1)[:, : integers.shape[1]]
    values = torch.zeros(kept.shape).masked_scatter_(kept, integers * each)
    x = torch.cat(batches).float()
    return model[0].weight.detach().float() * kept, values, integers, scales, x.T @ x


@pytest.mark.parametrize(("pattern", "k", "group"), [("2:4", 320, 64), ("3:4", 128, 32), ("4:8", 100 * 8, 128)])
def test_errors_are_a_fraction_of_those_of_the_nearest_values(pattern, k, group):
    weight, values, integers, scales, gram = rounded(pattern, k, group)
    assert integers.dtype == torch.int8 and integers.min() >= -8 and integers.max() <= 7
    assert scales.shape == (24, -(-integers.shape[1] // group)) and scales.dtype == torch.float32
    nearest = mk.pack_nm(weight, pattern, "int4", group).unpack()
    ours, theirs = row_errors(weight - values, gram), row_errors(weight - nearest, gram)
    assert (ours < theirs).all() and ours.sum() < 0.4 * theirs.sum()


@pytest.mark.parametrize("without", ["rounds", "compensation"])
def test_each_step_lowers_the_error(without, monkeypatch):
    weight, values, *_, gram = rounded("2:4", 320, 64)
    if without == "rounds":
        monkeypatch.setattr(module, "ROUNDS", 0)
    else:
        monkeypatch.setattr(module, "inverse_factor", lambda gram: torch.eye(len(gram)))
    weight, others, *_ = rounded("2:4", 320, 64)
    assert row_errors(weight - values, gram).sum() < 0.95 * row_errors(weight - others, gram).sum()


def test_scales_are_at_the_minimum_and_integers_are_the_best_ones():
    weight, values, integers, scales, gram = rounded("2:4", 128, 32)
    gram.diagonal().add_(module.DAMPING * gram.diagonal().mean())
    error = row_errors(weight - values, gram)
    kept = weight != 0
    for change in (0.99, 1.01):
        for block in range(scales.shape[1]):
            part = torch.zeros_like(integers).bool()
            part[:, block * 32 : (block + 1) * 32] = True
            other = values.masked_scatter(kept, torch.where(part, change, 1.0) * values[kept].view_as(integers))
            assert (row_errors(weight - other, gram) >= error * (1 - 1e-4)).all()


def test_numbers_of_16_bits_and_a_model_of_several_layers(monkeypatch):
    weight, values, integers, scales, gram = rounded("1:4", 128, 32, torch.bfloat16)
    assert scales.dtype == torch.bfloat16
    # rows do not depend on each other
    monkeypatch.setattr(module, "PIECE", 5 * 128)
    again = rounded("1:4", 128, 32, torch.bfloat16)
    torch.testing.assert_close(again[1], values)
    # the second layer sees what the first one rounded gives
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 8, bias=False))
    batches, layers = [torch.randn(200, 64, generator=generator)], dict(model.named_children())
    codes = {name: mk.top_n_mask(layer.weight.detach().abs(), "2:4") for name, layer in layers.items()}
    both = gptq(model, layers, codes, dict.fromkeys(layers, NMPattern("2:4")), batches, 32)
    kept = mk.expand_mask(codes["0"], "2:4")
    integers, scales = both["0"]
    first = torch.zeros(64, 64).masked_scatter_(kept, integers * scales.repeat_interleave(32, 1))
    alone = gptq(
        model[1:], {"0": model[1]}, {"0": codes["1"]}, {"0": NMPattern("2:4")}, [batches[0] @ first.T], 32
    )["0"]
    assert torch.equal(both["1"][0], alone[0])
