"""Where the time of a step goes: seconds by part, on the host's clock, or on a GPU's own by events in its stream."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch

from ..modules import MaskedLinear

# Batches of the step; masks that are drawn once for all that uses them
DATA, DRAW = "data", "draw"
# The loss of each batch and draw, with what draws its own mask in there; its gradient
FORWARD, BACKWARD = "forward", "backward"
# Of the logits, and of weights that learn
UPDATE = "update"
# Flip rate, initial losses that are looked up, what ranks tell each other, the journal on disk
CHECKS = "checks"
# Losses under refreshed initial masks
INITIAL_LOSSES = "initial losses"
OTHER = "other"
# Digits of seconds in a record: tenths of a microsecond
DIGITS = 7


class Timeline(Protocol):
    """Where marks are set, and seconds between them are read.

    Attributes:
        of_a_device: whether marks follow what is queued on a device, whichever thread queues it.
    """

    of_a_device: bool

    def mark(self) -> object:
        """A mark at this moment."""

    def reached(self, mark: object) -> bool:
        """Whether its time is known. Nothing is waited for."""

    def seconds(self, start: object, end: object) -> float:
        """Between two marks that are reached."""


class HostTimeline:
    """The clock of the host."""

    of_a_device = False

    def mark(self) -> float:
        return time.perf_counter()

    def reached(self, mark: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaTimeline:
    """Events in the current stream of a GPU.

    Args:
        device: the GPU.
    """

    of_a_device = True

    def __init__(self, device: torch.device):
        self._device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def reached(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1000


def timeline_of(layers: Mapping[str, MaskedLinear]) -> Timeline:
    """Events where all layers are on one GPU; else the host's clock, by which a part ends where the host goes on."""
    devices = {layer.weight.device for layer in layers.values()}
    (device, *others) = devices
    return CudaTimeline(device) if device.type == "cuda" and not others else HostTimeline()


class StepClock:
    """Seconds of a step by part. Of a part within another one the time is its own alone.

    Outside of a step parts are not timed. Nor are those in other threads than the step's by the host's clock: their
    time is that of what waits for them.
    """

    def __init__(self, timeline: Timeline):
        self._timeline = timeline
        self._inside: list[str] = []
        self._thread = threading.get_ident()
        # (mark, the part that begins there; None between steps)
        self._marks: deque[tuple[object, str | None]] = deque()

    @contextmanager
    def step(self) -> Iterator[None]:
        """With the time of a step. Of one that breaks off nothing is told."""
        self._thread = threading.get_ident()
        self._enter(OTHER)
        try:
            yield
        except BaseException:
            self._inside.clear()
            self._marks.clear()
            raise
        self._leave()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """With the time of a part of the step."""
        if not self._inside or not (self._timeline.of_a_device or threading.get_ident() == self._thread):
            yield
            return
        self._enter(name)
        try:
            yield
        finally:
            self._leave()

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call, as far as the device has come; it waits for nothing.

        What a GPU has not done yet is told by the next call.
        """
        found: dict[str, float] = {}
        while len(self._marks) > 1 and self._timeline.reached(self._marks[1][0]):
            start, part = self._marks.popleft()
            if part is not None:
                found[part] = found.get(part, 0.0) + self._timeline.seconds(start, self._marks[0][0])
        return {part: round(seconds, DIGITS) for part, seconds in found.items()}

    def _enter(self, part: str) -> None:
        self._inside.append(part)
        self._marks.append((self._timeline.mark(), part))

    def _leave(self) -> None:
        self._inside.pop()
        self._marks.append((self._timeline.mark(), self._inside[-1] if self._inside else None))
