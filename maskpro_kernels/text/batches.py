"""Windows of tokens, from texts or sampled from a model, and batches of windows from several sources."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modules import evaluating, without_gradients
from .sources import BUILT_IN, SELF, is_path

# Most windows, and most of their tokens, to sample together by default
TOGETHER = 256
TOKENS_TOGETHER = 1 << 16
# Probabilities in a block of ``drawn_indices``
BLOCK = 256
BELOW_ONE = math.nextafter(1.0, 0.0)


class Source(NamedTuple):
    """A source of text, and its share of the windows; the shares of a list add up to 1."""

    name: str
    share: Fraction


def parse_sources(data: str) -> tuple[Source, ...]:
    """Parse a list of sources such as "pydoc:0.5,self:0.5".

    Commas separate sources. A number after a source's last colon is its share. Shares are divided by their sum; without
    shares all sources have equal ones. A word, or the whole list, that exists as a path is that path, colons included.
    A dataset whose configuration is a number needs a share after it.

    Raises:
        TypeError: if ``data`` is not a str.
        ValueError: if a source is empty or occurs twice, a share is not positive, or only some sources have one.
    """
    if not isinstance(data, str):
        raise TypeError(f'data: expected a str such as "pydoc:0.5,self:0.5", got {type(data).__name__}')
    sources = [_source(word.strip()) for word in ([data] if is_path(data) else data.split(","))]
    names = [name for name, _ in sources]
    shares = [share for _, share in sources]
    if not all(names):
        raise ValueError(f"data: expected a source before and after each comma, got {data!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"data: expected each source once, got {data!r}; give it one share")
    for name, share in sources:
        if share is not None and share <= 0:
            raise ValueError(f"data: expected a positive share after the last colon, got that of {name!r} in {data!r}")
        front, colon, rest = name.rpartition(":")
        if colon and not is_path(name) and (front in (*BUILT_IN, SELF) or is_path(front)):
            raise ValueError(f"data: expected a number after the colon of {front!r}, got {rest!r}")
    if None in shares:
        if any(share is not None for share in shares):
            raise ValueError(f"data: expected a share for all sources or for none, got {data!r}")
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
    """Sources of a list that are texts, with shares that add up to 1; none if "self" is the only source."""
    texts = [source for source in parse_sources(data) if source.name != SELF]
    total = sum(source.share for source in texts)
    return tuple(Source(name, share / total) for name, share in texts)


def other_kind(data: str) -> str | None:
    """Built-in text that is not in a list: pydoc, or else stdlib; None if both are."""
    names = [name for name, _ in parse_sources(data)]
    return next((name for name in ("pydoc", "stdlib") if name not in names), None)


def resolved(data: str) -> str:
    """The list with absolute paths, valid in every folder."""
    if is_path(data):
        return str(Path(data).resolve())
    sources = parse_sources(data)
    if not any(is_path(name) for name, _ in sources):
        return data
    words = []
    for name, share in sources:
        place = Path(name).resolve() if is_path(name) else name
        words.append(f"{place}:{share}")
    return ",".join(words)


def windows(text: str, tokenizer: Callable, length: int) -> Tensor:
    """Cut the token ids of a text into windows that do not overlap; the remainder is dropped.

    Args:
        text: a text of at least ``length`` tokens; else ValueError.
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
    """Raise ValueError if a token is outside of a vocabulary of that size."""
    if int(windows.max()) >= vocabulary:
        raise ValueError(
            f"model: expected tokens below {vocabulary}, the size of its vocabulary, got {int(windows.max())} from a "
            "tokenizer of another model; put the model's own tokenizer into its folder"
        )


def batches(windows: Tensor, batch_size: int, seed: int) -> list[Tensor]:
    """Shuffle windows once and divide them into full batches; the remainder is dropped.

    Args:
        windows: [windows, length].
        batch_size: windows in a batch, from 1 to all; else ValueError.
        seed: of the shuffle; a seed gives the same batches on every device.

    Returns:
        list of tensors [batch_size, length].
    """
    if not 1 <= batch_size <= len(windows):
        raise ValueError(f"batch_size: expected 1 to {len(windows)}, the number of windows, got {batch_size}")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    full = len(windows) // batch_size
    return list(windows[order[: full * batch_size].to(windows.device)].split(batch_size))


def generator_of(purpose: str, seed: int, index: int) -> torch.Generator:
    """Make a generator for a purpose and an index, so that its numbers do not depend on other uses of the seed."""
    mixed = hashlib.blake2b(f"{purpose} {seed} {index}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed, "little"))


def turns(shares: Sequence[Fraction], count: int) -> list[int]:
    """Sources of the next ``count`` windows: always the one furthest below its share, the first of equals."""
    scale = math.lcm(*(share.denominator for share in shares))
    weights = [int(share * scale) for share in shares]
    lacking = [0] * len(weights)
    whose = []
    for _ in range(count):
        lacking = [lacks + weight for lacks, weight in zip(lacking, weights, strict=True)]
        turn = lacking.index(max(lacking))
        lacking[turn] -= scale
        whose.append(turn)
    return whose


def split_by_share(sources: Sequence[Source], count: int) -> list[int]:
    """Number of windows of each source, of ``count`` in all, by its share and at least one.

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
    """Number of a source's windows in a batch, rounded up."""
    return -(-share.numerator * batch_size // share.denominator)


def check_windows(sources: Sequence[Source], windows: Mapping[str, Tensor], batch_size: int) -> None:
    """Raise ValueError if a source has fewer windows than a batch needs of it."""
    for name, share in sources:
        if name in windows and len(windows[name]) < (most := in_a_batch(share, batch_size)):
            raise ValueError(
                f"batch_size: expected at most {len(windows[name])} windows of {name!r} in a batch, which is all of "
                f"them, got a batch of {batch_size} with {most}"
            )


class MixedBatches(Sequence):
    """Batches whose windows come from several sources in turn, by their shares.

    Each source is shuffled again in each epoch, so the counts of its windows differ by at most one. The order depends
    only on shares, numbers of windows and seed.

    Args:
        windows: int64 [windows, length] of each source by name.
        sources: their shares, see ``parse_sources``.
        batch_size: windows in a batch.
        count: number of batches.
        seed: of the shuffles.

    Raises:
        ValueError: if a source has fewer windows than a batch needs of it, or an argument is out of its range.
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
            places = whose == index
            have = len(windows[name])
            # a generator for each source and epoch: sources of equal length must not share an order
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
        """Batch int64 [batch_size, length] on the windows' device; for a slice the MixedBatches of these."""
        if isinstance(index, slice):
            part = copy(self)
            part._order = self._order[index]
            return part
        return self._windows[self._order[index].to(self._windows.device)]


def start_token(tokenizer) -> int | None:
    """First token of samples: the tokenizer's beginning of text, else its end of text; None if it has neither."""
    tokens = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    return next((token for token in tokens if token is not None), None)


def sample_windows(model: torch.nn.Module, start: int | None, windows: int, length: int, *,
                   batch_size: int | None = None, seed: int = 0,
                   progress: Callable[[int, int], object] | None = None) -> Tensor:  # fmt: skip
    """Sample windows of tokens from a model's next-token probabilities, at temperature 1.

    A window begins with ``start`` and continues after an end of text, like a text that is cut into windows. Tokens are
    drawn by the inverse of the cumulative distribution, from float32 probabilities and a float64 number of a generator
    on the CPU. Batch i of ``batch_size`` windows has its own generator, seeded by ``seed`` and i.

    Sample before you convert the model: a masked model gives other text.

    Args:
        model: a Hugging Face causal language model. It runs in eval mode; its mode is restored.
        start: id of the first token, see ``start_token``; None: a uniformly random token for each window.
        windows: number of windows.
        length: tokens in a window, the first one included, at least 2.
        batch_size: windows to sample together. Their keys and values are in memory meanwhile. None: 256, or fewer that
            have at most 65,536 tokens.
        seed: at least 0.
        progress: called after each token of a batch with (tokens done, tokens in all).

    Returns:
        int64 [windows, length], on the CPU.

    Raises:
        ValueError: if an argument is out of its range, or the model's logits are not finite.
    """
    # it imports transformers
    from ..hf import next_logits, preallocated_cache

    embeddings = model.get_input_embeddings()
    vocabulary = embeddings.num_embeddings
    device = embeddings.weight.device
    for name, value, low in (
        ("windows", windows, 1),
        ("length", length, 2),
        ("batch_size", TOGETHER if batch_size is None else batch_size, 1),
        ("seed", seed, 0),
    ):
        if not isinstance(value, int) or value < low:
            raise ValueError(f"{name}: expected an int of at least {low}, got {value!r}")
    if start is not None and not 0 <= start < vocabulary:
        raise ValueError(f"start: expected a token below {vocabulary}, the size of the vocabulary, got {start}")
    if batch_size is None:
        batch_size = max(1, min(TOGETHER, TOKENS_TOGETHER // length))
    batches = math.ceil(windows / batch_size)
    drawn = []
    with without_gradients(model), evaluating(model):
        for batch in range(batches):
            rows = min(batch_size, windows - batch * batch_size)
            generator = generator_of("samples", seed, batch)
            uniform = torch.rand(rows, length, generator=generator, dtype=torch.float64)
            tokens = torch.empty(rows, length, dtype=torch.int64, device=device)
            tokens[:, 0] = (uniform[:, 0] * vocabulary).long() if start is None else start
            finite = torch.ones((), dtype=torch.bool, device=device)
            cache = preallocated_cache(model, length - 1)
            for position in range(1, length):
                previous = tokens[:, position - 1 : position]
                probabilities = next_logits(model, previous, cache).softmax(-1, dtype=torch.float32)
                finite &= probabilities.sum(-1).isfinite().all()
                tokens[:, position] = drawn_indices(probabilities, uniform[:, position])
                if progress is not None:
                    progress(batch * (length - 1) + position, batches * (length - 1))
            if not finite:
                raise ValueError("model: expected finite logits, got NaN or infinity; use another --dtype or model")
            drawn.append(tokens.cpu())
    return torch.cat(drawn)


def drawn_indices(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw an index for each row: the first at which the cumulative sum of probabilities exceeds a uniform number.

    This inverts the cumulative distribution (Devroye 1986, Non-Uniform Random Variate Generation, chapter III.2). It
    first finds the block of probabilities, then the index in the block: a cumulative sum over the whole vocabulary
    would take longer than the widest layer of a small model. Sums are float64 on the CPU, since float32 sums would lose
    rare indices, and sums on a GPU have no fixed order.

    Args:
        probabilities: float32 [rows, n]. A row need not sum to 1. A row with NaN gives some index.
        uniform: float64 [rows], in [0, 1).

    Returns:
        int64 [rows], on the device of the probabilities.
    """
    rows, count = probabilities.shape
    lacking = -count % BLOCK
    blocks = (F.pad(probabilities, (0, lacking)) if lacking else probabilities).unflatten(1, (-1, BLOCK))
    block, rest = _passed(blocks.sum(-1), uniform.cpu()[:, None])
    row = torch.arange(rows, device=blocks.device)
    inside, _ = _passed(blocks[row, block.to(blocks.device)], rest)
    return (block * BLOCK + inside).clamp(max=count - 1).to(probabilities.device)


def _passed(weights: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """(index [rows] at which the cumulative sum exceeds ``part`` [rows, 1] of a row's sum, fraction before it)."""
    weights = weights.cpu().double()
    sums = weights.cumsum(-1)
    sought = part * sums[:, -1:]
    # right: an index with weight 0 is never drawn
    index = torch.searchsorted(sums, sought, right=True).clamp(max=weights.shape[1] - 1)
    weight_at_index = weights.gather(-1, index)
    rest = (sought - (sums.gather(-1, index) - weight_at_index)) / weight_at_index
    return index[:, 0], rest.clamp(0.0, BELOW_ONE)
