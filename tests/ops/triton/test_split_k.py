"""Products whose inner dimension is split: sums of parts in their order, and when products are split."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.enumerated import KERNEL_DEVICE
from helpers.products import COUNTER, normal, operands, small_tiles, within_budget
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.ops.triton import masked_gemm, packed_gemm, tiles

# Bytes of a weight beside which sums are few, and their number
LARGE = 1 << 40, 1


def in_parts(monkeypatch, parts):
    """Tiles of 32 columns or 16 rows at a time, and the inner dimension in so many parts."""
    for module in (masked_gemm, packed_gemm):
        monkeypatch.setattr(module, "tiles_for", small_tiles)
    monkeypatch.setattr(masked_gemm, "parts_for", lambda *_: parts)


@pytest.mark.parametrize("rows", [1024, 4096, 11008])
@pytest.mark.parametrize("num_warps", [4, 8])
def test_products_are_split_until_every_processor_has_twelve_warps(rows, num_warps):
    tile = tiles.Tiles(out=16, tokens=16, k=64, num_warps=num_warps)
    for target, row in tiles.TARGETS.items():
        warps = -(-rows // tile.out) * num_warps
        parts = tiles.parts_for(tile, warps // num_warps, 64, target, *LARGE)
        assert warps * parts >= 12 * row.processors
        assert parts == 1 or warps * parts // 2 < 12 * row.processors


def test_a_part_has_at_least_two_steps():
    tile, steps = tiles.Tiles(out=16, tokens=16, k=64), (1, 3, 4, 7, 8, 31, 32, 1000)
    assert [tiles.parts_for(tile, 4, count, "sm_90", *LARGE) for count in steps] == [1, 1, 2, 2, 4, 8, 16, 16]


def test_no_part_is_empty():
    """Of 33 steps in parts of three, the last one of 16 would be behind the end, as five of them would."""
    tile = tiles.Tiles(out=16, tokens=16, k=64)
    assert tiles.parts_for(tile, 4, 33, "sm_90", *LARGE) == 11
    for steps in range(1, 300):
        parts = tiles.parts_for(tile, 4, steps, "sm_90", *LARGE)
        assert (parts - 1) * -(-steps // parts) < steps


@pytest.mark.parametrize(("tokens", "expected"), [(8, 8), (16, 8), (32, 8), (64, 4)])
def test_sums_are_at_most_half_the_bytes_of_the_weight(tokens, expected, monkeypatch):
    """Written and read, beside 18.9 MB of a packed weight."""
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    rows = k = 4096
    operands = torch.empty(rows, k // 2, dtype=torch.bfloat16), torch.empty(rows, k // 8, dtype=torch.uint8)
    x = torch.empty(tokens, k, dtype=torch.bfloat16)
    tile = tiles.tiles_for("packed_linear", 4, x.dtype, tokens, rows, k, "sm_90")
    split = masked_gemm.SplitResult("packed_linear", tile, (tokens, rows), k, x, None, *operands)
    assert split.parts == expected
    assert 2 * split.out.nbytes <= sum(part.nbytes for part in operands) / 2


def test_sums_are_added_in_the_order_of_the_parts(launched):
    """1e8 + 1 - 1e8 is 0 in float32, and 1 in any other order that ends elsewhere."""
    tile, x = tiles.Tiles(out=16, tokens=16, k=16), torch.zeros(3, 64, device=KERNEL_DEVICE)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(masked_gemm, "parts_for", lambda *_: 4)
        split = masked_gemm.SplitResult("masked_linear", tile, (3, 5), 64, x, normal(5))
    assert split.bias is None and split.grid == (1, 1, 4) and split.out.shape == (4, 3, 5)
    for part, value in enumerate((1e8, 1.0, -1e8, 0.25)):
        split.out[part] = value
    assert_same_bits(split.sum(), (normal(5) + 0.25).expand(3, 5).contiguous())
    assert launched["split_sum"] == 1


# of 3 steps the second of 2 parts has one
@pytest.mark.parametrize("parts", [slow(2), 3])
@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.bfloat16], ids=str)
def test_masked_products_in_parts(parts, dtype, launched, monkeypatch):
    in_parts(monkeypatch, parts)
    x, weight, logits, bias = operands(mk.NMPattern("2:4"), tokens=9, rows=48, k=96, dtype=dtype)
    y, log_prob = mk.masked_linear(x, weight, logits, bias, pattern="2:4", **COUNTER)
    upstream = normal(*y.shape, seed=4, dtype=dtype)
    x_grad = torch.autograd.grad(y, x, upstream)[0]
    assert launched["split_sum"] == 2
    monkeypatch.setattr(masked_gemm, "parts_for", lambda *_: 1)
    _, whole = mk.masked_linear(x, weight, logits, bias, pattern="2:4", **COUNTER)
    torch.testing.assert_close(log_prob, whole, rtol=1e-6, atol=0)
    kept = mk.sample_masked_weight(weight.detach(), logits.detach(), pattern="2:4", **COUNTER)
    wide, grad = kept.double(), upstream.double()
    within_budget(y, nn.functional.linear(x, kept, bias), nn.functional.linear(x.double(), wide, bias.double()))
    within_budget(x_grad, upstream @ kept, grad @ wide)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_packed_products_in_parts(pattern, launched, monkeypatch):
    in_parts(monkeypatch, 3)
    dense = normal(21, 96).bfloat16()
    weight = torch.where(mk.expand_mask(mk.top_n_mask(dense.float().abs(), pattern), pattern), dense, 0)
    x, bias = normal(9, 96, seed=1).bfloat16(), normal(21, seed=2).bfloat16()
    y = mk.nm_linear(x, mk.pack_nm(weight, pattern), bias)
    assert launched["split_sum"] == 1
    exact = nn.functional.linear(x.double(), weight.double(), bias.double())
    within_budget(y, nn.functional.linear(x, weight, bias), exact)
