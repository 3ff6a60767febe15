"""Times candidate tiles of the masked products on this GPU.

The fastest are what ``TILES`` in ``maskpro_kernels/ops/triton/tiles.py`` should hold.

Every candidate is checked against torch's matmul under the same mask before it is timed; one that does not
compile or launch is left out.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable

import torch
import triton

import maskpro_kernels as mk
from maskpro_kernels.counter import MaskSource
from maskpro_kernels.functional.checks import counter_of
from maskpro_kernels.ops.triton import masked_gemm, tiles
from maskpro_kernels.ops.triton.tiles import Tiles

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
TOKENS = [16, 32, 64, 128]
NOT_LAUNCHED = (
    triton.compiler.errors.CompilationError,
    triton.runtime.errors.OutOfResources,
    triton.runtime.errors.PTXASError,
)
PRODUCTS = ["masked_linear", "masked_linear_input_grad", "masked_linear_weight_grad"]


def candidates(tokens: int) -> list[Tiles]:
    """Tiles worth timing for that many tokens."""
    sizes = itertools.product([16, 32, 64, 128], {min(tokens, 64), tokens}, [16, 32, 64, 128], [4, 8], [2, 3, 4])
    # a thread that holds more than 8 groups of 4 spills, and a tile of fewer than 64 groups leaves threads idle
    return [
        Tiles(out, block, k, num_warps=warps, num_stages=stages)
        for out, block, k, warps, stages in sizes
        if 64 <= out * k // 4 <= 8 * 32 * warps
    ]


def call(product: str, x, grad, weight, mask) -> Callable[[], torch.Tensor]:
    """The product as a function without arguments."""
    return {
        "masked_linear": lambda: masked_gemm.masked_linear(x, weight, None, mask, False)[0],
        "masked_linear_input_grad": lambda: masked_gemm.masked_linear_input_grad(grad, weight, mask),
        "masked_linear_weight_grad": lambda: masked_gemm.masked_linear_weight_grad(grad, x, mask),
    }[product]


def best(
    product: str,
    shape: tuple[int, int],
    tokens: int,
    tiles: Iterable[Tiles],
    milliseconds: Callable[[Callable], float],
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> list[tuple[float, Tiles]]:
    """(milliseconds, tiles), the fastest first.

    Raises:
        AssertionError: if a tile gives a wrong result.
    """
    rows, k = shape
    x, grad, weight = (
        torch.randn(size, dtype=dtype, device=device) for size in ((tokens, k), (tokens, rows), (rows, k))
    )
    logits = torch.randn(rows, k, device=device) * 4
    counter = counter_of(logits, mk.NMPattern("2:4"), seed=0, step=1)
    mask = MaskSource(logits, "drawn", 2, 4, counter=counter)
    kept = mk.expand_mask(mk.sample_mask(logits, "2:4", **counter.keywords()), "2:4")
    expected = {
        "masked_linear": x @ (weight * kept).T,
        "masked_linear_input_grad": grad @ (weight * kept),
        "masked_linear_weight_grad": (grad.T @ x) * kept,
    }[product]
    times = []
    chosen = masked_gemm.tiles_for
    try:
        for tile in tiles:
            masked_gemm.tiles_for = lambda *_, tile=tile: tile
            run = call(product, x, grad, weight, mask)
            try:
                result = run()
            except NOT_LAUNCHED:
                continue
            torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
            times.append((milliseconds(run), tile))
    finally:
        masked_gemm.tiles_for = chosen
    return sorted(times, key=lambda item: item[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", nargs="+", choices=PRODUCTS, default=PRODUCTS)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--show", type=int, default=3, help="tiles to print for each case")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU to time on")
    print(f"{torch.cuda.get_device_name()}, row {tiles.architecture(torch.device('cuda'))}")
    for product, shape, tokens in itertools.product(arguments.products, SHAPES, TOKENS):
        timer = triton.testing.do_bench
        ranked = best(product, shape, tokens, candidates(tokens), timer, getattr(torch, arguments.dtype))
        for time, tile in ranked[: arguments.show]:
            print(f"{product} {shape[0]}x{shape[1]} {tokens:>4} tokens {time * 1e3:>8.1f} us  {tile}", flush=True)


if __name__ == "__main__":
    main()
