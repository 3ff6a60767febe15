"""Sweeps of `maskpro sweep` in processes that are killed ahead of a change that they make to the disk.

The process that calls this forks. It must not have run a backward itself: torch refuses one in a fork behind it.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch

from helpers.routes import route_to_the_eager_reference
from maskpro_kernels.cli import main

CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


def take_sweep(folder: Path, file: str, moment: int | None) -> int | None:
    """Take the sweep of a file into ``sweep`` of a folder, or go on with it; gives its exit code.

    Args:
        folder: of the sweep, and of what it tells.
        file: of the sweep.
        moment: the change ahead of which it is killed, counted from 1; None: never. How many there are at its end is in
            ``changes`` of the folder.

    Returns:
        None where it was killed.
    """
    torch.set_num_threads(1)
    pid = os.fork()
    if pid == 0:
        _child(folder, file, moment)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    log = (folder / "log").read_text()
    assert "Traceback" not in log and code in (0, 1, -signal.SIGKILL), log
    return None if code < 0 else code


def _child(folder: Path, file: str, moment: int | None) -> None:
    code, changes = 2, 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal changes
        if event in CHANGES and str(arguments[0]).startswith("sweep/"):
            changes += 1
            if changes == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard in (1, 2):
            os.dup2(log, standard)
        # for as long as the process lives
        route_to_the_eager_reference(pytest.MonkeyPatch())
        sys.addaudithook(hook)
        code = main.main(["sweep", file, "--output", "sweep"])
        Path("changes").write_text(str(changes))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # nothing of the process that has forked is to be done twice
        os._exit(code)


def kill_sweeps(whole: Path, killed: Path, file: str, kills: int, seed: int) -> tuple[list[str], list[int]]:
    """Take a sweep as a whole, and others that are killed, so many times together.

    Returns:
        (folders of the others, the moments of the kills).
    """
    whole.mkdir()
    assert take_sweep(whole, file, None) == 1
    changes, draw, folders, moments = int((whole / "changes").read_text()), random.Random(seed), [], []
    while len(moments) < kills:
        folder = killed / str(len(folders))
        folder.mkdir(parents=True)
        folders.append(str(folder))
        # each goes on a while
        while len(moments) < kills and take_sweep(folder, file, moment := draw.randint(1, changes // 2)) is None:
            moments.append(moment)
    assert take_sweep(Path(folders[-1]), file, None) == 1
    return folders, moments
