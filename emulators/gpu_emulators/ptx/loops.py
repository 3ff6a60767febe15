"""Blocks of PTX that run in place of a loop that takes no step."""

from __future__ import annotations

from .parser import Immediate, Instruction, Kernel, Label, Pair, Register, Vector

# What has no memory and no result: a value of each place, of zero or of what else the loop's end needs
WITHOUT_A_STEP = {"mov", "shl", "shr", "and", "or", "add", "sub", "cvt", "prmt", "bra"}
WITHOUT_A_RESULT = {"st", "red", "bra", "ret", "exit", "trap", "bar", "barrier", "cp", "mbarrier", "fence"}


def successors(blocks: list[list[Instruction]], number: int) -> set[int]:
    """The blocks that may run behind one."""
    last = blocks[number][-1]
    found = {operand.block for operand in last.operands if isinstance(operand, Label)}
    if last.opcode[0] not in ("bra", "ret", "exit", "trap") or last.guard is not None:
        found.add(number + 1)
    return found


def reached_from(blocks: list[list[Instruction]], start: int) -> set[int]:
    """The blocks that may run behind one, at whatever distance."""
    found, open_ones = set(), [start]
    while open_ones:
        new = successors(blocks, open_ones.pop()) - found
        found |= new
        open_ones += new
    return found


def registers(operand) -> set[int]:
    if isinstance(operand, Vector):
        return set().union(*map(registers, operand.operands))
    if isinstance(operand, Pair):
        return registers(operand.first) | registers(operand.second)
    return {operand.index} if isinstance(operand, Register) else set()


def set_by(ins: Instruction) -> set[int]:
    """The registers that an instruction sets, its first operand."""
    return set() if ins.opcode[0] in WITHOUT_A_RESULT or not ins.operands else registers(ins.operands[0])


def set_in(block: list[Instruction]) -> set[int]:
    return set().union(*map(set_by, block))


def zeros(block: list[Instruction]) -> set[int]:
    """The registers that are zero behind a block, by its own constants."""
    found: set[int] = set()
    for ins in block:
        source = ins.operands[1] if ins.opcode[0] == "mov" else None
        is_zero = source in (Immediate(0), Immediate(0, 32)) or registers(source) & found
        found = found | set_by(ins) if is_zero else found - set_by(ins)
    return found


def only_goes_to(kernel: Kernel, number: int) -> int | None:
    """The block to which another one branches without doing anything else; None where it does more."""
    (first, *rest), next_ones = kernel.blocks[number], successors(kernel.blocks, number)
    return next(iter(next_ones)) if not rest and first.opcode[0] == "bra" and len(next_ones) == 1 else None


def replaces_a_loop(kernel: Kernel, number: int) -> bool:
    """Whether a block sets all sums of a loop to zero, and goes on behind that loop.

    A loop's sums are the registers that it sets, or the block by which it is left, and that this block sets too.
    """
    blocks = kernel.blocks
    block, next_ones = blocks[number], successors(blocks, number)
    if not {ins.opcode[0] for ins in block} <= WITHOUT_A_STEP or len(next_ones) != 1:
        return False
    (behind,) = next_ones
    reached = [reached_from(blocks, other) for other in range(len(blocks))]
    after = reached[behind] | {behind}
    loop = {other for other, those in enumerate(reached) if other in those and behind in those} - after
    left_by = {other for other in range(len(blocks)) if behind in successors(blocks, other)} - {number}
    if not loop or not any(left_by & (reached[other] | {other}) for other in loop):
        return False
    sums = set().union(*(set_in(blocks[other]) for other in loop | left_by)) & set_in(block)
    return bool(sums) and sums <= zeros(block)
