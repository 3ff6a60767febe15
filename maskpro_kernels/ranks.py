"""The processes of a run, and all its collectives.

Objects and numbers are sent by gloo on every device, and CUDA tensors are summed by the default group. If one rank ends
with an error, torchrun or the timeout of the group ends the others.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")

# Most settings in a message
NAMED = 8
# Timeout while rank 0 works alone, such as in an evaluation
LONG = timedelta(days=30)


def of_torchrun() -> bool:
    """Return whether torchrun has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def rank_of_torchrun() -> int:
    """Rank of this process under torchrun, also before the ranks are connected; 0 without torchrun."""
    return int(os.environ["RANK"]) if of_torchrun() else 0


@contextmanager
def under_torchrun() -> Iterator[int]:
    """Join the processes of torchrun, if it started this one, and yield the local rank; 0 without torchrun.

    With GPUs each process uses the one with its local rank.

    Raises:
        ValueError: if the machine has GPUs, but fewer than processes.
    """
    if not of_torchrun():
        yield 0
        return
    number = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        processes = int(os.environ["LOCAL_WORLD_SIZE"])
        gpus = torch.cuda.device_count()
        # all processes on this machine raise, before they wait for each other
        if processes > gpus:
            raise ValueError(
                f"nproc-per-node: expected at most {gpus}, the GPUs of this machine, got {processes}; with "
                "CUDA_VISIBLE_DEVICES= the ranks run on CPU"
            )
        torch.cuda.set_device(number)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield number
    # not after an error: it would wait for unfinished collectives
    dist.destroy_process_group()


class FailedRank(RuntimeError):
    """An error of another rank that is no ValueError; the message names the rank and the error."""


class Ranks:
    """The processes of a run: those of torch.distributed if it is initialized, else this one alone.

    All ranks call the same methods in the same order, ``connect`` first. A single rank sends nothing. If a rank has
    ended, the others get torch's RuntimeError. Exchanges of a step wait ``timeout`` seconds for the others, and
    ``connect`` at least half an hour. ``on_any``, ``all_gather_object``, ``run_on_main``, ``run_on_all`` and ``agree``
    wait without a limit.

    Attributes:
        rank, world_size: rank of this process, from 0; number of ranks.
        bytes_sent: bytes of the tensors that this rank has sent.
    """

    def __init__(self, timeout: float = 600.0):
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.world_size = dist.get_world_size() if together else 1
        self.timeout = timeout
        self.bytes_sent = 0
        self._of_steps: dist.ProcessGroup | None = None
        self._patient: dist.ProcessGroup | None = None
        self._closed = False

    @property
    def is_main_process(self) -> bool:
        """True on rank 0, which alone writes and reports."""
        return self.rank == 0

    def connect(self) -> None:
        """Connect to the other ranks, once."""
        if self.world_size > 1 and self._of_steps is None and not self._closed:
            # at least half an hour: each rank loads its model before, perhaps from a slow disk
            meeting = dist.new_group(backend="gloo", timeout=timedelta(seconds=max(1800.0, self.timeout)))
            dist.destroy_process_group(meeting)
            self._of_steps = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
            self._patient = dist.new_group(backend="gloo", timeout=LONG)

    def close(self) -> None:
        """Free the groups; the ranks need not do so at the same time."""
        if self._of_steps is not None:
            dist.destroy_process_group(self._of_steps)
            dist.destroy_process_group(self._patient)
        self._of_steps = None
        self._patient = None
        self._closed = True

    def all_gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return the numbers of every rank, in float64, by rank; all ranks send equally many, at least one."""
        if self.world_size == 1:
            return [list(numbers)]
        return self.all_gather(torch.tensor(numbers, dtype=torch.float64, device="cpu")).tolist()

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return [ranks, n] from a tensor [n] on each rank."""
        if self.world_size == 1:
            return tensor.unsqueeze(0)
        self.bytes_sent += tensor.nbytes
        rows = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(rows, tensor, group=self._group_of(tensor))
        return torch.stack(rows)

    def on_any(self, function: Callable[[], object] | None) -> bool:
        """Return whether a function returns a true value on any rank; a rank without a function counts as false."""
        if self.world_size > 1:
            has_function = self.all_gather_numbers([function is not None])
            if not any(on_rank for (on_rank,) in has_function):
                return False
        return any(self.all_gather_object(function is not None and bool(function())))

    def all_gather_object(self, thing: object) -> list:
        """Return the objects of all ranks, by rank."""
        if self.world_size == 1:
            return [thing]
        objects = [None] * self.world_size
        dist.all_gather_object(objects, thing, group=self._open(self._patient))
        return objects

    def run_on_main(self, function: Callable[..., Result], *arguments, **keywords) -> Result:
        """Call a function with these arguments on rank 0 alone, and return its result on all ranks.

        Rank 0 raises its error; the others raise a ValueError if it is one, else a FailedRank.
        """
        return self._results(partial(function, *arguments, **keywords), self.is_main_process)[0]

    def run_on_all(self, function: Callable[..., Result], *arguments, **keywords) -> Result:
        """Call a function with these arguments on all ranks, wait for all, and return the result of this rank.

        An error of this rank is raised. If only others have one, raise a ValueError or FailedRank that names the first.
        """
        result: list[Result] = []
        self._results(lambda: result.append(function(*arguments, **keywords)), True)
        return result[0]

    def _results(self, function: Callable[[], Result], called: bool) -> list:
        """Return the results of a function by rank, unless one raises an error."""
        if self.world_size == 1:
            return [function()]
        result = error = for_others = None
        try:
            result = function() if called else None
        except Exception as raised:
            error = raised
            if isinstance(error, ValueError):
                for_others = ValueError(f"rank {self.rank}: {error}" if self.rank else str(error))
            else:
                for_others = FailedRank(f"rank {self.rank}: {type(error).__name__}: {error}")
        results = self.all_gather_object((result, for_others))
        failed = next((of_rank for _, of_rank in results if of_rank is not None), None)
        if failed is not None:
            raise error or failed
        return [result for result, _ in results]

    def agree(self, settings: Mapping[str, object]) -> None:
        """Raise ValueError on all ranks if the settings of some, JSON values, differ from those of rank 0."""
        if self.world_size == 1:
            return
        digests = {
            name: hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()
            for name, value in settings.items()
        }
        first, *other_ranks = self.all_gather_object(digests)
        lines = []
        for rank, theirs in enumerate(other_ranks, 1):
            names = sorted(name for name in first.keys() | theirs.keys() if first.get(name) != theirs.get(name))
            if names:
                unnamed = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
                lines.append(f"other {', '.join(names[:NAMED])}{unnamed} on rank {rank}")
        if lines:
            raise ValueError(f"ranks: expected the settings of rank 0 on all of them, got {'; '.join(lines)}")

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks: the same bits on all of them."""
        if self.world_size > 1:
            self.bytes_sent += tensor.nbytes
            dist.all_reduce(tensor, group=self._group_of(tensor))
            # torch does not count what a collective writes
            torch.autograd.graph.increment_version(tensor)

    def broadcast(self, tensor: Tensor) -> None:
        """Replace a tensor by that of rank 0."""
        if self.world_size > 1:
            self.bytes_sent += tensor.nbytes if self.is_main_process else 0
            dist.broadcast(tensor, 0, group=self._group_of(tensor))
            torch.autograd.graph.increment_version(tensor)

    def reduce_scatter_rows(self, tensor: Tensor, mesh: dist.DeviceMesh, cut: int, rows: int) -> Tensor:
        """Return this rank's rows [rows, K] of the sum of a contiguous [out, K] over all ranks, equal in each copy.

        Dimension ``cut`` of the mesh splits rows like ``torch.chunk``; the others copy them.
        """
        shards = mesh.size(cut)
        if shards > 1:
            each = -(-len(tensor) // shards)
            short = each * shards - len(tensor)
            # pad only if needed: it copies the tensor
            whole = torch.nn.functional.pad(tensor, (0, 0, 0, short)) if short else tensor
            received = torch.empty_like(whole)
            # no reduce-scatter: gloo does not specify the order of its sum
            dist.all_to_all_single(received, whole, group=mesh.get_group(cut))
            self.bytes_sent += whole.nbytes
            tensor, *addends = received.view(shards, each, -1)
            for addend in addends:
                tensor += addend
        tensor = tensor[:rows]
        for dim in range(mesh.ndim):
            if dim != cut and mesh.size(dim) > 1:
                dist.all_reduce(tensor, group=mesh.get_group(dim))
                self.bytes_sent += tensor.nbytes
        return tensor

    def _group_of(self, tensor: Tensor) -> dist.ProcessGroup:
        return self._open(self._of_steps) if tensor.device.type == "cpu" else dist.group.WORLD

    def _open(self, group: dist.ProcessGroup | None) -> dist.ProcessGroup:
        if group is None:
            raise RuntimeError("ranks: expected connected ones, got others; a closed trainer takes no step")
        return group
