"""Reports on a program: faults, refusals, and findings after which it goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


class Instruction(Protocol):
    """An instruction of any assembly language; ``where`` is the Python file and line it stems from."""

    text: str
    line: int
    where: str


class Fault(Exception):
    """What no correct program does, and after which nothing can go on."""


class Refused(NotImplementedError):
    """What the emulator does not model; the message holds the instruction."""


def refusal(ins: Instruction, why: str) -> Refused:
    return Refused(f"line {ins.line}, {ins.text} [{ins.where}]: {why}")


@dataclass(frozen=True)
class Finding:
    """One kind of fault at one instruction.

    ``line`` counts the lines of the text from 1, ``where`` is the line of Python that the instruction stems from.
    """

    kind: str
    kernel: str
    line: int
    text: str
    where: str
    detail: str = ""

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.kind}{detail}: {self.kernel}, line {self.line}, {self.text} [{self.where}]"


class Findings:
    """What was seen, and how often; empty after a program that did nothing wrong."""

    def __init__(self):
        self._counts: Counter[Finding] = Counter()

    def add(self, kind: str, kernel: str, ins: Instruction, detail: str = "") -> None:
        self._counts[Finding(kind, kernel, ins.line, ins.text, ins.where, detail)] += 1

    def note(self, kind: str, kernel: str, detail: str = "") -> None:
        """Add what belongs to no single instruction."""
        self._counts[Finding(kind, kernel, 0, "", "", detail)] += 1

    def clear(self) -> None:
        self._counts.clear()

    @property
    def kinds(self) -> set[str]:
        return {finding.kind for finding in self._counts}

    def count(self, kind: str) -> int:
        return sum(count for finding, count in self._counts.items() if finding.kind == kind)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def __str__(self) -> str:
        return "\n".join(f"{finding}, {count} times" for finding, count in self._counts.items()) or "no findings"
