"""Text that a causal language model writes itself: windows of tokens, drawn at temperature 1."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..modules import evaluating
from ..shards import without_gradients
from .data import generator_of
from .inverse_sampling import drawn_indices

# Windows that are drawn together where nothing else is said
TOGETHER = 128


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
    known: Tensor | None = None,
    keep: Callable[[Tensor], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Tensor:
    """Windows of tokens that a model draws from its own next-token probabilities, at temperature 1.

    A window begins with ``start`` and goes on behind an end of text, as text does that is cut into windows. Tokens are
    drawn by the inverse of the cumulative distribution, of float32 probabilities and a float64 number from a generator
    on the CPU. Batch i, of ``batch_size`` windows, has a generator of its own, seeded by ``seed`` and
    i. So whoever goes on behind whole batches draws the tokens of a call that was never broken off.

    Draw before the model is converted: a masked model writes other text.

    Args:
        model: a Hugging Face causal language model. It draws in eval mode and is put back into the mode it came in.
        start: id of the first token, see ``start_token``; None: another one for each window, all alike in probability.
        windows: how many.
        length: tokens in a window with the first one, at least 2.
        batch_size: windows that are drawn together. Their keys and values stay in memory meanwhile.
        seed: at least 0.
        known: int64 [whole batches * batch_size, length], what an earlier call with these arguments gave to ``keep``.
        keep: called behind each batch with all windows so far.
        progress: called behind each token of a batch with how many have been drawn in this call, and of how many.

    Returns:
        int64 [windows, length], on the CPU.

    Raises:
        ValueError: if an argument is out of its range, or the model's logits are not finite.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    _check(windows=(windows, 1), length=(length, 2), batch_size=(batch_size, 1), seed=(seed, 0))
    if start is not None and not 0 <= start < vocabulary:
        raise ValueError(f"start: expected a token below {vocabulary}, the size of the vocabulary, got {start}")
    found = torch.empty(0, length, dtype=torch.int64) if known is None else known
    _check_known(found, windows, length, batch_size)
    begun = len(found) // batch_size
    batches = math.ceil(windows / batch_size)
    with without_gradients(model), evaluating(model):
        for batch in range(begun, batches) if len(found) < windows else ():

            def tell(done: int, before: int = batch - begun) -> None:
                if progress is not None:
                    progress(before * (length - 1) + done, (batches - begun) * (length - 1))

            rows = min(batch_size, windows - batch * batch_size)
            found = torch.cat([found, _draw(model, start, rows, length, generator_of("samples", seed, batch), tell)])
            if keep is not None:
                keep(found)
    return found


def _draw(
    model: torch.nn.Module,
    start: int | None,
    rows: int,
    length: int,
    generator: torch.Generator,
    tell: Callable[[int], None],
) -> Tensor:
    """int64 [rows, length], drawn together; ``tell`` is called with the tokens of a window that have been drawn."""
    # it imports transformers
    from ..hf import next_logits, preallocated_cache

    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    uniform = torch.rand(rows, length, generator=generator, dtype=torch.float64)
    tokens = torch.empty(rows, length, dtype=torch.int64, device=device)
    tokens[:, 0] = (uniform[:, 0] * embeddings.num_embeddings).long() if start is None else start
    finite = torch.ones((), dtype=torch.bool, device=device)
    cache = preallocated_cache(model, length - 1)
    for at in range(1, length):
        probabilities = next_logits(model, tokens[:, at - 1 : at], cache).softmax(-1, dtype=torch.float32)
        finite &= probabilities.sum(-1).isfinite().all()
        tokens[:, at] = drawn_indices(probabilities, uniform[:, at])
        tell(at)
    if not finite:
        raise ValueError("model: expected finite logits, got NaN or infinity; take another --dtype or model")
    return tokens.cpu()


def _check_known(known: Tensor, windows: int, length: int, batch_size: int) -> None:
    whole = len(known) == windows or len(known) < windows and len(known) % batch_size == 0
    if known.dim() != 2 or known.shape[1] != length or not whole:
        raise ValueError(
            f"known: expected whole batches of {batch_size} windows of {length} tokens, {windows} at most, got "
            f"{list(known.shape)}"
        )


def _check(**least: tuple[int, int]) -> None:
    for name, (value, low) in least.items():
        if not isinstance(value, int) or value < low:
            raise ValueError(f"{name}: expected an int of at least {low}, got {value!r}")
