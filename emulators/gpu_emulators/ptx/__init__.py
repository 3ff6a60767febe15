"""An emulator that executes PTX, the assembly language of NVIDIA's GPUs, on a CPU, and reports what a GPU would not.

All threads of a batch of CTAs run at once, a register is one numpy array. ``Program(text)`` refuses what the emulator
does not model; ``Program.launch`` runs a grid on tensors that were registered in a ``GlobalMemory``, and adds what no
correct program does to ``Findings``. Needs numpy alone. Semantics and section numbers are those of the PTX ISA 9.2.
"""

from __future__ import annotations

from ..findings import Fault, Findings, Refused
from ..global_memory import GlobalMemory

# each of these modules registers its instructions
from . import access, arithmetic, async_copies, bits, comparisons, control, conversions, floats, matrix, moves, warps
from .program import Program

__all__ = ["Fault", "Findings", "GlobalMemory", "Program", "Refused"]
