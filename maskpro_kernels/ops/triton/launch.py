"""Launch of kernels; no other module launches them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from .tiles import INTERPRETED, TARGETS, Configuration, Rows, Tiles, architecture, configuration

# Number of launches of each kernel in this process
launches: Counter[str] = Counter()


def launch(kernel, name: str, m: int, groups: int, device: torch.device, *args, **constants) -> None:
    """Launch ``kernel`` on ``groups`` groups; do nothing if there are none."""
    if groups == 0:
        return
    target = architecture(device)
    config = configuration(name, m, groups, target)
    grid = (config.programs(groups, TARGETS[target].processors),)
    _launch(kernel, name, grid, device, args, config.options, M=m, BLOCK=config.block, **constants)


def launch_layers(kernel, name: str, m: int, grid: int, largest: int, device: torch.device, *args, **constants) -> None:
    """Launch ``grid`` programs of ``kernel`` on layers; the largest has ``largest`` groups."""
    if grid == 0:
        return
    config = configuration(name, m, largest, architecture(device))
    _launch(kernel, name, (grid,), device, args, config.options, M=m, BLOCK=config.block, **constants)


def programs_of_layers(config: Configuration, counts: Sequence[int], device: torch.device) -> list[int]:
    """Numbers of programs for layers of ``counts`` groups in one launch."""
    # the layers share the device's processors
    processors = -(-TARGETS[architecture(device)].processors // len(counts))
    return [config.programs(groups, processors) for groups in counts]


def launch_rows(kernel, name: str, m: int, rows: int, config: Rows, device: torch.device, *args, **constants) -> None:
    """Launch a kernel whose programs compute some rows each."""
    grid = ((rows + config.rows - 1) // config.rows,)
    _launch(kernel, name, grid, device, args, config.options, M=m, ROWS=config.rows, BLOCK=config.block, **constants)


def launch_blocks(kernel, name: str, programs: int, config: Rows, device: torch.device, *args, **constants) -> None:
    """Launch ``programs`` programs of a kernel over rows and columns of matrices; do nothing if there are none."""
    if programs == 0:
        return
    _launch(kernel, name, (programs,), device, args, config.options, ROWS=config.rows, BLOCK=config.block, **constants)


def launch_elements(kernel, name: str, count: int, device: torch.device, *args, **constants) -> None:
    """Launch ``kernel`` on ``count`` single elements; do nothing if there are none."""
    if count == 0:
        return
    config = configuration(name, 1, count, architecture(device))
    grid = ((count + config.block - 1) // config.block,)
    _launch(kernel, name, grid, device, args, config.options, BLOCK=config.block, **constants)


def launch_tiles(kernel, name: str, m: int, grid: tuple[int, ...], tile: Tiles, device, *args, **constants) -> None:
    """Launch a kernel of products on a grid of tiles."""
    blocks = {"BLOCK_OUT": tile.out, "BLOCK_T": tile.tokens, "BLOCK_K": tile.k}
    _launch(kernel, name, grid, device, args, tile.options, M=m, **blocks, **constants)


def _launch(kernel, name, grid, device, args, options, **constants):
    """Launch and return the compiled kernel; the interpreter returns none."""
    launches[name] += 1
    options = {} if INTERPRETED else {**options, "enable_fp_fusion": False}
    # Triton launches on the current device, whatever the device of the arguments
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return kernel[grid](*args, **constants, **options)
