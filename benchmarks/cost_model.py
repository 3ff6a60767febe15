"""How long a launch takes on a GPU, by what its compiled kernel and its bytes ask of each resource.

A model, and nothing in it is measured. Instructions are counted by the pipe of a processor that takes them, and each
pipe has its own rate on each architecture; see ``sass`` and ``chips``. A kernel takes as long as the busiest of its
resources: a pipe, issue slots, matrix units, memory, the L2 cache; where programs don't divide by the processors,
as long as the one with the most. Latencies are left out, so a kernel of few programs a processor may take longer.
NVIDIA targets only.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass

import torch
from aot import Built, build, build_packed, build_product
from chips import CHIPS, seconds_by_pipe
from sass import disassembled, instructions

from maskpro_kernels.ops import bounds
from maskpro_kernels.ops.data_sheets import LIBRARY_SHARE
from maskpro_kernels.ops.triton.packed import chunk_length
from maskpro_kernels.ops.triton.tiles import (
    CONFIGURATIONS,
    PROCESSORS,
    Rows,
    Tiles,
    fused_tokens,
    parts_for,
    rows_for,
    tiles_for,
)

SIMULATED_GROUPS = 1 << 20
BYTES = {"fp32": 4, "bf16": 2}


def weights_a_thread(block: int, m: int, num_warps: int) -> float:
    return block * m / (32 * num_warps)


def each(counts: Counter, weights: float) -> dict[str, float]:
    """Counts of a thread of so many weights, by weight."""
    return {pipe: count / weights for pipe, count in counts.items()}


@functools.cache
def group_kernel(
    kernel: str, target: str, n: int, m: int, logits: str = "fp32", kind: str = "drawn"
) -> tuple[Built, dict, dict]:
    """(the compiled kernel, fewest and most instructions a weight by pipe)."""
    built, config = build(kernel, target, n, m, logits, KIND=kind), CONFIGURATIONS[kernel, target, m]
    weights = weights_a_thread(config.block, m, config.num_warps)
    fewest, most = instructions(disassembled(built.asm["cubin"]), looping=True)
    return built, each(fewest, weights), each(most, weights)


@functools.cache
def product_kernel(
    product: str, target: str, n: int, m: int, tile: Tiles, kind: str = "drawn", log_prob: bool = False
) -> tuple[Built, dict, dict]:
    """(the compiled product, fewest and most instructions a weight by pipe) for a mask of that kind.

    With the log-probability of the draw the fewest may be those of a block that leaves this out, not the noise.
    """
    built = build_product(product, target, n, m, tile, KIND=kind, LOG_PROB=log_prob)
    weights = tile.out * max(tile.k, m) / (32 * tile.num_warps)
    # those with a tile of the weight's gradient draw once, behind their loop over the tokens
    looping = product not in ("masked_linear_weight_grad", "straight_through", "straight_through_step")
    fewest, most = instructions(disassembled(built.asm["cubin"]), looping)
    if kind != "drawn":
        # no noise to skip: the branch that saves the most is that around the loop
        fewest = most
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


HEADINGS = f"{'memory':>8} {'L2':>8} {'pipe':>8} {'whole':>8}  {'bound by':<12} {'programs':>8} {'waves':>7}"


@dataclass(frozen=True)
class Launch:
    """The time of one launch.

    Attributes:
        target: such as "sm_90".
        pipes: seconds by pipe, "issue" and "matrix units", with the work spread evenly over all processors.
        memories: seconds by "memory" and "L2 cache".
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
        seconds = self.memories["memory"], self.memories["L2 cache"], busiest(self.pipes)[0], whole
        times = " ".join(f"{unit * each:>8.2f}" for each in seconds)
        return f"{times}  {resource:<12} {self.programs:>8} {self.waves:>7.2f}"


@functools.cache
def packed_kernel(kernel: str, target: str, n: int, m: int, config: Rows | Tiles) -> tuple[Built, dict, dict]:
    """(the compiled kernel, its instructions a weight by pipe, twice)."""
    built = build_packed(kernel, target, n, m, config)
    taken = config.rows * config.block * chunk_length(n, m) if isinstance(config, Rows) else config.out * config.k
    _, most = instructions(disassembled(built.asm["cubin"]), looping=True)
    by_weight = each(most, taken / (32 * config.num_warps))
    return built, by_weight, by_weight


def dense_seconds(target: str, rows: int, k: int, tokens: int) -> float:
    """A product with a weight [rows, k] of 16 bits, by memory or by matrix units."""
    moved = 2 * (rows * k + tokens * (rows + k)) / CHIPS[target].bytes_per_second
    return max(moved, 2 * rows * k * tokens / CHIPS[target].flops_16_bit)


def _pipes(counts: dict[str, float], weights: int, target: str) -> dict[str, float]:
    return {pipe: weights * time for pipe, time in seconds_by_pipe(target, counts).items()}


def code_bytes(m: int) -> float:
    """Bytes of codes a weight."""
    return (1 if m <= 8 else 4) / m


def group_bytes(kernel: str, m: int, logits: str, kind: str) -> float:
    """Bytes a weight that a kernel over groups reads and writes: logits, weights of 16 bits, codes."""
    if kernel.startswith("sample_mask"):
        return BYTES[logits] + code_bytes(m)
    if kernel == "masked_weight":
        return BYTES[logits] + 2 * BYTES["bf16"]
    return 2 * BYTES[logits] + (code_bytes(m) if kind == "codes" else 0)


def group_launch(
    kernel: str, target: str, n: int, m: int, gap: float, rows: int, k: int, logits: str = "fp32", kind: str = "drawn"
) -> Launch:
    """A kernel over groups on a layer [rows, k] whose mask has that gap, or one over layers on this one alone.

    By codes a block takes the longer way where a group has left its N largest logits: at most as many as are open.
    """
    chip, config = CHIPS[target], CONFIGURATIONS[kernel, target, m]
    built, fewest, most = group_kernel(kernel, target, n, m, logits, kind)
    moved = rows * k * group_bytes(kernel, m, logits, kind)
    return Launch(
        target,
        _pipes(expected(fewest, most, config.block, gap, n, m), rows * k, target),
        {"memory": moved / chip.bytes_per_second, "L2 cache": moved / chip.l2_bytes_per_second},
        config.programs(rows * k // m, PROCESSORS[target]),
        chip.resident(built.registers, built.shared, config.num_warps),
    )


def part_bytes(parts: int, tokens: int, columns: int) -> int:
    """What a result [tokens, columns] of so many parts moves: each is written, and read again to be added."""
    return 8 * parts * tokens * columns if parts > 1 else 0


def product_launch(
    target: str, n: int, m: int, gap: float, rows: int, k: int, tokens: int, product: str = "masked_linear"
) -> Launch:
    """A product in one pass with a weight [rows, k] of 16 bits: a forward, or "masked_linear_input_grad"."""
    chip = CHIPS[target]
    tile = tiles_for(product, m, torch.bfloat16, tokens, rows, k, target)
    built, fewest, most = product_kernel(product, target, n, m, tile)
    (width, across), (inner, step) = sides = (rows, tile.out), (k, tile.k)
    if product != "masked_linear":
        (inner, step), (width, across) = sides
    blocks, again = math.ceil(width / across), math.ceil(tokens / tile.tokens)
    parts = parts_for(tile, blocks * again, math.ceil(inner / step), target)
    counts = expected(fewest, most, tile.out * max(tile.k, m) / m, gap, n, m)
    # each program reads its part of the weight and of the logits, and all of its tokens
    cached = 6 * rows * k * again + 2 * tokens * inner * blocks + part_bytes(parts, tokens, width)
    return Launch(
        target,
        _pipes(counts, rows * k * again, target) | {"matrix units": 2 * rows * k * tokens / chip.flops_16_bit},
        {
            "memory": (6 * rows * k + 2 * tokens * (rows + k)) / chip.bytes_per_second,
            "L2 cache": cached / chip.l2_bytes_per_second,
        },
        blocks * again * parts,
        chip.resident(built.registers, built.shared, tile.num_warps),
    )


def drawn_before_seconds(target: str, n: int, m: int, gap: float, rows: int, k: int, tokens: int) -> float:
    """A forward product in two passes: a masked weight [rows, k] of 16 bits is drawn, and the library multiplies."""
    drawn, _ = group_launch("masked_weight", target, n, m, gap, rows, k).bound
    return drawn + dense_seconds(target, rows, k, tokens)


def straight_through_launches(
    target: str, n: int, m: int, gap: float, rows: int, k: int, tokens: int, kind: str
) -> tuple[float, Launch]:
    """(seconds of the library's product, the kernel that steps logits [rows, k] of float32) for operands of 16 bits.

    ``kind`` is "codes", where the step has drawn its masks before, or "drawn", where the kernel draws. Up to so many
    tokens as ``tiles.fused_tokens`` tells the kernel multiplies as well, and the library does nothing.
    """
    if tokens <= fused_tokens(kind, target):
        return 0.0, fused_launch(target, n, m, gap, rows, k, tokens, kind)
    return library_seconds(target, rows, k, tokens), step_launch(target, n, m, gap, rows, k, tokens, kind)


def library_seconds(target: str, rows: int, k: int, tokens: int) -> float:
    """The gradient of a weight [rows, k] by the GPU's library, in float32."""
    chip = CHIPS[target]
    return max(
        2 * rows * k * tokens / (LIBRARY_SHARE * chip.flops_16_bit),
        (4 * rows * k + 2 * tokens * (rows + k)) / chip.bytes_per_second,
    )


def step_bytes(m: int, kind: str) -> float:
    """Bytes a weight of a straight-through step without its product: logits in and out, the weight, codes."""
    return 2 * BYTES["fp32"] + BYTES["bf16"] + (code_bytes(m) if kind == "codes" else 0)


def step_launch(target: str, n: int, m: int, gap: float, rows: int, k: int, tokens: int, kind: str) -> Launch:
    """The kernel behind the library's product."""
    chip = CHIPS[target]
    tile = tiles_for("straight_through_step", m, torch.bfloat16, tokens, rows, k, target)
    built, *once = product_kernel("straight_through_step", target, n, m, tile, kind)
    # the product of float32 too
    moved = (BYTES["fp32"] + step_bytes(m, kind)) * rows * k
    return Launch(
        target,
        _pipes(expected(*once, tile.out * max(tile.k, m) / m, gap, n, m), rows * k, target),
        {"memory": moved / chip.bytes_per_second, "L2 cache": moved / chip.l2_bytes_per_second},
        math.ceil(rows / tile.out) * math.ceil(k / max(tile.k, m)),
        chip.resident(built.registers, built.shared, tile.num_warps),
    )


def fused_launch(target: str, n: int, m: int, gap: float, rows: int, k: int, tokens: int, kind: str) -> Launch:
    """The kernel that multiplies as well."""
    chip = CHIPS[target]
    tile = tiles_for("straight_through", m, torch.bfloat16, tokens, rows, k, target)
    built, *once = product_kernel("straight_through", target, n, m, tile, kind)
    resident = chip.resident(built.registers, built.shared, tile.num_warps)
    programs = math.ceil(rows / tile.out) * math.ceil(k / tile.k)
    _, turn = instructions(disassembled(built.asm["cubin"]), looping=True)
    turn = each(turn, tile.out * tile.k / (32 * tile.num_warps))
    loop = Counter({pipe: math.ceil(tokens / tile.tokens) * count for pipe, count in turn.items()})
    rest = Counter(expected(*once, tile.out * tile.k / m, gap, n, m)) - Counter(turn)
    matmul = 2 * rows * k * tokens / chip.flops_16_bit
    # each program reads its columns of both operands
    moved, operands = step_bytes(m, kind) * rows * k, 2 * tokens * programs * (tile.out + tile.k)
    slow = {
        "memory": (moved + 2 * tokens * (rows + k)) / chip.bytes_per_second,
        "L2 cache": (moved + operands) / chip.l2_bytes_per_second,
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
        blocks, again, parts, matmul = math.ceil(rows / config.rows), 1, 1, 0.0
    else:
        kernel, config = "packed_linear", tiles_for("packed_linear", m, torch.bfloat16, tokens, rows, k, target)
        blocks, again = math.ceil(rows / config.out), math.ceil(tokens / config.tokens)
        parts = parts_for(config, blocks * again, math.ceil(k / config.k), target)
        matmul = 2 * rows * k * tokens / chip.flops_16_bit
    built, counts, _ = packed_kernel(kernel, target, n, m, config)
    weight = rows * k * (2 * n / m + 1 / 8)
    cached = weight * again + 2 * tokens * k * blocks + part_bytes(parts, tokens, rows)
    return Launch(
        target,
        _pipes(counts, rows * k * again, target) | {"matrix units": matmul},
        {
            "memory": (weight + 2 * tokens * (rows + k)) / chip.bytes_per_second,
            "L2 cache": cached / chip.l2_bytes_per_second,
        },
        blocks * again * parts,
        chip.resident(built.registers, built.shared, config.num_warps),
    )
