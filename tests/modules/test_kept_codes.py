"""Codes of the N largest logits, which a layer in eval mode keeps while its logits stay as they are."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.enumerated import KERNEL_DEVICE
from helpers.products import normal
from torch import distributed as dist
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import maskpro_kernels as mk
from maskpro_kernels.modules import evaluating
from maskpro_kernels.ranks import Ranks


@pytest.fixture
def layer():
    linear = nn.Linear(32, 8)
    return mk.MaskedLinear.from_linear(linear, "2:4", init="magnitude").to(KERNEL_DEVICE).eval()


X = normal(3, 32)


def expected(layer: mk.MaskedLinear) -> torch.Tensor:
    kept = mk.expand_mask(mk.top_n_mask(layer.logits.detach(), layer.pattern), layer.pattern)
    return nn.functional.linear(X.to(layer.weight.dtype), torch.where(kept, layer.weight, 0), layer.bias)


def assert_chosen(layer, launched, times: int) -> None:
    """The forward is right, and has chosen the N largest as often as expected."""
    launched.clear()
    y = layer(X.to(layer.weight.dtype))
    chosen = launched["top_n_mask"]
    torch.testing.assert_close(y, expected(layer), rtol=1e-5, atol=1e-5)
    assert chosen == times


def test_evaluation_forwards_choose_once(layer, launched):
    with torch.no_grad():
        assert_chosen(layer, launched, 1)
        assert_chosen(layer, launched, 0)
    # also for a backward
    y = layer(X.requires_grad_())
    y.sum().backward()
    X.requires_grad_(False)
    assert_chosen(layer, launched, 0)
    # what may be written to a file is chosen again
    launched.clear()
    layer.top_n_weight()
    assert launched["top_n_mask"] == 1


CHANGES = {
    "in place": lambda layer: layer.logits.mul_(-1.0),
    "optimizer": lambda layer: step_of_optimizer(layer),
    "update": lambda layer: mk.ops.descend_(
        layer.logits, layer.logits.detach().clone(), torch.tensor(2.0), 1e9, 4, layer.counter()
    ),
    "state_dict": lambda layer: layer.load_state_dict(layer.state_dict() | {"logits": -layer.logits.detach()}),
    "assigned state_dict": lambda layer: layer.load_state_dict(
        layer.state_dict() | {"logits": -layer.logits.detach()}, assign=True
    ),
    "another parameter": lambda layer: setattr(layer, "logits", nn.Parameter(-layer.logits.detach())),
    "other memory": lambda layer: setattr(layer.logits, "data", -layer.logits.data),
    "mode": lambda layer: (layer.logits.data.mul_(-1.0), layer.eval()),
}


def step_of_optimizer(layer):
    layer.logits.grad = layer.logits.detach().clone()
    torch.optim.SGD([layer.logits], lr=2.0).step()


@pytest.mark.parametrize("change", CHANGES)
def test_changed_logits_are_chosen_from_again(change, layer, launched):
    with torch.no_grad():
        layer(X)
        before = layer.mask
        CHANGES[change](layer)
        assert_chosen(layer, launched, 1)
        assert_chosen(layer, launched, 0)
    assert not torch.equal(layer.mask, before)


def test_a_cast_chooses_again(layer, launched):
    with torch.no_grad():
        layer(X)
        layer.logits.data.mul_(-1.0)
        layer.half().float()
        assert_chosen(layer, launched, 1)


def test_codes_of_inference_mode_serve_a_backward(layer, launched):
    with torch.inference_mode():
        layer(X)
    x = X.clone().requires_grad_()
    launched.clear()
    layer(x).sum().backward()
    assert not launched["top_n_mask"] and x.grad is not None


def test_copies_and_states_have_no_codes(layer, launched):
    with torch.no_grad():
        layer(X)
        states = set(layer.state_dict())
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other.kept_codes is None
            assert_chosen(other, launched, 1)
    assert states == {"weight", "bias", "logits", "_extra_state"}
    assert layer.train().kept_codes is None


def test_an_evaluation_within_training_leaves_nothing(layer, launched):
    layer.train()
    with torch.no_grad(), evaluating(layer):
        layer(X)
        assert layer.kept_codes is not None
    assert layer.kept_codes is None and layer.training


def test_collectives_count_as_changes(layer, monkeypatch):
    """torch does not count what they write."""
    ranks = Ranks()
    ranks.world_size = 2
    for name in ("broadcast", "all_reduce"):
        monkeypatch.setattr(dist, name, lambda tensor, *_, **__: tensor.data.mul_(-1.0))
    monkeypatch.setattr(Ranks, "_group_of", lambda *_: None)
    with torch.no_grad():
        for write in (ranks.broadcast, ranks.all_reduce):
            layer(X)
            write(layer.logits.detach())
            torch.testing.assert_close(layer(X), expected(layer), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trace", [lambda layer: torch.jit.trace(layer, X), lambda layer: make_fx(layer)(X)])
def test_traced_graphs_follow_their_logits(trace, layer):
    with torch.no_grad():
        layer(X)
        graph = trace(layer)
        layer.logits.mul_(-1.0)
        torch.testing.assert_close(graph(X), expected(layer), rtol=1e-5, atol=1e-5)


def test_tensors_of_a_call_are_not_the_layers(layer, launched):
    with torch.no_grad():
        y = layer(X)
        other = functional_call(layer, {"logits": -layer.logits.detach()}, X)
        assert not torch.equal(y, other)
        assert_chosen(layer, launched, 0)


def test_a_compiled_forward_follows_its_logits(layer):
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        layer(X)
        compiled(X)
        layer.logits.mul_(-1.0)
        torch.testing.assert_close(compiled(X), expected(layer), rtol=1e-5, atol=1e-5)
