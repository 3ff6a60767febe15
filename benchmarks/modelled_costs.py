"""Costs of compiled kernels on NVIDIA's GPUs, by a model: nothing is measured, and no GPU is needed.

    python benchmarks/modelled_costs.py --targets sm_90 --patterns 2:4 4:8

Instructions of a kernel are counted by the pipe of a processor that takes them, and each pipe has its own rate on each
architecture. A kernel takes as long as the busiest of its pipes, or of its issue slots, or as its bytes take from
memory. Latencies and matrix units are left out. ``TRITON_INTERPRET`` must not be set.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from aot import PACKED, Built, build, build_packed, build_product, build_sparse

from maskpro_kernels.ops import bounds
from maskpro_kernels.ops.layer_groups import Costs
from maskpro_kernels.ops.pattern import NMPattern
from maskpro_kernels.ops.triton.packed_gemm import MULTIPLIED, chunk_length
from maskpro_kernels.ops.triton.tiles import (
    INTERPRETED,
    PACKED_ROWS,
    TARGETS,
    TILES,
    configuration,
    tiles_for,
    tiles_of,
)

# By pipe: the first part of the instruction's name. "half", at half the rate of FP32: integers but for multiplication,
# comparisons, selections, moves and, from sm_90 on, conversions. "other": branches, barriers, constants and uniform
# instructions, which take an issue slot alone. "tensor": what multiplies matrices.
PIPES = {
    "fp32": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 HADD2 HMUL2 HFMA2",
    "multiply": "IMAD IMUL IDP",
    "half": "IADD3 IADD VIADD IABS LEA LOP3 LOP SHF SHL SHR SGXT BMSK SEL FSEL ISETP FSETP FMNMX FMNMX3 IMNMX VIMNMX "
    "VIMNMX3 VIADDMNMX PRMT MOV CS2R P2R R2P PLOP3 I2FP F2FP I2IP FCHK VOTE R2UR HSETP2 HMNMX2 VHMNMX FSWZADD",
    "fp64": "DADD DMUL DFMA DSETP",
    "xu": "MUFU I2F F2I F2F FRND POPC FLO BREV REDUX CREDUX",
    "lsu": "LDG STG LD ST LDS STS LDL STL LDSM STSM LDGSTS SHFL ATOM ATOMG ATOMS RED REDG MATCH",
    "tensor": "HMMA IMMA QMMA HGMMA QGMMA WARPGROUP UTCHMMA UTCQMMA UTCBAR UTCATOMSWS LDTM STTM UTCCP WARPGROUPDEPBAR",
    "other": "BRA BRX JMP CALL RET EXIT BSSY BSYNC BREAK BAR WARPSYNC DEPBAR LDGDEPBAR LDC LDCU S2R S2UR ULDC NOP "
    "YIELD VOTEU BPT NANOSLEEP MEMBAR FENCE SYNCS ERRBAR CCTL ACQBULK ELECT KILL PREEXIT CGAERRBAR "
    "UCGABAR_WAIT UCGABAR_ARV",
}
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}
# Two results an instruction, which is one issue slot
PAIRED = {"FADD2", "FMUL2", "FFMA2"}


@dataclass(frozen=True)
class Chip:
    """Rates of one GPU.

    Attributes:
        clock: Hz, at which it multiplies matrices at the rate of its data sheet, or a lower one that it holds.
        bytes_per_second: of its memory, by the data sheet.
        lanes: by pipe, threads whose instruction a processor starts in a clock. "fp32" takes integer multiplications as
            well. CUDA C++ Programming Guide, throughput of arithmetic instructions. Which instructions share a pipe is
            said by engineers of NVIDIA's in its forum for developers, threads 108729 and 302018.
    """

    clock: float
    bytes_per_second: float
    lanes: dict[str, int]


# Of 8.0 FP32 at half the rate of 9.0; conversions go to "xu" there. The guide lists 10.0 with the figures of 9.0. All
# issue four instructions of a warp a clock.
_LANES = {"fp32": 64, "half": 64, "fp64": 32, "xu": 16, "lsu": 32, "issue": 128}
CHIPS = {
    # A100 SXM 80 GB, H100 SXM at the clock of the PCIe card, B200
    "sm_80": Chip(1.41e9, 2.039e12, _LANES),
    "sm_90": Chip(1.755e9, 3.35e12, _LANES | {"fp32": 128, "fp64": 64}),
    "sm_100": Chip(1.85e9, 8.0e12, _LANES | {"fp32": 128, "fp64": 64}),
}
GAP = 10.0
SIMULATED_GROUPS = 1 << 20
# Kernels over groups, the kinds of masks, and bytes a weight: logits of float32, weights of 16 bits, codes of 2:4
GROUP_KERNELS = [
    ("sample_masks", "drawn", 4.25),
    ("masked_weight", "drawn", 8),
    ("masked_weight", "codes", 4.25),
    ("score_update_of_layers", "drawn", 8),
    ("score_update_of_layers", "codes", 8.25),
]


@functools.cache
def disassembled(cubin: bytes) -> tuple[str, ...]:
    """Labels, which end in ":", and instructions of SASS."""
    nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout
    lines = []
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_\w+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line)
        if label:
            lines.append(label[1] + ":")
        elif instruction and not instruction[1].startswith("NOP"):
            lines.append(instruction[1])
    return tuple(lines)


def branches(lines: tuple[str, ...]) -> list[tuple[int, int, bool]]:
    """(line, target, true if conditional) of every branch."""
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    targets = ((i, line, re.search(r"\bBRA\b.*?`\((\.L_\w+)\)", line)) for i, line in enumerate(lines))
    # a condition may be in the name, or a uniform predicate after it: BRA.U !UP0
    condition = re.compile(r"@|BRA\.DIV|BRA\S*\s+!?U?P\d")
    return [(i, labels[target[1]], condition.match(line) is not None) for i, line, target in targets if target]


def largest_loop(lines: tuple[str, ...]) -> tuple[int, int]:
    """(first, last) line of the loop with the most lines, which ends in its branch; a product's multiplies."""

    def holds(loop: tuple[int, int], pattern: str) -> bool:
        return any(re.match(pattern, line) for line in lines[loop[0] : loop[1] + 1])

    loops = [(j, i) for i, j, _ in branches(lines) if j < i]
    # where a kernel waits for matrix units it may branch after its end and back, which is no loop
    loops = [loop for loop in loops if not holds(loop, r"EXIT")] or loops
    multiplying = [loop for loop in loops if holds(loop, r"(@!?U?P\w+ )?\w*MMA")]
    return max(multiplying or loops, key=lambda loop: loop[1] - loop[0])


def cost(instruction: str) -> Counter:
    """Lanes that one instruction of a thread takes of its pipe, of "lsu" words of 32 bits; and one issue slot.

    Raises:
        ValueError: if no pipe names the instruction.
    """
    name = re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]
    kind = name.split(".")[0]
    pipe = PIPE_OF.get(kind) or ("other" if kind.startswith("U") else None)
    if pipe is None:
        raise ValueError(f"instruction: expected one that PIPES names, got {instruction}")
    lanes = 2 if kind in PAIRED else 1
    if pipe == "lsu":
        lanes = 4 if ".128" in name or name.endswith(".4") else 2 if ".64" in name or name.endswith(".2") else 1
    return Counter({pipe: lanes, "issue": 1})


def longest_path(lines: tuple[str, ...], first: int, last: int, taken: dict[int, bool]) -> list[int]:
    """Lines from ``first`` to ``last``, an exit, or the end of branches, by the path with the most.

    ``taken`` says of some conditional branches whether they are. No path goes back, nor into a call: what is called is
    the slow path of a division, of numbers that no kernel divides by but at the edge of what float32 holds.
    """
    leads_to = {i: j for i, j, _ in branches(lines)}
    always = {i for i, _, conditional in branches(lines) if not conditional}
    lengths = {first: 0}
    came_from = {}
    ends = []
    for i in range(first, last + 1):
        if i not in lengths or lines[i].startswith("CALL"):
            continue
        ends_here = i == last or re.match(r"EXIT|RET", lines[i]) is not None
        if ends_here:
            ends.append(i)
        following = [] if ends_here or i in always else [i + 1]
        following += [leads_to[i]] if i in leads_to else []
        if i in taken:
            following = [leads_to[i] if taken[i] else i + 1]
        for j in following:
            if i < j <= last and lengths.get(j, -1) < lengths[i] + 1:
                lengths[j] = lengths[i] + 1
                came_from[j] = i
    path = [max(ends or lengths, key=lengths.get)]
    while path[-1] != first:
        path.append(came_from[path[-1]])
    return path


def instructions(lines: tuple[str, ...], looping: bool) -> tuple[Counter, Counter]:
    """(fewest, most) of a thread by pipe: of the largest loop, or of the whole.

    Both go the longest path through it, but fewest after the branch that saves the most has gone the shorter one.
    """
    first, last = largest_loop(lines) if looping else (0, len(lines) - 1)
    forward = [i for i, j, conditional in branches(lines) if conditional and first <= i < j <= last]
    choices = [{}, *({i: taken} for i in forward for taken in (True, False))]
    paths = [longest_path(lines, first, last, choice) for choice in choices]
    # what ends before the others do is no path through
    paths = [path for path in paths if path[0] == paths[0][0] or re.match(r"EXIT|RET", lines[path[0]])]
    counts = [sum((cost(lines[i]) for i in path if not lines[i].endswith(":")), Counter()) for path in paths]
    return min(counts, key=lambda count: count["issue"]), counts[0]


@functools.cache
def open_groups(n: int, m: int, gap: float = GAP) -> float:
    """Share of the groups of a mask of that gap that the kernels' bounds leave open, simulated."""
    integers = torch.randint(0, 1 << 32, (m, SIMULATED_GROUPS), generator=torch.Generator().manual_seed(0))
    kept = integers[:n].amax(0)
    dropped = integers[n:].amin(0)
    return float((bounds.minus_log(dropped) >= gap + bounds.least_gumbel(kept)).double().mean())


def clocks(lanes: dict[str, int], counts: dict[str, float]) -> dict[str, float]:
    """Clocks of a processor by pipe, of instructions of all its threads."""
    counts = dict(counts) | {"fp32": counts.get("fp32", 0) + counts.get("multiply", 0)}
    return {pipe: counts.get(pipe, 0) / count for pipe, count in lanes.items()}


def busiest(target: str, counts: dict[str, float]) -> tuple[float, str]:
    """(picoseconds, pipe) of instructions of all threads, spread over all processors."""
    chip = CHIPS[target]
    clocks_by_pipe = clocks(chip.lanes, counts)
    pipe = max(clocks_by_pipe, key=clocks_by_pipe.get)
    return 1e12 * clocks_by_pipe[pipe] / (TARGETS[target].processors * chip.clock), pipe


def counted(built: Built, weights: float, looping: bool, draws: bool = True) -> tuple[dict, dict]:
    """(fewest, most) instructions a weight by pipe, where a thread has so many weights."""
    counts_of_paths = instructions(disassembled(built.asm["cubin"]), looping)
    fewest, most = ({pipe: count / weights for pipe, count in counts.items()} for counts in counts_of_paths)
    # without noise to skip the branch that saves the most is that around the loop
    return (fewest if draws else most), most


def expected(counts: tuple[dict, dict], groups: int, n: int, m: int, gap: float = GAP) -> dict[str, float]:
    """Instructions by pipe; blocks of ``groups`` compute noise if one of them is open."""
    fewest, most = counts
    clear = (1 - open_groups(n, m, gap)) ** groups
    return {pipe: clear * fewest.get(pipe, 0) + (1 - clear) * count for pipe, count in most.items()}


def picoseconds(target: str, counts: tuple[dict, dict], groups: int, moved: float, n: int, m: int) -> float:
    """Cost of a weight by the busiest pipe or by bytes."""
    return max(busiest(target, expected(counts, groups, n, m))[0], 1e12 * moved / CHIPS[target].bytes_per_second)


def mask_costs(target: str) -> Costs:
    """The row of ``ops.layer_groups.COSTS`` of a target, at 2:4."""

    def over_groups(kernel: str, kind: str, moved: float) -> float:
        config = configuration(kernel, 4, 0, target)
        built = build(kernel, target, 2, 4, KIND=kind)
        counts = counted(built, config.block * 4 / (32 * config.num_warps), looping=True)
        return picoseconds(target, counts, config.block, moved, 2, 4)

    def product(kind: str, moved: float) -> float:
        tile = tiles_for("masked_linear", 4, torch.bfloat16, 16, 4096, 4096, target)
        built = build_product("masked_linear", target, 2, 4, tile, KIND=kind)
        counts = counted(built, tile.out * tile.k / (32 * tile.num_warps), looping=True)
        return picoseconds(target, counts, tile.out * tile.k // 4, moved, 2, 4)

    draw, *costs = (over_groups(*kernel) for kernel in GROUP_KERNELS)
    # in the epilogue of a product: what a draw takes of the pipes, and what codes take of memory
    slope = draw, 1e12 * 0.25 / CHIPS[target].bytes_per_second
    return Costs(draw, (product("drawn", 6), product("codes", 2.25)), tuple(costs[:2]), slope, tuple(costs[2:]))


def print_kernels(target: str, n: int, m: int) -> None:
    """One line a kernel and tile, operands of 16 bits: draws that are determined, and those that compute noise."""

    def print_row(kernel: str, built: Built, counts: tuple[dict, dict]) -> None:
        (shortest, pipe), (longest, _) = (busiest(target, count) for count in counts)
        slots = " ".join(f"{count['issue']:>10.1f}" for count in counts)
        print(
            f"{kernel:<52} {f'{n}:{m}':>5} {target:>6} {built.registers:>5} {built.spills + built.stack:>5} "
            f"{built.shared / 1024:>6.1f} {slots} {shortest:>7.2f} {longest:>7.2f}  {pipe}",
            flush=True,
        )

    for kernel, kind, _ in GROUP_KERNELS:
        # above that N the score takes the noise, which codes do not give
        if kind == "drawn" or n <= 4:
            config = configuration(kernel, m, 0, target)
            built = build(kernel, target, n, m, KIND=kind)
            print_row(f"{kernel}, {kind}", built, counted(built, config.block * m / (32 * config.num_warps), True))
    for product, itemsize in TILES:
        for tile in tiles_of(product, target, itemsize) if itemsize == 2 and product not in PACKED else ():
            # those with a tile of the weight's gradient draw once, after their loop over the tokens
            looping = product in ("masked_linear", "masked_linear_input_grad")
            for kind in ("drawn", "codes"):
                built = build_product(product, target, n, m, tile, KIND=kind)
                counts = counted(built, tile.out * tile.k / (32 * tile.num_warps), looping, kind == "drawn")
                print_row(f"{product} {tile.out}x{tile.tokens}x{tile.k}, {kind}", built, counts)
    if (n, m) not in MULTIPLIED:
        return
    for config in PACKED_ROWS:
        built = build_packed("packed_vector", target, n, m, config)
        weights = config.rows * config.block * chunk_length(n, m) / (32 * config.num_warps)
        print_row(f"packed_vector {config.rows}x{config.block}", built, counted(built, weights, True, draws=False))
    for tile in tiles_of("packed_linear", target, 2):
        built = build_packed("packed_linear", target, n, m, tile)
        counts = counted(built, tile.out * tile.k / (32 * tile.num_warps), True, draws=False)
        print_row(f"packed_linear {tile.out}x{tile.tokens}x{tile.k}", built, counts)
    for tile in tiles_of("sparse_mma", target, 2) if (n, m) == (2, 4) else ():
        built = build_sparse(target, tile)
        counts = counted(built, tile.out * tile.k / (32 * tile.num_warps), True, draws=False)
        lines = disassembled(built.asm["cubin"])
        first, last = largest_loop(lines)
        products = sum(line.startswith("HMMA.SP") for line in lines[first:last])
        loop = sum(not line.endswith(":") for line in lines[first : last + 1])
        print_row(f"sparse_mma {tile.out}x{tile.tokens}x{tile.k}, HMMA.SP {products} of {loop}", built, counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--patterns", nargs="+", type=NMPattern, default=[NMPattern("2:4")], metavar="N:M")
    arguments = parser.parse_args()
    if INTERPRETED:
        parser.error("TRITON_INTERPRET: expected to be unset, for what is interpreted is not compiled")
    print(f"{'kernel':<52} {'N:M':>5} {'target':>6} {'regs':>5} {'stack':>5} {'KiB':>6} ", end="")
    print(f"{'determined':>10} {'drawn':>10} {'ps':>7} {'drawn':>7}   (issue slots and picoseconds a weight)")
    for target in arguments.targets:
        for pattern in arguments.patterns:
            print_kernels(target, pattern.n, pattern.m)
    for target in arguments.targets:
        costs = mask_costs(target)._asdict()
        rounded = {k: tuple(round(x, 1) for x in v) if isinstance(v, tuple) else round(v, 1) for k, v in costs.items()}
        print(f'"{target}": Costs({", ".join(f"{name}={value}" for name, value in rounded.items())}),', flush=True)


if __name__ == "__main__":
    main()
