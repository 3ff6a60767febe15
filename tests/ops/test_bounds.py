"""Draws that need no logarithm: the bound on the noise, and the bits of the route that uses it."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import mpmath
import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import cases, slow

from maskpro_kernels.functional.checks import counter_of
from maskpro_kernels.ops import bounds, reference
from maskpro_kernels.ops.counter import MaskSource
from maskpro_kernels.ops.cpu import kernels
from maskpro_kernels.ops.pattern import NMPattern

SEED, STEP, LAYER, OFFSET = 0x123456789ABCDEF, (1 << 32) - 3, 3, 21
INVERSE_TEMPERATURE = 1.3


def scalar(value):
    return torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else torch.int64)


def words_of_all_sizes() -> torch.Tensor:
    """Both ends of the range densely, the neighbours of all powers of two, and a million in between."""
    ends = torch.arange(1 << 18)
    powers = torch.cat([(1 << k) + torch.arange(-64, 65) for k in range(8, 32)])
    generator = torch.Generator().manual_seed(0)
    between = torch.randint(0, 1 << 32, (1_000_000,), generator=generator)
    return torch.cat([ends, powers, between, (1 << 32) - 1 - ends])


@pytest.mark.parametrize("bound", [bounds.minus_log, bounds.least_gumbel], ids=["above", "below"])
def test_noise_lies_between_the_bounds(bound):
    r = words_of_all_sizes()
    slack = (bound(r) - reference.gumbel(r)) * (1 if bound is bounds.minus_log else -1)
    assert slack.min() > 5e-4
    # a bound that is loose would determine nothing
    middle = slice(1 << 7, 1 << 28) if bound is bounds.minus_log else slice(0xC0000000, 0xF0000000)
    assert slack[(r >= middle.start) & (r < middle.stop)].max() < 0.15


def test_the_bounds_hold_of_what_the_noise_is_meant_to_be():
    """By 60 digits, at the ends, around all powers of two, and where the tangent touches."""
    touching = round((1 - math.exp(-2)) * 2**32)
    words = [0, 1, 0xF0000000, *((1 << k) + by for k in range(1, 32) for by in (-1, 0, 1)), touching]
    words += [word ^ 0xFFFFFFFF for word in words]
    above, below = (bound(torch.tensor(words)).tolist() for bound in (bounds.minus_log, bounds.least_gumbel))
    with mpmath.workdps(60):
        noise = [-mpmath.log(-mpmath.log1p(-(mpmath.mpf(word) + 0.5) / 2**32)) for word in words]
    for word, least, exact, most in zip(words, below, noise, above, strict=True):
        assert least + 5e-4 < exact < most - 5e-4, word
    assert noise[words.index(touching)] - below[words.index(touching)] < 0.03


def test_the_level_of_a_group_bounds_the_spread_of_its_noise():
    r = words_of_all_sizes()
    shuffled = r[torch.randperm(len(r), generator=torch.Generator().manual_seed(0))]
    words = list(shuffled[: len(r) // 4 * 4].view(4, -1))
    levels = bounds.spread_levels(words)
    assert levels.dtype == torch.uint8
    noise = torch.stack([reference.gumbel(word) for word in words])
    slack = bounds.spread(levels) - (noise.amax(0) - noise.amin(0))
    known = levels != 0
    assert known.float().mean() > 0.5 and slack[known].min() > 1e-3
    least, most = torch.stack(words).amin(0), torch.stack(words).amax(0)
    # a level takes eighths of a doubling together, of the second word sixteenths; a quarter of a small word loses bits
    loose = bounds.spread(levels) - (bounds.minus_log(least) - bounds.least_gumbel(most))
    assert loose[known & (levels < 255) & (least >= 1 << 9) & (most <= (1 << 32) - (1 << 9))].max() < 0.2


@pytest.mark.parametrize(("gap", "share"), [(10.0, 0.98), (8.0, 0.90), (5.7, 0.38)])
def test_most_blocks_of_a_kernel_compute_no_noise(gap, share):
    """2:4, blocks of 64 groups. With the least noise of all as the bound it is 0.87, 0.37 and 0.00 of them."""
    words = torch.randint(0, 1 << 32, (4, 1 << 20), generator=torch.Generator().manual_seed(0))
    kept, dropped = words[:2].amax(0), words[2:].amin(0)
    determined = bounds.minus_log(dropped) < gap + bounds.least_gumbel(kept)
    block = 64
    assert determined.view(-1, block).all(1).float().mean() > share


def sharp_logits(groups: int, n: int, m: int, gap: float, dtype=torch.float32) -> torch.Tensor:
    """Logits of a mask at that gap, with ties inside groups and groups that lie far from 0."""
    generator = torch.Generator().manual_seed(groups + m)
    kept = torch.rand(groups, m, generator=generator).topk(n).indices
    logits = torch.zeros(groups, m).scatter_(1, kept, gap) + 40 * torch.randn(groups, 1, generator=generator)
    logits[::3] += 0.1 * torch.randn(logits[::3].shape, generator=generator)
    return logits.to(dtype).view(1, -1)


def counter(logits, n, m, shard=None):
    offset, row_stride = shard or (OFFSET, None)
    place = {"group_offset": offset, "group_row_stride": row_stride}
    return counter_of(logits, NMPattern(f"{n}:{m}"), SEED, STEP, LAYER, 2, **place)


def updated(route, logits, n, m, draws=(2,), shard=None):
    # at the same place of a word
    start = logits.storage_offset()
    logits = logits.new_empty(start + logits.numel())[start:].view(logits.shape).copy_(logits)
    coef = torch.tensor([3e3 / (k + 1) for k in range(len(draws))])
    where = counter(logits, n, m, shard)._replace(draw=torch.tensor(draws))
    route.score_update_(logits, coef, n, m, INVERSE_TEMPERATURE, where)
    return logits


def drawn(route, logits, n, m, weight=None, shard=None):
    where = counter(logits, n, m, shard)
    if weight is None:
        return route.sample_mask(logits, n, m, INVERSE_TEMPERATURE, where)
    return route.masked_weight(weight, MaskSource(logits, "drawn", n, m, INVERSE_TEMPERATURE, where))


@pytest.mark.parametrize("gap", [0.0, 4.0, 10.0, 30.0])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), slow(4, 8)])
def test_determined_draws_are_the_drawn_ones(n, m, gap):
    """Where none, some, few and all groups are determined."""
    logits = sharp_logits(150_003, n, m, gap)
    group = torch.arange(150_003) + OFFSET
    key = counter(logits, n, m).key
    levels = bounds.group_spread_levels(group, key, m=m)
    kept, undecided = bounds.group_expected_mask(logits.view(-1, m), levels, scalar(INVERSE_TEMPERATURE), n)
    expected = reference.group_drawn(logits.view(-1, m), group, key, scalar(INVERSE_TEMPERATURE), n)
    differs = (torch.stack(kept) != torch.stack(expected)).any(0)
    assert not (differs & (undecided == 0)).any()
    share = float(undecided.float().mean())
    # a level is that of all weights: of 8 twice as many open a group as of the 4 dropped ones
    low, high = {0.0: (1, 1), 4.0: (0.01, 0.4 if m == 8 else 0.2), 10.0: (1e-6, 1e-3), 30.0: (0, 0)}[gap]
    assert low <= share <= high, share


@pytest.mark.parametrize("m", [2, 4, 8, 16])
def test_groups_are_sorted_from_the_largest_on(m):
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(5_003, m, generator=generator).round(decimals=1)
    x[::5, 0], x[::7, -1] = torch.inf, -torch.inf
    # zeros of either sign are equal
    assert torch.equal(torch.stack(bounds.descending(x.unbind(-1)), dim=-1), x.sort(dim=-1, descending=True).values)


@pytest.mark.parametrize("gap", [8.0, 30.0, 200.0])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (2, 4), (3, 4), (2, 8), (4, 8)])
def test_what_is_determined_has_the_score_of_the_reference(n, m, gap):
    """Bit for bit, with ties among the kept and among the dropped weights, and sums of the dropped ones that vanish."""
    logits = sharp_logits(50_003, n, m, gap).view(-1, m)
    logits[1::3] += torch.randn(logits[1::3].shape, generator=torch.Generator().manual_seed(n)).round()
    levels = torch.randint(0, 256, (len(logits),), generator=torch.Generator().manual_seed(m)).to(torch.uint8)
    inverse = scalar(INVERSE_TEMPERATURE)
    expected = bounds.Expected(reference.columns(logits), levels, inverse, n)
    z = reference.scaled(reference.columns(logits), inverse)
    kept = reference.top_n(z, n)
    determined = expected.determined
    assert determined.float().mean() > 0.1
    assert_same_bits(torch.stack(expected.kept)[:, determined], torch.stack(kept)[:, determined])
    ours, theirs = (
        torch.stack(scores)[:, determined] for scores in (expected.score(), reference.exact_score(z, kept, n))
    )
    assert_same_bits(ours.view(torch.int32), theirs.view(torch.int32))


@pytest.mark.parametrize("m", [2, 4, 8])
def test_groups_with_what_is_no_number_are_left_open(m):
    """As are those with an infinity that the noise cannot reach past, but not those with hopeless weights alone."""
    logits = torch.zeros(4 * m + 2, m)
    logits[:, 0] = 50.0
    for column in range(m):
        for row, value in enumerate((torch.nan, torch.inf, 40.0, -torch.inf)):
            logits[4 * column + row, column] = value
    logits[-2], logits[-1, 1:] = -torch.inf, -torch.inf
    levels = torch.full((len(logits),), 100, dtype=torch.uint8)
    _, undecided = bounds.group_expected_mask(logits, levels, scalar(1.0), 1)
    rows = undecided.view(-1).tolist()
    for column in range(m):
        no_number, infinite, near, hopeless = rows[4 * column : 4 * column + 4]
        assert no_number and infinite
        assert near == (column > 0)
        # without the first, the others tie
        assert hopeless == (column == 0 and m > 2)
    assert rows[-2:] == [1, 0]


@pytest.mark.parametrize(
    ("n", "m"),
    [(4, 8)] + [pytest.param(n, m, marks=pytest.mark.slow) for n, m in ((1, 2), (3, 4), (4, 16), (8, 16), (15, 16))],
)
def test_other_patterns_are_determined_as_well(n, m):
    """In part, and their codes have bits up to the sign."""
    logits = sharp_logits(20_003, n, m, 6.0)
    groups = torch.arange(20_003) + OFFSET
    levels = bounds.group_spread_levels(groups, counter(logits, n, m).key, m=m)
    _, undecided = bounds.group_expected_mask(logits.view(-1, m), levels, scalar(INVERSE_TEMPERATURE), n)
    assert 1e-4 < undecided.float().mean() < 0.9
    assert_same_bits(drawn(kernels, logits, n, m), drawn(reference, logits, n, m))
    assert_same_bits(updated(kernels, logits, n, m), updated(reference, logits, n, m))


@pytest.mark.parametrize("groups", [1, 7, 31, 32, 33, 64, 65, 4_096])
def test_any_number_of_groups(groups):
    logits = sharp_logits(groups, 2, 4, 4.0)
    # in memory that holds whole words, and in such that does not
    shifted = torch.cat([torch.zeros(1), logits.view(-1)])[1:].view(logits.shape)
    assert shifted.storage_offset() == 1
    for given in (logits, shifted):
        assert_same_bits(drawn(kernels, given, 2, 4), drawn(reference, logits, 2, 4))
        assert_same_bits(updated(kernels, given, 2, 4), updated(reference, logits, 2, 4))


IN_THREADS = """
import threading
import torch
import maskpro_kernels as mk
layers = [(torch.randn(64, 512), torch.randn(64, 512)) for _ in range(2)]
expected = [mk.sample_masked_weight(*layer, "2:4", seed=0) for layer in layers]
def draw(layer, masked):
    for _ in range(400):
        assert torch.equal(mk.sample_masked_weight(*layer, "2:4", seed=0), masked)
    done.append(True)
done = []
threads = [threading.Thread(target=draw, args=pair) for pair in zip(layers, expected)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(done))
"""


def test_threads_may_draw_at_the_same_time():
    """Where they wait for each other, the whole process does, and nothing in it can end it."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", IN_THREADS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "2\n", done.stderr


def test_several_draws_and_a_shard_with_rows_apart():
    logits = sharp_logits(300 * 1_000, 2, 4, 8.0).view(300, -1)
    assert logits.numel() > 4 * kernels.INDEXED_GROUPS
    shard = (1_000, 1_277)
    assert_same_bits(drawn(kernels, logits, 2, 4, shard=shard), drawn(reference, logits, 2, 4, shard=shard))
    for draws in [(2,), (5, 9)]:
        expected = updated(reference, logits, 2, 4, draws, shard)
        assert_same_bits(updated(kernels, logits, 2, 4, draws, shard), expected)
        assert not torch.equal(expected, logits)


@pytest.mark.parametrize(
    ("m", "dtype"),
    [
        pytest.param(m, dtype, marks=[] if m == 4 else pytest.mark.slow)
        for m, dtype in itertools.product([2, 4, 8], [torch.float32, torch.bfloat16, torch.float16])
    ],
    ids=str,
)
def test_weights_are_masked_as_words_of_several(m, dtype):
    """Values whose bits show: negative zero, NaN, infinity, and a weight that starts inside a word."""
    logits = sharp_logits(5_003, m // 2, m, 8.0)
    generator = torch.Generator().manual_seed(1)
    storage = torch.randn(logits.numel() + 1, generator=generator).to(dtype)
    storage[:6] = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, torch.nan, -1.0]).to(dtype)
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    for weight in (storage[:-1].view(1, -1), storage[1:].view(1, -1)):
        expected = drawn(reference, logits, m // 2, m, weight)
        result = drawn(kernels, logits, m // 2, m, weight)
        assert_same_bits(result.view(integers), expected.view(integers))
        codes = reference.top_n_mask(logits, n=m // 2, m=m)
        mask = MaskSource(codes, "codes", m // 2, m, 1.0)
        expected = reference.masked_weight(weight, mask)
        result = kernels.masked_weight(weight, mask)
        assert_same_bits(result.view(integers), expected.view(integers))


CHANGES = [None, "SEED", "STEP", "LAYER", "offset", "row stride", "both", "first rows"]


@pytest.mark.parametrize(
    ("changed", "dtype"),
    cases(
        itertools.product(CHANGES, [torch.float32, torch.bfloat16]),
        slow=lambda changed, dtype: dtype == torch.bfloat16 and changed not in (None, "both"),
    ),
    ids=str,
)
def test_draws_and_updates_are_those_of_the_reference(changed, dtype, monkeypatch):
    """In whole layers and in shards, by one draw and by two."""
    logits = sharp_logits(64 * 1_000, 2, 4, 6.0, dtype).view(64, -1)
    shard = {"offset": (5, 1_000), "row stride": (OFFSET, 1_277), "both": (5, 1_277)}.get(changed)
    if changed in ("SEED", "STEP", "LAYER"):
        monkeypatch.setitem(globals(), changed, 7)
    given = logits[:24] if changed == "first rows" else logits
    assert_same_bits(drawn(kernels, given, 2, 4, shard=shard), drawn(reference, given, 2, 4, shard=shard))
    for draws in ((2,), (2, 5)):
        expected = updated(reference, given, 2, 4, draws, shard)
        assert not torch.equal(expected, given)
        assert_same_bits(updated(kernels, given, 2, 4, draws, shard), expected)
