"""Modelled seconds of the kernels that ``verdict`` times, and of torch's products, by card: nothing is measured.

    python benchmarks/cost_model.py --card H100

prints products under drawn masks by gap and tokens, in one pass and in two, and packed products of one token.

A launch takes as long as the slowest of its bytes from memory, its bytes from the L2 cache, the instructions of its
busiest pipe (see ``modelled_costs``) and its multiply-adds. Where a processor has one program at a time, its warps draw
masks, convert layouts through shared memory and multiply in turn, and these times add up. Latencies, and the time of a
launch itself, are left out. Memory and matrix units have the rates of ``cards``, those that good kernels reach.
"""

from __future__ import annotations

import argparse
import functools

import torch
from aot import Built, build, build_packed, build_product, warnings
from cards import CARDS, SPARSE, Card
from modelled_costs import CHIPS, clocks, counted, expected

from maskpro_kernels.ops.triton.packed_gemm import chunk_length, wide
from maskpro_kernels.ops.triton.tiles import (
    ALIGNED,
    LIBRARY_TOKENS,
    TARGETS,
    Rows,
    Tiles,
    configuration,
    one_pass_tokens,
    parts_for,
    rows_for,
    tiles_for,
)

N = 2
M = 4
BF16 = torch.bfloat16
# From as many weight rows on tiles of sm_90 use ``wgmma``
WGMMA_ROWS = 64


def launch(card: Card, counts: dict[str, float], weights: float, moved: float, *, programs: int, resident: int,
           cached: float = 0.0, multiplied: float = 0.0, serialized: bool = False) -> float:  # fmt: skip
    """Seconds of a launch.

    ``counts`` are instructions a weight by pipe, ``moved`` and ``cached`` bytes from memory and from the L2 cache,
    ``multiplied`` seconds of all matrix units, ``resident`` the programs that fit into a processor. ``serialized`` is
    true if a program's products wait for each other, see ``aot.warnings``.
    """
    lanes = CHIPS[card.target].lanes | {"fp32": card.fp32}
    pipes = {pipe: weights * count / (card.processors * card.clock) for pipe, count in clocks(lanes, counts).items()}
    max_programs = -(-programs // card.processors)
    computed = max(*pipes.values(), multiplied)
    if serialized or min(resident, max_programs) == 1:
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


@functools.cache
def _warnings(target: str, tile: Tiles, kind: str) -> list[str]:
    return warnings(_masked(target, tile, kind)[0])


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
        serialized="C7515" in _warnings(card.target, tile, kind),
    )  # fmt: skip


def two_passes(card: Card, tokens: int, rows: int, k: int, gap: float) -> float:
    """Seconds of a product under a drawn mask whose weight is masked first."""
    return over_groups(card, "masked_weight", rows, k, gap) + dense(card, tokens, rows, k)


def by_default(card: Card, tokens: int, rows: int, k: int, gap: float) -> float:
    """Seconds of a product under a drawn mask, in as many passes as on the card's target."""
    return (masked if tokens <= one_pass_tokens("drawn", card.target) else two_passes)(card, tokens, rows, k, gap)


def training_step(card: Card, tokens: int, rows: int, k: int, gap: float) -> float:
    """Seconds of a straight-through step of a layer, with more tokens than one kernel multiplies and steps.

    The mask is drawn into codes. Forward and gradient of x each write the masked weight for a product, a third product
    writes float32, and the update reads that, logits, weight and codes, and writes logits. The second derivative reads
    x and the gradient.
    """
    moved = (2 * 4.25 + 4 + 14.25) * rows * k + 2 * tokens * (rows + k)
    return over_groups(card, "sample_mask", rows, k, gap) + 3 * dense(card, tokens, rows, k) + card.move(moved)


def packed_bytes(rows: int, k: int, bits: int) -> float:
    """Bytes of int8 or int4 values, a bitmask, and scales of 16 bits."""
    return (bits / 16 + 1 / 8 + 1 / {8: 128, 4: 64}[bits]) * rows * k


@functools.cache
def _packed(kernel: str, target: str, config: Rows | Tiles, bits: int) -> tuple[Built, dict]:
    built = build_packed(kernel, target, N, M, config, bits=bits)
    if isinstance(config, Rows):
        chunks = config.rows * config.block * wide(bits, target.startswith("sm_"), ALIGNED)
        weights = chunks * chunk_length(N, M)
    else:
        weights = config.out * config.k
    return built, counted(built, weights / (32 * config.num_warps), True, draws=False)[1]


def packed(card: Card, tokens: int, rows: int, k: int, bits: int) -> float:
    """Seconds of ``nm_linear`` with int8 or int4 values and at most PACKED_TOKENS tokens."""
    if tokens == 1:
        chunks = k // chunk_length(N, M) // wide(bits, card.target.startswith("sm_"), ALIGNED)
        config = rows_for(rows, chunks, card.target)
        built, counts = _packed("packed_vector", card.target, config, bits)
        moved = packed_bytes(rows, k, bits) + 2 * (rows + k)
        programs = -(-rows // config.rows)
        resident = card.resident(built, config.num_warps)
        return launch(card, counts, rows * k, moved, programs=programs, resident=resident)
    tile = tiles_for("packed_linear", M, BF16, tokens, rows, k, card.target)
    built, counts = _packed("packed_linear", card.target, tile, bits)
    blocks = -(-rows // tile.out)
    token_blocks = -(-tokens // tile.tokens)
    weight = packed_bytes(rows, k, bits)
    parts = parts_for(tile, blocks * token_blocks, -(-k // tile.k), card.target, weight, tokens * rows)
    sums = 8 * parts * tokens * rows if parts > 1 else 0
    rate = card.operations * (1 if tile.out >= WGMMA_ROWS else card.warp)
    return launch(
        card, counts, rows * k * token_blocks, weight + 2 * tokens * (rows + k),
        cached=weight * token_blocks + 2 * tokens * k * blocks + sums,
        multiplied=2 * token_blocks * tile.tokens * rows * k / rate,
        programs=blocks * token_blocks * parts, resident=card.resident(built, tile.num_warps),
    )  # fmt: skip


def unpacked(card: Card, rows: int, k: int) -> float:
    """Seconds of ``unpack_nm`` with 2:4 values of 16 bits: 9 bits a weight are read, and 16 written."""
    return card.move(3.125 * rows * k)


def sparse(card: Card, tokens: int, rows: int, k: int) -> tuple[str, float]:
    """(route, seconds) of ``nm_linear`` with 2:4 values of 16 bits; see ``ops.triton.packed_gemm.route``."""
    moved = 1.125 * rows * k + 2 * tokens * (rows + k)
    if tokens > LIBRARY_TOKENS and card.torch_sparse:
        return "torch", max(card.move(moved), 2 * tokens * rows * k / (SPARSE * card.operations))
    if tokens > TARGETS[card.target].sparse_tokens:
        return "unpack", unpacked(card, rows, k) + dense(card, tokens, rows, k)
    tile = tiles_for("sparse_mma", M, BF16, tokens, rows, k, card.target)
    blocks = -(-rows // tile.out)
    token_blocks = -(-tokens // tile.tokens)
    steps = -(-k // tile.k)
    parts = parts_for(tile, blocks * token_blocks, steps, card.target, 1.125 * rows * k, tokens * rows)
    if parts > 1:
        # written and read again, in float32
        moved += 8 * parts * tokens * rows
    rate = SPARSE * card.operations * card.warp
    multiplied = 2 * token_blocks * tile.tokens * blocks * tile.out * k / rate
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
    one_token = {f"int{bits}": packed(card, 1, *size, bits) for bits in (4, 8)} | {
        "bfloat16": sparse(card, 1, *size)[1]
    }
    print(
        "One token, 2:4, last weight:", ", ".join(f"{name} {1e6 * seconds:.1f}" for name, seconds in one_token.items())
    )


if __name__ == "__main__":
    main()
