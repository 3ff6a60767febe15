"""int4 values by GPTQ under a mask: smaller errors of outputs, scales at their minimum."""

from __future__ import annotations

import copy

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
    inputs = torch.randn(400, k // 8, generator=generator) @ torch.randn(k // 8, k, generator=generator)
    inputs += 0.3 * torch.randn(400, k, generator=generator)
    return model, {"0": mk.top_n_mask(model[0].weight.abs(), pattern)}, list(inputs.to(dtype).split(200))


def rounded(pattern: str, k: int, group: int, dtype: torch.dtype = torch.float32):
    """(masked weight, rounded weight, its packed form, H), in float32."""
    model, codes, batches = problem(pattern, k, dtype)
    packed = gptq(model, {"0": model[0]}, codes, {"0": NMPattern(pattern)}, batches, group)["0"].check()
    kept = mk.expand_mask(codes["0"], pattern)
    values = packed.to(torch.float32).unpack()
    assert packed.group == group and not values[~kept].any()
    x = torch.cat(batches).float()
    return model[0].weight.detach().float() * kept, values, packed, x.T @ x


@pytest.mark.parametrize(("pattern", "k", "group"), [("2:4", 320, 64), ("3:4", 128, 32), ("4:8", 100 * 8, 128)])
def test_errors_are_a_fraction_of_those_of_the_nearest_values(pattern, k, group):
    weight, values, _, gram = rounded(pattern, k, group)
    nearest = mk.pack_nm(weight, pattern, "int4", group).unpack()
    ours, theirs = row_errors(weight - values, gram), row_errors(weight - nearest, gram)
    assert (ours < theirs).all() and ours.sum() < 0.4 * theirs.sum()


@pytest.mark.parametrize("without", ["rounds", "compensation"])
def test_each_step_lowers_the_error(without, monkeypatch):
    weight, values, _, gram = rounded("2:4", 320, 64)
    if without == "rounds":
        monkeypatch.setattr(module, "ROUNDS", 0)
    else:
        monkeypatch.setattr(module, "inverse_factor", lambda gram: torch.eye(len(gram)))
    weight, others, *_ = rounded("2:4", 320, 64)
    assert row_errors(weight - values, gram).sum() < 0.95 * row_errors(weight - others, gram).sum()


def test_scales_are_at_the_minimum_for_the_integers():
    weight, values, packed, gram = rounded("2:4", 128, 32)
    gram.diagonal().add_(module.DAMPING * gram.diagonal().mean())
    error = row_errors(weight - values, gram)
    for block in range(2):
        for change in (0.99, 1.01):
            # 32 kept values of 2:4 have 64 columns
            other = values.clone()
            other[:, 64 * block : 64 * (block + 1)] *= change
            assert (row_errors(weight - other, gram) >= error * (1 - 1e-4)).all()


def test_rows_do_not_depend_on_each_other_and_scales_have_the_dtype_of_the_weight(monkeypatch):
    _, values, packed, _ = rounded("1:4", 256, 32, torch.bfloat16)
    assert packed.scales.dtype == torch.bfloat16
    monkeypatch.setattr(module, "PIECE", 5 * 256)
    torch.testing.assert_close(rounded("1:4", 256, 32, torch.bfloat16)[1], values)


def test_a_layer_sees_the_outputs_of_the_rounded_layers_before_it():
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 8, bias=False))
    mk.convert(model, "2:4")
    x, codes = torch.randn(200, 64, generator=generator), mk.top_n_mask(model[1].logits, "2:4")
    after = copy.deepcopy(model[1:])
    mk.finalize(model, "packed", "int4", 32, calibration=[x])
    assert model[0].kind == model[1].kind == "int4"
    alone = gptq(after, {"0": after[0]}, {"0": codes}, {"0": NMPattern("2:4")}, [x @ model[0].weight.T], 32)["0"]
    assert torch.equal(model[1].values, alone.values) and torch.equal(model[1].scales, alone.scales)


def test_batches_are_for_int4_alone_and_after_an_error_the_model_is_unchanged():
    model = nn.Sequential(nn.Linear(64, 8))
    mk.convert(model, "2:4")
    for values, batches, reported in (
        ("int8", [torch.ones(1, 64)], "calibration: expected none but for"),
        ("int4", [], "calibration: expected at least one batch"),
        ("int4", [torch.full((1, 64), torch.nan)], "calibration: expected inputs whose"),
        ("int4", "abc", "calibration: expected an iterable of batches, got str"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{reported}"):
            mk.finalize(model, "packed", values, calibration=batches)
        assert isinstance(model[0], mk.MaskedLinear)


def test_a_layer_whose_inputs_are_all_zero_keeps_its_weights():
    model = nn.Sequential(nn.Linear(64, 8))
    mk.convert(model, "2:4")
    nearest = mk.finalize(copy.deepcopy(model), "packed", "int4", 32)[0].weight
    weight = mk.finalize(model, "packed", "int4", 32, calibration=[torch.zeros(3, 64)])[0].weight
    torch.testing.assert_close(weight, nearest, rtol=0.0, atol=0.05)


@pytest.mark.parametrize("exponent", [-80, 80])
def test_integers_do_not_depend_on_the_size_of_the_weight(exponent):
    model, codes, batches = problem("2:4", 128)
    found = []
    for factor in (1.0, 2.0**exponent):
        with torch.no_grad():
            model[0].weight *= factor
        found.append(gptq(model, {"0": model[0]}, codes, {"0": NMPattern("2:4")}, batches, 32)["0"])
    assert torch.equal(found[0].values, found[1].values)
    torch.testing.assert_close(found[0].scales * factor, found[1].scales)
