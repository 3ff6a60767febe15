"""Straight-through under a loss whose squared gradient is not its curvature: Fisher passes, and steps by them."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.in_ranks import all_in_ranks
from helpers.softmax_model import softmax_batches, softmax_model, sparse_softmax_model
from helpers.straight_through import Twice, assert_detached, logits_by_name

import maskpro_kernels as mk
from maskpro_kernels import ops
from maskpro_kernels.learn.straight_through import _seed_of
from maskpro_kernels.text.losses import distillation_loss
from maskpro_kernels.text.perplexity import causal_lm_loss

pytestmark = pytest.mark.usefixtures("eager_reference")


def learn(model, batches, steps, loss="kl", accumulate=1, **options):
    estimator = mk.StraightThrough(lr=1.0, **options)
    loss_fn = distillation_loss(loss) if isinstance(loss, str) else loss
    trainer = mk.MaskTrainer(model, loss_fn, batches, estimator, seed=3, accumulate=accumulate)
    return trainer, trainer.run(steps, progress=False)


def squares_of(trainer) -> dict[str, torch.Tensor]:
    return {name: square.clone() for name, square in trainer.estimator.tensors().items()}


def slopes_of(model, loss, batch, square) -> torch.Tensor:
    """Those of a ``softmax_model`` whose squares are given."""
    slopes, tokens = [], torch.tensor(float(batch[:, 1:].numel()))
    model.head.logits_backward = lambda grad, x, w, source: slopes.append(
        ops.straight_through_grad(grad, x, w, 1.0, source, tokens=tokens, row_squares=square)
    )
    loss(model, batch).backward()
    return slopes[0]


def test_at_the_teacher_the_curvature_is_the_hessian_and_the_gradient_is_nothing():
    """One softmax layer with the same input for all tokens: tokens, rows and columns are then independent.

    A loss is found row by row: few long rows take a fraction of the time of many short ones.
    """
    model, ids = sparse_softmax_model(), torch.full((16, 101), 2)
    loss = distillation_loss("kl", 2.0)
    weight = model.head.weight.detach().double()
    x = model.embedding[2].double()

    def of_weight(w):
        log_q, log_p = ((m @ x / 2.0).log_softmax(0) for m in (w, weight))
        return 4.0 * (log_p.exp() * (log_p - log_q)).sum()

    hessian = torch.autograd.functional.hessian(of_weight, weight)
    diagonal = hessian.flatten(2).flatten(0, 1).diagonal().view_as(weight)
    trainer, records = learn(model, [ids], 60, loss, fisher_every=1, decay=0.999)
    assert max(abs(record.loss) for record in records) < 1e-6
    (square,) = squares_of(trainer).values()
    found = torch.outer(square.double(), x.square())
    torch.testing.assert_close(found, diagonal, rtol=0.05, atol=0.0)

    # the slope of a step is that of the curvature alone
    mask = mk.expand_mask(model.head.eval().drawn_codes(), "2:4").double()
    # where no row has a gradient all of them count, the last token of a text as well
    h = (0.5 - mask) * weight.square() * found * 101 / 100
    expected = (h.view(-1, 4) - h.view(-1, 4).mean(1, keepdim=True)).view_as(h)
    slopes = slopes_of(model.train(), loss, ids, square)
    torch.testing.assert_close(slopes.double(), expected, rtol=1e-3, atol=1e-6)


def test_steps_are_those_of_the_formula():
    """Against slopes by hand, with passes at the first and the third of four steps."""
    model, batches = softmax_model(), softmax_batches()
    twin, loss = copy.deepcopy(model).train(), distillation_loss("ce+kl", 2.0)
    trainer, records = learn(model, batches, 4, loss, fisher_every=2, decay=0.25)
    twin.head.counter_state.seed.fill_(3)
    square, running, grads = None, None, []
    for step, batch in enumerate(batches):
        if step % 2 == 0:
            grads.clear()
            twin.head.logits_backward = lambda grad, *_: grads.append(grad)
            seed = _seed_of(SimpleNamespace(seed=3, index=step), 0)
            loss.fisher_loss(twin, batch, seed).backward()
            new = grads[0].square().sum(0) * batch[:, 1:].numel()
            # the first two passes would count alike, but for the decay
            square = new if square is None else square + 0.75 * (new - square)
        assert records[step].loss == pytest.approx(float(loss(twin, batch).detach()), rel=1e-5)
        slopes = slopes_of(twin, loss, batch, square)
        mean_square = slopes.square().mean()
        rms = (mean_square if running is None else running).sqrt()
        running = mean_square if running is None else 0.25 * running + 0.75 * mean_square
        with torch.no_grad():
            twin.head.logits -= (slopes / rms).clamp(-2, 2)
        mk.advance(twin)
    torch.testing.assert_close(model.head.logits, twin.head.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(squares_of(trainer)["fisher/head"], square, rtol=1e-5, atol=0.0)
    assert trainer.estimator.state()["fisher_passes"] == {"head": 2}


def test_a_loss_that_names_its_curvature_has_no_passes():
    trainer, _ = learn(softmax_model(), softmax_batches(), 2, causal_lm_loss)
    assert trainer.estimator.state()["fisher_passes"] == {"head": 0}
    assert not squares_of(trainer)["fisher/head"].any()


def test_passes_of_several_batches_are_their_mean():
    """Of equal ones it is that of one, but for the labels; and a layer that is used twice counts as one."""
    model, batches = softmax_model(), [softmax_batches(rows=20, length=500)[0]] * 2
    one, _ = learn(copy.deepcopy(model), batches, 1)
    two, _ = learn(model, batches, 1, accumulate=2)
    ours, theirs = (squares_of(trainer)["fisher/head"] for trainer in (one, two))
    torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.0)
    assert not torch.equal(ours, theirs)


class OfTwice:
    """A loss of ``Twice`` with known output gradients."""

    def __call__(self, model, x):
        return model(x).square().mean()

    def fisher_loss(self, model, x, seed):
        return model(x).sum()


def test_a_layer_that_is_used_twice_holds_the_mean_of_its_uses():
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(30, 16)
    mk.convert(model, "2:4", gap=3.0)
    twin, collected = copy.deepcopy(model).train(), []
    twin.shared.counter_state.seed.fill_(3)
    twin.shared.logits_backward = lambda grad, *_: collected.append(grad)
    twin(x).sum().backward()
    trainer, _ = learn(model, [x], 1, OfTwice())
    expected = 30 * torch.stack([grad.square().sum(0) for grad in collected]).mean(0)
    assert len(collected) == 2
    torch.testing.assert_close(squares_of(trainer)["fisher/shared"], expected)
    assert_detached(model)


@pytest.mark.parametrize("kind", ["kl", "ce+kl"])
def test_a_resumed_run_has_the_bits_of_a_whole_one(kind, tmp_path):
    def trainer(folder, loss_fn=None):
        estimator = mk.StraightThrough(lr=1.0, fisher_every=4)
        loss_fn = loss_fn or distillation_loss(kind, 2.0)
        return mk.MaskTrainer(
            softmax_model(), loss_fn, softmax_batches(), estimator, seed=3, output_dir=tmp_path / folder
        )

    whole = trainer("whole")
    whole.run(10, progress=False)
    first = trainer("run")
    first.run(6, progress=False)
    first.close()
    for other in (distillation_loss(kind, 3.0), causal_lm_loss):
        with pytest.raises(ValueError, match="^output_dir: expected a run with loss"):
            trainer("run", other).resume()
    second = trainer("run")
    assert second.resume() == 6
    assert_same_bits(squares_of(second), squares_of(first))
    second.run(4, progress=False)
    assert_same_bits(logits_by_name(second.model), logits_by_name(whole.model))
    assert_same_bits(squares_of(second), squares_of(whole))
    assert second.estimator.state() == whole.estimator.state()


class BadFisher:
    """KL whose Fisher pass breaks."""

    def __init__(self, value):
        self.value, self.loss = value, distillation_loss("kl")

    def __call__(self, model, batch):
        return self.loss(model, batch)

    def fisher_loss(self, model, batch, seed):
        loss = self.loss.fisher_loss(model, batch, seed)
        return loss.detach() if self.value is None else loss * self.value


def test_squares_that_are_not_finite_are_left_out():
    with pytest.warns(
        UserWarning, match=r"fisher_loss of step 0: expected finite .* got others in \['head'\]"
    ) as reported:
        trainer, _ = learn(softmax_model(), softmax_batches(), 2, BadFisher(math.nan))
    assert len(reported) == 1
    assert trainer.estimator.state()["fisher_passes"] == {"head": 0}
    assert not squares_of(trainer)["fisher/head"].any()
    # then the gradient's own squares serve
    plain, _ = learn(softmax_model(), softmax_batches(), 2, lambda *args: distillation_loss("kl")(*args))
    assert_same_bits(logits_by_name(trainer.model), logits_by_name(plain.model))


def test_a_pass_of_a_step_that_is_left_out_comes_in_the_next_one():
    loss, steps, passes = distillation_loss("kl"), [], []

    class BadAtFirst(BadFisher):
        def __call__(self, model, batch):
            steps.append(batch)
            return loss(model, batch) * (math.nan if len(steps) == 1 else 1.0)

        def fisher_loss(self, model, batch, seed):
            passes.append(len(steps))
            return loss.fisher_loss(model, batch, seed)

    estimator = mk.StraightThrough(lr=1.0, fisher_every=4)
    trainer = mk.MaskTrainer(softmax_model(), BadAtFirst(1.0), softmax_batches(), estimator, seed=3, max_skipped=1)
    records = trainer.run(6, progress=False)
    assert [math.isnan(record.loss) for record in records] == [True, *[False] * 5]
    assert passes == [0, 1, 4] and estimator.state()["fisher_passes"] == {"head": 2}


def test_a_fisher_loss_without_a_gradient_is_refused_and_nothing_has_moved():
    model = softmax_model()
    before = logits_by_name(model)
    with pytest.raises(ValueError, match="^loss_fn: expected a fisher_loss with a gradient"):
        learn(model, softmax_batches(), 1, BadFisher(None))
    assert_same_bits(logits_by_name(model), before)
    assert_detached(model)


def learn_on_rank(rank: int) -> tuple[dict, dict]:
    batches = softmax_batches()
    trainer, _ = learn(softmax_model(), [*batches[:3], batches[3][:1]], 5, fisher_every=2, accumulate=2)
    return logits_by_name(trainer.model), squares_of(trainer)


@pytest.mark.slow
def test_ranks_share_a_pass():
    alone, (first, second) = learn_on_rank(0), all_in_ranks(2, learn_on_rank)
    assert_same_bits(list(first[0].values()), list(second[0].values()))
    assert_same_bits(list(first[1].values()), list(second[1].values()))
    for ours, theirs in zip(first, alone, strict=True):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3)


def sum_of(loss, model, batches) -> float:
    """Under the masks to keep."""
    return sum(float(loss(model.eval(), batch).detach()) for batch in batches)


PATTERNS = ["2:4", "4:8", slow("1:4"), slow("8:16")]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_straight_through_learns_by_the_divergence(pattern):
    model, batches = softmax_model(pattern, 3.0, "smallest"), softmax_batches()
    loss = distillation_loss("ce+kl", 2.0)
    before = sum_of(loss, model, batches)
    learn(model, batches, 40, loss)
    assert sum_of(loss, model, batches) < 0.8 * before
