"""A converted model as its own teacher: forwards with whole weights."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.straight_through import Twice, assert_detached, learn_straight_through, logits_by_name
from torch import nn

import maskpro_kernels as mk

pytestmark = pytest.mark.usefixtures("eager_reference")


def a_model(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32, bias), nn.ReLU(), nn.Linear(32, 8, bias)).to(dtype)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "8:16"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_dense_model_gives_the_bits_of_the_one_that_was_converted(dtype, training, pattern):
    model, x = a_model(dtype, bias=training), torch.randn(3, 5, 16, dtype=dtype)
    expected = model(x)
    mk.convert(model, pattern, targets=["0", "2"], gap=1.0)
    model.train(training)
    masked = model(x)
    with mk.dense(model):
        assert_same_bits(model(x), expected)
    assert_same_bits(model(x), masked)
    assert not torch.equal(masked, expected)


def test_gradients_pass_through_whole_weights():
    model, x = a_model(), torch.randn(5, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    mk.convert(model, "2:4", targets=["0", "2"])
    with mk.dense(model):
        y = model(x)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    assert_same_bits(found, expected)


def test_contexts_nest_and_end_with_an_error():
    model, x = a_model(), torch.randn(5, 16)
    expected = model(x)
    mk.convert(model, "2:4", targets=["0", "2"])
    masked = model(x)
    with pytest.raises(RuntimeError, match="inside"), mk.dense(model):
        with mk.dense(model[0]):
            pass
        assert_same_bits(model(x), expected)
        raise RuntimeError("inside")
    assert_same_bits(model(x), masked)


def test_other_modules_keep_their_modes_and_draws_continue():
    model = a_model()
    mk.convert(model, "2:4", targets=["0", "2"], gap=1.0)
    model.train()
    modes = {module: module.training for module in model.modules()}
    codes = model[0].drawn_codes()
    with mk.dense(model):
        assert {module: module.training for module in model.modules()} == modes
        assert_same_bits(model[0].drawn_codes(), codes)


def test_changed_weights_are_refused_before_anything_is_switched():
    model = a_model()
    mk.convert(model, "2:4", targets=["0", "2"])
    model[2].weight_changed = True
    with (
        pytest.raises(ValueError, match=r"^model: expected the weights .* refitted or trained ones in \['2'\]"),
        mk.dense(model),
    ):
        pass
    assert not model[0].is_dense
    with pytest.raises(ValueError, match="^model: expected a model with MaskedLinear"), mk.dense(a_model()):
        pass


@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_model_is_dense_too(training):
    model, x = a_model(), torch.randn(5, 16)
    expected = model(x)
    mk.convert(model, "2:4", targets=["0", "2"], gap=1.0)
    model.train(training)
    masked = model(x)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        assert_same_bits(compiled(x), masked)
        with mk.dense(model):
            assert_same_bits(compiled(x), expected)


def test_a_teacher_in_the_loss_is_no_use_of_a_layer():
    """A layer that is used once moves inside backward, also where a forward of the teacher uses it again."""
    torch.manual_seed(0)
    plain, taught = Twice(), None
    mk.convert(plain, "2:4", gap=3.0)
    taught = copy.deepcopy(plain)
    x, uses = torch.randn(30, 16), []

    def loss(model, x):
        return model(x).square().mean()

    def loss_beside_teacher(model, x):
        with torch.no_grad(), mk.dense(model):
            model(x)
        found = loss(model, x)
        uses.append({name: updater.uses for name, updater in trainer.estimator._updaters.items()})
        return found

    learn_straight_through(plain, 1, loss, [x])
    trainer = mk.MaskTrainer(taught, loss_beside_teacher, [x], mk.StraightThrough(lr=1.0), seed=3)
    trainer.run(1, progress=False)
    assert uses == [{"shared": 2, "own": 1}]
    assert_same_bits(logits_by_name(taught), logits_by_name(plain))
    assert_detached(taught)
