"""Calls of operations by compiled kernels, which an emulator executes, and by the eager reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from helpers.bits import assert_same_bits
from helpers.products import normal
from helpers.routes import take_route
from maskpro_kernels import ops
from maskpro_kernels.functional.checks import counter_of
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.counter import NO_COUNTER, Counter, MaskSource
from maskpro_kernels.ops.pattern import NMPattern, bitmask_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INVERSE = 1 / 0.7
SEED, STEP, LAYER, DRAW, OFFSET = 0x123456789ABCDEF, 4_000_000_007, 5, 3, 12_345


@dataclass(frozen=True)
class Matrix:
    """Logits [rows, groups * M], and where their groups lie in the layer.

    Attributes:
        shard: whether the rows are parts of longer ones.
        before: number of groups before the first one.
        spread: "mixed": gaps, ties, certain masks and zeros of either sign. "certain": the N largest are drawn whatever
            the noise. "open": no block of groups is certain.
    """

    n: int
    m: int
    dtype: torch.dtype = torch.float32
    rows: int = 19
    groups: int = 53
    shard: bool = False
    spread: str = "mixed"
    before: int = 0

    @functools.cached_property
    def logits(self) -> Tensor:
        k = self.groups * self.m
        logits = 3 * normal(self.rows, k, seed=self.m)
        if self.spread == "certain":
            columns = torch.arange(k) % self.m
            logits = torch.where(columns < self.n, 40.0, -40.0).expand(self.rows, k).contiguous()
        elif self.spread == "mixed":
            # float16 ends at 65504
            largest = 3e4 if self.dtype == torch.float16 else 1e30
            for row, change in enumerate(
                (
                    torch.zeros_like,
                    lambda x: 40 * x.sign(),
                    lambda x: (2 * x).round() / 2,
                    lambda x: 0.01 * x,
                    lambda x: largest * x.sign(),
                    lambda x: torch.where(x > 0, 0.0, -0.0),
                )
            ):
                logits[row::7] = change(logits[row::7])
        return logits.to(self.dtype)

    @property
    def counter(self) -> Counter:
        stride = self.groups + 7 if self.shard else None
        place = {"step": STEP, "layer": LAYER, "draw": DRAW, "group_offset": OFFSET, "group_row_stride": stride}
        counter = counter_of(self.logits, NMPattern(f"{self.n}:{self.m}"), SEED, **place)
        return counter._replace(group_offset=OFFSET - self.before)

    def draws(self, count: int) -> Counter:
        return self.counter._replace(draw=torch.tensor([DRAW, 4, 65_535][:count]))

    @property
    def codes(self) -> Tensor:
        return reference.top_n_mask(self.logits, n=self.n, m=self.m)

    def source(self, kind: str = "drawn", logits: Tensor | None = None) -> MaskSource:
        tensor = self.codes if kind == "codes" else self.logits if logits is None else logits
        return MaskSource(tensor, kind, self.n, self.m, INVERSE, self.counter if kind == "drawn" else NO_COUNTER)

    def normal(self, *shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return normal(*(shape or self.logits.shape), seed=seed, dtype=dtype)


def by_both(call: Callable[[], Iterable[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Results of a call by the kernels and by the eager reference."""
    found = list(call())
    with pytest.MonkeyPatch.context() as patched:
        take_route(patched, "eager")
        return found, list(call())


def assert_bits_of_reference(call: Callable[[], Iterable[Tensor]]) -> None:
    found, expected = by_both(call)
    assert_same_bits(found, expected)


def misaligned(tensor: Tensor, by: int) -> Tensor:
    """Equal values, so many elements after an address where every vector load may start."""
    buffer = torch.zeros(tensor.numel() + 16, dtype=tensor.dtype)
    own = buffer[by : by + tensor.numel()].view(tensor.shape)
    own.copy_(tensor)
    return own


def unmoved(tensor: Tensor) -> Tensor:
    return tensor


def sample_mask(of: Matrix, moved=unmoved):
    return [ops.sample_mask(moved(of.logits), of.n, of.m, INVERSE, of.counter)]


def masked_weight(of: Matrix, moved=unmoved, kind: str = "drawn"):
    weight, source = of.normal(seed=1, dtype=of.dtype), of.source(kind)
    return [ops.masked_weight(moved(weight), source._replace(tensor=moved(source.tensor)))]


def top_n_mask(of: Matrix, moved=unmoved):
    return [ops.top_n_mask(moved(of.logits), of.n, of.m)]


def mask_log_prob(of: Matrix, moved=unmoved):
    return [ops.mask_log_prob(moved(of.logits), moved(of.codes), of.n, of.m, INVERSE)]


def mask_score(of: Matrix, moved=unmoved):
    grad = of.normal(*of.codes.shape, seed=2)
    return [ops.mask_score(moved(of.logits), moved(of.codes), moved(grad), of.n, of.m, INVERSE)]


def score_update(of: Matrix, moved=unmoved, draws: int = 1):
    logits, coef = moved(of.logits.clone()), moved(torch.tensor([0.37, -1.2, 0.05][:draws]))
    ops.score_update_(logits, coef, of.n, of.m, INVERSE, of.draws(draws))
    return [logits]


def score_updates(of: Matrix, moved=unmoved):
    return score_update(of, moved, draws=3)


def descend(of: Matrix, moved=unmoved):
    logits, gradient = moved(of.logits.clone()), of.normal(seed=3)
    # what is not finite moves no logit
    gradient[0, : of.m], gradient[2, of.m : 2 * of.m] = torch.inf, torch.nan
    ops.descend_(logits, moved(gradient), torch.tensor(0.3), 2.0, of.m, of.counter)
    return [logits]


def best_swaps(of: Matrix, moved=unmoved):
    rows, m, groups = of.rows, of.m, of.groups
    weight, product = (moved(of.normal(rows, m, groups, seed=seed)) for seed in (4, 5))
    blocks = of.normal(m, m, groups, seed=6).abs()
    return ops.best_swaps(weight, product, moved(of.codes), moved(blocks), of.n, of.m)


def unpack(of: Matrix, moved=unmoved):
    values = of.normal(of.rows, of.groups * of.n, seed=7, dtype=of.dtype)
    return [ops.unpack_nm(moved(values), moved(bitmask_of(of.codes, of.m)), of.n, of.m)]


def adamw(of: Matrix, moved=unmoved):
    master, first, gradient = (of.normal(seed=seed) for seed in (8, 9, 10))
    second = of.normal(seed=11).square()
    gradient[0], first[1], second[1] = 0.0, 0.0, 0.0
    master, first, second, gradient = (moved(tensor) for tensor in (master, first, second, gradient))
    weight = master if of.dtype == torch.float32 else moved(master.to(of.dtype))
    scalars = reference.adamw_scalars(torch.tensor(True), torch.tensor(3.0), 0.01, 0.5)
    ops.adamw_(weight, master, first, second, gradient, moved(of.codes), scalars, of.m)
    return [weight, master, first, second]


# Over groups, by the names of the launch counter; each gives tensors whose bits are those of the reference
OVER_GROUPS: dict[str, Callable[..., list[Tensor]]] = {
    "sample_mask": sample_mask,
    "masked_weight": masked_weight,
    "top_n_mask": top_n_mask,
    "mask_log_prob": mask_log_prob,
    "mask_score": mask_score,
    "score_update": score_update,
    "score_updates": score_updates,
    "descend": descend,
    "best_swaps": best_swaps,
    "unpack": unpack,
    "adamw": adamw,
}
