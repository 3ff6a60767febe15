"""The tuner of tiles: it checks before it times, and ranks by time."""

from __future__ import annotations

import pytest
import tune
from helpers.cases import slow
from helpers.enumerated import KERNEL_DEVICE

from maskpro_kernels.ops.triton import masked_gemm
from maskpro_kernels.ops.triton.tiles import Tiles

TILES = [Tiles(out=16, tokens=16, k=64), Tiles(out=32, tokens=16, k=32), Tiles(out=64, tokens=16, k=32)]


@pytest.mark.parametrize("product", [tune.PRODUCTS[0], *map(slow, tune.PRODUCTS[1:])])
def test_tiles_are_ranked_by_their_time(product):
    times = iter([3.0, 1.0, 2.0])

    def milliseconds(run):
        run()
        return next(times)

    before = masked_gemm.tiles_for
    ranked = tune.best(product, (48, 64), 16, TILES, milliseconds, device=KERNEL_DEVICE)
    assert ranked == [(1.0, TILES[1]), (2.0, TILES[2]), (3.0, TILES[0])]
    assert masked_gemm.tiles_for is before


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(masked_gemm, "masked_linear", lambda x, weight, *_: (x @ weight.T, None))
    with pytest.raises(AssertionError):
        tune.best("masked_linear", (48, 64), 16, TILES, lambda run: pytest.fail("timed"), device=KERNEL_DEVICE)


@pytest.mark.parametrize("tokens", tune.TOKENS)
def test_candidates_give_every_thread_a_group_and_none_too_many(tokens):
    for tile in tune.candidates(tokens):
        groups = tile.out * tile.k // 4
        assert 64 <= groups <= 8 * 32 * tile.num_warps
        assert tile.tokens <= tokens
