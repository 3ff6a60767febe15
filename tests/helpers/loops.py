"""A function of groups, and its compiled loop."""

from __future__ import annotations

import torch

from helpers.bits import assert_same_bits
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.cpu.loops import CompiledLoop


def scaled_sum(x, index, scale, *, power):
    """A function of groups with two results."""
    return reference.fixed_sum(reference.columns(x * scale)), index * power


LIKE = (((torch.float32, 4),), ((torch.float32,),))


def a_loop(power=3, groups=LIKE[0], rest=LIKE[1]):
    return CompiledLoop(scaled_sum, groups, rest, numbered=True, constants={"power": power})


def loop_tensors(groups):
    x = torch.arange(groups * 4, dtype=torch.float32).view(groups, 4)
    return [x, torch.tensor(0.5, dtype=torch.float32), torch.tensor(7)]


def check_loop(loop, groups=5):
    given = loop_tensors(groups)
    total, index = loop(list(given))
    assert_same_bits(total, given[0].sum(-1) * 0.5)
    assert_same_bits(index, (torch.arange(groups) + 7) * 3)


def oddness(number, scale, *, m):
    """A level of each group, by its number."""
    return (number & 1).to(torch.uint8)


def by_bounds(x, threshold, level, scale, *, power):
    """Groups that begin below their threshold are left open and unchanged."""
    is_open = x[:, 0] < threshold
    columns = [torch.where(is_open, column, column * scale + level.to(torch.float32)) for column in x.unbind(-1)]
    return torch.stack(columns, dim=-1), torch.where(is_open, 1, 0).to(torch.uint8)


def draw_full(x, threshold, number, scale, *, power):
    return torch.stack([column * scale + (number * power).to(torch.float32) for column in x.unbind(-1)], dim=-1)


def drawn_loop(in_place=0, function=by_bounds):
    """A loop of groups [2] with thresholds, which draws what lies below them."""
    like, scalar = (torch.float32, 2), (torch.float32,)
    how = False, like, in_place, oddness, draw_full, {"power": 3}
    return CompiledLoop(function, (like, scalar), (scalar,), *how)


# Machine code of nothing, and what runs instead of it
NOTHING = (b"code", ((torch.int64,),))
