"""A compiled kernel as a program that runs on a CPU."""

from __future__ import annotations

import re

import numpy as np

from ..findings import Findings
from ..global_memory import GlobalMemory
from .access import UPPER_HALF
from .batch import Batch
from .control import Control, translate_blocks
from .lds import LDS
from .parser import EXPLICIT, Argument, Kernel, parse

# Vector memory and scalar loads have to lie at multiples of a word, or of their size where that is less
WORD = 4
SIZES = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "u8": 1, "i8": 1, "b8": 1, "u16": 2}
SIZES |= {"i16": 2, "b16": 2}
# What a kernel's arguments are filled up to, so that wide loads may read beyond them
ARGUMENT_BLOCK, FILLING = 64, 0xA5


class Program:
    """The kernel of an assembly text. ``covered`` are the numbers of the blocks that some launch has run."""

    def __init__(self, text: str):
        self.kernel = parse(text)
        self.blocks = translate_blocks(self.kernel)
        self.covered: set[int] = set()
        self._granules = {space: _granule(self.kernel, space) for space in ("ds", "global|buffer")}

    @property
    def parameters(self) -> int:
        """How many arguments the kernel takes."""
        return len(_explicit(self.kernel))

    def memory(self) -> GlobalMemory:
        return GlobalMemory(alignment=WORD)

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
        """Run a grid, or its ``last`` workgroups, about ``threads`` threads at once; returns the instructions executed.

        ``arguments`` are numbers and addresses in the order of the parameters. ``shared_bytes`` are given to each
        workgroup beside what the kernel declares. Raises ``Fault`` where nothing can go on; what else was wrong is
        added to ``findings``. Raises ValueError for a wrong number of arguments.
        """
        data = _argument_bytes(self.kernel, arguments, grid, shared_bytes)
        address = data.ctypes.data
        memory.register(address, data, "the kernel's arguments")
        total = grid[0] * grid[1] * grid[2]
        most = max(1, threads // self.kernel.threads)
        size = -(-(self.kernel.shared + shared_bytes) // 16) * 16
        memory.begin(self._granules["global|buffer"])
        words = data[: 4 * self.kernel.descriptor["user_sgpr_kernarg_preload_length"]].view(np.uint32)

        def run(first: int) -> int:
            # in a function of its own: what a batch takes is free before the next one begins
            ctas = min(most, total - first)
            lds = LDS(size, ctas, self._granules["ds"])
            batch = Batch(self.kernel, address, grid, first, ctas, lds, memory, findings)
            batch.preload(words)
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


def _explicit(kernel: Kernel) -> list[Argument]:
    return [argument for argument in kernel.arguments if argument.kind in EXPLICIT]


def _argument_bytes(
    kernel: Kernel, arguments: list[int | float], grid: tuple[int, int, int], shared_bytes: int
) -> np.ndarray:
    """What lies where a kernel looks for its arguments: User Guide for AMDGPU Backend, Kernel Argument Segment."""
    explicit = _explicit(kernel)
    if len(arguments) != len(explicit):
        raise ValueError(f"{kernel.name} takes {len(explicit)} arguments, {len(arguments)} came")
    block = np.full(-(-max(kernel.argument_bytes, 1) // ARGUMENT_BLOCK) * ARGUMENT_BLOCK, FILLING, np.uint8)
    hidden = _hidden(kernel.threads, grid) | {"hidden_dynamic_lds_size": shared_bytes}
    places = [*zip(explicit, arguments, strict=True), *((one, hidden.get(one.kind)) for one in kernel.arguments)]
    for place, value in places:
        if value is None:
            continue
        if isinstance(value, float):
            encoded = np.dtype(f"f{place.size}").type(value)
        else:
            encoded = np.dtype(f"u{place.size}").type(int(value) & (1 << 8 * place.size) - 1)
        block[place.offset : place.offset + place.size] = np.frombuffer(encoded.tobytes(), np.uint8)
    return block


def _hidden(threads: int, grid: tuple[int, int, int]) -> dict[str, int]:
    """By their kinds, arguments that tell how a kernel was launched; of whole workgroups along x."""
    return {
        f"hidden_{name}_{axis}": value
        for axis, blocks, size in zip("xyz", grid, (threads, 1, 1), strict=True)
        for name, value in (("block_count", blocks), ("group_size", size), ("remainder", 0), ("global_offset", 0))
    }


def _granule(kernel: Kernel, space: str) -> int:
    """Bytes of the narrowest access to a memory, at most a word, of which each other access is a multiple."""
    access = re.compile(rf"(?:{space})_(?:load|store|read|write)\w*?_([^\W_]+)(?:{UPPER_HALF})?")
    widths = [found[1] for ins in kernel.instructions() if (found := access.fullmatch(ins.opcode))]
    return min((SIZES.get(width, WORD) for width in widths), default=WORD)
