"""Every kernel compiles ahead of time for every target, without spills or instructions that would change bits.

A stack of up to 32 bytes passes. Compilation needs a process in which triton does not interpret, so the cases go to a
child: one for all tests, as the import of torch takes longer than most of the compilations.
"""

from __future__ import annotations

import itertools

import pytest
from aot import TARGETS
from helpers.cases import cases
from helpers.children import Child

from maskpro_kernels.ops.triton import tiles

# contraction and approximations whose bits differ from machine to machine
FORBIDDEN = ["fma.", "lg2.", "ex2.", "div.full", "div.approx", "sqrt.approx", "rcp.", ".ftz"]
# Bytes of shared memory a block may have; cards of 8.6 and 8.9 take the row of sm_80
SHARED_LIMITS = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# A thread's; CDNA3 has 256 for vectors and 256 for accumulators
MOST_REGISTERS = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}
MOST_STACK = 32
MATRIX_UNITS = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
PATTERNS = [(1, 2), (1, 4), (2, 4), (4, 8), (8, 16), (15, 16)]
LAYERS = ("sample_masks", "score_update_of_layers", "score_updates_of_layers")
OVER_GROUPS = ("sample_mask", "masked_weight", "top_n_mask", "mask_log_prob", "mask_score", "score_update",
               "score_updates", "descend", "best_swaps", "adamw", *LAYERS)  # fmt: skip

CHILD = r"""
import re
from aot import TARGETS, build
from maskpro_kernels.ops.triton.device.arithmetic import SCALED_RECIPROCAL
forbidden, cases = arguments
corrected = re.sub(r"\\\$\d", r"%r\\d+", re.escape(SCALED_RECIPROCAL.value))
for kernel, n, m, logits, constants in cases:
    for target in TARGETS:
        built = build(kernel, target, n, m, logits=logits, **constants)
        # but what scaled_reciprocal makes of an approximation: its bits are the same wherever that is near enough
        ptx, reciprocals = re.subn(corrected, "", re.sub(r"\n\t\.loc.*", "", built.asm.get("ptx", "")))
        assert not reciprocals or ("update" in kernel and (n, m) == (2, 4))
        found = [name for name in forbidden if name in ptx]
        emit([target, kernel, built.registers, built.spills, built.stack, built.shared, found])
"""

PRODUCTS_CHILD = """
from aot import PACKED, build_product, warnings
from maskpro_kernels.ops.triton.tiles import TILES, tiles_of
forbidden, operand, (n, m), targets, options, ends = arguments
for target in targets:
    for product, itemsize in TILES:
        if itemsize != {"bf16": 2, "fp16": 2, "fp32": 4}[operand] or product in PACKED:
            continue
        given = dict(options)
        # such layers take the transient weight
        if product == "masked_linear_input_grad" and "rows" not in given.get("multiples", ["rows"]):
            continue
        if product != "masked_linear":
            given.pop("LOG_PROB", None)
        if product == "masked_linear_weight_grad":
            given.pop("weight", None)
        if not product.startswith("straight_through"):
            given.pop("UPDATE", None)
        if product != "straight_through":
            given.pop("WEIGHT_GRAD", None)
        tiles = tiles_of(product, target, itemsize)
        for tile in dict.fromkeys((tiles[0], tiles[-1])) if ends else tiles:
            built = build_product(product, target, n, m, tile, operand=operand, **given)
            side = tile.k if product == "masked_linear_input_grad" else tile.out
            ptx = built.asm.get("ptx", "")
            unit = [name for name in ("wgmma.mma_async", "tcgen05.mma") if name in ptx]
            found = [name for name in forbidden if name in ptx] + warnings(built)
            emit([target, [product, side], built.registers, built.spills, built.stack, built.shared, found, unit])
"""


@pytest.fixture(scope="module")
def child():
    with Child() as child:
        yield child


def check(row: list) -> None:
    target, kernel, registers, spills, stack, shared, found, *_ = row
    assert registers <= MOST_REGISTERS[target] and spills == 0 and stack <= MOST_STACK, row
    assert shared <= SHARED_LIMITS[target] and not found, row


def check_kernels(child, cases) -> None:
    rows = child(CHILD, FORBIDDEN, cases)
    assert len(rows) == len(TARGETS) * len(cases)
    for row in rows:
        check(row)


def check_products(child, operand, pattern, targets=tuple(SHARED_LIMITS), ends=False, **options) -> None:
    # a product of float32 is made of fused multiply-adds
    forbidden = [name for name in FORBIDDEN if operand != "fp32" or name != "fma."]
    rows = child(PRODUCTS_CHILD, forbidden, operand, pattern, targets, options, ends)
    assert len(rows) >= 3 * len(targets)
    for row in rows:
        check(row)
        target, (_, side), *_, units = row
        if operand != "fp32":
            assert units == ([MATRIX_UNITS[target]] if side >= 64 and target in MATRIX_UNITS else []), row


def test_the_limits_of_each_target_are_known():
    assert TARGETS.keys() == tiles.TARGETS.keys() == SHARED_LIMITS.keys() == MOST_REGISTERS.keys()


@pytest.mark.parametrize(
    ("pattern", "logits"),
    cases(itertools.product(PATTERNS, ("fp32", "bf16", "fp16")), slow=lambda *case: case != ((2, 4), "fp32")),
    ids=str,
)
def test_kernels_over_groups(child, pattern, logits):
    """Of float32 alone those that the dtype of the logits changes by no more than a load."""
    updates = ("sample_mask", "masked_weight", "score_update", "score_updates", "descend", *LAYERS)
    kernels = [(kernel, *pattern, logits, {}) for kernel in (OVER_GROUPS if logits == "fp32" else updates)]
    if pattern[0] <= 4:
        kernels.append(("score_update_of_layers", *pattern, logits, {"KIND": "codes"}))
    if logits != "fp32":
        kernels.append(("adamw", *pattern, "fp32", {"weight": logits}))
    check_kernels(child, kernels)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [(2, 4), (8, 16)], ids=str)
def test_shards_odd_addresses_and_given_masks(child, pattern):
    drawing = ("sample_mask", "masked_weight", "score_update", "score_updates", "descend")
    shards = [(kernel, *pattern, "fp32", {"WHOLE": False}) for kernel in drawing]
    layers = [(kernel, *pattern, "fp32", {"WHOLE": False, "BYTES": 4}) for kernel in LAYERS]
    weights = [
        ("masked_weight", *pattern, "fp32", how) for how in ({"KIND": "codes"}, {"weight": "fp32", "out": "bf16"})
    ]
    check_kernels(child, [*shards, *layers, *weights])


@pytest.mark.parametrize("target", list(cases(((t,) for t in SHARED_LIMITS), slow=lambda target: target != "sm_90")))
def test_products_under_drawn_masks_and_by_codes(child, target):
    check_products(child, "bf16", (2, 4), [target], ends=True, LOG_PROB=True)
    check_products(child, "bf16", (2, 4), [target], ends=True, KIND="codes")


CURVATURE_CHILD = """
from aot import TARGETS, build_curvature
forbidden, operand, tokens, multiples = arguments
for target in TARGETS:
    cases = [("gradient_squares", count, given) for count in tokens for given in ({}, {"partial": None})]
    cases += [("curvature_factors", 0, given) for given in (
        {"partial": None}, {"row_squares": None}, {"partial": None, "loss_tokens": None},
        {"row_squares": None, "loss_tokens": None})]
    for kernel, count, given in cases:
        built = build_curvature(kernel, target, count, operand, multiples, **given)
        found = [name for name in forbidden if name in built.asm.get("ptx", "")]
        emit([target, [kernel, count], built.registers, built.spills, built.stack, built.shared, found])
"""


@pytest.mark.parametrize(
    ("operand", "tokens", "multiples"),
    cases(
        [("bf16", (2048,), ("rows", "columns")),
         *itertools.product(("bf16", "fp16", "fp32"), ((1, 500, 1100, 2048, 16_384),), (("rows", "columns"), ()))],
        slow=lambda operand, tokens, multiples: len(tokens) > 1,
    ),
    ids=str,
)  # fmt: skip
def test_factors_of_a_curvature(child, operand, tokens, multiples):
    rows = child(CURVATURE_CHILD, FORBIDDEN, operand, tokens, multiples)
    assert len(rows) == len(TARGETS) * (2 * len(tokens) + 4)
    for row in rows:
        check(row)


CODES_CHILD = """
import modelled_costs
from aot import build_packed, build_product, warnings
from maskpro_kernels.ops.triton.tiles import tiles_of
targets, (n, m), tiles = arguments
for target in targets:
    for product in ("masked_linear", "masked_linear_input_grad", "packed_linear"):
        for tile in tiles_of(product, target, 2)[:tiles]:
            if product == "packed_linear":
                built = build_packed(product, target, n, m, tile, bits=8)
            else:
                built = build_product(product, target, n, m, tile, KIND="codes")
            lines = modelled_costs.disassembled(built.asm["cubin"])
            first, last = modelled_costs.largest_loop(lines)
            loop = [sum(name in line for line in lines[first:last]) for name in ("LDG.", "LDGSTS")]
            emit([target, product, built.registers, built.spills, built.stack, built.shared, warnings(built), *loop])
"""


@pytest.mark.parametrize(
    ("targets", "pattern", "tiles"),
    cases([(["sm_90"], (2, 4), 1), (["sm_80", "sm_90"], (2, 4), None), (["sm_80", "sm_90"], (4, 8), None)],
          slow=lambda targets, pattern, tiles: tiles is None),
    ids=["first", "all", "4:8"],
)  # fmt: skip
def test_codes_and_scales_are_copied_before_their_use(child, targets, pattern, tiles):
    """An asynchronous copy has at least 4 bytes; a load of fewer would be waited for in each step."""
    for row in child(CODES_CHILD, targets, pattern, tiles):
        check(row)
        loads, copies = row[7:]
        assert copies >= 3 and not loads, row


@pytest.mark.slow
@pytest.mark.parametrize("operand", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_all_tiles_of_products(child, pattern, operand):
    check_products(child, operand, pattern, LOG_PROB=pattern[0] <= 4)
    check_products(child, operand, pattern, ends=True, KIND="codes", UPDATE=False, WEIGHT_GRAD=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operand", "options"),
    [
        ("bf16", {"logits": "bf16"}),
        ("bf16", {"logits": "fp16", "LOG_PROB": True}),
        # as under autocast
        ("bf16", {"weight": "fp32"}),
        ("bf16", {"multiples": ["rows"], "LOG_PROB": True}),
        ("fp32", {"multiples": ["groups"], "LOG_PROB": True}),
    ],
    ids=str,
)
def test_products_of_mixed_dtypes_and_odd_sizes(child, operand, options):
    check_products(child, operand, (2, 4), **options)


@pytest.mark.slow
def test_products_in_tf32(child):
    check_products(child, "fp32", (2, 4), list(TARGETS.keys() - {"gfx942"}), PRECISION="tf32", LOG_PROB=True)


PACKED_CHILD = """
import modelled_costs
from dataclasses import replace
from aot import TARGETS, build_packed, warnings
from maskpro_kernels.ops.triton.tiles import PACKED_ROWS, tiles_of
n, m, element = arguments
bits = {"int8": 8, "int4": 4, "int4 fp16": 4}.get(element, 16)
element = {"int8": "bf16", "int4": "bf16", "int4 fp16": "fp16"}.get(element, element)
for target in TARGETS:
    # as few rows a program as a small layer gets, too
    rows = [*PACKED_ROWS, *(replace(PACKED_ROWS[-1], rows=rows) for rows in (1, 2))]
    tiles = tiles_of("packed_linear", target, 2)
    cases = [("packed_vector", config, 16) for config in rows]
    cases += [("packed_linear", tile, unit) for tile in tiles for unit in (16, 4)]
    cases += [("packed_vector", rows[2], 1), ("packed_linear", tiles[-1], 1)]
    for kernel, config, unit in [*cases, ("unpack", None, 1)]:
        built = build_packed(kernel, target, n, m, config, element, unit, ("rows",) if unit == 16 else (), bits)
        loop = matrix_unit = None
        # what the interpreter cannot show: casts round to the nearest
        assert not (bits == 8 and kernel != "unpack" and target.startswith("sm")) or "cvt.rn.bf16" in built.asm["ptx"]
        if target.startswith("sm"):
            matrix_unit = [name for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma") if name in built.asm["ptx"]]
            lines = modelled_costs.disassembled(built.asm["cubin"])
            if kernel == "packed_vector":
                first, last = modelled_costs.largest_loop(lines)
                loop = [sum(name in line for line in lines[first:last]) for name in ("LDG.E.128", "LDG.E", "BAR")]
            elif kernel == "packed_linear":
                product = max(i for i, line in enumerate(lines) if "HMMA" in line or "HGMMA" in line)
                loop = sum("LDG.E" in line for line in lines[:product])
        emit([target, [kernel, unit, getattr(config, "rows", None), getattr(config, "out", None)],
              built.registers, built.spills, built.stack, built.shared, warnings(built), loop, matrix_unit])
"""


@pytest.mark.slow
@pytest.mark.parametrize("element", ["bf16", "fp16", "int8", "int4", "int4 fp16"])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (8, 16)], ids=str)
def test_packed_kernels(child, pattern, element):
    """At one token values and activations are loaded 16 bytes at a time, and no thread waits for another in the loop.

    Tiles are loaded before their use, also where a row is a multiple of 4 chunks alone: no plain load is before
    the last product.
    """
    n, m = pattern
    for row in child(PACKED_CHILD, n, m, element):
        check(row)
        target, (kernel, unit, owned, out), *_, loop, matrix_unit = row
        if kernel == "packed_vector" and loop is not None:
            activations = 8 * m // n * 2 // 16
            # words of the bitmask and scales need one load each
            wide, single = (activations, 3 * owned) if element.startswith("int") else (owned + activations, owned)
            if element.startswith("int4") and (n, m) == (2, 4) and unit % 4 == 0:
                wide, single = owned + 4 * activations, 2 * owned
            assert loop == [wide, wide + single, 0], row
        if kernel == "packed_linear" and matrix_unit is not None:
            assert matrix_unit == [MATRIX_UNITS[target] if out >= 64 and target in MATRIX_UNITS else "mma.sync"], row
            # but for words of a bitmask whose rows start anywhere
            assert loop == 0 or unit == 1, row


SINGLE_CHILD = """
from aot import TARGETS, build_packed, build_split_sum
for target in TARGETS:
    cases = [(dtype, {"PARTS": parts, **bias}) for dtype in ("bf16", "fp32")
             for parts in (2, 16) for bias in ({}, {"bias": None})]
    built = [build_split_sum(target, element, **constants) for element, constants in cases]
    built += [build_packed("unpack", target, m - 1, m, element=e) for m in (2, 4, 8, 16) for e in ("bf16", "fp32")]
    built.append(build_packed("unpack", target, 2, 4, metadata=True))
    for each in built:
        emit([target, "single elements", each.registers, each.spills, each.stack, each.shared, []])
"""


@pytest.mark.slow
def test_kernels_over_single_elements_and_groups_that_are_unpacked(child):
    for row in child(SINGLE_CHILD):
        check(row)


SPARSE_CHILD = """
import modelled_costs
from aot import TARGETS, build_sparse
from maskpro_kernels.ops.triton.tiles import tiles_of
rows, options = arguments
for target in TARGETS.keys() - {"gfx942"}:
    table = tiles_of("sparse_mma", target, 2)
    for tile in table[:rows]:
        for given in options:
            built = build_sparse(target, tile, **given)
            lines = modelled_costs.disassembled(built.asm["cubin"])
            first, last = modelled_costs.largest_loop(lines)
            loop = [sum(name in line for line in lines[first:last]) for name in ("HMMA.SP", "LDSM", "LDGSTS", "LDG.")]
            products = tile.out // 16 // tile.num_warps * tile.tokens // 8 * 2
            emit([target, ["sparse_mma", tile.out, tile.tokens], built.registers, built.spills, built.stack,
                  built.shared, [name for name in ("mma.sync", "shfl") if name in built.asm["ptx"]],
                  loop, products, last - first])
"""


@pytest.mark.parametrize(
    ("rows", "options"),
    cases([(1, [{}]), (None, [{"unit": 4}, {"element": "fp16", "unit": 8, "bias": False}])],
          slow=lambda rows, options: rows is None),
    ids=["first", "all"],
)  # fmt: skip
def test_products_on_sparse_tensor_cores(child, rows, options):
    """The loop loads words only by asynchronous copies and ``ldmatrix``."""
    for row in child(SPARSE_CHILD, rows, options):
        check(row)
        (products_made, matrices, copies, loads), products, _ = row[7:]
        assert products_made == products and matrices and copies and not loads, row
