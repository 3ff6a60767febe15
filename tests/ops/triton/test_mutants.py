"""Wrong kernels are found: masked products with one fault each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.cases import cases
from helpers.planted import mutant_of
from helpers.products import (
    COUNTER,
    mask_of,
    normal,
    operands,
    small_tiles,
)
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.ops.triton import masked_gemm
from maskpro_kernels.pattern import NMPattern

# By mutation: the text of masked_gemm.py, by what it is replaced, and the results that then are wrong
MUTANTS = {
    "nothing": ("", "", ""),
    "y is stored without a mask": (
        "tl.store(pointers, total.to(out.dtype.element_ty), mask=(token[None, :] < tokens) & (row[:, None] < rows))",
        "tl.store(pointers, total.to(out.dtype.element_ty))",
        "y",
    ),
    "the gradient of x is stored without a mask": (
        "tl.store(pointers, total.to(out.dtype.element_ty), mask=present)",
        "tl.store(pointers, total.to(out.dtype.element_ty))",
        "x",
    ),
    "the gradient of the weight is stored without a mask": (
        "tl.store(pointers, masked.to(out.dtype.element_ty), mask=inside[:, None])",
        "tl.store(pointers, masked.to(out.dtype.element_ty))",
        "weight",
    ),
    "draws for the neighbour": ("row * row_stride + group)", "row * row_stride + group + 1)", "y x weight"),
    "forgets the last tile of K": ("range(0, groups, GROUPS)", "range(0, groups - GROUPS, GROUPS)", "y"),
    "stays at the first columns of x": ("x_pointers += BLOCK_K\n", "x_pointers += 0\n", "y"),
    "stays at the first rows of the gradient": ("grad_pointers += BLOCK_OUT\n", "grad_pointers += 0\n", "x"),
    "stays at the first tokens of the gradient": ("grad_pointers += BLOCK_T * rows", "grad_pointers += 0", "weight"),
    "stays at the first tokens of x": ("x_pointers += BLOCK_T * groups * M", "x_pointers += 0", "weight"),
}


@pytest.mark.parametrize(
    "mutation", cases(((name,) for name in MUTANTS), slow=lambda name: name not in ("nothing", *list(MUTANTS)[1::4]))
)
def test_mutants_are_found(mutation, tmp_path, monkeypatch, poisoned):
    before, after, wrong = MUTANTS[mutation]
    mutant = mutant_of(masked_gemm, before, after, tmp_path)
    mutant.torch = poisoned
    # which neither the tokens, the rows nor the columns fill
    mutant.tiles_for = lambda *args: replace(small_tiles(*args), out=32)
    for name in ("masked_linear", "masked_linear_input_grad", "masked_linear_weight_grad"):
        monkeypatch.setattr(masked_gemm, name, getattr(mutant, name))
    pattern = NMPattern("2:4")
    x, weight, logits, bias = operands(pattern, tokens=17, rows=48, k=36)
    _, mask = mask_of("drawn", logits, pattern)
    y, _ = mk.masked_linear(x, weight, logits, bias, pattern=pattern, log_prob=False, **COUNTER)
    expected = nn.functional.linear(x, torch.where(mask, weight, 0), bias)
    upstream = normal(*y.shape, seed=4)
    results = {"y": (y, expected)}
    for name, leaf in (("x", x), ("weight", weight)):
        # apart, so that a stray write of one does not show in another
        pair = (torch.autograd.grad(out, leaf, upstream, retain_graph=True)[0] for out in (y, expected))
        results[name] = tuple(pair)
    found = {name for name, (ours, theirs) in results.items() if not torch.allclose(ours, theirs, atol=1e-5)}
    try:
        poisoned.check_margins()
    except AssertionError:
        found.add("margin")
        poisoned.buffers.clear()
    assert found & set(wrong.split()) or ("margin" in found and "stored" in mutation) or not (wrong or found)
    assert found <= {*wrong.split(), "margin"}
