"""Host time of calls, on a CPU with a launcher that runs nothing: what Python takes beside Triton and the GPU.

    python benchmarks/host_time.py

prints microseconds a call, the least of several rounds. Of a GPU's calls only the switch to its device is missing.
``TRITON_INTERPRET`` must not be set.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from triton.runtime.jit import KernelInterface

import maskpro_kernels as mk
from maskpro_kernels.ops.triton import tiles

TOKENS = 16
ROWS = 256
K = 256


@contextmanager
def without_launches() -> Iterator[None]:
    """CPU tensors take the route of a GPU's, up to Triton."""
    launcher = KernelInterface.__getitem__
    target = tiles.ON_CPU
    try:
        KernelInterface.__getitem__ = lambda kernel, grid: lambda *_, **__: None
        tiles.ON_CPU = "sm_90"
        tiles.architecture.cache_clear()
        yield
    finally:
        KernelInterface.__getitem__ = launcher
        tiles.ON_CPU = target
        tiles.architecture.cache_clear()


def calls() -> dict[str, Callable[[], object]]:
    """Calls by name, of 2:4 and 16 bits."""
    torch.manual_seed(0)
    linear = nn.Linear(K, ROWS).bfloat16()
    x = torch.randn(TOKENS, K).bfloat16()
    layer = mk.MaskedLinear.from_linear(linear, "2:4")
    packed = mk.Sparse24Linear.from_masked(layer)
    weight = layer.weight
    bias = layer.bias.detach()
    logits = layer.logits.detach()
    counter = {"seed": layer.counter_state.seed, "step": layer.counter_state.step}
    learning = logits.clone().requires_grad_()

    def masked(logits, log_prob):
        return mk.masked_linear(x, weight, logits, bias, pattern="2:4", log_prob=log_prob, **counter)

    return {
        "masked_linear": lambda: masked(logits, False),
        "masked_linear, log-probability with a gradient": lambda: masked(learning, True),
        "MaskedLinear": lambda: layer(x),
        "Sparse24Linear": lambda: packed(x),
    }


def microseconds(call: Callable[[], object], rounds: int, count: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - start) / count)
    return 1e6 * best


def measured(rounds: int = 200, count: int = 20) -> dict[str, float]:
    """Microseconds of each call."""
    calls_by_name = calls()
    with without_launches():
        return {name: microseconds(call, rounds, count) for name, call in calls_by_name.items()}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, time_of in measured().items():
        print(f"{name:<50} {time_of:6.1f} us")
