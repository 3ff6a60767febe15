"""Text that a causal language model writes itself: windows of tokens, drawn at temperature 1."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fsdp import without_gradients
from ..modules import evaluating
from .batches import generator_of

# Windows that are drawn together by default
TOGETHER = 128
# Probabilities that are summed first
BLOCK = 256
BELOW_ONE = math.nextafter(1.0, 0.0)


def start_token(tokenizer) -> int | None:
    """The token that samples begin with: the tokenizer's beginning of text, else its end of text; None if neither."""
    tokens = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    return next((token for token in tokens if token is not None), None)


def sample_windows(
    model: torch.nn.Module,
    start: int | None,
    windows: int,
    length: int,
    *,
    batch_size: int = TOGETHER,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Tensor:
    """Draw windows of tokens from a model's own next-token probabilities, at temperature 1.

    A window begins with ``start`` and goes on behind an end of text, as text does that is cut into windows. Tokens are
    drawn by the inverse of the cumulative distribution, of float32 probabilities and a float64 number from a generator
    on the CPU. Batch i, of ``batch_size`` windows, has a generator of its own, seeded by ``seed`` and i.

    Draw before the model is converted: a masked model writes other text.

    Args:
        model: a Hugging Face causal language model. It draws in eval mode and is put back into the mode it came in.
        start: id of the first token, see ``start_token``; None: another one for each window, all alike in probability.
        windows: how many.
        length: tokens in a window with the first one, at least 2.
        batch_size: windows that are drawn together. Their keys and values stay in memory meanwhile.
        seed: at least 0.
        progress: called behind each token of a batch with how many have been drawn, and of how many.

    Returns:
        int64 [windows, length], on the CPU.

    Raises:
        ValueError: if an argument is out of its range, or the model's logits are not finite.
    """
    # it imports transformers
    from ..hf import next_logits, preallocated_cache

    embeddings = model.get_input_embeddings()
    vocabulary, device = embeddings.num_embeddings, embeddings.weight.device
    for name, value, low in (
        ("windows", windows, 1),
        ("length", length, 2),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):
        if not isinstance(value, int) or value < low:
            raise ValueError(f"{name}: expected an int of at least {low}, got {value!r}")
    if start is not None and not 0 <= start < vocabulary:
        raise ValueError(f"start: expected a token below {vocabulary}, the size of the vocabulary, got {start}")
    batches, drawn = math.ceil(windows / batch_size), []
    with without_gradients(model), evaluating(model):
        for batch in range(batches):
            rows, generator = min(batch_size, windows - batch * batch_size), generator_of("samples", seed, batch)
            uniform = torch.rand(rows, length, generator=generator, dtype=torch.float64)
            tokens = torch.empty(rows, length, dtype=torch.int64, device=device)
            tokens[:, 0] = (uniform[:, 0] * vocabulary).long() if start is None else start
            finite = torch.ones((), dtype=torch.bool, device=device)
            cache = preallocated_cache(model, length - 1)
            for at in range(1, length):
                probabilities = next_logits(model, tokens[:, at - 1 : at], cache).softmax(-1, dtype=torch.float32)
                finite &= probabilities.sum(-1).isfinite().all()
                tokens[:, at] = drawn_indices(probabilities, uniform[:, at])
                if progress is not None:
                    progress(batch * (length - 1) + at, batches * (length - 1))
            if not finite:
                raise ValueError("model: expected finite logits, got NaN or infinity; take another --dtype or model")
            drawn.append(tokens.cpu())
    return torch.cat(drawn)


def drawn_indices(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """For each row the index at which the sum of the probabilities up to it passes a uniform number.

    That draws by the inverse of the cumulative distribution (Devroye 1986, Non-Uniform Random Variate Generation,
    chapter III.2). First the block of probabilities, then the one in it: a sum over a vocabulary one by one takes
    longer than a small model's forward takes for its widest layer. Sums are cumulated in float64 on the CPU, since
    float32 ones would lose rare indices, and those of a GPU have no fixed order.

    Args:
        probabilities: float32 [rows, n]. A row need not sum to 1. One that holds NaN gives some index.
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
    """(index [rows] at which a part [rows, 1] of a row's sum is passed, the fraction of that weight before it)."""
    weights = weights.cpu().double()
    sums = weights.cumsum(-1)
    sought = part * sums[:, -1:]
    # right: a weight of 0 has no place between two sums
    index = torch.searchsorted(sums, sought, right=True).clamp(max=weights.shape[1] - 1)
    own = weights.gather(-1, index)
    rest = (sought - (sums.gather(-1, index) - own)) / own
    return index[:, 0], rest.clamp(0.0, BELOW_ONE)
