"""A training step's own work on one layer under 2:4: draw the masked weight, update the logits, both; log-probability.

The eager formulation keeps the mask from draw to update; the others draw it again.
"""

from __future__ import annotations

from collections.abc import Callable

import eager
import pytest
import torch
from harness import DEVICE, Work

import maskpro_kernels as mk
from maskpro_kernels.functional.checks import counter_of
from maskpro_kernels.modules import initial_logits
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.counter import MaskSource
from maskpro_kernels.ops.pattern import NMPattern

PATTERN = "2:4"
N = 2
M = 4
DTYPE = "bfloat16 weight, float32 logits"
GAP = 10.0
SEED = 11
STEP = 3
LAYER = 5
DRAW = 0
# Small enough that thousands of timed updates leave the logits near where they were
COEF = 1e-6
CHECKED_COEF = 0.37
# The eager score loses digits to the cancellation in 1 - p
EAGER_SCORE_ERROR = 1e-3
# Linears of SmolLM2-135M; on a GPU also one that does not fit its cache
SHAPES = [(192, 576), (1536, 576)] + ([(14336, 4096)] if DEVICE == "cuda" else [])
# The eager reference takes seconds for a large layer on a CPU: there it checks the first rows and times the small one
CHECKED_ROWS = 192


class Layer:
    """A layer's tensors, and the step by each provider on them."""

    def __init__(self, shape: tuple[int, int]):
        self.generator = torch.Generator(DEVICE).manual_seed(0)
        weight = torch.randn(shape, generator=self.generator, device=DEVICE)
        self.weight = weight.bfloat16()
        self.logits = initial_logits(reference.top_n_mask(weight.abs(), n=N, m=M), PATTERN, GAP)
        # draws then leave the initial mask in places, and the score has something to say
        self.logits += torch.randn(shape, generator=self.generator, device=DEVICE)
        self.where = counter_of(self.logits, NMPattern(PATTERN), SEED, STEP, LAYER, DRAW)
        self.counter = self.where.keywords()
        self.mask = self.eager_draw()[0]
        self.codes = mk.sample_mask(self.logits, PATTERN, **self.counter)

    def our_draw(self):
        return mk.sample_masked_weight(self.weight, self.logits, PATTERN, **self.counter)

    def our_update(self, coef=COEF):
        mk.score_update_(self.logits, coef, pattern=PATTERN, **self.counter)

    def our_step(self):
        self.our_draw()
        self.our_update()

    def reference_draw(self, rows=None):
        source = MaskSource(self.logits[:rows], "drawn", N, M, 1.0, self.where)
        return reference.masked_weight(self.weight[:rows], source)

    def reference_update(self, coef=COEF, rows=None):
        coefs = torch.tensor([coef], device=DEVICE)
        where = self.where._replace(draw=self.where.draw[None])
        reference.score_update_(self.logits[:rows], coefs, N, M, 1.0, where)

    def reference_step(self):
        self.reference_draw()
        self.reference_update()

    def our_log_prob(self):
        return mk.mask_log_prob(self.logits, self.codes, PATTERN)

    def reference_log_prob(self):
        return reference.mask_log_prob(self.logits, self.codes, N, M, 1.0)

    def eager_draw(self):
        return eager.draw(self.weight, self.logits, self.generator)

    def eager_update(self):
        eager.update_(self.logits, self.mask, COEF)

    def eager_step(self):
        mask, _ = self.eager_draw()
        eager.update_(self.logits, mask, COEF)

    def updated_logits(self, update, **options) -> torch.Tensor:
        """The first logits after one ``update``, which is then undone."""
        original = self.logits.clone()
        update(CHECKED_COEF, **options)
        updated = self.logits[:CHECKED_ROWS].clone()
        self.logits.copy_(original)
        return updated

    def check(self) -> None:
        """Ours and the reference agree bit for bit; the eager formulation draws and scores the same law."""
        masked = self.our_draw()
        assert torch.equal(masked[:CHECKED_ROWS], self.reference_draw(CHECKED_ROWS))
        assert torch.equal(self.our_log_prob(), self.reference_log_prob())
        assert torch.equal(
            self.updated_logits(self.our_update), self.updated_logits(self.reference_update, rows=CHECKED_ROWS)
        )

        mask, eager_masked = self.eager_draw()
        assert (mask.view(-1, M).sum(-1) == N).all()
        assert torch.equal(eager_masked, torch.where(mask, self.weight, 0))
        top = mk.expand_mask(reference.top_n_mask(self.logits, n=N, m=M), PATTERN)
        ours, eagers = (self.left_the_top(drawn, top) for drawn in (masked != 0, mask))
        assert abs(ours - eagers) <= 6 * (ours + eagers) ** 0.5, (ours, eagers)

        codes = mk.pack_mask(mask, PATTERN)
        exact = reference.mask_score(self.logits, codes, torch.ones_like(codes, dtype=torch.float32), N, M, 1.0)
        torch.testing.assert_close(eager.score(self.logits, mask), exact, rtol=0, atol=EAGER_SCORE_ERROR)

    def check_compiled(self, op: str, compiled: Callable) -> None:
        """The compiled reference has the results of the reference, except decisions by rounding."""
        if op == "draw":
            assert (compiled() != self.reference_draw()).float().mean() < 1e-4
        elif op == "update":
            torch.testing.assert_close(
                self.updated_logits(compiled), self.updated_logits(self.reference_update), rtol=0, atol=1e-5
            )
        else:
            torch.testing.assert_close(compiled(), self.reference_log_prob(), rtol=1e-5, atol=1e-6)

    @staticmethod
    def left_the_top(drawn: torch.Tensor, top: torch.Tensor) -> int:
        return int((drawn != top).view(-1, M).any(-1).sum())


# Bytes a weight that each operation cannot do without: weights of 2, logits of 4, a code and a result by group of 4
BYTES = {"draw": 2 + 4 + 2, "update": 4 + 4, "draw+update": 2 + 4 + 2 + 4, "log-probability": 4 + (1 + 4) / M}


@pytest.mark.parametrize("op", BYTES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step(shape, op, compare):
    with torch.inference_mode():
        layer = Layer(shape)
        checks = [layer.check]
        providers = {
            "draw": {"ours": layer.our_draw, "eager formulation": layer.eager_draw},
            "update": {"ours": layer.our_update, "eager formulation": layer.eager_update},
            "draw+update": {"ours": layer.our_step, "eager formulation": layer.eager_step},
            "log-probability": {"ours": layer.our_log_prob},
        }[op]
        by_reference = {
            "draw": layer.reference_draw,
            "update": layer.reference_update,
            "draw+update": layer.reference_step,
            "log-probability": layer.reference_log_prob,
        }[op]
        if DEVICE == "cuda" or shape[0] <= CHECKED_ROWS:
            providers["eager reference"] = by_reference
        if shape == SHAPES[0] and op != "draw+update":
            # each takes a quarter of a minute to compile
            providers["reference under torch.compile"] = compiled = torch.compile(by_reference, dynamic=False)
            checks.append(lambda: layer.check_compiled(op, compiled))
        work = Work(bytes=round(BYTES[op] * shape[0] * shape[1]))

        def gate():
            for check in checks:
                check()

        compare(gate, providers, work=work, op=op, pattern=PATTERN, shape=shape, dtype=DTYPE)
