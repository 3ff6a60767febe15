"""The processes that learn one mask together, and what they tell each other: the one place for collectives.

Numbers go through gloo, whatever the device. When a process ends, the kernel closes its sockets, and gloo fails where
something waits for it. It does not say which rank has ended, and those that wait for another rank learn nothing. So the
rank that sees a failure starts a roll call in the store that the ranks share. All waiting ranks look there once a
second and answer.

A process that is stopped, or whose machine hangs, closes nothing, and without torchrun the store may be in it. So no
call waits for the store, or for a connection, without a limit of its own. Each rank has a port at which a thread of it
answers: who waits for as long as it takes asks there whether the others still live.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import os
import pickle
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .in_time import begun, in_time
from .signs_of_life import CONNECTION, REFUSES, SILENT, Address, Lives, SignOfLife, reachable, signs_of

Result = TypeVar("Result")

# Seconds: between two looks at the store, for answers to a roll call
LOOK, ANSWER = 1.0, 5.0
# Seconds between two looks for answers, the first ones and the last ones
FIRST_PAUSE, LAST_PAUSE = 0.05, 0.4
# For the others to come, in seconds
MEETING = 1800.0
# Settings, or pairs of ranks, that one message names
NAMED = 8
# For what is waited for as long as it takes
NO_LIMIT = timedelta(days=365)
CALL = "roll call"


def of_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def rank_of_torchrun() -> int:
    """The rank that this process has under torchrun, known before the ranks have met; 0 without torchrun."""
    return int(os.environ["RANK"]) if of_torchrun() else 0


@contextmanager
def under_torchrun() -> Iterator[int]:
    """Join the processes that torchrun has started, where it has started this one; gives its number on its machine.

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


class MissingRanks(RuntimeError):
    """Ranks have ended, or do not answer.

    Attributes:
        missing: which; empty where all answer, but a connection between them broke.
    """

    def __init__(self, message: str, missing: Sequence[int] = ()):
        super().__init__(message)
        self.missing = list(missing)


class FailedRank(RuntimeError):
    """Another rank has raised what is no ValueError; the message tells which, and what."""


class Ranks:
    """This process among those of a run: those of torch.distributed where it is initialized, else it is alone.

    All ranks call the same methods in the same order, ``connect`` first. Alone, nothing is sent.

    Args:
        timeout: seconds that a method waits for the other ranks. A patient one waits longer, for as long as they live:
            it ends where a rank gives no sign of life for that many seconds. A rank that has ended is noticed at once.

    Attributes:
        rank: of this process, from 0.
        world: how many there are.
        bytes_sent: of the tensors that this rank has given to the others.

    Methods raise MissingRanks where ranks have ended or do not come; every call from then on does.
    """

    def __init__(self, timeout: float = 600.0):
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.timeout = timeout
        self.bytes_sent = 0
        self._group: dist.ProcessGroup | None = None
        self._looking: threading.Thread | None = None
        self._failure: RuntimeError | None = None
        self._under_way = False

    def connect(self) -> None:
        """Meet the other ranks, where that has not been done, within half an hour."""
        if self.world == 1 or self._group is not None:
            return
        limit = timedelta(seconds=MEETING)
        self._group = in_time(MEETING + ANSWER, lambda: dist.new_group(backend="gloo", timeout=limit))
        if self._group is None:
            self._failure = MissingRanks(f"ranks: the store that they share did not answer within {MEETING:g} s")
            raise self._failure
        # torch has no public name for the store, nor for another limit of time
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"maskpro_kernels/{self._group.group_name}", store)
        self._sign, self._addresses = SignOfLife(), {}
        own = Address(socket.gethostname(), self._sign.port, self._sign.token)
        addresses = {
            rank: address._replace(host="127.0.0.1") if address.host == own.host else address
            for rank, address in enumerate(self._gather_objects(own, MEETING))
            if rank != self.rank
        }
        # silence tells nothing where a connection cannot be had anyway
        self._addresses = reachable(addresses, ANSWER)
        # of all ranks, for rank 0 alone may be heard
        beyond = self._gather_objects(sorted(addresses.keys() - self._addresses.keys()), MEETING)
        pairs = [f"from rank {rank} to rank {other}" for rank, others in enumerate(beyond) for other in others]
        if pairs:
            warnings.warn(
                f"ranks: no connection {_listed(pairs)}, as behind a firewall; where the first waits for the second as "
                "long as it lives, it does not notice that it freezes",
                stacklevel=1,
            )

    def close(self) -> None:
        """Part from the other ranks; they need not do so at the same time."""
        if self._group is None:
            return
        self._sign.close()
        if self._failure is None:
            if self._under_way:
                # as behind an interrupt: destroying would wait for it
                self._keep_group()
            else:
                dist.destroy_process_group(self._group)
            self._failure = RuntimeError("ranks: expected open ones, got closed ones")
        self._group = None

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank, in float64, by rank. All ranks give as many, and at least one."""
        if self.world == 1:
            return [list(numbers)]
        return [row.tolist() for row in self._gather(torch.tensor(numbers, dtype=torch.float64, device="cpu"))]

    def meet(self) -> None:
        """Wait for all ranks."""
        # of no numbers nothing would be sent, and nobody waited for
        self.gather([0.0])

    def on_any(self, function: Callable[[], object] | None) -> bool:
        """Whether a function gives what is true on any rank; a rank without one takes that of others as it comes.

        Patient, but not until all ranks have come to it.
        """
        if self.world == 1:
            return function is not None and bool(function())
        if not any(asked for (asked,) in self.gather([function is not None])):
            return False
        flag = function is not None and bool(function())
        return any(row.item() for row in self._gather(torch.tensor([flag], device="cpu"), math.inf))

    def gather_objects(self, thing: object) -> list:
        """What every rank gives, by rank. Patient."""
        return [thing] if self.world == 1 else self._gather_objects(thing, math.inf)

    def _gather_objects(self, thing: object, seconds: float) -> list:
        content = torch.frombuffer(bytearray(pickle.dumps(thing)), dtype=torch.uint8)
        sizes = self._gather(torch.tensor([len(content)], device="cpu"), seconds)
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8, device="cpu")
        padded[: len(content)] = content
        rows = self._gather(padded, seconds)
        return [pickle.loads(row[: int(size)].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def first(self, function: Callable[[], Result]) -> Result:
        """What a function gives on rank 0, which alone calls it. Patient.

        Raises:
            Exception: what it raises there; on the others a ValueError where it is one, else a FailedRank.
        """
        if self.world == 1:
            return function()
        result = error = told = None
        if self.rank == 0:
            try:
                result = function()
            except Exception as raised:
                error, told = raised, _told(raised, 0)
        result, told = self.gather_objects((result, told))[0]
        if told is not None:
            raise error or told
        return result

    def all_of(self, function: Callable[[], Result]) -> Result:
        """What a function gives on this rank, once it has ended on all of them, which all call it. Patient.

        Raises:
            Exception: what it raises here; where it raises on others alone, a ValueError or FailedRank that names the
                first of them.
        """
        if self.world == 1:
            return function()
        result = error = told = None
        try:
            result = function()
        except Exception as raised:
            error, told = raised, _told(raised, self.rank)
        failed = next(filter(None, self.gather_objects(told)), None)
        if failed is not None:
            raise error or failed
        return result

    def agree(self, settings: Mapping[str, object]) -> None:
        """Compare settings that JSON can hold. Patient.

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
        told = [f"other {_listed(names)} on rank {rank}" for rank, names in differing.items() if names]
        if told:
            raise ValueError(f"ranks: expected what rank 0 has on all of them, got {'; '.join(told)}")

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks: the same bits on all of them."""
        if self.world > 1:
            self.bytes_sent += tensor.nbytes
            self._run(lambda group: dist.all_reduce(tensor, group=group, async_op=True), tensor.device)

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
            # no reduce-scatter: of gloo's nothing tells whether it has ended, and its sum has no known order
            self._over(mesh, cut, partial(dist.all_to_all_single, received, whole), whole)
            tensor, *others = received.view(parts, each, -1)
            for other in others:
                tensor += other
        return self.sum_of_copies(tensor[:rows], mesh, cut)

    def sum_of_copies(self, tensor: Tensor, mesh: dist.DeviceMesh, cut: int) -> Tensor:
        """Replace a tensor by its sum over the dimensions of a mesh but ``cut``: the same bits in each copy."""
        for dim in range(mesh.ndim):
            if dim != cut and mesh.size(dim) > 1:
                self._over(mesh, dim, partial(dist.all_reduce, tensor), tensor)
        return tensor

    def _over(self, mesh: dist.DeviceMesh, dim: int, collective: Callable, sent: Tensor) -> None:
        self.bytes_sent += sent.nbytes
        self._run(lambda group: collective(group=group, async_op=True), sent.device, group=mesh.get_group(dim))

    def gather_vectors(self, tensor: Tensor) -> Tensor:
        """[ranks, n]: the tensor [n] of each rank, of as many elements on all of them."""
        return tensor.unsqueeze(0) if self.world == 1 else torch.stack(self._gather(tensor))

    def limit(self, mesh: dist.DeviceMesh) -> None:
        """Have collectives of others on a CPU mesh wait no longer than ``timeout``."""
        if mesh.device_type == "cpu":
            for dim in range(mesh.ndim):
                seconds = timedelta(seconds=self.timeout + ANSWER)
                dist.distributed_c10d._set_pg_timeout(seconds, mesh.get_group(dim))

    def mesh(self, make: Callable[[], dist.DeviceMesh]) -> dist.DeviceMesh:
        """A mesh of all ranks, which all make: torch itself would wait for one that is lost for half an hour."""
        # who has ended before is named at once
        self.meet()
        accelerator = torch.accelerator.is_available() and torch.accelerator.current_device_index()

        def made() -> dist.DeviceMesh:
            # a thread begins with the first device
            if accelerator is not False:
                torch.accelerator.set_device_index(accelerator)
            return make()

        mesh = in_time(self.timeout + ANSWER, made)
        if mesh is None:
            self._fail(late=True)
        return mesh

    @contextmanager
    def naming_lost(self) -> Iterator[None]:
        """Collectives of others that fail inside, as those of a sharded model, raise MissingRanks too.

        Only gloo's: NCCL ends the process by its own watchdog.
        """
        try:
            yield
        except (MissingRanks, FailedRank):
            raise
        except RuntimeError as error:
            if self._group is None or "gloo" not in str(error):
                raise
            self._fail("imed out" in str(error), error)

    def spread_(self, tensor: Tensor) -> None:
        """Replace a tensor by that of rank 0."""
        if self.world > 1:
            self.bytes_sent += tensor.nbytes if self.rank == 0 else 0
            self._run(lambda group: dist.broadcast(tensor, 0, group=group, async_op=True), tensor.device)

    def _gather(self, tensor: Tensor, seconds: float | None = None) -> list[Tensor]:
        self.bytes_sent += tensor.nbytes
        rows = [torch.empty_like(tensor) for _ in range(self.world)]
        self._run(lambda group: dist.all_gather(rows, tensor, group=group, async_op=True), tensor.device, seconds)
        return rows

    def _run(
        self,
        begin: Callable,
        device: torch.device,
        seconds: float | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Take part in what all ranks begin, and wait for it: so many seconds, by default ``timeout``.

        Where these have no limit it is waited for as long as the ranks live.

        Args:
            group: of some of the ranks; default: all.
        """
        if self._failure is not None:
            raise self._failure
        if device.type != "cpu":
            # in the order of the device's stream; torch's own watchdog looks after it
            begin(group or dist.group.WORLD).wait()
            return
        group = group or self._group
        seconds = self.timeout if seconds is None else seconds
        limit, lives = time.monotonic() + seconds, Lives(self._addresses, self.timeout) if seconds == math.inf else None
        # gloo's own limit is for what we have given up
        own = NO_LIMIT if seconds == math.inf else timedelta(seconds=seconds + ANSWER)
        dist.distributed_c10d._set_pg_timeout(own, group)
        self._under_way = True
        work = begin(group)
        while not work.is_completed():
            with contextlib.suppress(RuntimeError):
                work.wait(timedelta(seconds=LOOK))
            late = time.monotonic() > limit or (lives is not None and lives.lost())
            if (late or self._called()) and not work.is_completed():
                self._fail(late)
        try:
            work.wait()
        except RuntimeError as error:
            self._fail(time.monotonic() > limit, error)
        self._under_way = False

    def _called(self) -> bool:
        """Whether a rank calls the roll, or the store has gone; one that does not answer tells nothing."""
        self._look().join(LOOK)
        return any(self._seen)

    def _look(self) -> threading.Thread:
        """What asks the store for a roll call, now or, where no answer has come, still."""

        def look() -> bool:
            try:
                return self._store.check([CALL])
            except RuntimeError:
                return True

        if self._looking is None or not self._looking.is_alive():
            self._looking, self._seen = begun(look)
        return self._looking

    def _fail(self, late: bool = False, cause: RuntimeError | None = None) -> NoReturn:
        self._keep_group()
        ended, silent = self._missing()
        missing = ended or silent
        if not missing:
            came = f"came later than {self.timeout:g} s" if late else "have lost a connection between them"
            told = f"the {self.world} ranks {came}"
        else:
            names = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
            came = "ended" if ended else f"did not come within {self.timeout:g} s" if late else "did not answer"
            told = f"{names} of {self.world} {came}"
        self._failure = MissingRanks(f"ranks: {told}; this is rank {self.rank}", missing)
        raise self._failure from cause

    def _keep_group(self) -> None:
        # a process that ends would wait for what is under way, which a rank that is frozen never ends
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))

    def _missing(self) -> tuple[list[int], list[int]]:
        """(ranks that have ended, ranks that do not answer)."""
        look, limit = self._look(), time.monotonic() + CONNECTION
        signs = signs_of(self._addresses)
        look.join(max(limit - time.monotonic(), 0.0))
        found = None if look.is_alive() else in_time(ANSWER + CONNECTION, self._call_the_roll)
        if found is None:
            # the store is in a process that is frozen
            found = tuple([rank for rank, sign in signs.items() if sign == told] for told in (REFUSES, SILENT))
        return found

    def _call_the_roll(self) -> tuple[list[int], list[int]]:
        """The same, where the store answers."""
        ended, waiting = set(), set(range(self.world)) - {self.rank}
        limit = time.monotonic() + ANSWER
        try:
            self._store.set(CALL, b"1")
            self._store.set(f"here/{self.rank}", b"1")
            pause = FIRST_PAUSE
            while waiting and time.monotonic() < limit:
                waiting = self._silent(waiting)
                refusing = self._refusing(waiting)
                # a rank may have answered and ended in between
                ended |= self._silent(refusing)
                waiting -= refusing
                time.sleep(pause)
                # longer and longer: all ranks look at all that are silent
                pause = min(2 * pause, LAST_PAUSE)
        except RuntimeError:
            # without torchrun the store is in the process of rank 0, and ends with it
            return [0], []
        return sorted(ended), sorted(waiting)

    def _silent(self, ranks: set[int]) -> set[int]:
        """Those that have not answered a roll call."""
        return {rank for rank in ranks if not self._store.check([f"here/{rank}"])}

    def _refusing(self, ranks: set[int]) -> set[int]:
        """Those whose sign of life has gone."""
        signs = signs_of({rank: self._addresses[rank] for rank in ranks & self._addresses.keys()})
        return {rank for rank, sign in signs.items() if sign == REFUSES}


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _told(error: Exception, rank: int) -> ValueError | FailedRank:
    """What the other ranks raise of an error of this one."""
    if isinstance(error, ValueError):
        return ValueError(f"rank {rank}: {error}" if rank else str(error))
    return FailedRank(f"rank {rank}: {type(error).__name__}: {error}")
