"""Launch configurations, and the one place that launches.

No autotuning: an in-place kernel must never run twice, and a table is the same on every start.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass

import torch

# As triton reads it when it is imported
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# How often each kernel has been launched in this process
launches: Counter[str] = Counter()


@dataclass(frozen=True)
class Configuration:
    """How one kernel is launched: groups a program, and warps."""

    block: int
    num_warps: int = 4


# By kernel and M. A thread holds one group of M keys and noise words in registers, two where M is small.
# The log-probability's quadrature runs NODES passes over M columns, so it too takes a group a thread.
CONFIGURATIONS: dict[tuple[str, int], Configuration] = {
    (kernel, m): Configuration(block=256 if m <= 4 else 128)
    for kernel in (
        "sample_mask",
        "sample_masked_weight",
        "top_n_mask",
        "top_n_masked_weight",
        "mask_log_prob",
        "mask_score",
        "score_update",
    )
    for m in (2, 4, 8, 16, 32)
}

# With one group a thread ptxas holds this one to 32 registers on sm_90 and puts 8 bytes on the stack
CONFIGURATIONS["sample_masked_weight", 8] = Configuration(block=256)

# The interpreter runs one program at a time through numpy: the cost is by call, not by element
INTERPRETER_BLOCK = 1 << 16


def configuration(kernel: str, m: int, groups: int) -> Configuration:
    """The configuration of a kernel for groups of ``m``."""
    if INTERPRETED:
        return Configuration(block=min(INTERPRETER_BLOCK, 1 << max(groups - 1, 1).bit_length()))
    return CONFIGURATIONS[kernel, m]


def launch(kernel, name: str, m: int, groups: int, device: torch.device, *args, **constants) -> None:
    """Launch ``kernel`` on ``groups`` groups; nothing happens where there are none."""
    if groups == 0:
        return
    config = configuration(name, m, groups)
    launches[name] += 1
    grid = ((groups + config.block - 1) // config.block,)
    options = {} if INTERPRETED else {"num_warps": config.num_warps, "enable_fp_fusion": False}
    # Triton launches on the current device, whatever device its arguments live on
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, M=m, BLOCK=config.block, **constants, **options)
