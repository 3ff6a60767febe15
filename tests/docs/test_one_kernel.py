"""docs/one_kernel.py has the draws, log-probabilities and updates of the package, bit for bit, and learns."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest
import torch
from helpers.children import ROOT

import maskpro_kernels as mk


@pytest.fixture(scope="module")
def one_kernel():
    spec = importlib.util.spec_from_file_location("one_kernel", ROOT / "docs" / "one_kernel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SEED, STEP, LAYER, DRAW = 7, 3, 2, 1
COUNTER = {"seed": SEED, "step": STEP, "layer": LAYER, "draw": DRAW}


@pytest.fixture
def problem():
    """(x, weight, logits, counter) of a layer of 32 rows."""
    torch.manual_seed(0)
    x, weight, logits = torch.randn(10, 16), torch.randn(32, 16), 3 * torch.randn(32, 16)
    return x, weight, logits, torch.tensor([SEED, STEP, LAYER, DRAW])


def test_draw_log_probability_and_product_are_those_of_the_package(one_kernel, problem):
    x, weight, logits, counter = problem
    y, log_prob = one_kernel.MaskedLinear.apply(x, weight, logits, counter)
    codes = mk.sample_mask(logits, "2:4", **COUNTER)
    exact = x.double() @ (weight * mk.expand_mask(codes, "2:4")).double().T
    own = (x @ (weight * mk.expand_mask(codes, "2:4")).T - exact).abs().max()
    assert (y - exact).abs().max() <= 2 * own + 1e-6 * exact.abs().max()
    # a program sums over its 16 rows, as numpy does in the interpreter
    by_program = mk.mask_log_prob(logits, codes, "2:4").numpy().reshape(2, -1)
    assert torch.equal(log_prob, torch.from_numpy(by_program.sum(1, dtype=np.float32)).sum())


def test_update_is_that_of_the_package(one_kernel, problem):
    x, weight, logits, counter = problem
    expected, target = logits.clone(), torch.randn(10, 32)
    learned = logits.clone()
    loss = one_kernel.reinforce_step(x, target, weight, learned, counter, baseline=2.0, lr=0.5)
    coef = 0.5 * (torch.tensor(loss) - 2.0)
    mk.score_update_(expected, coef, pattern="2:4", **COUNTER)
    assert not torch.equal(expected, logits) and torch.equal(learned.detach(), expected)


def test_it_is_short():
    assert len((ROOT / "docs" / "one_kernel.py").read_text().splitlines()) <= 150


@pytest.mark.slow
def test_it_runs(one_kernel, capsys):
    one_kernel.main()
    lines = capsys.readouterr().out.splitlines()
    before, *losses, after = (float(line.rpartition(" ")[2]) for line in lines)
    assert len(losses) == 4 and min(losses[1:]) < losses[0] and after < 0.75 * before


def test_kernels_md_shows_the_whole_kernel():
    page, file = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("kernels.md", "one_kernel.py"))
    (shown,) = re.findall(r"^```python\n(@triton\.jit\n.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert re.findall(r"^def (\w+)", shown, re.MULTILINE) == ["draw", "masked_linear_kernel"]
    assert f"\n\n\n{shown}\n\n@triton.jit\n" in file
