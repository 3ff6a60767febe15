"""Wrong kernels are found: masked and packed products with one fault each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.cases import cases
from helpers.planted import mutant_of
from helpers.products import COUNTER, TEMPERATURE, mask_of, normal, operands, small_tiles
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.pattern import NMPattern
from maskpro_kernels.ops.tables import triton as table
from maskpro_kernels.ops.triton import device, masked_gemm, packed_gemm
from maskpro_kernels.ops.triton.tiles import INTERPRETED

# By mutation: the text of masked_gemm.py, by what it is replaced, and the results that then are wrong. Tiles are
# counted whose log-probability is computed.
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
    "draws for the neighbour": ("row * row_stride + group)", "row * row_stride + group + 1)", "y x weight log_prob"),
    "forgets the last tile of K": (
        "range(start, end, GROUPS)",
        "range(start, end - GROUPS, GROUPS)",
        "y log_prob counted",
    ),
    "stays at the first columns of x": ("x_pointers += BLOCK_K\n", "x_pointers += 0\n", "y"),
    "stays at the first rows of the gradient": ("grad_pointers += BLOCK_OUT\n", "grad_pointers += 0\n", "x"),
    "stays at the first tokens of the gradient": ("grad_pointers += BLOCK_T * rows", "grad_pointers += 0", "weight"),
    "stays at the first tokens of x": ("x_pointers += BLOCK_T * groups * M", "x_pointers += 0", "weight"),
    "later blocks of tokens count the log-probability too": (
        "if tl.program_id(1) == 0:\n                log_probs",
        "if True:\n                log_probs",
        "counted",
    ),
    "later blocks of tokens store a log-probability that they have not counted": (
        "if tl.program_id(1) == 0:\n            tl.store",
        "if True:\n            tl.store",
        "log_prob",
    ),
}


# Of packed_gemm.py: the text, and by what it is replaced
PACKED_MUTANTS = {
    "nothing": ("", ""),
    "y of tiles is stored to one row too many": ("(row[:, None] < rows)", "(row[:, None] <= rows)"),
    "y of tiles is stored to one row too few": ("(row[:, None] < rows)", "(row[:, None] < rows - 1)"),
    "y of tiles is stored for one token too many": (
        "mask=(token[None, :] < tokens)",
        "mask=(token[None, :] <= tokens)",
    ),
    "y of one token is stored to one row too many": (
        "row = tl.minimum(first_row + r, rows - 1)\n        y =",
        "row = tl.minimum(first_row + r, rows)\n        y =",
    ),
    "y of one token is stored to one row too few": (
        "row = tl.minimum(first_row + r, rows - 1)\n        y =",
        "row = tl.minimum(first_row + r, rows - 2)\n        y =",
    ),
    "one group too many is unpacked": ("inside = index < total\n", "inside = index <= total\n"),
    "one group too few is unpacked": ("inside = index < total\n", "inside = index < total - 1\n"),
}


def wrote_beyond(poisoned):
    try:
        poisoned.check_margins()
    except AssertionError:
        poisoned.buffers.clear()
        return True
    return False


def counting(monkeypatch, name):
    """A list that grows by one at each call of a device function, which the interpreter calls as Python does."""
    calls, function = [], getattr(device, name)

    def counted(*args):
        calls.append(name)
        return function(*args)

    monkeypatch.setattr(device, name, counted)
    return calls


@pytest.mark.parametrize(
    "mutation", cases(((name,) for name in MUTANTS), slow=lambda name: name not in ("nothing", *list(MUTANTS)[1::16]))
)
def test_mutants_are_found(mutation, tmp_path, monkeypatch, poisoned):
    before, after, wrong = MUTANTS[mutation]
    if wrong == "counted" and not INTERPRETED:
        pytest.skip("results are those of the kernel: it only computes them more often than needed")
    mutant = mutant_of(masked_gemm, before, after, tmp_path)
    mutant.torch = poisoned
    # which neither the tokens, the rows nor the columns fill
    mutant.tiles_for = lambda *args: replace(small_tiles(*args), out=32)
    for name in ("masked_linear", "masked_linear_input_grad", "masked_linear_weight_grad"):
        monkeypatch.setattr(table, name, getattr(mutant, name))
    pattern = NMPattern("2:4")
    x, weight, logits, bias = operands(pattern, tokens=17, rows=48, k=36)
    codes, mask = mask_of("drawn", logits, pattern)
    counted = counting(monkeypatch, "exact_log_prob") if INTERPRETED else None
    y, log_prob = mk.masked_linear(x, weight, logits, bias, pattern=pattern, **COUNTER)
    expected = nn.functional.linear(x, torch.where(mask, weight, 0), bias)
    upstream = normal(*y.shape, seed=4)
    of_groups = reference.mask_log_prob(logits.detach().cpu(), codes.cpu(), 2, 4, 1 / TEMPERATURE)
    results = {"y": (y, expected), "log_prob": (log_prob.cpu(), of_groups.sum())}
    if counted is not None:
        # two tiles of rows times two of columns, whatever the blocks of tokens
        results["counted"] = torch.tensor(len(counted)), torch.tensor(4)
    for name, leaf in (("x", x), ("weight", weight)):
        # apart, so that a stray write of one does not show in another
        pair = (torch.autograd.grad(out, leaf, upstream, retain_graph=True)[0] for out in (y, expected))
        results[name] = tuple(pair)
    found = {name for name, (ours, theirs) in results.items() if not torch.allclose(ours, theirs, atol=1e-5)}
    if wrote_beyond(poisoned):
        found.add("margin")
    assert found & set(wrong.split()) or ("margin" in found and "stored" in mutation) or not (wrong or found)
    assert found <= {*wrong.split(), "margin"}


@pytest.mark.parametrize(
    "mutation",
    cases(((name,) for name in PACKED_MUTANTS), slow=lambda name: name not in ("nothing", *list(PACKED_MUTANTS)[1::8])),
)
def test_packed_mutants_are_found(mutation, tmp_path, monkeypatch, poisoned):
    """Rows, tokens and groups fill no tile; what lies after an output is looked at as well."""
    mutant = mutant_of(packed_gemm, *PACKED_MUTANTS[mutation], tmp_path)
    mutant.torch = poisoned
    for name in ("nm_linear", "unpack_nm"):
        monkeypatch.setattr(table, name, getattr(mutant, name))
    dense = normal(21, 96).bfloat16()
    weight = torch.where(mk.expand_mask(mk.top_n_mask(dense.float().abs(), "2:4"), "2:4"), dense, 0)
    stored = mk.pack_nm(weight, "2:4")
    wrong = False
    for tokens in (19, 1):
        x = normal(tokens, 96, seed=1).bfloat16()
        y, expected = mk.nm_linear(x, stored), nn.functional.linear(x, weight)
        wrong |= not torch.allclose(y, expected, rtol=0.02, atol=0.1)
    wrong |= not torch.equal(stored.unpack(), weight)
    wrong |= wrote_beyond(poisoned)
    assert wrong == (mutation != "nothing")
