"""Signals that end a run after its step."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress

from ..ranks import rank_of_torchrun


class Signals:
    """SIGINT and SIGTERM, noted so that a step can end first; a second one takes its usual way."""

    def __init__(self):
        self.came = False
        self.before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # a job in the background is not to end by what is meant for the foreground
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame) -> None:
        self.came = True
        _tell_at_once(f"{signal.Signals(number).name}: the run stops after this step\n")
        self.__exit__()

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _tell_at_once(line: str) -> None:
    """Write to stderr beside its buffer: the handler may have come into a write of the same thread, which holds it."""
    # none where the process was started without one: the number may be another file's by now
    if rank_of_torchrun() == 0 and sys.__stderr__ is not None:
        with suppress(OSError):
            os.write(sys.__stderr__.fileno(), line.encode())
