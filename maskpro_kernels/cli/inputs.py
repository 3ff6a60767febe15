"""What a run learns from: texts and the model's own samples as windows of tokens, and the model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice

import torch

from ..linear_form import as_linears
from ..pruning.selection import layers_to_convert
from ..ranks import Ranks
from ..text.data import batches
from ..text.mixture import SELF, MixedBatches, check_windows, in_a_batch, parse_sources, turns
from ..text.stream import StreamedBatches, StreamedText, StreamedWindows
from ..training.estimator import Estimator
from .arguments import device_of, telling
from .changed_weights import needs_teacher_beforehand
from .models import load, windows_of
from .progress import tell
from .run_samples import run_samples
from .texts import Source, Texts, evaluation_windows, windows_of_part

Windows = torch.Tensor | StreamedWindows


@dataclass
class Inputs:
    """A model, its tokenizer, and windows of tokens by their use."""

    model: torch.nn.Module
    tokenizer: object
    tests: dict[str, torch.Tensor]
    validation: torch.Tensor
    initial_batches: Sequence[torch.Tensor]
    calibration: Sequence[torch.Tensor] | StreamedBatches


def read_inputs(args: argparse.Namespace, ranks: Ranks, estimator: Estimator) -> Inputs:
    """Load the texts and the model that the arguments of ``learn`` name, and draw samples of the model where asked for.

    Raises:
        ValueError, OSError, TypeError: if one is missing or unfit, or the texts are too short.
    """
    inputs, windows = ranks.all_of(lambda: _read(args))
    if SELF in dict(parse_sources(args.data)):
        held_out = 0 if windows else args.eval_windows
        wanted = _samples(args) + 2 * held_out
        own = ranks.first(lambda: run_samples(args, inputs.model, inputs.tokenizer, wanted))
        if held_out:
            # without a text to look at: the first samples are not learned from
            test, inputs.validation, own = own.split([held_out, held_out, wanted - 2 * held_out])
            inputs.tests = {"perplexity": test, **inputs.tests}
        windows[SELF] = own.to(device_of(args.device))
    if any(isinstance(found, StreamedWindows) for found in windows.values()):
        inputs.initial_batches, inputs.calibration = ranks.all_of(lambda: _streamed_batches(args, windows, estimator))
    else:
        found = _batches(args, windows)
        inputs.initial_batches, inputs.calibration = found[: args.init_batches], found[: _learned_from(args)]
    return inputs


def _read(args: argparse.Namespace) -> tuple[Inputs, dict[str, Windows]]:
    """Inputs without batches, and the windows of each text that these are made of."""
    loaded = Texts(args)
    texts, other = loaded.of(args.data), None
    if hasattr(args, "other_data"):
        with telling("other_data"):
            other = loaded.source(args.other_data)
    device = device_of(args.device)
    model, tokenizer = load(args.model, args.dtype, device, args.bars)
    with telling("model", "take another --pattern, --dtype or model"):
        # told now, not after the evaluation of the dense model
        as_linears(model)
        layers_to_convert(model, args.pattern)
    tests, validation = {}, torch.empty(0)
    if texts:
        tests["perplexity"] = evaluation_windows(args, texts, "test", model, tokenizer)
        validation = evaluation_windows(args, texts, "validation", model, tokenizer)
    if other is not None:
        found = windows_of_part(args, other, "test", args.eval_windows, model, tokenizer, "other_data")
        tests["other_perplexity"] = found
    windows = {name: _windows(args, text, model, tokenizer) for name, text in texts.items()}
    _check_windows(args, windows)
    loaded.tell_notes()
    return Inputs(model, tokenizer, tests, validation, (), ()), windows


def _check_windows(args: argparse.Namespace, windows: Mapping[str, Windows]) -> None:
    """Raise ValueError or OSError, before minutes of drawing samples, if there are too few windows for a batch."""
    held = {name: found for name, found in windows.items() if isinstance(found, torch.Tensor)}
    with _telling_windows():
        check_windows(parse_sources(args.data), held, args.batch_size)
    with telling("data"):
        for streamed in windows.values():
            if isinstance(streamed, StreamedWindows):
                next(iter(streamed))


def _windows(args: argparse.Namespace, text: Source, model: torch.nn.Module, tokenizer) -> Windows:
    """What batches are made of: on the device, or streamed."""
    if isinstance(text, StreamedText):
        return StreamedWindows(text, tokenizer, args.seq_len, args.seed, model.get_input_embeddings().num_embeddings)
    found = windows_of(text["calibration"], model, tokenizer, args.seq_len, "data", "--seq-len")
    return found.to(device_of(args.device))


def _telling_windows() -> AbstractContextManager:
    return telling("data", "give a longer text, or a smaller --batch-size or --seq-len")


def _batches(args: argparse.Namespace, windows: Mapping[str, torch.Tensor]) -> Sequence[torch.Tensor]:
    """All batches: of one text its own, of several sources as many as the run takes."""
    sources = parse_sources(args.data)
    with _telling_windows():
        if _one_text(args):
            return batches(windows[sources[0].name], args.batch_size, args.seed)
        for name, count in _windows_taken(args).items():
            if not count:
                tell(f"no window of {name!r} is learned from: its share of so few batches is less than one")
        return MixedBatches(windows, sources, args.batch_size, _taken(args), args.seed)


def _streamed_batches(
    args: argparse.Namespace, windows: Mapping[str, Windows], estimator: Estimator
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor] | StreamedBatches]:
    """(those of the initial mask, those of the steps), where texts are streamed.

    The latter are in memory where they come again or are needed before the first step; else a step takes them as they
    come.
    """
    stream = StreamedBatches(windows, parse_sources(args.data), args.batch_size, args.seed, device_of(args.device))
    beforehand = estimator.journaled or estimator.needs_initial_losses or needs_teacher_beforehand(args)
    held = beforehand or _learned_from(args) < args.steps * args.accumulate
    with telling("data"):
        found = list(islice(stream, _taken(args) if held else args.init_batches))
    for name, streamed in windows.items():
        if isinstance(streamed, StreamedWindows):
            tell(
                f"{streamed.read} documents of {name!r} were read for the first {len(found)} batches; {streamed.short} "
                f"of them have fewer than {args.seq_len} tokens and are left out"
            )
    return found[: args.init_batches], found[: _learned_from(args)] if held else stream


def _one_text(args: argparse.Namespace) -> bool:
    names = [name for name, _ in parse_sources(args.data)]
    return len(names) == 1 and names != [SELF]


def _learned_from(args: argparse.Namespace) -> int:
    """How many distinct batches the steps take at most: of a text no more, for initial losses are found of each."""
    all_steps = args.steps * args.accumulate
    return all_steps if args.calibration_batches is None else min(args.calibration_batches, all_steps)


def _taken(args: argparse.Namespace) -> int:
    """How many distinct batches of several sources a run takes."""
    return max(_learned_from(args), args.init_batches)


def _samples(args: argparse.Namespace) -> int:
    """How many windows of its own samples a run takes, at most ``--samples``, and at least as many as a batch may."""
    most = in_a_batch(dict(parse_sources(args.data))[SELF], args.batch_size)
    return max(most, min(args.samples, _windows_taken(args)[SELF]))


def _windows_taken(args: argparse.Namespace) -> dict[str, int]:
    """How many windows of each of several sources a run takes, those included that come round again."""
    sources = parse_sources(args.data)
    whose = turns([source.share for source in sources], args.batch_size * _taken(args))
    return {name: whose.count(index) for index, (name, _) in enumerate(sources)}
