"""`maskpro compare` of files that `maskpro eval --output` wrote: a row for each, a column for each figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import NamedTuple

from ..checked_json import load_json
from ..report.plots import check_picture, draw_results
from ..text.protocols import WORD
from .arguments import telling
from .progress import tell
from .tasks import task_figures

PERPLEXITY = "perplexity"
NO_TASKS: Mapping = {"results": {}}


class Column(NamedTuple):
    """What all figures of a column have in common.

    Attributes:
        title: of the column.
        of: by the name of each thing that has to be the same (by what it is known, how it is told).
    """

    title: str
    of: Mapping[str, tuple[object, object]]


def compare_results(files: Sequence[str], picture: Path | None) -> None:
    """Print the figures of several results, and draw them where asked for.

    Raises:
        ValueError: if one is no result, or figures of one column were found by two protocols, or on two texts.
    """
    results = {file: _read(Path(file)) for file in files}
    if picture is not None:
        check_picture("picture", picture)
    columns: dict[str, tuple[str, Column]] = {}
    rows = {file: _row(file, result, columns) for file, result in results.items()}
    if not columns:
        raise ValueError(f"run: expected results with figures, got none in {', '.join(files)}")
    _tell_tokenizers(results)
    titles = [column.title for _, column in columns.values()]
    table = [["result", "dtype", *titles]]
    for file, row in rows.items():
        figures = [f"{row[name]:.{_digits(name)}f}" if name in row else "-" for name in columns]
        table.append([file, results[file]["dtype"], *figures])
    _print(table)
    if picture is not None:
        with telling("picture"):
            draw_results(rows, {name: column.title for name, (_, column) in columns.items()}, picture)


def _read(path: Path) -> dict:
    try:
        found = load_json(path.read_text(encoding="utf-8"))
        if not isinstance(found["dtype"], str):
            raise TypeError(f"{found['dtype']!r} for the dtype")
        if PERPLEXITY in found:
            _common(found), found["tokenizer"]["digest"]
            _check_number(found[PERPLEXITY])
        for figure in task_figures(found.get("tasks", NO_TASKS)):
            _check_number(figure.value)
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"run: expected a folder written by `maskpro learn`, or a file of `maskpro eval --output`, got "
            f"{str(path)!r}: {error!r}"
        ) from error


def _check_number(value: object) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{value!r} for a number")


def _common(result: Mapping) -> Column:
    """The column of a perplexity."""
    by = " by word" if str(result["protocol"]).startswith(WORD) else ""
    # one text may be called by two names
    text = result["text_digest"], f"{result['data']} ({result['text_digest']})"
    of = {name: (result[name], result[name]) for name in ("protocol", "window")}
    return Column(f"{result['protocol']} perplexity{by}", {**of, "text": text})


def _row(file: str, result: Mapping, columns: dict[str, tuple[str, Column]]) -> dict[str, float]:
    """The figures of a result by column; new columns are added with the file that has them first."""
    row: dict[str, float] = {}

    def add(name: str, column: Column, value: float) -> None:
        first, known = columns.setdefault(name, (file, column))
        for what, (identity, told) in column.of.items():
            if identity != known.of[what][0]:
                raise ValueError(
                    f"run: expected the same {what} in a column, got {known.of[what][1]} in {first!r} and {told} in "
                    f"{file!r}; compare them apart"
                )
        row[name] = value

    if PERPLEXITY in result:
        add(PERPLEXITY, _common(result), result[PERPLEXITY])
    tasks = result.get("tasks", NO_TASKS)
    for task, metric, value, _ in task_figures(tasks):
        of = {f"{kind} of {task}": tasks.get(kind, {}).get(task) for kind in ("versions", "n-shot", "n-samples")}
        add(f"{task} {metric}", Column(f"{task} {metric}", {what: (own, own) for what, own in of.items()}), value)
    return row


def _tell_tokenizers(results: Mapping[str, Mapping]) -> None:
    """Tell where perplexities by token are of several tokenizers: their tokens are not the same ones."""
    known: dict[str, str] = {}
    for file, result in results.items():
        if PERPLEXITY in result and not str(result["protocol"]).startswith(WORD):
            known.setdefault(result["tokenizer"]["digest"], file)
    if len(known) > 1:
        first, other, *_ = known.values()
        tell(
            f"{first} and {other} have different tokenizers, and perplexities by token do not compare then; "
            f"--protocol {WORD} does"
        )


def _digits(name: str) -> int:
    return 2 if name == PERPLEXITY else 4


def _print(table: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        # names to the left, figures to the right
        names = [f"{cell:<{width}}" for cell, width in zip(row[:2], widths, strict=False)]
        figures = [f"{cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=True)]
        print("  ".join([*names, *figures]))
