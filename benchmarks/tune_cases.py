"""Which calls ``tune.py`` times for each entry of the launch tables, and by which it checks a candidate besides."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from tune_calls import GAP, OPEN_GAP, OVER_ELEMENTS, OVER_GROUPS, PRODUCTS, Case, Matrix, Product

from maskpro_kernels.ops.triton import packed, tiles

# Of layers of LLaMA-2-7B, then of smaller and larger models, for which the tables choose other tiles: rows, K
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096), (6144, 4096), (2048, 2048), (28672, 8192),
          (8192, 28672)]  # fmt: skip
# Shorter rows, each of which another entry of packed_vector is chosen for
PACKED_ROWS = [*SHAPES[:3], (4096, 2048), (4096, 1024), (4096, 512)]
# On so many of these an entry is timed
MOST_SHAPES = 3
# Of products whose tiles are the same for all: tokens that they are timed on
TOKENS = {
    "masked_linear_weight_grad": (16, 64, 128),
    "straight_through": (64, 256),
    "straight_through_step": (2048,),
}
UPDATES = ("score_update", "score_updates", "score_update_of_layers", "score_updates_of_layers")
# Timed on logits of either gap, and in 16 bits as well
DRAWING = ("sample_mask", "masked_weight", "sample_masks", *UPDATES)
ROUNDING = (*UPDATES, "descend")
# What is worth a GPU's time first: a step of learning, then inference, then what prepares and ends a run
ORDER = (
    "sample_masks",
    "score_update_of_layers",
    "masked_weight",
    "masked_linear",
    "masked_linear_input_grad",
    "straight_through_step",
    "straight_through",
    "packed_vector",
    "packed_linear",
    "split_sum",
    "sample_mask",
    "score_update",
    "score_updates_of_layers",
    "score_updates",
    "masked_linear_weight_grad",
    "descend",
    "adamw",
    "unpack",
    "top_n_mask",
    "mask_log_prob",
    "mask_score",
    "best_swaps",
    "metadata",
)


def kinds_of(kernel: str, tokens: int, target: str) -> tuple[str, ...]:
    """Kinds of masks with which a kernel is launched on so many tokens."""
    if kernel.startswith("packed"):
        return ("keep", "int8")
    most = sys.maxsize
    if kernel in ("masked_linear", "masked_linear_input_grad"):
        most = tiles.DRAWN_TOKENS[target]
    elif kernel == "straight_through":
        most = tiles.fused_tokens("drawn", target)
    return ("drawn", "codes") if tokens <= most else ("codes",)


def tokens_of(kernel: str, entry, target: str) -> list[int]:
    """Numbers of tokens on which a product is timed: none with which it is never launched."""
    if kernel == "packed_vector":
        return [1]
    most = tiles.fused_tokens("codes", target) if kernel == "straight_through" else sys.maxsize
    return sorted({min(tokens, most) for tokens in TOKENS.get(kernel, (entry.tokens,))})


def products_of(kernel: str, size: int, entry, target: str, device: str) -> Iterator[Product]:
    """Those of 2:4 in which the tables take an entry."""
    for tokens in tokens_of(kernel, entry, target):
        taken = [shape for shape in (PACKED_ROWS if tokens == 1 else SHAPES)
                 if is_taken(kernel, size, entry, tokens, shape, target)]  # fmt: skip
        for shape, kind in itertools.product(taken[:MOST_SHAPES], kinds_of(kernel, tokens, target)):
            yield Product(shape, tokens, kind, device, size)


def is_taken(kernel: str, size: int, entry, tokens: int, shape: tuple[int, int], target: str) -> bool:
    if kernel == "packed_vector":
        return tiles.rows_for(kernel, shape[0], shape[1] // packed.chunk_length(2, 4), target).block == entry.block
    operand = torch.bfloat16 if size == 2 else torch.float32
    return tiles.tiles_for(kernel, 4, operand, tokens, *shape, target) == entry


def timed_cases(kernel: str, size: int | None, entry, target: str, device: str) -> Iterator[Case]:
    """The cases in which the tables take an entry, N of M being half of them."""
    if kernel in OVER_ELEMENTS:
        yield OVER_ELEMENTS[kernel](device)
    elif kernel in OVER_GROUPS:
        n = size // 2
        for gap in (GAP, OPEN_GAP) if kernel in DRAWING else (GAP,):
            yield from OVER_GROUPS[kernel](Matrix(n, size, device, gap=gap))
        if kernel in ROUNDING:
            yield from OVER_GROUPS[kernel](Matrix(n, size, device, torch.bfloat16))
    else:
        for product in products_of(kernel, size or 2, entry, target, device):
            yield PRODUCTS[kernel](product)


def other_cases(kernel: str, size: int | None, entry, target: str, device: str) -> Iterator[Case]:
    """Cases of other patterns in which the entry is launched too: a candidate is checked by them, and not timed."""
    if kernel in OVER_GROUPS:
        for n in other_patterns(size):
            yield from OVER_GROUPS[kernel](Matrix(n, size, device))
    elif kernel in PRODUCTS:
        first: dict[str, Product] = {}
        for product in products_of(kernel, size or 2, entry, target, device):
            first.setdefault(product.kind, product)
        for product, (n, m) in itertools.product(first.values(), sorted(packed.MULTIPLIED - {(2, 4)})):
            yield PRODUCTS[kernel](replace(product, n=n, m=m))


def other_patterns(m: int) -> list[int]:
    """N of M that kernels have other code for than for the half: one, and up to 4 the exact score."""
    return sorted({1, min(4, m // 2), m - 1} - {m // 2})
