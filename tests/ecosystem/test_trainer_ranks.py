"""The Trainer of transformers in two processes: masks learn by the slopes of both."""

from __future__ import annotations

import os

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.in_ranks import all_in_ranks

pytestmark = pytest.mark.ecosystem


def learn_on_rank(rank: int, folder: str, ranks: int) -> list[torch.Tensor]:
    """Two batches a step, whether of two ranks or of one."""
    if ranks > 1:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
        os.environ.update({name: str(value) for name, value in own.items()})
    from helpers.tiny_llama import tiny_model
    from transformers import Trainer, TrainingArguments

    from maskpro_kernels import convert
    from maskpro_kernels.hf import MaskCallback
    from maskpro_kernels.modules import masked_layers

    model = tiny_model()
    convert(model, "2:4", gap=4.0)
    rows = torch.randint(0, 30, (32, 8), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        folder, max_steps=4, learning_rate=0.3, per_device_train_batch_size=4, gradient_accumulation_steps=2 // ranks,
        train_sampling_strategy="sequential", max_grad_norm=0.0, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    texts = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model, arguments, train_dataset=texts, callbacks=[MaskCallback()])
    trainer.train()
    assert arguments.world_size == ranks
    return [layer.logits.detach().clone() for layer in masked_layers(model).values()]


def test_ranks_take_the_steps_of_one_process(tmp_path):
    first, second = all_in_ranks(2, learn_on_rank, folder=str(tmp_path / "two"), ranks=2)
    assert_same_bits(first, second)
    (alone,) = all_in_ranks(1, learn_on_rank, folder=str(tmp_path / "one"), ranks=1)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-4)
