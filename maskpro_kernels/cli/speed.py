"""`maskpro speed`."""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..files import check_output, disk_errors, make_folder, write_whole
from ..report.plots import check_picture, draw_speed
from ..text.batches import batches
from ..text.sources import load_text
from .arguments import DTYPE, DTYPES, check_least, device_of
from .models import learned_positions, load, windows_of
from .progress import Progress, tell_as
from .run_files import check_not_going_on
from .versions import machine, versions

if TYPE_CHECKING:
    from ..hf import PeakMemory, SpeedReport

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
        measured, prompt = _measured(args, dtype, device)
        # there is room now for each in a process of its own
        gc.collect()
        memory = _peaks(args, dtype, prompt) if device.type == "cpu" else {}
        rows = _rows(measured, memory)
        found = _settings(args, dtype) | machine(device)
    found |= {"versions": versions(), "agree": measured.agree, "models": rows, "agreements": _agreements(measured)}
    if output is not None:
        make_folder(output)
        with disk_errors(output):
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


def _measured(args: argparse.Namespace, dtype: str, device: torch.device) -> tuple[SpeedReport, torch.Tensor]:
    """(what was measured, the prompt [rows, tokens] on the CPU); nothing holds the models any more."""
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
    return measure_speed(models, prompt.to(device), args.new_tokens, args.rounds, progress), prompt


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


def _peaks(args: argparse.Namespace, dtype: str, prompt: torch.Tensor) -> dict[str, PeakMemory | None]:
    """The peak memory of each model; a process that fails leaves None, and is told: what was timed is not lost."""
    from ..hf import peak_memory

    peaks, progress = {}, Progress("memory", "model", args.bars)
    for done, name in enumerate(args.models, start=1):
        try:
            peaks[name] = peak_memory(name, DTYPES[dtype], prompt, args.new_tokens)
        except ValueError as error:
            tell_as("warning", error)
            peaks[name] = None
        progress(done, len(args.models))
    return peaks


def _settings(args: argparse.Namespace, dtype: str) -> dict:
    names = ("prompt_tokens", "new_tokens", "batch_size", "rounds")
    return {name: getattr(args, name) for name in names} | {"dtype": dtype}


def _rows(measured: SpeedReport, memory: Mapping[str, PeakMemory | None]) -> list[dict]:
    """The figures of each model, as JSON holds them."""
    rows = []
    for model in measured.models:
        in_process = memory.get(model.name)
        peak = model.device_bytes if in_process is None else in_process.peak
        rows.append(
            {
                "model": model.name,
                "stored": model.stored,
                "weight_bytes": model.weight_bytes,
                "peak_memory": peak,
                "process_memory": None if in_process is None else asdict(in_process),
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
        row = asdict(found) | {"same_weights": found.same_weights, "within_rounding": found.within_rounding}
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
    titles = ("model", "stored", "weights MB", "peak MB", "prefill tokens/s", "decode tokens/s", "times", "ms a token")
    table = [titles, *(_figures(row, found["models"][0]) for row in found["models"])]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [above]
    for cells in table:
        texts = [f"{cell:<{width}}" for cell, width in zip(cells[:2], widths, strict=False)]
        figures = [f"{cell:>{width}}" for cell, width in zip(cells[2:], widths[2:], strict=True)]
        lines.append("  ".join([*texts, *figures]))
    lines.append(f"medians of {found['rounds']} rounds, quartiles in brackets; times: of the first model's decode")
    return lines + _about_memory(found) + [str(agreement) for agreement in measured.agreements]


def _figures(row: Mapping, first: Mapping) -> tuple[str, ...]:
    rate, peak = "decode_tokens_per_second", row["peak_memory"]
    return (
        row["model"],
        row["stored"],
        f"{row['weight_bytes'] / MB:.1f}",
        "unknown" if peak is None else f"{peak / MB:.1f}",
        _spread(row["prefill_tokens_per_second"]),
        _spread(row[rate]),
        f"{row[rate]['median'] / first[rate]['median']:.2f}",
        _spread(row["milliseconds_per_token"]),
    )


def _spread(figures: Mapping[str, float]) -> str:
    return "{median:.1f} ({low:.1f}-{high:.1f})".format(**figures)


def _about_memory(found: Mapping) -> list[str]:
    """What peak memory is, where it is known."""
    processes = [row["process_memory"] for row in found["models"] if row["process_memory"] is not None]
    if processes:
        before = min(process["before"] for process in processes)
        loading = ", loading included" if any(process["loading_included"] for process in processes) else ""
        return [f"peak memory: of a process of its own for each model{loading}; {before / MB:.1f} MB without a model"]
    if any(row["peak_memory"] is not None for row in found["models"]):
        return ["peak memory: the most that torch has allocated on the device"]
    return []
