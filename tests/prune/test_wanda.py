"""Initial masks by the weights alone, and by their inputs."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.nets import Net, refused, token_batches
from torch import nn

import maskpro_kernels as mk

pytestmark = pytest.mark.usefixtures("eager_reference")


def test_wanda_sees_inputs_given_by_keyword():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(8, 4)

        def forward(self, x):
            return self.linear(input=x)

    x = torch.randn(5, 8) * torch.arange(8)
    model = ByKeyword()
    scores = model.linear.weight.detach().abs() * x.norm(dim=0)
    mk.convert(model, "2:4", init="wanda", calibration=[x])
    assert_same_bits(mk.top_n_mask(model.linear.logits.detach(), "2:4"), mk.top_n_mask(scores, "2:4"))


def test_magnitude_keeps_the_largest_weights():
    model = Net()
    weight = model.first.weight.detach().clone()
    mk.convert(model, "2:4", init="magnitude", gap=6.0)
    groups = weight.abs().view(16, 2, 4)
    kept = (groups >= groups.topk(2).values[..., 1:]).view(16, 8)
    assert_same_bits(model.first.logits, torch.where(kept, 6.0, 0.0))


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping", "generator"])
def test_wanda_weighs_by_the_norm_of_the_inputs(form):
    model, batches = Net(), token_batches()
    inputs = model.embedding(torch.cat(batches)).detach().reshape(-1, 8).double()
    scores = model.first.weight.detach().abs().double() * inputs.square().sum(0).sqrt()
    groups = scores.view(16, 2, 4)
    kept = (groups >= groups.topk(2).values[..., 1:]).view(16, 8)
    assert not torch.equal(kept, mk.expand_mask(mk.top_n_mask(model.first.weight.detach().abs(), "2:4"), "2:4"))
    calibration = {
        "tensor": batches,
        "tuple": [(batch,) for batch in batches],
        "mapping": [{"x": batch} for batch in batches],
        "generator": (batch for batch in batches),
    }[form]
    mk.convert(model, "2:4", init="wanda", calibration=calibration)
    assert_same_bits(model.first.logits, torch.where(kept, 10.0, 0.0))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_wanda_restores_the_mode_of_every_module():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    model.train()
    model[1].eval()
    mk.convert(model, "2:4", init="wanda", calibration=[torch.randn(3, 8)])
    assert [module.training for module in model] == [True, False, True]


def test_wanda_names_the_layer_that_sees_no_input():
    model = Net()
    model.unused = nn.Linear(8, 8)
    refused(model, ValueError, r"^calibration: .*\['unused'\] saw no input", init="wanda", calibration=token_batches())


def test_wanda_leaves_no_hook_behind_when_a_batch_fails():
    refused(Net(), Exception, "index out of range", init="wanda", calibration=[torch.tensor([[99]])])
