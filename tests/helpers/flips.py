"""Every bit of a file flipped in turn, and what its reader makes of it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

# What the command tells in one line, with the exit code 2
REFUSED = (ValueError, TypeError, OSError)
# A value that another one stands for without a word, and an error that is told as none
WRONG = ("silent", "traceback")
OUTCOMES = ("refused", "rebuilt", "told", "same", *WRONG)


def stride_of_a_sample(path: Path, size: int) -> int:
    """One by which about so many bits of a file come: odd, so that every bit of a byte has its turn."""
    return max(1, 8 * path.stat().st_size // size) | 1


def flipped(content: bytes, stride: int) -> Iterator[tuple[int, bytes]]:
    """(number of the bit, the bytes with it flipped) of every stride-th bit."""
    for bit in range(0, 8 * len(content), stride):
        at = bit // 8
        yield bit, content[:at] + bytes([content[at] ^ 1 << bit % 8]) + content[at + 1 :]


def outcomes(path: Path, read: Callable[[], object], stride: int = 1) -> Counter:
    """How often each of OUTCOMES comes, where bits of a file are flipped; the file is as before.

    "rebuilt": a warning tells of it, and the values are those of the whole file. "told": a warning tells of it. "same":
    the values are those of the whole file.

    Args:
        path: of the file. Others that ``read`` writes have to be restored by it.
        read: gives what was read.
        stride: of the bits that are flipped.
    """
    content, expected, found = path.read_bytes(), read(), Counter()
    for bit, changed in flipped(content, stride):
        path.write_bytes(changed)
        outcome = _outcome(read, expected)
        assert outcome not in WRONG, f"bit {bit} of {path.name}, {changed[max(bit // 8 - 40, 0) :][:80]}: {outcome}"
        found[outcome] += 1
    path.write_bytes(content)
    assert sum(found.values()) == len(range(0, 8 * len(content), stride))
    return found


def _outcome(read: Callable[[], object], expected: object) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            same = read() == expected
        except REFUSED as error:
            return "refused" if "\n" not in str(error) else "traceback"
        except Exception:
            return "traceback"
    if caught:
        return "rebuilt" if same else "told"
    return "same" if same else "silent"
