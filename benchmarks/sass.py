"""SASS of compiled kernels: which pipe of a processor takes each instruction, and how many of them run."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton

# By pipe: the first part of the instruction's name. "half", at half the rate of FP32: integers but for multiplication,
# comparisons, selections, moves and, from sm_90 on, conversions. "other": branches, barriers, constants and uniform
# instructions, which take an issue slot alone. "tensor": what multiplies matrices, whose time is that of the product.
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
_PIPE = {name: pipe for pipe, names in PIPES.items() for name in names.split()}
# Two results an instruction, which is one issue slot
_PAIRED = {"FADD2", "FMUL2", "FFMA2"}


@functools.cache
def disassembled(cubin: bytes) -> tuple[str, ...]:
    """Labels, which end in ":", and instructions."""
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


def _branches(lines: tuple[str, ...]) -> list[tuple[int, int, bool]]:
    """(where it stands, where it leads, whether on a condition) of every branch."""
    where = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    targets = ((i, line, re.search(r"\bBRA\b.*?`\((\.L_\w+)\)", line)) for i, line in enumerate(lines))
    # a condition may stand in the name, or a uniform predicate behind it: BRA.U !UP0
    condition = re.compile(r"@|BRA\.DIV|BRA\S*\s+!?U?P\d")
    return [(i, where[target[1]], condition.match(line) is not None) for i, line, target in targets if target]


def largest_loop(lines: tuple[str, ...]) -> tuple[int, int]:
    """(first, last) line of the loop with the most lines, which ends in its branch; a product's multiplies."""
    loops = [(j, i) for i, j, _ in _branches(lines) if j < i]
    # where a kernel waits for matrix units it may branch behind its end and back, which is no loop
    loops = [loop for loop in loops if not _holds(lines, loop, r"EXIT")] or loops
    multiplying = [loop for loop in loops if _holds(lines, loop, r"(@!?U?P\w+ )?\w*MMA")]
    return max(multiplying or loops, key=lambda loop: loop[1] - loop[0])


def _holds(lines: tuple[str, ...], loop: tuple[int, int], pattern: str) -> bool:
    first, last = loop
    return any(re.match(pattern, line) for line in lines[first : last + 1])


def pipe_of(instruction: str) -> str:
    """A key of PIPES. Raises ValueError for an instruction that none of them names."""
    name = re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]
    if name in _PIPE:
        return _PIPE[name]
    if name.startswith("U"):
        return "other"
    raise ValueError(f"instruction: expected one that sass.PIPES names, got {instruction}")


def cost(instruction: str) -> Counter:
    """What one instruction of a thread takes of each pipe: lanes, of "lsu" words of 32 bits; and one issue slot."""
    pipe = pipe_of(instruction)
    name = re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]
    lanes = 1
    if pipe == "lsu":
        lanes = 4 if ".128" in name or name.endswith(".4") else 2 if ".64" in name or name.endswith(".2") else 1
    elif name.split(".")[0] in _PAIRED:
        lanes = 2
    return Counter({pipe: lanes, "issue": 1})


def _longest_way(lines: tuple[str, ...], first: int, last: int, taken: dict[int, bool]) -> list[int]:
    """Lines from ``first`` to ``last`` or an exit, or as far as the branches lead, by the way with the most.

    ``taken`` tells of some conditional branches whether they are. No way goes back, nor into a call: what is called is
    the slow way of a division, of numbers that no kernel divides by but at the edge of what float32 holds.
    """
    branches = _branches(lines)
    leads_to = {i: j for i, j, _ in branches}
    always = {i for i, _, conditional in branches if not conditional}
    most, came_from, ends = {first: 0}, {}, []
    for i in range(first, last + 1):
        if i not in most or lines[i].startswith("CALL"):
            continue
        ends_here = i == last or re.match(r"EXIT|RET", lines[i]) is not None
        if ends_here:
            ends.append(i)
        following = [] if ends_here or i in always else [i + 1]
        following += [leads_to[i]] if i in leads_to else []
        if i in taken:
            following = [leads_to[i] if taken[i] else i + 1]
        for j in following:
            if i < j <= last and most.get(j, -1) < most[i] + 1:
                most[j], came_from[j] = most[i] + 1, i
    way = [max(ends or most, key=most.get)]
    while way[-1] != first:
        way.append(came_from[way[-1]])
    return way


def instructions(lines: tuple[str, ...], looping: bool) -> tuple[Counter, Counter]:
    """(fewest, most) of a thread by pipe: of the largest loop, or of the whole.

    Both go the longest way through it, but fewest after the branch that saves the most has gone the shorter one.
    """
    first, last = largest_loop(lines) if looping else (0, len(lines) - 1)
    forward = [i for i, j, conditional in _branches(lines) if conditional and first <= i < j <= last]
    choices = [{}, *({i: taken} for i in forward for taken in (True, False))]
    ways = [_longest_way(lines, first, last, choice) for choice in choices]
    # what ends before the others do not is no way through
    ways = [way for way in ways if way[0] == ways[0][0] or re.match(r"EXIT|RET", lines[way[0]])]

    def count(way: list[int]) -> Counter:
        return sum((cost(lines[i]) for i in way if not lines[i].endswith(":")), Counter())

    counts = [count(way) for way in ways]
    return min(counts, key=lambda each: each["issue"]), counts[0]
