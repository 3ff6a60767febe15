"""Blocks of AMDGCN that divide in 64 bits, as lanes do whose operands need them, and what stands behind."""

from __future__ import annotations

from .parser import Instruction, Kernel, Label

# By which LLVM begins such a division
FIRST_GUESS = "0x5f7ffffc"


def divides_in_64_bits(block: list[Instruction]) -> bool:
    return any(FIRST_GUESS in ins.text for ins in block)


def targets(block: list[Instruction]) -> set[int]:
    """The blocks that the end of one may branch to."""
    return {operand.block for operand in block[-1].operands if isinstance(operand, Label)}


def only_after_long_divisions(kernel: Kernel, number: int) -> bool:
    """Whether a block runs where no lane of a wave has divided in 32 bits.

    LLVM divides in turn for lanes that need 64 bits and for the others, and leaves either out where there are none:

        s_and_saveexec ...; s_cbranch_execnz LONG
        s_andn2_saveexec ...; s_cbranch_execnz SHORT
        the block

    ``SHORT`` has what follows by itself, and goes elsewhere.
    """
    blocks = kernel.blocks
    if number < 2 or blocks[number - 1][0].opcode != "s_andn2_saveexec_b64":
        return False
    if {block[-1].opcode for block in blocks[number - 2 : number]} != {"s_cbranch_execnz"}:
        return False
    ways = [other for other, block in enumerate(blocks) if number in targets(block)]
    return all(divides_in_64_bits(blocks[other]) for other in (*targets(blocks[number - 2]), *ways))
