"""Whole processes: what an import costs, and a first draw and update whose graphs or kernels are on disk already."""

from __future__ import annotations

import os
import subprocess
import sys

from harness import DEVICE

FIRST_CALLS = f"""
import torch
import maskpro_kernels as mk
weight, logits = torch.randn(192, 576, device="{DEVICE}").bfloat16(), torch.randn(192, 576, device="{DEVICE}")
before = logits.clone()
masked = mk.sample_masked_weight(weight, logits, "2:4", seed=11)
mk.score_update_(logits, 1e-3, pattern="2:4", seed=11)
# waits for the device
float(logits.sum())
"""
CHECK = f"""
from maskpro_kernels.functional.checks import counter_of
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.counter import MaskSource
coef = torch.tensor([1e-3], device="{DEVICE}")
counter = counter_of(before, mk.NMPattern("2:4"), seed=11)
assert torch.equal(masked, reference.masked_weight(weight, MaskSource(before, "drawn", 2, 4, 1.0, counter)))
reference.score_update_(before, coef, 2, 4, 1.0, counter._replace(draw=counter.draw[None]))
assert torch.equal(logits, before)
"""


def process(code: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_startup(compare):
    providers = {
        "first draw and update": lambda: process(FIRST_CALLS),
        "import maskpro_kernels": lambda: process("import maskpro_kernels"),
        "import torch": lambda: process("import torch"),
    }
    # what the check compiles stays on disk
    compare(
        lambda: process(FIRST_CALLS + CHECK),
        providers,
        op="startup",
        pattern="2:4",
        shape=(192, 576),
        dtype="bfloat16 weight, float32 logits",
    )
