"""The smallest language model: an embedding and one masked layer, whose Fisher information is known."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

import maskpro_kernels as mk

VOCABULARY, WIDTH = 6, 16


class SoftmaxModel(nn.Module):
    """The next token's logits are a masked matrix [vocabulary, width] times the last token's embedding."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("embedding", torch.randn(VOCABULARY, WIDTH, generator=generator))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=generator), requires_grad=False)

    def forward(self, input_ids: torch.Tensor, use_cache: bool):
        assert not use_cache
        return SimpleNamespace(logits=self.head(self.embedding[input_ids]))


def softmax_model(pattern: str = "2:4", gap: float = 3.0, init: str = "magnitude") -> SoftmaxModel:
    """A converted one; with ``init`` "smallest" its mask keeps the weights that matter least."""
    model = SoftmaxModel()
    if init == "smallest":
        init = {"head": mk.top_n_mask(-model.head.weight.detach().abs(), pattern)}
    mk.convert(model, pattern, targets=["head"], gap=gap, init=init)
    return model


def sparse_softmax_model() -> SoftmaxModel:
    """One with zeros where its mask drops, so that it is its own teacher; no draw crosses its gap."""
    model = softmax_model(gap=30.0)
    with torch.no_grad():
        model.head.weight.copy_(model.head.top_n_weight())
    return model


def softmax_batches(count: int = 4, rows: int = 3, length: int = 5) -> list[torch.Tensor]:
    return list(torch.randint(VOCABULARY, (count, rows, length), generator=torch.Generator().manual_seed(1)))
