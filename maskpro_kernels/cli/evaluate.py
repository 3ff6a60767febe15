"""`maskpro eval`: perplexities of runs and models in one table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from torch import nn

from ..files import write_whole
from ..text.batches import parse_sources, texts_of
from ..text.perplexity import EVALUATED_TOGETHER, perplexity, word_perplexity
from ..text.sources import load_documents, load_text
from .config import EVAL_LENGTH, EVAL_WINDOWS, Evaluate
from .inputs import (
    REPORT,
    Progress,
    check_context,
    check_ended,
    check_least,
    check_new_file,
    default_dtype,
    device_of,
    load,
    naming,
    positions_of,
    print_table,
    read_report,
    report_as,
    report_device,
    windows_of,
)

# Returns figures of a model on a text, by suffix of their name, "" for the perplexity
Measure = Callable[[nn.Module, object], dict[str, float]]


def evaluate(options: Evaluate, models: list[str]) -> None:
    """Print a row for each model, with the dense model of a run above it; with --output also write them."""
    check_least(options, eval_windows=1, eval_length=2, documents=1)
    if options.protocol != "held-out":
        for name in ("documents", "eval_windows"):
            if (value := getattr(options, name)) is not None:
                raise ValueError(f"{name}: expected none with --protocol {options.protocol}, got {value}")
    for name in models:
        check_ended(name)
    device = device_of(options.device)
    if options.output is not None:
        check_new_file(options.output)
    runs = {name: read_report(Path(name)) for name in models if (Path(name) / REPORT).is_file()}
    settings = next(iter(runs.values()))["settings"] if runs else {}
    dtype = options.dtype or settings.get("dtype") or default_dtype(options.device)
    data = options.data or settings.get("data")
    if data is None:
        if absent := [name for name in models if not Path(name).exists()]:
            raise ValueError(f"models: expected the folder of a run or of a model, got {absent[0]!r}; ids need --data")
        raise ValueError("data: expected --data, since only runs have texts, got none")
    names = [name for name, _ in texts_of(data)]
    if not names:
        raise ValueError(f"data: expected a text, got {data!r}, and samples are no test of a mask")
    if len(names) < len(parse_sources(data)) and options.data is not None:
        raise ValueError(f"data: expected texts alone, got {data!r}, and samples are no test of a mask")
    with naming("data"):
        measures = {name: _measure_of(options, name, settings) for name in names}
    bases = dict.fromkeys(run["settings"]["model"] for run in runs.values())
    for base in [name for name in bases if Path(name).is_absolute() and not Path(name).exists()]:
        report_as("warning", f"the dense model {base} has moved: it is left out; name its new place beside the run")
        del bases[base]
    report_device(options.device)
    rows = []
    for name in dict.fromkeys([*bases, *models]):
        model, tokenizer = load(name, dtype, device)
        row = {"method": f"dense {name}" if name in bases else name}
        for text, measure in measures.items():
            row |= {f"{text}{end}": figure for end, figure in measure(model, tokenizer).items()}
        rows.append(row)
        # before the next one
        del model
    if options.output is not None:
        content = {"data": data, "protocol": options.protocol, "dtype": dtype, "rows": rows}
        write_whole(Path(options.output), (json.dumps(content, indent=1) + "\n").encode())
    titles = {name: (name, 4 if name.endswith("bits a byte") else 2) for name in rows[0] if name != "method"}
    print_table(rows, titles, f"{options.protocol} perplexity, {dtype}")


def _measure_of(options: Evaluate, name: str, settings: dict) -> Measure:
    """Read a text and return the function that evaluates a model on it."""
    work = f"evaluation on {name}"
    if options.protocol == "word":
        documents = load_documents(name, options.text_column)

        def measure(model: nn.Module, tokenizer) -> dict[str, float]:
            check_context(model, options.eval_length or 0, "eval_length")
            result = word_perplexity(model, tokenizer, documents, options.eval_length, Progress(work, "window"))
            return {"": result.perplexity, ", bits a byte": result.bits_per_byte}

        return measure
    if options.protocol == "held-out":
        documents = options.documents or (settings.get("documents") if options.data is None else None)
        text = load_text(name, options.text_column, documents)["test"]
        count = options.eval_windows or settings.get("eval_windows", EVAL_WINDOWS)
        batch_size = EVALUATED_TOGETHER
    else:
        text = "\n\n".join(load_documents(name, options.text_column))
        count = None
        batch_size = 1

    def measure(model: nn.Module, tokenizer) -> dict[str, float]:
        length = options.eval_length or _default_length(model)
        windows = windows_of(text, model, tokenizer, length, "data", "--eval-length")[:count]
        return {"": perplexity(model, windows, batch_size=batch_size, progress=Progress(work, "window"))}

    return measure


def _default_length(model: nn.Module) -> int:
    return min(EVAL_LENGTH, positions_of(model) or EVAL_LENGTH)
