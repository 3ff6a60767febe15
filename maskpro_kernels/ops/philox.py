"""Philox4x32-10 (Salmon et al. 2011) and the layout of its counter, which determines every draw.

Word 0 of the counter is the group's index in the whole layer, word 1 the layer id, word 2 the step. Word 3 has the
index of the 4-word block within the group in bits 0-7, the stream in bits 8-15 and the draw id in bits 16-31. The key
is the seed, low word first. Words are int64 tensors.

Numbers that do not fit are refused on the CPU. On a GPU values are not checked, but a step is clamped to its range, so
that it does not wrap around and repeat early draws.
"""

from __future__ import annotations

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF

STREAM_DRAW = 0
STREAM_ROUNDING = 1

MAX_GROUPS = 1 << 32
MAX_LAYERS = 1 << 32
MAX_STEPS = 1 << 32
MAX_DRAWS = 1 << 16


def philox4x32(counter, key):
    """Compute four random 32-bit words from a counter of four words and a key of two.

    Args:
        counter, key: ints or int64 tensors in [0, 2**32) that broadcast together.

    Returns:
        Four values in [0, 2**32), of the operands' broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product(c0, MULTIPLIERS[0])
        high1, low1 = _product(c2, MULTIPLIERS[1])
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = (k0 + KEY_STEPS[0]) & WORD
        k1 = (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def _product(word, multiplier):
    """(high, low) word of a product of two words."""
    if isinstance(word, torch.Tensor) and word.dim() > 0:
        product = word * multiplier
        return (product >> 32) & WORD, product & WORD
    # torch multiplies a 0-dim tensor in C++, where signed integers must not overflow; less 2^32 the product fits
    product = word * (multiplier - (1 << 32))
    return ((product >> 32) + word) & WORD, product & WORD


def group_index(rows: int, columns: int, offset: int, row_stride: int, device: torch.device) -> torch.Tensor:
    """Index of each group of a [rows, columns * M] shard in the whole layer, int64 [rows, columns]."""
    row = torch.arange(rows, device=device, dtype=torch.int64)
    column = torch.arange(columns, device=device, dtype=torch.int64)
    return offset + row[:, None] * row_stride + column


def group_words(group, m, stream, key):
    """``m`` random 32-bit words for each group, a list of int64 tensors with the shape of ``group``.

    Args:
        group: int64, the group's index in the whole layer.
        m: number of words, one a weight.
        stream: STREAM_DRAW or STREAM_ROUNDING.
        key: (seed, step, layer, draw), 0-dim int64 tensors.
    """
    seed, step, layer, draw = key
    step = step.clamp(0, MAX_STEPS - 1)
    seed_words = (seed & WORD, (seed >> 32) & WORD)
    words = []
    for block in range((m + 3) // 4):
        counter = (group & WORD, layer, step, block | stream << 8 | draw << 16)
        words.extend(philox4x32(counter, seed_words))
    return words[:m]
