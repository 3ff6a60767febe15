"""Operands of masked products, their masks by the eager reference, and the error that a product may have."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import strategies as st

import maskpro_kernels as mk
from helpers.cases import cases
from helpers.enumerated import KERNEL_DEVICE
from maskpro_kernels.functional.checks import counter_of
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.pattern import NMPattern
from maskpro_kernels.ops.triton import tiles

KINDS = ["drawn", "codes"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DRAW = {"seed": 0x123456789ABCDEF, "step": 5, "layer": 3, "draw": 1}
TEMPERATURE = 0.8
# as the public functions take them
COUNTER = {**DRAW, "temperature": TEMPERATURE}


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(KERNEL_DEVICE)


def within_budget(result, same_by_torch, exact):
    """err(kernel) <= 2 err(torch in the same dtype) + 1e-6 max |result|, errors against float64."""
    error = (result.double() - exact).abs().max()
    error_of_torch = (same_by_torch.double() - exact).abs().max()
    assert error <= 2 * error_of_torch + 1e-6 * exact.abs().max(), (float(error), float(error_of_torch))


def mask_of(kind, logits, pattern):
    """(group codes, bool mask) by the eager reference on the CPU."""
    scores = logits.detach().cpu()
    if kind == "drawn":
        counter = counter_of(scores, pattern, **DRAW)
        codes = reference.sample_mask(scores, pattern.n, pattern.m, 1 / TEMPERATURE, counter)
    else:
        codes = reference.top_n_mask(scores, pattern.n, pattern.m)
    codes = codes.to(logits.device)
    return codes, mk.expand_mask(codes, pattern)


@st.composite
def problems(draw, group_sizes, most_tokens, most_rows, most_k):
    m = draw(st.sampled_from(group_sizes))
    pattern = NMPattern(f"{draw(st.integers(1, m - 1))}:{m}")
    k = m * draw(st.integers(1, most_k // m))
    rows, tokens = draw(st.integers(1, most_rows)), draw(st.integers(1, most_tokens))
    dtype, logits_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    shape = draw(st.sampled_from([(tokens, k), (1, tokens, k), (tokens, 1, 1, k), (k,)]))
    seed = draw(st.integers(0, 1 << 20))
    x = normal(*shape, seed=seed, dtype=dtype)
    if draw(st.booleans()):
        x = torch.stack([x, x + 1], dim=-1)[..., 0]
    bias = draw(st.sampled_from([None, normal(rows, seed=seed + 3, dtype=dtype), normal(1, dtype=dtype).expand(rows)]))
    if bias is not None and draw(st.booleans()):
        bias = torch.stack([bias, bias + 1], dim=-1)[..., 0]
    weight = normal(rows, k, seed=seed + 1, dtype=dtype)
    logits = (3 * normal(rows, k, seed=seed + 2)).to(logits_dtype)
    return draw(st.sampled_from(KINDS)), x, weight, logits, bias, pattern


def small_tiles(product, m, *_):
    return tiles.Tiles(out=16, tokens=16, k=max(32, m))


PATTERNS = [NMPattern(p) for p in ("1:4", "2:4", "4:8", "8:16")]
# Groups of 16 take the interpreter seconds
INTERPRETED = [*PATTERNS[:3], pytest.param(PATTERNS[3], marks=pytest.mark.slow)]


def tiled_cases(dtypes: list, fast) -> list:
    """(tiles, pattern, dtype) of the interpreter, where a dtype may be a tuple of several.

    Slow are other patterns than 2:4, but for 4:8 in one tile of ``fast``, and many tiles of other dtypes.
    """

    def slow(tiled, pattern, dtype):
        if str(pattern) != "2:4":
            return (tiled, str(pattern), dtype) != ("one tile", "4:8", fast)
        return tiled == "many tiles" and dtype != fast

    return cases(itertools.product(("one tile", "many tiles"), PATTERNS, dtypes), slow)


def operands(pattern, tokens=20, rows=48, k=96, dtype=torch.float32, bias=True):
    """x, weight, logits, bias, each a leaf that requires its gradient."""
    k -= k % pattern.m
    tensors = [normal(tokens, k, dtype=dtype), normal(rows, k, seed=1, dtype=dtype), 3 * normal(rows, k, seed=2)]
    tensors.append(normal(rows, seed=3, dtype=dtype) if bias else None)
    return [None if t is None else t.requires_grad_() for t in tensors]
