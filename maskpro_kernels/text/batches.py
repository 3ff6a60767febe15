"""Windows of tokens, and batches of them from one text or from several in shares."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .sources import BUILT_IN, SELF, is_path


class Source(NamedTuple):
    """A source of text, and its share of the windows; the shares of a list add up to 1."""

    name: str
    share: Fraction


def parse_sources(data: str) -> tuple[Source, ...]:
    """Parse a list of sources such as "pydoc:0.5,self:0.5".

    A comma separates sources, and a number behind a source's last colon is its share. Shares are divided by their sum;
    without any, all sources have the same. A word that exists as a path is that path, colons included, and so is the
    whole list. A dataset whose configuration is a number needs a share behind it.

    Raises:
        TypeError: if ``data`` is not a str.
        ValueError: if a source is empty or comes twice, a share is not positive, or some sources alone have one.
    """
    if not isinstance(data, str):
        raise TypeError(f'data: expected a str such as "pydoc:0.5,self:0.5", got {type(data).__name__}')
    sources = [_source(word.strip()) for word in ([data] if is_path(data) else data.split(","))]
    names, shares = [name for name, _ in sources], [share for _, share in sources]
    if not all(names):
        raise ValueError(f"data: expected a source in front of and behind each comma, got {data!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"data: expected each source once, got {data!r}; give it one share")
    for name, share in sources:
        if share is not None and share <= 0:
            raise ValueError(f"data: expected a positive share behind the last colon, got that of {name!r} in {data!r}")
        front, colon, rest = name.rpartition(":")
        if colon and not is_path(name) and (front in (*BUILT_IN, SELF) or is_path(front)):
            raise ValueError(f"data: expected a number behind the colon of {front!r}, got {rest!r}")
    if None in shares:
        if any(share is not None for share in shares):
            raise ValueError(f"data: expected a share behind all sources or behind none, got {data!r}")
        shares = [Fraction(1)] * len(names)
    return tuple(Source(name, share / sum(shares)) for name, share in zip(names, shares, strict=True))


def _source(word: str) -> tuple[str, Fraction | None]:
    name, colon, share = word.rpartition(":")
    if not colon or is_path(word):
        return word, None
    try:
        return name, Fraction(share)
    except (ValueError, ZeroDivisionError):
        # such as the configuration of a dataset
        return word, None


def texts_of(data: str) -> tuple[Source, ...]:
    """The sources of a list that are texts, with shares of their own sum; none where "self" stands alone."""
    texts = [source for source in parse_sources(data) if source.name != SELF]
    return tuple(Source(name, share / sum(source.share for source in texts)) for name, share in texts)


def other_kind(data: str) -> str | None:
    """A built-in text that is not in a list: pydoc, or else stdlib; None where both are."""
    names = [name for name, _ in parse_sources(data)]
    return next((name for name in ("pydoc", "stdlib") if name not in names), None)


def resolved(data: str) -> str:
    """The list with absolute paths, which hold in every folder."""
    if is_path(data):
        return str(Path(data).resolve())
    sources = parse_sources(data)
    if not any(is_path(name) for name, _ in sources):
        return data
    return ",".join(f"{Path(name).resolve() if is_path(name) else name}:{share}" for name, share in sources)


def windows(text: str, tokenizer: Callable, length: int) -> Tensor:
    """Cut the token ids of a text into windows that do not overlap; the remainder is dropped.

    Args:
        text: has at least ``length`` tokens; else ValueError.
        tokenizer: a Hugging Face tokenizer.
        length: tokens in a window, at least 2; else ValueError.

    Returns:
        int64 tensor [windows, length].
    """
    if length < 2:
        raise ValueError(f"length: expected at least 2 tokens, got {length}")
    # verbose=False silences the warning that the text is longer than the model's context
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if len(tokens) < length:
        raise ValueError(
            f"text: expected at least {length} tokens for one window, got {len(tokens)} of {type(tokenizer).__name__}"
        )
    return tokens[: len(tokens) // length * length].view(-1, length)


def check_vocabulary(windows: Tensor, vocabulary: int) -> None:
    """Raise ValueError if a model with a vocabulary of that size does not have one of the tokens."""
    if int(windows.max()) >= vocabulary:
        raise ValueError(
            f"model: expected tokens below {vocabulary}, the size of its vocabulary, got {int(windows.max())} of its "
            "tokenizer, which is of another model; put the model's own beside it"
        )


def batches(windows: Tensor, batch_size: int, seed: int) -> list[Tensor]:
    """Shuffle windows once and divide them into full batches; the remainder is dropped.

    Args:
        windows: [windows, length].
        batch_size: windows in a batch, from 1 to all; else ValueError.
        seed: of the shuffle; the same seed gives the same batches on every device.

    Returns:
        list of tensors [batch_size, length].
    """
    if not 1 <= batch_size <= len(windows):
        raise ValueError(f"batch_size: expected 1 to {len(windows)}, the number of windows, got {batch_size}")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    full = len(windows) // batch_size
    return list(windows[order[: full * batch_size].to(windows.device)].split(batch_size))


def generator_of(purpose: str, seed: int, index: int) -> torch.Generator:
    """A generator for one of many things that are drawn with one seed, independent of what was drawn before."""
    mixed = hashlib.blake2b(f"{purpose} {seed} {index}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed, "little"))


def turns(shares: Sequence[Fraction], count: int) -> list[int]:
    """The sources that the next ``count`` windows are of: each time the one that lacks most of its share so far, the
    first of equals."""
    scale = lcm(*(share.denominator for share in shares))
    weights = [int(share * scale) for share in shares]
    lacking, whose = [0] * len(weights), []
    for _ in range(count):
        lacking = [lacks + weight for lacks, weight in zip(lacking, weights, strict=True)]
        turn = lacking.index(max(lacking))
        lacking[turn] -= scale
        whose.append(turn)
    return whose


def shared_out(sources: Sequence[Source], count: int) -> list[int]:
    """How many of ``count`` windows each source has by its share, but at least one.

    ValueError if there are more sources than windows.
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
    """Raise ValueError if a source has fewer windows than a batch takes of it."""
    for name, share in sources:
        if name in windows and len(windows[name]) < (most := in_a_batch(share, batch_size)):
            raise ValueError(
                f"batch_size: expected at most {len(windows[name])} windows of {name!r} in a batch, as many as there "
                f"are, got a batch of {batch_size} with {most} of them"
            )


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
        check_windows(sources, windows, batch_size)
        whose = torch.tensor(turns([source.share for source in sources], batch_size * count))
        order = torch.empty_like(whose)
        first = 0
        for index, (name, _) in enumerate(sources):
            places, have = whose == index, len(windows[name])
            # of its own: sources of equal length are not to share their orders, of whatever round
            generator = generator_of("order", seed, index)
            taken = int(places.sum())
            rounds = [torch.randperm(have, generator=generator) for _ in range(-(-taken // have))]
            order[places] = first + torch.cat([*rounds, order[:0]])[:taken]
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
