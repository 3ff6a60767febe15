"""Loops of accelerate on sparse models: masks learn and continue with the same bits, zeros stay."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.tiny_llama import tiny_model
from torch.utils.data import DataLoader

accelerate = pytest.importorskip("accelerate")

import maskpro_kernels as mk  # noqa: E402
from maskpro_kernels.kept_zeros import KeptZeros  # noqa: E402
from maskpro_kernels.modules import masked_layers  # noqa: E402
from maskpro_kernels.text.perplexity import causal_lm_loss  # noqa: E402

pytestmark = [pytest.mark.ecosystem, pytest.mark.usefixtures("eager_reference")]

ACCUMULATE = 2


def batches(count: int) -> DataLoader:
    tokens = torch.randint(0, 30, (4 * count, 8), generator=torch.Generator().manual_seed(0))
    return DataLoader(tokens, batch_size=4)


def converted():
    model = tiny_model()
    mk.convert(model, "2:4", gap=4.0)
    return model


def learn_masks(steps: int, skip: int = 0, save=None, load=None):
    """Steps of a loop, of which the first ``skip`` were taken by another one."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    model = converted().train()
    optimizer = mk.MaskOptimizer(model, lr=0.3, loss_scale=1 / ACCUMULATE)
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches(steps * ACCUMULATE))
    if load is not None:
        accelerator.load_state(load)
    for batch in accelerate.skip_first_batches(loader, skip * ACCUMULATE):
        with accelerator.accumulate(model):
            accelerator.backward(causal_lm_loss(model, batch))
            optimizer.step()
            optimizer.zero_grad()
    if save is not None:
        accelerator.save_state(save)
    return [layer.logits.detach().clone() for layer in masked_layers(model).values()]


def test_masks_learn_and_continue_with_the_same_bits(tmp_path):
    learn_masks(3, save=str(tmp_path))
    whole = learn_masks(6)
    assert_same_bits(learn_masks(6, skip=3, load=str(tmp_path)), whole)
    trainer = mk.MaskTrainer(
        model := converted(), causal_lm_loss, list(batches(12)), mk.StraightThrough(lr=0.3), seed=0, accumulate=2
    )
    trainer.run(6, progress=False)
    theirs = [layer.logits.detach() for layer in masked_layers(model).values()]
    torch.testing.assert_close(whole, theirs, rtol=1e-4, atol=1e-4)


def test_zeros_stay_for_20_steps_of_adamw():
    accelerator = accelerate.Accelerator(cpu=True)
    model = mk.finalize(converted()).requires_grad_()
    kept = KeptZeros(model, "2:4")
    before = {name: matrix.get().clone() for name, matrix in kept.held.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches(20))
    for batch in loader:
        accelerator.backward(causal_lm_loss(model, batch))
        optimizer.step()
        kept.restore()
        optimizer.zero_grad()
    for name, matrix in kept.held.items():
        weight = matrix.get()
        assert ((weight.view(-1, 4) != 0).sum(1) == 2).all()
        assert torch.equal(weight == 0, before[name] == 0) and not torch.equal(weight, before[name])
