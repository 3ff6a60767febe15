"""The memory that steps will take: what is told beforehand, beside what they then allocate."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from helpers.allocated import allocated
from helpers.cases import slow
from helpers.routes import take_route
from helpers.tiny_llama import tiny_model
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.hf import checkpoint_activations
from maskpro_kernels.learn import model_masks, offloaded_logits
from maskpro_kernels.learn.amounts import NOTHING
from maskpro_kernels.learn.memory import Allocations, activation_bytes, memory_need
from maskpro_kernels.learn.offloaded_logits import Fetched, Transfers
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.ops.cpu import kernels
from maskpro_kernels.prune.selection import layers_to_convert
from maskpro_kernels.text.losses import distillation_loss

ROWS, LENGTH = 8, 64
SIZES = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 256, "max_position_embeddings": LENGTH}


def a_model(dtype=torch.float32, checkpointed=False):
    model = tiny_model(**SIZES).to(dtype)
    if checkpointed:
        checkpoint_activations(model)
    return model


def need_of(model, estimator, loss_fn, accumulate=1, rows=ROWS):
    layers, _ = layers_to_convert(model, "2:4")

    def batch_of(count):
        return torch.zeros(count, LENGTH, dtype=torch.int64)

    weights = [layer.weight for layer in layers.values()]
    found = activation_bytes(model, weights, loss_fn, batch_of, rows, estimator.needs_gradients).of(rows)
    how = {"pattern": "2:4", "logits_dtype": torch.float32, "alone": accumulate == 1, "activations": found}
    return memory_need(model, layers, estimator, **how)


@pytest.mark.parametrize(
    ("dtype", "loss", "estimator", "accumulate", "checkpointed"),
    [
        (torch.float32, "ce", mk.StraightThrough, 1, False),
        slow(torch.bfloat16, "kl", mk.StraightThrough, 1, False),
        (torch.float32, "ce", mk.StraightThrough, 1, True),
        slow(torch.float32, "ce+kl", mk.StraightThrough, 3, False),
        (torch.bfloat16, "ce", mk.Reinforce, 1, False),
    ],
)
def test_a_step_allocates_what_was_told(monkeypatch, dtype, loss, estimator, accumulate, checkpointed):
    # the interpreter, the eager reference and poisoned allocations hold more than what users run
    take_route(monkeypatch, "compiled")
    monkeypatch.setattr(kernels, "torch", torch)
    model, loss_fn, estimator = a_model(dtype, checkpointed), distillation_loss(loss), estimator()
    need = need_of(model, estimator, loss_fn, accumulate)
    mk.convert(model, "2:4", gap=15.0)
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, SIZES["vocab_size"], (ROWS, LENGTH), generator=draw) for _ in range(2)]
    trainer = mk.MaskTrainer(model, loss_fn, batches, estimator, seed=0, accumulate=accumulate)
    # compiles, and takes what the first step alone takes
    trainer.step()
    assert need.activations + need.gradients == pytest.approx(allocated(trainer.step).peak, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train_weights", [None, 1e-3])
def test_what_is_held_from_step_to_step(dtype, train_weights):
    model = a_model(dtype)
    estimator = mk.StraightThrough(train_weights=train_weights)
    need = need_of(model, estimator, distillation_loss("ce"))
    mk.convert(model, "2:4", gap=15.0)
    layers = masked_layers(model).values()
    assert need.logits == sum(layer.logits.nbytes for layer in layers)
    assert need.masks == sum(layer.weight.numel() // 4 for layer in layers)
    tied = {id(parameter): parameter for parameter in model.parameters()}.values()
    buffers = sum(buffer.nbytes for name, buffer in model.named_buffers() if "inv_freq" in name)
    assert need.weights == sum(p.nbytes for p in tied) - need.logits + buffers
    weights = sum(layer.weight.nbytes for layer in layers)
    estimator.begin(masked_layers(model))
    held = {tensor.untyped_storage()._cdata: tensor.nbytes for tensor in estimator.tensors().values()}
    # of float32 the master is the weight itself, which is told with the weights
    own = sum(held.values()) - (weights if train_weights and dtype == torch.float32 else 0)
    assert need.optimizer == pytest.approx(own, abs=1000)


class HeldTransfers(Transfers):
    """Copies that are let go only where something waits for their end; their bytes are counted."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.live = self.peak = 0

    def _free(self, size):
        self.live -= size

    def fetch(self, source):
        copy = source.clone()
        self.live += copy.nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(copy, self._free, copy.nbytes)
        return Fetched(copy, lambda: None)

    def used(self, logits):
        return lambda: logits.numel()

    def put_back(self, logits, target):
        return lambda: target.copy_(logits)


@pytest.mark.parametrize("estimator", [mk.StraightThrough, mk.Reinforce])
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
def test_copies_of_logits_that_live_elsewhere(monkeypatch, eager_reference, estimator, logits_dtype):
    """Three layers that follow each other, of widths that tell which."""
    transfers, elsewhere = HeldTransfers(), torch.device("cuda")
    monkeypatch.setattr(offloaded_logits, "transfers_of", lambda device: transfers)
    for module in (offloaded_logits, model_masks):
        monkeypatch.setattr(module, "offloaded", lambda layer: isinstance(layer, mk.MaskedLinear))
    widths = [8, 16, 64, 32, 48, 8, 24]
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(k, rows) for k, rows in itertools.pairwise(widths)))
    layers, own = {str(i): layer for i, layer in enumerate(model)}, estimator(lr=0.1)
    how = {"pattern": "2:4", "logits_dtype": logits_dtype, "alone": True, "activations": NOTHING}
    assert memory_need(model, layers, own, **how).copies == 0
    need = memory_need(model, layers, own, logits_device=elsewhere, **how)
    mk.convert(model, "2:4", gap=1.0, logits_dtype=logits_dtype)
    batches = [torch.randn(4, 8) for _ in range(2)]
    mk.MaskTrainer(model, lambda model, x: model(x).square().mean(), batches, own, seed=0).run(2)
    assert need.copies == transfers.peak == (16 * 64 + 64 * 32 + 32 * 48) * logits_dtype.itemsize
    assert need.copies.formula == f"(1,024 + 2,048 + 1,536) logits of layers in a row x {logits_dtype.itemsize} bytes"


def test_activations_grow_with_the_rows(monkeypatch):
    """Of a few rows they are computed, of more told by these."""
    model, loss_fn = a_model(), distillation_loss("ce")
    few, many = (need_of(model, mk.StraightThrough(), loss_fn, rows=rows).activations for rows in (2, 16))
    assert 6 < many / few < 8.5


def test_nothing_of_the_model_changes():
    model = a_model(checkpointed=True)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    model.train()
    before = {name: (p.requires_grad, p._version, p.grad) for name, p in model.named_parameters()}
    need_of(model, mk.StraightThrough(), distillation_loss("kl"))
    assert {name: (p.requires_grad, p._version, p.grad) for name, p in model.named_parameters()} == before
    assert all(module.training for module in model.modules())


def test_an_estimator_of_elsewhere_is_taken_for_one_that_holds_nothing():
    class Idle(mk.Reinforce):
        pass

    need = need_of(a_model(), Idle(), distillation_loss("ce"))
    assert need.optimizer == need.gradients == 0
    assert need.total == need.weights + need.logits + need.masks + need.activations


def test_allocations_are_counted_until_they_are_freed():
    weight = nn.Parameter(torch.zeros(8, 8))
    with Allocations([weight]) as allocations:
        one = weight + 1
        view = one.t()
        two = weight.t()
        assert allocations.live == 256
        kept = one * 2
        del one, view, two
        assert allocations.live == 256 and allocations.peak == 512
    assert kept.shape == (8, 8)
