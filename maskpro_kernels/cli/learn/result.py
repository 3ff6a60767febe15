"""The result of a run: checkpoint, logits, picture and report in its folder, and the table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ...files import digest, discard, sync, unfinished, write_whole
from ...learn.snapshots import snapshots_in
from ...modules import masked_layers
from ...ops.pattern import NMPattern
from ...prune.finalize import finalize
from ..inputs import COLUMNS, FORMAT, REPORT, digest_of_weights, print_table, report_as, save
from .evaluation import changes_of_weights, name_in_table, table_row
from .folder import TEACHER
from .options import with_absolute_paths
from .steps import Run


def write_result(run: Run, tokenizer) -> None:
    """Write checkpoint, logits, picture and report, and print the table."""
    options = run.options
    output = run.output
    pattern = NMPattern(options.pattern)
    changes = changes_of_weights(options, trained=digest_of_weights(run.model) != run.start["start_weights"])
    table = list(run.start["table"])
    if options.steps:
        method = name_in_table(options.estimator, options, changes)
        table.append(table_row(method, run.model, run.data.tests, run.seconds))
    else:
        method = table[-1]["method"]
    run.save_logits()
    layers = masked_layers(run.model)
    groups = sum(layer.logits.numel() // pattern.m for layer in layers.values())
    # None if the first snapshot is damaged
    flipped = run.trainer.moved()
    logits = digest(layers[name].logits for name in sorted(layers))
    for path in unfinished(output):
        # of this run, killed at this point
        discard(path)
    save(finalize(run.model), tokenizer, output, options.model, str(pattern), table)
    _save_picture(output / "perplexity.png", method, run.validation.rows)
    weights = ", ".join(changes) or "weights frozen"
    moved_weights = run.trainer.weights_moved()
    content = {
        "format": FORMAT,
        "settings": with_absolute_paths(options),
        "table": table,
        "validation": run.validation.rows,
        "weights": weights,
        "moved_weights": moved_weights,
        "groups": groups,
        "flipped_groups": flipped,
        "logits": logits,
        "converted": run.start["converted"],
        "skipped": run.start["skipped"],
        "steps": run.trainer.metrics,
    }
    # last, also on the disk: a folder with a report is a finished run
    for written in (*filter(Path.is_file, output.iterdir()), output):
        sync(written)
    write_whole(output / REPORT, (json.dumps(content, indent=1) + "\n").encode())
    # the result is in the logits; keep the start of a replay
    kept = 1 if run.trainer.estimator.journaled else 0
    for snapshot in snapshots_in(run.progress)[kept:]:
        discard(snapshot)
    shutil.rmtree(run.progress / TEACHER, ignore_errors=True)
    _warn_if_rising(run.validation.rows)
    print_table(table, COLUMNS, "method")
    if options.steps:
        moved = "an unknown number" if flipped is None else f"{flipped:,}"
        result = f"{moved} of {groups:,} groups differ from the initial mask"
    else:
        result = f"{method}: the mask of {groups:,} groups"
    if moved_weights is not None:
        weights += f"; kept weights moved by {moved_weights:.2%} of their length"
    print(f"{result}; {weights}; written to {output}")


def _save_picture(path: Path, title: str, rows: Sequence[dict]) -> None:
    """Draw the validation perplexities."""
    # it takes a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["perplexity"] for row in rows], "o-")
    axes.set(title=title, xlabel="steps", ylabel="validation perplexity")
    figure.savefig(path, dpi=120)


def _warn_if_rising(rows: Sequence[dict]) -> None:
    best = min(rows, key=lambda row: row["perplexity"])
    last = rows[-1]["perplexity"]
    if not last <= 1.01 * best["perplexity"]:
        report_as(
            "warning",
            f"the validation perplexity was lowest at step {best['step']}, {best['perplexity']:.2f}, and is "
            f"{last:.2f} at the end; fewer --steps, more text or a lower rate may give a lower one",
        )
