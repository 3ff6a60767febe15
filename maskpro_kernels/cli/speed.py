"""`maskpro speed`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..files import check_output, make_folder, write_whole
from ..report.plots import check_picture, draw_speed
from ..text.batches import batches
from ..text.sources import load_text
from .arguments import DTYPE, check_least, device_of
from .models import learned_positions, load, windows_of
from .progress import Progress
from .run_files import check_not_going_on
from .versions import machine, versions

if TYPE_CHECKING:
    from ..hf import SpeedReport

FIGURES, PICTURE = "speed.json", "speed.png"
# A text that every Python has; which of its windows are the prompts
PROMPTS, SEED = "pydoc", 0
MB = 1e6


def speed(args: argparse.Namespace) -> int:
    """Print how fast models read and write, and whether they write the same; write it and draw it where asked for.

    Returns:
        1 where models with the same weights differ by more than rounding, else 0.
    """
    check_least(args, prompt_tokens=2, new_tokens=2, batch_size=1, rounds=1)
    if hasattr(args, "threads"):
        check_least(args, threads=1)
    device, dtype = device_of(args.device), getattr(args, "dtype", DTYPE)
    output = Path(args.output) if hasattr(args, "output") else None
    if output is not None:
        check_output(output)
        check_picture("output", output / PICTURE)
    for at, name in enumerate(args.models):
        if name in args.models[:at]:
            raise ValueError(f"models: expected each model once, got {name!r} again; leave it out")
        check_not_going_on(name)
    with _threads(getattr(args, "threads", None)):
        measured = _measured(args, dtype, device)
        rows = _rows(measured)
        found = _settings(args, dtype) | machine(device)
    found |= {"versions": versions(), "agree": measured.agree, "models": rows, "agreements": _agreements(measured)}
    if output is not None:
        make_folder(output)
        write_whole(output / FIGURES, (json.dumps(found, indent=2) + "\n").encode())
        draw_speed(rows, output / PICTURE)
    print("\n".join(_lines(found, measured)))
    return int(not measured.agree)


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measured(args: argparse.Namespace, dtype: str, device: torch.device) -> SpeedReport:
    from ..hf import check_model, measure_speed

    for name in args.models:
        check_model(name)
    models, vocabulary = {}, None
    for name in args.models:
        model, tokenizer = load(name, dtype, device, args)
        _check_positions(args, name, model)
        if vocabulary is None:
            vocabulary, prompt = tokenizer.get_vocab(), _prompt(args, model, tokenizer)
        elif tokenizer.get_vocab() != vocabulary:
            raise ValueError(
                f"models: expected one vocabulary, got another in {name!r} than in {args.models[0]!r}; measure it apart"
            )
        models[name] = model
    progress = Progress("measure", "round", args.bars)
    return measure_speed(models, prompt.to(device), args.new_tokens, args.rounds, progress)


def _check_positions(args: argparse.Namespace, name: str, model: torch.nn.Module) -> None:
    positions, wanted = learned_positions(model), args.prompt_tokens + args.new_tokens
    if positions is not None and wanted > positions:
        raise ValueError(
            f"new_tokens: expected at most {positions} tokens together with --prompt-tokens, which {name!r} has "
            f"positions for, got {wanted}; give fewer"
        )


def _prompt(args: argparse.Namespace, model: torch.nn.Module, tokenizer) -> torch.Tensor:
    """int64 [rows, tokens]: windows of a text, always the same ones."""
    text = load_text(PROMPTS)["test"]
    windows = windows_of(text, model, tokenizer, args.prompt_tokens, "prompt_tokens", "--prompt-tokens")
    return batches(windows, args.batch_size, SEED)[0]


def _settings(args: argparse.Namespace, dtype: str) -> dict:
    names = ("prompt_tokens", "new_tokens", "batch_size", "rounds")
    return {name: getattr(args, name) for name in names} | {"dtype": dtype}


def _rows(measured: SpeedReport) -> list[dict]:
    """The figures of each model, as JSON holds them."""
    rows = []
    for model in measured.models:
        rows.append(
            {
                "model": model.name,
                "stored": model.stored,
                "weight_bytes": model.weight_bytes,
                "peak_memory": model.device_bytes,
                "prefill_tokens_per_second": asdict(measured.prefill_rate(model)),
                "decode_tokens_per_second": asdict(measured.decode_rate(model)),
                "milliseconds_per_token": asdict(model.step_milliseconds),
                "prefill_seconds": list(model.prefill_seconds),
                "step_seconds": list(model.step_seconds),
            }
        )
    return rows


def _agreements(measured: SpeedReport) -> list[dict]:
    """What is asked of each agreement, as JSON holds it, which has no word for what is no number."""
    rows = []
    for found in measured.agreements:
        row = asdict(found) | {"within_rounding": found.within_rounding}
        if found.gap is not None and not math.isfinite(found.gap):
            row["gap"] = None
        rows.append(row)
    return rows


def _lines(found: Mapping, measured: SpeedReport) -> list[str]:
    """The table, what stands above it, and its footnotes."""
    above = (
        f"prompts of {found['prompt_tokens']} tokens, {found['new_tokens']} new ones, "
        f"batch size {found['batch_size']}, {found['dtype']}, on {found['device_name']}"
        + (f", threads: {found['threads']}" if found["device"] == "cpu" else "")
    )
    titles = (
        "model",
        "stored",
        "weights MB",
        "GPU peak MB",
        "prefill tokens/s",
        "decode tokens/s",
        "times",
        "ms a token",
    )
    table = [titles, *(_figures(row, found["models"][0]) for row in found["models"])]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [above]
    for cells in table:
        texts = [f"{cell:<{width}}" for cell, width in zip(cells[:2], widths, strict=False)]
        figures = [f"{cell:>{width}}" for cell, width in zip(cells[2:], widths[2:], strict=True)]
        lines.append("  ".join([*texts, *figures]))
    lines.append(f"medians of {found['rounds']} rounds, quartiles in brackets; times: of the first model's decode")
    return lines + [str(agreement) for agreement in measured.agreements]


def _figures(row: Mapping, first: Mapping) -> tuple[str, ...]:
    rate, peak = "decode_tokens_per_second", row["peak_memory"]
    return (
        row["model"],
        row["stored"],
        f"{row['weight_bytes'] / MB:.1f}",
        "-" if peak is None else f"{peak / MB:.1f}",
        _spread(row["prefill_tokens_per_second"]),
        _spread(row[rate]),
        f"{row[rate]['median'] / first[rate]['median']:.2f}",
        _spread(row["milliseconds_per_token"]),
    )


def _spread(figures: Mapping[str, float]) -> str:
    return "{median:.1f} ({low:.1f}-{high:.1f})".format(**figures)
