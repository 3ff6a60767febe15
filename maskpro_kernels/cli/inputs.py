"""What a run learns from: texts and the model's own samples as windows of tokens, and the model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from ..pruning.selection import layers_to_convert
from ..ranks import Ranks
from ..text.data import batches, load_text
from ..text.mixture import (
    SELF,
    MixedBatches,
    check_windows,
    in_a_batch,
    parse_sources,
    shared_out,
    texts_of,
    turns,
)
from ..training.memory import MemoryNeed
from .arguments import device_of, telling
from .models import checkpoint_activations, device_of_inputs, load, load_spread, windows_of
from .progress import tell
from .run_samples import run_samples


@dataclass
class Inputs:
    """A model, its tokenizer, windows of tokens by their use, and the memory that steps will take."""

    model: torch.nn.Module
    tokenizer: object
    tests: dict[str, torch.Tensor]
    validation: torch.Tensor
    initial_batches: Sequence[torch.Tensor]
    calibration: Sequence[torch.Tensor]
    memory: MemoryNeed | None = None


def load_texts(data: str) -> dict[str, dict[str, str]]:
    """``load_text`` of each source of a list that is a text, by its name."""
    with telling("data"):
        return {name: load_text(name) for name, _ in texts_of(data)}


def evaluation_windows(
    args: argparse.Namespace, texts: Mapping[str, Mapping[str, str]], split: str, model: torch.nn.Module, tokenizer
) -> torch.Tensor:
    """Windows to evaluate, at most ``--eval-windows``: of each text as many as ``shared_out`` says.

    It is told where one of several texts has fewer.

    Args:
        texts: of ``load_texts``.
        split: "test" or "validation".
    """
    sources, found = texts_of(args.data), []
    for (name, _), count in zip(sources, shared_out(sources, args.eval_windows), strict=True):
        own = windows_of(texts[name][split], model, tokenizer, args.eval_length, "data", "--eval-length")
        if len(own) < count and len(sources) > 1:
            tell(
                f"the {split} text of {name!r} has {len(own)} windows of {args.eval_length} tokens, fewer than the "
                f"{count} of its share"
            )
        found.append(own[:count])
    return torch.cat(found)


def read_inputs(args: argparse.Namespace, ranks: Ranks, need_of: Callable[[torch.nn.Module], MemoryNeed]) -> Inputs:
    """Load the texts and the model that the arguments of ``learn`` name, and draw samples of the model where asked for.

    Args:
        args: of ``learn``, complete.
        ranks: that learn together.
        need_of: gives the memory that a run on a model takes; rank 0 calls it as soon as the model is there.

    Raises:
        ValueError, OSError, TypeError: if one is missing or unfit, or the texts are too short.
    """
    inputs, windows = ranks.all_of(lambda: _read(args))
    inputs.memory = ranks.first(lambda: need_of(inputs.model))
    if SELF in dict(parse_sources(args.data)):
        held_out = 0 if windows else args.eval_windows
        wanted = _samples(args) + 2 * held_out
        own = ranks.first(lambda: run_samples(args, inputs.model, inputs.tokenizer, wanted))
        if held_out:
            # without a text to look at: the first samples are not learned from
            test, inputs.validation, own = own.split([held_out, held_out, wanted - 2 * held_out])
            inputs.tests = {"perplexity": test, **inputs.tests}
        windows[SELF] = own.to(device_of_inputs(inputs.model))
    calibration = _batches(args, windows)
    inputs.initial_batches, inputs.calibration = calibration[: args.init_batches], calibration[: _learned_from(args)]
    return inputs


def _read(args: argparse.Namespace) -> tuple[Inputs, dict[str, torch.Tensor]]:
    """Inputs without batches, and the windows of each text that these are made of."""
    texts, other = load_texts(args.data), None
    if hasattr(args, "other_data"):
        with telling("other_data"):
            other = load_text(args.other_data)["test"]
    model, tokenizer = _model(args)
    device = device_of_inputs(model)
    tests, validation = {}, torch.empty(0)
    if texts:
        tests["perplexity"] = evaluation_windows(args, texts, "test", model, tokenizer)
        validation = evaluation_windows(args, texts, "validation", model, tokenizer)
    if other is not None:
        found = windows_of(other, model, tokenizer, args.eval_length, "other_data", "--eval-length")
        tests["other_perplexity"] = found[: args.eval_windows]
    windows = {
        name: windows_of(text["calibration"], model, tokenizer, args.seq_len, "data", "--seq-len").to(device)
        for name, text in texts.items()
    }
    with _telling_windows():
        # before minutes of drawing samples
        check_windows(parse_sources(args.data), windows, args.batch_size)
    return Inputs(model, tokenizer, tests, validation, (), ()), windows


def _model(args: argparse.Namespace):
    """(model, tokenizer) on the devices of a run."""
    if hasattr(args, "device_map"):
        model, tokenizer = load_spread(args.model, args.dtype, args.device_map, args.bars)
        offloaded = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
        if offloaded is not None:
            raise ValueError(
                f"device_map: expected a device that computes for each weight, got {offloaded} offloaded, where no "
                "mask can be learned; give another map, or a machine with more memory"
            )
    else:
        model, tokenizer = load(args.model, args.dtype, device_of(args.device), args.bars)
    with telling("model", "take another --pattern, --dtype or model"):
        # told now, not after the evaluation of the dense model
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
