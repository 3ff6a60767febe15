"""Launch tables: how each kernel is launched on each GPU architecture, and how an entry of a table is chosen.

A target is an architecture with a row of its own in ``TARGETS``; every other architecture takes the row of a target.
CONTRIBUTING.md says how to add a tile, and how to add an architecture. Nothing is tuned at run time.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

# As triton reads it when it is imported
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

# The target whose entries CPU tensors take on their way to the kernels: in Triton's interpreter, or by a driver of
# Triton's that executes on a CPU what is compiled, and sets its target here. None: they go to no kernel.
ON_CPU: str | None = "sm_90" if INTERPRETED else None


@dataclass(frozen=True, kw_only=True)
class _CompileOptions:
    """How a kernel is compiled."""

    num_warps: int = 4
    num_stages: int = 3

    @property
    def options(self) -> dict[str, int]:
        """Triton's."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Configuration(_CompileOptions):
    """How a kernel over groups is launched: groups that a program takes at a time, and how often it does at most."""

    block: int
    steps: int = 1

    def programs(self, groups: int, processors: int) -> int:
        """How many programs share out that many groups: fewer steps each where processors would idle."""
        blocks = -(-groups // self.block)
        return min(blocks, max(-(-blocks // self.steps), PROGRAMS_A_PROCESSOR * processors))


@dataclass(frozen=True)
class Rows(_CompileOptions):
    """How a kernel over rows of chunks is launched: rows a program, chunks of each that it takes at a time."""

    rows: int
    block: int


@dataclass(frozen=True)
class Tiles(_CompileOptions):
    """How a product is launched: how many rows, tokens and columns of K a program multiplies at a time."""

    out: int
    tokens: int
    k: int


@dataclass(frozen=True, kw_only=True)
class Target:
    """The choices for one GPU architecture.

    Attributes:
        processors: streaming multiprocessors or compute units: as many programs leave none idle. They are the target's
            on whatever card takes its row, and so are the numbers of tokens. For they decide into how many parts a sum
            is split, and who adds it up, and with these its bits: cards of one target agree.
        drawn_tokens: most tokens for which a mask is drawn inside a product.
        fused_tokens: most tokens for which one kernel computes the gradient of a masked weight and steps the logits,
            under a mask that is given, as in a step that draws its masks once. Beyond, torch's product is faster by
            more than it takes to write and read its result.
        fused_drawn_tokens: the same under a mask that the kernel draws.
        tiles: tuples of tiles, by the keys of ``TILES``, that take the place of those there.
    """

    processors: int
    drawn_tokens: int = 128
    fused_tokens: int
    fused_drawn_tokens: int
    tiles: Mapping[tuple[str, int], tuple[Tiles, ...]] = field(default_factory=dict)


# Numbers of tokens are those of the cost model in benchmarks/; docs/kernels.md has its figures, and it does not cover
# gfx942. A B200's memory is so fast that the draw bounds the time, which the product lengthens: few tokens of drawn
# masks there. torch for ROCm has no product of 16 bits with a result in float32: the kernel multiplies for any number.
TARGETS = {
    "sm_80": Target(processors=108, fused_tokens=1024, fused_drawn_tokens=1024),
    "sm_90": Target(processors=132, fused_tokens=256, fused_drawn_tokens=256),
    "sm_100": Target(processors=148, drawn_tokens=32, fused_tokens=96, fused_drawn_tokens=32),
    "gfx942": Target(processors=304, fused_tokens=sys.maxsize, fused_drawn_tokens=sys.maxsize),
}

# The target whose row an architecture takes. Cards of 8.6, 8.7, 8.9 and 12.x multiply by the instruction mma.sync, as
# those of 8.0 do: 12.x has neither wgmma nor tcgen05. They have at least 99 KiB of shared memory a block, into which
# all tiles of sm_80 fit.
TARGET_OF = {
    "sm_80": "sm_80",
    "sm_86": "sm_80",
    "sm_87": "sm_80",
    "sm_89": "sm_80",
    "sm_90": "sm_90",
    "sm_100": "sm_100",
    "sm_103": "sm_100",
    "sm_120": "sm_80",
    "sm_121": "sm_80",
    "gfx942": "gfx942",
}
# What an unknown architecture takes: of its maker's targets the one whose tiles ask for the least shared memory
NVIDIA_TARGET, AMD_TARGET = "sm_80", "gfx942"

# Most tokens for which a mask is applied inside the product, rather than to a transient masked weight: one block of
# them, for a second one would find every mask again. The gradient of the weight finds it once either way, and takes the
# same limit: its small tiles lose to torch's beyond a few hundred.
ONE_PASS_TOKENS = 128
# Most tokens for which a packed weight is unpacked inside the product. Beyond, tensor cores bound the time, not bytes
PACKED_TOKENS = 64

# What an integer argument is a multiple of where Triton compiles a kernel for aligned rows
ALIGNED = 16

# Twice the 32 programs of one warp that a processor holds at a time: the last ones to start leave few processors idle
PROGRAMS_A_PROCESSOR = 64

# Kernels that draw: one warp, whose threads hold random words beside the columns. A block with a single draw that is
# not determined computes the noise of all of its groups, and several warps would wait for each other to know. So short
# a program is not worth its launch, nor what it computes for all groups alike: it takes several blocks.
DRAWING = frozenset({
    "sample_mask",
    "sample_masks",
    "masked_weight",
    "score_update",
    "score_update_of_layers",
    "score_updates",
    "score_updates_of_layers",
})  # fmt: skip
# Kernels over single weights or elements
ELEMENTS = {
    "adamw": Configuration(block=1024),
    "metadata": Configuration(block=512),
    "split_sum": Configuration(block=256),
}

# Of products with a packed weight and one token, for short weight rows before long ones. A thread holds one chunk of
# each of its rows, so that many loads are under way at once; a chunk of the activations is loaded once for all of them.
PACKED_ROWS = (
    Rows(rows=4, block=32, num_warps=1),
    Rows(rows=4, block=64, num_warps=2),
    Rows(rows=4, block=128, num_warps=4),
)

# By product and bytes of an operand; of as many tokens, smaller tiles before larger ones, see ``_from_table``. With few
# tokens the draw bounds the time: small tiles then, so that no processor idles and a thread holds two groups of 4. With
# many, larger ones, so that x is not read too often; in 16 bits those of 64 weight rows reach wgmma and tcgen05.
TILES: dict[tuple[str, int], tuple[Tiles, ...]] = {
    ("masked_linear", 2): (
        Tiles(out=16, tokens=16, k=64),
        Tiles(out=32, tokens=32, k=64),
        Tiles(out=32, tokens=64, k=64, num_warps=8),
        # Not 3 stages: with weights of 4 bytes, as under autocast, they exceed the 99 KiB of cards of 8.6
        Tiles(out=64, tokens=128, k=64, num_warps=8, num_stages=2),
    ),
    ("masked_linear", 4): (
        Tiles(out=16, tokens=16, k=64),
        # Not 4 warps: at 4:8 the log-probability then puts 48 bytes on the stack on sm_100
        Tiles(out=16, tokens=32, k=64, num_warps=8),
        Tiles(out=16, tokens=64, k=32, num_warps=8),
        Tiles(out=32, tokens=64, k=16, num_warps=8),
        # Not 4 warps: each thread's part of the product alone would be more than its registers hold
        Tiles(out=16, tokens=128, k=16, num_warps=8),
        Tiles(out=32, tokens=128, k=16, num_warps=8),
    ),
    ("masked_linear_input_grad", 2): (
        # rows of 64 bytes, two sectors of memory, in each
        Tiles(out=32, tokens=16, k=32),
        Tiles(out=32, tokens=32, k=32),
        Tiles(out=32, tokens=64, k=32),
        Tiles(out=64, tokens=128, k=64, num_warps=8, num_stages=2),
    ),
    ("masked_linear_input_grad", 4): (
        Tiles(out=64, tokens=16, k=16),
        Tiles(out=64, tokens=32, k=16),
        Tiles(out=32, tokens=64, k=16),
        Tiles(out=32, tokens=64, k=32, num_warps=8),
        Tiles(out=32, tokens=128, k=32, num_warps=8),
    ),
    ("masked_linear_weight_grad", 2): (Tiles(out=64, tokens=32, k=64, num_warps=8),),
    ("masked_linear_weight_grad", 4): (Tiles(out=32, tokens=32, k=64),),
    ("straight_through", 2): (Tiles(out=64, tokens=32, k=64, num_warps=8),),
    ("straight_through", 4): (Tiles(out=32, tokens=32, k=64),),
    # torch has multiplied: no tokens are left, and a tile's count for nothing
    ("straight_through_step", 2): (Tiles(out=16, tokens=1, k=64),),
    ("straight_through_step", 4): (Tiles(out=16, tokens=1, k=64),),
    # Weight rows enough for wgmma and tcgen05, which read shared memory by themselves: by mma.sync each warp loads the
    # tile of x, and that takes longer than to load the weight. From 32 tokens on the L2 cache bounds the time, which
    # gives x to each block of weight rows: more of these then.
    ("packed_linear", 2): (
        Tiles(out=64, tokens=16, k=128),
        Tiles(out=128, tokens=32, k=64, num_warps=8),
        Tiles(out=128, tokens=64, k=64, num_warps=8),
    ),
}
# Products whose results lie along the columns of the weight; those of the others lie along its rows
ACROSS_COLUMNS = ("masked_linear_input_grad",)

# Of products that are split. Warps of a processor: three a scheduler hide what one waits for, and sums of more parts
# are more bytes. Steps of a part, so that loads run ahead of their use; parts, whose sums are read again.
LEAST_WARPS, LEAST_STEPS, MOST_PARTS = 12, 2, 16

# The interpreter runs one program at a time through numpy: the cost is by call, not by element
INTERPRETER_BLOCK = 1 << 16
INTERPRETER_ROWS = 64
INTERPRETER_TILES = Tiles(out=512, tokens=128, k=512)


def one_pass_tokens(kind: str, target: str) -> int:
    """Most tokens for which a mask of that kind is applied inside the product."""
    return TARGETS[target].drawn_tokens if kind == "drawn" else ONE_PASS_TOKENS


def fused_tokens(kind: str, target: str) -> int:
    """Most tokens for which one kernel multiplies and takes what follows, under a mask of that kind."""
    return TARGETS[target].fused_drawn_tokens if kind == "drawn" else TARGETS[target].fused_tokens


@functools.cache
def architecture(device: torch.device) -> str:
    """The target whose row a device takes; warns once of each architecture that ``TARGET_OF`` does not have."""
    if device.type == "cpu":
        return ON_CPU
    if torch.version.hip is not None:
        # such as gfx942:sramecc+:xnack-
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return _target_of(name, AMD_TARGET)
    major, minor = torch.cuda.get_device_capability(device)
    return _target_of(f"sm_{major}{minor}", NVIDIA_TARGET)


@functools.cache
def _target_of(name: str, otherwise: str) -> str:
    if name not in TARGET_OF:
        warnings.warn(
            f"GPU architecture {name}: expected one of {', '.join(TARGET_OF)}; its kernels are launched with the tiles "
            f"of {otherwise}, which may be slow or not fit; CONTRIBUTING.md says how to add it",
            stacklevel=2,
        )
    return TARGET_OF.get(name, otherwise)


def scores_in_short(target: str) -> bool:
    """Say whether the update of 2:4 takes ``device.score_of_largest_2_of_4``."""
    # LLVM then multiplies by 1 in ``v_pk_mul_f32`` on gfx942, and no document defines that constant's upper half
    return not target.startswith("gfx")


def configuration(kernel: str, m: int, count: int, target: str) -> Configuration:
    """The configuration of a kernel over ``count`` groups of ``m``, or over single elements."""
    if kernel in ELEMENTS:
        config = ELEMENTS[kernel]
    elif kernel in DRAWING:
        # each lane has a group, of two where M is small: 64 lanes in a wave of AMD's, 32 in a warp
        lanes = 64 if target.startswith("gfx") or m <= 4 else 32
        config = Configuration(block=lanes, num_warps=1, steps=8)
    else:
        # a thread holds the M columns of one group in registers, of two where M is small
        config = Configuration(block=256 if m <= 4 else 128)
    if INTERPRETED:
        # as many steps as there are programs with several
        return Configuration(block=min(INTERPRETER_BLOCK, power_above(count)), steps=min(config.steps, 2))
    return config


def parts_for(tile: Tiles, blocks: int, steps: int, target: str) -> int:
    """Into how many parts a product of so many blocks splits the dimension that each of them sums in ``steps``."""
    parts, enough = 1, LEAST_WARPS * TARGETS[target].processors
    while blocks * parts * tile.num_warps < enough and 2 * parts * LEAST_STEPS <= steps and parts < MOST_PARTS:
        parts *= 2
    return parts


def power_above(size: int) -> int:
    """The smallest power of two that is at least ``size`` and 1."""
    return 1 << max(size - 1, 0).bit_length()


def rows_for(rows: int, chunks: int, target: str) -> Rows:
    """The configuration of a packed product of one token, with so many rows of so many chunks."""
    if INTERPRETED:
        return Rows(rows=min(INTERPRETER_ROWS, power_above(rows)), block=power_above(chunks))
    config = next((config for config in PACKED_ROWS if chunks <= config.block), PACKED_ROWS[-1])
    # fewer rows a program where processors would idle
    most = max(1, rows // (2 * TARGETS[target].processors))
    return replace(config, rows=min(config.rows, power_above(most + 1) // 2))


def tiles_for(product: str, m: int, operand: torch.dtype, tokens: int, rows: int, k: int, target: str) -> Tiles:
    """The tiles of a product of that many tokens with a weight [rows, k] on a target."""
    if INTERPRETED:
        most = INTERPRETER_TILES
        out, columns = min(most.out, power_above(rows)), min(most.k, power_above(k))
        return Tiles(out=out, tokens=min(most.tokens, power_above(tokens)), k=max(columns, m))
    return _from_table(product, target, operand.itemsize, tokens, rows, k)


@functools.lru_cache(maxsize=1 << 12)
def _from_table(product: str, target: str, itemsize: int, tokens: int, rows: int, k: int) -> Tiles:
    """Of the tiles of fewest blocks and least padding the last that keeps all processors busy, or the first."""
    candidates = tiles_of(product, target, itemsize)
    padded = [(-(-tokens // tile.tokens), tile.tokens) for tile in candidates]
    fitting = [tile for tile, size in zip(candidates, padded, strict=True) if size == min(padded)]
    side, width = ("k", k) if product in ACROSS_COLUMNS else ("out", rows)
    busy = [tile for tile in fitting if width >= TARGETS[target].processors * getattr(tile, side)]
    return busy[-1] if busy else fitting[0]


def tiles_of(product: str, target: str, itemsize: int) -> tuple[Tiles, ...]:
    """The entry of a product of operands of ``itemsize`` bytes."""
    return TARGETS[target].tiles.get((product, itemsize), TILES[product, itemsize])
