"""The masks of all layers of a model, drawn together and updated together."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.small_trainer import logits_of
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.ops.mask_costs import COSTS, Uses, draws_once
from maskpro_kernels.training import model_masks
from maskpro_kernels.training.model_masks import ModelMasks

pytestmark = pytest.mark.usefixtures("eager_reference")

NONE = Uses(tokens=8, products=1)


def mixed_model() -> nn.Sequential:
    """Layers of two patterns, of logits of two dtypes, a shard, and logits that are not contiguous."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    mk.convert(model, "2:4", gap=1.0)
    state = model[0].counter_state
    how = {"gap": 1.0, "counter_state": state}
    for i, (pattern, others) in enumerate(
        (("4:8", {}), ("2:4", {"logits_dtype": torch.bfloat16}), ("2:4", mk.shard_counter("2:4", 32, column=16)))
    ):
        model[i] = mk.MaskedLinear.from_linear(nn.Linear(16, 16), pattern, layer=i, **how, **others)
    turned = model[3].logits.detach()
    model[3].logits = nn.Parameter(turned.t().contiguous().t())
    state.seed.fill_(7)
    state.step.fill_(3)
    return model.train()


def counters_of(model: nn.Module):
    return [(layer, layer.counter().keywords()) for layer in masked_layers(model).values()]


def codes_of(model: nn.Module) -> list[torch.Tensor]:
    return [mk.sample_mask(layer.logits.detach(), layer.pattern, **where) for layer, where in counters_of(model)]


def test_layers_of_all_kinds_are_drawn_and_released():
    model = mixed_model()
    masks, x = ModelMasks(model), torch.randn(5, 16)
    expected, y = codes_of(model), model(x)
    with masks.drawn():
        assert_same_bits([layer.held_codes for layer in masks.layers.values()], expected)
        assert_same_bits([layer.drawn_codes() for layer in masks.layers.values()], expected)
        assert_same_bits(model(x), y)
        assert_same_bits(
            [layer.masked_weight() for layer in masks.layers.values()],
            [
                layer.weight * mk.expand_mask(codes, layer.pattern) + 0.0
                for layer, codes in zip(masks.layers.values(), expected, strict=True)
            ],
        )
    assert all(layer.held_codes is None for layer in masks.layers.values())


@pytest.mark.parametrize("draws", [1, 3])
def test_layers_of_all_kinds_are_updated(draws):
    model, other = mixed_model(), mixed_model()
    coefs, ids = (0.5, -0.3, 0.2)[:draws], (4, 0, 9)[:draws]
    ModelMasks(model).score_update_(coefs, draw=ids)
    for layer, where in counters_of(other):
        with torch.no_grad():
            mk.score_update_(layer.logits, coefs, pattern=layer.pattern, **(where | {"draw": ids}))
    assert_same_bits(logits_of(model), logits_of(other))


@pytest.mark.parametrize("inside", [True, False])
def test_an_update_of_the_draw_that_is_held_takes_its_codes(inside, monkeypatch):
    model, other = mixed_model(), mixed_model()
    by_codes, real = [], model_masks.update_layers_
    monkeypatch.setattr(model_masks, "update_layers_", lambda *args: (by_codes.append(args[-1]), real(*args)))
    masks, coef = ModelMasks(model), torch.tensor(0.5)
    with masks.drawn("this one"):
        if inside:
            masks.score_update_(coef)
            # the logits are others: from here on each layer draws by itself
            assert all(layer.held_codes is None for layer in masks.layers.values())
    if not inside:
        masks.score_update_(coef, known="this one")
    assert by_codes == [True] * 4
    ModelMasks(other).score_update_(coef)
    assert_same_bits(logits_of(model), logits_of(other))
    masks.score_update_(coef, known="this one")
    ModelMasks(other).score_update_(coef)
    assert by_codes[4:] == [False] * 12
    assert_same_bits(logits_of(model), logits_of(other))


def test_an_update_of_another_draw_does_not_take_the_codes():
    model, other = mixed_model(), mixed_model()
    masks = ModelMasks(model)
    with masks.drawn("this one"):
        masks.score_update_((0.5,), draw=(2,))
    ModelMasks(other).score_update_((0.5,), draw=(2,))
    assert_same_bits(logits_of(model), logits_of(other))
    with masks.drawn("this one"):
        pass
    masks.score_update_(0.5, known="another")
    ModelMasks(other).score_update_(0.5)
    assert_same_bits(logits_of(model), logits_of(other))


def test_tensors_that_have_come_to_lie_elsewhere_are_found():
    model = mixed_model()
    masks = ModelMasks(model)
    with masks.drawn():
        pass
    model[5].logits.data = torch.randn(16, 16)
    model[4].logits = nn.Parameter(torch.randn(16, 16))
    model[3].layer = 11
    expected = codes_of(model)
    with masks.drawn():
        assert_same_bits([layer.held_codes for layer in masks.layers.values()], expected)


def test_codes_of_tensors_that_lay_elsewhere_are_not_taken():
    model, other = mixed_model(), mixed_model()
    masks = ModelMasks(model)
    with masks.drawn("this one"):
        pass
    for each in (model, other):
        each[5].logits.data = torch.full((16, 16), 0.5)
    masks.score_update_(0.5, known="this one")
    ModelMasks(other).score_update_(0.5)
    assert_same_bits(logits_of(model), logits_of(other))


def test_a_step_with_few_uses_draws_where_it_multiplies():
    model = mixed_model()
    masks = ModelMasks(model)
    with masks.drawn(uses=NONE):
        # those of logits that no group takes are drawn by themselves
        assert [name for name, layer in masks.layers.items() if layer.held_codes is not None] == ["3"]
    with masks.drawn(uses=NONE._replace(products=2)):
        assert all(layer.held_codes is not None for layer in masks.layers.values())


def test_what_breaks_off_leaves_no_codes():
    model = mixed_model()
    masks = ModelMasks(model)
    with pytest.raises(KeyboardInterrupt), masks.drawn():
        raise KeyboardInterrupt
    assert all(layer.held_codes is None for layer in masks.layers.values())


@pytest.mark.parametrize(
    ("coef", "draw", "error", "name"),
    [
        (float("nan"), 0, ValueError, "coef"),
        ((1.0, 2.0), (0, 0), ValueError, "draw"),
        ((1.0,), 0, ValueError, "coef"),
        ("1", 0, TypeError, "coef"),
        (1.0, -1, ValueError, "draw"),
    ],
)
def test_bad_arguments_move_nothing(coef, draw, error, name):
    model = mixed_model()
    before = logits_of(model)
    with pytest.raises(error, match=f"^{name}: expected .*got "):
        ModelMasks(model).score_update_(coef, draw=draw)
    assert_same_bits(logits_of(model), before)


def test_a_model_without_masks_is_refused():
    with pytest.raises(ValueError, match="^model: expected a model with MaskedLinear layers"):
        ModelMasks(nn.Linear(4, 4))


def test_codes_pay_where_a_mask_is_used_again():
    cpu = torch.device("cpu")
    assert not draws_once(cpu, 2, Uses(tokens=8, products=1))
    assert draws_once(cpu, 2, Uses(tokens=8, products=2))
    assert draws_once(cpu, 2, Uses(tokens=8, products=1, updates=1))
    # above N = 4 the score takes the noise, and the update draws again
    assert not draws_once(cpu, 8, Uses(tokens=8, products=1, updates=1))
    assert draws_once(cpu, 2, Uses(tokens=8, products=2, slopes=1))


def test_each_row_of_the_tiles_has_costs():
    from maskpro_kernels.ops.triton.tiles import PROCESSORS

    assert COSTS.keys() == {*PROCESSORS, "cpu"}
    for costs in COSTS.values():
        assert all(drawn > by_codes for drawn, by_codes in (costs.one_pass, costs.weight, costs.slope))
