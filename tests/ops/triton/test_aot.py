"""Every kernel compiles ahead of time for every target, without spills, and holds what bit-exactness asks of it.

Compilation needs a process in which triton does not interpret, so the cases go to a child: one for all tests, as
the import of torch takes longer than most of the compilations.
"""

from __future__ import annotations

import aot_report
import pytest
import triton
from aot import TARGETS
from chips import CHIPS
from helpers.cases import cases
from helpers.children import Child

from maskpro_kernels.ops.triton.tiles import PACKED_TILES, PROCESSORS

KERNELS = [
    "sample_mask",
    "masked_weight",
    "top_n_mask",
    "mask_log_prob",
    "mask_score",
    "score_update",
]
# contraction and approximations whose bits differ from machine to machine
FORBIDDEN = ["fma.", "lg2.", "ex2.", "div.full", "div.approx", "sqrt.approx", "rcp.", ".ftz"]

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
        binary = built.asm["hsaco" if target.startswith("gfx") else "cubin"]
        row = [target, built.registers, built.spills, built.stack, [f for f in forbidden if f in ptx], len(binary)]
        tell(row)
"""

PRODUCTS_CHILD = """
import itertools
from aot import build_product
from maskpro_kernels.ops.triton.tiles import TILES, tiles_of
forbidden, operand, patterns, targets, options, widest_and_narrowest = arguments
size = {"bf16": 2, "fp16": 2, "fp32": 4}[operand]
for (product, target, itemsize), (n, m) in itertools.product(TILES, patterns):
    if itemsize != size or target not in targets:
        continue
    tiles = tiles_of(product, target, itemsize, m)
    for tile in {tiles[0], tiles[-1]} if widest_and_narrowest else tiles:
        given = dict(options)
        # such layers take the transient weight
        if product == "masked_linear_input_grad" and "rows" not in given.get("multiples", ["rows"]):
            continue
        # no logits are there to be stepped
        if product.startswith("straight_through") and given.get("KIND") == "top_n":
            given["UPDATE"] = False
        if product != "masked_linear":
            given.pop("LOG_PROB", None)
        if product == "masked_linear_weight_grad":
            given.pop("weight", None)
        built = build_product(product, target, n, m, tile, operand=operand, **given)
        side = tile.k if product == "masked_linear_input_grad" else tile.out
        ptx = built.asm.get("ptx", "")
        unit = [name for name in ("wgmma.mma_async", "tcgen05.mma") if name in ptx]
        found = [name for name in forbidden if name in ptx]
        tell([product, target, n, m, side, built.registers, built.spills, built.stack, built.shared, unit, found])
"""

# Bytes of shared memory a block may have; cards of 8.6 and 8.9 take the row of sm_80
SHARED_LIMITS = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# A thread's; CDNA3 has 256 for vectors and 256 for accumulators
MOST_REGISTERS = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}
MATRIX_UNITS = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


@pytest.fixture(scope="module")
def child():
    with Child() as child:
        yield child


def check(child, cases):
    rows = child(CHILD, FORBIDDEN, cases)
    assert len(rows) == len(TARGETS) * len(cases)
    for target, registers, spills, used_stack, forbidden, size in rows:
        assert size > 0 and registers <= MOST_REGISTERS[target]
        assert spills == used_stack == 0, (target, registers, spills, used_stack)
        assert not forbidden, (target, forbidden)


@pytest.mark.parametrize(
    ("n", "m", "logits"),
    [
        pytest.param(
            n,
            m,
            logits,
            marks=[] if (n, m, logits) == (2, 4, "fp32") else [pytest.mark.slow],
        )
        for n, m in [(1, 4), (2, 4), (4, 8), (8, 16)]
        for logits in ["fp32", "bf16", "fp16"]
    ],
)
def test_draw_and_update_compile_for_every_target(child, n, m, logits):
    check(child, [(kernel, n, m, logits, {}) for kernel in ("sample_mask", "masked_weight", "score_update")])


@pytest.mark.parametrize(
    ("n", "m", "logits"),
    cases(
        [
            (n, m, logits)
            for n, m in ((1, 2), (1, 4), (2, 4), (4, 8), (4, 16), (8, 16))
            for logits in ("fp32", "bf16", "fp16")
        ],
        slow=lambda n, m, logits: (n, m, logits) != (2, 4, "fp32"),
    ),
)
def test_kernels_of_all_layers_compile_for_every_target(child, n, m, logits):
    kernels = [("sample_masks", {}), ("score_update_of_layers", {}), ("score_updates_of_layers", {})]
    if n <= 4:
        kernels.append(("score_update_of_layers", {"KIND": "codes"}))
    check(child, [(kernel, n, m, logits, how) for kernel, how in kernels])


@pytest.mark.parametrize(
    ("n", "m"), [(2, 4), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((1, 2), (4, 8), (8, 16)))]
)
def test_every_kernel_compiles_for_every_target(child, n, m):
    check(child, [(kernel, n, m, "fp32", {}) for kernel in KERNELS])


@pytest.mark.parametrize(("n", "m"), [(2, 4), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((8, 16),))])
def test_swaps_compile_for_every_target(child, n, m):
    check(child, [("best_swaps", n, m, "fp32", {})])


@pytest.mark.parametrize(("n", "m"), [(2, 4), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((8, 16),))])
def test_descent_compiles_for_every_target(child, n, m):
    check(child, [("descend", n, m, logits, {}) for logits in ("fp32", "bf16", "fp16")])


@pytest.mark.parametrize(("n", "m"), [(2, 4), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((8, 16),))])
def test_adamw_compiles_for_every_target(child, n, m):
    check(child, [("adamw", n, m, "fp32", {"weight": weight}) for weight in ("fp32", "bf16", "fp16")])


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4)])
def test_layers_that_are_shards_or_lie_at_odd_addresses_compile_for_every_target(child, n, m):
    how = {"WHOLE": False, "BYTES": 4}
    kernels = [("sample_masks", how), ("score_update_of_layers", how), ("score_updates_of_layers", how)]
    kernels.append(("score_update_of_layers", how | {"KIND": "codes"}))
    check(child, [(kernel, n, m, "fp32", how) for kernel, how in kernels])


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(2, 4), (8, 16)])
def test_shards_compile_for_every_target(child, n, m):
    kernels = ("sample_mask", "masked_weight", "score_update", "score_updates", "descend")
    check(child, [(kernel, n, m, "fp32", {"WHOLE": False}) for kernel in kernels])


@pytest.mark.parametrize(("n", "m"), [(2, 4), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((8, 16),))])
def test_weights_under_given_masks_and_of_another_dtype_compile_for_every_target(child, n, m):
    cases = [{"KIND": "codes"}, {"weight": "fp32", "out": "bf16"}, {"KIND": "top_n"}]
    check(child, [("masked_weight", n, m, "fp32", case) for case in cases])


@pytest.mark.parametrize(
    ("n", "m"),
    [(2, 4), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((1, 4), (4, 8), (8, 16)))],
)
def test_several_draws_compile_for_every_target(child, n, m):
    check(child, [("score_updates", n, m, "bf16", {})])


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(1, 16), (4, 16), (15, 16), (1, 8)])
def test_large_groups_compile_for_every_target(child, n, m):
    check(child, [(kernel, n, m, "fp32", {}) for kernel in KERNELS])


def check_products(child, operand, patterns, targets, ends=False, **options):
    # a product of float32 is made of fused multiply-adds
    forbidden = [name for name in FORBIDDEN if operand != "fp32" or name != "fma."]
    rows = child(PRODUCTS_CHILD, forbidden, operand, patterns, targets, options, ends)
    assert len(rows) >= 3 * len(patterns) * len(targets)
    for product, target, n, m, side, registers, spills, used_stack, shared, units, found in rows:
        case = (product, target, f"{n}:{m}", side, registers, spills, used_stack, shared, units, found)
        assert not found, case
        assert registers <= MOST_REGISTERS[target] and spills == used_stack == 0, case
        assert shared <= SHARED_LIMITS[target], case
        if operand != "fp32" and side >= 64 and target in MATRIX_UNITS:
            assert units == [MATRIX_UNITS[target]], case


def test_the_limits_of_each_target_are_known():
    assert TARGETS.keys() == set(PROCESSORS) == SHARED_LIMITS.keys() == MOST_REGISTERS.keys()
    assert CHIPS.keys() == TARGETS.keys() - {"gfx942"}


@pytest.mark.parametrize("target", SHARED_LIMITS)
def test_products_compile_for_every_target(child, target):
    check_products(child, "bf16", [(2, 4)], [target], ends=True, LOG_PROB=True)


COSTS_CHILD = """
import json
from dataclasses import asdict
import aot_report
(everything,) = arguments
known = json.loads(aot_report.TABLE.read_text()).get(aot_report.triton_release())
kept = known is not None
known = known or {}
if everything:
    costs = list(aot_report.kept_costs())
else:
    costs = [cost for target in aot_report.CHIPS for cost in (*aot_report.group_costs(target, 2, 4),
             *aot_report.product_costs(target, 2, 4, ends=True), *aot_report.packed_costs(target, 2, 4))]
for cost in costs:
    before = known.pop(cost.key, None)
    tell([kept, cost.key, asdict(cost), before, before and cost.worse_than(before)])
if known and everything:
    tell([kept, "rows of no kernel", list(known), None, None])
"""


@pytest.mark.slow
@pytest.mark.parametrize("everything", [False, True], ids=["2:4", "all"])
def test_no_kernel_costs_more_than_its_row_of_the_table(child, everything):
    """Registers, memory, programs a processor, times by pipe: `make aot-table` where more of them is on purpose."""
    rows = child(COSTS_CHILD, everything)
    # of 2:4, kernels over groups and the first and last tiles of products
    assert len(rows) >= len(CHIPS) * (8 + 15)
    if not rows[0][0]:
        pytest.skip(f"no costs are kept for Triton {triton.__version__}")
    for _, key, cost, before, worse in rows:
        assert before, (key, cost)
        assert not worse, (key, worse, cost, before)


def test_a_cost_is_worse_where_one_figure_is():
    figures = {"registers": 100, "stack": 0, "shared": 1000, "determined": 50.0, "drawn": 90.0}
    before = figures | {"resident": 20, "half": 20.0, "determined_ps": 2.0, "drawn_ps": 4.0, "pipe": "half"}
    where = {"kernel": "k", "pattern": "2:4", "target": "sm_90"}
    assert aot_report.Cost(**where, **before).worse_than(before) == []
    within = {"registers": 105, "shared": 1050, "resident": 19, "determined": 52.5, "drawn_ps": 4.2}
    assert aot_report.Cost(**where, **before | within).worse_than(before) == []
    beyond = {
        "registers": 106,
        "stack": 8,
        "shared": 1051,
        "resident": 18,
        "determined": 52.6,
        "drawn": 94.6,
        "half": 21.1,
    }
    for name, value in (beyond | {"determined_ps": 2.11, "drawn_ps": 4.21}).items():
        assert aot_report.Cost(**where, **before | {name: value}).worse_than(before) == [name]


SLOPES_CHILD = """
from aot import TARGETS, build_product
from maskpro_kernels.ops.triton.tiles import tiles_of
(patterns,) = arguments
kinds = {}, {"KIND": "codes"}
for target in TARGETS:
    for n, m in patterns:
        for operand, itemsize in (("bf16", 2), ("fp32", 4)):
            tiles = tiles_of("straight_through", target, itemsize, m)
            step = tiles_of("straight_through_step", target, itemsize, m)[0]
            cases = [("straight_through", tile, {"UPDATE": False, **kind}) for tile in tiles for kind in kinds]
            cases += [("straight_through", tiles[-1], {"WEIGHT_GRAD": True})]
            cases += [("straight_through_step", step, {"UPDATE": False, **kind}) for kind in kinds]
            for kernel, tile, written in cases:
                built = build_product(kernel, target, n, m, tile, operand=operand, **written)
                tell([target, n, m, operand, built.registers, built.spills, built.stack])
"""


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [(2, 4), (8, 16)], ids=str)
def test_slopes_and_gradients_that_are_written_compile_for_every_target(child, pattern):
    rows = child(SLOPES_CHILD, [pattern])
    assert len(rows) >= 2 * len(SHARED_LIMITS)
    for target, *case, registers, spills, stack in rows:
        assert registers <= MOST_REGISTERS[target] and spills == stack == 0, (target, case, registers, spills, stack)


@pytest.mark.slow
@pytest.mark.parametrize("operand", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (8, 16)])
def test_all_tiles_of_products_compile_for_every_target(child, n, m, operand):
    check_products(child, operand, [(n, m)], list(SHARED_LIMITS), LOG_PROB=n <= 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"logits": "bf16"}, {"logits": "fp16", "LOG_PROB": True}, {"weight": "fp32"}],
    ids=["logits in bf16", "logits in fp16", "weight in fp32, as under autocast"],
)
def test_products_of_mixed_dtypes_compile_for_every_target(child, options):
    patterns = [(2, 4), (8, 16)] if "LOG_PROB" not in options else [(2, 4)]
    check_products(child, "bf16", patterns, list(SHARED_LIMITS), **options)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 8), (4, 16)])
def test_products_of_other_groups_compile_for_every_target(child, n, m):
    check_products(child, "bf16", [(n, m)], list(SHARED_LIMITS), ends=True, LOG_PROB=n <= 4)


def test_products_by_codes_compile_for_every_target(child):
    """As a trainer launches them, which draws its masks once a step."""
    check_products(child, "bf16", [(2, 4)], list(SHARED_LIMITS), ends=True, KIND="codes")


@pytest.mark.slow
@pytest.mark.parametrize("operand", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["top_n", "codes"])
def test_products_under_given_masks_compile_for_every_target(child, kind, operand):
    check_products(child, operand, [(2, 4), (4, 8), (8, 16)], list(SHARED_LIMITS), KIND=kind)


@pytest.mark.slow
@pytest.mark.parametrize("operand", ["bf16", "fp32"])
@pytest.mark.parametrize("multiples", [["rows"], ["groups"]], ids="only {0[0]} aligned".format)
def test_products_of_odd_sizes_compile_for_every_target(child, multiples, operand):
    check_products(child, operand, [(2, 4)], list(SHARED_LIMITS), multiples=multiples, LOG_PROB=True)


@pytest.mark.slow
def test_products_in_tf32_compile_for_every_target(child):
    check_products(child, "fp32", [(2, 4)], list(CHIPS), PRECISION="tf32", LOG_PROB=True)


PACKED_CHILD = """
import sass
from dataclasses import replace
from aot import TARGETS, build_packed
from maskpro_kernels.ops.triton.tiles import PACKED_TILES, ROWS
n, m, element = arguments
quantized = element == "int8"
element = "bf16" if quantized else element
for target in TARGETS:
    # as few rows a program as a small layer gets, too
    rows = [*ROWS["packed_vector", target], *(replace(ROWS["packed_vector", target][-1], rows=rows) for rows in (1, 2))]
    tiles = PACKED_TILES["packed_linear", target, 2]
    cases = [("packed_vector", config, 16) for config in rows]
    cases += [("packed_linear", tile, unit) for tile in tiles for unit in (16, 4)]
    cases += [("packed_vector", rows[2], 1), ("packed_linear", tiles[-1], 1)]
    for kernel, config, unit in [*cases, ("unpack", None, 1)]:
        multiples = ("rows",) if unit == 16 else ()
        built = build_packed(kernel, target, n, m, config, element, unit, multiples, quantized)
        loop = matrix_unit = None
        # what the interpreter cannot show: casts round to the nearest
        assert not (quantized and kernel != "unpack" and target.startswith("sm")) or "cvt.rn.bf16" in built.asm["ptx"]
        if target.startswith("sm"):
            matrix_unit = [name for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma") if name in built.asm["ptx"]]
            lines = sass.disassembled(built.asm["cubin"])
            if kernel == "packed_vector":
                first, last = sass.largest_loop(lines)
                loop = [sum(name in line for line in lines[first:last]) for name in ("LDG.E.128", "LDG.E", "BAR")]
            elif kernel == "packed_linear":
                product = max(i for i, line in enumerate(lines) if "HMMA" in line or "HGMMA" in line)
                loop = sum("LDG.E" in line for line in lines[:product])
                if quantized:
                    # a scale for each chunk of a thread; on sm_100 the first step stands ahead of the loop
                    scales = config.out * config.k // (8 * m // n) // (32 * config.num_warps)
                    scales *= 2 if target == "sm_100" else 1
                    loop -= min(scales, sum("LDG.E.U16" in line for line in lines[:product]))
        tell([kernel, target, unit, getattr(config, "rows", None), getattr(config, "out", None),
              built.registers, built.spills, built.stack, built.shared, loop, matrix_unit])
"""


@pytest.mark.slow
@pytest.mark.parametrize("element", ["bf16", "fp16", "int8"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (8, 16)])
def test_packed_kernels_compile_for_every_target(child, n, m, element):
    """At one token values and activations are loaded 16 bytes at a time, and no thread waits for another in the loop.

    Tiles are loaded ahead of their use, also where a row is a multiple of 4 chunks alone: no plain load stands before
    the last product.
    """
    rows = child(PACKED_CHILD, n, m, element)
    packed = [PACKED_TILES["packed_linear", target, 2] for target in TARGETS]
    assert all(packed) and len(rows) == sum(5 + 2 * len(tiles) + 2 + 1 for tiles in packed)
    for kernel, target, unit, owned, out, registers, spills, stack, shared, loop, matrix_unit in rows:
        case = (kernel, target, unit, owned, out, registers, spills, stack, shared, loop, matrix_unit)
        assert registers <= MOST_REGISTERS[target] and spills == 0 and shared <= SHARED_LIMITS[target], case
        assert stack == 0, case
        if kernel == "packed_vector" and loop is not None:
            activations = 8 * m // n * 2 // 16
            # words of the bitmask, and scales, come by one load each
            wide, single = (activations, 3 * owned) if element == "int8" else (owned + activations, owned)
            assert loop == [wide, wide + single, 0], case
        if kernel == "packed_linear" and matrix_unit is not None:
            assert matrix_unit == [MATRIX_UNITS[target] if out >= 64 and target in MATRIX_UNITS else "mma.sync"], case
            # but for scales of 16 bits, which are too small, and words of a bitmask whose rows start anywhere
            assert loop == 0 or unit == 1, case


ELEMENTS_CHILD = """
from aot import TARGETS, build_elements
for target in TARGETS:
    cases = [("metadata", "bf16", {}), *(("split_sum", dtype, {"PARTS": parts, **bias}) for dtype in ("bf16", "fp32")
             for parts in (2, 16) for bias in ({}, {"bias": None}))]
    for kernel, element, constants in cases:
        built = build_elements(kernel, target, element, **constants)
        tell([kernel, target, constants, built.registers, built.spills, built.stack])
"""


@pytest.mark.slow
def test_kernels_over_single_elements_compile_for_every_target(child):
    rows = child(ELEMENTS_CHILD)
    assert len(rows) == len(TARGETS) * (1 + 8)
    for *case, registers, spills, stack in rows:
        assert registers <= 64 and spills == stack == 0, (case, registers, spills, stack)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(1, 2), (3, 4), (7, 8), (15, 16)])
def test_the_kernel_that_unpacks_compiles_for_every_pattern(child, n, m):
    rows = child(UNPACK_CHILD, n, m)
    for target, registers, spills, stack in rows:
        assert registers <= MOST_REGISTERS[target] and spills == 0 and stack == 0, (target, registers, spills, stack)


UNPACK_CHILD = """
from aot import TARGETS, build_packed
n, m = arguments
for target in TARGETS:
    for element in ("bf16", "fp32"):
        built = build_packed("unpack", target, n, m, element=element)
        tell([target, built.registers, built.spills, built.stack])
"""
