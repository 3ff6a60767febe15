"""`maskpro sweep`: runs of `maskpro learn` over sets of options, one after the other, and what they found together."""

from __future__ import annotations

import argparse
import gc
import traceback
from pathlib import Path

import torch

from .config_file import TRUST
from .learn import learn
from .memory import forget_used_memory
from .progress import tell
from .run_files import REPORT
from .sweep_file import SweepRun, read_sweep
from .sweep_folder import BEGUN, FAILED, FINISHED, NEW, SweepFolder
from .sweep_results import SweepResults

# Of these the message says what is wrong; others are faults, whose traceback is told as well
TOLD = (ValueError, TypeError, OSError, FloatingPointError, torch.OutOfMemoryError)


def sweep(args: argparse.Namespace) -> int:
    """Take the runs that are left of a FILE; gives 1 where one has failed."""
    file, trust = Path(args.file), {TRUST: True} if hasattr(args, TRUST) else {}
    runs, notes = read_sweep(file, trust)
    folder = SweepFolder(Path(args.output), runs)
    results = SweepResults(folder)
    for note in notes:
        tell(f"sweep: {note}")
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
    # those that are tried again: one that is killed meanwhile is to know which it has tried
    folder.keep({name: error for name, error in folder.errors.items() if name not in map(folder.name, pending)})
    results.write()
    for run in pending:
        place, name = folder.runs.index(run) + 1, folder.name(run)
        tell(f"sweep: run {place} of {count}: {name}")
        error = _take_run(run, folder, bars)
        if error is not None:
            tell(f"sweep: {name} failed: {error}")
            folder.keep({**folder.errors, name: error})
        elif not (folder.of(run) / REPORT).exists():
            return True
        results.write()
    return False


def _take_run(run: SweepRun, folder: SweepFolder, bars: bool) -> str | None:
    """Begin a run, or go on with it; gives in one line the error that has ended it, if one has."""
    begun = folder.state(run) == BEGUN
    try:
        forget_used_memory()
        learn(run.arguments(folder.of(run), begun, bars))
    except BrokenPipeError:
        # whoever reads stdout has gone, and would not see the other runs either
        raise
    except TOLD as error:
        return " ".join(str(error).split())
    # of one run, whatever it is: the others do not depend on it
    except Exception as error:
        traceback.print_exc()
        return " ".join(repr(error).split())
    finally:
        # or the model of a run would be held beside that of the next one
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return None
