"""Texts and losses of a model that is cut over ranks, also in its first forward."""

from __future__ import annotations

import pytest
import torch
from helpers.in_ranks import all_in_ranks
from helpers.sharded_jobs import a_mesh
from helpers.tiny_llama import tiny_model
from torch.distributed.fsdp import fully_shard

import maskpro_kernels as mk
from maskpro_kernels.text.batches import sample_windows
from maskpro_kernels.text.losses import TeacherCache, distillation_loss
from maskpro_kernels.text.perplexity import causal_lm_loss, perplexity


def emit(rank: int, cut_over: int | None) -> list[float]:
    """Perplexities: dense, masked, learned, and of the finalized model; and the sum of what it writes."""
    model = tiny_model(tie_word_embeddings=False)
    if cut_over is not None:
        for block in model.model.layers:
            fully_shard(block, mesh=a_mesh([cut_over]))
        fully_shard(model, mesh=a_mesh([cut_over]))
    windows = torch.randint(2, 32, (4, 12), generator=torch.Generator().manual_seed(3))
    reported, cache = [perplexity(model, windows)], TeacherCache()
    # of the dense model, for losses after the conversion
    distillation_loss("kl", cache=cache).fill(model, [windows])
    mk.convert(model, "2:4", init="wanda", calibration=[windows], gap=2.0)
    reported.append(perplexity(model, windows))
    trainer = mk.MaskTrainer(model, causal_lm_loss, list(windows.split(2)), mk.Reinforce(lr=5.0), accumulate=2, seed=0)
    trainer.run(2, progress=False)
    trainer.close()
    reported.append(perplexity(model, windows))
    mk.finalize(model)
    reported.append(perplexity(model, windows))
    return [*reported, cache.teacher, float(sample_windows(model, 1, 2, 8, seed=0).double().sum())]


def test_perplexities_and_samples_are_those_of_one_process(eager_reference):
    alone = emit(0, None)
    assert alone[0] != alone[1]
    for theirs in all_in_ranks(2, emit, cut_over=2):
        assert theirs.pop(4) == alone[4]
        assert theirs == pytest.approx(alone[:4] + alone[5:], rel=1e-5)
