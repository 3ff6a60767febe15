"""Gumbel-top-k: keep the N largest of logits plus Gumbel noise, which is a draw without replacement."""

from __future__ import annotations

import torch

from .. import philox
from ..pattern import code_dtype
from .arithmetic import ln, scalar
from .groups import columns, decode, encode, group_index, grouped, uncolumns

TWO_POW_MINUS_32 = 2.0**-32


def gumbel(r):
    """Gumbel noise -ln(-ln(1 - u)), u = (r + 1/2) 2^-32, for 32-bit integers in int64.

    1 - u is computed from the complement of r, so rare large values have a resolution of 2^-32.
    """
    u = (r.to(torch.float32) + 0.5) * TWO_POW_MINUS_32
    v = ((r ^ philox.WORD).to(torch.float32) + 0.5) * TWO_POW_MINUS_32
    e = 0.0 - ln(v, 0.0 - u)
    return 0.0 - ln(e, e - 1.0)


def scaled(xs, inv_temperature):
    """Logits in float32, less the group's largest, divided by the temperature; minus infinity beyond float32.

    This suffices for a draw, which needs their order. Log-probability and score saturate it.
    """
    xs = [x.to(torch.float32) for x in xs]
    largest = xs[0]
    for x in xs[1:]:
        largest = torch.maximum(largest, x)
    return [(x - largest) * inv_temperature for x in xs]


def top_n(keys, n):
    """Bool columns of the N largest keys of each group, ties to the lower index."""
    m = len(keys)
    wins = [0] * m
    for i in range(m):
        for j in range(i + 1, m):
            ahead = (keys[i] >= keys[j]).to(torch.int32)
            wins[i] = wins[i] + ahead
            wins[j] = wins[j] + (1 - ahead)
    return [w >= m - n for w in wins]


def drawn_keys(z, group, key):
    """Scaled logits plus Gumbel noise."""
    words = philox.group_words(group, len(z), philox.STREAM_DRAW, key)
    return [z_i + gumbel(r) for z_i, r in zip(z, words, strict=True)]


def group_drawn(logits, group, key, inv_temperature, n):
    """Mask columns of a draw."""
    z = scaled(columns(logits), inv_temperature)
    return top_n(drawn_keys(z, group, key), n)


def masked(weight, kept):
    """Groups of the weight, with exact zeros for dropped weights."""
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    return uncolumns([torch.where(k, w, zero) for w, k in zip(columns(weight), kept, strict=True)])


def group_sample_mask(logits, group, key, inv_temperature, *, n):
    kept = group_drawn(logits, group, key, inv_temperature, n)
    return encode(kept, code_dtype(logits.shape[-1]))


def group_top_n_mask(scores, *, n):
    return encode(top_n(columns(scores), n), code_dtype(scores.shape[-1]))


def sample_mask(logits, n, m, inv_temperature, counter):
    """Group codes [rows, K / M] of a draw."""
    group = group_index(logits, counter, m)
    return group_sample_mask(grouped(logits, m), group, counter.key, scalar(inv_temperature, logits), n=n)


def masked_weight(weight, mask):
    """The weight [rows, K] under a ``MaskSource``, with exact zeros for dropped weights."""
    mask = mask.by_codes
    if mask.kind == "codes":
        kept = decode(mask.tensor, mask.m)
    else:
        group = group_index(weight, mask.counter, mask.m)
        inverse = scalar(mask.inv_temperature, weight)
        kept = group_drawn(grouped(mask.tensor, mask.m), group, mask.counter.key, inverse, mask.n)
    return masked(grouped(weight, mask.m), kept).view(weight.shape)


def top_n_mask(scores, n, m):
    """Group codes [rows, K / M] of the N largest scores, ties to the lower index."""
    return group_top_n_mask(grouped(scores, m), n=n)
