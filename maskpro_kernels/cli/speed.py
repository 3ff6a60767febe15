"""`maskpro speed`: compare the speed of models."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch

from ..files import write_whole
from ..text.batches import batches
from ..text.sources import load_text
from .config import Speed
from .inputs import (
    Progress,
    check_ended,
    check_least,
    check_new_file,
    device_of,
    load,
    positions_of,
    report_device,
    windows_of,
)

MB = 1e6
TITLES = ("model", "stored", "weights MB", "peak MB", "prefill tokens/s", "decode tokens/s", "times")


def speed(options: Speed, models: list[str]) -> int:
    """Print the speed of models, and whether they generate the same tokens; with --output also write it.

    Returns:
        1 if models with equal weights differ by more than rounding, else 0.
    """
    from ..hf import check_model, measure_speed

    check_least(options, prompt_tokens=2, new_tokens=2, batch_size=1, rounds=1)
    device = device_of(options.device)
    if options.output is not None:
        check_new_file(options.output)
    if len(set(models)) < len(models):
        raise ValueError(f"models: expected each model once, got {', '.join(models)}")
    for name in models:
        check_ended(name)
        check_model(name)
    report_device(options.device)
    loaded = {}
    vocabulary = None
    prompt = None
    for name in models:
        model, tokenizer = load(name, options.dtype, device)
        positions = positions_of(model)
        length = options.prompt_tokens + options.new_tokens
        if positions is not None and length > positions:
            raise ValueError(
                f"new_tokens: expected at most {positions} tokens together with --prompt-tokens, the context of "
                f"{name!r}, got {length}"
            )
        if vocabulary is None:
            vocabulary = tokenizer.get_vocab()
            # a text in every Python
            text = load_text("pydoc")["test"]
            windows = windows_of(text, model, tokenizer, options.prompt_tokens, "prompt_tokens", "--prompt-tokens")
            prompt = batches(windows, options.batch_size, seed=0)[0].to(device)
        elif tokenizer.get_vocab() != vocabulary:
            raise ValueError(f"models: expected one vocabulary, got another in {name!r} than in {models[0]!r}")
        loaded[name] = model
    measured = measure_speed(loaded, prompt, options.new_tokens, options.rounds, Progress("measure", "round"))
    rows = [
        {
            "model": model.name,
            "stored": model.stored,
            "weight_bytes": model.weight_bytes,
            "peak_memory": model.device_bytes,
            "prefill_tokens_per_second": asdict(measured.prefill_rate(model)),
            "decode_tokens_per_second": asdict(measured.decode_rate(model)),
        }
        for model in measured.models
    ]
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    if options.output is not None:
        agreements = [asdict(agreement) for agreement in measured.agreements]
        content = {"options": vars(options), "device": device_name, "agree": measured.agree, "models": rows}
        text = json.dumps(content | {"agreements": agreements}, indent=1) + "\n"
        write_whole(Path(options.output), text.encode())
    print(
        f"prompts of {options.prompt_tokens} tokens, {options.new_tokens} new ones, batch size {options.batch_size}, "
        f"{options.dtype}, on {device_name}" + (f", threads: {torch.get_num_threads()}" if device.type == "cpu" else "")
    )
    table = [TITLES, *(_figures(row, rows[0]) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        texts = [f"{cell:<{width}}" for cell, width in zip(cells[:2], widths[:2], strict=True)]
        figures = [f"{cell:>{width}}" for cell, width in zip(cells[2:], widths[2:], strict=True)]
        print("  ".join([*texts, *figures]))
    print(f"medians of {options.rounds} rounds, quartiles in brackets; times: of the first model's decode")
    for agreement in measured.agreements:
        print(agreement)
    return int(not measured.agree)


def _processor() -> str:
    # on Linux, except ARM
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _figures(row: dict, first: dict) -> tuple[str, ...]:
    def spread(name: str) -> str:
        return "{median:.1f} ({low:.1f}-{high:.1f})".format(**row[name])

    decode = "decode_tokens_per_second"
    return (
        row["model"],
        row["stored"],
        f"{row['weight_bytes'] / MB:.1f}",
        "-" if row["peak_memory"] is None else f"{row['peak_memory'] / MB:.1f}",
        spread("prefill_tokens_per_second"),
        spread(decode),
        f"{row[decode]['median'] / first[decode]['median']:.2f}",
    )
