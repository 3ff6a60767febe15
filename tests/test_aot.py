"""Every kernel compiles ahead of time for every target, without spills, and holds what bit-exactness asks of it.

Compilation needs a process in which triton does not interpret, so these tests run in a child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = [
    "sample_mask",
    "sample_masked_weight",
    "top_n_mask",
    "top_n_masked_weight",
    "mask_log_prob",
    "mask_score",
    "score_update",
]
# contraction and approximations whose bits differ from machine to machine
FORBIDDEN = ["fma.", "lg2.", "ex2.", "div.full", "div.approx", "rcp.", ".ftz"]

CHILD = """
import json, sys
from aot import TARGETS, build
forbidden, cases = json.load(sys.stdin)
for kernel, n, m, logits, constants in cases:
    for target in TARGETS:
        built = build(kernel, target, n, m, logits=logits, **constants)
        ptx = built.asm.get("ptx", "")
        binary = built.asm["hsaco" if target.startswith("gfx") else "cubin"]
        row = [target, built.registers, built.spills, built.stack, [f for f in forbidden if f in ptx], len(binary)]
        print(json.dumps(row), flush=True)
"""


def compile_all(cases):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps([FORBIDDEN, cases]),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env=environment,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return [json.loads(line) for line in child.stdout.splitlines()]


def check(cases, stack=0):
    rows = compile_all(cases)
    assert len(rows) == 4 * len(cases)
    for target, registers, spills, used_stack, forbidden, size in rows:
        assert size > 0 and registers <= 255
        assert spills == 0 and used_stack <= stack, (target, registers, spills, used_stack)
        assert not forbidden, (target, forbidden)


@pytest.mark.parametrize("logits", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (8, 16)])
def test_draw_and_update_compile_for_every_target(n, m, logits):
    check([(kernel, n, m, logits, {}) for kernel in ("sample_mask", "sample_masked_weight", "score_update")])


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (4, 8), (8, 16)])
def test_every_kernel_compiles_for_every_target(n, m):
    check([(kernel, n, m, "fp32", {}) for kernel in KERNELS])


def test_shards_and_several_draws_compile_for_every_target():
    check([("sample_mask", 2, 4, "fp32", {"WHOLE": False})])
    check([("score_update", n, m, "bf16", {"SEVERAL": True}) for n, m in [(1, 4), (2, 4), (4, 8), (8, 16)]])


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(1, 32), (2, 32), (4, 32), (16, 32), (31, 32), (1, 16), (4, 16), (15, 16)])
def test_large_groups_compile_for_every_target(n, m):
    # 32 columns of logits, keys and scores leave up to 24 bytes of stack
    check([(kernel, n, m, "fp32", {}) for kernel in KERNELS], stack=24 if m == 32 else 0)
