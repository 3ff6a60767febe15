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
from .protocols import HELD_OUT
from .tasks import task_figures

PERPLEXITY, TOKENS, WINDOWS = "perplexity", "tokens", "windows_digest"
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
        ValueError: if one is no result, or figures of one column were found by two protocols, on two texts, or in other
            windows of one.
    """
    results = {file: _read(Path(file)) for file in files}
    if picture is not None:
        check_picture("picture", picture)
    columns: dict[str, tuple[str, Column]] = {}
    rows = {file: _row(file, result, columns) for file, result in results.items()}
    if not columns:
        raise ValueError(f"run: expected results with figures, got none in {', '.join(files)}")
    _check_windows(results)
    _tell_tokenizers(results)
    of_text = [TOKENS] if PERPLEXITY in columns else []
    table = [["result", "dtype", *of_text, *(column.title for _, column in columns.values())]]
    for file, row in rows.items():
        tokens = [str(results[file][TOKENS]) if PERPLEXITY in row else "-" for _ in of_text]
        figures = [f"{row[name]:.{_digits(name)}f}" if name in row else "-" for name in columns]
        table.append([file, results[file]["dtype"], *tokens, *figures])
    _print(table)
    _print_dtypes(results, rows)
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
            _check_number(found[TOKENS])
            if found["protocol"] == HELD_OUT:
                found[WINDOWS]
        for figure in task_figures(found.get("tasks", NO_TASKS)):
            _check_number(figure.value)
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # whose own words hold the whole file
        reason = "no text in UTF-8" if isinstance(error, UnicodeDecodeError) else repr(error)
        raise ValueError(
            f"run: expected a folder written by `maskpro learn`, or a file of `maskpro eval --output`, got "
            f"{str(path)!r}: {reason}"
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


def _check_windows(results: Mapping[str, Mapping]) -> None:
    """Raise ValueError where perplexities by token of one tokenizer are of different windows of a text."""
    firsts: dict[str, str] = {}
    for file, result in results.items():
        if PERPLEXITY not in result or str(result["protocol"]).startswith(WORD):
            continue
        # another tokenizer has other tokens of the same text, and of that it is told
        first = firsts.setdefault(result["tokenizer"]["digest"], file)
        known, came = results[first][TOKENS], result[TOKENS]
        if known != came:
            again = "evaluate both with the same --eval-windows, or " if result["protocol"] == HELD_OUT else ""
            raise ValueError(
                f"run: expected the same number of tokens in a column, got {known} in windows of {result['window']} in "
                f"{first!r} and {came} in {file!r}; {again}compare them apart"
            )
        if results[first].get(WINDOWS) != result.get(WINDOWS):
            raise ValueError(
                f"run: expected the same windows in a column, got others in {file!r} than in {first!r}, as by other "
                "shares of --data; compare them apart"
            )


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


def _print_dtypes(results: Mapping[str, Mapping], rows: Mapping[str, Mapping]) -> None:
    """Print which dtypes there are, where figures of one column are of several."""
    columns: dict[str, set[str]] = {}
    files: dict[str, list[str]] = {}
    for file, row in rows.items():
        dtype = results[file]["dtype"]
        files.setdefault(dtype, []).append(file)
        for name in row:
            columns.setdefault(name, set()).add(dtype)
    if any(len(dtypes) > 1 for dtypes in columns.values()):
        told = "; ".join(f"{dtype} in {', '.join(names)}" for dtype, names in files.items())
        print(f"the dtypes differ, {told}: --dtype of `maskpro eval` sets one")


def _digits(name: str) -> int:
    return 2 if name == PERPLEXITY else 4


def _print(table: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        # names to the left, figures to the right
        names = [f"{cell:<{width}}" for cell, width in zip(row[:2], widths, strict=False)]
        figures = [f"{cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=True)]
        print("  ".join([*names, *figures]))
