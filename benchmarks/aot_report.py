"""What the kernels cost on GPUs, read from their compiled code on a machine without one.

For each kernel and launch configuration: registers a thread, bytes spilled, shared memory, occupancy, and SASS
instructions a weight. The latter are given for a block whose draws are determined by its logits alone, and for one
that computes noise. Then, for the layer shapes of LLaMA-2-7B, the time by bytes, by issue slots and by matrix units of
the forward product, of 16-bit operands with float32 logits; and for those of LLaMA-2-7B and 70B, of products with
packed weights, beside the dense layer's. NVIDIA targets only. Nothing here is measured: the figures bound what a
measurement can show.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from aot import Built, build, build_packed, build_product

from maskpro_kernels.ops.triton.packed import MULTIPLIED, chunk_length
from maskpro_kernels.ops.triton.tiles import (
    CONFIGURATIONS,
    DRAWN_TOKENS,
    PACKED_TILES,
    PROCESSORS,
    ROWS,
    TILES,
    Rows,
    Tiles,
    rows_for,
    tiles_for,
)

PATTERNS = [(1, 4), (2, 4), (4, 8), (8, 16)]
GROUP_KERNELS = ["sample_mask", "masked_weight", "score_update"]
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
TOKENS = [1, 16, 128, 1024, 4096]
# Of LLaMA-2-7B and 70B
SERVED_SHAPES = [*SHAPES, (8192, 8192), (28672, 8192), (8192, 28672)]
SERVED_TOKENS = [1, 2, 16, 32, 64]
# The costs as of the last commit that changed them on purpose, by release of Triton
TABLE = Path(__file__).with_name("aot_table.json")
KEY = ("kernel", "pattern", "target")
TOLERANCE = 0.05
# Share of the groups that a logit gap of 10 leaves open: a block with one of them computes the noise of all
OPEN_GROUPS = 0.002


@dataclass(frozen=True)
class Chip:
    """What bounds a kernel on one GPU: data sheets and the CUDA programming guide."""

    name: str
    bytes_per_second: float
    clock: float
    flops_16_bit: float
    shared_bytes: int
    registers: int = 65536
    warps: int = 64
    schedulers: int = 4


CHIPS = {
    "sm_80": Chip("A100 SXM 80 GB", 2.039e12, 1.41e9, 312e12, 164 << 10),
    "sm_90": Chip("H100 SXM", 3.35e12, 1.83e9, 989e12, 228 << 10),
    "sm_100": Chip("B200", 8.0e12, 1.85e9, 2250e12, 228 << 10),
}


def occupancy(built: Built, num_warps: int, chip: Chip) -> float:
    """Resident warps over the most there can be: by registers, by shared memory, by 32 blocks."""
    # registers go to warps in units of 256, and the driver keeps 1 KiB of shared memory a block
    registers_a_warp = -(-max(built.registers, 1) * 32 // 256) * 256
    by_registers = chip.registers // (registers_a_warp * num_warps)
    by_shared = chip.shared_bytes // (built.shared + 1024)
    return min(by_registers, by_shared, 32, chip.warps // num_warps) * num_warps / chip.warps


@functools.cache
def disassembled(cubin: bytes) -> tuple[str, ...]:
    """Labels, which end in ":", and instructions."""
    nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout
    lines = []
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_\w+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line)
        if label:
            lines.append(label[1] + ":")
        elif instruction and not instruction[1].startswith("NOP"):
            lines.append(instruction[1])
    return tuple(lines)


def _branches(lines: tuple[str, ...]) -> list[tuple[int, int, bool]]:
    """(where it stands, where it leads, whether on a condition) of every branch."""
    where = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    targets = ((i, line, re.search(r"\bBRA\b.*?`\((\.L_\w+)\)", line)) for i, line in enumerate(lines))
    return [(i, where[target[1]], line.startswith("@")) for i, line, target in targets if target]


def largest_loop(lines: tuple[str, ...]) -> tuple[int, int]:
    """(first, last) line of the loop with the most lines."""
    return max(((j, i) for i, j, _ in _branches(lines) if j < i), key=lambda loop: loop[1] - loop[0])


def instructions(lines: tuple[str, ...], looping: bool) -> tuple[int, int]:
    """(fewest, most) instructions that run: of the largest loop, or of the whole; fewest skips the largest branch."""
    first, last = largest_loop(lines) if looping else (0, len(lines))

    def count(start, end):
        return sum(not line.endswith(":") for line in lines[start:end])

    most = count(first, last)
    skipped = [count(i + 1, j) for i, j, conditional in _branches(lines) if conditional and first <= i < j <= last]
    return most - max(skipped, default=0), most


def weights_a_thread(block: int, m: int, num_warps: int) -> float:
    return block * m / (32 * num_warps)


@functools.cache
def group_kernel(kernel: str, target: str, n: int, m: int) -> tuple[Built, float, float]:
    """(the compiled kernel, fewest and most instructions a weight)."""
    built, config = build(kernel, target, n, m), CONFIGURATIONS[kernel, m]
    weights = weights_a_thread(config.block, m, config.num_warps)
    fewest, most = instructions(disassembled(built.asm["cubin"]), looping=False)
    return built, fewest / weights, most / weights


@functools.cache
def product_kernel(product: str, target: str, n: int, m: int, tile: Tiles) -> tuple[Built, float, float]:
    """(the compiled product, fewest and most instructions a weight)."""
    built = build_product(product, target, n, m, tile)
    weights = tile.out * max(tile.k, m) / (32 * tile.num_warps)
    # those with a tile of the weight's gradient draw once, behind their loop over the tokens
    looping = product not in ("masked_linear_weight_grad", "straight_through", "straight_through_step")
    fewest, most = instructions(disassembled(built.asm["cubin"]), looping)
    return built, fewest / weights, most / weights


def expected_instructions(fewest: float, most: float, groups: float) -> float:
    """Instructions a weight where blocks of so many groups compute noise if one of them is open."""
    clear = (1 - OPEN_GROUPS) ** groups
    return clear * fewest + (1 - clear) * most


@dataclass(frozen=True)
class Cost:
    """What one row of the launch tables costs on one architecture.

    Attributes:
        kernel: its name, with the tile and the warps where it has one.
        pattern, target: such as "2:4" and "sm_90".
        registers: a thread's.
        stack: bytes spilled and of stack, a thread's.
        shared: bytes of shared memory a block.
        occupancy: resident warps over the most there can be.
        determined, drawn: instructions a weight of a block whose draws are determined by its logits alone, and of one
            that computes noise.
    """

    kernel: str
    pattern: str
    target: str
    registers: int
    stack: int
    shared: int
    occupancy: float
    determined: float
    drawn: float

    @classmethod
    def of(cls, kernel: str, pattern: str, target: str, num_warps: int, built: Built, fewest: float, most: float):
        share = round(occupancy(built, num_warps, CHIPS[target]), 4)
        stack = built.spills + built.stack
        counts = round(fewest, 2), round(most, 2)
        return cls(kernel, pattern, target, built.registers, stack, built.shared, share, *counts)

    @property
    def key(self) -> str:
        return f"{self.kernel}, {self.pattern}, {self.target}"

    def worse_than(self, before: dict) -> list[str]:
        """The figures that are worse than those ``before`` by more than TOLERANCE."""
        names = ("registers", "stack", "shared", "determined", "drawn")
        worse = [name for name in names if getattr(self, name) > (1 + TOLERANCE) * before[name]]
        return worse + ["occupancy"] * (self.occupancy < (1 - TOLERANCE) * before["occupancy"])


def group_costs(target: str, n: int, m: int) -> Iterator[Cost]:
    for kernel in GROUP_KERNELS:
        warps = CONFIGURATIONS[kernel, m].num_warps
        yield Cost.of(kernel, f"{n}:{m}", target, warps, *group_kernel(kernel, target, n, m))


def product_costs(target: str, n: int, m: int, ends: bool = False) -> Iterator[Cost]:
    """Of all tiles for operands of 16 bits, or of the first and the last of each product."""
    for (product, where, itemsize), tiles in TILES.items():
        if where != target or itemsize != 2:
            continue
        for tile in dict.fromkeys((tiles[0], tiles[-1])) if ends else tiles:
            name = f"{product} {tile.out}x{tile.tokens}x{max(tile.k, m)}, {tile.num_warps} warps"
            yield Cost.of(name, f"{n}:{m}", target, tile.num_warps, *product_kernel(product, target, n, m, tile))


@functools.cache
def packed_kernel(kernel: str, target: str, n: int, m: int, config: Rows | Tiles) -> tuple[Built, float, float]:
    """(the compiled kernel, its instructions a weight twice)."""
    built = build_packed(kernel, target, n, m, config)
    taken = config.rows * config.block * chunk_length(n, m) if isinstance(config, Rows) else config.out * config.k
    _, most = instructions(disassembled(built.asm["cubin"]), looping=True)
    each = most / (taken / (32 * config.num_warps))
    return built, each, each


def packed_costs(target: str, n: int, m: int) -> Iterator[Cost]:
    if (n, m) not in MULTIPLIED:
        return
    for config in ROWS["packed_vector"]:
        name = f"packed_vector {config.rows}x{config.block}, {config.num_warps} warps"
        built = packed_kernel("packed_vector", target, n, m, config)
        yield Cost.of(name, f"{n}:{m}", target, config.num_warps, *built)
    for tile in PACKED_TILES["packed_linear", target, 2]:
        name = f"packed_linear {tile.out}x{tile.tokens}x{tile.k}, {tile.num_warps} warps"
        built = packed_kernel("packed_linear", target, n, m, tile)
        yield Cost.of(name, f"{n}:{m}", target, tile.num_warps, *built)


def kept_costs() -> Iterator[Cost]:
    """What TABLE holds."""
    for target in CHIPS:
        yield from packed_costs(target, 2, 4)
        for n, m in PATTERNS:
            yield from group_costs(target, n, m)
        yield from product_costs(target, 2, 4)


def triton_release() -> str:
    """Costs are those of one release of the compiler: major and minor version."""
    return ".".join(triton.__version__.split(".")[:2])


def write_table() -> None:
    """Put the costs into TABLE, beside those of other releases of Triton."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table[triton_release()] = {
        cost.key: {name: value for name, value in asdict(cost).items() if name not in KEY} for cost in kept_costs()
    }
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def report(targets: list[str], patterns: list[tuple[int, int]]) -> None:
    print(f"{'kernel':<42} {'N:M':>5} {'target':>6} {'regs':>5} {'spills':>6} {'KiB':>6} {'occup.':>6} ", end="")
    print(f"{'determined':>10} {'drawn':>8}   (instructions a weight)")
    for target in targets:
        for n, m in patterns:
            for cost in itertools.chain(
                group_costs(target, n, m), product_costs(target, n, m), packed_costs(target, n, m)
            ):
                print(
                    f"{cost.kernel:<42} {cost.pattern:>5} {target:>6} {cost.registers:>5} {cost.stack:>6} "
                    f"{cost.shared / 1024:>6.1f} {cost.occupancy:>6.0%} {cost.determined:>10.1f} {cost.drawn:>8.1f}",
                    flush=True,
                )
    print()
    print(f"{'forward of':<14} {'N:M':>5} {'on':>16} {'tokens':>6} {'bytes':>8} {'issue':>8} {'matmul':>8}  us")
    for target in targets:
        for n, m in patterns:
            for (rows, k), tokens in itertools.product(SHAPES, TOKENS):
                times = " ".join(f"{1e6 * t:>8.1f}" for t in roofline(target, n, m, rows, k, tokens))
                print(f"{f'{rows}x{k}':<14} {f'{n}:{m}':>5} {CHIPS[target].name:>16} {tokens:>6} {times}")

    print()
    print(
        "packed weights of 16 bits: the slowest of bytes, issue slots and matrix units bounds them, and the dense layer"
    )
    print(
        f"{'weight':<14} {'N:M':>5} {'on':>16} {'tokens':>6} {'bytes':>8} {'issue':>8} {'matmul':>8} {'dense':>8}  us"
    )
    for target in targets:
        for n, m in patterns:
            if (n, m) not in MULTIPLIED:
                continue
            for (rows, k), tokens in itertools.product(SERVED_SHAPES, SERVED_TOKENS):
                bounds = packed_roofline(target, n, m, rows, k, tokens)
                times = " ".join(f"{1e6 * t:>8.1f}" for t in bounds)
                ratio = bounds[-1] / max(bounds[:-1])
                print(
                    f"{f'{rows}x{k}':<14} {f'{n}:{m}':>5} {CHIPS[target].name:>16} {tokens:>6} {times} {ratio:>8.2f}x"
                )


def packed_roofline(target: str, n: int, m: int, rows: int, k: int, tokens: int) -> tuple[float, float, float, float]:
    """Seconds of a product with a packed weight by bytes, issue slots and matrix units, and of the dense one."""
    chip = CHIPS[target]
    if tokens == 1:
        config, kernel = rows_for("packed_vector", rows, k // chunk_length(n, m), target), "packed_vector"
    else:
        config, kernel = tiles_for("packed_linear", m, torch.bfloat16, tokens, rows, k, target), "packed_linear"
    _, each, _ = packed_kernel(kernel, target, n, m, config)
    activations, matmul = 2 * tokens * (rows + k), 2 * rows * k * tokens / chip.flops_16_bit
    return (
        (rows * k * (2 * n / m + 1 / 8) + activations) / chip.bytes_per_second,
        rows * k * each / (PROCESSORS[target] * chip.schedulers * 32 * chip.clock),
        matmul if tokens > 1 else 0.0,
        max((2 * rows * k + activations) / chip.bytes_per_second, matmul),
    )


def roofline(target: str, n: int, m: int, rows: int, k: int, tokens: int) -> tuple[float, float, float]:
    """Seconds of a forward by bytes, by issue slots and by matrix units."""
    chip = CHIPS[target]
    if tokens <= DRAWN_TOKENS[target]:
        weight_bytes = 6
        tile = tiles_for("masked_linear", m, torch.bfloat16, tokens, rows, k, target)
        groups = tile.out * tile.k / m
        _, fewest, most = product_kernel("masked_linear", target, n, m, tile)
    else:
        # the masked weight is written and read again
        weight_bytes = 10
        groups = CONFIGURATIONS["masked_weight", m].block
        _, fewest, most = group_kernel("masked_weight", target, n, m)
    rate = PROCESSORS[target] * chip.schedulers * 32 * chip.clock
    return (
        (weight_bytes * rows * k + 2 * tokens * (rows + k)) / chip.bytes_per_second,
        rows * k * expected_instructions(fewest, most, groups) / rate,
        2 * rows * k * tokens / chip.flops_16_bit,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--patterns", nargs="+", default=["2:4"], metavar="N:M")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name} instead, which the tests hold to")
    arguments = parser.parse_args()
    if arguments.write:
        write_table()
    else:
        report(arguments.targets, [tuple(map(int, pattern.split(":"))) for pattern in arguments.patterns])
