"""Models spread over devices: weights here and there, logits with them or elsewhere, and what accelerate hooks."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from helpers.bits import assert_same_bits
from helpers.far_device import far_device
from helpers.in_ranks import all_in_ranks
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.modules import CounterState, counter_states, masked_layers
from maskpro_kernels.prune.finalize import pack
from maskpro_kernels.ranks import Ranks

pytestmark = pytest.mark.usefixtures("eager_reference")

ESTIMATORS = {
    "reinforce": lambda: mk.Reinforce(lr=2.0, draws=2),
    "straight-through": lambda: mk.StraightThrough(lr=0.3),
    "trained weights": lambda: mk.StraightThrough(lr=0.3, train_weights=0.01, masks_until=1.0),
    "fixed masks": lambda: mk.StraightThrough(train_weights=0.01),
}
# Those that change weights
WEIGHTS_LEARN = ("trained weights", "fixed masks")


def signs(*shape: int, seed: int) -> torch.Tensor:
    """-1, 0 and 1: products and sums of them are exact, in whatever order."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float()


def a_linear(in_features: int, out_features: int, seed: int) -> nn.Linear:
    linear = nn.Linear(in_features, out_features)
    linear.weight = nn.Parameter(signs(out_features, in_features, seed=seed))
    linear.bias = nn.Parameter(signs(out_features, seed=seed))
    return linear


def a_model() -> nn.Sequential:
    return nn.Sequential(a_linear(16, 8, 0), nn.ReLU(), a_linear(8, 4, 1))


def some_batches() -> list[torch.Tensor]:
    return list(signs(4, 4, 16, seed=2))


def on_far_and_cpu() -> nn.Sequential:
    """As ``dispatch_model`` leaves a model whose layers are on two devices."""
    model = a_model()
    for layer, device in ((model[0], "far"), (model[2], "cpu")):
        add_hook_to_module(layer, AlignDevicesHook(torch.device(device)))
    return model


def learned(model: nn.Module, estimator: str, accumulate: int) -> list[torch.Tensor]:
    def loss_fn(model, batch):
        return model(batch).square().mean()

    how = {"seed": 11, "accumulate": accumulate}
    mk.MaskTrainer(model, loss_fn, some_batches(), ESTIMATORS[estimator](), **how).run(3, progress=False)
    return logits_of(model)


def logits_of(model: nn.Module) -> list[torch.Tensor]:
    return [layer.logits.detach().cpu().clone() for layer in masked_layers(model).values()]


def assert_same(one: torch.Tensor, other: torch.Tensor, slopes: bool) -> None:
    """Bit for bit, but for slopes: the sums of squares in them are taken by another operation on CPU than elsewhere."""
    tolerance = 1e-5 if slopes else 0.0
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def assert_spread_model_learns_the_same(rank: int, estimator: str, logits_device: str | None, init: str) -> None:
    device = far_device()
    spread, whole = on_far_and_cpu(), a_model()
    calibration = some_batches()
    for model, where in ((spread, logits_device), (whole, None)):
        mk.convert(model, "2:4", init=init, gap=2.0, calibration=calibration, logits_device=where)
    layers = masked_layers(spread).values()
    assert [layer.weight.device.type for layer in layers] == ["far", "cpu"]
    assert [layer.logits.device.type for layer in layers] == [logits_device or "far", "cpu"]
    assert [counter_state.step.device.type for counter_state in counter_states(spread)] == ["far", "cpu"]
    before = logits_of(spread)
    for accumulate in (1, 2):
        ours, theirs = (learned(model, estimator, accumulate) for model in (spread, whole))
        for one, other, old in zip(ours, theirs, before, strict=True):
            assert_same(one, other, slopes=estimator != "reinforce")
            assert torch.equal(one, old) == (estimator == "fixed masks")
        assert [layer.logits.device.type for layer in layers] == [logits_device or "far", "cpu"]
    if estimator not in WEIGHTS_LEARN:
        with mk.dense(spread):
            assert_same_bits(spread(calibration[0]), a_model()(calibration[0]))
    mk.finalize(spread)
    mk.finalize(whole)
    assert spread[0].weight.device.type == "far"
    assert_same(spread(calibration[0]), whole(calibration[0]), slopes=estimator in WEIGHTS_LEARN)
    del device


@pytest.mark.parametrize(
    ("estimator", "logits_device", "init"),
    [
        ("reinforce", None, "wanda"),
        ("fixed masks", "cpu", "magnitude"),
        pytest.param("reinforce", "cpu", "magnitude", marks=pytest.mark.slow),
        pytest.param("straight-through", None, "magnitude", marks=pytest.mark.slow),
        ("straight-through", "cpu", "reconstruction"),
        ("trained weights", "cpu", "magnitude"),
    ],
)
def test_a_model_on_two_devices_learns_as_one_on_one(estimator, logits_device, init):
    arguments = {"estimator": estimator, "logits_device": logits_device, "init": init}
    all_in_ranks(1, assert_spread_model_learns_the_same, **arguments)


def assert_layer_computes_the_same(rank: int) -> None:
    device = far_device()
    linear = a_linear(16, 8, 0)
    near = mk.MaskedLinear.from_linear(linear, "2:4", gap=1.0, counter_state=CounterState(seed=9)).train()
    counter_state = CounterState(seed=9, device="far")
    away = mk.MaskedLinear.from_linear(
        copy.deepcopy(linear).to("far"), "2:4", gap=1.0, logits_device="cpu", counter_state=counter_state
    ).train()
    assert away.weight.device.type == "far" and away.logits.device.type == "cpu"
    inputs = some_batches()[0]
    for logits_backward in (None, mk.straight_through_gradient):
        found, gradients = [], []
        for layer in (near, away):
            layer.logits_backward, layer.logits.grad = logits_backward, None
            x = inputs.clone().to(layer.weight.device).requires_grad_()
            y = layer(x)
            (y.square().sum() + layer.log_prob()).backward()
            assert layer.logits.grad.device == layer.logits.device
            found.append([y, x.grad, layer.drawn_codes(), layer.masked_weight(), layer.top_n_weight()])
            gradients.append(layer.logits.grad)
        assert_same(*gradients, slopes=logits_backward is not None)
        for one, other in zip(*found, strict=True):
            assert_same_bits(one, other.cpu())
    # as where another rank has used a layer that this one has not
    estimator = mk.StraightThrough()
    estimator.begin({"near": near, "away": away})
    with estimator.attached(0, Ranks(), 1, {}) as passes:
        passes.backward(near(inputs).square().sum(), equal_order=False)
    assert away.logits.device.type == "cpu"
    near.load_state_dict({**near.state_dict(), "logits": away.logits.detach()})
    near.eval()
    away.eval()
    assert_same_bits(near(inputs), away(inputs.to("far")).cpu())
    assert len(away.state_dict()) == len(near.state_dict())
    del device


def test_a_layer_whose_logits_live_elsewhere_computes_the_same():
    all_in_ranks(1, assert_layer_computes_the_same)


def assert_moved_logits_are_noticed(rank: int) -> None:
    device = far_device()
    linear = a_linear(16, 8, 0).to("far")
    for logits_backward in (None, mk.straight_through_gradient):
        layer = mk.MaskedLinear.from_linear(linear, "2:4", logits_device="cpu").train()
        layer.logits_backward = logits_backward
        x = some_batches()[0].to("far").requires_grad_()
        loss = layer(x).sum()
        mk.score_update_(layer.logits, 0.5, pattern="2:4", **layer.counter().keywords())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    del device


def test_a_graph_holds_no_copy_of_logits_that_live_elsewhere():
    """Backward takes them again, and notices where they have moved."""
    all_in_ranks(1, assert_moved_logits_are_noticed)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, {"0": "cpu", "1": "cpu", "2": "cpu"}], ids=["whole", "by layer"])
def test_what_dispatch_model_has_hooked_stays(device_map):
    model, plain = dispatch_model(a_model(), device_map, force_hooks=True), a_model()
    hooks = [getattr(model[i], "_hf_hook", None) for i in (0, 2)]
    for one in (model, plain):
        mk.convert(one, "2:4")
    assert [getattr(model[i], "_hf_hook", None) for i in (0, 2)] == hooks
    batch = some_batches()[0]
    assert_same_bits(model(batch), plain(batch))
    assert learned(model, "reinforce", 1)
    mk.finalize(model)
    assert [getattr(model[i], "_hf_hook", None) for i in (0, 2)] == hooks
    assert len(model(batch)) == len(batch)


def test_inputs_are_brought_to_hooked_layers():
    """The hook is not only there: it is called."""

    class Doubling(AlignDevicesHook):
        def pre_forward(self, module, *args, **kwargs):
            return tuple(2.0 * x for x in args), kwargs

    model = a_model()
    add_hook_to_module(model[0], Doubling("cpu"))
    expected = model(some_batches()[0])
    codes = {"0": torch.full((8, 4), 0b0011, dtype=torch.uint8), "2": torch.full((4, 2), 0b0011, dtype=torch.uint8)}
    mk.convert(model, "2:4", init=codes)
    with torch.no_grad():
        masks = [mk.expand_mask(codes[name], "2:4") for name in ("0", "2")]
        weights = [model[place].weight * mask for place, mask in zip((0, 2), masks, strict=True)]
        hidden = nn.functional.linear(2.0 * some_batches()[0], weights[0], model[0].bias).relu()
        y = nn.functional.linear(hidden, weights[1], model[2].bias)
    assert_same_bits(model.eval()(some_batches()[0]), y)
    assert not torch.equal(y, expected)


def offloaded(how: str, folder) -> nn.Module:
    model = a_model()
    return cpu_offload(model, torch.device("cpu")) if how == "cpu" else disk_offload(model, str(folder))


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_weights_that_a_hook_offloads_are_refused_by_name(how, tmp_path):
    model = offloaded(how, tmp_path)
    y = model(some_batches()[0])
    message = "expected weights in memory, got {} on meta: accelerate offloads it, give it a device in device_map"
    with pytest.raises(ValueError, match="^model: " + message.format("0")):
        mk.convert(model, "2:4")
    with pytest.raises(ValueError, match="^model: " + message.format("2")):
        mk.convert(model, "2:4", targets=["2"])
    with pytest.raises(ValueError, match="^linear: " + message.format("weight")):
        mk.MaskedLinear.from_linear(model[0], "2:4")
    with pytest.raises(ValueError, match="^model: " + message.format("0")):
        pack(model, "2:4")
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert_same_bits(model(some_batches()[0]), y)
    with pytest.raises(ValueError, match="^model: expected weights in memory, got 0 on meta: load it first"):
        mk.convert(a_model().to("meta"), "2:4")


def test_masked_layers_that_a_hook_offloads_are_refused():
    """Else what they learn would be lost with each copy."""
    model = a_model()
    mk.convert(model, "2:4")
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match="^model: expected weights and logits in memory, got some on meta in 0"):
        learned(model, "reinforce", 1)
    with pytest.raises(ValueError, match="^model: expected weights in memory, got 0 on meta: accelerate offloads it"):
        mk.finalize(model)
    assert isinstance(model[0], mk.MaskedLinear)


def assert_counter_follows_the_weight(rank: int) -> None:
    """A model that is spread over devices once it has been converted shares its counter state all the same."""
    device = far_device()
    linear = a_linear(16, 8, 0)
    near = mk.MaskedLinear.from_linear(linear, "2:4", gap=1.0, counter_state=CounterState(seed=9)).train()
    away = copy.deepcopy(near).to("far")
    away.counter_state = near.counter_state
    assert {part.device.type for part in away.counter().key} == {"far"}
    assert_same_bits(away.drawn_codes().cpu(), near.drawn_codes())
    del device


def test_a_counter_follows_the_weight():
    all_in_ranks(1, assert_counter_follows_the_weight)
