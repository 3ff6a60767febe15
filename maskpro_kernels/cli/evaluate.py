"""`maskpro eval`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ..files import write_whole
from ..pattern import NMPattern
from ..report import FROZEN
from ..unfuse import in_linear_form
from .arguments import DTYPE, check_least, device_of, new_file, telling
from .models import load
from .protocols import HeldOutText, ProtocolText, result_lines
from .run_files import REPORT, check_not_going_on, read_report, stored_data
from .shared_options import EVALUATION


def evaluate(args: argparse.Namespace) -> None:
    """Print the perplexity of a run or a model; of a run also what follows its pattern."""
    device, output = device_of(args.device), new_file(args, "output")
    folder = Path(args.model)
    check_not_going_on(args.model)
    report = folder / REPORT
    run = read_report(report) if report.is_file() else None
    dtype = getattr(args, "dtype", DTYPE if run is None else run["dtype"])
    text = _text(args, folder, run)
    model, tokenizer = load(args.model, dtype, device, args)
    found, lines = {"model": args.model, "dtype": dtype}, []
    if run is not None:
        lines.append(_follows(model, run))
        if run["weights"] != FROZEN:
            lines.append(f"not the dense model's weights under a mask: {run['weights']}")
    found |= text.measure(model, tokenizer)
    if run is not None and (dtype, found.get("windows_digest")) == (run["dtype"], run["eval_digest"]):
        found["dense_perplexity"] = run["table"][0]["perplexity"]
        lines.insert(0, f"the dense model there: {found['dense_perplexity']:.2f}, by the run's table")
    lines = [*result_lines(found), *lines]
    try:
        if output is not None:
            with telling("output"):
                write_whole(output, json.dumps(found, indent=2, default=str).encode())
    finally:
        # also where the file could not be written: hours may be behind it
        print("\n".join(lines))


def _text(args: argparse.Namespace, folder: Path, run: Mapping | None) -> HeldOutText | ProtocolText:
    """What is evaluated: by a protocol that is named, else of ``--data`` or of the run.

    Raises:
        ValueError, OSError: if there is no text, or it cannot be read.
    """
    as_run = run is not None and not vars(args).keys() & {"data", "text_column", "documents"}
    if hasattr(args, "protocol"):
        return ProtocolText(args, None if run is None else run["data"])
    if not hasattr(args, "data"):
        if run is None:
            found = "no run that has begun to learn" if folder.exists() else "no such folder"
            raise ValueError(
                f"data: expected --data or --protocol, since only a run has a text of its own, got none; at "
                f"{args.model!r} there is {found}"
            )
        vars(args).update(stored_data(folder) | vars(args))
    own = EVALUATION if run is None else {name: run[name] for name in EVALUATION}
    vars(args).update(own | vars(args))
    check_least(args, eval_windows=1, eval_length=2)
    of_table = as_run and all(getattr(args, name) == run[name] for name in EVALUATION)
    return HeldOutText(args, run["eval_digest"] if of_table else None)


def _follows(model: torch.nn.Module, run: Mapping) -> str:
    pattern, follow, total = NMPattern(run["pattern"]), 0, 0
    with in_linear_form(model):
        linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        for name in run["converted"]:
            if name not in linears or linears[name].in_features % pattern.m:
                raise ValueError(
                    f"run: expected a linear layer {name!r} that {pattern} divides, as {REPORT} tells, got none in the "
                    f"checkpoint; restore {REPORT} from a copy, or move it away"
                )
            kept = (linears[name].weight.reshape(-1, pattern.m) != 0).sum(1)
            follow += int((kept <= pattern.n).sum())
            total += len(kept)
    return f"{pattern} {follow / total:.2%} of {total} groups have at most {pattern.n} nonzeros"
