"""Refits: kept values, or factors, of least error, on the inputs of a model that is masked and refitted so far."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.enumerated import KERNEL_DEVICE
from helpers.refits import DTYPES, PATTERNS, Blocks, inputs, problem
from helpers.tiny_llama import tiny_model
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.prune import refit as refits
from maskpro_kernels.prune.calibration import Moments
from maskpro_kernels.prune.refit import FITS, conjugate_gradients, refit_rows, row_errors, target_shift

pytestmark = pytest.mark.usefixtures("eager_reference")


def exact_weights(weight, kept, gram):
    """Least squares of each row over its kept values, in float64; zero where dropped."""
    found = torch.zeros_like(weight, dtype=torch.float64)
    gram = gram.double()
    for row, (w, k) in enumerate(zip(weight.double(), kept, strict=True)):
        found[row, k] = torch.linalg.solve(gram[k][:, k], (gram @ w)[k])
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
def test_conjugate_gradients_end_at_the_least_squares(pattern):
    weight, kept, gram = problem(pattern)
    mask = kept.float()
    found, product = conjugate_gradients(weight, weight * mask, mask, gram, iterations=200, least_fall=0.0)
    torch.testing.assert_close(found.double(), exact_weights(weight, kept, gram), rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(product, (weight - found) @ gram, rtol=1e-3, atol=1e-2)
    assert (found[~kept] == 0).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_stop_rule_leaves_little(pattern):
    weight, kept, gram = problem(pattern, k=64)
    fitted, errors = refit_rows(weight, kept, gram, FITS["weights"])
    best = row_errors(weight.double() - exact_weights(weight, kept, gram), gram.double())
    before, after = errors.double().unbind(1)
    torch.testing.assert_close(before, row_errors((weight * ~kept).double(), gram.double()), rtol=1e-5, atol=1e-5)
    assert (after <= before).all()
    # of what least squares gain the rule leaves a hundredth
    assert ((after - best) <= 0.01 * (before - best)).all()
    assert_same_bits(fitted[~kept], weight[~kept])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_scales_are_the_factors_of_least_error(pattern):
    weight, kept, gram = problem(pattern)
    fitted, errors = refit_rows(weight, kept, gram, FITS["scales"])
    masked = (weight * kept).double()
    factors = ((masked @ gram.double()) * weight).sum(1) / row_errors(masked, gram.double())
    torch.testing.assert_close(fitted.double(), weight.double() * factors[:, None], rtol=1e-5, atol=1e-6)
    best = row_errors(weight - factors[:, None] * masked, gram.double())
    torch.testing.assert_close(errors[:, 1].double(), best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to", FITS)
def test_the_error_of_no_row_rises(to, dtype):
    """With the rounded values: rows which a refit cannot help stay unchanged."""
    weight, kept, gram = problem("2:4", rows=40, dtype=dtype)
    # nothing is cut from these rows, or all is cut that they have, or nothing is there
    weight[0, ~kept[0]] = 0
    weight[1, kept[1]] = 0
    weight[2] = 0
    fitted, errors = refit_rows(weight, kept, gram, FITS[to])
    assert fitted.dtype == dtype and torch.isfinite(fitted).all()
    recomputed = row_errors(weight.double() - (fitted * kept).double(), gram.double())
    before = row_errors((weight * ~kept).double(), gram.double())
    assert (recomputed <= before).all()
    # a factor near 1 may round to it
    assert (recomputed < before).float().mean() > 0.9 - 0.2 * (to == "scales")
    torch.testing.assert_close(errors.double(), torch.stack([before, recomputed], 1), rtol=1e-4, atol=1e-4)
    for row in (0, 2):
        assert_same_bits(fitted[row], weight[row])


def test_what_float16_cannot_hold_leaves_the_row():
    weight, kept, gram = problem("2:4", dtype=torch.float16)
    weight[0] = torch.where(kept[0], 3e4, 2.9e4)
    kept[0] = torch.arange(48, device=kept.device) % 4 < 2
    # all inputs alike: kept values have to double
    gram = torch.ones_like(gram) + 1e-3 * torch.eye(48, device=gram.device)
    weight[0, 0], kept[0, 1:] = 6e4, False
    fitted, errors = refit_rows(weight, kept, gram, FITS["weights"])
    assert_same_bits(fitted[0], weight[0])
    assert errors[0, 0] == errors[0, 1]


def test_rows_do_not_depend_on_each_other(monkeypatch):
    weight, kept, gram = problem("2:4", rows=9)
    whole, _ = refit_rows(weight, kept, gram, FITS["weights"])
    monkeypatch.setattr(refits, "PIECE", 2 * 48)
    pieces, _ = refit_rows(weight, kept, gram, FITS["weights"])
    torch.testing.assert_close(whole, pieces, rtol=1e-5, atol=1e-6)


def seen_by(model, layer, batches) -> torch.Tensor:
    """Inputs of a layer, [tokens, K] in float64."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for x in batches:
            model(x)
    handle.remove()
    return torch.cat(seen).double()


@pytest.mark.parametrize("to", FITS)
def test_each_layer_sees_the_inputs_of_the_model_refitted_so_far(to, monkeypatch):
    """By hand: the whole model and the dense one run for every layer, whose weight is then replaced."""
    # to the end: the order of sums differs, and a row might end an iteration sooner
    monkeypatch.setattr(refits, "conjugate_gradients", partial(conjugate_gradients, iterations=99, least_fall=0))
    model, batches = Blocks().to(KERNEL_DEVICE), inputs()
    mk.convert(model, "2:4")
    by_hand = Blocks().to(KERNEL_DEVICE).eval()
    whole = Blocks().to(KERNEL_DEVICE).eval()
    mk.convert(by_hand, "2:4")
    dense = {name: layer.weight.clone() for name, layer in masked_layers(model).items()}
    for name, layer in masked_layers(by_hand).items():
        x = seen_by(by_hand, layer, batches)
        d = seen_by(whole, whole.get_submodule(name), batches)
        w = dense[name].detach().double()
        gram = x.T @ x
        damping = 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=x.dtype, device=x.device)
        # half of the target is the output on the present inputs, half that of the dense model
        moments = 0.5 * gram @ w.T + 0.5 * x.T @ d @ w.T + damping @ w.T
        target = torch.linalg.solve(gram + damping, moments).T
        kept = mk.expand_mask(mk.top_n_mask(layer.logits.detach(), "2:4"), "2:4")
        if to == "weights":
            fitted = torch.where(kept, exact_weights(target, kept, gram + damping), w)
        else:
            masked = w * kept
            product = masked @ (gram + damping)
            fitted = w * ((product * target).sum(1) / (product * masked).sum(1))[:, None]
        layer.weight.data.copy_(fitted)
    done = []
    shares = mk.refit(model, batches, to, progress=lambda *counts: done.append(counts))
    assert done == [(count, 4) for count in range(5)]
    assert list(shares) == list(masked_layers(model)) and all(0 < share < 1 for share in shares.values())
    for (name, layer), other in zip(masked_layers(model).items(), masked_layers(by_hand).values(), strict=True):
        assert (layer.weight - other.weight).norm() < 0.01 * (dense[name] - other.weight).norm(), name
        assert_same_bits(layer.bias, other.bias)
        assert_same_bits(layer.logits, other.logits)
        assert layer.weight_changed and not layer.weight.requires_grad and not layer.weight.is_inference()


def test_the_target_without_inputs_of_the_dense_model_is_the_dense_weight():
    gram = torch.diag(torch.arange(1.0, 9.0))
    assert target_shift(Moments(gram)) is None
    # equal inputs
    torch.testing.assert_close(target_shift(Moments(gram, gram.clone())), torch.zeros(8, 8))
    # no inputs at all
    assert target_shift(Moments(torch.zeros(8, 8), torch.zeros(8, 8))) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, slow(torch.float16)], ids=str)
def test_a_language_model_comes_nearer_to_the_dense_one(dtype):
    batches = list(torch.randint(0, 32, (4, 4, 16), generator=torch.Generator().manual_seed(0)))
    outputs = {}
    for to in ("dense", "none", *FITS):
        model = tiny_model(attention_bias=True, mlp_bias=True).to(dtype)
        if to != "dense":
            mk.convert(model, "2:4", init="reconstruction", calibration=batches)
        if to in FITS:
            mk.refit(model, batches, to)
            mk.finalize(model)
        with torch.no_grad():
            outputs[to] = torch.cat([model.eval()(batch).logits.float() for batch in batches])
    distance = {to: float((found - outputs["dense"]).square().mean()) for to, found in outputs.items()}
    assert distance["weights"] < 0.9 * distance["none"] and distance["scales"] < distance["none"], distance


def test_layers_of_several_patterns_and_a_shared_weight():
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)).to(
        KERNEL_DEVICE
    )
    model[4].weight = model[0].weight
    dense = model[0].weight.detach().clone()
    mk.convert(model, "2:4", targets=["0"])
    mk.convert(model, "4:8", targets=["2"])
    mk.refit(model, inputs())
    assert (model[0].weight != dense).any() and model[2].weight_changed
    assert_same_bits(model[4].weight, dense)


def refused(model, error, message, **given):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        mk.refit(**{"model": model, "calibration": inputs()} | given)
    assert_same_bits(dict(model.state_dict()), before)
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in model.modules())


def test_bad_arguments_change_nothing():
    model = Blocks().to(KERNEL_DEVICE)
    refused(model, ValueError, "model: expected a model with MaskedLinear layers, got none")
    mk.convert(model, "2:4")
    refused(model, ValueError, "to: expected one of scales, weights, got 'bias'", to="bias")
    refused(model, ValueError, "calibration: expected at least one batch, got none", calibration=[])
    refused(model, TypeError, "calibration: expected an iterable of batches, got int", calibration=3)
    refused(model, TypeError, "calibration: expected an iterable of batches, got str", calibration="abc")
    model.unused = mk.MaskedLinear.from_linear(nn.Linear(8, 8, device=KERNEL_DEVICE), "2:4")
    refused(model, ValueError, r"calibration: .*run every layer, \['unused'\] got no input")
    del model.unused
    mk.refit(model, inputs())
    refused(
        model,
        ValueError,
        "model: expected dense weights, .* got refitted or trained ones in blocks.0.0; load and convert",
    )


def test_an_error_on_the_way_changes_nothing():
    model = Blocks().to(KERNEL_DEVICE)
    mk.convert(model, "2:4")

    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    refused(model, KeyboardInterrupt, None, progress=interrupt)


class Routed(nn.Module):
    """A layer, and two experts in a list, to which its outputs send the tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 32)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            chosen = (x.sum(-1) > 0) == bool(i)
            y[chosen] = expert(x[chosen])
        return y


def test_experts_in_a_list_are_refitted_to_their_dense_weights():
    """Masks send tokens to other experts, so that inputs of the dense model belong to other tokens."""
    model = Routed().to(KERNEL_DEVICE)
    batches = list(torch.randn(3, 64, 32, generator=torch.Generator().manual_seed(0)).to(KERNEL_DEVICE))
    mk.convert(model, "2:4")
    shares = mk.refit(model, batches, "weights")
    assert set(shares) == {"first", "experts.0", "experts.1"} and all(0 < share < 1 for share in shares.values())
