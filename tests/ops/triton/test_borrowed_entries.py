"""Architectures that take the entries of another one: kernels compile for them, and tiles fit into their memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from helpers.children import environment

from maskpro_kernels.ops.triton.tiles import TARGET_OF

# Bytes of shared memory a block may have: CUDA C++ programming guide, technical specifications per compute capability
SHARED_LIMITS = {"sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_103": 227, "sm_120": 99, "sm_121": 99}
BORROWERS = [name for name, target in TARGET_OF.items() if name != target]

CHILD = """
import json, sys
import aot
from triton.backends.compiler import GPUTarget
from maskpro_kernels.ops.triton.tiles import PACKED_ROWS, TARGET_OF, TILES, tiles_of
name, = json.load(sys.stdin)
target = TARGET_OF[name]
aot.TARGETS[target] = GPUTarget("cuda", int(name.removeprefix("sm_")), 32)

def emit(what, built):
    units = [unit for unit in ("mma.sync", "wgmma.mma_async", "tcgen05.mma") if unit in built.asm["ptx"]]
    print(json.dumps([what, built.registers, built.spills, built.stack, built.shared, units]), flush=True)

for kernel in ("sample_mask", "masked_weight", "score_update", "descend", "adamw", "best_swaps"):
    emit(kernel, aot.build(kernel, target, 2, 4))
for product, size in TILES:
    if size == 2 and product not in aot.PACKED:
        tiles = tiles_of(product, target, size)
        for tile in dict.fromkeys((tiles[0], tiles[-1])):
            emit(f"{product} {tile.out}", aot.build_product(product, target, 2, 4, tile))
# operands in 16 bits and the weight in 32, as under autocast, take the most shared memory
tile = tiles_of("masked_linear", target, 2)[-1]
emit(f"masked_linear {tile.out}", aot.build_product("masked_linear", target, 2, 4, tile, weight="fp32"))
emit("packed_vector", aot.build_packed("packed_vector", target, 2, 4, PACKED_ROWS[-1]))
tile = tiles_of("packed_linear", target, 2)[-1]
emit(f"packed_linear {tile.out}", aot.build_packed("packed_linear", target, 2, 4, tile))
for tile in tiles_of("sparse_mma", target, 2):
    emit(f"sparse_mma {tile.out}", aot.build_sparse(target, tile))
"""


def test_the_memory_of_each_is_known():
    assert SHARED_LIMITS.keys() == set(BORROWERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", BORROWERS)
def test_kernels_compile_and_tiles_fit(name):
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps([name]), capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) >= 6 + 6 + 3
    for what, registers, spills, stack, shared, units in rows:
        case = (what, registers, spills, stack, shared, units)
        assert registers <= 255 and spills == 0 and stack <= 32 and shared <= SHARED_LIMITS[name] << 10, case
        # what the entries were chosen for: wide tiles reach tcgen05, which consumer cards do not have
        if what in ("masked_linear 64", "packed_linear 64"):
            assert units == (["tcgen05.mma"] if TARGET_OF[name] == "sm_100" else ["mma.sync"]), case
