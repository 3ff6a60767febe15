"""Philox4x32-10."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import KEY_STEPS, MULTIPLIERS, ROUNDS


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Compute four random uint32 words from a counter and a key of uint32 words."""
    for _ in tl.static_range(ROUNDS):
        product0 = tl.mul(c0.to(tl.uint64), MULTIPLIERS[0], sanitize_overflow=False)
        product1 = tl.mul(c2.to(tl.uint64), MULTIPLIERS[1], sanitize_overflow=False)
        low0 = product0.to(tl.uint32)
        high0 = (product0 >> 32).to(tl.uint32)
        low1 = product1.to(tl.uint32)
        high1 = (product1 >> 32).to(tl.uint32)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = tl.add(k0, KEY_STEPS[0], sanitize_overflow=False)
        k1 = tl.add(k1, KEY_STEPS[1], sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def load_key(seed, step, layer, draw):
    """Load the key that all groups of a draw share, from a counter's pointers: int64 scalars, the step as uint32."""
    return tl.load(seed), nearest_word(tl.load(step)), tl.load(layer), tl.load(draw)


@triton.jit
def nearest_word(value):
    """Clamp an int64 to uint32."""
    high = (value >> 32).to(tl.int32)
    # the sign of the upper half in all bits: all ones for negative numbers
    return tl.where(high == 0, value.to(tl.uint32), (~(high >> 31)).to(tl.uint32, bitcast=True))


@triton.jit
def group_words(group, M: tl.constexpr, STREAM: tl.constexpr, key):
    """M uint32 columns of random words for uint32 group indices; ``key`` from ``load_key``."""
    seed, step, layer, draw = key
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c1 = layer.to(tl.uint32)
    words = ()
    for block in tl.static_range((M + 3) // 4):
        c3 = (draw << 16 | (STREAM << 8 | block)).to(tl.uint32)
        w0, w1, w2, w3 = philox4x32(group, c1, step, c3, k0, k1)
        if M == 2:
            words = words + (w0, w1)
        else:
            words = words + (w0, w1, w2, w3)
    return words
