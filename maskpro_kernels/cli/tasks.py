"""Tasks of lm-eval, for `maskpro eval --tasks`."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import logging
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from ..extras import missing
from .arguments import check_least

BATCH_SIZE = 8
# What stands for the zero-shot tasks of the paper (arXiv 2506.12876)
PAPER = "paper"
PAPERS_TASKS = ("hellaswag", "race", "piqa", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
BESIDE = ("include_path", "limit", "batch_size")


class Tasks:
    """The tasks that the command line names, looked up before a model is loaded.

    Raises:
        ValueError: if an argument is not as `maskpro eval` takes it, lm-eval is not installed, or knows no such task.
    """

    def __init__(self, args: argparse.Namespace):
        names = task_names(args.tasks)
        check_least(args, **{name: 1 for name in ("limit", "batch_size") if hasattr(args, name)})
        folder = getattr(args, "include_path", None)
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(
                f"include_path: expected a folder with YAML files of tasks, got {folder!r}: no such folder"
            )
        lacking = missing("lm_eval", "accelerate")
        if lacking:
            raise ValueError(f"tasks: expected {lacking}")
        # late: its import takes seconds
        from lm_eval.tasks import TaskManager

        self._limit, self._batch_size = getattr(args, "limit", None), getattr(args, "batch_size", BATCH_SIZE)
        with _told_in_one_line("include_path"):
            self._manager = TaskManager(include_path=folder)
        for name in names:
            if not self._manager.match_tasks([name]):
                near = difflib.get_close_matches(name, self._manager.all_tasks, n=3)
                told = f", such as {', '.join(near)}" if near else "; `lm-eval ls tasks` lists them"
                raise ValueError(f"tasks: expected one that lm-eval knows, got {name!r}{told}")
        self.names = self._manager.match_tasks(names)

    def evaluate(self, model: torch.nn.Module, tokenizer, bars: bool) -> dict:
        """The results of ``lm_eval.simple_evaluate``, as JSON holds them, without samples.

        Raises:
            ValueError: if a task fails, as where its data cannot be loaded, or the tokenizer has no token that text
                begins or ends with.
        """
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise ValueError(
                f"tasks: expected a tokenizer with a token that text begins or ends with, as lm-eval needs it, got "
                f"{type(tokenizer).__name__} without; set its eos_token"
            )
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        # it prints on stdout how it bootstraps
        with _told_in_one_line("tasks"), contextlib.redirect_stdout(sys.stderr), _bars(bars):
            with _quietly("lm_eval.models.huggingface"):
                wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self._batch_size)
            found = lm_eval.simple_evaluate(
                wrapped,
                tasks=self.names,
                limit=self._limit,
                task_manager=self._manager,
                log_samples=False,
            )
        return {
            "lm_eval": version("lm_eval"),
            "limit": self._limit,
            **{name: found[name] for name in ("results", "groups", "versions", "n-shot", "n-samples") if name in found},
        }


def task_names(tasks: str) -> list[str]:
    """The names in a list with commas between them, PAPER replaced by the tasks that it stands for, each once.

    Raises:
        ValueError: if a name is empty.
    """
    names = [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise ValueError(f"tasks: expected names of tasks with a comma between them, got {tasks!r}")
    return list(dict.fromkeys(chain.from_iterable(PAPERS_TASKS if name == PAPER else [name] for name in names)))


def check_beside_tasks(args: argparse.Namespace) -> None:
    """Raise ValueError if an option of tasks stands without any."""
    for name in BESIDE:
        if hasattr(args, name):
            raise ValueError(f"{name}: expected --tasks beside it, got {getattr(args, name)!r} without; leave it out")


class TaskFigure(NamedTuple):
    """A metric of a task or a group, and its standard error where lm-eval tells one."""

    task: str
    metric: str
    value: object
    error: object


def task_figures(found: Mapping) -> list[TaskFigure]:
    """The figures in what ``Tasks.evaluate`` gives, groups first."""
    figures = []
    for name, result in {**found.get("groups", {}), **found["results"]}.items():
        for metric, value in result.items():
            kind, _, of = metric.partition(",")
            # aliases and counts have no filter behind a comma, errors stand beside their metric
            if of and not kind.endswith("_stderr"):
                told = kind if of == "none" else f"{kind} ({of})"
                figures.append(TaskFigure(name, told, value, result.get(f"{kind}_stderr,{of}")))
    return figures


def task_lines(found: Mapping) -> list[str]:
    """A table of these figures."""
    rows = [("task", "metric", "value", "stderr")]
    for task, metric, value, error in task_figures(found):
        rows.append((task, metric, _figure(value), _figure(error)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"{task:<{widths[0]}}  {metric:<{widths[1]}}  {value:>{widths[2]}}  {error:>{widths[3]}}".rstrip()
        for task, metric, value, error in rows
    ]


def _figure(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)


@contextlib.contextmanager
def _told_in_one_line(argument: str) -> Iterator[None]:
    """Errors of lm-eval, of its tasks' own code and of what loads their data, which are of any kind."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{argument}: lm-eval ended with {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _quietly(logger: str) -> Iterator[None]:
    """Without warnings of a logger: a model that is loaded already is meant."""
    logger = logging.getLogger(logger)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _bars(wanted: bool) -> Iterator[None]:
    """Without bars where they are not wanted: lm-eval takes no option for most of its own."""
    before = tqdm.__init__

    @functools.wraps(before)
    def without(bar, *arguments, **options):
        before(bar, *arguments, **options | {"disable": True})

    if not wanted:
        tqdm.__init__ = without
    try:
        yield
    finally:
        tqdm.__init__ = before
