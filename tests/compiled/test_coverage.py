"""Every branch of every kernel is taken by some launch: basic blocks that are executed, and why others are not."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.compiled import DTYPES, INVERSE, OVER_GROUPS, Matrix, assert_bits_of_reference, masked_weight
from helpers.compiled_products import PRODUCTS, STEP, PackedProduct, Product, SparseProduct
from helpers.curvature import Curvature
from helpers.layers import DRAWS, OVER_LAYERS, ManyLayers, numbers

from gpu_emulators.amdgcn.divisions import divides_in_64_bits, only_after_long_divisions
from gpu_emulators.ptx.loops import only_goes_to, replaces_a_loop
from maskpro_kernels import ops
from maskpro_kernels.ops.pattern import metadata_of
from maskpro_kernels.ops.triton import grouped, sampling, slopes
from maskpro_kernels.ops.triton.tiles import PACKED_ROWS, architecture, scores_in_short, tiles_of
from maskpro_kernels.packed import VALUE_KINDS

pytestmark = [pytest.mark.compiled, pytest.mark.slow]

# For AMD, the last instruction before a wave's start
TO_THE_START = "s_branch .LBB0_0"
FEWER_GROUPS = "indices of groups beyond 2^32, which no matrix has; smaller ones are divided in 32 bits"
# Kernels over groups whose code depends on the dtype by more than a conversion
BY_DTYPE = ("sample_mask", "score_update", "score_updates", "descend", "unpack", "adamw")
OF_A_SPLIT = "results of more than 2^32 elements; only those of few programs are split"


def reason_on_amd(kernel, number, missed) -> str | None:
    """Why no launch reaches a block, one of those ``missed``."""
    block = kernel.blocks[number]
    if divides_in_64_bits(block) or only_after_long_divisions(kernel, number):
        return FEWER_GROUPS
    if block[-1].text == TO_THE_START:
        return "a wave begins after it, as its first arguments are in registers"
    return None


def reason(kernel, number, missed) -> str | None:
    """Why no launch reaches a block, one of those ``missed``: LLVM makes two ways where a kernel needs one."""
    operation = kernel.blocks[number][0].opcode[:2]
    if kernel.name == "split_sum_kernel" and operation == ["rem", "s64"]:
        return OF_A_SPLIT
    if operation == ["div", "s64"]:
        return FEWER_GROUPS
    if replaces_a_loop(kernel, number):
        return "sums of a loop without a step: kernels are not launched on matrices without rows or columns"
    target = only_goes_to(kernel, number)
    return reason(kernel, target, missed) if target in missed - {number} else None


def update_by_no_draw(of):
    """The sum over no draw, which callers do not ask for but compilers reckon with. It changes no logit but -0.0."""
    logits = of.logits.clone()
    arguments, whole = sampling.counter_arguments(of.draws(2), logits, of.m)
    sampling.launch(sampling.score_update_kernel, "score_updates", of.m, arguments[-1], logits.device,
                    logits, torch.ones(1), INVERSE, *arguments, 0,
                    N=of.n, WHOLE=whole, **of_several(logits))  # fmt: skip
    assert_same_bits(logits, of.logits)


def update_layers_by_no_draw(of):
    """``update_by_no_draw`` of many layers by one launch."""
    group = of.group()
    grouped.launch_on_group(grouped.score_update_of_layers_kernel, "score_updates_of_layers", group,
                            torch.ones(1), INVERSE, *numbers(), torch.tensor(DRAWS[:1]),
                            count=0, KIND="drawn", **of_several(group))  # fmt: skip
    for new, old in zip(group.layers, of.layers, strict=True):
        assert_same_bits(new.logits, old.logits)


def of_several(where):
    return {"SEVERAL": True, "SHORT": scores_in_short(architecture(where.device))}


def run_over_groups():
    """Each kernel where all draws of a block are certain, where none are, and over shards; also updates by no draw."""
    for (n, m), dtype, spread in itertools.product(((1, 2), (2, 4), (4, 8), (8, 16)), DTYPES, ("certain", "open")):
        of = Matrix(n, m, dtype, rows=3, groups=171, spread=spread)
        for kernel in OVER_GROUPS:
            if dtype == torch.float32 or kernel in BY_DTYPE:
                OVER_GROUPS[kernel](of)
        masked_weight(of, kind="codes")
        update_by_no_draw(of)
        if m == 4:
            shard = Matrix(n, m, dtype, rows=3, groups=171, spread=spread, shard=True)
            for kernel in ("sample_mask", "masked_weight", "score_update", "score_updates", "descend"):
                OVER_GROUPS[kernel](shard)
            update_by_no_draw(shard)


def run_over_layers():
    """Coverage of many layers by one launch."""
    patterns, spreads = ((1, 2), (2, 4), (4, 8)), ("certain", "open")
    for (n, m), dtype, spread, shard in itertools.product(patterns, DTYPES, spreads, (False, True)):
        of = ManyLayers(n, m, dtype, shard, spread=spread)
        for kernel in OVER_LAYERS:
            assert_bits_of_reference(lambda kernel=kernel, of=of: of.call(kernel))
        update_layers_by_no_draw(of)


def run_products(target, patched):
    for kernel, (n, m), dtype in itertools.product(PRODUCTS, ((2, 4), (4, 8)), DTYPES[:2]):
        tiles = tiles_of(kernel, target, dtype.itemsize)
        for tile, aligned, spread in itertools.product({tiles[0], tiles[-1]}, (True, False), ("certain", "open")):
            options = {"aligned": aligned, "spread": spread, "log_prob": n <= 4, "update": True}
            Product(kernel, tile, n, m, dtype, **options).assert_right()
    for kernel in PRODUCTS:
        Product(kernel, tiles_of(kernel, target, 2)[0], kind="codes").assert_right()
    for kernel in PRODUCTS[:2]:
        Product(kernel, tiles_of(kernel, target, 2)[0], log_prob=True, parts=4).assert_right()
    for kind, spread in (("drawn", "certain"), ("drawn", "open"), ("codes", "open")):
        Product(STEP, tiles_of(STEP, target, 2)[0], kind=kind, spread=spread, update=kind == "drawn").assert_right()
    # of no tokens and of some, by one kernel and by torch's product before another
    of = Matrix(2, 4, rows=37, groups=16)
    for dtype, tokens, at_once in itertools.product(DTYPES[:2], (0, 140), (True, False)):
        patched.setattr(slopes, "fused", lambda *_, at_once=at_once and tokens > 0: at_once)
        grad, x = torch.ones(tokens, of.rows, dtype=dtype), torch.ones(tokens, 64, dtype=dtype)
        operands = grad, x, of.normal(seed=1, dtype=dtype), 0.5
        ops.straight_through_grad(*operands, of.source())
        ops.straight_through_update_(*operands, torch.tensor(0.4), 2.0, of.source(logits=of.logits.clone()))


def run_curvatures():
    """Of sizes that blocks divide and others, of no tokens, and of more than a program squares at a time."""
    for dtype, given in itertools.product(DTYPES[:2], ("", "tokens", "row_squares", "tokens row_squares")):
        for sizes in ((32, 48, 64), (0, 48, 64), (7, 37, 41), (0, 37, 41), (300, 2100, 33)):
            Curvature(*sizes, dtype=dtype, given=given).assert_right()


def run_packed(target):
    configs = (*PACKED_ROWS, *tiles_of("packed_linear", target, 2))
    for config, (n, m), values in itertools.product(configs, ((2, 4), (4, 8)), VALUE_KINDS):
        for aligned in (True, False):
            PackedProduct(config, n, m, values=values, aligned=aligned).assert_right()
    for parts in (2, 4):
        PackedProduct(configs[-1], parts=parts).assert_right()
    for tile, parts in itertools.product(tiles_of("sparse_mma", target, 2)[::3], (1, 4)):
        SparseProduct(tile, tile.tokens + 1, tile.out + 5, 144, parts=parts, biased=parts == 1).assert_right()
    values, bitmask = torch.zeros(33, 24, dtype=torch.bfloat16), torch.full((33, 6), 0b0101_1010, dtype=torch.uint8)
    ops.unpack_nm(values, metadata_of(bitmask), 2, 4)


def not_executed(emulator, reason) -> tuple[int, int, list]:
    """(blocks, how many of them nothing has executed, those of them without a reason)."""
    total, missed, unnamed = 0, 0, []
    for program in emulator.programs.values():
        blocks = program.kernel.blocks
        total += len(blocks)
        of_program = set(range(len(blocks))) - program.covered
        missed += len(of_program)
        for number in of_program:
            if reason(program.kernel, number, of_program) is None:
                unnamed.append((program.kernel.name, blocks[number][0].where, [ins.text for ins in blocks[number]]))
    return total, missed, unnamed


def test_basic_blocks_for_amd_are_executed(compiled_for, emulator):
    """Of the kernels that the emulator for AMDGCN executes."""
    compiled_for("gfx942")
    emulator.programs.clear()
    run_over_groups()
    run_over_layers()
    _, _, unnamed = not_executed(emulator, reason_on_amd)
    assert not unnamed, unnamed


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_basic_blocks_are_executed(target, compiled_for, emulator, monkeypatch):
    compiled_for(target)
    emulator.programs.clear()
    run_over_groups()
    run_over_layers()
    run_products(target, monkeypatch)
    run_curvatures()
    run_packed(target)
    total, missed, unnamed = not_executed(emulator, reason)
    assert not unnamed, unnamed
    assert missed <= 0.05 * total, (missed, total)
