"""A net of all kinds of linears, and that converting it has changed nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import maskpro_kernels as mk


class Net(nn.Module):
    """Linears that fit 2:4, one that does not, one tied to an embedding, and a subclass of nn.Linear."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 8)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 6, bias=False)
        self.odd = nn.Linear(6, 8)
        self.tied = nn.Linear(8, 10, bias=False)
        self.tied.weight = self.embedding.weight
        self.quantizable = nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8)

    def forward(self, x):
        return self.tied(self.odd(self.second(torch.relu(self.first(self.embedding(x))))))


def snapshot(model: nn.Module) -> dict:
    """Modules by identity, their modes and the bits of their tensors."""
    modules = {name: (id(module), module.training) for name, module in model.named_modules()}
    return {"modules": modules, "tensors": {name: t.clone() for name, t in model.state_dict().items()}}


def assert_unchanged(model: nn.Module, before: dict) -> None:
    now = snapshot(model)
    assert now["modules"] == before["modules"]
    assert now["tensors"].keys() == before["tensors"].keys()
    for name, tensor in now["tensors"].items():
        torch.testing.assert_close(tensor, before["tensors"][name], rtol=0, atol=0, equal_nan=True)
    assert not any(module._forward_pre_hooks for module in model.modules())


def refused(model: nn.Module, error: type[Exception], message: str, pattern="2:4", **arguments) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=message):
        mk.convert(model, pattern, **arguments)
    assert_unchanged(model, before)


def token_batches(count: int = 2) -> list[torch.Tensor]:
    return list(torch.randint(0, 10, (count, 3, 5), generator=torch.Generator().manual_seed(1)))


def codes_of(layer: mk.MaskedLinear) -> torch.Tensor:
    return mk.top_n_mask(layer.logits.detach(), layer.pattern)
