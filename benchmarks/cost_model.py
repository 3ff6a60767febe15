"""Modelled seconds of the kernels that ``verdict.py`` times, and of torch's products, by card: nothing is measured.

    python benchmarks/cost_model.py --card H100

prints products under drawn masks by gap and tokens, in one pass and in two, and packed products of one token.

A launch takes as long as the slowest of its bytes from memory, its bytes from the L2 cache, the instructions of its
busiest pipe (see ``modelled_costs``) and its multiply-adds. Where a processor has one program at a time, its warps draw
masks, convert layouts through shared memory and multiply in turn, and these times add up. Latencies, and the time of a
launch itself, are left out. torch's products reach the rates of the data sheet.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass

import torch
from aot import Built, build, build_packed, build_product
from modelled_costs import CHIPS, clocks, counted, expected

from maskpro_kernels.ops.triton.packed_gemm import chunk_length, wide
from maskpro_kernels.ops.triton.tiles import (
    ALIGNED,
    LIBRARY_TOKENS,
    TARGETS,
    Rows,
    Tiles,
    configuration,
    parts_for,
    rows_for,
    tiles_for,
)

N = 2
M = 4
BF16 = torch.bfloat16
# Of the data sheet's bandwidth: 3.0 TB/s, which copies reach on an H100
SHARE = 3.0 / 3.35
# From as many weight rows on tiles of sm_90 use ``wgmma``
WGMMA_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Card:
    """Rates of a card by its data sheet, of its processors by NVIDIA's table of compute capabilities.

    Attributes:
        bandwidth: bytes a second of its memory, of which it reaches ``share``.
        operations: a second, dense, with bfloat16 and sums in float32, of which instructions of a warp, ``mma.sync``
            and ``mma.sp``, reach the share ``warp``.
        l2: bytes a second from the L2 cache; infinite where no figure is published.
        shared, warps: bytes of shared memory and resident warps of a processor.
        fp32: lanes of a processor.
        torch_sparse: whether torch multiplies by CUTLASS on sparse tensor cores.
    """

    target: str
    processors: int
    clock: float
    bandwidth: float
    operations: float
    l2: float = float("inf")
    shared: int = 228 << 10
    warps: int = 64
    fp32: int = 128
    warp: float = 1.0
    share: float = SHARE
    torch_sparse: bool = False

    def move(self, moved: float) -> float:
        """Seconds of bytes from memory."""
        return moved / (self.share * self.bandwidth)

    def resident(self, built: Built, num_warps: int) -> int:
        """Programs that a processor has at a time: by 65,536 registers, by shared memory, by warps."""
        registers = -(-max(built.registers, 1) * 32 // 256) * 256 * num_warps
        return min(65536 // registers, self.shared // (built.shared + 1024), self.warps // num_warps)


# By words of the device's name. L2 cache: of an A100 by its white paper, 5,120 bytes a clock; of Hopper as measured by
# Chips and Cheese, "Nvidia's H100", 2023. Warps reach some 60% of the rate of ``wgmma``
_ADA = {"target": "sm_80", "shared": 100 << 10, "warps": 48}
_HOPPER = {"target": "sm_90", "processors": 132, "clock": 1.755e9, "operations": 989.4e12, "l2": 5.5e12, "warp": 0.6}
CARDS = {
    # 80 GB, SXM
    "A100": Card(target="sm_80", processors=108, clock=1.41e9, bandwidth=2.039e12, operations=312e12,
                 l2=5120 * 1.41e9, shared=164 << 10, fp32=64, torch_sparse=True),
    "RTX 4090": Card(processors=128, clock=2.52e9, bandwidth=1.008e12, operations=165.2e12, torch_sparse=True, **_ADA),
    "RTX 5090": Card(processors=170, clock=2.407e9, bandwidth=1.792e12, operations=209.5e12, **_ADA),
    # SXM
    "H100": Card(bandwidth=3.35e12, **_HOPPER),
    "H200": Card(bandwidth=4.8e12, **_HOPPER),
}  # fmt: skip


def launch(card: Card, counts: dict[str, float], weights: float, moved: float, *, programs: int, resident: int,
           cached: float = 0.0, multiplied: float = 0.0) -> float:  # fmt: skip
    """Seconds of a launch.

    ``counts`` are instructions a weight by pipe, ``moved`` and ``cached`` bytes from memory and from the L2 cache,
    ``multiplied`` seconds of all matrix units, ``resident`` the programs that fit into a processor.
    """
    lanes = CHIPS[card.target].lanes | {"fp32": card.fp32}
    pipes = {pipe: weights * count / (card.processors * card.clock) for pipe, count in clocks(lanes, counts).items()}
    max_programs = -(-programs // card.processors)
    computed = max(*pipes.values(), multiplied)
    if min(resident, max_programs) == 1:
        computed = max(pipes[pipe] for pipe in pipes if pipe != "lsu") + pipes["lsu"] + multiplied
    # the processor with the most programs
    computed *= max_programs * card.processors / programs
    return max(card.move(moved), cached / card.l2, computed)


def dense(card: Card, tokens: int, rows: int, k: int, weight_bytes: float = 2) -> float:
    """Seconds of torch's product; of a weight in other memory as well ``weight_bytes`` is more."""
    moved = weight_bytes * rows * k + 2 * tokens * (rows + k)
    return max(card.move(moved), 2 * tokens * rows * k / card.operations)


# Bytes a weight: float32 logits in, and what is written; with codes and a gradient a group, or weights of 16 bits
OVER_GROUPS = {"sample_mask": 4.25, "mask_score": 9.25, "score_update": 8.0, "masked_weight": 8.0}


@functools.cache
def _over_groups(kernel: str, target: str) -> tuple[Built, dict, dict]:
    config = configuration(kernel, M, 0, target)
    built = build(kernel, target, N, M)
    # the score of given codes takes one block, and has no noise to skip
    drawn = kernel != "mask_score"
    return built, *counted(built, config.block * M / (32 * config.num_warps), drawn, drawn)


def over_groups(card: Card, kernel: str, rows: int, k: int, gap: float) -> float:
    """Seconds of a kernel of OVER_GROUPS."""
    config = configuration(kernel, M, rows * k // M, card.target)
    built, *counts = _over_groups(kernel, card.target)
    programs = config.programs(rows * k // M, TARGETS[card.target].processors)
    instructions = expected(counts, config.block, N, M, gap)
    resident = card.resident(built, config.num_warps)
    return launch(card, instructions, rows * k, OVER_GROUPS[kernel] * rows * k, programs=programs, resident=resident)


@functools.cache
def _masked(target: str, tile: Tiles, kind: str) -> tuple[Built, dict, dict]:
    built = build_product("masked_linear", target, N, M, tile, KIND=kind)
    return built, *counted(built, tile.out * tile.k / (32 * tile.num_warps), True, kind == "drawn")


def masked(card: Card, tokens: int, rows: int, k: int, gap: float, kind: str = "drawn") -> float:
    """Seconds of ``masked_linear``: one pass."""
    tile = tiles_for("masked_linear", M, BF16, tokens, rows, k, card.target)
    built, *counts = _masked(card.target, tile, kind)
    blocks = -(-rows // tile.out)
    token_blocks = -(-tokens // tile.tokens)
    weight = (6 if kind == "drawn" else 2.25) * rows * k
    parts = parts_for(tile, blocks * token_blocks, -(-k // tile.k), card.target, 2 * rows * k, tokens * rows)
    # each program reads its part of the weight and all of its tokens; parts are written, and read again
    cached = weight * token_blocks + 2 * tokens * k * blocks + (8 * parts * tokens * rows if parts > 1 else 0)
    rate = card.operations * (1 if tile.out >= WGMMA_ROWS else card.warp)
    return launch(
        card, expected(counts, tile.out * tile.k // M, N, M, gap), rows * k * token_blocks,
        weight + 2 * tokens * (rows + k), cached=cached, multiplied=2 * token_blocks * tile.tokens * rows * k / rate,
        programs=blocks * token_blocks * parts, resident=card.resident(built, tile.num_warps),
    )  # fmt: skip


def two_passes(card: Card, tokens: int, rows: int, k: int, gap: float) -> float:
    """Seconds of a product under a drawn mask whose weight is masked first."""
    return over_groups(card, "masked_weight", rows, k, gap) + dense(card, tokens, rows, k)


@functools.cache
def _packed(target: str, config: Rows, bits: int) -> tuple[Built, dict]:
    built = build_packed("packed_vector", target, N, M, config, bits=bits)
    chunks = config.block * wide(bits, target.startswith("sm_"), ALIGNED)
    weights = config.rows * chunks * chunk_length(N, M) / (32 * config.num_warps)
    return built, counted(built, weights, True, draws=False)[1]


def packed(card: Card, rows: int, k: int, bits: int) -> float:
    """Seconds of a product of one token with int8 or int4 values, a bitmask and scales of 16 bits."""
    chunks = k // chunk_length(N, M) // wide(bits, card.target.startswith("sm_"), ALIGNED)
    config = rows_for(rows, chunks, card.target)
    built, counts = _packed(card.target, config, bits)
    moved = (bits / 16 + 1 / 8 + 1 / {8: 128, 4: 64}[bits]) * rows * k + 2 * (rows + k)
    programs = -(-rows // config.rows)
    resident = card.resident(built, config.num_warps)
    return launch(card, counts, rows * k, moved, programs=programs, resident=resident)


def sparse(card: Card, tokens: int, rows: int, k: int) -> tuple[str, float]:
    """(route, seconds) of ``nm_linear`` with 2:4 values of 16 bits; see ``ops.triton.packed_gemm.route``."""
    moved = 1.125 * rows * k + 2 * tokens * (rows + k)
    if tokens > LIBRARY_TOKENS and card.torch_sparse:
        return "torch", max(card.move(moved), tokens * rows * k / card.operations)
    if tokens > TARGETS[card.target].sparse_tokens:
        # the weight is unpacked: read, written, and read again
        return "unpack", card.move(3.125 * rows * k) + dense(card, tokens, rows, k)
    tile = tiles_for("sparse_mma", M, BF16, tokens, rows, k, card.target)
    blocks = -(-rows // tile.out)
    token_blocks = -(-tokens // tile.tokens)
    steps = -(-k // tile.k)
    parts = parts_for(tile, blocks * token_blocks, steps, card.target, 1.125 * rows * k, tokens * rows)
    if parts > 1:
        # written and read again, in float32
        moved += 8 * parts * tokens * rows
    multiplied = token_blocks * tile.tokens * blocks * tile.out * k / (card.operations * card.warp)
    # of a step, 128 bytes a clock of each processor: by each warp words of values, metadata and activations
    read_bytes = tile.out * (32 + 4) * 2 + tile.num_warps * tile.tokens * 128
    shared = blocks * token_blocks * steps * read_bytes / (128 * card.clock * card.processors)
    return "sparse_mma", max(card.move(moved), multiplied, shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="H100")
    parser.add_argument("--gaps", nargs="+", type=float, default=[10.0, 8.0, 5.7])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 32, 64, 128])
    options = parser.parse_args()
    print(f"| weight | tokens | {' | '.join(f'gap {gap:g}' for gap in options.gaps)} | by codes | dense |")
    print("|---|" + "---:|" * (3 + len(options.gaps)))
    card = CARDS[options.card]
    for size in ((4096, 4096), (11008, 4096)):
        for tokens in options.tokens:
            seconds = [(masked(card, tokens, *size, gap), two_passes(card, tokens, *size, gap)) for gap in options.gaps]
            cells = [f"{1e6 * one_pass:.0f} / {1e6 * two_pass:.0f}" for one_pass, two_pass in seconds]
            products = masked(card, tokens, *size, 10.0, "codes"), dense(card, tokens, *size)
            cells += [f"{1e6 * product:.0f}" for product in products]
            print(f"| {size[0]} x {size[1]} | {tokens} | {' | '.join(cells)} |", flush=True)
    one_token = {f"int{bits}": packed(card, *size, bits) for bits in (4, 8)} | {"bfloat16": sparse(card, 1, *size)[1]}
    print(
        "One token, 2:4, last weight:", ", ".join(f"{name} {1e6 * seconds:.1f}" for name, seconds in one_token.items())
    )


if __name__ == "__main__":
    main()
