"""Times of products with a 2:4 weight of 16 bits and with a dense one, by a model: nothing is measured.

    python benchmarks/modelled_sparse.py --rows 11008 --k 4096

prints microseconds, those of the dense product second; (t) are torch's product on sparse tensor cores, (u) weights that
are unpacked for its dense one.

A product takes as long as its bytes from memory, its multiply-adds by the data sheet, or for ``sparse_mma`` what it
reads from shared memory, 128 bytes a clock of each processor. The largest of these is its time; launches, latencies and
the L2 cache are left out. torch's dense product, and its product on sparse tensor cores, reach their rates in full.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from maskpro_kernels.ops.triton.tiles import LIBRARY_TOKENS, TARGETS, parts_for, tiles_for

MARKS = {"sparse_mma": "", "torch": " (t)", "unpack": " (u)"}
TOKENS = (1, 8, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Card:
    """A card by its data sheet: bytes a second, and dense operations a second with bfloat16 and sums in float32.

    ``warp`` is the share of the operations that instructions of a warp reach, ``mma.sync`` and ``mma.sp``.
    """

    target: str
    processors: int
    clock: float
    bandwidth: float
    operations: float
    warp: float = 1.0
    torch_sparse: bool = False


CARDS = {
    # 80 GB, SXM
    "A100": Card("sm_80", 108, 1.41e9, 2.039e12, 312e12, torch_sparse=True),
    "RTX 4090": Card("sm_80", 128, 2.52e9, 1.008e12, 165.2e12, torch_sparse=True),
    "RTX 5090": Card("sm_80", 170, 2.407e9, 1.792e12, 209.5e12),
    # SXM. Warps reach some 60% of ``wgmma``
    "H100": Card("sm_90", 132, 1.755e9, 3.35e12, 989.4e12, warp=0.6),
}


def dense(card: Card, tokens: int, rows: int, k: int, weight_bytes: float = 2) -> float:
    """Seconds of torch's product; of an unpacked weight ``weight_bytes`` is more."""
    moved = weight_bytes * rows * k + 2 * tokens * (rows + k)
    return max(moved / card.bandwidth, 2 * tokens * rows * k / card.operations)


def sparse(card: Card, tokens: int, rows: int, k: int) -> tuple[str, float]:
    """(route, seconds) of ``nm_linear``; see ``ops.triton.packed.route``."""
    moved = 1.125 * rows * k + 2 * tokens * (rows + k)
    if tokens > LIBRARY_TOKENS and card.torch_sparse:
        return "torch", max(moved / card.bandwidth, tokens * rows * k / card.operations)
    if tokens > TARGETS[card.target].sparse_tokens:
        # the weight is unpacked: read, written, and read again
        return "unpack", 3.125 * rows * k / card.bandwidth + dense(card, tokens, rows, k)
    tile = tiles_for("sparse_mma", 4, torch.bfloat16, tokens, rows, k, card.target)
    blocks, of_tokens = -(-rows // tile.out), -(-tokens // tile.tokens)
    parts, steps = parts_for(tile, blocks * of_tokens, -(-k // tile.k), card.target), -(-k // tile.k)
    if parts > 1:
        # written and read again, in float32
        moved += 8 * parts * tokens * rows
    multiplied = of_tokens * tile.tokens * blocks * tile.out * k / (card.operations * card.warp)
    # of a step: by each warp words of values, metadata and activations
    read = tile.out * (32 + 4) * 2 + tile.num_warps * tile.tokens * 128
    shared = blocks * of_tokens * steps * read / (128 * card.clock * card.processors)
    return "sparse_mma", max(moved / card.bandwidth, multiplied, shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=11008)
    parser.add_argument("--k", type=int, default=4096)
    given = parser.parse_args()
    print(f"| tokens | {' | '.join(CARDS)} |\n|{'---:|' * (1 + len(CARDS))}")
    for tokens in TOKENS:
        cells = []
        for card in CARDS.values():
            route, seconds = sparse(card, tokens, given.rows, given.k)
            other = dense(card, tokens, given.rows, given.k)
            cells.append(f"{1e6 * seconds:.0f} against {1e6 * other:.0f}{MARKS[route]}")
        print(f"| {tokens:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
