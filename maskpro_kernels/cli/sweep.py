"""`maskpro sweep`: runs of `maskpro learn` over sets of options, one after the other, and what they found together."""

from __future__ import annotations

import argparse
import gc
import traceback
from pathlib import Path

import torch

from .config_file import TRUST
from .learn import take_run
from .memory import forget_used_memory
from .progress import tell
from .shared_work import SHARED
from .sweep_file import SweepRun, check_files, read_sweep
from .sweep_folder import BEGUN, FAILED, FINISHED, NEW, SweepFolder
from .sweep_results import SweepResults
from .sweep_texts import told_changes

# Of these the message says what is wrong; others are faults, whose traceback is told as well
TOLD = (ValueError, TypeError, OSError, FloatingPointError, torch.OutOfMemoryError)


def sweep(args: argparse.Namespace) -> int:
    """Take the runs that are left of a FILE; gives 1 where one has failed."""
    file, trust = Path(args.file), {TRUST: True} if hasattr(args, TRUST) else {}
    runs, notes = read_sweep(file, trust)
    folder = SweepFolder(Path(args.output), runs)
    results = SweepResults(folder)
    for run in runs:
        if not folder.has_begun(run):
            check_files(run, file)
    for note in notes:
        tell(f"sweep: {note}")
    for told in told_changes(results.finished):
        tell(f"sweep: {told}")
    for name in folder.others:
        tell(f"sweep: {name} is no run of {file} any more: it is left alone")
    if args.dry_run:
        for run in runs:
            print(f"{folder.state(run):<8}  {folder.name(run)}")
        return 0
    with folder.held():
        stopped = _take_runs(folder, results, args.bars)
    results.print()
    if stopped:
        tell("sweep: stopped; the same command goes on with it")
    return int(FAILED in map(folder.state, runs))


def _take_runs(folder: SweepFolder, results: SweepResults, bars: bool) -> bool:
    """Take the runs that are left, and write what is known behind each; gives whether a signal has stopped one."""
    pending, count = folder.to_take(), len(folder.runs)
    states = [folder.state(run) for run in folder.runs]
    told = ", ".join(f"{states.count(state)} {state}" for state in (FINISHED, BEGUN, NEW, FAILED) if state in states)
    tell(f"sweep: {count} runs: {told}")
    if FAILED in states and FAILED not in map(folder.state, pending):
        tell("sweep: what failed waits for the next call, behind all that has not")
    # those that are tried again: one that is killed meanwhile is to know which it has tried
    folder.keep({name: error for name, error in folder.errors.items() if name not in map(folder.name, pending)})
    results.write()
    for run in pending:
        place, name = folder.runs.index(run) + 1, folder.name(run)
        tell(f"sweep: run {place} of {count}: {name}")
        error, signalled = _take_run(run, folder, bars)
        if error is not None:
            tell(f"sweep: {name} failed: {error}")
            folder.keep({**folder.errors, name: error})
        results.write()
        if signalled:
            return True
    return False


def _take_run(run: SweepRun, folder: SweepFolder, bars: bool) -> tuple[str | None, bool]:
    """Begin a run, or go on with it; gives (in one line the error that has ended it, whether a signal has come)."""
    begun = folder.state(run) == BEGUN
    try:
        forget_used_memory()
        # of code that a model brings along nothing tells whether it is the same
        shared = None if hasattr(run.args, TRUST) else folder.path / SHARED
        return None, take_run(run.arguments(folder.of(run), begun, bars), shared)
    except BrokenPipeError:
        # whoever reads stdout has gone, and would not see the other runs either
        raise
    except TOLD as error:
        return " ".join(str(error).split()), False
    # of one run, whatever it is: the others do not depend on it
    except Exception as error:
        traceback.print_exc()
        return " ".join(repr(error).split()), False
    finally:
        # or the model of a run would be held beside that of the next one
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
