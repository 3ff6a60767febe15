"""Launch tables: how each kernel is launched on each GPU architecture, and how an entry of a table is chosen.

A target is an architecture with entries of its own. Every other architecture takes those of a target. CONTRIBUTING.md
tells how to add a tile, and how to add an architecture. Entries that ``make tune`` has measured, files of the folder
``tuned``, take the place of the ones here when this module is imported. Nothing is tuned at run time.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from dataclasses import dataclass, replace

import torch

from . import tuned

# As triton reads it when it is imported
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

# The target whose entries CPU tensors take on their way to the kernels: in Triton's interpreter, or by a driver of
# Triton's that executes on a CPU what is compiled, and sets its target here. None: they go to no kernel.
ON_CPU: str | None = "sm_90" if INTERPRETED else None


@dataclass(frozen=True, kw_only=True)
class _CompileOptions:
    """How a kernel is compiled: warps and stages, and the most registers a thread may take (None: as ptxas likes)."""

    num_warps: int = 4
    num_stages: int = 3
    registers: int | None = None

    def options(self, target: str) -> dict[str, int]:
        """Triton's, for the architecture ``target``."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.registers is not None and target.startswith("sm_"):
            options["maxnreg"] = self.registers
        return options


@dataclass(frozen=True)
class Configuration(_CompileOptions):
    """How a kernel over groups is launched: groups that a program takes at a time, and how often it does at most."""

    block: int
    steps: int = 1

    def programs(self, groups: int, processors: int) -> int:
        """How many programs share out that many groups: fewer steps each where processors would idle."""
        blocks = -(-groups // self.block)
        return min(blocks, max(-(-blocks // self.steps), PROGRAMS_A_PROCESSOR * processors))


# Twice the 32 programs of one warp that a processor holds at a time: the last ones to start leave few processors idle
PROGRAMS_A_PROCESSOR = 64

# By kernel and M. A thread holds the M columns of one group in registers, of two where M is small. The quadrature of a
# log-probability runs NODES passes over them, so it too takes a group a thread.
_CONFIGURATIONS: dict[tuple[str, int], Configuration] = {
    (kernel, m): Configuration(block=256 if m <= 4 else 128)
    for kernel in (
        "top_n_mask",
        "mask_log_prob",
        "mask_score",
        "best_swaps",
        "descend",
        "unpack",
    )
    for m in (2, 4, 8, 16)
}

# Of single weights, not of groups
_CONFIGURATIONS |= {("adamw", m): Configuration(block=1024) for m in (2, 4, 8, 16)}

# What draws: one warp, whose threads hold random words beside the columns. A block with a single draw that is not
# determined computes the noise of all of its groups, and several warps would wait for each other to know. So short a
# program is not worth its launch, nor what it computes for all groups alike: it takes several blocks.
_CONFIGURATIONS |= {
    (kernel, m): Configuration(block=64 if m <= 4 else 32, num_warps=1, steps=8)
    for kernel in ("sample_mask", "masked_weight", "score_update", "score_updates")
    for m in (2, 4, 8, 16)
}
# With one group a thread Triton 3.6's ptxas puts 8 bytes of it on the stack on sm_90 and sm_100
_CONFIGURATIONS["descend", 16] = Configuration(block=256)

# Of all layers of a model by one launch
_CONFIGURATIONS |= {
    (of_layers, m): _CONFIGURATIONS[kernel, m]
    for of_layers, kernel in (
        ("sample_masks", "sample_mask"),
        ("score_update_of_layers", "score_update"),
        ("score_updates_of_layers", "score_updates"),
    )
    for m in (2, 4, 8, 16)
}

# Left alone, ptxas aims at 128 registers of M = 8 on sm_80 with Triton 3.6, and at 168 of M = 16 and 16 bits on sm_90
# with 3.9, and puts 8 bytes on the stack
_CONFIGURATIONS["score_updates_of_layers", 8] = Configuration(block=32, num_warps=1, steps=8, registers=144)
_CONFIGURATIONS["score_updates_of_layers", 16] = Configuration(block=32, num_warps=1, steps=8, registers=192)

# How kernels over single elements are launched
_ELEMENTS: dict[str, Configuration] = {"split_sum": Configuration(block=256), "metadata": Configuration(block=512)}


@dataclass(frozen=True)
class Rows(_CompileOptions):
    """How a kernel over rows of chunks is launched: rows a program, chunks of each that it takes at a time."""

    rows: int
    block: int


@dataclass(frozen=True)
class Tiles(_CompileOptions):
    """How a masked product is launched: how many rows, tokens and columns of K a program multiplies at a time."""

    out: int
    tokens: int
    k: int


# The target whose entries an architecture takes. Cards of 8.6, 8.7, 8.9 and 12.x multiply by the instruction mma.sync,
# as those of 8.0 do: 12.x has neither wgmma nor tcgen05. They have at least 99 KiB of shared memory a block, into which
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

# What an integer argument is a multiple of where Triton compiles a kernel for aligned rows
ALIGNED = 16

# Streaming multiprocessors or compute units: as many programs leave none idle. They are the target's on whatever card
# takes its entries, and so are the numbers of tokens below. For they decide into how many parts a sum is split, and who
# adds it up, and with these its bits: cards of one target agree.
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}

# Most tokens for which a mask is applied inside the product, rather than to a transient masked weight: one block of
# them, for a second one would find every mask again. The gradient of the weight finds it once either way, and takes the
# same limit: its small tiles lose to torch's beyond a few hundred.
ONE_PASS_TOKENS = {"sm_80": 128, "sm_90": 128, "sm_100": 128, "gfx942": 128}
# Of those that are drawn there, by the cost model: a B200's memory is so fast that the draw bounds the time, which the
# product lengthens. docs/kernels.md has the figures; the model knows nothing of gfx942.
DRAWN_TOKENS = {"sm_80": 128, "sm_90": 128, "sm_100": 32, "gfx942": 128}

# Most tokens for which one kernel computes the gradient of a masked weight and steps the logits, with a mask that is
# known, as in a step that draws its masks once. Beyond, torch's product is faster by more than it takes to write and
# read its result, by the cost model: docs/kernels.md has the figures. torch for ROCm has no product of 16 bits with a
# result in float32.
FUSED_TOKENS = {"sm_80": 1024, "sm_90": 256, "sm_100": 96, "gfx942": sys.maxsize}
# With a mask that the kernel draws: on a B200 that bounds either way, and takes less behind torch's product.
FUSED_DRAWN_TOKENS = FUSED_TOKENS | {"sm_100": 32}

# Most tokens for which a packed weight is unpacked inside the product. Beyond, tensor cores bound the time, not bytes
PACKED_TOKENS = {"sm_80": 64, "sm_90": 64, "sm_100": 64, "gfx942": 64}

# By kernel, entries for short weight rows before those for long ones. A thread holds one chunk of each of its rows, so
# that many loads are under way at once; a chunk of the activations is loaded once for all of them.
_ROWS: dict[str, tuple[Rows, ...]] = {
    "packed_vector": (
        Rows(rows=4, block=32, num_warps=1),
        Rows(rows=4, block=64, num_warps=2),
        Rows(rows=4, block=128, num_warps=4),
    )
}

# By product and bytes of an operand; of as many tokens, smaller tiles before larger ones, see ``_from_table``. With few
# tokens the draw bounds the time: small tiles then, so that no processor idles and a thread holds two groups of 4. With
# many, larger ones, so that x is not read too often; in 16 bits those of 64 weight rows reach wgmma and tcgen05. Where
# ptxas, left alone, aims at a number of registers that puts a value on the stack for some pattern, the tile names the
# most that it may take.
_TILES: dict[tuple[str, int], tuple[Tiles, ...]] = {
    ("masked_linear", 2): (
        Tiles(out=16, tokens=16, k=64),
        Tiles(out=32, tokens=32, k=64, registers=144),
        Tiles(out=32, tokens=64, k=64, num_warps=8, registers=160),
        # Not 3 stages: with weights of 4 bytes, as under autocast, they exceed the 99 KiB of cards of 8.6
        Tiles(out=64, tokens=128, k=64, num_warps=8, num_stages=2, registers=248),
    ),
    ("masked_linear", 4): (
        Tiles(out=16, tokens=16, k=64),
        # Not 4 warps: at 4:8 the log-probability then puts 48 bytes on the stack on sm_100
        Tiles(out=16, tokens=32, k=64, num_warps=8),
        Tiles(out=16, tokens=64, k=32, num_warps=8, registers=248),
        Tiles(out=32, tokens=64, k=16, num_warps=8, registers=248),
        # Not 4 warps: each thread's part of the product alone would be more than its registers hold
        Tiles(out=16, tokens=128, k=16, num_warps=8, registers=248),
        Tiles(out=32, tokens=128, k=16, num_warps=8, registers=248),
    ),
    ("masked_linear_input_grad", 2): (
        # rows of 64 bytes, two sectors of memory, in each
        Tiles(out=32, tokens=16, k=32),
        Tiles(out=32, tokens=32, k=32),
        Tiles(out=32, tokens=64, k=32),
        # Not 3 stages: at 1:2 they leave a value on the stack on sm_100; nor 192 registers, with Triton 3.6 on sm_90
        Tiles(out=64, tokens=128, k=64, num_warps=8, num_stages=2, registers=200),
    ),
    ("masked_linear_input_grad", 4): (
        Tiles(out=64, tokens=16, k=16),
        Tiles(out=64, tokens=32, k=16),
        # Left alone, for with 160 registers or more Triton 3.9's ptxas puts 8 bytes on the stack at 2:4 by codes
        Tiles(out=32, tokens=64, k=16),
        Tiles(out=32, tokens=64, k=32, num_warps=8),
        Tiles(out=32, tokens=128, k=32, num_warps=8, registers=255),
    ),
    # Left alone, ptxas of Triton 3.6 aims at 80 registers on sm_100, and puts 8 bytes on the stack
    ("masked_linear_weight_grad", 2): (Tiles(out=64, tokens=32, k=64, num_warps=8, registers=128),),
    ("masked_linear_weight_grad", 4): (Tiles(out=32, tokens=32, k=64),),
    ("straight_through", 2): (Tiles(out=64, tokens=32, k=64, num_warps=8, registers=192),),
    ("straight_through", 4): (Tiles(out=32, tokens=32, k=64, registers=168),),
    # torch has multiplied: no tokens are left, and a tile's count for nothing
    ("straight_through_step", 2): (Tiles(out=16, tokens=1, k=64),),
    ("straight_through_step", 4): (Tiles(out=16, tokens=1, k=64),),
}
# What gradients of the input take of large groups in float32. More warps than those above, for registers.
_WIDE_INPUT_GRAD = (
    Tiles(out=64, tokens=16, k=32, num_warps=8, registers=168),
    Tiles(out=32, tokens=32, k=32, num_warps=8, registers=168),
    Tiles(out=32, tokens=64, k=32, num_warps=8, registers=168),
)
# What products of large groups take in place of the entries of ``_TILES``, by M as well, on every target, whatever
# entries of its own it has. Tiles that are missing, have other warps or name no registers here put up to 32 bytes on
# the stack: by codes, under drawn masks, of logits in bfloat16, or of 1:32 with its log-probability.
_TILES_OF_LARGE_GROUPS: dict[tuple[str, int, int], tuple[Tiles, ...]] = {
    ("masked_linear_input_grad", 2, 16): tuple(
        replace(tile, registers=tile.registers or 168) for tile in _TILES["masked_linear_input_grad", 2]
    ),
    ("masked_linear_input_grad", 4, 16): (
        *_WIDE_INPUT_GRAD,
        Tiles(out=16, tokens=128, k=32, num_warps=8, registers=255),
    ),
    ("straight_through_step", 2, 16): (Tiles(out=16, tokens=1, k=64, registers=128),),
    ("straight_through_step", 4, 16): (Tiles(out=16, tokens=1, k=64, registers=128),),
}
TILES = {(product, target, size): tiles for (product, size), tiles in _TILES.items() for target in PROCESSORS}

# Of packed weights, all of 16 bits. Weight rows enough for wgmma and tcgen05, which read shared memory by themselves:
# by mma.sync each warp loads the tile of x, and that takes longer than to load the weight. From 32 tokens on the L2
# cache bounds the time, which gives x to each block of weight rows: more of these then.
_PACKED_TILES = (
    Tiles(out=64, tokens=16, k=128),
    Tiles(out=128, tokens=32, k=64, num_warps=8),
    Tiles(out=128, tokens=64, k=64, num_warps=8),
)
PACKED_TILES = {("packed_linear", target, 2): _PACKED_TILES for target in PROCESSORS}

# The others by target as well
CONFIGURATIONS = {
    (kernel, target, m): config for (kernel, m), config in _CONFIGURATIONS.items() for target in PROCESSORS
}
ELEMENTS = {(kernel, target): config for kernel, config in _ELEMENTS.items() for target in PROCESSORS}
ROWS = {(kernel, target): rows for kernel, rows in _ROWS.items() for target in PROCESSORS}

TABLES = (CONFIGURATIONS, ELEMENTS, ROWS, TILES, PACKED_TILES)
# Entries that differ from those of the other targets, by the keys of the tables
_OWN: dict[tuple, Configuration | tuple[Rows, ...] | tuple[Tiles, ...]] = {
    # With 3 stages Triton 3.9's ptxas aims at 56 registers by codes, and puts 8 bytes on the stack. A cap would do as
    # well, but ptxas then takes more registers wherever masks are drawn.
    ("masked_linear", "sm_100", 2): tuple(
        replace(tile, num_stages=4) if tile.tokens == 16 else tile for tile in _TILES["masked_linear", 2]
    ),
    # With 3 stages ptxas puts 8 bytes on the stack at 4:8 or 8:16 in int8; left alone, with 2 on sm_80 as well
    ("packed_linear", "sm_80", 2): (*_PACKED_TILES[:2], replace(_PACKED_TILES[2], num_stages=2, registers=160)),
    ("packed_linear", "sm_100", 2): (*_PACKED_TILES[:2], replace(_PACKED_TILES[2], num_stages=2)),
    # a wave of AMD has 64 lanes, all of which should have a group
    **{
        (kernel, "gfx942", m): replace(config, block=64)
        for (kernel, m), config in _CONFIGURATIONS.items()
        if config.block < 64
    },
}
for _key, _entry in _OWN.items():
    (_table,) = (table for table in TABLES if _key in table)
    _table[_key] = _entry
tuned.lay_files_over(TABLES, tuple(PROCESSORS))

# Of products that are split. Warps of a processor: three a scheduler hide what one waits for, and sums of more parts
# are more bytes. Steps of a part, so that loads run ahead of their use; parts, whose sums are read again.
LEAST_WARPS, LEAST_STEPS, MOST_PARTS = 12, 2, 16

# The dimension of the weight along which a product's results lie
RESULT_SIDE = {
    "masked_linear": "out",
    "packed_linear": "out",
    "masked_linear_input_grad": "k",
    "masked_linear_weight_grad": "out",
    "straight_through": "out",
    "straight_through_step": "out",
}

# The interpreter runs one program at a time through numpy: the cost is by call, not by element
INTERPRETER_BLOCK = 1 << 16
INTERPRETER_ROWS = 64
INTERPRETER_TILES = Tiles(out=512, tokens=128, k=512)


def fused_tokens(kind: str, target: str) -> int:
    """Most tokens for which one kernel multiplies and takes what follows, under a mask of that kind."""
    return (FUSED_DRAWN_TOKENS if kind == "drawn" else FUSED_TOKENS)[target]


@functools.cache
def architecture(device: torch.device) -> str:
    """The target whose entries of the tables a device takes.

    Warns once of each architecture that ``TARGET_OF`` does not have, and names the target that is taken instead.
    """
    if device.type == "cpu":
        return ON_CPU
    name = own_architecture(device)
    return _target_of(name, AMD_TARGET if name.startswith("gfx") else NVIDIA_TARGET)


def own_architecture(device: torch.device) -> str:
    """The name of a GPU's architecture, whether or not the tables know it."""
    if torch.version.hip is not None:
        # such as gfx942:sramecc+:xnack-
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def _target_of(name: str, otherwise: str) -> str:
    if name not in TARGET_OF:
        warnings.warn(
            f"GPU architecture {name}: expected one of {', '.join(TARGET_OF)}; its kernels are launched with the tiles "
            f"of {otherwise}, which may be slow or not fit; CONTRIBUTING.md tells how to add it",
            stacklevel=2,
        )
    return TARGET_OF.get(name, otherwise)


def scores_in_short(target: str) -> bool:
    """Whether the update of 2:4 takes ``device.score_of_largest_2_of_4``.

    On gfx942 LLVM then multiplies two scaled logits at a time by 1 (``v_pk_mul_f32`` with the constant 1.0), and no
    document defines that constant's upper half.
    """
    return not target.startswith("gfx")


def configuration(kernel: str, m: int, groups: int, target: str) -> Configuration:
    """The configuration of a kernel for groups of ``m`` on a target."""
    if INTERPRETED:
        # as many steps as there are programs with several
        steps = min(CONFIGURATIONS[kernel, target, m].steps, 2)
        return Configuration(block=min(INTERPRETER_BLOCK, power_above(groups)), steps=steps)
    return CONFIGURATIONS[kernel, target, m]


def elements(kernel: str, count: int, target: str) -> Configuration:
    """The configuration of a kernel over ``count`` single elements."""
    if INTERPRETED:
        return Configuration(block=min(INTERPRETER_BLOCK, power_above(count)))
    return ELEMENTS[kernel, target]


def parts_for(tile: Tiles, blocks: int, steps: int, target: str) -> int:
    """Into how many parts a product of so many blocks splits the dimension that each of them sums in ``steps``.

    As few as give every processor LEAST_WARPS, each part of at least LEAST_STEPS.
    """
    parts, enough = 1, LEAST_WARPS * PROCESSORS[target]
    while blocks * parts * tile.num_warps < enough and 2 * parts * LEAST_STEPS <= steps and parts < MOST_PARTS:
        parts *= 2
    return parts


def power_above(size: int) -> int:
    """The smallest power of two that is at least ``size`` and 1."""
    return 1 << max(size - 1, 0).bit_length()


def rows_for(kernel: str, rows: int, chunks: int, target: str) -> Rows:
    """The configuration of a kernel over rows for that many rows of that many chunks."""
    if INTERPRETED:
        return Rows(rows=min(INTERPRETER_ROWS, power_above(rows)), block=power_above(chunks))
    configs = ROWS[kernel, target]
    fitting = [config for config in configs if chunks <= config.block]
    config = fitting[0] if fitting else configs[-1]
    # fewer rows a program where processors would idle
    most = max(1, rows // (2 * PROCESSORS[target]))
    return replace(config, rows=min(config.rows, power_above(most + 1) // 2))


def tiles_for(product: str, m: int, operand: torch.dtype, tokens: int, rows: int, k: int, target: str) -> Tiles:
    """The tiles of a masked product of that many tokens with a weight [rows, k] on a target."""
    if INTERPRETED:
        most = INTERPRETER_TILES
        out, columns = min(most.out, power_above(rows)), min(most.k, power_above(k))
        return Tiles(out=out, tokens=min(most.tokens, power_above(tokens)), k=max(columns, m))
    return _from_table(product, target, m, operand.itemsize, tokens, rows, k)


@functools.lru_cache(maxsize=1 << 12)
def _from_table(product: str, target: str, m: int, itemsize: int, tokens: int, rows: int, k: int) -> Tiles:
    """Of the table's tiles those that hold the tokens in the fewest blocks, with the least padding; of these the last
    that still gives every processor a program, or else the first.
    """
    candidates = tiles_of(product, target, itemsize, m)
    padded = [(-(-tokens // tile.tokens), tile.tokens) for tile in candidates]
    fitting = [tile for tile, size in zip(candidates, padded, strict=True) if size == min(padded)]
    side = RESULT_SIDE[product]
    width = rows if side == "out" else k
    busy = [tile for tile in fitting if width >= PROCESSORS[target] * getattr(tile, side)]
    return busy[-1] if busy else fitting[0]


def tiles_of(product: str, target: str, itemsize: int, m: int) -> tuple[Tiles, ...]:
    """What a product of operands of ``itemsize`` bytes has to choose from for groups of ``m``."""
    entries = (TILES | PACKED_TILES)[product, target, itemsize]
    entries = _TILES_OF_LARGE_GROUPS.get((product, itemsize, m), entries)
    return tuple(of_groups(tile, m, target) for tile in entries)


def of_groups(tile: Tiles, m: int, target: str) -> Tiles:
    """A tile of the table as products of groups of ``m`` take it: whole groups, and registers enough for these.

    On gfx942 registers are given by fewer warps.
    """
    tile = replace(tile, k=max(tile.k, m))
    if m != 32:
        return tile
    if target.startswith("gfx"):
        # of twice as many warps a thread has half of the registers, and spills up to 180 of a group's values
        return replace(tile, num_warps=min(tile.num_warps, 4))
    # All there are: with a lower cap ptxas puts up to 24 bytes of a group of 32 on the stack of sm_80
    return replace(tile, registers=min(255, 65536 // (32 * tile.num_warps)))
