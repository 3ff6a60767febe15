"""Philox4x32-10 (Salmon et al. 2011) and the counter layout that every draw is a function of.

Word 0 of the counter is the group's index in the whole layer, word 1 the layer id, word 2 the step;
word 3 holds the 4-word block within the group in bits 0-7, the stream in bits 8-15 and the draw id
in bits 16-31. The key is the seed, low word first. Words are held in int64 tensors.
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
    """Four 32-bit words for a counter of four words and a key of two.

    Args:
        counter, key: ints or int64 tensors in [0, 2**32) that broadcast together.

    Returns:
        Four values in [0, 2**32), of the operands' broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0 = c0 * MULTIPLIERS[0]
        p1 = c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0 = (k0 + KEY_STEPS[0]) & WORD
        k1 = (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def counter_word3(block, stream, draw):
    """Word 3 of the counter: block in bits 0-7, stream in bits 8-15, draw id in bits 16-31."""
    return block | stream << 8 | draw << 16


def group_index(rows: int, columns: int, offset: int, row_stride: int, device: torch.device) -> torch.Tensor:
    """Index in the whole layer of every group of a [rows, columns * M] shard, int64 [rows, columns]."""
    row = torch.arange(rows, device=device, dtype=torch.int64)
    column = torch.arange(columns, device=device, dtype=torch.int64)
    return offset + row[:, None] * row_stride + column


def group_words(group, m, stream, seed, step, layer, draw):
    """The ``m`` random 32-bit words of every group, a list of int64 tensors shaped like ``group``.

    Args:
        group: int64, the group's index in the whole layer.
        m: words wanted, one a weight.
        stream: STREAM_DRAW or STREAM_ROUNDING.
        seed, step: 0-dim int64 tensors.
        layer, draw: ints or 0-dim int64 tensors.
    """
    key = (seed & WORD, (seed >> 32) & WORD)
    words = []
    for block in range((m + 3) // 4):
        counter = (group & WORD, layer, step & WORD, counter_word3(block, stream, draw))
        words.extend(philox4x32(counter, key))
    return words[:m]
