"""A linear layer with a packed 2:4 weight, by number of tokens: decoding and short prompts.

Set against the dense layer, against unpacking first, and on a GPU against torch's semi-structured matmul and the dense
layer under torch.compile.
"""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE, Work
from torch import nn

import maskpro_kernels as mk

PATTERN = "2:4"
DTYPE = "bfloat16"
# On a GPU layers of LLaMA-2-7B and 70B, else one of SmolLM2-135M
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (8192, 28672)] if DEVICE == "cuda" else [(1536, 576)]
TOKENS = [1, 16, 64, 128, 1024] if DEVICE == "cuda" else [1, 16]
# torch's kernels refuse fewer rows of activations
SEMI_STRUCTURED_TOKENS = 8


class Case:
    def __init__(self, rows: int, k: int, tokens: int):
        generator = torch.Generator(DEVICE).manual_seed(0)
        weight = torch.randn(rows, k, generator=generator, device=DEVICE).bfloat16()
        kept = mk.expand_mask(mk.top_n_mask(weight.abs(), PATTERN), PATTERN)
        self.weight = torch.where(kept, weight, 0)
        self.x = torch.randn(tokens, k, generator=generator, device=DEVICE).bfloat16()
        self.packed = mk.pack_24(self.weight)
        self.compiled = torch.compile(nn.functional.linear, dynamic=False)

    def ours(self):
        return mk.sparse24_linear(self.x, self.packed)

    def unpack_then_matmul(self):
        return nn.functional.linear(self.x, self.packed.unpack())

    def dense(self):
        return nn.functional.linear(self.x, self.weight)

    def dense_compiled(self):
        return self.compiled(self.x, self.weight)

    def providers(self) -> dict:
        found = {"ours": self.ours, "unpack, then matmul": self.unpack_then_matmul, "dense": self.dense}
        if DEVICE == "cuda":
            found["dense under torch.compile"] = self.dense_compiled
            if len(self.x) >= SEMI_STRUCTURED_TOKENS:
                semi_structured = torch.sparse.to_sparse_semi_structured(self.weight)
                found["torch semi-structured"] = lambda: nn.functional.linear(self.x, semi_structured)
        return found

    def check(self, providers) -> None:
        """Each within twice the error of torch's dense product in the same dtype."""
        exact = self.x.double() @ self.weight.double().T
        allowed = 2 * (self.dense().double() - exact).abs().max() + 1e-6 * exact.abs().max()
        for name, provider in providers.items():
            assert (provider().double() - exact).abs().max() <= allowed, name


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_forward(shape, tokens, compare):
    rows, k = shape
    with torch.no_grad():
        case = Case(rows, k, tokens)
        providers = case.providers()
        # nine bits a weight
        work = Work(bytes=rows * k * 9 // 8 + 2 * tokens * (rows + k), flops=2 * tokens * rows * k)
        compare(
            lambda: case.check(providers),
            providers,
            work=work,
            op="packed forward",
            pattern=PATTERN,
            shape=(tokens, *shape),
            dtype=DTYPE,
        )
