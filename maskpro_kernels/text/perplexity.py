"""Loss and perplexity of causal language models."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..modules import evaluating
from ..shards import without_gradients

# Windows in a forward pass of an evaluation
EVALUATED_TOGETHER = 4


def check_input_ids(input_ids: torch.Tensor) -> None:
    """Raise ValueError unless they are [batch, length] with at least one row and two tokens."""
    if input_ids.dim() != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids: expected [batch >= 1, length >= 2], got {list(input_ids.shape)}")


def causal_lm_loss(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token over a batch.

    Args:
        model: a Hugging Face causal language model.
        input_ids: int64 [batch, length], length at least 2, on the model's device.

    Returns:
        0-dim float32 tensor, in nats a token, differentiable. The logits are cast to float32 before the loss
        whatever the model's dtype is.

    Raises:
        ValueError: if ``input_ids`` is not [batch, length] with at least one row and two tokens.
    """
    check_input_ids(input_ids)
    logits = model(input_ids, use_cache=False).logits
    # The model sees the whole batch (another composition would change its rounding); only the float32 copy of
    # the logits, the largest tensor here, goes row by row.
    sums = [
        F.cross_entropy(row[:-1].float(), ids[1:], reduction="sum") for row, ids in zip(logits, input_ids, strict=True)
    ]
    return torch.stack(sums).sum() / (input_ids.shape[0] * (input_ids.shape[1] - 1))


def perplexity(
    model: torch.nn.Module, windows: torch.Tensor, batch_size: int = EVALUATED_TOGETHER, progress: bool = False
) -> float:
    """exp of the mean next-token cross-entropy over windows; every token counts alike.

    The model is evaluated in eval() mode, where masked layers take their top-N masks; every module is then put
    back into the mode it came in.

    Args:
        model: a Hugging Face causal language model.
        windows: int64 [windows, length], on any device.
        batch_size: windows in a forward pass.
        progress: show a bar on stderr.

    Returns:
        the perplexity; inf where it exceeds the range of a float.

    Raises:
        ValueError: if ``windows`` is not [windows, length] with at least one window of two tokens, or
            ``batch_size`` is below 1.
    """
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows: expected [windows >= 1, length >= 2], got {list(windows.shape)}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    device = next(model.parameters()).device
    total = 0.0
    with without_gradients(model), evaluating(model):
        for batch in tqdm(windows.split(batch_size), desc="perplexity", disable=not progress, leave=False):
            total += causal_lm_loss(model, batch.to(device)).item() * len(batch)
    try:
        return math.exp(total / len(windows))
    except OverflowError:
        return math.inf
