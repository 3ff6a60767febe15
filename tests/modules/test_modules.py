"""MaskedLinear as a drop-in nn.Linear, and the counter_state that the layers of a model share."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.bits import assert_same_bits
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.modules import CounterState, counter_states
from maskpro_kernels.ops import dispatch

pytestmark = pytest.mark.usefixtures("eager_reference")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def a_linear(bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(16, 6, bias=bias, dtype=dtype)


def two_layers() -> nn.Sequential:
    """Equal weights on one counter_state: only the layer ids differ. At a gap of 1 most steps change a mask."""
    model = nn.Sequential(a_linear(), nn.ReLU(), nn.Linear(6, 16), nn.Sequential(a_linear()))
    mk.convert(model, "2:4", targets=["0", "3.0"], gap=1.0)
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16), (0, 16)])
def test_replaces_a_linear(shape, bias, dtype, training):
    linear = a_linear(bias, dtype)
    layer = mk.MaskedLinear.from_linear(linear, "2:4").train(training)
    x = torch.randn(shape, dtype=dtype)
    codes = layer.drawn_codes() if training else mk.top_n_mask(linear.weight.detach().abs(), "2:4")
    weight = linear.weight * mk.expand_mask(codes, "2:4")
    y = layer(x)
    assert y.dtype == dtype
    assert_same_bits(y, nn.functional.linear(x, weight, linear.bias))
    assert (layer.in_features, layer.out_features, layer.bias is not None) == (16, 6, bias)


def test_shares_the_weight_and_keeps_logits_in_float32():
    linear = a_linear(dtype=torch.bfloat16)
    layer = mk.MaskedLinear.from_linear(linear, "2:4", gap=7.0)
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    assert layer.logits.dtype == torch.float32
    kept = mk.expand_mask(mk.top_n_mask(linear.weight.detach().abs(), "2:4"), "2:4")
    assert_same_bits(layer.logits, torch.where(kept, 7.0, 0.0))


def test_training_draws_at_the_step_of_the_counter():
    layer = mk.MaskedLinear.from_linear(a_linear(), "2:4", gap=1.0, layer=5, counter_state=CounterState(seed=9)).train()
    draws = []
    for step in range(3):
        drawn = mk.sample_mask(layer.logits.detach(), "2:4", seed=9, step=step, layer=5)
        assert_same_bits(layer.drawn_codes(), drawn)
        assert_same_bits(layer.masked_weight() != 0, mk.expand_mask(drawn, "2:4"))
        draws.append(drawn)
        mk.advance(layer)
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])


def test_the_mask_is_that_of_the_masked_weight():
    layer = mk.MaskedLinear.from_linear(a_linear(), "2:4", gap=1.0)
    for training in (True, False):
        mask = layer.train(training).mask
        assert mask.dtype == torch.bool and torch.equal(mask, layer.masked_weight() != 0)
    assert not torch.equal(mask, layer.train().mask)


def test_eval_does_not_depend_on_the_step():
    layer = mk.MaskedLinear.from_linear(a_linear(), "2:4", gap=1.0).eval()
    x = torch.randn(3, 16)
    before = layer(x)
    mk.advance(layer)
    assert_same_bits(layer(x), before)


@pytest.mark.parametrize("training", [True, False])
def test_forward_changes_no_state(training):
    model = two_layers().train(training)
    before = state(model)
    x = torch.randn(3, 16)
    first = model(x)
    assert_same_bits(model(x), first)
    assert_same_bits(state(model), before)


@pytest.mark.parametrize("training", [True, False])
def test_gradient_reaches_x_and_not_the_frozen_weight(training):
    layer = mk.MaskedLinear.from_linear(a_linear(), "2:4", gap=1.0).train(training)
    assert not layer.weight.requires_grad and layer.logits.requires_grad
    x = torch.randn(3, 16, requires_grad=True)
    upstream = torch.randn(3, 6)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.masked_weight(), rtol=1e-6, atol=1e-6)
    assert layer.weight.grad is None and layer.logits.grad is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_from_linear_refuses_weights_that_are_not_finite(value):
    linear = a_linear()
    with torch.no_grad():
        linear.weight[2, 3] = value
    with pytest.raises(ValueError, match="^linear: expected finite weights"):
        mk.MaskedLinear.from_linear(linear, "2:4")


def test_state_dict_round_trip():
    model = two_layers()
    with torch.no_grad():
        for layer in (model[0], model[3][0]):
            layer.logits.normal_()
            layer.counter_state.seed.fill_(11)
    model[0].layer, model[3][0].layer = 8, 3
    mk.advance(model)
    fresh = two_layers()
    fresh.load_state_dict(model.state_dict())
    assert_same_bits(state(fresh), state(model))
    assert (fresh[0].layer, fresh[3][0].layer) == (8, 3)
    assert fresh[0].counter_state is fresh[3][0].counter_state
    assert (int(fresh[0].counter_state.seed), int(fresh[0].counter_state.step)) == (11, 1)
    for layer, same in ((model[0], fresh[0]), (model[3][0], fresh[3][0])):
        assert_same_bits(layer.drawn_codes(), same.drawn_codes())


def test_a_state_dict_reports_whether_kept_weights_have_changed():
    layer, fresh = (mk.MaskedLinear.from_linear(nn.Linear(8, 4), "2:4") for _ in range(2))
    assert layer.weight_changed is False
    layer.weight_changed = True
    fresh.load_state_dict(layer.state_dict())
    assert fresh.weight_changed is True
    other = layer.state_dict() | {"_extra_state": layer.state_dict()["_extra_state"][:7]}
    with pytest.raises(RuntimeError, match=r"expected extra state of shape \[8\], got \[7\]"):
        fresh.load_state_dict(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_of_the_dtype_asked_for(dtype):
    layer = mk.MaskedLinear.from_linear(a_linear(), "2:4", gap=7.5, logits_dtype=dtype)
    assert layer.logits.dtype == dtype
    assert layer.logits.unique().tolist() == [0.0, 7.5]
    assert layer.train()(torch.randn(3, 16)).dtype == torch.float32


@pytest.mark.parametrize("pattern", ["1:4", "4:8"])
def test_state_of_another_pattern_is_refused(pattern):
    layer = mk.MaskedLinear.from_linear(a_linear(), "2:4")
    other = mk.MaskedLinear.from_linear(a_linear(seed=1), pattern)
    before = state(layer)
    with pytest.raises(RuntimeError, match=f"expected logits of pattern 2:4, got {pattern}"):
        layer.load_state_dict(other.state_dict())
    assert_same_bits(state(layer), before)


MOVES = {
    "to": lambda model: model.to(torch.float16),
    "to_meta": lambda model: model.to("meta"),
    "deepcopy": copy.deepcopy,
    "apply": lambda model: model._apply(lambda tensor: tensor.clone()),
    "one_layer": lambda model: (model[0]._apply(lambda tensor: tensor.clone()), model)[1],
}


@pytest.mark.parametrize("move", MOVES)
def test_counter_state_stays_shared(move):
    model = MOVES[move](two_layers())
    first, second = model[0], model[3][0]
    assert first.counter_state is second.counter_state
    assert len(counter_states(model)) == 1
    assert first.counter_state.step.dtype == torch.int64
    mk.advance(model)
    if move != "to_meta":
        assert int(first.counter_state.step) == int(second.counter_state.step) == 1


def test_layers_with_different_ids_draw_different_masks():
    model = two_layers()
    first, second = model[0], model[3][0]
    assert (first.layer, second.layer) == (0, 1)
    assert_same_bits(first.logits, second.logits)
    assert not torch.equal(first.drawn_codes(), second.drawn_codes())
    second.layer = first.layer
    assert_same_bits(first.drawn_codes(), second.drawn_codes())


def test_log_prob_of_a_model_is_the_sum_over_its_layers():
    model = two_layers()
    mk.advance(model)
    layers = [model[0], model[3][0]]
    terms = [mk.mask_log_prob(layer.logits.detach(), layer.drawn_codes(), "2:4").sum() for layer in layers]
    total = mk.log_prob(model)
    assert total.shape == () and total.dtype == torch.float32
    torch.testing.assert_close(total, sum(terms), rtol=1e-6, atol=0)
    total.backward()
    for layer in layers:
        moved = mk.score_update_(layer.logits.detach().clone(), 1.0, pattern="2:4", **layer.counter().keywords())
        torch.testing.assert_close(layer.logits.grad, layer.logits.detach() - moved, rtol=0, atol=1e-6)


@pytest.mark.parametrize("function", [mk.advance, mk.log_prob])
def test_model_without_masked_layers_is_refused(function):
    with pytest.raises(ValueError, match="^model: expected a model with MaskedLinear layers"):
        function(nn.Sequential(nn.Linear(4, 4)))


def test_forward_runs_on_the_kernels(monkeypatch, launched):
    layer = mk.MaskedLinear.from_linear(a_linear(), "2:4")
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    layer.train()(torch.randn(3, 16))
    layer.eval()(torch.randn(3, 16))
    assert launched == {"masked_linear": 2, "top_n_mask": 1}


def on_meta() -> mk.MaskedLinear:
    with torch.device("meta"):
        return mk.MaskedLinear(torch.empty(4, 16), None, torch.empty(4, 16), "2:4", layer=0)


@pytest.mark.parametrize("load", ["assign", "to_empty"])
def test_a_layer_made_on_meta_draws_as_the_saved_one(load):
    saved = mk.MaskedLinear.from_linear(nn.Linear(16, 4, bias=False), "2:4", gap=1.0, layer=7)
    saved.counter_state.seed.fill_(5)
    layer = on_meta() if load == "assign" else on_meta().to_empty(device="cpu")
    layer.load_state_dict(saved.state_dict(), assign=load == "assign")
    assert layer.layer == 7 and int(layer.layer_id) == 7
    assert_same_bits(layer.drawn_codes(), saved.drawn_codes())
    assert_same_bits(layer.train().masked_weight(), saved.train().masked_weight())


def test_a_counter_without_values_is_refused():
    layer = mk.MaskedLinear.from_linear(nn.Linear(16, 4), "2:4")
    layer.counter_state.to("meta")
    with pytest.raises(ValueError, match="counter_state: expected seed and step in memory, got some on meta"):
        layer.train()(torch.randn(2, 16))


def test_logits_of_a_dtype_that_no_draw_takes_are_refused():
    layer = mk.MaskedLinear.from_linear(nn.Linear(16, 4), "2:4")
    layer.logits.data = layer.logits.data.double()
    for training in (True, False):
        with pytest.raises(TypeError, match="logits: expected a dense tensor of float32, bfloat16 or float16"):
            layer.train(training)(torch.randn(2, 16))


def test_a_backward_comes_before_the_draw_changes():
    layer = mk.MaskedLinear.from_linear(nn.Linear(16, 4), "2:4").train()
    x = torch.randn(3, 16, requires_grad=True)
    y = layer(x)
    layer.counter_state.draw.fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_masks_do_not_come_again_after_the_last_step():
    model = two_layers()
    (shared,) = counter_states(model)
    shared.step.fill_((1 << 32) - 2)
    mk.advance(model)
    assert int(shared.step) == (1 << 32) - 1
    model(torch.randn(3, 16))
    with pytest.raises(ValueError, match=r"^step: expected a value in \[0, 4294967295\), got 4294967295"):
        mk.advance(model)
    assert int(shared.step) == (1 << 32) - 1


@pytest.mark.parametrize("step", [-1, 1 << 32])
def test_a_step_that_no_draw_has_is_refused(step):
    model = two_layers()
    (shared,) = counter_states(model)
    before = state(model)
    shared.step.fill_(step)
    for call in (lambda: model(torch.randn(3, 16)), model[0].drawn_codes, model[0].masked_weight):
        with pytest.raises(ValueError, match=rf"^step: expected a value in \[0, 4294967296\), got {step}"):
            call()
    saved = state(model)
    shared.step.fill_(7)
    with pytest.raises(RuntimeError, match=rf"state_dict: expected a step in \[0, 4294967296\), got {step} in '0.'"):
        model.load_state_dict(saved)
    model.load_state_dict(before)
    assert int(shared.step) == 0


@pytest.mark.parametrize("logits_backward", [None, mk.straight_through_gradient])
def test_an_undefined_gradient_gives_none(logits_backward):
    layer = mk.MaskedLinear.from_linear(torch.nn.Linear(16, 8), "2:4")
    layer.logits_backward = logits_backward
    x = torch.randn(3, 16, requires_grad=True)
    torch._C._functions.UndefinedGrad()(layer(x)).sum().backward()
    assert x.grad is None and layer.logits.grad is None


@pytest.mark.parametrize("values", [None, "keep", "int8"])
def test_a_cast_to_what_no_product_takes_is_refused_at_the_cast(values):
    layer = mk.MaskedLinear.from_linear(a_linear(), "2:4")
    layer = layer if values is None else mk.NMLinear.from_masked(layer, values)
    before = layer.state_dict()
    for cast in (lambda: layer.double(), lambda: layer.to(torch.float64), lambda: nn.Sequential(layer).double()):
        with pytest.raises(
            TypeError, match="^dtype: expected float32, bfloat16 or float16, got .*; finalize gives layers"
        ):
            cast()
    assert_same_bits(layer.state_dict(), before)
    assert layer.half().bias.dtype == torch.float16
