"""What a run loads: the dense model, windows of the texts that evaluate it, and batches that it learns from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

from ...files import digest, write_tensors
from ...modules import tensors_of_base
from ...prune.selection import layers_to_convert
from ...ranks import Ranks
from ...text.batches import (
    MixedBatches,
    batches,
    check_windows,
    in_a_batch,
    other_kind,
    parse_sources,
    sample_windows,
    split_by_share,
    start_token,
    texts_of,
    turns,
)
from ...text.sources import SELF, load_text
from ...unfuse import as_linears
from ..config import EVAL_LENGTH, Learn
from ..inputs import (
    PROGRESS,
    SAMPLES,
    SETTINGS,
    Progress,
    check_context,
    device_of,
    load,
    naming,
    positions_of,
    read_samples,
    report,
    report_device,
    windows_of,
)
from .options import batches_of_steps

# Most batches for the initial mask
INIT_BATCHES = 16


@dataclass
class Dense:
    """A model without masks.

    Attributes:
        base: digest of the model.
        layers: those that can get a mask, by name.
        skipped: names of the others, with the reasons.
    """

    model: nn.Module
    tokenizer: object
    base: str
    layers: dict[str, nn.Module]
    skipped: dict[str, str]


@dataclass
class Windows:
    """Windows of the texts, int64 [windows, length].

    Attributes:
        tests: to evaluate, by column of the table.
        validation: of the validation text.
        sources: to learn from, by name of the source.
        samples: number of windows to sample from the dense model.
    """

    tests: dict[str, Tensor]
    validation: Tensor
    sources: dict[str, Tensor]
    samples: int = 0


@dataclass
class Data:
    """What a run is evaluated by and learns from.

    Attributes:
        tests: test windows by column of the table.
        validation: windows of the validation text.
        initial: batches for the initial mask.
        calibration: batches of the steps.
    """

    tests: dict[str, Tensor]
    validation: Tensor
    initial: Sequence[Tensor]
    calibration: Sequence[Tensor]

    @property
    def evaluated(self) -> str:
        """Digest of the windows by which the run is evaluated."""
        return digest([*self.tests.values(), self.validation])


def load_dense(options: Learn, ranks: Ranks, start: Mapping | None) -> Dense:
    """Load the model, with its modules as nn.Linear layers.

    Raises:
        ValueError: if it is not that of the run that ``start`` belongs to.
    """
    report_device(options.device)
    device = options.device if options.device == "auto" else device_of(options.device)
    cure = None if start is None else f"if it has moved, change its path in {Path(options.output) / SETTINGS}"
    with naming("model", cure):
        model, tokenizer = ranks.run_on_all(load, options.model, options.dtype, device)
    base = ranks.run_on_main(digest, tensors_of_base(model))
    if start is not None and start["base"] != base:
        raise ValueError(
            f"resume: expected the base model of the run, got other weights in {options.model!r}; restore it"
        )
    skipped = ranks.run_on_all(as_linears, model)
    layers, reasons = ranks.run_on_all(layers_to_convert, model, options.pattern)
    if options.gradient_checkpointing:
        from ...hf import checkpoint_activations

        checkpoint_activations(model)
    return Dense(model, tokenizer, base, layers, skipped | reasons)


def load_texts(options: Learn) -> dict[str, dict[str, str]]:
    """Load the texts of the data by name, and under "" a text of another kind, which shows forgetting."""
    with naming("data"):
        texts = {name: load_text(name, documents=options.documents) for name, _ in texts_of(options.data)}
    name_of_other = other_kind(options.data)
    return texts | ({"": load_text(name_of_other)} if name_of_other else {})


def cut_windows(options: Learn, texts: Mapping[str, Mapping[str, str]], dense: Dense) -> Windows:
    """Cut the texts of ``load_texts`` into windows, and count those to sample from the model.

    Raises:
        ValueError: if a text is too short, or windows are longer than the context of the model.
    """
    model = dense.model
    tokenizer = dense.tokenizer
    length = min(EVAL_LENGTH, positions_of(model) or EVAL_LENGTH)
    from_texts = texts_of(options.data)
    counts = split_by_share(from_texts, options.eval_windows)
    by_split = {"test": [], "validation": []}
    for split, cut in by_split.items():
        for (name, _), count in zip(from_texts, counts, strict=True):
            cut.append(windows_of(texts[name][split], model, tokenizer, length, "data")[:count])
    tests = {"perplexity": torch.cat(by_split["test"])} if from_texts else {}
    validation = torch.cat(by_split["validation"]) if from_texts else torch.empty(0)
    if "" in texts:
        other_windows = windows_of(texts[""]["test"], model, tokenizer, length, "other text")
        tests["other_perplexity"] = other_windows[: options.eval_windows]
    device = model.get_input_embeddings().weight.device
    windows = Windows(tests, validation, {})
    for name, _ in from_texts:
        calibration = windows_of(texts[name]["calibration"], model, tokenizer, options.seq_len, "data", "--seq-len")
        windows.sources[name] = calibration.to(device)
    sources = parse_sources(options.data)
    with naming("data", "give a longer text, or a smaller --batch-size or --seq-len"):
        check_windows(sources, windows.sources, options.batch_size)
    shares = dict(sources)
    if SELF in shares:
        check_context(model, options.seq_len, "seq_len")
        windows.samples = _count_samples(options, shares)
    return windows


def _count_samples(options: Learn, shares: Mapping[str, Fraction]) -> int:
    """Number of windows to sample for the batches, and without a text also for evaluation."""
    order = turns(list(shares.values()), options.batch_size * max(batches_of_steps(options), INIT_BATCHES))
    wanted = order.count(list(shares).index(SELF))
    held_out = 2 * options.eval_windows if list(shares) == [SELF] else 0
    return max(in_a_batch(shares[SELF], options.batch_size), wanted) + held_out


def choose_batches(options: Learn, ranks: Ranks, dense: Dense, windows: Windows, start: Mapping | None) -> Data:
    """Mix windows into batches, with samples of the dense model if the data names them.

    Raises:
        ValueError: if the run that ``start`` belongs to is evaluated on other windows.
    """
    tests = windows.tests
    validation = windows.validation
    windows_by_source = dict(windows.sources)
    if windows.samples:
        samples = ranks.run_on_main(_samples, options, dense, windows.samples)
        if not tests.keys() - {"other_perplexity"}:
            # without a text, the first samples are for evaluation
            test, validation, samples = samples.tensor_split([options.eval_windows, 2 * options.eval_windows])
            tests = {"perplexity": test, **tests}
        windows_by_source[SELF] = samples.to(dense.model.get_input_embeddings().weight.device)
    count = batches_of_steps(options)
    sources = parse_sources(options.data)
    if len(sources) == 1 and not windows.samples:
        mixed = batches(windows_by_source[sources[0].name], options.batch_size, options.seed)
    else:
        mixed = MixedBatches(windows_by_source, sources, options.batch_size, max(count, INIT_BATCHES), options.seed)
    data = Data(tests, validation, initial=mixed[:INIT_BATCHES], calibration=mixed[:count])
    if start is not None and start["evaluated"] != data.evaluated:
        raise ValueError("resume: expected the texts that the run is evaluated on, got others; restore them")
    return data


def _samples(options: Learn, dense: Dense, count: int) -> Tensor:
    """Sample int64 [windows, seq_len] from the dense model, or load those of the same settings from the folder."""
    progress = Path(options.output) / PROGRESS
    start = start_token(dense.tokenizer)
    settings = json.dumps([start, count, options.seq_len, options.seed, dense.base])
    if (stored := read_samples(progress, settings)) is not None:
        return stored
    report(f"sampling {count} windows of {options.seq_len} tokens from the dense model, to store in {progress}")
    bar = Progress("samples", "step")
    tokens = sample_windows(dense.model, start, count, options.seq_len, seed=options.seed, progress=bar)
    write_tensors({"tokens": tokens}, progress / SAMPLES, {"settings": settings, "digest": digest([tokens])})
    return tokens
