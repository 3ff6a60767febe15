"""A compiled kernel as a program that runs on a CPU."""

from __future__ import annotations

import numpy as np

from ..findings import Findings
from ..global_memory import GlobalMemory
from .access import SPACES
from .batch import Batch
from .control import Control, translate_blocks
from .parser import UNSIGNED, Immediate, Instruction, Kernel, Vector, parse
from .shared_memory import SharedMemory

# what reads shared memory past the generic proxy
PROXY_OPCODES = {"wgmma", "tcgen05"}


class Program:
    """The kernel of a PTX text. ``covered`` are the numbers of the blocks that some launch has run."""

    def __init__(self, text: str):
        self.kernel = parse(text)
        self.blocks = translate_blocks(self.kernel)
        self.covered: set[int] = set()
        self._granules = {space: _granule(self.kernel, space) for space in ("shared", "global")}
        self._proxies = any(ins.opcode[0] in PROXY_OPCODES for ins in self.kernel.instructions())

    @property
    def parameters(self) -> int:
        """How many arguments the kernel takes."""
        return len(self.kernel.params)

    def memory(self) -> GlobalMemory:
        return GlobalMemory()

    def launch(
        self,
        grid: tuple[int, int, int],
        arguments: list[int | float],
        shared_bytes: int,
        memory: GlobalMemory,
        findings: Findings,
        threads: int = 1 << 14,
        last: int | None = None,
    ) -> int:
        """Run a grid, or its ``last`` CTAs, about ``threads`` threads at once; returns the instructions executed.

        ``arguments`` are numbers and addresses in the order of the parameters. ``shared_bytes`` are given to each CTA
        beside what the kernel declares. Raises ``Fault`` where nothing can go on; what else was wrong is added to
        ``findings``. Raises ValueError for a wrong number of arguments, TypeError for a float or an integer where the
        other is expected.
        """
        named = _arguments(self.kernel, arguments)
        total = grid[0] * grid[1] * grid[2]
        most = max(1, threads // self.kernel.threads)
        size = self.kernel.shared + shared_bytes
        memory.begin(self._granules["global"])

        def run(first: int) -> int:
            # in a function of its own: what a batch takes is free before the next one begins
            ctas = min(most, total - first)
            shared = SharedMemory(size, ctas, self._granules["shared"], self._proxies)
            batch = Batch(self.kernel, named, grid, first, ctas, shared, memory, findings)
            return Control(batch, self.blocks, self.covered).run()

        with np.errstate(all="ignore"):
            return sum(run(first) for first in range(0 if last is None else max(0, total - last), total, most))

    def blocks_by_source(self) -> dict[str, set[int]]:
        """The blocks that hold instructions of each line of source, ``file.py:line``."""
        found: dict[str, set[int]] = {}
        for number, block in enumerate(self.kernel.blocks):
            for ins in block:
                found.setdefault(ins.where, set()).add(number)
        return found


def _arguments(kernel: Kernel, arguments: list[int | float]) -> dict[str, np.generic]:
    """Bits of the arguments, by the names of the parameters."""
    if len(arguments) != len(kernel.params):
        raise ValueError(f"{kernel.name} takes {len(kernel.params)} arguments, {len(arguments)} came")
    named = {}
    for parameter, value in zip(kernel.params, arguments, strict=True):
        unsigned = UNSIGNED[parameter.bits]
        if (parameter.kind[0] == "f") != isinstance(value, float):
            raise TypeError(f"{parameter.name}: expected .{parameter.kind}, got {value!r}")
        if parameter.kind[0] == "f":
            named[parameter.name] = np.dtype(f"f{parameter.bits // 8}").type(value).view(unsigned)
        else:
            named[parameter.name] = unsigned(int(value) & (1 << parameter.bits) - 1)
    return named


def _granule(kernel: Kernel, space: str) -> int:
    """Bytes of the narrowest access to a memory, of which each other access is a multiple."""
    return min((_access_size(ins) for ins in kernel.instructions() if _touches(ins, space)), default=16)


def _touches(ins: Instruction, space: str) -> bool:
    if any(part.split("::")[0] == space for part in ins.opcode) or ins.opcode[0] in PROXY_OPCODES:
        return True
    # by a generic address
    return space == "global" and ins.opcode[0] in ("ld", "st") and ins.opcode[1] not in (*SPACES, "param")


def _access_size(ins: Instruction) -> int:
    if ins.opcode[0] in ("ld", "st"):
        vector = next((operand for operand in ins.operands if isinstance(operand, Vector)), None)
        return int(ins.opcode[-1][1:]) // 8 * (len(vector.operands) if vector else 1)
    if ins.opcode[:2] == ["cp", "async"]:
        return next((operand.value for operand in ins.operands if isinstance(operand, Immediate)), 4)
    return 16 if ins.opcode[0] in ("ldmatrix", "stmatrix") else 4
