"""Runs of `maskpro learn` in processes that are killed at random moments.

The process that calls this forks. Where it has run a command itself before, another one begins at once.
"""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from helpers.in_ranks import LONGEST
from maskpro_kernels import ranks
from maskpro_kernels.cli import main
from maskpro_kernels.learn.trainer import MaskTrainer

# Seconds that ranks have to see by themselves that another one was killed; torchrun waits for 30
GRACE = 5.0


class KilledRuns:
    """Runs of one kind: the first one whole, the others killed, one after the other.

    Args:
        folder: of the runs and of their output.
        begin: arguments of a run of so many steps, without its ``--output``.
        steps: of each.
        world: ranks of each.
        seed: of the moments and the victims.

    Attributes:
        runs: that have ended.
        moments: of each kill, how many ranks were killed, and how many steps had been reported as done by then.
    """

    def __init__(self, folder: str, begin: Sequence[str], steps: int, world: int, seed: int):
        self.folder, self.begin, self.steps, self.world = Path(folder), list(begin), steps, world
        self.draw = random.Random(seed)
        self.runs: list[str] = []
        self.moments: list[tuple[int, int]] = []
        # threads would be lost in a fork
        torch.set_num_threads(1)
        # or straight-through would lose the steps of each process
        MaskTrainer.__init__.__kwdefaults__["snapshot_minutes"] = 0.0
        ranks.LOOK, ranks.ANSWER = 0.1, 0.5
        # of the last run
        self._reported = 0
        began = time.monotonic()
        self._continue(kill=False)
        self.span = time.monotonic() - began

    def kill(self, kills: int) -> None:
        """Kill so many times, then let the last run end."""
        while len(self.moments) < kills:
            self._continue(kill=True)
        if self._run().exists():
            self._continue(kill=False)

    def _run(self) -> Path:
        """The folder of the run that has not ended."""
        return self.folder / str(len(self.runs))

    def _continue(self, kill: bool) -> None:
        """Begin a run or continue with it, and kill it or let it end."""
        run = self._run()
        pids = self._start(run)
        victims = self._victims(pids) if kill else []
        codes = _ended(pids, victims)
        logs = list(map(self._log, range(self.world)))
        assert not any("Traceback" in log for log in logs), "\n".join(logs)
        assert victims or codes == [0] * self.world, "\n".join(logs)
        self._reported = _reported(logs[0], self._reported)
        if victims:
            self.moments.append((len(victims), self._reported))
        if (run / "report.json").exists():
            self.runs.append(str(run))
            self._reported = 0

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.log"

    def _log(self, rank: int) -> str:
        """Output of a rank; nothing if it was killed at once."""
        path = self._path(rank)
        return path.read_text() if path.exists() else ""

    def _start(self, run: Path) -> list[int]:
        """The processes that begin a run, or continue with it."""
        begun = (run / "settings.json").exists()
        argv = ["learn", "--resume", str(run)] if begun else [*self.begin, "--output", str(run)]
        for rank in range(self.world):
            self._path(rank).unlink(missing_ok=True)
        if self.world == 1:
            return [_fork(argv, self._path(0), {})]
        # held until the next processes have another
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False,
                                   timeout=timedelta(seconds=LONGEST))  # fmt: skip
        around = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "WORLD_SIZE": str(self.world),
            "LOCAL_WORLD_SIZE": str(self.world),
            "TORCHELASTIC_RUN_ID": "tests",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        return [
            _fork(argv, self._path(rank), around | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(self.world)
        ]

    def _victims(self, pids: list[int]) -> list[int]:
        """Processes to kill, one or all: at any moment, or soon after a step; none if all have ended before."""
        if self.draw.random() < 0.5:
            _wait(pids, self.draw.uniform(0.0, self.span))
        else:
            step = min(self._reported + self.draw.randint(1, self.steps // 4), self.steps)
            _wait(pids, LONGEST, lambda: f"\nstep {step} of" in self._log(0))
            _wait(pids, self.draw.uniform(0.0, 2 * self.span / self.steps))
        if all(map(_has_ended, pids)):
            return []
        victims = pids if self.draw.random() < 0.5 else [self.draw.choice(pids)]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        return victims


def _fork(argv: list[str], log: Path, around: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(around)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        code = main.main(argv)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # nothing of the process that has forked is to be done twice
        os._exit(code)


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _wait(pids: list[int], seconds: float, until: Callable[[], bool] = lambda: False) -> None:
    """Wait for so long, or until something is so, or all processes have ended."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit and not until() and not all(map(_has_ended, pids)):
        time.sleep(0.001)


def _ended(pids: list[int], victims: list[int]) -> list[int]:
    """Exit codes of processes; after others were killed they have some seconds to end."""
    _wait(pids, GRACE if victims else LONGEST)
    for pid in pids:
        if not _has_ended(pid):
            assert victims, "a run does not end"
            os.kill(pid, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _reported(log: str, before: int) -> int:
    """Number of steps reported as done; no earlier one may be lost."""
    resumed = re.search(r"(\d+) steps are done", log)
    assert resumed is None or int(resumed[1]) >= before, f"{before} steps were reported, then:\n{log}"
    steps = [int(step) for step in re.findall(r"^step (\d+) of", log, re.MULTILINE)]
    return max([before, *([int(resumed[1])] if resumed else []), *steps])
