"""Launch tables of each kernel for each GPU architecture, and the choice of an entry.

A target is an architecture with its own row in ``TARGETS``; other architectures use the row of a target.
CONTRIBUTING.md explains how to add a tile or an architecture. Nothing is tuned at run time.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

# read like triton does when it is imported
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

# Target of CPU tensors: in Triton's interpreter, or with a Triton driver that executes compiled kernels on a CPU and
# sets its target here. None: CPU tensors use no kernel
ON_CPU: str | None = "sm_90" if INTERPRETED else None


@dataclass(frozen=True, kw_only=True)
class _CompileOptions:
    """Options of compilation."""

    num_warps: int = 4
    num_stages: int = 3

    @property
    def options(self) -> dict[str, int]:
        """Options for Triton."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Configuration(_CompileOptions):
    """Launch of a kernel over groups: groups of a block, and the most blocks of a program."""

    block: int
    steps: int = 1

    def programs(self, groups: int, processors: int) -> int:
        """Number of programs for ``groups`` groups: programs take fewer steps if processors would idle."""
        blocks = -(-groups // self.block)
        return min(blocks, max(-(-blocks // self.steps), PROGRAMS_A_PROCESSOR * processors))


@dataclass(frozen=True)
class Rows(_CompileOptions):
    """Launch of a kernel over rows: rows of a program, and elements or chunks of a row at a time."""

    rows: int
    block: int


@dataclass(frozen=True)
class Tiles(_CompileOptions):
    """Launch of a product: rows, tokens and columns of K that a program multiplies at a time.

    Sums are split until each processor has ``least_warps``: three a scheduler hide waits, and more parts write more
    bytes.
    """

    out: int
    tokens: int
    k: int
    least_warps: int = 12

    def few_codes(self, m: int) -> bool:
        """Return whether a thread has fewer than four groups of ``m`` of a tile of the weight."""
        return self.out * self.k // m < 4 * 32 * self.num_warps


@dataclass(frozen=True, kw_only=True)
class Target:
    """Choices for one GPU architecture.

    All cards that use a target's row have its numbers of processors and tokens. These determine the parts of a sum, and
    so its bits: cards of one target agree.

    Attributes:
        processors: streaming multiprocessors or compute units; as many programs leave none idle.
        drawn_tokens: most tokens for which a mask is drawn inside a product.
        fused_tokens: most tokens for which one kernel computes the gradient of a masked weight and steps the logits,
            under a given mask, such as in a step that draws its masks once. For more tokens torch's product saves more
            time than it takes to write and read its result.
        fused_drawn_tokens: like ``fused_tokens``, under a mask that the kernel draws.
        sparse_tokens: most tokens that ``sparse_mma`` multiplies with a 2:4 weight.
        tiles: tuples of tiles that replace those of ``TILES``, by the same keys.
    """

    processors: int
    drawn_tokens: int = 128
    fused_tokens: int
    fused_drawn_tokens: int
    sparse_tokens: int = 0
    tiles: Mapping[tuple[str, int], tuple[Tiles, ...]] = field(default_factory=dict)


# From 64 tokens on an H100 takes masks from codes alone. Each block of weight rows reads all of x from the L2 cache,
# which bounds the time: so 128 rows a block, for two warp groups of wgmma. Of 32 columns two programs by codes fit into
# the registers of a processor.
_SM_90_TILES = {
    ("masked_linear", 2): (
        Tiles(out=16, tokens=16, k=64),
        Tiles(out=32, tokens=32, k=64),
        Tiles(out=128, tokens=64, k=32, num_warps=8),
        Tiles(out=128, tokens=128, k=32, num_warps=8),
    ),
    ("masked_linear_input_grad", 2): (
        Tiles(out=32, tokens=16, k=32),
        Tiles(out=32, tokens=32, k=32),
        Tiles(out=32, tokens=64, k=128, num_warps=8),
        Tiles(out=32, tokens=128, k=128, num_warps=8),
    ),
}

# No figure of a B200's L2 cache is published, so nothing speaks for other tiles there
_SM_100_TILES = {
    ("masked_linear", 2): (
        Tiles(out=16, tokens=16, k=64),
        Tiles(out=32, tokens=32, k=64),
        Tiles(out=32, tokens=64, k=64, num_warps=8),
        Tiles(out=64, tokens=128, k=64, num_warps=8, num_stages=2),
    )
}

# Numbers of tokens come from the cost model in benchmarks/, whose figures are in docs/kernels.md; it does not cover
# gfx942. A B200's memory is so fast that the draw bounds the time, and a product would add to it: so drawn masks have
# few tokens there, and on an H100 until one is measured, since at gaps below 10 the draw takes longer. On ROCm torch
# has products of 16 bits with a float32 result in some of its libraries only, so the kernel multiplies any number.
TARGETS = {
    "sm_80": Target(processors=108, fused_tokens=1024, fused_drawn_tokens=1024, sparse_tokens=sys.maxsize),
    "sm_90": Target(processors=132, drawn_tokens=32, fused_tokens=256, fused_drawn_tokens=256, sparse_tokens=512,
                    tiles=_SM_90_TILES),
    "sm_100": Target(processors=148, drawn_tokens=32, fused_tokens=96, fused_drawn_tokens=32, sparse_tokens=128,
                     tiles=_SM_100_TILES),
    "gfx942": Target(processors=304, fused_tokens=sys.maxsize, fused_drawn_tokens=sys.maxsize),
}  # fmt: skip

# Target of each architecture. Cards of 8.6, 8.7, 8.9 and 12.x multiply by the instruction mma.sync like those of 8.0:
# 12.x has neither wgmma nor tcgen05. They have at least 99 KiB of shared memory a block, and all tiles of sm_80 fit.
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
# Least compute capability of NVIDIA's GPUs: below it ptxas refuses int4 with bfloat16 (PTX ISA 9.7.4: fma.bf16x2 needs
# sm_80), and tiles spill
LEAST_CAPABILITY = (8, 0)
# Targets of unknown architectures: of each vendor the one whose tiles need the least shared memory
NVIDIA_TARGET = "sm_80"
AMD_TARGET = "gfx942"

# Most tokens for which a mask is applied inside the product, not to a temporary masked weight: one block of tokens,
# since a second one would compute every mask again. The gradient of the weight computes masks once either way. It has
# the same limit because its small tiles are slower than torch's beyond a few hundred tokens.
ONE_PASS_TOKENS = 128
# Most tokens for which a packed weight is unpacked inside the product. For more, tensor cores bound the time, not bytes
PACKED_TOKENS = 64
# Most tokens for which ``sparse_mma`` runs even if torch has a product for sparse tensor cores
LIBRARY_TOKENS = 1024

# Integer arguments divisible by this make Triton compile a kernel for aligned rows
ALIGNED = 16

# Twice the 32 one-warp programs that run on a processor at a time, so that few processors idle at the end
PROGRAMS_A_PROCESSOR = 64

# Kernels that draw use one warp, whose threads keep random words beside the columns. If one draw of a block is not
# determined, the block computes noise for all groups, and several warps would have to wait for each other to decide.
# One block would be too short for a program's fixed costs, so a program takes several.
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
ELEMENTS = {"adamw": Configuration(block=1024), "split_sum": Configuration(block=256)}

# Products with a packed weight and one token; entries for short weight rows come first. A thread loads one chunk of
# each of its rows, so that many loads are in flight; a chunk of the activations is loaded once for all rows.
PACKED_ROWS = (
    Rows(rows=4, block=32, num_warps=1),
    Rows(rows=4, block=64, num_warps=2),
    Rows(rows=4, block=128, num_warps=4),
)

# Sums of squares of a gradient: elements of a block, most of them in a row, and most rows. More rows make fewer partial
# sums, which are written and read again: for 32 rows of 16 bits a sixteenth of the gradient's bytes
SQUARES = 8192
MOST_COLUMNS = 2048
MOST_ROWS = 32
# Factors of a curvature: 32 columns of 16 bits are two sectors of memory, and few, so that each processor has some of
# them; with 256 rows a thread has 64 bytes in flight
FACTORS = Rows(rows=256, block=32, num_warps=8)

# By product and bytes of an operand; for equal tokens smaller tiles come first, see ``_from_table``. With few tokens
# the draw bounds the time: small tiles keep all processors busy, with two groups of 4 a thread. With many tokens larger
# tiles read x less often; in 16 bits those of 64 weight rows use wgmma and tcgen05.
TILES: dict[tuple[str, int], tuple[Tiles, ...]] = {
    ("masked_linear", 2): (
        Tiles(out=16, tokens=16, k=64),
        Tiles(out=32, tokens=32, k=64),
        # not 64 columns, whose masks in registers would leave a processor a single program
        Tiles(out=64, tokens=64, k=32),
        Tiles(out=64, tokens=128, k=32, num_warps=8),
    ),
    ("masked_linear", 4): (
        Tiles(out=16, tokens=16, k=64),
        # not 4 warps, with which the log-probability of 4:8 takes 48 bytes of stack on sm_100
        Tiles(out=16, tokens=32, k=64, num_warps=8),
        Tiles(out=16, tokens=64, k=32, num_warps=8),
        Tiles(out=32, tokens=64, k=16, num_warps=8),
        # not 4 warps: each thread's part of the product would exceed its registers
        Tiles(out=16, tokens=128, k=16, num_warps=8),
        Tiles(out=32, tokens=128, k=16, num_warps=8),
    ),
    ("masked_linear_input_grad", 2): (
        # each has rows of 64 bytes, two sectors of memory
        Tiles(out=32, tokens=16, k=32),
        Tiles(out=32, tokens=32, k=32),
        Tiles(out=32, tokens=64, k=64),
        Tiles(out=32, tokens=128, k=64, num_warps=8),
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
    # torch has multiplied, so the tile's tokens are not used
    ("straight_through_step", 2): (Tiles(out=16, tokens=1, k=64),),
    ("straight_through_step", 4): (Tiles(out=16, tokens=1, k=64),),
    # enough weight rows for wgmma and tcgen05, which read shared memory directly: for mma.sync each warp loads the tile
    # of x, which takes longer than loading the weight. From 32 tokens on the L2 cache bounds the time, since each block
    # of weight rows reads x: larger blocks then.
    ("packed_linear", 2): (
        Tiles(out=64, tokens=16, k=128),
        Tiles(out=128, tokens=32, k=64, num_warps=8),
        Tiles(out=128, tokens=64, k=64, num_warps=8),
    ),
    # A warp has 32 rows, in the last tile 64: as many as fit its registers. The asynchronous copies of four warps a
    # processor are enough bytes in flight for its share of the memory's bandwidth.
    ("sparse_mma", 2): (
        Tiles(out=32, tokens=8, k=64, num_warps=1, num_stages=4, least_warps=4),
        Tiles(out=64, tokens=16, k=64, num_warps=2, num_stages=4, least_warps=4),
        Tiles(out=128, tokens=32, k=64, num_stages=4, least_warps=4),
        Tiles(out=128, tokens=64, k=64, num_stages=4, least_warps=4),
        Tiles(out=256, tokens=64, k=64, num_stages=3, least_warps=4),
    ),
}
# First release of Triton whose products by wgmma or tcgen05 are right. With older ones ``BY_WARPS`` replaces all tiles
# of its products: fewer than 64 results along the weight are multiplied by warps, with mma.sync.
#
# - Until ptxas 13.3 a register may be overwritten while a wgmma still reads the weight from it: Triton's issue 9433.
#   Triton 3.9 is the first that assembles for sm_90 by a later one, 13.4.
# - Until Triton 3.7.1 no fence.proxy.async is between asynchronous copies to shared memory and the product that reads
#   them (PTX ISA 9.7.15.4 demands one): its pull requests 9610 and 10537. A B200 gave wrong results: PyTorch's issue
#   181248.
WARP_GROUPS_SINCE = {"sm_90": (3, 9), "sm_100": (3, 7, 1)}
BY_WARPS: dict[tuple[str, int], tuple[Tiles, ...]] = {
    ("masked_linear", 2): (
        Tiles(out=16, tokens=16, k=64),
        Tiles(out=32, tokens=32, k=64),
        Tiles(out=32, tokens=64, k=64, num_warps=8),
        Tiles(out=32, tokens=128, k=64, num_warps=8),
    ),
    ("masked_linear_input_grad", 2): (
        Tiles(out=32, tokens=16, k=32),
        Tiles(out=32, tokens=32, k=32),
        Tiles(out=32, tokens=64, k=32),
        Tiles(out=64, tokens=128, k=32, num_warps=8),
    ),
    ("masked_linear_weight_grad", 2): (Tiles(out=32, tokens=32, k=64),),
    ("straight_through", 2): (Tiles(out=32, tokens=32, k=64),),
    # two warps: each loads the tile of x
    ("packed_linear", 2): (
        Tiles(out=32, tokens=16, k=128, num_warps=2),
        Tiles(out=32, tokens=32, k=64, num_warps=2),
        Tiles(out=32, tokens=64, k=64, num_warps=2),
    ),
}
# Products whose results are along the columns of the weight; others have results along its rows
ACROSS_COLUMNS = ("masked_linear_input_grad",)

# Limits of a split product. Steps of a part, so that loads run ahead of their use. Number of parts. Bytes of their
# sums, written and read again, for each byte of the weight.
LEAST_STEPS = 2
MOST_PARTS = 16
MOST_SUMS = 0.5

# The interpreter runs one program at a time by numpy, with costs by call and not by element
INTERPRETER_BLOCK = 1 << 16
INTERPRETER_ROWS = 64
INTERPRETER_TILES = Tiles(out=512, tokens=128, k=512)


def one_pass_tokens(kind: str, target: str) -> int:
    """Most tokens for which a mask of this kind is applied inside the product."""
    return TARGETS[target].drawn_tokens if kind == "drawn" else ONE_PASS_TOKENS


def fused_tokens(kind: str, target: str) -> int:
    """Most tokens for which one kernel multiplies and steps, under a mask of this kind."""
    return TARGETS[target].fused_drawn_tokens if kind == "drawn" else TARGETS[target].fused_tokens


@functools.cache
def architecture(device: torch.device) -> str:
    """Target of a device; warns once for each architecture that is not in ``TARGET_OF``.

    Every launch asks for it, so no kernel runs on a GPU that is refused here.

    Raises:
        ValueError: for an NVIDIA GPU below ``LEAST_CAPABILITY``.
    """
    if device.type == "cpu":
        return ON_CPU
    if torch.version.hip is not None:
        # without features, such as gfx942:sramecc+:xnack-
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return _target_of(name, AMD_TARGET)
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        raise ValueError(
            f"device: expected a GPU of compute capability {least} or higher, which the kernels need, got {device} of "
            f"{major}.{minor}; choose the CPU"
        )
    return _target_of(f"sm_{major}{minor}", NVIDIA_TARGET)


@functools.cache
def _target_of(name: str, otherwise: str) -> str:
    if name not in TARGET_OF:
        warnings.warn(
            f"GPU architecture {name}: expected one of {', '.join(TARGET_OF)}; its kernels use the tiles of "
            f"{otherwise}, which may be slow or not fit; CONTRIBUTING.md explains how to add it",
            stacklevel=2,
        )
    return TARGET_OF.get(name, otherwise)


def scores_in_short(target: str) -> bool:
    """Return whether the update of 2:4 uses ``device.score_of_largest_2_of_4``."""
    # on gfx942 LLVM would then multiply by 1 in ``v_pk_mul_f32``, and no document defines that constant's upper half
    return not target.startswith("gfx")


def configuration(kernel: str, m: int, count: int, target: str) -> Configuration:
    """Configuration of a kernel over ``count`` groups of ``m``, or over single elements."""
    if kernel in ELEMENTS:
        config = ELEMENTS[kernel]
    elif kernel in DRAWING:
        # one group a lane, two for small M: an AMD wave has 64 lanes, a warp 32
        lanes = 64 if target.startswith("gfx") or m <= 4 else 32
        config = Configuration(block=lanes, num_warps=1, steps=8)
    else:
        # a thread has the M columns of one group in registers, of two for small M
        config = Configuration(block=256 if m <= 4 else 128)
    if INTERPRETED:
        # take several steps as well
        return Configuration(block=min(INTERPRETER_BLOCK, power_above(count)), steps=min(config.steps, 2))
    return config


def parts_for(tile: Tiles, blocks: int, steps: int, target: str, weight_bytes: int, results: int) -> int:
    """Number of parts into which a product of ``blocks`` blocks splits the ``steps`` of its sums.

    ``weight_bytes`` are those of the weight, ``results`` the number of sums of a part.
    """
    parts = 1
    enough = tile.least_warps * TARGETS[target].processors
    most = min(MOST_PARTS, steps // LEAST_STEPS, MOST_SUMS * weight_bytes / (2 * 4 * max(results, 1)))
    while blocks * parts * tile.num_warps < enough and 2 * parts <= most:
        parts *= 2
    return nonempty_parts(steps, parts)


def nonempty_parts(steps: int, parts: int) -> int:
    """Number of parts that have a step, if each takes ``ceil(steps / parts)`` of ``steps`` until none is left."""
    steps_of_part = -(-steps // parts)
    return -(-steps // steps_of_part)


def power_above(size: int) -> int:
    """Smallest power of two that is at least ``size`` and 1."""
    return 1 << max(size - 1, 0).bit_length()


def gradient_rows(tokens: int, target: str) -> Rows:
    """Configuration of the sums of squares of a gradient of ``tokens`` tokens."""
    if INTERPRETED:
        return Rows(rows=min(INTERPRETER_ROWS, power_above(tokens)), block=MOST_COLUMNS)
    # the largest power of two that gives every processor a program
    rows = min(power_above(tokens // TARGETS[target].processors + 1) // 2, MOST_ROWS)
    rows = max(rows, 1)
    return Rows(rows=rows, block=min(SQUARES // rows, MOST_COLUMNS), num_warps=8)


def rows_for(rows: int, chunks: int, target: str) -> Rows:
    """Configuration of a packed product of one token, with ``rows`` rows of ``chunks`` chunks."""
    if INTERPRETED:
        return Rows(rows=min(INTERPRETER_ROWS, power_above(rows)), block=power_above(chunks))
    config = next((config for config in PACKED_ROWS if chunks <= config.block), PACKED_ROWS[-1])
    # fewer rows a program if processors would idle
    most = max(1, rows // (2 * TARGETS[target].processors))
    return replace(config, rows=min(config.rows, power_above(most + 1) // 2))


def tiles_for(product: str, m: int, operand: torch.dtype, tokens: int, rows: int, k: int, target: str) -> Tiles:
    """Tiles of a product of ``tokens`` tokens with a weight [rows, k] on a target."""
    if INTERPRETED:
        most = INTERPRETER_TILES
        out = min(most.out, power_above(rows))
        columns = min(most.k, power_above(k))
        return Tiles(out=out, tokens=min(most.tokens, power_above(tokens)), k=max(columns, m))
    return _from_table(product, target, operand.itemsize, tokens, rows, k)


@functools.lru_cache(maxsize=1 << 12)
def _from_table(product: str, target: str, itemsize: int, tokens: int, rows: int, k: int) -> Tiles:
    """Of the tiles with the fewest blocks and least padding, the last that keeps all processors busy, or the first."""
    candidates = tiles_of(product, target, itemsize)
    padded = [(-(-tokens // tile.tokens), tile.tokens) for tile in candidates]
    fitting = [tile for tile, size in zip(candidates, padded, strict=True) if size == min(padded)]
    side, width = ("k", k) if product in ACROSS_COLUMNS else ("out", rows)
    width *= min(padded)[0]
    busy = [tile for tile in fitting if width >= TARGETS[target].processors * getattr(tile, side)]
    return busy[-1] if busy else fitting[0]


def tiles_of(product: str, target: str, itemsize: int) -> tuple[Tiles, ...]:
    """Tiles of a product of operands of ``itemsize`` bytes."""
    if (product, itemsize) in BY_WARPS and multiplies_by_warps(target):
        return BY_WARPS[product, itemsize]
    return TARGETS[target].tiles.get((product, itemsize), TILES[product, itemsize])


def multiplies_by_warps(target: str) -> bool:
    """Return whether the installed Triton is older than ``WARP_GROUPS_SINCE`` of a target."""
    if target not in WARP_GROUPS_SINCE:
        return False
    # at the first product: this module is imported where Triton is not
    version = importlib.import_module("triton").__version__
    release = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    return release < WARP_GROUPS_SINCE[target]
