"""Losses against the dense model: values, gradients and curvatures by their formulas in float64."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.straight_through import batches_of_tokens, masked_llama
from helpers.tiny_llama import tiny_model
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.text import losses
from maskpro_kernels.text.losses import TeacherCache, distillation_loss
from maskpro_kernels.text.perplexity import causal_lm_loss

pytestmark = pytest.mark.usefixtures("eager_reference")

VOCABULARY = 32


class Table(nn.Module):
    """The next token's logits [tokens, vocabulary] are a matrix, under a mask: of a one-hot input its columns."""

    def __init__(self, vocabulary: int, seed: int = 0):
        super().__init__()
        self.vocabulary = vocabulary
        self.table = nn.Linear(vocabulary, vocabulary, bias=False)
        scores = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed))
        self.table.weight = nn.Parameter(2 * scores, requires_grad=False)

    def forward(self, input_ids, use_cache):
        assert not use_cache
        return SimpleNamespace(logits=self.table(nn.functional.one_hot(input_ids, self.vocabulary).float()))


def masked_table(vocabulary: int = VOCABULARY) -> Table:
    model = Table(vocabulary)
    mk.convert(model, "2:4", targets=["table"], gap=3.0)
    return model


def both_logits(model, ids):
    """(student's with a graph to the weights of the masked layers' outputs, teacher's), of all but the last tokens."""
    with mk.dense(model), torch.no_grad():
        theirs = model(ids, use_cache=False).logits[:, :-1]
    return model(ids, use_cache=False).logits[:, :-1], theirs


def divergence(student, teacher, temperature):
    """T^2 KL(teacher || student), a mean over tokens, in float64."""
    log_q, log_p = ((z.double() / temperature).log_softmax(-1) for z in (student, teacher))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def cross_entropy(student, ids):
    return nn.functional.cross_entropy(student.double().flatten(0, 1), ids[:, 1:].flatten())


class Given(nn.Module):
    """Logits that are given: a leaf for gradients, with others as the teacher's."""

    def __init__(self, student: torch.Tensor, teacher: torch.Tensor):
        super().__init__()
        self.masked = mk.MaskedLinear.from_linear(nn.Linear(4, 4), "2:4")
        self.student = nn.Parameter(student)
        self.register_buffer("teacher", teacher)

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.teacher if self.masked.is_dense else self.student)


def given(vocabulary: int = 40, dtype: torch.dtype = torch.float32, batch: int = 3, length: int = 6):
    generator = torch.Generator().manual_seed(0)
    student, theirs = 3 * torch.randn(2, batch, length, vocabulary, generator=generator)
    ids = torch.randint(vocabulary, (batch, length), generator=generator)
    return Given(student.to(dtype), theirs.to(dtype)), ids


@pytest.mark.parametrize("size", [None, 90], ids=["rows", "pieces"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "temperature"), [("kl", 1.0), ("kl", 2.5), ("ce+kl", 1.0), ("ce+kl", 0.5)])
def test_loss_and_gradient_are_those_of_the_formula(kind, temperature, dtype, size, monkeypatch):
    if size is not None:
        # of two tokens, and one that is left
        monkeypatch.setattr(losses, "PIECE", size)
    model, ids = given(dtype=dtype)
    weight = 0.25 if kind == "ce+kl" else 0.0
    loss = distillation_loss(kind, temperature, ce_weight=weight or None)
    found = loss(model, ids)
    assert found.shape == () and found.dtype == torch.float32
    leaf = model.student.detach().clone().requires_grad_()
    expected = (1 - weight) * divergence(leaf[:, :-1], model.teacher[:, :-1], temperature)
    expected = expected + weight * cross_entropy(leaf[:, :-1], ids)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    (2.0 * found).backward()
    (2.0 * expected).backward()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(model.student.grad, leaf.grad, rtol=3 * eps + 1e-5, atol=1e-7 if eps < 1e-4 else 1e-4)
    with torch.inference_mode():
        assert float(loss(model, ids)) == float(found.detach())


def test_tokens_that_both_exclude_are_no_difference():
    model, ids = given()
    with torch.no_grad():
        for logits in (model.student, model.teacher):
            logits[..., 7] = -math.inf
    loss = distillation_loss("kl")(model, ids)
    loss.backward()
    without = [torch.cat([z[..., :7], z[..., 8:]], -1)[:, :-1] for z in (model.student.detach(), model.teacher)]
    torch.testing.assert_close(loss, divergence(*without, 1.0).float())
    assert model.student.grad.isfinite().all() and not model.student.grad[..., 7].any()


def test_a_number_that_is_none_is_reported():
    model, ids = given()
    model.teacher[0, 1, 3] = math.nan
    assert distillation_loss("kl")(model, ids).isnan()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_its_own_teacher(training):
    model, (ids, *_) = masked_llama(gap=2.0).train(training), batches_of_tokens()
    masked = [module for module in model.modules() if isinstance(module, mk.MaskedLinear)]
    for module in model.modules():
        module.training = training and module in masked
    found = distillation_loss("kl", 2.0)(model, ids)
    student, theirs = both_logits(model, ids)
    torch.testing.assert_close(found, divergence(student, theirs, 2.0).float(), rtol=1e-4, atol=1e-7)
    assert float(found) > 1e-4
    with mk.dense(model):
        assert float(distillation_loss("kl", 2.0)(model, ids)) == 0.0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_likeliest_tokens_give_a_lower_bound(temperature):
    model, ids = given()
    whole = distillation_loss("kl", temperature)(model, ids).item()
    bounds = []
    for k in (1, 4, 16, 64):
        model.student.grad = None
        loss = distillation_loss("kl", temperature, cache=TeacherCache(k))(model, ids)
        loss.backward()
        leaf = model.student.detach().clone().requires_grad_()
        p, q = ((z[:, :-1].double() / temperature).softmax(-1) for z in (model.teacher, leaf))
        order = p.argsort(-1, descending=True)[..., : min(k, 39)]
        parts = [torch.cat([x.gather(-1, order), 1 - x.gather(-1, order).sum(-1, keepdim=True)], -1) for x in (p, q)]
        expected = temperature**2 * (parts[0] * (parts[0] / parts[1]).log()).sum(-1).mean()
        expected.backward()
        torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(model.student.grad, leaf.grad, rtol=1e-3, atol=1e-6)
        bounds.append(loss.item())
    assert bounds == sorted(bounds) and bounds[-1] <= whole * (1 + 1e-5)
    # one token is left: nothing is lumped
    assert bounds[-1] == pytest.approx(whole, rel=1e-4)


def test_the_likeliest_of_equal_logits_are_the_first():
    values = torch.tensor([[0.0, 2.0, -1.0, 2.0, 2.0, -3.0], [-1.0, -2.0, -2.0, -0.5, -2.0, -math.inf]])
    assert sorted(losses._largest(values, 2)[0].tolist()) == [1, 3]
    assert sorted(losses._largest(values, 3)[1].tolist()) == [0, 1, 3]


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_batch_that_is_seen_again_needs_no_teacher(place, tmp_path, monkeypatch):
    model, batches = masked_llama(gap=2.0), batches_of_tokens()
    cache = TeacherCache(8, tmp_path / "teacher" if place == "disk" else None)
    loss = distillation_loss("kl", cache=cache)
    first = [float(loss(model, ids)) for ids in batches]
    calls = []
    plain = losses.teacher_logits
    monkeypatch.setattr(losses, "teacher_logits", lambda *args: (calls.append(1), plain(*args))[1])
    assert [float(loss(model, ids)) for ids in reversed(batches)] == first[::-1]
    assert not calls
    # another temperature is another batch
    distillation_loss("kl", 2.0, cache=cache)(model, batches[0])
    assert len(calls) == 1
    if place == "disk":
        again = distillation_loss("kl", cache=TeacherCache(8, tmp_path / "teacher"))
        assert [float(again(model, ids)) for ids in batches] == first
        assert len(calls) == 1


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_cache_outlives_a_change_of_the_weights(place, tmp_path):
    model, batches = masked_llama(gap=2.0), batches_of_tokens()
    plain = copy.deepcopy(model)
    folder = tmp_path / "teacher" if place == "disk" else None
    loss = distillation_loss("kl", cache=TeacherCache(8, folder))
    loss.fill(model, batches[:2])
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.weight.mul_(1.25)
    layer.weight_changed = True
    with pytest.raises(ValueError, match="^model: expected the weights that it was converted with"):
        distillation_loss("kl")(model, batches[0])
    with pytest.raises(ValueError, match="^cache: expected the dense model's logits of every batch, got none of this"):
        loss(model, batches[2])
    if place == "disk":
        loss = distillation_loss("kl", cache=TeacherCache(8, folder))
    found = loss(model, batches[0])
    lumped = distillation_loss("kl", cache=TeacherCache(8))
    lumped.fill(plain, batches)
    assert float(found) == float(lumped(model, batches[0])) != float(lumped(plain, batches[0]))


def test_a_teacher_that_is_not_converted_yet_fills_a_cache():
    loss, batches = distillation_loss("kl", cache=TeacherCache(8)), batches_of_tokens()
    model = Table(VOCABULARY)
    loss.fill(model, batches)
    mk.convert(model, "2:4", targets=["table"])
    model.table.weight_changed = True
    assert float(loss(model, batches[1])) > 0
    with pytest.raises(ValueError, match="^cache: expected a TeacherCache to fill, got none"):
        distillation_loss("kl").fill(model, batches)


# Whose logits a cache holds: it answers for one dense model alone, whatever becomes of the weights

OTHER = "^cache: expected logits of this model alone, got some of a model with other weights"


def scale_(model, name: str) -> None:
    with torch.no_grad():
        model.get_parameter(name).mul_(1.25)


def replace(model, name: str) -> None:
    module, _, own = name.rpartition(".")
    setattr(model.get_submodule(module), own, torch.nn.Parameter(1.25 * model.get_parameter(name).detach()))


@pytest.mark.parametrize("change", [scale_, replace])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_weights_that_have_changed_since_are_another_teacher(place, name, change, tmp_path):
    model, batches = masked_llama(gap=2.0), batches_of_tokens()
    loss = distillation_loss("kl", cache=TeacherCache(8, tmp_path if place == "disk" else None))
    before = float(loss(model, batches[0]).detach())
    plain = copy.deepcopy(model)
    change(model, name)
    # of a batch that is held, and of a new one
    for batch in batches[:2]:
        with pytest.raises(ValueError, match=OTHER):
            loss(model, batch)
    assert float(loss(plain, batches[0]).detach()) == before


def test_weights_are_read_again_only_where_they_may_have_changed(monkeypatch):
    model, batches = masked_llama(gap=2.0), batches_of_tokens()
    loss, digests, plain = distillation_loss("kl", cache=TeacherCache(8)), [], losses.digest
    monkeypatch.setattr(losses, "digest", lambda tensors: (digests.append(1), plain(tensors))[1])
    mk.MaskTrainer(model, loss, batches, mk.StraightThrough(lr=1.0), seed=0).run(3, progress=False)
    # one of the weights, and one of each batch
    assert len(digests) == 4


def test_weights_without_a_count_of_writes_are_read_each_time():
    with torch.inference_mode():
        model, batch = tiny_model(), batches_of_tokens()[0]
        loss = distillation_loss("kl", cache=TeacherCache(8))
        loss.fill(model, [batch])
        loss.fill(model, [batch])
        scale_(model, "model.norm.weight")
        with pytest.raises(ValueError, match=OTHER):
            loss.fill(model, [batch])


def test_a_model_with_a_tied_head_is_the_same_teacher_once_it_is_converted(tmp_path):
    model, batches = tiny_model(), batches_of_tokens()
    distillation_loss("kl", cache=TeacherCache(8, tmp_path)).fill(model, batches)
    mk.convert(model, "2:4", targets=["*_proj", "lm_head"])
    again = distillation_loss("kl", cache=TeacherCache(8, tmp_path))
    assert float(again(model, batches[0]).detach()) > 0


def filled(model, folder):
    """A loss whose cache in a folder has been filled, as the next process finds it."""
    distillation_loss("kl", cache=TeacherCache(8, folder)).fill(model, batches_of_tokens())
    return distillation_loss("kl", cache=TeacherCache(8, folder))


def trainer_with(loss, folder) -> mk.MaskTrainer:
    estimator = mk.StraightThrough(lr=1.0, train_weights=1e-3)
    return mk.MaskTrainer(masked_llama(gap=2.0), loss, batches_of_tokens(), estimator, seed=0, output_dir=folder)


def test_a_run_continues_with_the_same_teacher_alone(tmp_path):
    model, other = masked_llama(gap=2.0), masked_llama(gap=2.0)
    # the weights of masked layers are those of the run
    scale_(other, "model.norm.weight")
    first = trainer_with(filled(model, tmp_path / "one"), tmp_path / "run")
    first.run(2, progress=False)
    first.close()
    for loss in (filled(other, tmp_path / "two"), distillation_loss("kl", cache=TeacherCache(8, tmp_path / "none"))):
        with pytest.raises(ValueError, match="^output_dir: expected a run with loss teacher .*, got '"):
            trainer_with(loss, tmp_path / "run").resume()
    second = trainer_with(distillation_loss("kl", cache=TeacherCache(8, tmp_path / "one")), tmp_path / "run")
    assert second.resume() == 2
    second.run(1, progress=False)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_what_was_held_without_a_fill_does_not_outlive_the_weights(place, tmp_path):
    model, batches = masked_llama(gap=2.0), batches_of_tokens()
    loss = distillation_loss("kl", cache=TeacherCache(8, tmp_path if place == "disk" else None))
    loss(model, batches[0])
    model.model.layers[0].mlp.up_proj.weight_changed = True
    lacking = (
        "^cache: expected the dense model's logits (of every batch|to be filled in), got none.*weights have changed"
    )
    for act in (lambda: loss(model, batches[0]), lambda: loss.fill(model, batches)):
        with pytest.raises(ValueError, match=lacking) as error:
            act()
        assert ("a folder that all ranks must have access to" in str(error.value)) == (place == "disk")


def test_a_folder_that_was_filled_for_a_model_takes_no_other(tmp_path):
    other, batches = masked_llama(gap=2.0), batches_of_tokens()
    scale_(other, "model.norm.weight")
    loss, files = filled(masked_llama(gap=2.0), tmp_path), sorted(tmp_path.iterdir())
    for act in (lambda: loss.fill(other, batches), lambda: loss(other, batches[0])):
        with pytest.raises(ValueError, match=OTHER):
            act()
    assert sorted(tmp_path.iterdir()) == files


def test_a_fill_that_is_interrupted_continues_after_the_last_batch(tmp_path, monkeypatch):
    model, batches, asked, plain = masked_llama(gap=2.0), batches_of_tokens(), [], losses.teacher_logits
    whole = filled(model, tmp_path / "whole")

    def asks(_, batch):
        asked.append(batch)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return plain(model, batch)

    monkeypatch.setattr(losses, "teacher_logits", asks)
    with pytest.raises(KeyboardInterrupt):
        filled(model, tmp_path / "broken")
    again = filled(model, tmp_path / "broken")
    assert len(asked) == 4
    assert [float(again(model, batch).detach()) for batch in batches] == [
        float(whole(model, batch).detach()) for batch in batches
    ]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"kind": "mse"}, r"kind: expected one of ce, kl, ce\+kl, got 'mse'"),
        ({"temperature": 0.0}, "temperature: expected a finite float above 0, got 0.0"),
        ({"temperature": "1"}, "temperature: expected a finite float above 0, got '1'"),
        ({"kind": "ce+kl", "ce_weight": 1.0}, r"ce_weight: expected a float within \(0, 1\), got 1.0"),
        ({"ce_weight": 0.5}, r'ce_weight: expected it only with "ce\+kl", got 0.5'),
        ({"kind": "ce", "temperature": 2.0}, 'temperature: expected none with "ce"'),
        ({"kind": "ce", "cache": TeacherCache()}, 'cache: expected none with "ce"'),
    ],
)
def test_bad_arguments_are_refused(arguments, error):
    with pytest.raises(ValueError, match=f"^{error}"):
        distillation_loss(**arguments)
    assert distillation_loss("ce") is causal_lm_loss


def test_bad_sizes_are_refused():
    for k in (0, True, 2.0):
        with pytest.raises((TypeError, ValueError), match="^k: expected"):
            TeacherCache(k)
    model, ids = given()
    for loss in (distillation_loss("kl"), lambda *args: distillation_loss("kl").fisher_loss(*args, seed=0)):
        with pytest.raises(ValueError, match="^input_ids: expected"):
            loss(model, ids[:, :1])


def second_moment(loss, model, ids, passes):
    """Mean of the products of a token's gradients, of the first token [vocabulary, vocabulary]."""
    count = ids[:, 1:].numel()
    total = 0.0
    for seed in range(passes):
        model.student.grad = None
        loss.fisher_loss(model, ids, seed).backward()
        rows = count * model.student.grad[:, 0].double()
        total = total + rows.T @ rows
    return total / (passes * len(ids))


@pytest.mark.parametrize(("kind", "temperature"), [("kl", 1.0), ("kl", 2.0), ("ce+kl", 2.0)])
@pytest.mark.slow
def test_sampled_labels_have_the_curvature_of_the_loss(kind, temperature):
    """Hessian by autograd in float64, the mean of squares by sampling; the same token's logits in all rows."""
    model, ids = given(vocabulary=6, batch=500, length=2)
    with torch.no_grad():
        model.student.copy_(model.student[:1, :1].clone().expand_as(model.student))
    weight = 0.25 if kind == "ce+kl" else 0.0
    loss = distillation_loss(kind, temperature, ce_weight=weight or None)

    def of_logits(z):
        ours = (1 - weight) * divergence(z[None, None], model.teacher[:1, :1], temperature)
        return ours - weight * z.log_softmax(-1)[3]

    hessian = torch.autograd.functional.hessian(of_logits, model.student[0, 0].detach().double())
    q = (model.student[0, 0].detach().double() / temperature).softmax(-1)
    if kind == "kl":
        torch.testing.assert_close(hessian, torch.diag(q) - torch.outer(q, q))
    found = second_moment(loss, model, ids, passes=20)
    # 10,000 samples: four standard deviations of a mean of numbers within +-1
    assert float((found - hessian).abs().max()) < 4 / math.sqrt(10_000)
    assert float(hessian.abs().max()) > 0.1
    assert not torch.equal(hessian, torch.zeros_like(hessian))


def test_labels_are_those_of_their_seed():
    model, ids = masked_llama(), batches_of_tokens()[0]
    loss = distillation_loss("kl", 2.0)
    values = [float(loss.fisher_loss(model, ids, seed)) for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_no_float32_copy_of_all_logits_stays():
    """The gradient in the dtype of the logits, and nothing wider than a piece."""
    model, ids = given(vocabulary=256, dtype=torch.bfloat16, batch=8, length=9)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        distillation_loss("ce+kl")(model, ids)
    assert {x.dtype for x in saved} == {torch.bfloat16}
    assert_same_bits(saved[0][:, -1], torch.zeros_like(saved[0][:, -1]))
