"""The folder of a run before its first step: who may use it, its settings, and the results that it starts from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ...files import check_output, discard, make_folder, write_whole
from ...learn.run import LOCK
from ...prune.initial_masks import INITIAL_MASKS
from ..config import Learn, parse
from ..inputs import (
    FORMAT,
    PROGRESS,
    REPORT,
    SAMPLES,
    SETTINGS,
    cannot_resume,
    default_dtype,
    naming,
    read_json,
    read_progress,
    report,
    resume_command,
    state_without_report,
)
from .options import CHANGEABLE, with_absolute_paths

START = "start.json"
TEACHER = "teacher"
# Lock of the process that learns; the trainer within it has one of its own
RUN_LOCK = ".run.lock"
# Settings that were not yet complete at a power cut
UNFINISHED = f"{SETTINGS}.*.tmp"


def options_to_store(options: Learn) -> Learn:
    """Options of the run to resume, or those given, with the dtype that a run keeps if it resumes on another CPU."""
    if options.resume is not None:
        return read_options(options)
    if options.dtype is None:
        return dataclasses.replace(options, dtype=default_dtype(options.device))
    return options


def read_options(resume_options: Learn) -> Learn:
    """Read the options of the run in the folder of ``resume``, and add options that may change.

    Raises:
        ValueError: if the folder is not an unfinished run of this version, or another option is given.
    """
    folder = Path(resume_options.resume)
    defaults = {field.name: field.default for field in dataclasses.fields(Learn)}
    changed = [name for name, default in defaults.items() if getattr(resume_options, name) != default]
    refused = [name for name in changed if name not in ("resume", *CHANGEABLE)]
    if refused:
        allowed = ", ".join(f"--{name.replace('_', '-')}" for name in CHANGEABLE)
        raise ValueError(f"resume: expected no other option but {allowed}, got {', '.join(refused)}")
    _check_not_ended(folder)
    if not (folder / SETTINGS).is_file():
        raise ValueError(f"resume: expected the folder of `maskpro learn`, got {str(folder)!r}, without {SETTINGS}")
    if cannot_resume(folder):
        raise ValueError(
            f"resume: expected a run that has not ended, got {str(folder)!r}; {state_without_report(folder)}"
        )
    read_json(folder / SETTINGS)
    with naming("resume"):
        options, _ = parse("learn", [str(folder / SETTINGS), f"--output={folder}"])
    for name in CHANGEABLE:
        if name in changed:
            setattr(options, name, getattr(resume_options, name))
    return options


def _check_not_ended(folder: Path) -> None:
    if (folder / REPORT).is_file():
        raise ValueError(
            f"resume: expected a run that has not ended, got {str(folder)!r}; use `maskpro eval` or `export`"
        )


def claim(output: Path, lock: FileLock, resuming: bool) -> None:
    """Raise unless this process may learn in a folder; acquire the lock of a run that it has."""
    if resuming or Path(lock.lock_file).exists():
        _acquire(lock, "resume" if resuming else "output", output)
    if resuming:
        # again: another process may have ended it
        _check_not_ended(output)
    else:
        _check_output(output)


def _acquire(lock: FileLock, argument: str, output: Path) -> None:
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"{argument}: expected a folder that no other process learns in, got {str(output)!r}"
        ) from error


def _check_output(output: Path) -> None:
    """Raise unless a folder can get a new run: missing, empty, or with a run before its first step."""
    names = {path.name for path in output.iterdir() if not path.match(UNFINISHED)} if output.is_dir() else set()
    if names == {PROGRESS} and {path.name for path in (output / PROGRESS).iterdir()} <= {LOCK, RUN_LOCK}:
        # of a run that ended before its settings were on disk
        return
    if (output / SETTINGS).is_file() and not (output / REPORT).is_file():
        read_json(output / SETTINGS)
        if names <= {SETTINGS, PROGRESS} and not (output / PROGRESS / START).is_file():
            report(f"{output} has a run that was stopped before its first step: this one takes its place")
            return
        raise ValueError(f"output: expected a new or empty folder, got {str(output)!r}; {state_without_report(output)}")
    check_output(output)


def write_settings(options: Learn, output: Path, lock: FileLock) -> None:
    """Write options for resuming from any folder; remove files of a run that did not begin."""
    make_folder(output / PROGRESS)
    if not lock.is_locked:
        _acquire(lock, "output", output)
        # again: while the model was loaded, another process may have begun a run, or ended one
        _check_output(output)
    for path in (*output.glob(UNFINISHED), *(output / PROGRESS).iterdir()):
        if path.name not in (SAMPLES, TEACHER, LOCK, RUN_LOCK):
            discard(path)
    content = {"format": FORMAT, "options": with_absolute_paths(options)}
    write_whole(output / SETTINGS, json.dumps(content, indent=1).encode())


def read_start(options: Learn) -> dict | None:
    """Read the results before the first step; None before it. ValueError if the run began with other options."""
    progress = Path(options.output) / PROGRESS
    if not (progress / START).is_file():
        return None
    with naming("resume"):
        start = read_progress(progress / START)
        for name, value in with_absolute_paths(options).items():
            value_at_start = start["options"][name]
            # model and texts may have moved: their content is compared; that of an initial mask is in the logits
            is_path = name in ("model", "data") or (name == "init" and not {value, value_at_start} & {*INITIAL_MASKS})
            if name not in CHANGEABLE and not is_path and value != value_at_start:
                raise ValueError(
                    f"expected {name} {value_at_start!r}, with which the run began, got {value!r} in "
                    f"{str(progress.parent / SETTINGS)!r}"
                )
    return start


@contextmanager
def hint_at_resume(output: Path, moment: str) -> Iterator[None]:
    """Report how to continue a run that is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        written = (output / SETTINGS).is_file()
        report(f"stopped {moment}; {resume_command(output)}" if written else "nothing was written")
        raise
