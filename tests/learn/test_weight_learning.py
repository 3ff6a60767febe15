"""Weights that learn beside the logits: the steps of AdamW on what a mask keeps, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.small_trainer import a_model, a_trainer, logits_of, some_batches, uneven_batches
from helpers.straight_through import Broken, Twice
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.ops.reference.slopes import BETA, BETA_OF_SQUARES

pytestmark = pytest.mark.usefixtures("eager_reference")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# No draw crosses it
FIXED = 60.0


def loss_fn(model, batch):
    return model(batch).float().square().mean()


def held_by(model):
    """All that a step may change: logits, weights, and what the weights learn by."""
    return [tensor.clone() for layer in masked_layers(model).values() for tensor in (layer.logits, layer.weight)]


def everything(trainer):
    return [*held_by(trainer.model), *(tensor.clone() for tensor in trainer.estimator.tensors().values())]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "8:16"])
@pytest.mark.parametrize("masks_until", [0.0, 1.0])
def test_steps_are_those_of_adamw(pattern, dtype, masks_until):
    """Under a mask that no draw leaves, by torch's optimizer on float32 weights, at a rate that falls to nothing."""
    torch.manual_seed(0)
    linear = nn.Linear(32, 8).to(dtype)
    start, model = linear.weight.detach().clone(), nn.Sequential(linear)
    mk.convert(model, pattern, targets=["0"], gap=FIXED)
    layer, batches = model[0], [batch.to(dtype) for batch in torch.randn(3, 20, 32)]
    kept = mk.expand_mask(layer.drawn_codes(), pattern)
    master = nn.Parameter(start.float().clone())
    optimizer = torch.optim.AdamW([master], lr=1.0, betas=(BETA, BETA_OF_SQUARES), weight_decay=0.5)
    for step in range(6):
        x = batches[step % 3]
        y = nn.functional.linear(x, torch.where(kept, master.to(dtype), 0), layer.bias).detach().requires_grad_()
        y.float().square().mean().backward()
        master.grad = torch.where(kept, (y.grad.t() @ x).float(), 0)
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 6)
        optimizer.step()
    estimator = mk.StraightThrough(lr=1e-3, steps=6, train_weights=0.01, masks_until=masks_until, weight_decay=0.5)
    trainer = a_trainer(model, batches=batches, loss_fn=loss_fn, estimator=estimator)
    assert not layer.weight_changed
    trainer.run(6, progress=False)
    assert layer.weight_changed and not layer.weight.requires_grad and layer.weight.grad is None
    found = estimator.tensors()["weight/0"]
    # products round to a neighbour of 16 bits here or there, and a step by a gradient of that error is as much off
    apart = 1e-6 if dtype == torch.float32 else 6 * 0.01 * torch.finfo(dtype).eps
    torch.testing.assert_close(found[kept], master.detach()[kept], rtol=0.0, atol=apart)
    assert float((found - start.float()).abs()[kept].mean()) > 0.01
    assert_same_bits(found[~kept], start.float()[~kept])
    assert_same_bits(layer.weight.detach(), found.to(dtype))
    assert (found.data_ptr() == layer.weight.data_ptr()) == (dtype == torch.float32)


def test_what_a_mask_drops_stays_with_its_moments():
    """Whichever it is in a step: the logits of a group are alike, and each step draws another mask."""
    model = a_model(gap=0.0)
    trainer = a_trainer(model, estimator=mk.StraightThrough(lr=1e-3, train_weights=0.01, masks_until=1.0))
    trainer.begin()
    held = trainer.estimator.tensors()
    masks = []
    for _ in range(4):
        before = {name: tensor.clone() for name, tensor in held.items()}
        drawn = {}

        def noting(model, batch, drawn=drawn):
            drawn |= {name: mk.expand_mask(of.drawn_codes(), "2:4") for name, of in trainer.layers.items()}
            return loss_fn(model, batch)

        trainer.loss_fn = noting
        trainer.step()
        masks.append(drawn)
        for name, kept in drawn.items():
            for kind in ("weight", "first", "second"):
                old, new = before[f"{kind}/{name}"], held[f"{kind}/{name}"]
                assert_same_bits(new[~kept], old[~kept])
                assert (new != old)[kept].float().mean() > 0.9
    assert not torch.equal(masks[0]["0"], masks[1]["0"])


@pytest.mark.parametrize("masks_until", [0.0, 1.0])
@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_of_all_uses_and_batches_are_summed(parts, masks_until):
    """Of a layer that is used twice, and of batches by their tokens; by the first moment of the first step."""
    torch.manual_seed(0)
    model, plain = Twice(), Twice()
    plain.load_state_dict(model.state_dict())
    mk.convert(model, "2:4", gap=FIXED)
    batches = uneven_batches()[-parts:]
    estimator = mk.StraightThrough(lr=1e-3, train_weights=0.01, masks_until=masks_until)
    trainer = a_trainer(model, batches=batches, estimator=estimator, accumulate=parts)
    with torch.no_grad():
        for name, layer in masked_layers(model).items():
            plain.get_submodule(name).weight.copy_(layer.top_n_weight())
    trainer.step()
    rows = sum(map(len, batches))
    sum(loss_fn(plain, batch) * len(batch) / rows for batch in batches).backward()
    for name, layer in masked_layers(model).items():
        kept = mk.expand_mask(mk.top_n_mask(layer.logits.detach(), "2:4"), "2:4")
        first = trainer.estimator.tensors()[f"first/{name}"]
        expected = 0.1 * torch.where(kept, plain.get_submodule(name).weight.grad, 0)
        torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-7)


def test_slope_and_gradient_below_are_those_of_the_weights_of_the_forward():
    """The logits of a first step, and the weights of the layer below, are as if no other weight learned."""
    one, other = a_model(), a_model()
    a_trainer(one, estimator=mk.StraightThrough(lr=0.3, train_weights=0.1, masks_until=1.0)).step()
    a_trainer(other, estimator=mk.StraightThrough(lr=0.3)).step()
    assert_same_bits(logits_of(one), logits_of(other))
    assert all((a.weight != b.weight).any() for a, b in zip(one[::2], other[::2], strict=True))


def test_masks_learn_in_their_share_of_the_steps_and_are_fixed_afterwards():
    estimator = mk.StraightThrough(lr=2.0, steps=8, train_weights=0.01, masks_until=0.5)
    assert [estimator.lr_at(step) for step in (0, 2, 4, 7)] == [2.0, 1.0, 0.0, 0.0]
    assert [estimator.weight_lr_at(step) for step in (0, 4)] == [0.01, 0.005]
    assert estimator.max_logit_travel == 16.0
    model = a_model(gap=1.0)
    trainer = a_trainer(model, estimator=estimator)
    trainer.run(4, progress=False)
    learned = logits_of(model)
    masks = [mk.top_n_mask(logits, "2:4") for logits in learned]
    assert trainer.moved() > 0
    for _ in range(4):
        before = [layer.weight.clone() for layer in masked_layers(model).values()]
        record = trainer.step()
        assert record.flip_rate == 0.0
        assert_same_bits(logits_of(model), learned)
        for old, codes, layer in zip(before, masks, masked_layers(model).values(), strict=True):
            kept = mk.expand_mask(codes, "2:4")
            assert_same_bits(layer.weight.detach()[~kept], old[~kept])
            assert (layer.weight != old)[kept].float().mean() > 0.9


def test_layers_without_a_gradient_are_named_where_masks_are_fixed():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    mk.convert(model, "2:4", gap=1.0)

    def of_the_first_layer(model, batch):
        return loss_fn(model[0], batch)

    trainer = a_trainer(model, loss_fn=of_the_first_layer, estimator=mk.StraightThrough(train_weights=0.01))
    with pytest.warns(UserWarning, match=r"no finite gradient other than 0 in 1 layers, .*they have not learned: 1"):
        trainer.run(1, progress=False)


def test_masks_follow_logits_that_others_change():
    model = a_model()
    trainer = a_trainer(model, estimator=mk.StraightThrough(train_weights=0.01))
    trainer.step()
    layer = model[0]
    with torch.no_grad():
        layer.logits.neg_()
    before = layer.weight.clone()
    trainer.step()
    kept = mk.expand_mask(mk.top_n_mask(layer.logits.detach(), "2:4"), "2:4")
    assert torch.equal(layer.weight != before, kept)


def test_masks_are_fixed_by_default_where_weights_learn(caplog):
    caplog.set_level("INFO")
    model = a_model(gap=0.0)
    before = logits_of(model)
    trainer = a_trainer(model, estimator=mk.StraightThrough(train_weights=0.01))
    trainer.run(3, progress=False)
    assert_same_bits(logits_of(model), before)
    assert trainer.moved() == 0
    assert "masks are fixed: only weights learn" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masks_until": 0.5}, "masks_until: expected None where weights do not learn, got 0.5"),
        ({"train_weights": 0.1, "masks_until": 0.5}, "masks_until: expected 0 or 1 without steps, got 0.5"),
        ({"train_weights": 0.1, "steps": 4, "masks_until": 1.5}, "masks_until: expected"),
    ],
)
def test_shares_of_the_steps_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        mk.StraightThrough(**settings)


def test_the_distance_that_weights_went(tmp_path):
    """By the first snapshot, and after a resume as well."""
    model = a_model()
    start = torch.cat([layer.top_n_weight().flatten() for layer in masked_layers(model).values()])

    def a_run(model):
        return a_trainer(model, estimator=mk.StraightThrough(train_weights=0.01), output_dir=tmp_path)

    first = a_run(model)
    assert first.weights_moved() is None
    first.run(2, progress=False)
    end = torch.cat([layer.top_n_weight().flatten() for layer in masked_layers(model).values()])
    expected = float((end - start).norm() / start.norm())
    assert first.weights_moved() == pytest.approx(expected, rel=1e-5)
    first.close()
    second = a_run(a_model())
    second.resume()
    assert second.weights_moved() == pytest.approx(expected, rel=1e-5)
    second.close()
    rounded = a_trainer(
        a_model().bfloat16(),
        loss_fn=loss_fn,
        batches=[batch.bfloat16() for batch in some_batches()],
        estimator=mk.StraightThrough(train_weights=1e-9),
        output_dir=tmp_path / "rounded",
    )
    rounded.run(1, progress=False)
    # less than the rounding of the weights
    assert rounded.weights_moved() == 0.0
    rounded.close()
    frozen = a_trainer(estimator=mk.StraightThrough(), output_dir=tmp_path / "frozen")
    frozen.run(1, progress=False)
    assert frozen.weights_moved() is None
    frozen.close()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("masks_until", [0.0, 1.0])
def test_steps_that_are_not_finite_move_no_weight(bad, accumulate, masks_until):
    for where in ("loss", "gradient"):
        estimator = mk.StraightThrough(train_weights=0.01, masks_until=masks_until)
        trainer = a_trainer(estimator=estimator, accumulate=accumulate, max_skipped=1)
        trainer.step()
        before = everything(trainer)
        whole = trainer.loss_fn
        damage = {"loss": lambda loss: loss * bad, "gradient": lambda loss: Broken.apply(loss, bad)}[where]
        trainer.loss_fn = lambda model, batch, damage=damage, whole=whole: damage(whole(model, batch))
        if where == "gradient":
            with pytest.warns(UserWarning, match="gradients of step 1: expected finite numbers"):
                trainer.step()
        else:
            trainer.step()
        assert_same_bits(everything(trainer), before)
        # and it continues
        trainer.loss_fn = whole
        trainer.step()
        assert all(tensor.isfinite().all() for tensor in everything(trainer))
        assert [float(count) for name, count in trainer.estimator.tensors().items() if "count" in name] == [2.0, 2.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masks_until", [0.0, 0.5, 1.0])
def test_a_resumed_run_has_the_bits_of_a_whole_one(tmp_path, dtype, masks_until):
    """Weights as well: the model comes with those of the start, and gets those of the snapshot."""

    def a_run(folder):
        model = a_model().to(dtype)
        batches = [batch.to(dtype) for batch in some_batches()]
        estimator = mk.StraightThrough(lr=0.3, steps=7, train_weights=0.01, masks_until=masks_until)
        return a_trainer(model, batches=batches, loss_fn=loss_fn, estimator=estimator, output_dir=tmp_path / folder)

    whole, first, second, third = (a_run(folder) for folder in ("whole", "run", "run", "run"))
    whole.run(7, progress=False)
    first.run(4, progress=False)
    first.close()
    assert not second.model[0].weight_changed
    assert second.resume() == 4
    assert_same_bits(everything(second), everything(first))
    assert second.model[0].weight_changed
    second.run(3, progress=False)
    assert_same_bits(everything(second), everything(whole))
    second.close()
    third.estimator.train_weights = 0.02
    with pytest.raises(ValueError, match="output_dir: expected a run with settings train_weights 0.02, got 0.01 in"):
        third.resume()
    assert_same_bits(held_by(third.model), held_by(a_model().to(dtype)))


def test_layers_that_cannot_learn_are_refused_before_anything_moves():
    linear = nn.Linear(16, 16)
    layers = [mk.MaskedLinear.from_linear(linear, "2:4", layer=i) for i in range(2)]
    with pytest.raises(
        ValueError, match="^train_weights: expected a weight of its own in each layer, got one in 0 and 1"
    ):
        a_trainer(nn.Sequential(*layers), estimator=mk.StraightThrough(train_weights=0.01)).step()
    layer = mk.MaskedLinear(torch.randn(8, 16).t(), None, torch.randn(16, 8), "2:4")
    with pytest.raises(
        ValueError, match=r"^train_weights: expected layers with contiguous weights, got \(1, 16\) in 0"
    ):
        a_trainer(nn.Sequential(layer), estimator=mk.StraightThrough(train_weights=0.01)).step()


def test_a_weight_that_others_hold_does_not_change_there():
    embedding, head, plain = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False), nn.Linear(16, 4)
    head.weight = embedding.weight
    model = nn.Sequential(head, plain)
    before = [embedding.weight.detach().clone(), plain.weight.detach().clone()]
    mk.convert(model, "2:4", targets=["0", "1"])
    trainer = a_trainer(model, batches=[torch.randn(4, 8)], loss_fn=loss_fn, estimator=learning())
    trainer.run(2, progress=False)
    assert_same_bits([embedding.weight.detach(), plain.weight.detach()], before)
    assert all(layer.weight_changed for layer in model) and not torch.equal(model[0].weight, embedding.weight)


def learning() -> mk.StraightThrough:
    return mk.StraightThrough(lr=1e-3, train_weights=0.01, masks_until=1.0)
