"""Faults planted in the text of a compiled kernel, and what finds them."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from gpu_emulators.findings import Fault

SYNCHRONISATION = re.compile(
    r"""^[ \t]*(?:@!?%p\d+\s+)?(?:
        (?:bar|barrier)\.(?:cta\.)?(?:warp\.)?sync(?:\.aligned)?\b
      | cp\.async\.wait_(?:group|all)\b
      | fence\.proxy\.async
      | fence\.mbarrier_init
      | wgmma\.(?:fence|wait_group)\b
      | tcgen05\.(?:wait|fence)
      | mbarrier\.try_wait
    )[^;]*;""",
    re.X | re.M,
)
# What reads or writes memory, or goes elsewhere
STATEMENT = re.compile(
    r"^\s*(?:@!?%p\d+\s+)?(?:ld|st|cp|ldmatrix|stmatrix|mma|wgmma|tcgen05|mbarrier|atom|red|bra|ret)\b|^\$L__BB", re.M
)
# In AMDGCN a wait has a number for each counter, each of which is one to take away: as many as it counts are none
GCN_SYNCHRONISATION = re.compile(r"^[ \t]*s_barrier\b|(?<=[ \t])(?P<counter>vmcnt|lgkmcnt)\((?P<most>\d+)\)", re.M)
COUNTED = {"vmcnt": 63, "lgkmcnt": 15}
# The predicate that says whether a phase is complete
ASKED = re.compile(r"mbarrier\.try_wait\S*\s+([%\w$]+)\s*,")
WEAKENED = re.compile(r"(wait_group(?:\.sync\.aligned)?\s+)(\d+)")


def synchronisations(text: str) -> list[list[re.Match]]:
    """Every barrier, wait and fence of a kernel, in order. Two equal ones with nothing between them count once."""
    if is_amdgcn(text):
        return [[match] for match in GCN_SYNCHRONISATION.finditer(text)]
    found: list[list[re.Match]] = []
    for match in SYNCHRONISATION.finditer(text):
        between = text[found[-1][-1].end() : match.start()] if found else ""
        if found and found[-1][0][0] == match[0] and not STATEMENT.search(between):
            found[-1].append(match)
        else:
            found.append([match])
    return found


def is_amdgcn(text: str) -> bool:
    return ".amdgcn_target" in text


def without(text: str, numbers: set[int]) -> str:
    """The text with these synchronisations taken away.

    A wait for some of many waits for one less, and a test whether a phase is complete succeeds at once.
    """
    found = synchronisations(text)
    for match in reversed([match for number in sorted(numbers) for match in found[number]]):
        left = ""
        if asked := ASKED.search(match[0]):
            left = f"mov.pred {asked[1]}, -1;"
        elif weaker := WEAKENED.search(match[0]):
            left = match[0].replace(weaker[0], f"{weaker[1]}{int(weaker[2]) + 1}")
        elif counter := match.groupdict().get("counter"):
            unfinished = int(match["most"])
            left = f"{counter}({unfinished + 1 if unfinished else COUNTED[counter]})"
        text = text[: match.start()] + left + text[match.end() :]
    return text


def replaced(pattern: str, by: str | Callable[[re.Match], str], count: int = 1) -> Callable[[str], str]:
    """A rewrite of a text, the first ``count`` places or all of them (0); it has to change the text."""

    def rewrite(text: str) -> str:
        changed = re.sub(pattern, by, text, count=count, flags=re.M)
        if changed == text:
            raise AssertionError(f"{pattern} is not in the kernel")
        return changed

    return rewrite


def contracted(text: str) -> str:
    """PTX in which each product that goes into one sum and nowhere else is rounded once, with the sum."""
    uses = Counter(re.findall(r"%\w+", text))
    products = {
        found[1]: (found[2], found[3])
        for found in re.finditer(r"mul\.rn\.f32\s+(%\w+), ([^,;]+), ([^,;]+);", text)
        if uses[found[1]] == 2
    }

    def fused(found: re.Match) -> str:
        for product, addend in ((found[2], found[3]), (found[3], found[2])):
            if product in products:
                return f"fma.rn.f32 {found[1]}, {', '.join(products[product])}, {addend};"
        return found[0]

    return replaced(r"add\.rn\.f32\s+(%\w+), ([^,;]+), ([^,;]+);", fused, count=0)(text)


def what_is_found(emulator, call: Callable[[], None], rewrite: Callable[[str], str]) -> set[str]:
    """Kinds of findings of a call whose kernels are rewritten; a fault by its first words, and "wrong result".

    Those that Triton causes by itself are left out. The call raises AssertionError where a result is wrong. A rewrite
    that raises it fails the test.
    """

    def rewritten(text: str) -> str:
        try:
            return rewrite(text)
        except AssertionError as error:
            pytest.fail(f"the text cannot be rewritten: {error}")

    emulator.rewrite, kinds = rewritten, set()
    try:
        with emulator.apart() as findings:
            try:
                call()
            except Fault as fault:
                kinds.add(str(fault).split(":")[0])
            except AssertionError:
                kinds.add("wrong result")
    finally:
        emulator.rewrite = str
    return kinds | {finding.kind for finding in emulator.faults(findings)}


def mutant_of(module: ModuleType, before: str, after: str, folder: Path) -> ModuleType:
    """A file of kernels with a text in it replaced, as a module of its own."""
    source = Path(module.__file__).read_text()
    assert before in source
    path = folder / "mutant.py"
    path.write_text(source.replace(before, after) if before else source)
    spec = importlib.util.spec_from_file_location("maskpro_kernels.ops.triton.mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    return mutant
