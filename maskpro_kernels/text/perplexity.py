"""Loss and perplexity of causal language models: by token over windows, and by word as in lm-eval."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..modules import evaluating, without_gradients
from .batches import check_vocabulary

# Called with (windows done, windows in all)
Progress = Callable[[int, int], object]
# Windows in a forward pass of an evaluation
EVALUATED_TOGETHER = 4
# lm-eval's context for a model whose config and tokenizer give none
CONTEXT = 2048
# Tokens by which ``check_causal`` compares
PROBED = 32
# Positions whose logits are cast to float32 at a time
POSITIONS = 1024
# Regular expressions and their replacements by lm-eval's wikitext_detokenizer, in its order. lm-eval itself would bring
# a dozen packages, and rounds log-likelihoods to the dtype of the model
DETOKENIZED = (
    (re.escape("s '"), "s'"),
    (r"/' [0-9]/", r"/'[0-9]/"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (re.escape(" @.@ "), "."),
    (" : ", ": "),
    (" ; ", "; "),
    (re.escape(" . "), ". "),
    (" ! ", "! "),
    (re.escape(" ? "), "? "),
    (" , ", ", "),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def check_input_ids(input_ids: torch.Tensor) -> None:
    """Raise ValueError unless ``input_ids`` are [batch, length] with at least one row and two tokens."""
    if input_ids.dim() != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids: expected [batch >= 1, length >= 2], got {list(input_ids.shape)}")


def causal_lm_loss(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token over a batch.

    Args:
        model: a Hugging Face causal language model.
        input_ids: int64 [batch >= 1, length >= 2], on the model's device; else ValueError.

    Returns:
        0-dim float32 tensor, in nats a token, differentiable. Logits of any dtype are cast to float32 first.
    """
    check_input_ids(input_ids)
    logits = model(input_ids, use_cache=False).logits
    # the model gets the whole batch, since another composition would change its rounding; only the float32 copy of the
    # logits, the largest tensor here, is made row by row
    sums = [
        F.cross_entropy(row[:-1].float(), ids[1:], reduction="sum") for row, ids in zip(logits, input_ids, strict=True)
    ]
    return torch.stack(sums).sum() / predicted_tokens(input_ids)


def predicted_tokens(input_ids: torch.Tensor) -> int:
    """Count the tokens of [batch, length] that a language model predicts: all but the first of each row."""
    return input_ids[:, 1:].numel()


causal_lm_loss.labelled_tokens = predicted_tokens


def check_causal(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Raise ValueError if a model is an encoder-decoder, or an encoder, whose logits depend on later tokens.

    The config of a decoder alone says neither. For others it compares the logits of the first half of int64 [length >=
    2] tokens before two second halves.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model: expected a causal language model, got {type(model).__name__}, an encoder-decoder")
    # GPT-NeoX has is_decoder=False too
    bidirectional = [getattr(config, name, None) is False for name in ("is_decoder", "causal")]
    if not any(bidirectional) and getattr(config, "attn_type", None) != "bi":
        return
    tokens = tokens[:PROBED]
    half = len(tokens) // 2
    changed = torch.cat([tokens[:half], tokens[:-half].flip(0)])
    logits = model(tokens[None], use_cache=False).logits[0, :half]
    changed_logits = model(changed[None], use_cache=False).logits[0, :half]
    rounding = max(1e-4, 4 * torch.finfo(logits.dtype).eps)
    if (logits.float() - changed_logits.float()).abs().max() > rounding * logits.float().abs().max():
        raise ValueError(
            f"model: expected a causal language model, got {type(model).__name__}, whose predictions depend on later "
            "tokens, as those of an encoder do"
        )


def perplexity(
    model: torch.nn.Module,
    windows: torch.Tensor,
    batch_size: int = EVALUATED_TOGETHER,
    progress: Progress | None = None,
) -> float:
    """exp of the mean next-token cross-entropy over windows, with equal weights for all tokens.

    On windows of 2048 tokens of all documents of WikiText-2's test split, joined by blank lines, this is the figure
    that SparseGPT, Wanda and MaskLLM report. The model runs in eval mode, with top-N masks; the mode of each module is
    restored.

    Args:
        model: a Hugging Face causal language model.
        windows: int64 [windows, length], on any device.
        batch_size: windows in a forward pass.
        progress: called with (windows done, windows in all).

    Returns:
        the perplexity; inf if it exceeds the range of a float.

    Raises:
        ValueError: if ``windows`` is not [windows, length] with at least one window of two tokens, ``batch_size`` is
            below 1, or the model is an encoder or an encoder-decoder.
    """
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows: expected [windows >= 1, length >= 2], got {list(windows.shape)}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    device = next(model.parameters()).device
    total = 0.0
    with without_gradients(model), evaluating(model):
        check_causal(model, windows[0].to(device))
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size].to(device)
            total += causal_lm_loss(model, batch).item() * len(batch)
            if progress is not None:
                progress(start + len(batch), len(windows))
    return _exp(total / len(windows))


class WordPerplexity(NamedTuple):
    """Perplexity by word, inf if it exceeds the range of a float, and other figures of the same log-likelihoods."""

    perplexity: float
    # most tokens of a forward pass
    window: int
    # number of predicted tokens
    tokens: int
    # of the original documents; bytes in UTF-8
    words: int
    bytes: int
    token_perplexity: float
    bits_per_byte: float


def word_perplexity(model: torch.nn.Module, tokenizer: Callable, documents: Sequence[str],
                    length: int | None = None, progress: Progress | None = None) -> WordPerplexity:  # fmt: skip
    """Compute perplexity by word, like the task wikitext of lm-eval (EleutherAI/lm-evaluation-harness 0.4).

    Each document is detokenized and tokenized by itself, and each of its tokens predicted. The sum of the losses is
    divided by the number of words in the original documents. Any text is possible; lm-eval uses WikiText-2 (Merity et
    al. 2016, arXiv 1609.07843), "EleutherAI/wikitext_document_level:wikitext-2-raw-v1" with the column "page". The
    model runs in eval mode; the mode of each module is restored.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.
        documents: original documents, see ``load_documents``.
        length: most tokens of a forward pass, at least 2. None: by lm-eval's rule that of the model's config, else of
            the tokenizer, else 2048.
        progress: called with (windows done, windows in all).

    Raises:
        ValueError: if there is no token to predict, a token is outside of the model's vocabulary, the tokenizer has no
            token for the beginning or end of text, ``length`` is below 2, or the model is an encoder or an
            encoder-decoder.
    """
    if length is not None and length < 2:
        raise ValueError(f"length: expected at least 2 tokens, got {length}")
    length = length or context_length(model, tokenizer)
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise ValueError(
            f"tokenizer: expected a token for the beginning or end of text, got {type(tokenizer).__name__} without; "
            "set its eos_token"
        )
    opening = tokenizer.decode(first)
    tokens = []
    for text in map(detokenized, documents):
        # add special tokens, unless the text already begins with the first one
        special = {"add_special_tokens": False} if text.startswith(opening) else {}
        # verbose=False silences the warning that the text is longer than the model's context
        tokens.append(tokenizer(text, verbose=False, **special)["input_ids"])
    windows = []
    for document_tokens in tokens:
        windows.extend(rolling_windows(document_tokens, first, length))
    if not windows:
        raise ValueError("text: expected at least 1 token, got none")
    check_vocabulary(torch.tensor([first, *chain.from_iterable(tokens)]), model.get_input_embeddings().num_embeddings)
    words = sum(len(re.split(r"\s+", document)) for document in documents)
    size = sum(len(document.encode()) for document in documents)
    nats = 0.0
    count = sum(map(len, tokens))
    device = next(model.parameters()).device
    with without_gradients(model), evaluating(model):
        inputs, targets = windows[0]
        check_causal(model, torch.tensor([*inputs, targets[-1]], device=device))
        for done, (inputs, targets) in enumerate(windows, 1):
            logits = model(torch.tensor([inputs], device=device), use_cache=False).logits[0, -len(targets) :]
            labels = torch.tensor(targets, device=logits.device)
            nats += sum(
                F.cross_entropy(logits_piece.float(), labels_piece, reduction="sum").item()
                for logits_piece, labels_piece in zip(logits.split(POSITIONS), labels.split(POSITIONS), strict=True)
            )
            if progress is not None:
                progress(done, len(windows))
    bits = nats / size / math.log(2)
    return WordPerplexity(_exp(nats / words), length, count, words, size, _exp(nats / count), bits)


def context_length(model: torch.nn.Module, tokenizer: Callable) -> int:
    """Context length of a model by lm-eval's rule: that of its config, else of its tokenizer, else CONTEXT."""
    config = getattr(model.config, "text_config", None) or model.config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    length = getattr(tokenizer, "model_max_length", None)
    # transformers sets 10**30 if a tokenizer gives none
    return int(length) if length is not None and length < 1e29 else CONTEXT


def detokenized(document: str) -> str:
    """Convert a document of WikiText to plain text, like lm-eval's ``wikitext_detokenizer``."""
    for pattern, text in DETOKENIZED:
        document = re.sub(pattern, text, document)
    return document


def rolling_windows(tokens: Sequence[int], first: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (inputs, targets) so that each token of a document is predicted once; targets belong to the last inputs.

    A window has at most ``length`` inputs and as many targets. The last window has the remaining targets; earlier
    tokens fill its inputs: ``get_rolling_token_windows`` of lm-eval with a context of one. ``first`` is the token
    before the document.
    """
    inputs = [first, *tokens]
    for begin in range(0, len(tokens), length):
        end = min(begin + length, len(tokens))
        yield inputs[max(end - length, 0) : end], list(tokens[begin:end])


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
