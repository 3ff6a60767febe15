"""An emulator that executes AMDGCN, the assembly language of AMD's CDNA3, on a CPU, and reports what a GPU would not.

All waves of some workgroups run at once: a vector register is one numpy array [waves, 64]. ``Program(text)`` refuses
what the emulator does not model; ``Program.launch`` runs a grid on tensors that were registered in
``Program.memory()``, and adds what no correct program does to ``Findings``. Needs numpy alone. Sections that are named
as "CDNA3 ISA" are those of AMD's "Instinct MI300" Instruction Set Architecture, Reference Guide.
"""

from __future__ import annotations

# each of these modules registers its instructions
from . import access, comparisons, conversions, lanes, scalars, vectors
from .program import Program

__all__ = ["Program"]
