"""The kernels on a CUDA device give the bits of the eager reference on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maskpro_kernels import (
    advance,
    convert,
    mask_log_prob,
    sample_mask,
    sample_masked_weight,
    score_update_,
    top_n_mask,
)
from maskpro_kernels.modules import masked_layers

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("eager_reference")]

PATTERNS = ["1:4", "2:4", "4:8", "8:16", "16:32"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COUNTER = {"temperature": 0.7, "seed": 0x123456789ABCDEF, "step": 77, "layer": 5, "group_offset": 11}


def problem(dtype):
    logits = torch.randn(1000, 1024, generator=torch.Generator().manual_seed(0)) * 4
    return logits.to(dtype), torch.randn(logits.shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_draws_and_updates_have_the_bits_of_the_cpu(pattern, dtype):
    logits, weight = problem(dtype)
    on_gpu = logits.cuda()
    codes = sample_mask(logits, pattern, **COUNTER)
    assert torch.equal(sample_mask(on_gpu, pattern, **COUNTER).cpu(), codes)
    assert torch.equal(top_n_mask(on_gpu, pattern).cpu(), top_n_mask(logits, pattern))
    masked = sample_masked_weight(weight.cuda(), on_gpu, pattern, **COUNTER)
    assert torch.equal(masked.cpu(), sample_masked_weight(weight, logits, pattern, **COUNTER))
    coefs, draws = [0.37, -1.5], [0, 3]
    score_update_(on_gpu, coefs, pattern=pattern, draw=draws, **COUNTER)
    score_update_(logits, coefs, pattern=pattern, draw=draws, **COUNTER)
    assert torch.equal(on_gpu.cpu(), logits)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8"])
def test_log_probabilities_have_the_bits_of_the_cpu(pattern):
    logits, _ = problem(torch.float32)
    codes = sample_mask(logits, pattern, **COUNTER)
    expected = mask_log_prob(logits, codes, pattern)
    assert torch.equal(mask_log_prob(logits.cuda(), codes.cuda(), pattern).cpu(), expected)


def test_shards_have_the_bits_of_the_cpu():
    logits, _ = problem(torch.float32)
    counter = COUNTER | {"group_row_stride": 1000}
    assert torch.equal(sample_mask(logits.cuda(), "2:4", **counter).cpu(), sample_mask(logits, "2:4", **counter))


def test_a_captured_graph_draws_anew_after_each_advance():
    model = nn.Sequential(nn.Linear(1024, 512, bias=False)).cuda()
    convert(model, "2:4", gap=1.0)
    model.train()
    layer = masked_layers(model)["0"]
    with torch.no_grad():
        layer.masked_weight()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            weight = layer.masked_weight()
            advance(model)
        layer.clock.step.zero_()
        for step in range(3):
            graph.replay()
            expected = sample_masked_weight(layer.weight, layer.logits, "2:4", seed=0, step=step)
            assert torch.equal(weight, expected)
