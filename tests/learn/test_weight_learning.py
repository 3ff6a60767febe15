"""Weights that learn: the steps of AdamW in the basis of the inputs, on what a mask keeps, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.small_trainer import a_model, a_trainer, logits_of, some_batches, uneven_batches
from helpers.straight_through import Broken, Twice
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.learn.weight_learner import BETA, BETA_OF_SQUARES, WeightLearner
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.ranks import Ranks

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
def test_steps_are_those_of_adamw_in_the_basis_of_the_inputs(pattern, dtype, masks_until):
    """Under a mask that no draw leaves, by torch's optimizer on float32 weights, at a rate that falls to nothing."""
    torch.manual_seed(0)
    linear = nn.Linear(32, 8).to(dtype)
    start, model = linear.weight.detach().clone(), nn.Sequential(linear)
    mk.convert(model, pattern, targets=["0"], gap=FIXED)
    layer, batches = model[0], [batch.to(dtype) for batch in torch.randn(3, 40, 32)]
    kept = mk.expand_mask(layer.drawn_codes(), pattern)
    estimator = mk.StraightThrough(lr=1e-3, steps=6, train_weights=0.01, masks_until=masks_until)
    trainer = a_trainer(model, batches=batches, loss_fn=loss_fn, estimator=estimator)
    assert not layer.weight_changed
    trainer.run(6, progress=False)
    assert layer.weight_changed and not layer.weight.requires_grad and layer.weight.grad is None
    (basis,) = estimator.tensors()["basis/0"]
    # float16 would lose a small rate
    rounded = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    master = start.float().clone()
    turned = nn.Parameter(torch.zeros_like(master))
    optimizer = torch.optim.AdamW([turned], lr=1.0, betas=(BETA, BETA_OF_SQUARES), weight_decay=0.0)
    for step in range(6):
        x = batches[step % 3]
        y = nn.functional.linear(x, torch.where(kept, master.to(dtype), 0), layer.bias).detach().requires_grad_()
        y.float().square().mean().backward()
        turned.grad = (y.grad.t() @ x).float() @ basis
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 6)
        before = turned.detach().clone()
        optimizer.step()
        moved = (turned.detach() - before).to(rounded) @ basis.t().to(rounded)
        master += torch.where(kept, moved.float(), 0)
    learned = estimator.tensors()["weight/0"]
    # products round to a neighbour of 16 bits here or there, and a step by a gradient of that error is as much off
    apart = 2e-6 if dtype == torch.float32 else 60 * 0.01 * torch.finfo(dtype).eps
    torch.testing.assert_close(learned[kept], master[kept], rtol=0.0, atol=apart)
    assert float((learned - start.float()).abs()[kept].mean()) > 0.01
    assert_same_bits(learned[~kept], start.float()[~kept])
    assert_same_bits(layer.weight.detach(), learned.to(dtype))
    assert (learned.data_ptr() == layer.weight.data_ptr()) == (dtype == torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_basis_is_of_the_inputs_of_the_first_step(dtype):
    """All of its batches; the columns are the eigenvectors of the sum of x^T x."""
    torch.manual_seed(0)
    model = a_model().to(dtype)
    batches = [batch.to(dtype) for batch in uneven_batches()]
    trainer = a_trainer(model, batches=batches, loss_fn=loss_fn, estimator=learning(), accumulate=2)
    trainer.run(2, progress=False)
    x = torch.cat(batches[:2]).float()
    basis = trainer.estimator.tensors()["basis/0"]
    assert basis.dtype == torch.float32
    (columns,) = basis.double()
    torch.testing.assert_close(columns.T @ columns, torch.eye(len(columns)).double(), rtol=0.0, atol=1e-5)
    products = columns.T @ (x.T @ x).double() @ columns
    largest = float(products.diagonal().max())
    assert float((products - products.diagonal().diag()).abs().max()) < 2e-5 * largest


def a_learner(width: int = 16, dtype=torch.float32) -> WeightLearner:
    torch.manual_seed(0)
    layer = mk.MaskedLinear(torch.randn(8, width).to(dtype), None, torch.randn(8, width), "2:4")
    return WeightLearner(layer)


def move(learner: WeightLearner, gradient: torch.Tensor) -> torch.Tensor:
    """Change of the weights by one step at a rate of 1, under a mask that keeps all."""
    before = learner.master.clone()
    codes = torch.full((8, learner.master.shape[1] // 4), 15, dtype=torch.uint8)
    learner.step(gradient, codes, 1.0, gradient.float().norm())
    return learner.master - before


def test_weak_directions_are_learned_beside_strong_ones_in_bfloat16():
    """All inputs share a direction a thousand times as strong as the others; the first step has the size of the rate
    in each direction.
    """
    learner = a_learner(dtype=torch.bfloat16)
    learner.collect(torch.randn(200, 16) + 1000 * torch.randn(200, 1))
    learner.make_basis(Ranks(), {})
    (basis,) = learner.basis
    # of the weakest direction to the strongest
    gradient = torch.logspace(-4, 0, 16) * torch.randn(8, 16).sign()
    moved = move(learner, gradient @ basis.T) @ basis
    assert float((moved + gradient.sign()).abs().max()) < 0.05


def test_a_layer_without_inputs_in_the_first_step_gets_its_basis_later():
    class TwoWays(nn.Module):
        def __init__(self):
            super().__init__()
            self.ways = nn.ModuleList([nn.Linear(16, 8), nn.Linear(16, 8)])

        def forward(self, x):
            return self.ways[len(x) == 5](x)

    torch.manual_seed(0)
    model = TwoWays()
    mk.convert(model, "2:4", gap=1.0)
    trainer = a_trainer(
        model, batches=[torch.randn(5, 16), torch.randn(4, 16)], loss_fn=loss_fn, estimator=learning(), accumulate=1
    )
    before = held_by(model)
    trainer.step()
    has_basis = [learner.has_basis for learner in trainer.estimator._learners.values()]
    assert has_basis == [False, True] and torch.equal(before[1], model.ways[0].weight)
    trainer.step()
    assert all(learner.has_basis for learner in trainer.estimator._learners.values())
    assert not torch.equal(before[1], model.ways[0].weight)


@pytest.mark.parametrize("x", [torch.zeros(0, 16), torch.zeros(4, 16), torch.full((4, 16), math.nan)], ids=str)
def test_inputs_that_say_nothing_make_no_basis(x):
    learner = a_learner()
    learner.collect(x)
    learner.make_basis(Ranks(), {})
    assert not learner.has_basis and learner.gram is None
    assert not move(learner, torch.ones(8, 16)).any()
    learner.collect(torch.randn(4, 16))
    learner.make_basis(Ranks(), {})
    assert learner.has_basis and move(learner, torch.ones(8, 16)).any()


def test_a_basis_of_inputs_of_any_size_and_of_a_solver_that_fails(monkeypatch):
    """In float64 where float32 does not converge, or is not finite."""
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    made = []
    whole = torch.linalg.eigh

    def failing(matrix):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("no convergence")
        return whole(matrix)

    def not_finite(matrix):
        values, vectors = whole(matrix)
        return values, vectors * math.nan if matrix.dtype == torch.float32 else vectors

    for solver, scale in ((whole, 1.0), (whole, 1e-15), (whole, 1e15), (failing, 1.0), (not_finite, 1.0)):
        monkeypatch.setattr(torch.linalg, "eigh", solver)
        learner = a_learner()
        learner.collect(x * scale)
        learner.make_basis(Ranks(), {})
        made.append(learner.basis[0])
    for basis in made:
        # up to signs
        torch.testing.assert_close((made[0].T @ basis).abs(), torch.eye(16), rtol=0.0, atol=1e-3)


def test_products_are_those_of_float32_under_autocast():
    def a_step():
        learner = a_learner()
        learner.collect(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)))
        learner.make_basis(Ranks(), {})
        return learner.basis, move(learner, torch.linspace(-1, 1, 128).view(8, 16))

    expected = a_step()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(a_step(), expected)


def test_the_sign_of_a_dropped_zero_stays():
    learner = a_learner()
    learner.master[:, 0] = -0.0
    learner.collect(torch.randn(40, 16))
    learner.make_basis(Ranks(), {})
    gradient = torch.randn(8, 16)
    learner.step(gradient, torch.full((8, 4), 0b1100, dtype=torch.uint8), 1.0, gradient.norm())
    assert learner.master[:, 0].signbit().all() and not learner.master[:, 0].any()


@pytest.mark.parametrize(("width", "parts"), [(1024, 1), (1536, 2), (11008, 16), (2 * 1031, 1031)])
def test_bases_of_wide_layers_are_cut_into_equal_parts(width, parts):
    layer = mk.MaskedLinear(torch.zeros(4, width), None, torch.zeros(4, width), "1:2")
    assert WeightLearner(layer).basis.shape == (parts, width // parts, width // parts)


def test_layers_with_the_same_inputs_share_a_basis(tmp_path):
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            return self.inner[1](self.inner[0](x) + self.inner[2](x))

    def a_run():
        torch.manual_seed(0)
        model = Fork()
        mk.convert(model, "2:4", gap=1.0)
        return a_trainer(model, batches=some_batches(), estimator=learning(), loss_fn=loss_fn, output_dir=tmp_path)

    first, second = a_run(), a_run()
    first.run(2, progress=False)
    first.close()
    second.resume()
    for trainer in (first, second):
        bases = [tensor for name, tensor in trainer.estimator.tensors().items() if name.startswith("basis/")]
        assert bases[0] is bases[2] and not torch.equal(bases[0], bases[1])
    second.close()


def test_what_a_mask_drops_stays():
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
            old, new = before[f"weight/{name}"], trainer.estimator.tensors()[f"weight/{name}"]
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
    for name in masked_layers(model):
        first = trainer.estimator.tensors()[f"first/{name}"]
        (basis,) = trainer.estimator.tensors()[f"basis/{name}"]
        # the gradient in the masked weight, also of what the mask drops
        expected = 0.1 * plain.get_submodule(name).weight.grad @ basis
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


@pytest.mark.parametrize("masks_until", [0.0, 1.0])
def test_a_run_whose_first_step_is_not_finite_learns_from_the_second(masks_until):
    estimator = mk.StraightThrough(train_weights=0.01, masks_until=masks_until)
    trainer = a_trainer(estimator=estimator, max_skipped=1)
    before = held_by(trainer.model)
    whole = trainer.loss_fn
    trainer.loss_fn = lambda model, batch: Broken.apply(whole(model, batch), math.nan)
    with pytest.warns(UserWarning, match="gradients of step 0: expected finite numbers"):
        trainer.step()
    assert_same_bits(held_by(trainer.model), before)
    trainer.loss_fn = whole
    trainer.step()
    assert all((layer.weight != old).any() for layer, old in zip(trainer.layers.values(), before[1::2], strict=True))


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
