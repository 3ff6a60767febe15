"""What the kernels cost on GPUs, read from their compiled code on a machine without one.

A model, and nothing in it is measured. Instructions are counted by the pipe of a processor that takes them, and each
pipe has its own rate on each architecture; see ``sass`` and ``chips``. A kernel takes as long as the busiest of its
resources: a pipe, issue slots, matrix units, memory, the second cache; where programs don't divide by the processors,
as long as the one with the most. Latencies are left out, so a kernel of few programs a processor may take longer.

For each kernel and launch configuration: registers a thread, bytes spilled, shared memory, programs that a processor
holds, and for a block whose draws are determined by its logits alone and for one that computes noise, issue slots and
picoseconds a weight, with the pipe that bounds them. Then, for the layers of LLaMA-2-7B, times of the kernels over
groups by gap, and of the forward product; and for those of LLaMA-2-7B and 70B, of products with packed weights, beside
the dense layer's. NVIDIA targets only.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from aot import Built, build, build_packed, build_product
from chips import CHIPS, seconds_by_pipe
from sass import disassembled, instructions

from maskpro_kernels.ops import bounds
from maskpro_kernels.ops.triton.packed import MULTIPLIED, chunk_length
from maskpro_kernels.ops.triton.tiles import (
    CONFIGURATIONS,
    ONE_PASS_TOKENS,
    PACKED_TILES,
    PROCESSORS,
    ROWS,
    TILES,
    Rows,
    Tiles,
    rows_for,
    tiles_for,
)

PATTERNS = [(1, 4), (2, 4), (4, 8), (8, 16)]
# Kernels over groups, and the dtypes of their logits
GROUP_KERNELS = {"sample_mask": ["fp32"], "masked_weight": ["fp32"], "score_update": ["fp32", "bf16"]}
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
TOKENS = [1, 16, 128, 1024, 4096]
# Of the linear layers of LLaMA-2-7B: how many have which shape
LAYERS = {(4096, 4096): 4 * 32, (11008, 4096): 2 * 32, (4096, 11008): 32}
# The keys and values of grouped queries
FEW_ROWS = (1024, 4096)
# Of LLaMA-2-7B and 70B
SERVED_SHAPES = [*SHAPES, (8192, 8192), (28672, 8192), (8192, 28672)]
SERVED_TOKENS = [1, 2, 16, 32, 64]
# The costs as of the last commit that changed them on purpose, by release of Triton
TABLE = Path(__file__).with_name("aot_table.json")
KEY = ("kernel", "pattern", "target")
TOLERANCE = 0.05
# Of logits: that of the paper, and about that of a flip rate of 1e-3 at 2:4
GAPS = [10.0, 8.0]
SIMULATED_GROUPS = 1 << 20
BYTES = {"fp32": 4, "bf16": 2}


def weights_a_thread(block: int, m: int, num_warps: int) -> float:
    return block * m / (32 * num_warps)


def each(counts: Counter, weights: float) -> dict[str, float]:
    """Counts of a thread of so many weights, by weight."""
    return {pipe: count / weights for pipe, count in counts.items()}


@functools.cache
def group_kernel(kernel: str, target: str, n: int, m: int, logits: str = "fp32") -> tuple[Built, dict, dict]:
    """(the compiled kernel, fewest and most instructions a weight by pipe)."""
    built, config = build(kernel, target, n, m, logits), CONFIGURATIONS[kernel, m]
    weights = weights_a_thread(config.block, m, config.num_warps)
    fewest, most = instructions(disassembled(built.asm["cubin"]), looping=True)
    return built, each(fewest, weights), each(most, weights)


@functools.cache
def product_kernel(product: str, target: str, n: int, m: int, tile: Tiles) -> tuple[Built, dict, dict]:
    """(the compiled product, fewest and most instructions a weight by pipe)."""
    built = build_product(product, target, n, m, tile)
    weights = tile.out * max(tile.k, m) / (32 * tile.num_warps)
    # those with a tile of the weight's gradient draw once, behind their loop over the tokens
    looping = product not in ("masked_linear_weight_grad", "straight_through")
    fewest, most = instructions(disassembled(built.asm["cubin"]), looping)
    return built, each(fewest, weights), each(most, weights)


@functools.cache
def open_groups(gap: float, n: int, m: int) -> float:
    """Share of the groups of a mask at that gap that the kernels' bounds leave open, simulated."""
    words = torch.randint(0, 1 << 32, (m, SIMULATED_GROUPS), generator=torch.Generator().manual_seed(0))
    kept, dropped = words[:n].amax(0), words[n:].amin(0)
    return float((bounds.minus_log(dropped) >= gap + bounds.least_gumbel(kept)).double().mean())


def expected(fewest: dict, most: dict, groups: float, gap: float, n: int, m: int) -> dict[str, float]:
    """Instructions by pipe where blocks of so many groups compute noise if one of them is open."""
    clear = (1 - open_groups(gap, n, m)) ** groups
    return {pipe: clear * fewest.get(pipe, 0) + (1 - clear) * count for pipe, count in most.items()}


def busiest(seconds: dict[str, float]) -> tuple[float, str]:
    """(the longest time, of what)."""
    resource = max(seconds, key=seconds.get)
    return seconds[resource], resource


@dataclass(frozen=True)
class Launch:
    """The time of one launch.

    Attributes:
        target: such as "sm_90".
        pipes: seconds by pipe, "issue" and "matrix units", with the work spread evenly over all processors.
        memories: seconds by "memory" and "second cache".
        programs: of the grid.
        resident: how many of them a processor holds at a time.
    """

    target: str
    pipes: dict[str, float]
    memories: dict[str, float]
    programs: int
    resident: int

    @property
    def waves(self) -> float:
        return self.programs / (self.resident * PROCESSORS[self.target])

    @property
    def uneven(self) -> float:
        """How much more than its share the processor with the most programs has.

        Programs of the last wave have the pipes for themselves, so that few of them take their share of a wave's time.
        """
        processors = PROCESSORS[self.target]
        return math.ceil(self.programs / processors) * processors / self.programs

    @property
    def bound(self) -> tuple[float, str]:
        """(seconds, the resource that takes them)."""
        return busiest({pipe: self.uneven * time for pipe, time in self.pipes.items()} | self.memories)

    def line(self, unit: float) -> str:
        """Times by each memory, by the busiest pipe and of the whole, what bounds it, programs, and waves of them."""
        whole, resource = self.bound
        seconds = self.memories["memory"], self.memories["second cache"], busiest(self.pipes)[0], whole
        times = " ".join(f"{unit * each:>8.2f}" for each in seconds)
        return f"{times}  {resource:<12} {self.programs:>8} {self.waves:>7.2f}"


HEADINGS = f"{'memory':>8} {'L2':>8} {'pipe':>8} {'whole':>8}  {'bound by':<12} {'programs':>8} {'waves':>7}"


@dataclass(frozen=True)
class Cost:
    """What one row of the launch tables costs on one architecture.

    Attributes:
        kernel: its name, with the tile and the warps where it has one.
        pattern, target: such as "2:4" and "sm_90".
        registers: a thread's.
        stack: bytes spilled and of stack, a thread's.
        shared: bytes of shared memory a block.
        resident: programs that a processor holds at a time.
        determined, drawn: issue slots a weight of a block whose draws are determined by its logits alone, and of one
            that computes noise.
        determined_ps, drawn_ps: picoseconds a weight by the busiest pipe.
        pipe: which one that is where draws are determined.
    """

    kernel: str
    pattern: str
    target: str
    registers: int
    stack: int
    shared: int
    resident: int
    determined: float
    drawn: float
    determined_ps: float
    drawn_ps: float
    pipe: str

    @classmethod
    def of(cls, kernel: str, pattern: str, target: str, num_warps: int, built: Built, fewest: dict, most: dict):
        resident = CHIPS[target].resident(built.registers, built.shared, num_warps)
        (short, pipe), (long, _) = (busiest(seconds_by_pipe(target, counts)) for counts in (fewest, most))
        figures = (round(x, 3) for x in (fewest["issue"], most["issue"], 1e12 * short, 1e12 * long))
        stack = built.spills + built.stack
        return cls(kernel, pattern, target, built.registers, stack, built.shared, resident, *figures, pipe)

    @property
    def key(self) -> str:
        return f"{self.kernel}, {self.pattern}, {self.target}"

    def worse_than(self, before: dict) -> list[str]:
        """The figures that are worse than those ``before`` by more than TOLERANCE."""
        names = ("registers", "stack", "shared", "determined", "drawn", "determined_ps", "drawn_ps")
        worse = [name for name in names if getattr(self, name) > (1 + TOLERANCE) * before[name]]
        return worse + ["resident"] * (self.resident < (1 - TOLERANCE) * before["resident"])


def named(kernel: str, logits: str) -> str:
    return kernel if logits == "fp32" else f"{kernel} of {logits}"


def group_costs(target: str, n: int, m: int) -> Iterator[Cost]:
    for kernel, dtypes in GROUP_KERNELS.items():
        warps = CONFIGURATIONS[kernel, m].num_warps
        for logits in dtypes:
            built = group_kernel(kernel, target, n, m, logits)
            yield Cost.of(named(kernel, logits), f"{n}:{m}", target, warps, *built)


def product_costs(target: str, n: int, m: int, ends: bool = False) -> Iterator[Cost]:
    """Of all tiles for operands of 16 bits, or of the first and the last of each product."""
    for (product, where, itemsize), tiles in TILES.items():
        if where != target or itemsize != 2:
            continue
        for tile in dict.fromkeys((tiles[0], tiles[-1])) if ends else tiles:
            name = f"{product} {tile.out}x{tile.tokens}x{max(tile.k, m)}, {tile.num_warps} warps"
            yield Cost.of(name, f"{n}:{m}", target, tile.num_warps, *product_kernel(product, target, n, m, tile))


@functools.cache
def packed_kernel(kernel: str, target: str, n: int, m: int, config: Rows | Tiles) -> tuple[Built, dict, dict]:
    """(the compiled kernel, its instructions a weight by pipe, twice)."""
    built = build_packed(kernel, target, n, m, config)
    taken = config.rows * config.block * chunk_length(n, m) if isinstance(config, Rows) else config.out * config.k
    _, most = instructions(disassembled(built.asm["cubin"]), looping=True)
    by_weight = each(most, taken / (32 * config.num_warps))
    return built, by_weight, by_weight


def packed_costs(target: str, n: int, m: int) -> Iterator[Cost]:
    if (n, m) not in MULTIPLIED:
        return
    for config in ROWS["packed_vector"]:
        name = f"packed_vector {config.rows}x{config.block}, {config.num_warps} warps"
        built = packed_kernel("packed_vector", target, n, m, config)
        yield Cost.of(name, f"{n}:{m}", target, config.num_warps, *built)
    for tile in PACKED_TILES["packed_linear", target, 2]:
        name = f"packed_linear {tile.out}x{tile.tokens}x{tile.k}, {tile.num_warps} warps"
        built = packed_kernel("packed_linear", target, n, m, tile)
        yield Cost.of(name, f"{n}:{m}", target, tile.num_warps, *built)


def kept_costs() -> Iterator[Cost]:
    """What TABLE holds."""
    for target in CHIPS:
        yield from packed_costs(target, 2, 4)
        for n, m in PATTERNS:
            yield from group_costs(target, n, m)
        yield from product_costs(target, 2, 4)


def triton_release() -> str:
    """Costs are those of one release of the compiler: major and minor version."""
    return ".".join(triton.__version__.split(".")[:2])


def write_table() -> None:
    """Put the costs into TABLE, beside those of other releases of Triton."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table[triton_release()] = {
        cost.key: {name: value for name, value in asdict(cost).items() if name not in KEY} for cost in kept_costs()
    }
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def report(targets: list[str], patterns: list[tuple[int, int]]) -> None:
    print(f"{'kernel':<42} {'N:M':>5} {'target':>6} {'regs':>5} {'spills':>6} {'KiB':>6} {'held':>5} ", end="")
    print(f"{'determined':>10} {'drawn':>8}  {'ps':>6} {'drawn':>6}   (issue slots and picoseconds a weight)")
    for target in targets:
        for n, m in patterns:
            costs = (group_costs(target, n, m), product_costs(target, n, m), packed_costs(target, n, m))
            for cost in itertools.chain(*costs):
                print(
                    f"{cost.kernel:<42} {cost.pattern:>5} {target:>6} {cost.registers:>5} {cost.stack:>6} "
                    f"{cost.shared / 1024:>6.1f} {cost.resident:>5} {cost.determined:>10.1f} {cost.drawn:>8.1f}  "
                    f"{cost.determined_ps:>6.2f} {cost.drawn_ps:>6.2f}   {cost.pipe}",
                    flush=True,
                )
    report_groups(targets, patterns)
    report_products(targets, patterns)
    report_packed(targets, patterns)
    report_straight_through(targets, patterns)


def report_groups(targets: list[str], patterns: list[tuple[int, int]]) -> None:
    """Kernels over groups, on a layer of LLaMA-2-7B."""
    print(f"\n{'ps a weight':<20} {'N:M':>5} {'on':>16} {'gap':>6} {HEADINGS}")
    rows, k = SHAPES[0]
    kernels = [(kernel, logits) for kernel, dtypes in GROUP_KERNELS.items() for logits in dtypes]
    for target, (n, m), (kernel, logits), gap in itertools.product(targets, patterns, kernels, GAPS):
        line = group_launch(kernel, target, n, m, gap, rows, k, logits).line(1e12 / (rows * k))
        print(f"{named(kernel, logits):<20} {f'{n}:{m}':>5} {CHIPS[target].name:>16} {gap:>6} {line}")


def report_products(targets: list[str], patterns: list[tuple[int, int]]) -> None:
    """Forward products of 16-bit operands with float32 logits; of many tokens with a masked weight drawn before."""
    print(f"\n{'us, forward of':<20} {'N:M':>5} {'on':>16} {'tokens':>6} {HEADINGS}")
    for target, (n, m), (rows, k), tokens in itertools.product(targets, patterns, [*SHAPES, FEW_ROWS], TOKENS):
        if tokens <= ONE_PASS_TOKENS[target]:
            line = product_launch(target, n, m, GAPS[0], rows, k, tokens).line(1e6)
        else:
            drawn, _ = group_launch("masked_weight", target, n, m, GAPS[0], rows, k).bound
            line = f"{1e6 * (drawn + dense_seconds(target, rows, k, tokens)):>35.2f}  draw and product"
        print(f"{f'{rows}x{k}':<20} {f'{n}:{m}':>5} {CHIPS[target].name:>16} {tokens:>6} {line}")


def report_packed(targets: list[str], patterns: list[tuple[int, int]]) -> None:
    """Products with packed weights of 16 bits, and how much longer the dense layer takes."""
    print(f"\n{'us, packed':<20} {'N:M':>5} {'on':>16} {'tokens':>6} {HEADINGS}  dense")
    multiplied = [pattern for pattern in patterns if pattern in MULTIPLIED]
    for target, (n, m), (rows, k), tokens in itertools.product(targets, multiplied, SERVED_SHAPES, SERVED_TOKENS):
        launch = packed_launch(target, n, m, rows, k, tokens)
        line = f"{launch.line(1e6)}  {dense_seconds(target, rows, k, tokens) / launch.bound[0]:>4.2f}x"
        print(f"{f'{rows}x{k}':<20} {f'{n}:{m}':>5} {CHIPS[target].name:>16} {tokens:>6} {line}")


def report_straight_through(targets: list[str], patterns: list[tuple[int, int]]) -> None:
    """Gradients of the logits and their step, of many tokens, with logits of float32."""
    print(f"\n{'us, straight-through':<20} {'N:M':>5} {'on':>16} {'tokens':>6} {HEADINGS}")
    for target, (n, m), (rows, k) in itertools.product(targets, patterns, SHAPES):
        line = straight_through_launch(target, n, m, GAPS[0], rows, k, TOKENS[-1]).line(1e6)
        print(f"{f'{rows}x{k}':<20} {f'{n}:{m}':>5} {CHIPS[target].name:>16} {TOKENS[-1]:>6} {line}")
    for target, (n, m) in itertools.product(targets, patterns):
        launches = {
            (rows, k): straight_through_launch(target, n, m, GAPS[0], rows, k, TOKENS[-1]) for rows, k in LAYERS
        }
        seconds = sum(count * launches[shape].bound[0] for shape, count in LAYERS.items())
        matmul = sum(count * launches[shape].pipes["matrix units"] for shape, count in LAYERS.items())
        print(f"all of LLaMA-2-7B, {n}:{m}, {CHIPS[target].name}: {1e3 * seconds:.0f} ms", end=", ")
        print(f"of which matrix units need {1e3 * matmul:.0f} ms")


def dense_seconds(target: str, rows: int, k: int, tokens: int) -> float:
    """A product with a weight [rows, k] of 16 bits, by memory or by matrix units."""
    moved = 2 * (rows * k + tokens * (rows + k)) / CHIPS[target].bytes_per_second
    return max(moved, 2 * rows * k * tokens / CHIPS[target].flops_16_bit)


def _pipes(counts: dict[str, float], weights: int, target: str) -> dict[str, float]:
    return {pipe: weights * time for pipe, time in seconds_by_pipe(target, counts).items()}


def group_bytes(kernel: str, m: int, logits: str) -> float:
    """Bytes a weight that a kernel over groups reads and writes: logits, weights of 16 bits, codes."""
    codes, weights = (1 if m <= 8 else 4) / m, 2 * BYTES["bf16"]
    return BYTES[logits] + {"sample_mask": codes, "masked_weight": weights, "score_update": BYTES[logits]}[kernel]


def group_launch(
    kernel: str, target: str, n: int, m: int, gap: float, rows: int, k: int, logits: str = "fp32"
) -> Launch:
    """A kernel over groups on a layer [rows, k] whose mask has that gap."""
    chip, config = CHIPS[target], CONFIGURATIONS[kernel, m]
    built, fewest, most = group_kernel(kernel, target, n, m, logits)
    moved = rows * k * group_bytes(kernel, m, logits)
    return Launch(
        target,
        _pipes(expected(fewest, most, config.block, gap, n, m), rows * k, target),
        {"memory": moved / chip.bytes_per_second, "second cache": moved / chip.l2_bytes_per_second},
        config.programs(rows * k // m, PROCESSORS[target]),
        chip.resident(built.registers, built.shared, config.num_warps),
    )


def product_launch(target: str, n: int, m: int, gap: float, rows: int, k: int, tokens: int) -> Launch:
    """A forward product in one pass, with a weight [rows, k]."""
    chip = CHIPS[target]
    tile = tiles_for("masked_linear", m, torch.bfloat16, tokens, rows, k, target)
    built, fewest, most = product_kernel("masked_linear", target, n, m, tile)
    blocks, again = math.ceil(rows / tile.out), math.ceil(tokens / tile.tokens)
    counts = expected(fewest, most, tile.out * max(tile.k, m) / m, gap, n, m)
    return Launch(
        target,
        _pipes(counts, rows * k * again, target) | {"matrix units": 2 * rows * k * tokens / chip.flops_16_bit},
        {
            "memory": (6 * rows * k + 2 * tokens * (rows + k)) / chip.bytes_per_second,
            # each program reads its rows of the weight and of the logits, and all of its tokens
            "second cache": (6 * rows * k * again + 2 * tokens * k * blocks) / chip.l2_bytes_per_second,
        },
        blocks * again,
        chip.resident(built.registers, built.shared, tile.num_warps),
    )


def straight_through_launch(target: str, n: int, m: int, gap: float, rows: int, k: int, tokens: int) -> Launch:
    """The gradient of the logits [rows, k] and their step, of operands of 16 bits and logits of float32."""
    chip = CHIPS[target]
    tile = tiles_for("straight_through", m, torch.bfloat16, tokens, rows, k, target)
    built, *once = product_kernel("straight_through", target, n, m, tile)
    resident = chip.resident(built.registers, built.shared, tile.num_warps)
    programs = math.ceil(rows / tile.out) * math.ceil(k / tile.k)
    _, turn = instructions(disassembled(built.asm["cubin"]), looping=True)
    turn = each(turn, tile.out * tile.k / (32 * tile.num_warps))
    loop = Counter({pipe: math.ceil(tokens / tile.tokens) * count for pipe, count in turn.items()})
    rest = Counter(expected(*once, tile.out * tile.k / m, gap, n, m)) - Counter(turn)
    matmul = 2 * rows * k * tokens / chip.flops_16_bit
    # logits in and out, the weight; each program reads its columns of both operands
    moved, operands = 10 * rows * k, 2 * tokens * programs * (tile.out + tile.k)
    slow = {
        "memory": (moved + 2 * tokens * (rows + k)) / chip.bytes_per_second,
        "second cache": (moved + operands) / chip.l2_bytes_per_second,
    }
    if resident == 1:
        # nothing runs beside what stands behind the loop
        product = max(busiest(_pipes(loop, rows * k, target))[0], matmul, operands / chip.l2_bytes_per_second)
        slow["in turn"] = product + max(busiest(_pipes(rest, rows * k, target))[0], moved / chip.bytes_per_second)
    return Launch(target, _pipes(loop + rest, rows * k, target) | {"matrix units": matmul}, slow, programs, resident)


def packed_launch(target: str, n: int, m: int, rows: int, k: int, tokens: int) -> Launch:
    """A product with a packed weight [rows, k] of 16 bits."""
    chip = CHIPS[target]
    if tokens == 1:
        kernel, config = "packed_vector", rows_for("packed_vector", rows, k // chunk_length(n, m), target)
        blocks, again, matmul = math.ceil(rows / config.rows), 1, 0.0
    else:
        kernel, config = "packed_linear", tiles_for("packed_linear", m, torch.bfloat16, tokens, rows, k, target)
        blocks, again = math.ceil(rows / config.out), math.ceil(tokens / config.tokens)
        matmul = 2 * rows * k * tokens / chip.flops_16_bit
    built, counts, _ = packed_kernel(kernel, target, n, m, config)
    weight = rows * k * (2 * n / m + 1 / 8)
    return Launch(
        target,
        _pipes(counts, rows * k * again, target) | {"matrix units": matmul},
        {
            "memory": (weight + 2 * tokens * (rows + k)) / chip.bytes_per_second,
            "second cache": (weight * again + 2 * tokens * k * blocks) / chip.l2_bytes_per_second,
        },
        blocks * again,
        chip.resident(built.registers, built.shared, config.num_warps),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--patterns", nargs="+", default=["2:4"], metavar="N:M")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name} instead, which the tests hold to")
    arguments = parser.parse_args()
    if arguments.write:
        write_table()
    else:
        report(arguments.targets, [tuple(map(int, pattern.split(":"))) for pattern in arguments.patterns])
