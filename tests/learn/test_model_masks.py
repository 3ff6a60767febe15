"""The masks of all layers of a model, drawn together and updated together."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.routes import take_route
from helpers.small_trainer import logits_of
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.learn import model_masks as masks_file
from maskpro_kernels.learn.model_masks import ModelMasks
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.ops.layer_groups import Uses, draws_once

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
        assert_same_bits([layer.cached_codes for layer in masks.layers.values()], expected)
        assert_same_bits([layer.drawn_codes() for layer in masks.layers.values()], expected)
        assert_same_bits(model(x), y)
        assert_same_bits(
            [layer.masked_weight() for layer in masks.layers.values()],
            [
                layer.weight * mk.expand_mask(codes, layer.pattern) + 0.0
                for layer, codes in zip(masks.layers.values(), expected, strict=True)
            ],
        )
    assert all(layer.cached_codes is None for layer in masks.layers.values())


@pytest.mark.parametrize("draws", [1, 3])
def test_layers_of_all_kinds_are_updated(draws):
    model, other = mixed_model(), mixed_model()
    coefs, ids = (0.5, -0.3, 0.2)[:draws], (4, 0, 9)[:draws]
    ModelMasks(model).score_update_(coefs, draw=ids)
    for layer, where in counters_of(other):
        with torch.no_grad():
            mk.score_update_(layer.logits, coefs, pattern=layer.pattern, **(where | {"draw": ids}))
    assert_same_bits(logits_of(model), logits_of(other))


@pytest.fixture
def by_codes(monkeypatch):
    """Of each update of a group whether it takes codes that are held."""
    reported, real = [], masks_file.update_layers_
    monkeypatch.setattr(masks_file, "update_layers_", lambda *args: (reported.append(args[-1]), real(*args)))
    return reported


def test_an_update_of_the_draw_that_is_held_takes_its_codes(by_codes):
    model, other = mixed_model(), mixed_model()
    masks, coef = ModelMasks(model), torch.tensor(0.5)
    with masks.drawn():
        masks.score_update_(coef)
        # the logits are others: from here on each layer draws by itself
        assert all(layer.cached_mask is None for layer in masks.layers.values())
    ModelMasks(other).score_update_(coef)
    assert by_codes == [True] * 4 + [False] * 4
    assert_same_bits(logits_of(model), logits_of(other))


@pytest.mark.parametrize("given", [{}, {"draw": (2,)}, {"draw": 2, "seed": 7, "step": 3}], ids=str)
def test_an_update_after_a_draw_takes_its_codes_where_it_is_the_same(given, by_codes):
    model, other = mixed_model(), mixed_model()
    masks, coef = ModelMasks(model), (0.5,) if isinstance(given.get("draw"), tuple) else 0.5
    with masks.drawn(2 if given else None):
        pass
    masks.score_update_(coef, **given)
    masks.score_update_(coef, **given)
    for _ in range(2):
        ModelMasks(other).score_update_(coef, **given)
    assert by_codes == [True] * 4 + [False] * 12
    assert_same_bits(logits_of(model), logits_of(other))


@pytest.mark.parametrize(
    ("given", "change"),
    [
        ({"draw": 3}, None),
        ({"draw": 2, "step": 4}, None),
        ({"draw": 2, "seed": 8}, None),
        ({"draw": (2, 3)}, None),
        ({"draw": 2}, lambda model: mk.advance(model)),
        ({"draw": 2}, lambda model: [layer.logits.detach().mul_(1.5) for layer in masked_layers(model).values()]),
    ],
    ids=["another draw", "another step", "another seed", "two draws", "advanced", "other logits"],
)
def test_an_update_of_another_draw_does_not_take_the_codes(given, change, by_codes):
    model, other = mixed_model(), mixed_model()
    masks, coef = ModelMasks(model), (0.5, 0.25) if isinstance(given["draw"], tuple) else 0.5
    with masks.drawn(2):
        pass
    for each in (model, other) if change else ():
        change(each)
    masks.score_update_(coef, **given)
    assert not any(by_codes)
    ModelMasks(other).score_update_(coef, **given)
    assert_same_bits(logits_of(model), logits_of(other))


def test_layers_make_the_draw_that_is_named():
    model, x = mixed_model(), torch.randn(5, 16)
    masks, state = ModelMasks(model), model[0].counter_state
    state.draw.fill_(1)
    with masks.drawn(5):
        found, codes = model(x), [layer.cached_codes for layer in masks.layers.values()]
        codes = [each.clone() for each in codes]
    assert int(state.draw) == 1
    state.draw.fill_(5)
    assert_same_bits(codes, codes_of(model))
    assert_same_bits(found, model(x))


CHANGES = {
    "advance": lambda model, masks: mk.advance(model),
    "logits": lambda model, masks: model[0].logits.detach().add_(1.0),
    "load_state_dict": lambda model, masks: model.load_state_dict(model.state_dict()),
    "another ModelMasks": lambda model, masks: ModelMasks({"0": model[0]}).score_update_(0.5, draw=1, seed=1, step=1),
    "a new parameter": lambda model, masks: setattr(model[0], "logits", nn.Parameter(model[0].logits.data)),
    "the seed": lambda model, masks: model[0].counter_state.seed.fill_(99),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_mask_that_is_no_longer_the_one_that_was_drawn_is_refused(change):
    model = mixed_model()
    masks, before = ModelMasks(model), None
    with masks.drawn():
        CHANGES[change](model, masks)
        if change == "another ModelMasks":
            # its layer has let go of them
            assert model[0].cached_mask is None
            return
        before = logits_of(model)
        for use in (lambda: model(torch.randn(2, 16)), model[0].drawn_codes, model[0].masked_weight):
            with pytest.raises(RuntimeError, match="^masks: expected logits, seed, step and draw not to change"):
                use()
        if change != "a new parameter":
            with pytest.raises(RuntimeError, match="^masks: expected"):
                masks.score_update_(0.5)
            assert_same_bits(logits_of(model), before)
    model(torch.randn(2, 16))


@pytest.mark.parametrize("other", [False, True], ids=["itself", "another"])
def test_contexts_do_not_nest(other):
    model = mixed_model()
    masks = ModelMasks(model)
    with masks.drawn():
        inner = ModelMasks(model) if other else masks
        with pytest.raises(RuntimeError, match="^masks: expected layers outside of any `drawn`"), inner.drawn():
            pass
        model(torch.randn(2, 16))
    with masks.drawn(uses=NONE), pytest.raises(RuntimeError, match="^masks: expected"), masks.drawn(uses=NONE):
        pass
    assert all(layer.cached_mask is None for layer in model)


def test_a_copy_of_a_layer_holds_no_draw():
    model = mixed_model()
    with ModelMasks(model).drawn():
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(layer.cached_mask is None for layer in copied)
            mk.advance(copied)
            assert_same_bits([layer.drawn_codes() for layer in copied], codes_of(copied))


def test_an_interrupted_update_leaves_no_codes(monkeypatch):
    model = mixed_model()
    masks, calls, real = ModelMasks(model), [], masks_file.update_layers_

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        real(*args)

    with masks.drawn():
        with monkeypatch.context() as patched, pytest.raises(MemoryError):
            patched.setattr(masks_file, "update_layers_", failing)
            masks.score_update_(0.5)
        assert all(layer.cached_mask is None for layer in model)
    monkeypatch.setattr(masks_file, "update_layers_", lambda *args: calls.append(args))
    masks.score_update_(0.5)
    assert not any(by_codes for *_, by_codes in calls[2:])


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_the_kernels_draw_and_update_so_too(pattern, monkeypatch):
    """Also after a step in inference mode."""
    found = []
    for route in ("eager", "kernels"):
        take_route(monkeypatch, route)
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(3)))
        mk.convert(model, pattern, gap=1.0)
        masks, codes = ModelMasks(model.train()), []
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                with masks.drawn(1):
                    codes += [layer.cached_codes.clone() for layer in model]
                masks.score_update_(0.5, draw=1)
        found.append([*codes, *logits_of(model)])
    assert_same_bits(*found)


def test_tensors_that_have_moved_are_found():
    model = mixed_model()
    masks = ModelMasks(model)
    with masks.drawn():
        pass
    model[5].logits.data = torch.randn(16, 16)
    model[4].logits = nn.Parameter(torch.randn(16, 16))
    model[3].layer = 11
    expected = codes_of(model)
    with masks.drawn():
        assert_same_bits([layer.cached_codes for layer in masks.layers.values()], expected)


def test_a_step_with_few_uses_draws_where_it_multiplies():
    model = mixed_model()
    masks = ModelMasks(model)
    with masks.drawn(uses=NONE):
        # those of logits that no group takes are drawn by themselves
        assert [name for name, layer in masks.layers.items() if layer.cached_codes is not None] == ["3"]
    with masks.drawn(uses=NONE._replace(products=2)):
        assert all(layer.cached_codes is not None for layer in masks.layers.values())


@pytest.mark.parametrize(
    ("coef", "draw", "error", "name"),
    [
        (float("nan"), 0, ValueError, "coef"),
        ((1.0, 2.0), (0, 0), ValueError, "draw"),
        (1.0, -1, ValueError, "draw"),
        (1.0, {"step": 1 << 40}, ValueError, "step"),
        (1.0, {"seed": True}, TypeError, "seed"),
    ],
)
def test_bad_arguments_move_nothing(coef, draw, error, name):
    model = mixed_model()
    before = logits_of(model)
    with pytest.raises(error, match=f"^{name}: expected .*got "):
        ModelMasks(model).score_update_(coef, **(draw if isinstance(draw, dict) else {"draw": draw}))
    assert_same_bits(logits_of(model), before)


LINEAR = mk.MaskedLinear.from_linear(nn.Linear(8, 4), "2:4")


@pytest.mark.parametrize(
    ("layers", "error", "reported"),
    [
        (nn.Linear(4, 4), ValueError, "^model: expected a model with MaskedLinear layers"),
        ({}, ValueError, "^layers: expected at least one MaskedLinear, got none"),
        ([LINEAR], TypeError, "^layers: expected a model, or MaskedLinear layers by name, got list"),
        ({"one": nn.Linear(4, 4)}, TypeError, "^layers: expected MaskedLinear layers, got Linear for 'one'"),
        ({"one": LINEAR, "two": LINEAR}, ValueError, "^layers: expected .* got the same for 'one' and 'two'"),
    ],
    ids=["dense", "none", "a list", "of nn.Linear", "two names"],
)
def test_layers_without_masks_are_refused(layers, error, reported):
    with pytest.raises(error, match=reported):
        ModelMasks(layers)


def test_logits_that_share_memory_are_refused():
    memory, pattern = torch.zeros(6, 8), mk.NMPattern("2:4")

    def layers(*views):
        return {str(i): masks_file.ReplayedLayer(nn.Parameter(view), pattern, i) for i, view in enumerate(views)}

    for overlapping in ((memory, memory[2:4]), (memory[2:], memory[5:6].view(2, 4), memory[:3]), (memory, memory)):
        with pytest.raises(ValueError, match="^layers: expected logits that share no memory, got the same for '"):
            ModelMasks(layers(*overlapping))
    assert ModelMasks(layers(memory[3:], memory[:3], memory[1:1], memory.to("meta"), memory.to("meta")))


def test_bad_draws_and_names_are_refused():
    masks = ModelMasks(mixed_model())
    for draw, error in ((-1, ValueError), (1 << 16, ValueError), ("this one", TypeError)):
        with pytest.raises(error, match="^draw: expected"), masks.drawn(draw):
            pass
    with pytest.raises(ValueError, match="^name: expected that of a layer, got str 'nope'"):
        masks.flip_rate("nope")


def test_codes_pay_where_a_mask_is_used_again():
    cpu = torch.device("cpu")
    assert not draws_once(cpu, 2, Uses(tokens=8, products=1))
    assert draws_once(cpu, 2, Uses(tokens=8, products=2))
    assert draws_once(cpu, 2, Uses(tokens=8, products=1, updates=1))
    # above N = 4 the score takes the noise, and the update draws again
    assert not draws_once(cpu, 8, Uses(tokens=8, products=1, updates=1))
    assert draws_once(cpu, 2, Uses(tokens=8, products=2, slopes=1))
