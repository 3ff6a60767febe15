"""When a run leaves snapshots in its folder, and what is in them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress

from torch import Tensor

from ..files import discard
from ..modules import MaskedLinear
from ..ranks import Ranks
from ..sharded_files import planned_parts
from .estimator import Estimator
from .initial_losses import InitialLosses
from .resume import snapshot_of
from .run_folder import RunFolder
from .sharded_run import check_seen, is_sharded
from .snapshots import digest_of_file
from .step_batches import BatchCycle, BatchStream


class RunSnapshots:
    """The snapshots of a run. Where ranks share the rows of layers, all of them call its methods and write their own.

    Args:
        folder: of rank 0; None on the others.
        minutes: between snapshots.
        ranks: of the run.
        layers: the masked layers by name.
        estimator, batches, initial: of the run.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        minutes: float,
        ranks: Ranks,
        layers: Mapping[str, MaskedLinear],
        estimator: Estimator,
        batches: BatchCycle | BatchStream,
        initial: InitialLosses,
    ):
        self._folder, self._minutes, self._ranks, self._layers = folder, minutes, ranks, layers
        self._estimator, self._batches, self._initial = estimator, batches, initial
        self._sharded = is_sharded(layers)
        self.time = time.monotonic()

    def start(self, run: Mapping) -> None:
        """Start the folder of a run, with a snapshot; errors of rank 0 are raised on all."""
        held = self._held(0, 0)

        def start() -> None:
            self._folder.start(run)
            if not self._sharded:
                self._write(0, *held)

        self._ranks.first(start)
        if self._sharded:
            self._write_parts(0, *held)

    def is_due(self) -> bool:
        """Whether another one is: by the clock of rank 0."""
        return self._ranks.first(self._is_due) if self._sharded else self._folder is not None and self._is_due()

    def _is_due(self) -> bool:
        return self._folder.lacks_snapshot() or time.monotonic() - self.time >= 60 * self._minutes

    def add(self, step: int, skipped: int) -> None:
        """Leave one of a step, of which the last ``skipped`` in a row moved nothing."""
        write = self._write_parts if self._sharded else self._write
        write(step, *self._held(step, skipped))

    def keep(self, step: int, skipped: int) -> None:
        """Behind an error: leave one of the steps that ``resume`` could not have otherwise.

        None of layers whose rows ranks share: the others may not come to it.
        """
        if self._folder is None or self._folder.journaled or self._sharded:
            return
        # the error that came first is the one to be told
        with suppress(OSError, RuntimeError):
            self.add(step, skipped)

    def _held(self, step: int, skipped: int) -> tuple:
        logits = {name: layer.logits.detach() for name, layer in self._layers.items()}
        return snapshot_of(logits, self._estimator, self._initial.losses, skipped, self._batches.digest_before(step))

    def _write(self, step: int, tensors: Mapping[str, Tensor], state: Mapping) -> None:
        if self._folder is not None:
            self._folder.add_snapshot(step, tensors, state)
            self.time = time.monotonic()

    def _write_parts(self, step: int, tensors: Mapping[str, Tensor], state: Mapping) -> None:
        """Each rank its own, into a folder aside, of which rank 0 makes a snapshot once all are on disk."""
        ranks = self._ranks
        aside = ranks.first(lambda: self._folder.folder_aside())
        try:
            ranks.all_of(lambda: check_seen(aside))
            write = planned_parts(ranks, aside, tensors)

            def written() -> tuple[str, str] | None:
                path = write()
                return path and (path.name, digest_of_file(path))

            digests = dict(filter(None, ranks.gather_objects(ranks.all_of(written))))
            ranks.first(lambda: self._folder.publish_snapshot(aside, step, digests, state))
        finally:
            if ranks.rank == 0 and aside.exists():
                # what is left is cleared away when the run is resumed; the error that came first is the one to be told
                with suppress(OSError):
                    discard(aside)
        self.time = time.monotonic()
