"""Inputs of the tests of refits: a layer with its Gram matrix, and a small model with its inputs."""

from __future__ import annotations

import torch
from torch import nn

import maskpro_kernels as mk

from .enumerated import KERNEL_DEVICE

PATTERNS = ["1:4", "2:4", "4:8", "8:16"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(pattern, rows=5, k=48, seed=0, dtype=torch.float32):
    """(weight, kept, Gram matrix of correlated inputs, damped)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, k, generator=generator).to(dtype)
    x = torch.randn(200, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    gram = x.T @ x
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    kept = mk.expand_mask(mk.top_n_mask(weight.abs(), pattern), pattern)
    return weight.to(KERNEL_DEVICE), kept.to(KERNEL_DEVICE), gram.to(KERNEL_DEVICE)


class Blocks(nn.Module):
    """Two blocks in a chain, with biases, and inputs in which few directions carry most."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)) for _ in range(2)])

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def inputs(count=3):
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(32, 32, generator=generator) * 0.8 ** torch.arange(32)[:, None]
    return [(torch.randn(64, 32, generator=generator) @ mixing).to(KERNEL_DEVICE) for _ in range(count)]
