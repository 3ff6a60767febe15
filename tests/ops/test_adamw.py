"""AdamW on kept weights: the same bits on all routes, those of torch's optimizer but for rounding."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import cases
from helpers.enumerated import KERNEL_DEVICE

from maskpro_kernels import expand_mask, ops, top_n_mask
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.cpu import kernels
from maskpro_kernels.ops.reference import adamw_scalars
from maskpro_kernels.ops.reference.slopes import BETA, BETA_OF_SQUARES, EPSILON

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATTERNS = ["1:2", "1:4", "2:4", "4:8", "8:16"]


def state(pattern, dtype, rows=37, groups=13):
    """(weight, master, first, second, gradient, codes), of a layer that has learned for some steps."""
    generator = torch.Generator().manual_seed(3)
    m = int(pattern.split(":")[1])

    def normal(scale=1.0):
        return scale * torch.randn(rows, groups * m, generator=generator)

    master, first, second, gradient = normal(), normal(1e-3), normal(1e-3).square(), normal(1e-3)
    # no gradient so far, and a weight that comes into the mask for the first time
    gradient[0], first[1], second[1] = 0.0, 0.0, 0.0
    weight = master.to(dtype) if dtype != torch.float32 else master
    return weight, master, first, second, gradient, top_n_mask(normal(), pattern)


def moved(route, tensors, scalars, m):
    """The state after a step by a route."""
    device = KERNEL_DEVICE if route is ops else torch.device("cpu")
    weight, *rest = (x.to(device, copy=True) for x in tensors)
    if weight.dtype == torch.float32:
        weight = rest[0]
    *held, gradient, codes = weight, *rest
    at = (scalars.to(device), m) if route is ops else (scalars,)
    route.adamw_(*held, gradient, codes, *at, **({} if route is ops else {"m": m}))
    return [x.cpu() for x in held]


def scalars_of(usable=True, count=3.0, rate=0.01, decay=0.5):
    return adamw_scalars(torch.tensor(usable), torch.tensor(count), rate, decay)


# another dtype is another loop of the last rounding
@pytest.mark.parametrize(
    ("pattern", "dtype"),
    cases(
        [(pattern, dtype) for pattern in PATTERNS for dtype in DTYPES],
        slow=lambda pattern, dtype: pattern != "2:4" and dtype != torch.bfloat16,
    ),
    ids=str,
)
def test_all_routes_have_the_same_bits(pattern, dtype, launched):
    m, tensors = int(pattern.split(":")[1]), state(pattern, dtype)
    expected = moved(reference, tensors, scalars_of(), m)
    assert_same_bits(moved(ops, tensors, scalars_of(), m), expected)
    assert launched["adamw"] == 1
    assert_same_bits(moved(kernels, tensors, scalars_of(), m), expected)
    # the gradient of a product without kernels
    rounded = *tensors[:4], tensors[4].to(dtype), tensors[5]
    assert_same_bits(*(moved(route, rounded, scalars_of(), m) for route in (kernels, reference)))
    kept = expand_mask(tensors[-1], pattern)
    for old, new in zip(tensors[:4], expected, strict=True):
        assert_same_bits(new[~kept], old[~kept])
    assert (expected[1] != tensors[1])[kept].all()
    assert_same_bits(expected[0], expected[1].to(dtype))


@pytest.mark.parametrize("route", [reference, kernels, ops], ids=["reference", "compiled", "kernel"])
def test_steps_are_those_of_torch(route):
    weight, master, first, second, _, codes = state("2:4", torch.float32)
    kept = expand_mask(codes, "2:4")
    first.zero_()
    second.zero_()
    parameter = torch.nn.Parameter(torch.where(kept, master, 0).clone())
    betas = BETA, BETA_OF_SQUARES
    optimizer = torch.optim.AdamW([parameter], lr=0.01, betas=betas, eps=EPSILON, weight_decay=0.5)
    held = [weight, master, first, second]
    for step in range(4):
        gradient = torch.randn(master.shape, generator=torch.Generator().manual_seed(step)) * 1e-3
        parameter.grad = torch.where(kept, gradient, 0)
        optimizer.step()
        held = moved(route, [*held, gradient, codes], scalars_of(count=step + 1.0), 4)
    torch.testing.assert_close(held[1][kept], parameter.detach()[kept], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("route", [reference, kernels, ops], ids=["reference", "compiled", "kernel"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_step_that_is_not_usable_moves_nothing(route, dtype):
    *held, gradient, codes = state("2:4", dtype)
    gradient.fill_(math.nan)
    after = moved(route, [*held, gradient, codes], scalars_of(usable=False), 4)
    assert_same_bits(after, held)


@pytest.mark.parametrize("shape", [(0, 8), (3, 4), (1, 4 * 700_001)], ids=str)
def test_layers_of_any_size(shape):
    """None, one group a row, and more than are compiled for at a time."""
    generator = torch.Generator().manual_seed(0)
    master, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    first, second = torch.zeros(2, *shape)
    codes = top_n_mask(master, "2:4")
    tensors = [master.bfloat16(), master, first, second, gradient, codes]
    assert_same_bits(moved(kernels, tensors, scalars_of(), 4), moved(reference, tensors, scalars_of(), 4))
    if shape[1] < 100:
        assert_same_bits(moved(ops, tensors, scalars_of(), 4), moved(reference, tensors, scalars_of(), 4))


def test_opcheck():
    tensors = [x.to(KERNEL_DEVICE) for x in (*state("2:4", torch.bfloat16), scalars_of())]
    torch.library.opcheck(torch.ops.maskpro.adamw_.default, (*tensors, 4))
