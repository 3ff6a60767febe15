"""Draw and score update of many layers by one call of machine code.

Loops are compiled for one layer, as those of ``kernels`` are; a table tells where each layer lies.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import bounds, reference
from . import kernels
from .compiled_loop import compiled_loop


class _Given(NamedTuple):
    """What a loop takes for one layer: tensors of groups, the rest, what comes last of all, and where results go."""

    groups: Sequence[Tensor]
    rest: Sequence[Tensor]
    last: Tensor
    out: Tensor


def _run(function: Callable, given: Sequence[_Given], *how, in_place: bool = False, **constants) -> bool:
    """Run the loop of a function over layers; False, and nothing has changed, where there is no machine code.

    Args:
        given: of each layer.
        how: what ``CompiledLoop`` takes behind ``in_place``; without it the groups are numbered.
        in_place: whether results go where the first tensor of groups is.
    """
    which = max(range(len(given)), key=lambda i: len(given[i].out))
    largest = given[which]
    likes = [
        tuple([(x.dtype, *x.shape[skipped:]) for x in tensors])
        for tensors, skipped in ((largest.groups, 1), (largest.rest, 0))
    ]
    out = (largest.out.dtype, *largest.out.shape[1:])
    loop = compiled_loop(function, *likes, not how, out, 0 if in_place else None, *how, **constants)
    of = [[*one.groups, *one.rest, one.last] for one in given]
    run = loop.over_layers(of[which])
    if run is None:
        return False
    firsts = itertools.accumulate((len(one.out) for one in given), initial=0)
    rows = [
        [first, *(x.data_ptr() for x in (*tensors, *([] if in_place else [one.out])))]
        for first, tensors, one in zip(firsts, of, given, strict=False)
    ]
    rows.append([sum(len(one.out) for one in given), *[0] * (len(rows[0]) - 1)])
    run(torch.tensor(rows, device="cpu"))
    return True


def _key(group, i: int, seed: Tensor, step: Tensor, draw: Tensor) -> tuple[Tensor, ...]:
    """Of the draws of the group's i-th layer."""
    return seed, step, kernels.integers(group.layers[i].layer).view(()), draw


def draw_layers_(group, inv_temperature: Tensor, seed: Tensor, step: Tensor, draw: Tensor) -> bool:
    """Draw the codes of a ``LayerGroup``; False, and nothing has changed, where no machine code does it."""
    given = []
    for i, (logits, _, offset, row_stride) in enumerate(group.layers):
        rest = *_key(group, i, seed, step, draw.view(())), inv_temperature
        shard = kernels.integers(0, logits.shape[1] // group.m, row_stride, offset)
        given.append(_Given([logits.view(-1, group.m)], rest, shard, group.codes[i].view(-1)))
    return _run(kernels.determined_mask, given, kernels.spread_levels, kernels.drawn_mask, n=group.n)


def _no_level(number, *rest, m):
    """Of what codes determine."""
    return (number & 0).to(torch.uint8)


def _expected_update(logits, codes, level, coef, inv_temperature, *, n):
    """``reference.group_updated_logits`` where the codes keep the N largest, which takes less; others are left open."""
    xs = [x.to(torch.float32) for x in reference.columns(logits)]
    expected = bounds.Expected(xs, level, inv_temperature, n)
    # of a tie more than N are kept
    distinct = expected.descending[n] < expected.descending[n - 1]
    same = expected.ordered & distinct & (reference.encode(expected.kept, codes.dtype) == codes)
    scale = coef[0] * inv_temperature
    new = [torch.where(same, x - s * scale, x) for x, s in zip(xs, expected.score(), strict=True)]
    return reference.uncolumns(new), torch.where(same, 0, 1).to(torch.uint8)


def _drawn_update(logits, codes, number, coef, inv_temperature, *, n):
    return _code_update(logits, codes, coef, inv_temperature, n=n)


def _code_update(logits, codes, coef, inv_temperature, *, n):
    """``reference.group_updated_logits`` by the draw that has given the codes, N <= EXACT_SCORE_MAX_N."""
    xs = [x.to(torch.float32) for x in reference.columns(logits)]
    score = reference.exact_score(reference.scaled(xs, inv_temperature), reference.decode(codes, len(xs)), n)
    scale = coef[0] * inv_temperature
    return reference.uncolumns([x - s * scale for x, s in zip(xs, score, strict=True)])


def _rounded_code_update(logits, codes, number, seed, step, layer, draw, coef, inv_temperature, *, n, dtype):
    """The same of logits of 16 bits."""
    new = _code_update(logits, codes, coef, inv_temperature, n=n)
    return reference.group_round_logits(new, number, (seed, step, layer, draw[0]), dtype=dtype)


def updates(group, draws: int) -> bool:
    """Whether ``update_layers_`` takes a group and so many draws.

    It goes by codes, which tell the score of one draw up to an N. The numbers by which 16 bits are rounded are
    consecutive here.
    """
    by_codes = draws == 1 and group.n <= reference.EXACT_SCORE_MAX_N
    return by_codes and (group.dtype == torch.float32 or group.whole)


def update_layers_(group, coef: Tensor, inv_temperature: Tensor, seed: Tensor, step: Tensor, draws: Tensor) -> bool:
    """Update the logits of a ``LayerGroup`` by the codes of a draw; False, and nothing has changed, as above."""
    given = []
    for i, layer in enumerate(group.layers):
        logits, rest = layer.logits.view(-1, group.m), (coef, inv_temperature)
        first = kernels.integers(0, 1, 1, 0)
        if group.dtype != torch.float32:
            rest, first = (*_key(group, i, seed, step, draws), *rest), kernels.integers(layer.group_offset)
        given.append(_Given([logits, group.codes[i].view(-1)], rest, first, logits))
    if group.dtype == torch.float32:
        return _run(_expected_update, given, _no_level, _drawn_update, in_place=True, n=group.n)
    return _run(_rounded_code_update, given, in_place=True, n=group.n, dtype=group.dtype)
