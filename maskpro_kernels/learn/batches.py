"""What a batch contains: its identity, its tokens, and the weight of its loss within a step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np
from torch import Tensor

from ..digests import SIZE, digest

# A label without a loss, as torch has it
IGNORED = -100


def tensors_of(batch) -> Iterator[Tensor]:
    """The tensors of a batch of any form."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for name in sorted(batch, key=str):
            yield from tensors_of(batch[name])
    elif isinstance(batch, (tuple, list)):
        for part in batch:
            yield from tensors_of(part)


def content(batch, index: int) -> str:
    """What tells a batch from others: what is in it, or its index where that is more than can be compared.

    Compared are tensors, arrays of numpy, None, strings, bytes and numbers, in mappings with strings or ints as keys,
    in tuples and in lists.
    """
    parts = [digest(tensors_of(batch))]

    def plain(part) -> bool:
        if isinstance(part, Mapping):
            names = sorted(part, key=str)
            parts.append(f"mapping {names!r}")
            return all(isinstance(name, (str, int)) and plain(part[name]) for name in names)
        if isinstance(part, (tuple, list)):
            # a word of its own, or [1, [2]] would be [[1], 2]
            parts.append(f"list {len(part)}")
            return all(map(plain, part))
        if isinstance(part, (np.ndarray, np.generic)) and not part.dtype.hasobject:
            values = hashlib.blake2b(part.tobytes(), digest_size=SIZE).hexdigest()
            parts.append(f"array {part.dtype.str} {part.shape} {values}")
            return True
        parts.append("tensor" if isinstance(part, Tensor) else repr(part))
        return part is None or isinstance(part, (Tensor, str, bytes, int, float))

    if not plain(batch):
        return f"batch {index}"
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=SIZE).hexdigest()


def weights_of(batches: Sequence) -> list[Fraction]:
    """Weights of the losses of a step's batches in their mean: by tokens, see ``loss_tokens``; equal where none are."""
    tokens = [loss_tokens(batch) for batch in batches] if len(batches) > 1 else [1]
    if not any(tokens):
        tokens = [1] * len(batches)
    return [Fraction(count, sum(tokens)) for count in tokens]


def weighted_mean(losses: Sequence[float], weights: Sequence[Fraction]) -> float:
    """Correctly rounded, and so the same in any order; NaN where one of several losses is not finite."""
    if len(losses) == 1:
        return losses[0]
    if not all(map(math.isfinite, losses)):
        return math.nan
    return float(sum(Fraction(loss) * weight for loss, weight in zip(losses, weights, strict=True)))


def loss_tokens(batch) -> int:
    """Tokens that a batch's loss is taken to be a mean over.

    Of a mapping with "labels" the labels that are not -100, with "attention_mask" alone the ones in it; else as
    ``count_tokens``.
    """
    if isinstance(batch, Mapping):
        if isinstance(batch.get("labels"), Tensor):
            return int((batch["labels"] != IGNORED).sum())
        if isinstance(batch.get("attention_mask"), Tensor):
            return int((batch["attention_mask"] != 0).sum())
    return count_tokens(batch)


def count_tokens(batch) -> int:
    """Elements of a batch's input ids: those of the tensor, of "input_ids", or of the first element."""
    if isinstance(batch, Mapping):
        batch = batch["input_ids"] if "input_ids" in batch else next(iter(batch.values()), None)
    elif isinstance(batch, (tuple, list)):
        batch = batch[0] if batch else None
    return batch.numel() if isinstance(batch, Tensor) else 0
