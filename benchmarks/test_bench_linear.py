"""A linear layer under a drawn 2:4 mask, forward and backward, by number of tokens.

Set against the dense layer, and against drawing the masked weight first and multiplying then.
"""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE, Work
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.functional.checks import counter_of
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.counter import MaskSource
from maskpro_kernels.ops.pattern import NMPattern

PATTERN = "2:4"
N = 2
M = 4
DTYPE = "bfloat16 operands, float32 logits"
SEED = 11
STEP = 3
LAYER = 5
GAP = 10.0
# On a GPU layers of LLaMA-2-7B, else one of SmolLM2-135M
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)] if DEVICE == "cuda" else [(1536, 576)]
TOKENS = [1, 16, 128, 1024, 4096] if DEVICE == "cuda" else [1, 16, 1024]


class Case:
    """A layer's operands and the providers on them."""

    def __init__(self, rows: int, k: int, tokens: int):
        generator = torch.Generator(DEVICE).manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator, device=DEVICE)

        self.x = normal(tokens, k).bfloat16()
        self.weight = normal(rows, k).bfloat16()
        self.upstream = normal(tokens, rows).bfloat16()
        self.logits = GAP * mk.expand_mask(mk.top_n_mask(self.weight.abs(), PATTERN), PATTERN) + normal(rows, k)
        seed, step = (torch.tensor(i, dtype=torch.int64, device=DEVICE) for i in (SEED, STEP))
        self.counter = {"pattern": PATTERN, "seed": seed, "step": step, "layer": LAYER}
        # of one shape alone, for each number of tokens compiles again
        with_compiler = DEVICE == "cuda" and (rows, k) == SHAPES[0]
        self.compiled = torch.compile(self.by_reference, dynamic=False) if with_compiler else None

    def ours(self):
        return mk.masked_linear(self.x, self.weight, self.logits, log_prob=False, **self.counter)[0]

    def ours_with_log_prob(self):
        return mk.masked_linear(self.x, self.weight, self.logits, **self.counter)

    def draw_then_matmul(self):
        return nn.functional.linear(self.x, mk.sample_masked_weight(self.weight, self.logits, **self.counter))

    def dense(self):
        return nn.functional.linear(self.x, self.weight)

    def masked_by_reference(self):
        keywords = {name: value for name, value in self.counter.items() if name != "pattern"}
        counter = counter_of(self.logits, NMPattern(PATTERN), **keywords)
        return reference.masked_weight(self.weight, MaskSource(self.logits, "drawn", N, M, 1.0, counter))

    def by_reference(self):
        return nn.functional.linear(self.x, self.masked_by_reference())

    def gradients(self, forward):
        x = self.x.detach().requires_grad_()
        weight = self.weight.detach().requires_grad_()
        return torch.autograd.grad(forward(x, weight), (x, weight), self.upstream)

    def our_gradients(self):
        return self.gradients(lambda x, w: mk.masked_linear(x, w, self.logits, log_prob=False, **self.counter)[0])

    def gradients_of_draw_then_matmul(self):
        return self.gradients(
            lambda x, w: nn.functional.linear(x, mk.sample_masked_weight(w, self.logits, **self.counter))
        )

    def dense_gradients(self):
        return self.gradients(nn.functional.linear)

    def check(self):
        """Each product within twice the error of torch's own in the same dtype."""
        masked = self.masked_by_reference()
        exact = nn.functional.linear(self.x.double(), masked.double())
        with_log_prob, log_prob = self.ours_with_log_prob()
        products = [self.ours(), with_log_prob, self.draw_then_matmul()]
        if self.compiled is not None:
            products.append(self.compiled())
        for y in products:
            assert self.within_budget(y, nn.functional.linear(self.x, masked), exact)
        codes = mk.sample_mask(self.logits, **self.counter)
        torch.testing.assert_close(log_prob, mk.mask_log_prob(self.logits, codes, PATTERN).sum(), rtol=1e-5, atol=0)
        exact_x = self.upstream.double() @ masked.double()
        exact_weight = torch.where(masked != 0, self.upstream.double().T @ self.x.double(), 0)
        for x_grad, weight_grad in (self.our_gradients(), self.gradients_of_draw_then_matmul()):
            assert self.within_budget(x_grad, self.upstream @ masked, exact_x)
            assert self.within_budget(weight_grad, torch.where(masked != 0, self.upstream.T @ self.x, 0), exact_weight)

    @staticmethod
    def within_budget(result, by_torch, exact) -> bool:
        error, torch_error = ((y.double() - exact).abs().max() for y in (result, by_torch))
        return bool(error <= 2 * torch_error + 1e-6 * exact.abs().max())


def work(shape: tuple[int, int], tokens: int, products: int) -> Work:
    """Bytes and operations of so many products of a layer: operands of 2 bytes, logits of 4."""
    rows, k = shape
    return Work(bytes=products * (6 * rows * k + 2 * tokens * (rows + k)), flops=products * 2 * tokens * rows * k)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, tokens, compare):
    with torch.no_grad():
        case = Case(*shape, tokens)
        providers = {
            "ours": case.ours,
            "ours, log-probability": case.ours_with_log_prob,
            "draw, then matmul": case.draw_then_matmul,
            "dense": case.dense,
        }
        if case.compiled is not None:
            providers["reference under torch.compile"] = case.compiled
        compare(
            torch.enable_grad()(case.check),
            providers,
            work=work(shape, tokens, 1),
            op="forward",
            pattern=PATTERN,
            shape=(tokens, *shape),
            dtype=DTYPE,
        )


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES[:1], ids=str)
def test_forward_and_backward(shape, tokens, compare):
    case = Case(*shape, tokens)
    providers = {
        "ours": case.our_gradients,
        "draw, then matmul": case.gradients_of_draw_then_matmul,
        "dense": case.dense_gradients,
    }
    todo = work(shape, tokens, 3)
    compare(
        case.check, providers, work=todo, op="forward+backward", pattern=PATTERN, shape=(tokens, *shape), dtype=DTYPE
    )
