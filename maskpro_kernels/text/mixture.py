"""Several sources of text in one run: which, in which shares, and batches that hold them so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from fractions import Fraction
from itertools import islice
from math import lcm
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .data import BUILT_IN, SELF, generator_of, is_path


class Source(NamedTuple):
    """A source of text, and its share of the windows; the shares of a list add up to 1."""

    name: str
    share: Fraction


def parse_sources(data: str) -> tuple[Source, ...]:
    """The sources that a list such as "pydoc:0.5,self:0.5" names.

    A comma separates sources, and a number behind a source's last colon is its share. Shares are divided by their sum;
    without any, all sources have the same. What exists as a path is that path, commas and colons included. So a dataset
    whose configuration is a number needs a share behind it. But ``self`` and the names of ``BUILT_IN`` are never paths.

    Raises:
        TypeError: if ``data`` is no str.
        ValueError: if a source is empty or comes twice, a share is not positive, or some sources alone have one.
    """
    if not isinstance(data, str):
        raise TypeError(f'data: expected a str such as "pydoc:0.5,self:0.5", got {type(data).__name__}')
    found = [_source(word) for word in _words(data)]
    names, shares = [name for name, _ in found], [share for _, share in found]
    if not all(names):
        raise ValueError(f"data: expected a source in front of and behind each comma, got {data!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"data: expected each source once, got {data!r}; give it one share")
    for name, share in found:
        if share is not None and share <= 0:
            raise ValueError(f"data: expected a positive share behind the last colon, got that of {name!r} in {data!r}")
        known, colon, rest = name.rpartition(":")
        if colon and not is_path(name) and (known in (*BUILT_IN, SELF) or is_path(known)):
            raise ValueError(f"data: expected a number behind the colon of {known!r}, got {rest!r}")
    if None in shares:
        if any(share is not None for share in shares):
            raise ValueError(f"data: expected a share behind all sources or behind none, got {data!r}")
        shares = [Fraction(1)] * len(names)
    return tuple(Source(name, share / sum(shares)) for name, share in zip(names, shares, strict=True))


def _words(data: str) -> list[str]:
    """The parts between commas that do not belong to the name of a file."""
    parts, words = data.split(","), []
    while parts:
        joined = [",".join(parts[:count]) for count in range(1, len(parts) + 1)]
        named = {count: _source(word)[0] for count, word in enumerate(joined, start=1)}
        count = max((count for count, name in named.items() if name and is_path(name)), default=1)
        words.append(joined[count - 1])
        del parts[:count]
    return words


def _source(word: str) -> tuple[str, Fraction | None]:
    """(name, share) of one source; spaces around it are none of its name, unless a path has them."""
    word = word if is_path(word) else word.strip()
    name, colon, share = word.rpartition(":")
    if not colon or is_path(word):
        return word, None
    try:
        number = Fraction(share)
    except (ValueError, ZeroDivisionError):
        # such as the configuration of a dataset
        return word, None
    return name, number


def texts_of(data: str) -> tuple[Source, ...]:
    """The sources of a list that are texts, with shares of their own sum; none where ``self`` stands alone."""
    found = [source for source in parse_sources(data) if source.name != SELF]
    return tuple(Source(name, share / sum(source.share for source in found)) for name, share in found)


def other_kind(data: str) -> str | None:
    """A text of another kind than a list of sources: stdlib, or pydoc where stdlib is among them; None beside both."""
    names = [name for name, _ in parse_sources(data)]
    return next((name for name in BUILT_IN if name not in names), None)


def turn_by_turn(shares: Sequence[Fraction]) -> Iterator[int]:
    """Whose turn it is, without an end: of the source that lacks most of its share so far, the first of equals."""
    scale = lcm(*(share.denominator for share in shares))
    weights = [int(share * scale) for share in shares]
    lacking = [0] * len(weights)
    while True:
        lacking = [lacks + weight for lacks, weight in zip(lacking, weights, strict=True)]
        turn = lacking.index(max(lacking))
        lacking[turn] -= scale
        yield turn


def turns(shares: Sequence[Fraction], count: int) -> list[int]:
    """Whose turn it is, ``count`` times, see ``turn_by_turn``."""
    return list(islice(turn_by_turn(shares), count))


def shared_out(sources: Sequence[Source], count: int) -> list[int]:
    """How many of ``count`` windows each source has by its share, but at least one.

    Raises:
        ValueError: if there are more sources than windows.
    """
    if count < len(sources):
        names = ", ".join(source.name for source in sources)
        raise ValueError(f"expected at least {len(sources)}, one for each text of {names}, got {count}")
    whose = turns([source.share for source in sources], count) if sources else []
    counts = [whose.count(index) for index in range(len(sources))]
    while 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return counts


def in_a_batch(share: Fraction, batch_size: int) -> int:
    """How many windows of a source a batch has, rounded up."""
    return -(-share.numerator * batch_size // share.denominator)


def check_windows(sources: Sequence[Source], windows: Mapping[str, Tensor], batch_size: int) -> None:
    """Raise ValueError if one of these sources has fewer windows than a batch takes of it."""
    for name, share in sources:
        most = in_a_batch(share, batch_size)
        if name in windows and len(windows[name]) < most:
            raise ValueError(
                f"batch_size: expected at most {len(windows[name])} windows of {name!r} in a batch, as many as there "
                f"are, got a batch of {batch_size} with {most} of them"
            )


def resolved(data: str) -> str:
    """The same list with absolute paths, which hold in every folder."""
    if is_path(data):
        return str(Path(data).resolve())
    sources = parse_sources(data)
    if not any(is_path(name) for name, _ in sources):
        return data
    return ",".join(f"{Path(name).resolve() if is_path(name) else name}:{share}" for name, share in sources)


class MixedBatches(Sequence):
    """Batches whose windows come from several sources in turn, by their shares.

    Each source is gone through in an order of its own and shuffled anew each time round, so all its windows come up
    equally often but for one time. The order depends on shares, numbers of windows and seed alone.

    Args:
        windows: int64 [windows, length] of each source by name.
        sources: their shares, see ``parse_sources``.
        batch_size: windows in a batch.
        count: how many batches.
        seed: of the orders.

    Raises:
        ValueError: if a source has fewer windows than a batch takes of it, or an argument is out of its range.
    """

    def __init__(
        self, windows: Mapping[str, Tensor], sources: Sequence[Source], batch_size: int, count: int, seed: int
    ):
        for name, value in (("batch_size", batch_size), ("count", count)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        whose = torch.tensor(turns([source.share for source in sources], batch_size * count))
        order = torch.empty_like(whose)
        check_windows(sources, windows, batch_size)
        first = 0
        for index, (name, _) in enumerate(sources):
            places, have = whose == index, len(windows[name])
            order[places] = first + _rounds(have, int(places.sum()), seed, index)
            first += have
        self._windows = torch.cat([windows[name] for name, _ in sources])
        self._order = order.view(count, batch_size)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index):
        """A batch, int64 [batch_size, length], on the windows' device; of a slice those batches."""
        if isinstance(index, slice):
            part = copy(self)
            part._order = self._order[index]
            return part
        return self._windows[self._order[index].to(self._windows.device)]


def _rounds(windows: int, count: int, seed: int, source: int) -> Tensor:
    """Indices of a source's windows, round after round, each in another order."""
    orders = list(islice(_orders(windows, seed, source), -(-count // windows)))
    return torch.cat([*orders, torch.empty(0, dtype=torch.int64)])[:count]


def _orders(windows: int, seed: int, source: int) -> Iterator[Tensor]:
    # of its own: sources of equal length are not to share their orders, of whatever round
    generator = generator_of("order", seed, source)
    while True:
        yield torch.randperm(windows, generator=generator)


def in_rounds(windows: Tensor, seed: int, source: int) -> Iterator[Tensor]:
    """The windows of the source of that index, without an end, in the order in which ``MixedBatches`` has them."""
    for order in _orders(len(windows), seed, source):
        yield from windows[order.to(windows.device)]
