"""Logits on another device than their weights: the next layer's copy is made while one layer computes."""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from ..modules import MaskedLinear

# Copies at a time: one arriving, one in use, one written back
COPIES = 3
Wait = Callable[[], object]


def offloaded(layer: MaskedLinear) -> bool:
    """Return whether the logits are on another device than the weight."""
    # a ReplayedLayer has no weight
    return isinstance(layer, MaskedLinear) and layer.logits.device != layer.weight.device


class OffloadedLogits:
    """Copies of logits on the devices of their weights, for a pass over layers.

    A GPU copies on streams of its own, one each way. While a layer computes, the logits of the next one arrive and
    those of the last one are written back: three copies at a time. Copies overlap with computation only if memory is
    page-locked, as ``MaskedLinear.from_linear`` allocates it.

    When the context ends, all logits are written. Nothing else may change them inside. If a layer comes that is not the
    next of ``order``, its copy starts then, and that of its successor.
    """

    def __init__(self, order: Sequence[MaskedLinear]):
        # the layers, and the index of the next one to fetch
        self._order = [layer for layer in order if offloaded(layer)]
        self._next = 0
        self._coming: tuple[MaskedLinear | None, tuple[Tensor, Wait] | None] = None, None
        self._ends: collections.deque[Wait] = collections.deque()
        self._written: set[MaskedLinear] = set()
        # autograd has a thread for each device
        self._lock = threading.Lock()

    def __enter__(self) -> OffloadedLogits:
        self._fetch_next()
        return self

    def __exit__(self, *_) -> None:
        self._coming = (None, None)
        self._order = []
        self._wait(0)

    @contextmanager
    def reading(self, layer: MaskedLinear, written: bool = False) -> Iterator[Tensor]:
        """Logits [out, K] on the weight's device; change them only with ``written``."""
        if not offloaded(layer):
            yield layer.logits.detach()
            return
        transfers = transfers_of(layer.weight.device)
        with self._lock:
            awaited, coming = self._coming
            if awaited is not layer:
                # the expected layer may never come, such as an expert that gets no token
                coming = self._fetched(layer)
                if layer in self._order:
                    self._next = self._order.index(layer) + 1
            self._coming = (None, None)
            logits, ready = coming
            ready()
            self._fetch_next()
        yield logits
        with self._lock:
            if written:
                self._written.add(layer)
                self._ends.append(transfers.put_back(logits, layer.logits.detach()))
            else:
                self._ends.append(transfers.used(logits))

    def moving(self, layer: MaskedLinear) -> AbstractContextManager[Tensor]:
        """Logits [out, K] on the weight's device, for a change in place."""
        return self.reading(layer, written=True)

    def _fetch_next(self) -> None:
        if self._next < len(self._order):
            layer = self._order[self._next]
            self._coming = layer, self._fetched(layer)
            self._next += 1

    def _fetched(self, layer: MaskedLinear) -> tuple[Tensor, Wait]:
        # the host runs ahead of the device: without this wait it would allocate copies of all layers
        self._wait(0 if layer in self._written else COPIES - 2)
        return transfers_of(layer.weight.device).fetch(layer.logits.detach())

    def _wait(self, most: int) -> None:
        """Wait until at most ``most`` copies are in use or being written back."""
        while len(self._ends) > most:
            self._ends.popleft()()


class Transfers:
    """Copies to a device and from it, made at once, in the order of its other work."""

    def __init__(self, device: torch.device):
        self.device = device

    def fetch(self, source: Tensor) -> tuple[Tensor, Wait]:
        """Copy ``source`` to the device; return the copy and a function that makes the device wait for it."""
        return source.to(self.device), _nothing

    def used(self, logits: Tensor) -> Wait:
        """Return a function with which the host waits until the device has finished its work on a copy."""
        return _nothing

    def put_back(self, logits: Tensor, target: Tensor) -> Wait:
        """Copy to ``target`` after the device's pending work; return a function with which the host waits for it."""
        target.copy_(logits)
        return _nothing


class StreamTransfers(Transfers):
    """Copies to a CUDA device and from it, in parallel with its current stream."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.incoming = torch.cuda.Stream(device)
        self.outgoing = torch.cuda.Stream(device)

    def fetch(self, source: Tensor) -> tuple[Tensor, Wait]:
        with torch.cuda.stream(self.incoming):
            logits = source.to(self.device, non_blocking=True)
            arrived = self.incoming.record_event()

        def ready() -> None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(arrived)
            # its memory belongs to the other stream, which would reuse it as soon as Python frees the tensor
            logits.record_stream(stream)

        return logits, ready

    def used(self, logits: Tensor) -> Wait:
        return torch.cuda.current_stream(self.device).record_event().synchronize

    def put_back(self, logits: Tensor, target: Tensor) -> Wait:
        self.outgoing.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.outgoing):
            target.copy_(logits, non_blocking=True)
            logits.record_stream(self.outgoing)
            return self.outgoing.record_event().synchronize


@functools.cache
def transfers_of(device: torch.device) -> Transfers:
    """Transfers of a device; its streams are made once."""
    return StreamTransfers(device) if device.type == "cuda" else Transfers(device)


def _nothing() -> None:
    """Do nothing: without streams copies are done at once."""
