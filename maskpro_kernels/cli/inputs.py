"""What a run learns from: texts and the model's own samples as windows of tokens, and the model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from ..learn.estimator import Estimator
from ..prune.selection import layers_to_convert
from ..ranks import Ranks
from ..text.batches import MixedBatches, batches, check_windows, in_a_batch, parse_sources, turns
from ..text.sources import SELF
from ..unfuse import as_linears
from .arguments import device_of, telling
from .models import (
    check_positions,
    checkpoint_activations,
    device_of_inputs,
    load,
    load_spread,
    tell_beyond_context,
    windows_of,
)
from .progress import tell
from .run_samples import run_samples
from .texts import Texts, digest_to_learn, evaluation_parts, evaluation_windows

# From so many times on it is told that a window is learned from again and again
OFTEN = 3


@dataclass
class Inputs:
    """A model, its tokenizer, windows of tokens by their use.

    ``learned_texts`` has the digest of each text of ``--data``, in their order, see ``digest_to_learn``.
    """

    model: torch.nn.Module
    tokenizer: object
    tests: dict[str, torch.Tensor]
    validation: torch.Tensor
    initial_batches: Sequence[torch.Tensor]
    calibration: Sequence[torch.Tensor]
    learned_texts: Sequence[str] = ()


def read_inputs(
    args: argparse.Namespace,
    ranks: Ranks,
    estimator: Estimator,
    read_mask: Callable[[torch.nn.Module], None] | None = None,
) -> Inputs:
    """Load the texts and the model that the arguments of ``learn`` name, and draw samples of the model where asked for.

    Args:
        args: of ``learn``, complete.
        ranks: that learn together.
        read_mask: reads a mask for the model; rank 0 calls it before anything takes long.

    Raises:
        ValueError, OSError, TypeError: if one is missing or unfit, or the texts are too short.
    """
    inputs, windows = ranks.all_of(lambda: _read(args))
    if read_mask is not None:
        ranks.first(lambda: read_mask(inputs.model))
    if SELF in dict(parse_sources(args.data)):
        held_out = 0 if windows else args.eval_windows
        wanted = _samples(args) + 2 * held_out
        own = ranks.first(lambda: run_samples(args, inputs.model, inputs.tokenizer, wanted))
        if held_out:
            # without a text to look at: the first samples are not learned from
            test, inputs.validation, own = own.split([held_out, held_out, wanted - 2 * held_out])
            inputs.tests = {"perplexity": test, **inputs.tests}
        windows[SELF] = own.to(device_of_inputs(inputs.model))
    # a loss for each draw tells too little to learn a text by heart
    if not estimator.journaled:
        _tell_of_repeats(args, windows)
    found = _batches(args, windows)
    inputs.initial_batches, inputs.calibration = found[: args.init_batches], found[: _learned_from(args)]
    return inputs


def _read(args: argparse.Namespace) -> tuple[Inputs, dict[str, torch.Tensor]]:
    """Inputs without batches, and the windows of each text that these are made of."""
    loaded = Texts(args)
    texts, other = loaded.of(args.data), None
    if hasattr(args, "other_data"):
        with telling("other_data"):
            other = loaded.source(args.other_data)
    model, tokenizer = _model(args)
    # samples are drawn in windows too, which no text checks
    check_positions(model, seq_len=args.seq_len, eval_length=args.eval_length)
    tests, validation = {}, torch.empty(0)
    if texts:
        held_out = {split: evaluation_parts(args, texts, split) for split in ("test", "validation")}
        tests["perplexity"] = evaluation_windows(args, held_out["test"], "test", model, tokenizer)
        validation = evaluation_windows(args, held_out["validation"], "validation", model, tokenizer)
    if other is not None:
        found = windows_of(other["test"], model, tokenizer, args.eval_length, "other_data", "--eval-length")
        tests["other_perplexity"] = found[: args.eval_windows]
    device = device_of_inputs(model)
    windows = {
        name: windows_of(text["calibration"], model, tokenizer, args.seq_len, "data", "--seq-len").to(device)
        for name, text in texts.items()
    }
    with _telling_windows():
        # before minutes of drawing samples
        check_windows(parse_sources(args.data), windows, args.batch_size)
    for name in ("seq_len", "eval_length"):
        tell_beyond_context(model, name, getattr(args, name))
    learned_texts = list(map(digest_to_learn, texts.values()))
    return Inputs(model, tokenizer, tests, validation, (), (), learned_texts), windows


def _tell_of_repeats(args: argparse.Namespace, windows: Mapping[str, torch.Tensor]) -> None:
    """Tell of each source whose windows come round often, on average, and what is too short."""
    batches_taken, sources = _learned_from(args), parse_sources(args.data)
    whose = turns([source.share for source in sources], args.batch_size * batches_taken)
    for index, (name, _) in enumerate(sources):
        held, taken = len(windows[name]), whose.count(index)
        if _one_text(args):
            # what does not fill a batch is left out
            held = held // args.batch_size * args.batch_size
        distinct = min(held, taken)
        times = taken * args.steps * args.accumulate / batches_taken / max(distinct, 1)
        if times >= OFTEN and taken:
            more = "--calibration-batches" if distinct == taken else "--samples" if name == SELF else ""
            tell(
                f"{name!r}: {distinct} windows of {args.seq_len} tokens are learned from about {times:.0f} times each, "
                f"and a mask may learn them by heart; give {f'a higher {more}' if more else 'more text'}, or take "
                "fewer --steps"
            )


def _model(args: argparse.Namespace):
    """(model, tokenizer) on the devices of a run."""
    if hasattr(args, "device_map"):
        model, tokenizer = load_spread(args.model, args.dtype, args.device_map, args)
        offloaded = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
        if offloaded is not None:
            raise ValueError(
                f"device_map: expected a device that computes for each weight, got {offloaded} offloaded, where no "
                "mask can be learned; give another map, or a machine with more memory"
            )
    else:
        model, tokenizer = load(args.model, args.dtype, device_of(args.device), args)
    with telling("model", "take another --pattern, --dtype or model"):
        # told now, not after the evaluation of the dense model
        as_linears(model)
        layers_to_convert(model, args.pattern)
    if args.gradient_checkpointing:
        checkpoint_activations(model)
    return model, tokenizer


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
