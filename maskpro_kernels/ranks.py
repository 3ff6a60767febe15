"""The processes that learn one mask together: the one place for collectives.

Objects and numbers go through gloo, whatever the device; sums of CUDA tensors through the default group. What ends the
ranks behind an error of one of them is torchrun, which stops its siblings, and the timeout of the group.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")

# Settings that one message names
NAMED = 8
# For what rank 0 does alone, such as an evaluation
LONG = timedelta(days=30)


def of_torchrun() -> bool:
    """Tell whether torchrun has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def rank_of_torchrun() -> int:
    """The rank that this process has under torchrun, also before the ranks are connected; 0 without torchrun."""
    return int(os.environ["RANK"]) if of_torchrun() else 0


@contextmanager
def under_torchrun() -> Iterator[int]:
    """Join the processes that torchrun has started, where it has started this one; yields its number on its machine.

    That is 0 without torchrun. With GPUs each process takes the one of its number.

    Raises:
        ValueError: if the machine has GPUs, but fewer than processes.
    """
    if not of_torchrun():
        yield 0
        return
    number = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        # all on this machine see it, before they wait for each other
        if processes > gpus:
            raise ValueError(
                f"nproc-per-node: expected at most {gpus}, the GPUs of this machine, got {processes}; with "
                "CUDA_VISIBLE_DEVICES= the ranks run on CPU"
            )
        torch.cuda.set_device(number)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield number
    # not after an error: it would wait for what is under way
    dist.destroy_process_group()


class FailedRank(RuntimeError):
    """Another rank has raised an error that is no ValueError; the message tells which rank, and the error."""


class Ranks:
    """This process among those of a run: those of torch.distributed where it is initialized, else it is alone.

    All ranks call the same methods in the same order, ``connect`` first. Alone, nothing is sent. Where a rank has ended
    the others get torch's RuntimeError.

    Args:
        timeout: seconds that the exchanges of a step wait for the other ranks. ``on_any``, ``gather_objects``,
            ``first``, ``all_of`` and ``agree`` wait as long as it takes.

    Attributes:
        rank: of this process, from 0.
        world: how many there are.
        bytes_sent: of the tensors that this rank has given to the others.
    """

    def __init__(self, timeout: float = 600.0):
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.timeout = timeout
        self.bytes_sent = 0
        self._of_steps: dist.ProcessGroup | None = None
        self._patient: dist.ProcessGroup | None = None
        self._closed = False

    def connect(self) -> None:
        """Meet the other ranks, where that has not been done."""
        if self.world > 1 and self._of_steps is None and not self._closed:
            self._of_steps = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
            self._patient = dist.new_group(backend="gloo", timeout=LONG)

    def close(self) -> None:
        """Free the groups; the ranks need not do so at the same time."""
        if self._of_steps is not None:
            dist.destroy_process_group(self._of_steps)
            dist.destroy_process_group(self._patient)
        self._of_steps, self._patient, self._closed = None, None, True

    def gather(self, numbers: Sequence[float], patient: bool = False) -> list[list[float]]:
        """The numbers of every rank, in float64, by rank. All ranks give as many, and at least one."""
        if self.world == 1:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        return [row.tolist() for row in self._gather(own, self._patient if patient else None)]

    def gather_vectors(self, tensor: Tensor) -> Tensor:
        """[ranks, n]: the tensor [n] of each rank, of as many elements on all of them."""
        return tensor.unsqueeze(0) if self.world == 1 else torch.stack(self._gather(tensor))

    def on_any(self, function: Callable[[], object] | None) -> bool:
        """Tell whether a function gives a true value on any rank; a rank without one counts as false."""
        flag = function is not None and bool(function())
        return any(value for (value,) in self.gather([flag], patient=True))

    def gather_objects(self, thing: object) -> list:
        """The objects that all ranks give, by rank."""
        if self.world == 1:
            return [thing]
        found = [None] * self.world
        dist.all_gather_object(found, thing, group=self._open(self._patient))
        return found

    def first(self, function: Callable[[], Result]) -> Result:
        """The result of a function on rank 0, which alone calls it.

        Raises:
            Exception: of the function on rank 0; on the others a ValueError where it is one, else a FailedRank.
        """
        results = self._results(function, self.rank == 0)
        return results[0]

    def all_of(self, function: Callable[[], Result]) -> Result:
        """The result of a function on this rank, once it has ended on all of them, which all call it.

        Raises:
            Exception: of the function on this rank; where it raises on others alone, a ValueError or FailedRank that
                names the first of them.
        """
        if self.world == 1:
            return function()
        found: list[Result] = []
        self._results(lambda: found.append(function()), True)
        return found[0]

    def _results(self, function: Callable[[], Result], called: bool) -> list:
        """The results of a function by rank, where none has raised an error."""
        if self.world == 1:
            return [function()]
        result = error = told = None
        try:
            result = function() if called else None
        except Exception as raised:
            error, told = raised, _as_of_others(raised, self.rank)
        results = self.gather_objects((result, told))
        failed = next((of_rank for _, of_rank in results if of_rank is not None), None)
        if failed is not None:
            raise error or failed
        return [result for result, _ in results]

    def agree(self, settings: Mapping[str, object]) -> None:
        """Compare settings that JSON can hold.

        Raises:
            ValueError: on all ranks, if some have others than rank 0; it names the ranks and the settings.
        """
        if self.world == 1:
            return
        own = {
            name: hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()
            for name, value in settings.items()
        }
        first, *others = self.gather_objects(own)
        differing = {
            rank: sorted(name for name in first.keys() | theirs.keys() if first.get(name) != theirs.get(name))
            for rank, theirs in enumerate(others, 1)
        }
        found = [f"other {_listed(names)} on rank {rank}" for rank, names in differing.items() if names]
        if found:
            raise ValueError(f"ranks: expected the settings of rank 0 on all of them, got {'; '.join(found)}")

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks: the same bits on all of them."""
        if self.world > 1:
            self.bytes_sent += tensor.nbytes
            dist.all_reduce(tensor, group=self._group_of(tensor))

    def spread_(self, tensor: Tensor) -> None:
        """Replace a tensor by that of rank 0."""
        if self.world > 1:
            self.bytes_sent += tensor.nbytes if self.rank == 0 else 0
            dist.broadcast(tensor, 0, group=self._group_of(tensor))

    def sum_of_rows(self, tensor: Tensor, mesh: dist.DeviceMesh, cut: int, rows: int) -> Tensor:
        """Rows [rows, K], this rank's, of the sum of a contiguous [out, K] over all ranks: the same bits in each copy.

        Args:
            mesh: of all ranks.
            cut: its dimension over which rows are cut, as ``torch.chunk`` does; over the others they are copied.
            rows: how many this rank has.
        """
        parts = mesh.size(cut)
        if parts > 1:
            each = -(-len(tensor) // parts)
            short = each * parts - len(tensor)
            # without need it would be a copy, as large as the tensor
            whole = torch.nn.functional.pad(tensor, (0, 0, 0, short)) if short else tensor
            received = torch.empty_like(whole)
            # no reduce-scatter: gloo's has no known order of the sum
            dist.all_to_all_single(received, whole, group=mesh.get_group(cut))
            self.bytes_sent += whole.nbytes
            tensor, *others = received.view(parts, each, -1)
            for other in others:
                tensor += other
        tensor = tensor[:rows]
        for dim in range(mesh.ndim):
            if dim != cut and mesh.size(dim) > 1:
                dist.all_reduce(tensor, group=mesh.get_group(dim))
                self.bytes_sent += tensor.nbytes
        return tensor

    def _gather(self, tensor: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
        self.bytes_sent += tensor.nbytes
        rows = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(rows, tensor, group=group or self._group_of(tensor))
        return rows

    def _group_of(self, tensor: Tensor) -> dist.ProcessGroup:
        return self._open(self._of_steps) if tensor.device.type == "cpu" else dist.group.WORLD

    def _open(self, group: dist.ProcessGroup | None) -> dist.ProcessGroup:
        if group is None:
            raise RuntimeError("ranks: expected connected ones, got others; a closed trainer takes no step")
        return group


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _as_of_others(error: Exception, rank: int) -> ValueError | FailedRank:
    """The error that the other ranks raise for one of this rank."""
    if isinstance(error, ValueError):
        return ValueError(f"rank {rank}: {error}" if rank else str(error))
    return FailedRank(f"rank {rank}: {type(error).__name__}: {error}")
