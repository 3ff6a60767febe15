"""The curvature of straight-through beside the Fisher information: padding, prompts, experts, classifiers, images."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.straight_through import logits_by_name
from helpers.tiny_llama import tiny_model
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ViTConfig, ViTForImageClassification

import maskpro_kernels as mk
from maskpro_kernels import ops
from maskpro_kernels.functional.linear import labelled_tokens
from maskpro_kernels.learn.backward import LayerUpdater
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.ops import unfused
from maskpro_kernels.ops.reference import curvature
from maskpro_kernels.ops.triton import slopes
from maskpro_kernels.text.losses import distillation_loss
from maskpro_kernels.text.perplexity import causal_lm_loss

pytestmark = pytest.mark.usefixtures("eager_reference")

IGNORED = -100


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_layers(gap: float = 3.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16))
    mk.convert(model, "2:4", targets=["0", "2"], gap=gap)
    return model


def padded(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """16 labelled rows of 32, and so many others among them."""
    x, labels = normal(16, 32, seed=1), torch.arange(16)
    more, none = 3 * normal(rows, 32, seed=2), torch.full((rows,), IGNORED)
    return torch.cat([x[:5], more, x[5:]]), torch.cat([labels[:5], none, labels[5:]])


def of_labels(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def slopes_of(model: nn.Module, loss_fn, batch, **how) -> dict[str, torch.Tensor]:
    """Those that a ``MaskOptimizer`` finds."""
    mk.MaskOptimizer(model.train(), **how)
    loss_fn(model, batch).backward()
    return {name: layer.logits.grad for name, layer in masked_layers(model).items()}


def assert_near(found: dict, expected: dict, most: float = 1e-5) -> None:
    for name, tensor in expected.items():
        assert float((found[name] - tensor).abs().max()) <= most * float(tensor.abs().max()), name


@pytest.mark.parametrize("rows", [16, 48, 240])
def test_padding_changes_no_slope(rows):
    expected = slopes_of(two_layers(), of_labels, padded(0))
    assert_near(slopes_of(two_layers(), of_labels, padded(rows)), expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_padding_changes_no_step_of_a_trainer(accumulate):
    learned = []
    for rows in (0, 48):
        model, estimator = two_layers(), mk.StraightThrough(lr=1.0)
        batches = [padded(rows), padded(2 * rows)]
        mk.MaskTrainer(model, of_labels, batches, estimator, seed=3, accumulate=accumulate).run(4, progress=False)
        learned.append(logits_by_name(model))
    assert_near(learned[1], learned[0])


def test_rows_without_a_gradient_may_hold_anything():
    grad, x = normal(6, 8, seed=0), normal(6, 16, seed=1)
    grad[4:] = 0.0
    expected = ops.curvature_factors(grad[:4], x[:4], 0.5, None, None)
    x[4:] = torch.inf
    assert_near(dict(enumerate(ops.curvature_factors(grad, x, 0.5, None, None))), dict(enumerate(expected)))
    found = ops.curvature_factors(grad, x, 0.5, torch.tensor(12.0), None)
    assert_near(dict(enumerate(found)), dict(enumerate((3 * expected[0], expected[1]))))
    nothing = ops.curvature_factors(grad * 0.0, x, 0.5, torch.tensor(12.0), None)
    assert not any(factor.any() for factor in nothing)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_no_other_factor(value):
    grad, x = normal(6, 8, seed=0), normal(6, 16, seed=1)
    expected = ops.curvature_factors(grad, x, 0.5, None, None)
    grad[2, 3] = value
    of_outputs, of_inputs = ops.curvature_factors(grad, x, 0.5, None, None)
    assert_same_bits(of_inputs, expected[1])
    finite = torch.arange(8) != 3
    assert_same_bits(of_outputs[finite], expected[0][finite])


def test_rows_of_rounding_errors_have_no_gradient():
    grad, x = normal(6, 8, seed=0), normal(6, 16, seed=1)
    grad[0] *= 1e-7
    expected = ops.curvature_factors(grad[1:], x[1:], 0.5, None, None)
    assert_near(dict(enumerate(ops.curvature_factors(grad, x, 0.5, None, None))), dict(enumerate(expected)))
    # a hundredth of the others' size is a gradient
    grad[0] *= 1e5
    assert ops.token_squares(grad, None)[-1] == 6


@pytest.fixture
def factors(monkeypatch):
    """The factors of F that steps have taken, of each layer."""
    taken, current, real = defaultdict(list), [], curvature.curvature_factors
    of_layer = LayerUpdater.__call__

    def recorded(*operands):
        taken[current[-1]].append(real(*operands))
        return taken[current[-1]][-1]

    def called(updater, *operands):
        current.append(updater.layer)
        return of_layer(updater, *operands)

    for module in (unfused, slopes):
        monkeypatch.setattr(module, "curvature_factors", recorded)
    monkeypatch.setattr(LayerUpdater, "__call__", called)
    return taken


class DrawnLabels:
    """Cross-entropy with labels that the model draws itself, whose gradient squared is its Fisher information."""

    def __init__(self, logits_of, tokens=None):
        self.logits_of, self.labelled_tokens = logits_of, lambda batch: tokens
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, model, batch):
        logits = self.logits_of(model, batch)
        return cross_entropy(logits, logits.detach().softmax(-1).multinomial(1, generator=self.generator)[:, 0])


class Divergence(DrawnLabels):
    """One from a teacher, with Fisher passes."""

    def __call__(self, model, batch):
        logits = self.logits_of(model, batch)
        teacher = (logits.detach() + normal(*logits.shape, seed=9)).softmax(-1)
        return nn.functional.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean")

    def fisher_loss(self, model, batch, seed):
        return super().__call__(model, batch)


def fisher_information(model, logits_of, batch, apart: int) -> dict[str, torch.Tensor]:
    """Of each layer the diagonal [out, K], without cross terms between rows: by derivatives of the logits [T, classes].

    No row has a part in two tokens at a distance of ``apart``.
    """
    inputs, shifts = {}, {}

    def add(module, given, output):
        inputs[module] = given[0].detach().flatten(0, -2)
        shifts[module] = torch.zeros_like(output).requires_grad_()
        return output + shifts[module]

    layers = masked_layers(model)
    handles = [layer.register_forward_hook(add) for layer in layers.values()]
    logits = logits_of(model.train(), batch)
    for handle in handles:
        handle.remove()
    q, squares = logits.detach().softmax(-1), dict.fromkeys(shifts, 0.0)
    centred = q.sqrt() * (logits - (q * logits).sum(-1, keepdim=True))
    for one in (one for first in range(apart) for one in centred[first::apart].sum(0)):
        for module, g in zip(shifts, torch.autograd.grad(one, list(shifts.values()), retain_graph=True), strict=True):
            squares[module] = squares[module] + g.flatten(0, -2).double().square()
    return {name: squares[x].T @ inputs[x].double().square() / len(logits) for name, x in layers.items()}


def ratios(factors, model, loss, batch, steps: int, apart: int = 1) -> dict[str, torch.Tensor]:
    """Of each layer F, the mean over steps, by the Fisher information; of weights that have one."""
    expected = fisher_information(model, loss.logits_of, batch, apart)
    estimator = mk.StraightThrough(lr=1e-6, fisher_every=1, decay=0.999)
    mk.MaskTrainer(model, loss, [batch], estimator, seed=3).run(steps, progress=False)
    found = {}
    for name, layer in masked_layers(model).items():
        own = factors[layer][-1:] if hasattr(loss, "fisher_loss") else factors[layer]
        f = sum(torch.outer(*one).double() for one in own) / len(own)
        found[name] = (f / expected[name])[expected[name] > 0]
    return found


def assert_medians(found: dict[str, torch.Tensor], most: float) -> None:
    medians = {name: float(ratio.median()) for name, ratio in found.items()}
    assert medians == pytest.approx(dict.fromkeys(found, 1.0), abs=most)


@pytest.mark.parametrize("kind", [DrawnLabels, Divergence])
def test_of_padded_batches(kind, factors):
    x, labelled = normal(256, 32, seed=1), torch.arange(256) % 4 == 0
    x[~labelled] *= 2
    found = ratios(factors, two_layers(gap=60.0), kind(lambda model, x: model(x)[labelled]), x, 30)
    assert_medians(found, 0.05)


class Experts(nn.Module):
    """Some rows go to one expert, the others to another one."""

    def __init__(self, share: float):
        super().__init__()
        torch.manual_seed(0)
        self.share, self.experts = share, nn.ModuleList([nn.Linear(32, 48) for _ in range(2)])
        self.head = nn.Linear(48, 8)

    def forward(self, x):
        parts = x.tensor_split([int(self.share * len(x))])
        return self.head(torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)]).tanh())


@pytest.mark.parametrize("kind", [DrawnLabels, Divergence])
@pytest.mark.parametrize("share", [slow(1 / 2), 1 / 16])
def test_of_experts(share, kind, factors):
    model = Experts(share)
    mk.convert(model, "2:4", targets=["experts.*", "head"], gap=60.0)
    found = ratios(factors, model, kind(lambda model, x: model(x), 1024), normal(1024, 32, seed=1), 30)
    assert_medians(found, 0.05)


def test_of_a_classifier(factors):
    """One row in 8 decides; the others have no gradient, and no label shows it."""
    x = normal(64, 8, 32, seed=1)
    found = ratios(factors, two_layers(gap=60.0), DrawnLabels(lambda model, x: model(x)[:, 0]), x, 30)
    assert_medians(found, 0.05)


def test_of_a_network_for_images(factors):
    """Many rows for each label; by the labels of the batch."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=8)).eval()
    mk.convert(model, "2:4", gap=60.0)
    batch = {"pixel_values": normal(16, 3, 16, 16, seed=1), "labels": torch.zeros(16, dtype=torch.int64)}
    loss = DrawnLabels(lambda model, batch: model(batch["pixel_values"]).logits)
    del loss.labelled_tokens
    found = ratios(factors, model, loss, batch, 20)
    assert len(found) == 13
    # of a layer it is up to 2: the one row that decides is another than those of the images, in g and x alike
    assert_medians({"all weights": torch.cat(list(found.values()))}, 0.15)


def prompts() -> dict[str, torch.Tensor]:
    """8 prompts of 12 tokens, with completions of 4."""
    ids = torch.randint(0, 32, (8, 16), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(16) < 12, IGNORED)}


@pytest.mark.slow
def test_of_prompts_with_completions(factors):
    model = tiny_model()
    mk.convert(model, "2:4", gap=60.0)

    def logits_of(model, batch):
        return model(batch["input_ids"], use_cache=False).logits[:, :-1][batch["labels"][:, 1:] != IGNORED]

    loss = DrawnLabels(logits_of)
    del loss.labelled_tokens
    found = ratios(factors, model, loss, prompts(), 20, apart=4)
    assert len(found) == 14
    # but where attention takes a mean of few tokens at the start, and of many where the gradient is large
    outputs = found.pop("model.layers.0.self_attn.o_proj")
    assert_medians(found, 0.15)
    assert_medians({"all weights": torch.cat([outputs, *found.values()])}, 0.15)


@pytest.mark.parametrize(
    ("loss_fn", "batch", "expected"),
    [
        (causal_lm_loss, torch.zeros(3, 5), 12),
        (distillation_loss("kl"), torch.zeros(3, 5), 12),
        (of_labels, prompts(), 32),
        (of_labels, {"labels": torch.arange(4)}, 4),
        (of_labels, {"labels": torch.zeros(4, 3, dtype=torch.int64)}, 12),
        (of_labels, {"labels": torch.zeros(4, 3, dtype=torch.int64), "input_ids": torch.ones(4, 3)}, 8),
        (of_labels, padded(4), None),
        (SimpleNamespace(labelled_tokens=lambda batch: torch.tensor(7)), prompts(), 7),
        (SimpleNamespace(labelled_tokens=lambda batch: None), prompts(), None),
        (SimpleNamespace(labelled_tokens=lambda batch: 0), prompts(), 1),
    ],
)
def test_tokens_of_a_mean(loss_fn, batch, expected):
    found = labelled_tokens(loss_fn, batch)
    assert found is None if expected is None else found.dtype == torch.float32 and float(found) == expected


@pytest.mark.parametrize("count", [-1, float("nan"), torch.ones(2), "4"])
def test_a_bad_count_is_refused_and_nothing_has_moved(count):
    model = two_layers()
    before = logits_by_name(model)
    loss = DrawnLabels(lambda model, batch: model(batch), count)
    trainer = mk.MaskTrainer(model, loss, [normal(4, 32, seed=1)], mk.StraightThrough(), seed=0)
    with pytest.raises(ValueError, match="^loss_fn: expected labelled_tokens to return a number of at least 0, got "):
        trainer.step()
    assert all(torch.equal(logits, before[name]) for name, logits in logits_by_name(model).items())


def test_tokens_of_an_optimizer():
    plain, doubled = (slopes_of(two_layers(), of_labels, padded(0), tokens=tokens) for tokens in (None, 32))
    by_call = slopes_of(two_layers(), of_labels, padded(0), tokens=lambda: torch.tensor(32))
    twice = slopes_of(two_layers(), of_labels, padded(0), curvature=2.0)
    assert_near(doubled, twice)
    assert_near(by_call, twice)
    assert not torch.allclose(plain["0"], twice["0"], rtol=1e-2)
    with pytest.raises(ValueError, match="^tokens: expected a float above 0"):
        mk.MaskOptimizer(two_layers(), tokens=0.0)


@pytest.mark.parametrize("tokens", [0.0, -1, float("nan"), float("inf"), True, "4", torch.ones(1), torch.tensor(0.0)])
@pytest.mark.parametrize("called", [False, True])
def test_bad_tokens_are_refused(tokens, called):
    with pytest.raises(
        (TypeError, ValueError), match="^tokens: expected a float above 0 or a 0-dim tensor of one, got "
    ):
        slopes_of(two_layers(), of_labels, padded(0), tokens=(lambda: tokens) if called else tokens)


def test_a_count_of_labels_on_a_device_is_not_read():
    count = torch.tensor([7], device="meta")
    found = labelled_tokens(SimpleNamespace(labelled_tokens=lambda batch: batch), count)
    assert (found.shape, found.dtype, found.device) == ((), torch.float32, count.device)


def test_the_rows_with_a_gradient_are_squared_without_a_copy_of_all_columns():
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            if not func.is_view:
                sizes.append(out.numel())
            return out

    grad, x = normal(6, 8, seed=0), normal(6, 2 * curvature.COLUMNS + 4, seed=1)
    grad[4:] = 0.0
    with Sizes():
        found = curvature.curvature_factors(grad, x, 0.5, None, None)[1]
    assert max(sizes) < x.numel()
    torch.testing.assert_close(found, x[:4].square().sum(0))
