"""`maskpro compare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..report.plots import check_picture, draw_perplexity
from ..text.mixture import texts_of
from .arguments import new_file, telling
from .compared_results import compare_results
from .perplexities import print_table
from .run_files import REPORT, read_report


def compare(args: argparse.Namespace) -> None:
    """Print one table of several runs, or results of `maskpro eval`, and draw one picture of them where asked for."""
    picture = new_file(args, "picture")
    files = [run for run in args.runs if Path(run).is_file()]
    if files:
        if len(files) < len(args.runs):
            raise ValueError(
                f"run: expected folders of runs alone, or files of `maskpro eval` alone, got {files[0]!r} beside "
                f"{next(run for run in args.runs if run not in files)!r}; evaluate the run by `maskpro eval --output`"
            )
        compare_results(files, picture)
        return
    reports = {str(Path(run)): read_report(Path(run) / REPORT) for run in args.runs}
    if picture is not None:
        check_picture("picture", picture)
    first = next(iter(reports.values()))
    # the same source may be another text elsewhere
    others = {(report["other_data"], report["table"][0].get("other_perplexity")) for report in reports.values()}
    initial, learned, curves = {}, [], {}
    for run, report in reports.items():
        for name in ("model", "data", "pattern", "dtype", "eval_length", "eval_tokens"):
            # runs may learn from other sources besides, if they look at the same texts
            same = texts_of(report[name]) == texts_of(first[name]) if name == "data" else report[name] == first[name]
            if not same:
                raise ValueError(
                    f"run: expected the same {name} in all, got {first[name]} and {report[name]} in {run}; compare it "
                    "apart"
                )
        if report["eval_digest"] != first["eval_digest"]:
            raise ValueError(
                f"run: expected the same test windows in all, got others in {run}; compare it apart. Without a text "
                "they are samples, of a --seed and --seq-len; a text of one name may have changed"
            )
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
        with telling("picture"):
            draw_perplexity(curves, picture)
