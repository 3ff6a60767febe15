"""Kernels over groups as a GPU gets them: every bit is that of the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import cases, slow
from helpers.compiled import DTYPES, INVERSE, OVER_GROUPS, Matrix, assert_bits_of_reference, by_both, masked_weight
from helpers.layers import OVER_LAYERS, ManyLayers
from helpers.noise import exp_kernel, gumbel_kernel, in_kernel, ln_kernel
from verdict.cases import reciprocals

from maskpro_kernels import ops
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.triton import tiles

pytestmark = pytest.mark.compiled

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
PATTERNS = [(1, 2), (1, 4), (2, 4), (3, 4), (2, 8), (4, 8), (8, 16)]
DRAWN = ("sample_mask", "masked_weight", "score_update", "score_updates", "descend")
# Of those for AMD, which take longer to compile
QUICK = ("sample_mask", "masked_weight", "top_n_mask", "score_update", "descend", "unpack", "adamw")


def in_the_ordinary_suite(target, kernel, pattern, dtype, shard):
    if shard:
        return (target, kernel, pattern, dtype) == ("sm_80", "sample_mask", (2, 4), torch.float32)
    if pattern == (2, 4):
        chosen = target in ("sm_80", "sm_90") or target == "gfx942" and kernel in QUICK
        return chosen and dtype == (torch.bfloat16 if kernel in ("unpack", "descend") else torch.float32)
    chosen = {(1, 4): "score_update", (4, 8): "mask_score", (8, 16): "sample_mask"}
    return (target, dtype) == ("sm_80", torch.float32) and kernel == chosen.get(pattern)


EVERY = [
    case
    for case in itertools.product(TARGETS, OVER_GROUPS, PATTERNS, DTYPES, (False, True))
    if case[1] in DRAWN or not case[4]
]


@pytest.mark.parametrize(
    ("target", "kernel", "pattern", "dtype", "shard"),
    cases(EVERY, slow=lambda *case: not in_the_ordinary_suite(*case)),
    ids=str,
)
def test_bits_are_those_of_the_reference(target, kernel, pattern, dtype, shard, compiled_for, launched):
    compiled_for(target)
    of = Matrix(*pattern, dtype=dtype, shard=shard)
    assert_bits_of_reference(lambda: OVER_GROUPS[kernel](of))
    assert launched[kernel] == 1


@pytest.mark.parametrize("kernel", ["score_update", slow("score_updates")])
@pytest.mark.parametrize("target", [TARGETS[0], *map(slow, TARGETS[1:])])
def test_zeros_keep_their_signs(target, kernel, compiled_for):
    """An update that changes nothing rounds zeros by their bits, whose sign a compiler may drop."""
    compiled_for(target)
    of = Matrix(2, 4, torch.bfloat16)
    values = torch.tensor([0.0, -0.0, 200.0]).bfloat16()
    generator = torch.Generator().manual_seed(0)
    of.logits.copy_(values[torch.randint(len(values), of.logits.shape, generator=generator)])
    assert_bits_of_reference(lambda: OVER_GROUPS[kernel](of))


@pytest.mark.parametrize("target", [TARGETS[0], *map(slow, TARGETS[1:])])
@pytest.mark.parametrize("pattern", [(2, 4), slow((1, 16))], ids=str)
def test_sums_of_negative_zeros_are_negative(target, pattern, compiled_for):
    """Where masks are certain each term is -0.0. A logit of -0.0 less their sum is 0.0; less 0.0 it would stay -0.0."""
    compiled_for(target)
    of = Matrix(*pattern)
    of.logits.fill_(-200.0).view(of.rows, -1, of.m)[..., : of.n] = -0.0
    before = of.logits.clone()

    def update():
        logits = of.logits.clone()
        ops.score_update_(logits, torch.full((2,), -0.5), of.n, of.m, INVERSE, of.draws(2))
        return [logits]

    assert_bits_of_reference(update)
    assert not update()[0].signbit()[before == 0].any()


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [name for name in OVER_GROUPS if name != "adamw"])
@pytest.mark.parametrize("target", TARGETS)
def test_bits_of_a_hundred_thousand_groups(target, kernel, compiled_for):
    compiled_for(target)
    of = Matrix(2, 4, rows=101, groups=997)
    assert of.rows * of.groups > 100_000
    assert_bits_of_reference(lambda: OVER_GROUPS[kernel](of))


@pytest.mark.parametrize(
    ("target", "pattern", "dtype"),
    cases(
        itertools.product(TARGETS, ((2, 4), (8, 16)), DTYPES),
        slow=lambda target, pattern, dtype: (target, pattern, dtype) != ("sm_80", (2, 4), torch.bfloat16),
    ),
    ids=str,
)
def test_weights_under_given_masks(target, pattern, dtype, compiled_for):
    compiled_for(target)
    of = Matrix(*pattern, dtype=dtype)
    assert_bits_of_reference(lambda: masked_weight(of, kind="codes"))


@pytest.mark.parametrize("spread", ["certain", "open"])
@pytest.mark.parametrize(
    ("target", "kernel"),
    cases(
        itertools.product(TARGETS, ("sample_mask", "masked_weight", "score_update")),
        slow=lambda target, kernel: (target, kernel) != ("sm_80", "sample_mask"),
    ),
)
def test_blocks_with_and_without_noise(target, kernel, spread, compiled_for, emulator, monkeypatch):
    """A block whose draws are all determined branches around the noise; a program takes several."""
    compiled_for(target)
    monkeypatch.setattr(tiles, "PROGRAMS_A_PROCESSOR", 0)
    of = Matrix(2, 4, rows=18, groups=67, spread=spread)
    config = tiles.configuration(kernel, of.m, 0, target)
    assert of.rows * of.groups > 2 * config.block * config.steps
    assert_bits_of_reference(lambda: OVER_GROUPS[kernel](of))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_a_single_group_and_one_more_than_a_block(dtype, compiled_for):
    compiled_for("sm_80")
    for groups in (1, 255, 257):
        of = Matrix(2, 4, dtype=dtype, rows=1, groups=groups)
        for kernel in ("sample_mask", "score_update", "top_n_mask"):
            assert_bits_of_reference(lambda kernel=kernel, of=of: OVER_GROUPS[kernel](of))


def of_layers_in_the_ordinary_suite(target, kernel, pattern, dtype, shard):
    if (pattern, dtype, shard) != ((2, 4), torch.float32, False):
        return False
    return target == "sm_80" or (target, kernel) in {("sm_90", "by codes"), ("gfx942", "sample_masks")}


@pytest.mark.parametrize(
    ("target", "kernel", "pattern", "dtype", "shard"),
    cases(
        itertools.product(
            TARGETS, OVER_LAYERS, [(1, 2), (1, 4), (2, 4), (4, 8), (8, 16), (4, 16)], DTYPES, (False, True)
        ),
        slow=lambda *case: not of_layers_in_the_ordinary_suite(*case),
    ),
    ids=str,
)
def test_layers_of_one_launch(target, kernel, pattern, dtype, shard, compiled_for, launched):
    """The emulator finds them by the addresses in a table, as a GPU does."""
    compiled_for(target)
    of = ManyLayers(*pattern, dtype, shard)
    assert_bits_of_reference(lambda: of.call(kernel))
    assert sum(launched.values()) == (2 if kernel == "by codes" else 1)


@pytest.mark.parametrize(
    ("spread", "pattern"),
    cases(itertools.product(("certain", "open"), ((2, 4), (4, 16))), slow=lambda *case: case != ("certain", (2, 4))),
    ids=str,
)
def test_flips_of_layers_of_one_launch(spread, pattern, compiled_for):
    """Programs count what leaves the N largest logits, of blocks with noise and without."""
    compiled_for("sm_80")
    of = ManyLayers(*pattern, spread=spread)
    found, expected = by_both(of.flip_rates)
    assert found == expected and (spread == "certain") == (max(found) == 0.0)


# Significands that lower accuracy rounds wrongly: all ones, and those from whose nearest approximation a step of
# Newton's, with a factor that is one unit in the last place too large, goes to the wrong side
HARD = [0x7FFFFF, 0x186799, 0x20DDD1, 0x2B8BE1, 0x50AC19, 0x50DD0D, 0x525D25, 0x5C23DD, 0x5E86A9, 0x605475, 0x6E4BC5,
        0x700FF1]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_bits_of_the_noise(target, compiled_for):
    """Of a draw its codes alone leave the kernel, which the last bits of the noise seldom change."""
    compiled_for(target)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 1 << 32, (100_000,), generator=generator)
    words = torch.cat([words, torch.arange(1 << 12), (1 << 32) - 1 - torch.arange(1 << 12)])
    assert_same_bits(in_kernel(gumbel_kernel, words), reference.gumbel(words))
    x = torch.exp(torch.empty(50_000).uniform_(-85, 85, generator=generator))
    assert_same_bits(in_kernel(ln_kernel, x, x - 1.0), reference.ln(x, x - 1.0))
    y = torch.empty(50_000).uniform_(-100, 88, generator=generator)
    assert_same_bits(in_kernel(exp_kernel, y), reference.exp(y))


@pytest.mark.parametrize("every", [127, slow(1)], ids="every {}".format)
@pytest.mark.parametrize("scale", [4096.0, 1 / 4096])
def test_reciprocals_are_rounded_to_the_nearest(scale, every, compiled_for):
    """Of all significands, at both ends of the range and in its middle, from approximations that are off either way."""
    compiled_for("sm_80")
    significands = torch.tensor([*HARD, *range(0, 1 << 23, every)], dtype=torch.int32)
    for exponent in (-60, -1, 0, 1, 59):
        for sign in (1, -1):
            x = sign * (significands | (127 + exponent) << 23).view(torch.float32)
            assert torch.equal(reciprocals(x, scale), scale / x)
