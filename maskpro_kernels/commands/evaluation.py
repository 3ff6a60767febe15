"""`maskpro eval` and `maskpro compare`: what runs have reached."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data import load_text, windows
from ..evaluation import perplexity
from ..pattern import NMPattern
from ..pictures import check_pictures, draw_perplexity
from .arguments import DTYPE, check_least, device_of, naming, new_file
from .held_out import print_table
from .models import load
from .runs import REPORT, read_report


def evaluate(args: argparse.Namespace) -> None:
    """Print the perplexity of a run or a model; of a run also how many groups follow its pattern."""
    check_least(args, eval_windows=1, eval_length=2)
    device = device_of(args.device)
    report = Path(args.model) / REPORT
    run = read_report(report) if report.is_file() else None
    dtype = getattr(args, "dtype", DTYPE if run is None else run["dtype"])
    with naming("data"):
        texts = load_text(args.data)
    model, tokenizer = load(args.model, dtype, device)
    test = windows(texts["test"], tokenizer, args.eval_length)[: args.eval_windows]
    print(f"perplexity {perplexity(model, test, progress=True):.2f} over {test.numel()} tokens")
    if run is not None:
        pattern = NMPattern(run["pattern"])
        follow = total = 0
        for name in run["converted"]:
            kept = (model.get_submodule(name).weight.reshape(-1, pattern.m) != 0).sum(1)
            follow += int((kept <= pattern.n).sum())
            total += len(kept)
        print(f"{pattern} {follow / total:.2%} of {total} groups have at most {pattern.n} nonzeros")


def compare(args: argparse.Namespace) -> None:
    """Print one table of several runs, and draw one picture of them where asked for."""
    picture = new_file(args, "picture")
    reports = {str(Path(run)): read_report(Path(run) / REPORT) for run in args.runs}
    if picture is not None:
        check_pictures("picture")
    first = next(iter(reports.values()))
    # the same source may be another text elsewhere
    others = {(report["other_data"], report["table"][0].get("other_perplexity")) for report in reports.values()}
    initial, learned, curves = {}, [], {}
    for run, report in reports.items():
        for name in ("model", "data", "pattern", "dtype", "eval_length", "eval_tokens"):
            if report[name] != first[name]:
                raise ValueError(f"run: expected the same {name} in all, got {first[name]} and {report[name]} in {run}")
        table = report["table"]
        if len(others) > 1:
            table = [{name: value for name, value in row.items() if name != "other_perplexity"} for row in table]
        *before, last = table
        for row in before:
            known = initial.setdefault(row["method"], row)
            if any(known[name] != row[name] for name in row if name != "seconds"):
                # from other calibration batches
                name = f"{row['method']}: {run}"
                initial[name] = row | {"method": name}
        learned.append(last | {"method": f"{last['method']}: {run}"})
        curves[run] = report["validation"]
    print_table([*initial.values(), *learned])
    if picture is not None:
        draw_perplexity(curves, picture)
