"""Processes that check and time cases and run tests: one that crashes or never ends costs its case, not the page."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from cards import Card

from . import timing
from .cases import Run
from .needs import ROOT

COMMAND = [sys.executable, str(Path(__file__).resolve().parent)]
# Folder whose tests run
TESTED = ROOT
# Of a case, with the start of its process and compilation; longest of vLLM's
CASE_SECONDS = 150.0
# Exit status of a process whose GPU has become unusable to it, after a row that says so
UNUSABLE = 75


def work(path: Path) -> int:
    """Do the cases of a job, as a child: a row after each one."""
    job = json.loads(path.read_text())
    card = None if job["card"] is None else Card(**job["card"])
    run = Run()
    with open(job["rows"], "a") as file, torch.no_grad():
        for name in job["cases"]:
            if job["stage"] == "look":
                row = {"case": name, **timing.seen()}
            elif job["stage"] == "check":
                row = timing.checked(run, name, card)
            else:
                row = timing.timed(run, name)
            print(json.dumps(row), file=file, flush=True)
            try:
                torch.cuda.synchronize()
                # others check their cases beside this process
                torch.cuda.empty_cache()
            except Exception:
                return UNUSABLE
    return 0


class Child:
    """A process that does cases in turn; another one goes on after it has crashed, or was too long at a case."""

    def __init__(self, stage: str, cases: Sequence[str], card: dict | None, threads: int, folder: Path):
        self.stage = stage
        self.remaining = list(cases)
        self.card = card
        self.threads = threads
        self.folder = folder
        self.rows: list[dict] = []
        self.start()

    def start(self) -> None:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        self.written = folder / "rows"
        self.written.touch()
        self.log = folder / "log"
        job = folder / "job.json"
        content = {"stage": self.stage, "cases": self.remaining, "card": self.card, "rows": str(self.written)}
        job.write_text(json.dumps(content))
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "--job", str(job)], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self.read = 0
        self.since = time.monotonic()

    def ended(self) -> bool:
        """Take in new rows; return whether no case is left."""
        code = self.process.poll()
        lines = self.written.read_text().splitlines(keepends=True)
        new = [json.loads(line) for line in lines[self.read :] if line.endswith("\n")]
        if new:
            self.read += len(new)
            self.since = time.monotonic()
            self.rows += new
            del self.remaining[: len(new)]
        if code is not None and self.remaining:
            if code != UNUSABLE:
                self.give_up(f"its process has ended with {code}: {self.last_line()}")
            self.go_on()
        elif code is None and time.monotonic() - self.since > CASE_SECONDS:
            self.stop()
            # it may also hang at its end
            if self.remaining:
                self.give_up(f"cut off after {CASE_SECONDS:.0f} s", cut_off=True)
                self.go_on()
        return not self.remaining and self.process.poll() is not None

    def give_up(self, reason: str, cut_off: bool = False) -> None:
        """The row of the case at which the process was."""
        reason = reason.replace("|", "/")
        verdict = f"{timing.NOT_RUN if cut_off else timing.FAIL}: {reason}"
        row = {"case": self.remaining.pop(0), "unjudged": reason}
        self.rows.append(row | ({"right": verdict} if self.stage == "check" else {}))

    def go_on(self) -> None:
        if self.remaining:
            self.start()

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def last_line(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "without a word"


def rows_of(
    stage: str,
    cases: Sequence[str],
    limit: float,
    card: dict | None = None,
    workers: int = 1,
    save: Callable[[list[dict]], None] = lambda rows: None,
) -> list[dict]:
    """Rows of cases, by several processes at a time; of what has not ended within ``limit`` seconds, that it has not.

    ``save`` gets the rows so far, whenever there are new ones.
    """
    end = time.monotonic() + limit
    shards = [cases[i::workers] for i in range(workers)]
    threads = max(1, (os.cpu_count() or 1) // workers)
    with tempfile.TemporaryDirectory() as folder:
        children = [Child(stage, shard, card, threads, Path(folder)) for shard in shards if shard]
        try:
            count = 0
            while not all([child.ended() for child in children]):
                if time.monotonic() > end:
                    break
                rows = [row for child in children for row in child.rows]
                if len(rows) > count:
                    count = len(rows)
                    save(rows)
                time.sleep(0.1)
        finally:
            for child in children:
                child.stop()
        for child in children:
            while child.remaining:
                child.give_up(f"cut off after {limit:.0f} s of all", cut_off=True)
    rows = {row["case"]: row for child in children for row in child.rows}
    return [rows[name] for name in cases]


def gpu_tests() -> list[str]:
    """Files with tests that are marked gpu."""
    marked = re.compile(r"^pytestmark = (?:.*|\[[^\]]*)\bmark\.gpu\b|^ *@pytest\.mark\.gpu\b", re.M)
    paths = sorted(TESTED.glob("tests/**/test_*.py"))
    return [str(path.relative_to(TESTED)) for path in paths if marked.search(path.read_text())]


def tests_row(files: Sequence[str], selected: str, limit: float, workers: int) -> dict:
    """Results of the tests of files that pytest selects by name, of those that end within ``limit`` seconds."""
    command = [sys.executable, "-m", "pytest", "-v", *files, "-m", "gpu", "-k", selected]
    plugins = importlib.metadata.entry_points(group="pytest11").names
    if "xdist" in plugins:
        command += ["-n", str(workers), "--dist", "worksteal"]
    if "gpu_emulators" not in plugins:
        command += ["-p", "gpu_emulators.plugin"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "emulators", ROOT)))}
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            command, cwd=TESTED, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(max(limit, 0.0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # its workers too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        log.seek(0)
        text = log.read()
    return {"tests": selected, "seconds": time.monotonic() - start} | outcomes(text, code)


def outcomes(text: str, code: int | None) -> dict:
    """What pytest has printed: numbers of tests that passed, those that failed, and why none has run."""
    passed = len(re.findall(r"\bPASSED\b", text))
    # while they run: pytest writes the outcome behind a name, its xdist before it, as a summary does
    behind = re.findall(r"^(tests/.*::.*?) (?:FAILED|ERROR)\b", text, re.M)
    before = re.findall(r"^(?:\[gw\d+\] .*?)?(?:FAILED|ERROR) (tests/.*)", text, re.M)
    # a summary repeats the names, with reasons
    failed = {name.partition(" - ")[0].strip(): name.strip() for name in [*behind, *before]}
    # a file that cannot be collected has no test that failed
    failed = [line for name, line in failed.items() if "::" in name]
    row = {"passed": passed, "failed": failed, "cut off": code is None}
    if code is not None and code != 0 and not failed:
        errors = re.findall(r"^E +(\w+(?:Error|Exception)\b.*)$", text, re.M)
        lines = [*errors, *reversed(text.strip().splitlines()), "pytest has said nothing"]
        row["not run"] = lines[0].strip("= ")[:200].replace("|", "/")
    elif code == 0 and not passed:
        row["not run"] = f"no test has passed: {text.strip().splitlines()[-1].strip('= ')}"
    return row
